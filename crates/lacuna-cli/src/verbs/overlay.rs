//! An overlay for `-s`: the image below is not changed, and what is written is gone at the end.

use std::path::PathBuf;

use lacuna::block::Layer;
use lacuna::qcow2::{self, Access, BackingName, CreateOptions};
use lacuna::storage::{Create, FileOptions, FileStorage};
use pollster::block_on;

use crate::error::{CliError, CliResult};
use crate::persona::Tool;
use crate::verbs::open::{self, Request};
use crate::verbs::spec::ImageSpec;
use crate::verbs::spec::tree::BelowSpec;

/// A file that nobody needs by name once it is open.
pub(super) struct Overlay {
    file: PathBuf,
    image: ImageSpec,
    base: Request,
}

/// Makes an empty overlay over the image of `request`.
pub(super) fn make(tool: &Tool, request: &Request) -> CliResult<Overlay> {
    let base = Request { access: Access::ReadOnly, ..request.clone() };
    let chain = open::open_bare(tool, &base)?;
    let format = open::of_chain(chain.disk().format());
    // Nobody follows the name; what the overlay stands on is described.
    let name = base.image.file.clone();
    let options = CreateOptions {
        size_bytes: chain.disk().size_bytes(),
        backing: Some(BackingName { name, format: Some(format.name().to_owned()) }),
        ..CreateOptions::default()
    };
    let file = std::env::temp_dir().join(format!("lacuna-io-{}.qcow2", std::process::id()));
    let exclusive = FileOptions { create: Create::Exclusive, ..FileOptions::read_write() };
    let storage = FileStorage::open(&file, &exclusive)?;
    block_on(qcow2::create(&storage, &options))?;
    let mut image = ImageSpec::from_name(&file.to_string_lossy(), Some("qcow2"))?;
    image.disk.below = BelowSpec::on(&base.image.disk, format);
    Ok(Overlay { file, image, base })
}

impl Overlay {
    /// Returns how to open it.
    pub(super) fn request(&self, access: Access) -> Request {
        let image = self.image.clone();
        Request { image, access, ..self.base.clone() }
    }

    /// Removes its name; the content stays as long as it is open.
    pub(super) fn forget(self) -> CliResult<()> {
        std::fs::remove_file(&self.file)
            .map_err(|error| CliError::new(format!("Removing the overlay: {error}")))
    }
}
