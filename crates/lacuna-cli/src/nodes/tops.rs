//! The layers that options put on top of a disk.

mod compress;
mod copy_on_read;
mod limited;
mod write_through;

use std::sync::Arc;

use compress::Compress;
use copy_on_read::CopyOnRead;
use lacuna::block::Layer;
use lacuna::job::Target;
use lacuna::{Error, Result};
use limited::Limited;
use write_through::WriteThrough;

use super::below::Below;
use super::debug::Rules;
use crate::verbs::spec::tree::TopSpec;

/// A disk with layers on it.
pub(super) struct Stacked {
    pub(super) top: Below,
    /// Those of the highest test driver.
    pub(super) rules: Option<Arc<Rules>>,
}

/// Puts layers on a disk, the lowest first. `unit_bytes` is what the disk allocates as one.
pub(super) fn stacked(disk: Below, tops: &[TopSpec], unit_bytes: u64) -> Result<Stacked> {
    let (mut below, mut rules) = (disk, None);
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
            TopSpec::CopyOnRead => {
                Below::new(CopyOnRead { below, unit_bytes, rules: rules.clone() })
            }
            TopSpec::WriteThrough => Below::new(WriteThrough(below)),
            TopSpec::Debug(limits, given) => {
                let given = Arc::new(Rules::new(given.clone()));
                rules = Some(Arc::clone(&given));
                Below::new(Limited { below, limits: *limits, rules: given })
            }
        };
    }
    Ok(Stacked { top: below, rules })
}
