//! What may be claimed of a whole disk, found out by a walk over its map.

use crate::Result;
use crate::block::{AllocationDepth, ExtentCursor, Layer};
use crate::qcow2::format::{AutoclearFeatures, Header};
use crate::qcow2::image::Image;
use crate::qcow2::mapping::Mapping;
use crate::qcow2::zero_claims;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

impl<S: Storage> Image<S> {
    /// Returns the claims that hold, of those that the image may carry. Reads no guest bytes. Only
    /// for an image that nobody changes any more.
    pub(super) async fn true_claims(&self, header: &Header) -> Result<AutoclearFeatures> {
        let mut claims = zero_claims::possible(header);
        if claims.contains(AutoclearFeatures::ALL_UNALLOCATED) && !self.has_no_mapping().await? {
            claims -= AutoclearFeatures::ALL_UNALLOCATED;
        }
        if claims.contains(AutoclearFeatures::ALL_ZERO) && !self.has_no_data().await? {
            claims -= AutoclearFeatures::ALL_ZERO;
        }
        Ok(claims)
    }

    async fn has_no_mapping(&self) -> Result<bool> {
        let (mut at, end) = (GuestOffset(0), self.whole().end());
        while at < end {
            let rest = GuestRange::new(at, end - at);
            let run = self.plan(|meta| meta.run(rest)).await?;
            if run.mapping != (Mapping::Unallocated { reserved: None }) {
                return Ok(false);
            }
            at = at + run.len;
        }
        Ok(true)
    }

    async fn has_no_data(&self) -> Result<bool> {
        let mut extents = ExtentCursor::default();
        let (mut at, end) = (GuestOffset(0), self.whole().end());
        while at < end {
            let extent = extents.at(self, GuestRange::new(at, end - at)).await?;
            let is_ours = extent.status.depth <= AllocationDepth::TOP;
            if !(extent.status.reads_zero && is_ours) {
                return Ok(false);
            }
            at = extent.range.end();
        }
        Ok(true)
    }
}
