//! The layers that options put on top of a disk.

mod compress;
mod copy_on_read;
mod limited;
mod write_through;

use compress::Compress;
use copy_on_read::CopyOnRead;
use lacuna::block::Layer;
use lacuna::job::Target;
use lacuna::{Error, Result};
use limited::Limited;
use write_through::WriteThrough;

use super::below::Below;
use crate::verbs::spec::tree::TopSpec;

/// Puts layers on a disk, the lowest first. `unit_bytes` is what the disk allocates as one.
pub(super) fn stacked(disk: Below, tops: &[TopSpec], unit_bytes: u64) -> Result<Below> {
    let mut below = disk;
    for top in tops {
        below = match top {
            TopSpec::Compress if below.encoder().is_none() => {
                return Err(Error::unsupported(
                    "Compression is not supported for underlying format: raw",
                ));
            }
            TopSpec::Compress => Below::new(Compress(below)),
            TopSpec::CopyOnRead if below.is_read_only() => {
                return Err(Error::invalid("Can't use copy-on-read on read-only device"));
            }
            TopSpec::CopyOnRead => Below::new(CopyOnRead { below, unit_bytes }),
            TopSpec::WriteThrough => Below::new(WriteThrough(below)),
            TopSpec::Limits(limits) => Below::new(Limited { below, limits: *limits }),
        };
    }
    Ok(below)
}
