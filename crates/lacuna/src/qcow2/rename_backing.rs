//! Naming another backing file, or none.
//!
//! * Always last: all that was acknowledged is durable before the name changes, and nothing can
//!   change the image afterwards, since it was planned over the old layers.
//! * Always: the claim of being all zero is off, durably, before a backing file is named (A.1.2).

use super::create::{BackingName, raw_excludes_backing};
use super::format::{AutoclearFeatures, Header};
use super::header_change::change_header;
use super::image::Image;
use super::zero_claims;
use crate::storage::Storage;
use crate::{Error, ErrorKind, Result};

impl<S: Storage> Image<S> {
    /// Closes the image and has it stand on another backing file from the next opening on, or on
    /// none. A crash leaves the old name or the new one. What the two backing files hold is not
    /// looked at: [`job::rebase`](crate::job::rebase) keeps what a guest reads, this does not.
    ///
    /// # Errors
    /// `ReadOnly`, `InvalidRequest` for a name or format that is too long or beside a raw data file,
    /// `NoSpace` where the first cluster has no room for the name, before anything is changed; else
    /// what [`close`](Self::close) gives.
    ///
    /// ```
    /// use lacuna::qcow2::{Access, BackingName, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::qcow2::format::Header;
    /// use lacuna::storage::MemoryStorage;
    /// use std::sync::Arc;
    ///
    /// pollster::block_on(async {
    ///     let storage = Arc::new(MemoryStorage::new());
    ///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    ///     let parts = Parts::alone(Arc::clone(&storage));
    ///     let image = Image::open(parts, OpenOptions::new(Access::ReadWrite)).await?;
    ///     let base = BackingName { name: "base.raw".into(), format: Some("raw".into()) };
    ///     image.close_onto(Some(base)).await?;
    ///     let header = Header::decode(&storage.to_vec())?;
    ///     assert_eq!(header.backing_name.unwrap().as_bytes(), b"base.raw");
    ///     Ok::<_, lacuna::Error>(())
    /// }).unwrap();
    /// ```
    pub async fn close_onto(self, backing: Option<BackingName>) -> Result<()> {
        self.check_writable()?;
        let set = |header: &mut Header| set_backing(header, backing.as_ref());
        let mut planned = self.header();
        set(&mut planned)?;
        planned.encode()?;
        self.drop_claims(AutoclearFeatures::ZERO_CLAIMS - zero_claims::possible(&planned)).await?;
        self.clone().close().await?;
        change_header(&self.0.storage, set).await.map(drop)
    }

    /// Returns how many bytes of the disk the layer below supplies.
    pub(crate) fn backing_bytes(&self) -> u64 {
        self.0.backing.as_ref().map_or(0, |backing| backing.size())
    }

    pub(super) fn check_writable(&self) -> Result<()> {
        match self.0.meta.lock().writable {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::ReadOnly, "The image was opened read-only")),
        }
    }
}

fn set_backing(header: &mut Header, backing: Option<&BackingName>) -> Result<()> {
    header.backing_name = None;
    header.extensions.backing_format = None;
    let Some(backing) = backing else { return Ok(()) };
    backing.check()?;
    if header.has_raw_external_data() {
        return Err(raw_excludes_backing());
    }
    backing.put_into(header);
    Ok(())
}
