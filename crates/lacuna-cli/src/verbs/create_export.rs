//! `create` onto an export of a server, which is there already and keeps its size.

use lacuna::buffer::Buffer;
use lacuna::qcow2::Access;
use lacuna::storage::Storage;
use lacuna::units::HostOffset;
use pollster::block_on;

use super::open;
use super::spec::nbd::NbdSpec;
use crate::error::{CliError, CliResult};
use crate::nodes::{AnyStorage, open_export};

/// What QEMU overwrites of an export that becomes a raw disk, lest it look like another format.
const FIRST_BYTES: u64 = 512;

/// Says whether a name is one of an export.
pub(super) fn is_export(name: &str) -> bool {
    NbdSpec::is_name(name)
}

/// Opens the export that is to become an image.
pub(super) fn open(name: &str) -> CliResult<AnyStorage> {
    let spec = NbdSpec::from_name(name)?;
    block_on(open_export(&spec, Access::ReadWrite)).map_err(|error| open::of_export(&error))
}

/// Makes a raw disk of an export: it has to be large enough.
pub(super) fn make_raw(name: &str, size_bytes: u64) -> CliResult<()> {
    let storage = open(name)?;
    let there = block_on(storage.len())?;
    if size_bytes > there {
        return Err(CliError::new("Cannot grow NBD nodes").in_our_words(format!(
            "The export has {there} bytes, and only its server can make it larger"
        )));
    }
    let first = Buffer::zeroed(FIRST_BYTES.min(there) as usize);
    let (written, _buffer) = block_on(storage.write_at(HostOffset(0), first));
    written?;
    block_on(storage.flush())?;
    Ok(())
}
