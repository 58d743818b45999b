//! The driver of lacuna itself.

use std::path::Path;

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, ChainOptions, FileOpener, Format};
use lacuna::qcow2::Access;
use lacuna::storage::FileStorage;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind};
use pollster::block_on;

use crate::protocol::{Mode, Need, Status};
use crate::serve::{Engine, Failure, OpenDisk, Outcome};

/// lacuna, in this process.
///
/// ```
/// use lacuna_conform::engines::Lacuna;
/// use lacuna_conform::serve::Engine;
/// assert!(Lacuna.lacks().is_empty());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Lacuna;

impl Engine for Lacuna {
    fn name(&self) -> String {
        format!("lacuna-{}", env!("CARGO_PKG_VERSION"))
    }

    fn lacks(&self) -> Vec<Need> {
        Vec::new()
    }

    fn open(&mut self, path: &Path, mode: Mode) -> Outcome<Box<dyn OpenDisk>> {
        let access = match mode {
            Mode::Read => Access::ReadOnly,
            Mode::Write => Access::ReadWrite,
        };
        let options = ChainOptions {
            backing: Allow::Named,
            data_file: Allow::Named,
            ..ChainOptions::new(Format::Qcow2, access)
        };
        let chain =
            block_on(chain::open(&FileOpener::default(), path, &options)).map_err(failure)?;
        Ok(Box::new(Opened(chain.into_disk())))
    }
}

struct Opened(chain::Disk<FileStorage>);

impl OpenDisk for Opened {
    fn size(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Outcome<()> {
        let (result, buffer) = block_on(self.0.read(GuestOffset(at), Buffer::new(bytes.len())));
        result.map_err(failure)?;
        bytes.copy_from_slice(&buffer);
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Outcome<()> {
        let write = self.0.write(GuestOffset(at), Buffer::from(bytes), WriteFlags::empty());
        block_on(write).0.map_err(failure)
    }

    fn zero(&mut self, at: u64, len: u64, unmap: bool) -> Outcome<()> {
        let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
        block_on(self.0.write_zeroes(GuestRange::new(GuestOffset(at), len), flags)).map_err(failure)
    }

    fn discard(&mut self, at: u64, len: u64) -> Outcome<()> {
        let range = GuestRange::new(GuestOffset(at), len);
        block_on(self.0.discard(range, DiscardMode::Guest)).map_err(failure)
    }

    fn flush(&mut self) -> Outcome<()> {
        block_on(self.0.flush()).map_err(failure)
    }

    fn extents(&mut self, at: u64, len: u64) -> Outcome<Vec<(u64, Status)>> {
        let range = GuestRange::new(GuestOffset(at), len);
        let extents = block_on(self.0.extents(range)).map_err(failure)?;
        let status = |reads_zero| if reads_zero { Status::Zero } else { Status::Data };
        Ok(extents.iter().map(|it| (it.range.len, status(it.status.reads_zero))).collect())
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        block_on(self.0.close()).map_err(failure)
    }
}

fn failure(error: Error) -> Failure {
    match error.kind() {
        ErrorKind::Unsupported => Failure::Unsupported(error.to_string()),
        _ => Failure::Failed(error.to_string()),
    }
}
