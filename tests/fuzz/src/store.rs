//! A file in memory that grows no further than a test should.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hutch_blockdev::store::Store;

/// The longest file.
const MOST: u64 = 64 << 20;

/// The file; clones are the same.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    pub fn of(bytes: &[u8]) -> Memory {
        Memory(Arc::new(Mutex::new(bytes.to_vec())))
    }

    #[cfg(test)]
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, offset: u64, len: u64, bytes: &mut Vec<u8>) -> io::Result<std::ops::Range<usize>> {
        let end = offset.checked_add(len).filter(|end| *end <= MOST);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        if bytes.len() < end as usize {
            bytes.resize(end as usize, 0);
        }
        Ok(offset as usize..end as usize)
    }
}

impl Store for Memory {
    unsafe fn read(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        let bytes = self.bytes();
        let mut rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        for buf in bufs {
            let (now, later) = rest.split_at(rest.len().min(buf.iov_len));
            // SAFETY: the caller promises buffers that are mapped and writable, which are not the file's own memory.
            unsafe {
                buf.iov_base.cast::<u8>().write_bytes(0, buf.iov_len);
                now.as_ptr().copy_to_nonoverlapping(buf.iov_base.cast(), now.len());
            }
            rest = later;
        }
        Ok(())
    }

    unsafe fn write(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        let mut bytes = self.bytes();
        let mut at = offset;
        for buf in bufs {
            let range = self.range(at, buf.iov_len as u64, &mut bytes)?;
            // SAFETY: the caller promises buffers that are mapped and readable.
            let from = unsafe { std::slice::from_raw_parts(buf.iov_base.cast::<u8>(), buf.iov_len) };
            if let Some(to) = bytes.get_mut(range) {
                to.copy_from_slice(from);
            }
            at += buf.iov_len as u64;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        let mut bytes = self.bytes();
        let end = if punch { offset.saturating_add(len).min(bytes.len() as u64) } else { offset + len };
        if end <= offset {
            return Ok(());
        }
        let range = self.range(offset, end - offset, &mut bytes)?;
        bytes.get_mut(range).into_iter().for_each(|part| part.fill(0));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MOST {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.bytes().resize(len as usize, 0);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let bytes = self.bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        // By pages, as a file system has it.
        let page = rest.chunks(4096).position(|page| page.iter().any(|byte| *byte != 0));
        Ok(page.map(|page| offset + page as u64 * 4096))
    }
}
