//! Guest bytes that the host copies instead of us: clusters are allocated and linked as for a write.

use super::image::Image;
use super::plan_write::{NewData, WritePiece, link_data, plan_write};
use super::vm_state::Region;
use crate::Result;
use crate::block::{AllocationDepth, Extent, ExtentStatus};
use crate::storage::{HostSource, Storage};
use crate::units::{GuestOffset, GuestRange, HostRange};

impl<S: Storage> Image<S> {
    /// Returns where the bytes of an extent lie, if they lie as they are in a file.
    pub(super) fn source_of(&self, extent: &Extent) -> Option<HostSource> {
        let ExtentStatus { depth, is_compressed, host, .. } = extent.status;
        if is_compressed || depth == AllocationDepth::NOWHERE {
            return None;
        }
        if depth == AllocationDepth::TOP {
            return self.data_storage().host_source(HostRange::new(host?, extent.range.len));
        }
        let status = ExtentStatus { depth: AllocationDepth(depth.0 - 1), ..extent.status };
        self.0.backing.as_ref()?.host_source_of(&Extent { status, ..*extent })
    }

    pub(super) async fn copy_guest(&self, offset: GuestOffset, source: HostSource) -> Result<()> {
        let range = GuestRange::new(offset, source.range().len);
        self.0.meta.lock().check_bounds(range)?;
        let (mut at, mut behind) = (offset, None);
        while at < range.end() {
            let rest = GuestRange::new(at, range.end() - at);
            let piece = self.plan(|meta| plan_write(meta, Region::Disk, rest, behind)).await?;
            let len = piece.len();
            behind = Some(piece.host_end());
            self.copy_piece(piece, source.part(at - offset, len)).await?;
            at = at + len;
        }
        Ok(())
    }

    async fn copy_piece(&self, piece: WritePiece, source: HostSource) -> Result<()> {
        match piece {
            WritePiece::InPlace { token, host, .. } => {
                self.data_storage().copy_at(source, host, self.hold(token)).await
            }
            WritePiece::Link(new) => self.copy_and_link(&new, source).await,
        }
    }

    async fn copy_and_link(&self, new: &NewData, source: HostSource) -> Result<()> {
        let hold = self.fill_head_and_tail(new, self.hold(new.token)).await?;
        let (hold, with_driver) = hold.shared();
        self.data_storage().copy_at(source, new.host, with_driver).await?;
        let linked = self.plan(|meta| link_data(meta, new)).await;
        drop(hold);
        linked
    }
}
