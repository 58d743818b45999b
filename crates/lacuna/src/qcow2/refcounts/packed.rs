//! Room for compressed clusters, which share host clusters (B.5).

use super::Refcounts;
use crate::qcow2::need::{Planned, Stop};
use crate::qcow2::quarantine::Quarantine;
use crate::units::HostOffset;
use crate::{Error, ErrorKind};

impl Refcounts {
    /// Hands out `len` bytes for a compressed cluster, packed behind the last one where it fits.
    /// Each host cluster touched has one more reference afterwards.
    pub(in crate::qcow2) fn allocate_bytes(
        &mut self,
        len: u64,
        limit: u64,
        quarantine: &Quarantine,
    ) -> Planned<HostOffset> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let packed = match self.compressed_cursor {
            Some(at) => self.room_behind(at)?.then_some(at),
            None => None,
        };
        let start = match packed {
            Some(at) if cluster_bytes - self.geometry.within_cluster(at.0) >= len => {
                self.share(at)?;
                at
            }
            _ => self.extend_packing(packed, len, quarantine)?,
        };
        if start.0 + len > limit {
            return Err(Stop::Fail(Error::new(
                ErrorKind::NoSpace,
                format!("Compressed clusters cannot lie beyond {limit:#x} at this cluster size"),
            )));
        }
        let end = start + len;
        self.compressed_cursor = (!self.geometry.is_aligned(end.0)).then_some(end);
        Ok(start)
    }

    fn room_behind(&mut self, at: HostOffset) -> Planned<bool> {
        let refcount = self.read(self.geometry.host_cluster(at))?;
        Ok(refcount > 0 && refcount < self.geometry.refcount_max())
    }

    fn share(&mut self, at: HostOffset) -> Planned<()> {
        let cluster = self.geometry.host_cluster(at);
        let refcount = self.read(cluster)?;
        self.write(cluster, refcount + 1)
    }

    /// Takes a new cluster; the bytes start in the old one where the new one follows it.
    fn extend_packing(
        &mut self,
        packed: Option<HostOffset>,
        len: u64,
        quarantine: &Quarantine,
    ) -> Planned<HostOffset> {
        if let Some(at) = packed {
            self.read(self.geometry.host_cluster(at))?;
        }
        let new = self.allocate(1, quarantine)?.start;
        match packed {
            Some(at) if at.0.next_multiple_of(self.geometry.cluster_bytes()) == new.0 => {
                debug_assert!(len <= self.geometry.cluster_bytes());
                self.share(at)?;
                Ok(at)
            }
            _ => Ok(new),
        }
    }
}
