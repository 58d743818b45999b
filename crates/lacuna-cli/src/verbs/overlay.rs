//! An overlay for `-s`: the image below is not changed, and what is written is gone at the end.
//!
//! * Never has a name of its own, so that nothing is left behind whatever ends the process.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use lacuna::block::Layer;
use lacuna::qcow2::{self, Access, BackingName, CreateOptions};
use lacuna::storage::FileStorage;
use pollster::block_on;

use crate::error::CliResult;
use crate::persona::Tool;
use crate::verbs::open::{self, Request};
use crate::verbs::spec::ImageSpec;
use crate::verbs::spec::tree::{BelowSpec, StorageSpec};
use crate::verbs::unnamed;

/// A name that is stored where the image's own one is too long; nobody follows either.
const LONGEST_NAME: usize = 1023;

/// A file without a name; as long as this lives, the request's path leads to it.
pub(crate) struct Overlay {
    file: FileStorage,
    image: ImageSpec,
    base: Request,
}

/// Makes an empty overlay over the image of `request`.
pub(crate) fn make(tool: &Tool, request: &Request) -> CliResult<Overlay> {
    let base = Request { access: Access::ReadOnly, ..request.clone() };
    let chain = open::open_bare(tool, &base)?;
    let format = open::of_chain(chain.disk().format());
    // What the overlay stands on is described.
    let name = Some(&base.image.file).filter(|name| (1..=LONGEST_NAME).contains(&name.len()));
    let name = name.map_or("base", |name| name).to_owned();
    let options = CreateOptions {
        size_bytes: chain.disk().size_bytes(),
        backing: Some(BackingName { name, format: Some(format.name().to_owned()) }),
        ..CreateOptions::default()
    };
    let file = unnamed::file(&unnamed::folder(), "a temporary overlay")
        .map_err(|error| error.with_hint("TMPDIR names another folder"))?;
    block_on(qcow2::create(&file, &options))?;
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let mut image = ImageSpec::from_name(&path, Some("qcow2"))?;
    // What is thrown away need not go past the page cache, and not every folder lets it.
    image.disk.file = StorageSpec::buffered_file(Path::new(&path));
    image.disk.below = BelowSpec::on(&base.image.disk, format);
    Ok(Overlay { file, image, base })
}

impl Overlay {
    /// Returns how to open it.
    pub(crate) fn request(&self, access: Access) -> Request {
        let image = self.image.clone();
        Request { image, access, ..self.base.clone() }
    }
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay").field("file", &self.file).finish_non_exhaustive()
    }
}
