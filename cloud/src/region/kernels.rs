//! Kernels and RAM disks: images of the host's own, and which of them an instance boots.

use crate::fault::{Fault, Result};
use crate::host::BootFile;
use crate::model::{Image, ImageKind, Instance, Name};

use super::{Region, Work, images, now};

/// Under which name it is kept that an image of the host's was deregistered, and as of which time the host had it.
fn deregistered(image: &str) -> String {
    format!("deregistered/{image}")
}

/// The kernel and the RAM disk that an instance boots; `None`: the one on its root volume.
pub(super) type Choice = (Option<String>, Option<String>);

impl Region {
    /// Has the kernels and RAM disks of the host be images, and no others: one that the host does not have can be booted
    /// by nobody. Who has deregistered one does not find it again until it is imported anew. Returns the ids of the new ones.
    ///
    /// # Errors
    /// The host's, the store's.
    pub(super) fn adopt_boot_files(&self) -> Result<Vec<String>> {
        let files = self.host.boot_files().map_err(Fault::internal)?;
        let mut new = Vec::new();
        for file in &files {
            let added = self.transact(|work| {
                if work.get::<Image>(&file.id)?.is_some() {
                    return Ok(false);
                }
                let gone = deregistered(&file.id);
                match work.get::<Name>(&gone)? {
                    Some(name) if name.of == file.created.to_string() => return Ok(false),
                    Some(_) => work.delete::<Name>(&gone),
                    None => {}
                }
                work.put(&self.image_of(file))?;
                Ok(true)
            })?;
            new.extend(added.then(|| file.id.clone()));
        }
        let has = |id: &str| files.iter().any(|file| file.id == id);
        for image in self.all::<Image>()? {
            if image.kind != ImageKind::Machine && !has(&image.id) {
                self.transact(|work| {
                    work.delete::<Image>(&image.id);
                    Ok(())
                })?;
            }
        }
        let prefix = deregistered("");
        for name in self.all_of::<Name>(&prefix)? {
            if name.id.strip_prefix(&prefix).is_some_and(|id| !has(id)) {
                self.transact(|work| {
                    work.delete::<Name>(&name.id);
                    Ok(())
                })?;
            }
        }
        Ok(new)
    }

    fn image_of(&self, file: &BootFile) -> Image {
        Image {
            description: format!("Imported as {}", file.name),
            created: jiff::Timestamp::from_second(i64::try_from(file.created).unwrap_or(0)).unwrap_or(now()),
            kind: file.kind,
            public: true,
            ena_support: false,
            ..images::blank(&file.id, &self.settings.owner, &file.name)
        }
    }

    /// Remembers that a kernel or RAM disk was deregistered, which the host has still.
    pub(super) fn forget_boot_file(&self, work: &mut Work<'_>, image: &Image) -> Result<()> {
        let id = deregistered(&image.id);
        work.put(&Name { id, of: image.created.as_second().to_string() })
    }

    /// The kernel or RAM disk of this id, if the account may boot it.
    ///
    /// # Errors
    /// `InvalidAMIID.*`.
    pub(super) fn bootable(
        &self,
        work: &mut Work<'_>,
        account: &str,
        kind: ImageKind,
        id: &str,
    ) -> Result<String> {
        crate::id::check(id, kind.prefix(), "InvalidAMIID")?;
        let image = work.get::<Image>(id)?.filter(|image| image.launchable(account));
        let image = image.ok_or_else(|| images::missing(id))?;
        images::check_available(&image)?;
        Ok(image.id)
    }

    /// What an instance of `image` boots where these are asked for. What is not asked for is the image's; but its RAM disk
    /// goes with its kernel, not with another.
    ///
    /// # Errors
    /// `InvalidAMIID.*`.
    pub(super) fn choice(
        &self,
        work: &mut Work<'_>,
        account: &str,
        image: &Image,
        (kernel, ramdisk): (Option<&str>, Option<&str>),
    ) -> Result<Choice> {
        let mut checked = |kind, asked: Option<&str>, default: Option<&String>| match (asked, default) {
            (Some(id), default) if default.is_none_or(|default| default != id) => {
                self.bootable(work, account, kind, id).map(Some)
            }
            // The image's own come with the right to launch it, as its snapshots do.
            (_, Some(id)) => {
                let found = work.get::<Image>(id)?.ok_or_else(|| images::missing(id))?;
                images::check_available(&found)?;
                Ok(Some(found.id))
            }
            (_, None) => Ok(None),
        };
        let own = kernel.is_none_or(|id| image.kernel.as_deref() == Some(id));
        let kernel = checked(ImageKind::Kernel, kernel, image.kernel.as_ref())?;
        let ramdisk = checked(ImageKind::Ramdisk, ramdisk, image.ramdisk.as_ref().filter(|_| own))?;
        Ok((kernel, ramdisk))
    }

    /// The kernel or the RAM disk that an instance has as its image says; none where the image is gone.
    pub(super) fn by_default(
        &self,
        work: &mut Work<'_>,
        instance: &Instance,
        kind: ImageKind,
    ) -> Result<Option<String>> {
        let Some(image) = work.get::<Image>(&instance.image)? else { return Ok(None) };
        let (kernel, ramdisk) = self.choice(work, &instance.account, &image, (None, None))?;
        Ok(if kind == ImageKind::Kernel { kernel } else { ramdisk })
    }
}
