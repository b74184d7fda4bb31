//! Objects as streams.

use std::io::{self, Read, Write};

use object_store::path::Path;
use object_store::{GetOptions, GetRange, MultipartUpload, PutPayload};

use super::errors::{ObjectError, Result};
use super::{Claim, Objects, PIECE};

/// An object that is read from its begin.
pub struct ObjectReader<'a> {
    pub(super) objects: &'a Objects,
    pub(super) place: Path,
    /// Its bytes.
    pub size: u64,
    pub(super) version: Option<String>,
    /// Where the next piece begins.
    pub(super) at: u64,
    pub(super) piece: Vec<u8>,
    pub(super) used: usize,
}

impl ObjectReader<'_> {
    /// Gets the next piece.
    pub(super) fn fetch(&mut self) -> Result<()> {
        (self.piece, self.used) = (Vec::new(), 0);
        let end = self.size.min(self.at + PIECE);
        if self.at == end {
            return Ok(());
        }
        let how = GetOptions {
            range: Some(GetRange::Bounded(self.at..end)),
            if_match: self.version.clone(),
            ..GetOptions::default()
        };
        let store = &self.objects.store;
        let bytes = self
            .objects
            .wait(&self.place, async { store.get_opts(&self.place, how).await?.bytes().await })?;
        if bytes.len() as u64 != end - self.at {
            return Err(ObjectError::Failed(format!(
                "{} has become shorter",
                self.objects.named(&self.place)
            )));
        }
        (self.piece, self.at) = (bytes.to_vec(), end);
        Ok(())
    }
}

impl Read for ObjectReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.piece.len() {
            self.fetch().map_err(io::Error::other)?;
        }
        let mut rest = self.piece.get(self.used..).unwrap_or_default();
        let count = rest.read(buffer)?;
        self.used += count;
        Ok(count)
    }
}

/// An object that is written; what is not finished is not there.
pub struct ObjectWriter<'a> {
    pub(super) objects: &'a Objects,
    pub(super) claim: Claim,
    pub(super) upload: Option<Box<dyn MultipartUpload>>,
    pub(super) size: usize,
    pub(super) part: Vec<u8>,
    pub(super) sent: bool,
}

impl ObjectWriter<'_> {
    fn send(&mut self) -> Result<()> {
        let Some(upload) = &mut self.upload else { return Ok(()) };
        let part = PutPayload::from(std::mem::take(&mut self.part));
        self.sent = true;
        self.objects.wait(&self.claim.place, upload.put_part(part))
    }

    /// Has all of it be there.
    ///
    /// # Errors
    /// [`ObjectError::Failed`]; it is as it was before then.
    pub fn finish(mut self) -> Result<()> {
        if !self.part.is_empty() || !self.sent {
            self.send()?;
        }
        let Some(mut upload) = self.upload.take() else { return Ok(()) };
        let done = self.objects.wait(&self.claim.place, upload.complete());
        if done.is_err() {
            self.upload = Some(upload);
        }
        done.map(drop)
    }
}

impl Write for ObjectWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = bytes.len().min(self.size - self.part.len());
        self.part.extend_from_slice(bytes.get(..take).unwrap_or_default());
        if self.part.len() == self.size {
            self.send().map_err(io::Error::other)?;
        }
        Ok(take)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ObjectWriter<'_> {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else { return };
        if let Err(error) = self.objects.wait(&self.claim.place, upload.abort()) {
            tracing::warn!(object = %self.claim.place, %error, "what was written of it takes room still");
        }
    }
}
