//! `create` onto an export of a server, which is there already and keeps its size, unless the
//! server changes it on request.

use lacuna::ErrorKind;
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::Access;
use lacuna::storage::Storage;
use lacuna::units::HostOffset;
use pollster::block_on;

use super::open;
use super::spec::ImageSpec;
use super::spec::nbd::NbdSpec;
use super::spec::tree::StorageSpec;
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::nodes::{AnyStorage, open_export};

/// What QEMU overwrites of an export that becomes a raw disk, lest it look like another format.
const FIRST_BYTES: u64 = 512;

/// Returns the export that a name leads to.
pub(super) fn named(name: &str) -> CliResult<Option<Box<NbdSpec>>> {
    NbdSpec::is_name(name).then(|| NbdSpec::from_name(name).map(Box::new)).transpose()
}

/// Returns the export that a name leads to, or `json:` with the driver `nbd`, which may have
/// certificates among the objects.
pub(super) fn described(name: &str, parsed: &Parsed) -> CliResult<Option<Box<NbdSpec>>> {
    if !name.starts_with("json:") {
        return named(name);
    }
    let image = match ImageSpec::from_name(name, None) {
        // Nothing else that is described so can be made: whoever makes the file says so.
        Err(_) if !name.contains("nbd") => return Ok(None),
        image => open::with_certificates(image?, parsed)?,
    };
    match (image.disk.storage_name, image.disk.file) {
        (Some(_), StorageSpec::Nbd(nbd)) => Ok(Some(nbd)),
        _ => Ok(None),
    }
}

/// Opens the export that is to become an image.
pub(super) fn open(export: &NbdSpec) -> CliResult<AnyStorage> {
    block_on(open_export(export, Access::ReadWrite)).map_err(|error| open::of_export(&error))
}

/// Makes a raw disk of an export: it has to be large enough, or its server has to make it so.
pub(super) fn make_raw(export: &NbdSpec, size_bytes: u64) -> CliResult<()> {
    let storage = open(export)?;
    let there = block_on(storage.len())?;
    if size_bytes > there {
        block_on(storage.set_len(size_bytes, Hold::none())).map_err(|error| {
            match error.kind() {
                ErrorKind::Unsupported => CliError::new("Cannot grow NBD nodes").in_our_words(
                    format!("The export has {there} bytes, and only its server can make it larger"),
                ),
                _ => error.into(),
            }
        })?;
    }
    let first = Buffer::zeroed(FIRST_BYTES.min(there) as usize);
    let (written, _buffer) = block_on(storage.write_at(HostOffset(0), first));
    written?;
    block_on(storage.flush())?;
    Ok(())
}
