//! What an L2 entry says of the guest bytes it covers (B.4, B.6, B.7).

use super::format::{CompressedRun, Geometry, L2Entry, SubclusterState, Version};
use crate::units::{GuestOffset, HostOffset};
use crate::{Error, Result};

/// Whether host bytes may be overwritten where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnWrite {
    /// Something else references the cluster too.
    CopyFirst,
    InPlace,
}

impl OnWrite {
    pub(super) const fn of(entry: L2Entry) -> Self {
        if entry.is_copied() { Self::InPlace } else { Self::CopyFirst }
    }
}

/// Guest bytes as far as this image alone knows them.
///
/// `Unallocated` is not zero: the backing layer decides, and only where there is none it is zeros.
/// Offsets are those of the first byte asked about, not of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    Compressed(CompressedRun),
    Data { host: HostOffset, on_write: OnWrite },
    Unallocated { reserved: Option<HostOffset> },
    Zero { reserved: Option<HostOffset> },
}

impl Mapping {
    /// Says whether `next`, `distance` bytes on, belongs to the same run.
    pub(super) fn is_continued_by(self, next: Self, distance: u64) -> bool {
        let moved = |host: Option<HostOffset>| host.map(|host| host + distance);
        match (self, next) {
            (Self::Data { host, on_write }, Self::Data { host: there, on_write: then }) => {
                host + distance == there && on_write == then
            }
            (Self::Unallocated { reserved }, Self::Unallocated { reserved: there })
            | (Self::Zero { reserved }, Self::Zero { reserved: there }) => moved(reserved) == there,
            _ => false,
        }
    }

    /// Returns the host bytes behind the range: its data or what is reserved for it.
    pub(super) const fn host(self) -> Option<HostOffset> {
        match self {
            Self::Compressed(_) => None,
            Self::Data { host, .. } => Some(host),
            Self::Unallocated { reserved } | Self::Zero { reserved } => reserved,
        }
    }
}

/// Where guest data lies: in the image file, or in a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataPlace {
    External,
    ImageFile,
}

/// Decodes entries of one image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decoder {
    pub(super) geometry: Geometry,
    pub(super) place: DataPlace,
}

impl Decoder {
    /// Returns the host cluster of an entry. In an external data file, offset 0 with the copied
    /// flag is a cluster as any other (B.4).
    pub(super) fn host(&self, entry: L2Entry) -> Option<HostOffset> {
        match self.place {
            DataPlace::External if !entry.is_compressed() && entry.is_copied() => {
                entry.host().or(Some(HostOffset(0)))
            }
            _ => entry.host(),
        }
    }

    /// Refuses an entry whose cluster starts within another: freeing it would free that one.
    pub(super) fn check_alignment(&self, entry: L2Entry, guest: GuestOffset) -> Result<()> {
        match self.host(entry) {
            Some(host) if !self.geometry.is_aligned(host.0) => {
                Err(corrupt(guest, entry, "points to no multiple of the cluster size"))
            }
            _ => Ok(()),
        }
    }

    /// Returns what the entry says of the byte at `guest`, and of how many bytes of the cluster
    /// from there on.
    pub(super) fn decode(&self, entry: L2Entry, guest: GuestOffset) -> Result<(Mapping, u64)> {
        let within = self.geometry.within_cluster(guest.0);
        let rest = self.geometry.cluster_bytes() - within;
        if let Some(run) = entry.compressed_run(&self.geometry) {
            if self.place == DataPlace::External {
                return Err(corrupt(guest, entry, "is compressed, but data lies in a data file"));
            }
            return Ok((Mapping::Compressed(run), rest));
        }
        self.check_alignment(entry, guest)?;
        let host = self.host(entry).map(|host| host + within);
        match self.geometry.has_subclusters() {
            true => self.decode_subcluster(entry, guest, host),
            false => Ok((self.decode_standard(entry, guest, host)?, rest)),
        }
    }

    fn decode_standard(
        &self,
        entry: L2Entry,
        guest: GuestOffset,
        host: Option<HostOffset>,
    ) -> Result<Mapping> {
        if entry.has_zero_flag() {
            return match self.geometry.version() {
                Version::V2 => Err(corrupt(guest, entry, "has the zero flag of version 3")),
                Version::V3 => Ok(Mapping::Zero { reserved: host }),
            };
        }
        Ok(match host {
            Some(host) => Mapping::Data { host, on_write: OnWrite::of(entry) },
            None => Mapping::Unallocated { reserved: None },
        })
    }

    fn decode_subcluster(
        &self,
        entry: L2Entry,
        guest: GuestOffset,
        host: Option<HostOffset>,
    ) -> Result<(Mapping, u64)> {
        let subcluster = self.geometry.subcluster_bytes();
        let within = self.geometry.within_cluster(guest.0);
        let (state, end) = entry.subclusters.run((within / subcluster) as u32);
        let mapping = match (state, host) {
            (SubclusterState::Data, Some(host)) => {
                Mapping::Data { host, on_write: OnWrite::of(entry) }
            }
            (SubclusterState::Unallocated, reserved) => Mapping::Unallocated { reserved },
            (SubclusterState::Zero, reserved) => Mapping::Zero { reserved },
            (SubclusterState::Data | SubclusterState::Invalid, _) => {
                return Err(corrupt(guest, entry, "has an impossible subcluster bitmap"));
            }
        };
        Ok((mapping, u64::from(end) * subcluster - within))
    }
}

fn corrupt(guest: GuestOffset, entry: L2Entry, what: &str) -> Error {
    Error::corrupt(format!(
        "L2 entry {:#018x} (subclusters {:#018x}) of guest offset {guest} {what}",
        entry.word, entry.subclusters.0
    ))
}
