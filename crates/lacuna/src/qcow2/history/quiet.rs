//! Has everybody else wait, and storage as far as memory, so that tables may be read and replaced whole.
//!
//! * Always: requests wait from before the first table is read until the image goes by the new ones.
//! * Always: a write that a dropped change left with the driver keeps them waiting too: nobody may be
//!   handed the cluster that it goes to.

use std::sync::Arc;

use crate::buffer::{Hold, Release};
use crate::qcow2::bitmaps::Still;
use crate::qcow2::image::Image;
use crate::qcow2::meta::Meta;
use crate::qcow2::resize::MAX_SIZE_BYTES;
use crate::qcow2::turn::Taken;
use crate::qcow2::write_back::Refcounting;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, ErrorKind, Result};

/// All that anybody claims: the largest disk, and what those do who change pins.
const EVERYTHING: GuestRange = GuestRange::new(GuestOffset(0), MAX_SIZE_BYTES + 2);
/// So often a write-back may free what makes another one necessary.
const MOST_WRITE_BACKS: usize = 8;

/// Nobody else changes the image while this lives.
pub(super) struct Quiet {
    _pause: Hold,
    _exclusion: Hold,
}

impl Release for Quiet {
    fn release(&self, _: u64) {}
}

impl Quiet {
    /// Returns a hold that keeps it quiet.
    pub(super) fn hold(self: &Arc<Self>) -> Hold {
        Hold::new(Arc::clone(self) as Arc<dyn Release>, 0)
    }
}

impl<S: Storage> Image<S> {
    /// Waits until nobody else changes the image or edits its bitmaps, and keeps it so.
    pub(super) async fn quiet(&self) -> Result<(Arc<Quiet>, [Taken<'_>; 2])> {
        self.plan(Meta::before_metadata_change).await?;
        let Still { turn, exclusion, edits } = self.still(EVERYTHING).await?;
        // Last, as who stores bitmaps waits for its end.
        let quiet = Arc::new(Quiet { _pause: self.pause().await?, _exclusion: exclusion });
        Ok((quiet, [turn, edits]))
    }

    /// Brings storage as far as memory. The caller has the turn to write back, and it is quiet.
    pub(super) async fn settle(&self) -> Result<()> {
        self.wait_for_older().await;
        for _ in 0..MOST_WRITE_BACKS {
            self.write_back_in_turn(Refcounting::Written).await?;
            if self.0.meta.lock().is_settled() {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::Busy, "The image does not come to rest"))
    }

    /// Waits for all requests that run now, reads as well.
    pub(super) async fn wait_for_older(&self) {
        let now = self.0.meta.lock().in_flight.moment();
        loop {
            let over = {
                let meta = self.0.meta.lock();
                match meta.in_flight.all_began_after(now) {
                    true => return,
                    false => meta.in_flight.wait(),
                }
            };
            over.await;
        }
    }
}

impl Meta {
    /// Says whether storage has all that memory has.
    fn is_settled(&self) -> bool {
        self.quarantine.is_empty()
            && !self.l2.is_dirty()
            && !self.refcounts.blocks.is_dirty()
            && self.refcounts.is_stored()
    }
}
