//! An encoded header whose parts can be put elsewhere in the first cluster.

use std::ops::Range;

use super::super::extension;
use super::super::geometry::Version;
use super::{Areas, V3_BYTES, raw_fields};
use crate::Result;

/// What storage does not tear.
pub(crate) const SECTOR: usize = 512;
/// Where the header names the place of the backing file name.
const NAME_OFFSET_AT: usize = 8;
/// Where the header names its own length, behind which the extensions begin (version 3).
const HEADER_BYTES_AT: usize = 100;

/// Returns the fields of later versions of the format, behind those that are known.
///
/// Where the extensions are away from the header ([`Placed::with_tail_at`]), a change of it was stopped
/// half-way: what lies in between is no field. The first sector tells, which ends in zeros then.
pub(super) fn later_fields(cluster: &[u8], header_bytes: usize) -> &[u8] {
    let fields = cluster.get(V3_BYTES..header_bytes).unwrap_or_default();
    match fields.get(..SECTOR - V3_BYTES) {
        Some(first) if first.ends_with(&[0; 8]) => {
            let zeros = first.iter().rev().take_while(|byte| **byte == 0).count();
            let used = first.len().saturating_sub(zeros).next_multiple_of(8);
            first.get(..used).unwrap_or(first)
        }
        _ => fields,
    }
}

/// Returns where in a first cluster lies what its header shows: header and extensions, and the name of the
/// backing file.
pub(crate) fn shown_parts(cluster: &[u8]) -> Result<[Range<usize>; 2]> {
    let (raw, later) = raw_fields(cluster)?;
    let Areas { header_bytes, extensions_end, backing_name } =
        Areas::decode(&raw, &later, cluster)?;
    let area = cluster.get(header_bytes..extensions_end).unwrap_or_default();
    let name_bytes = backing_name.map_or(0, |name| name.as_bytes().len());
    let name = extensions_end..extensions_end.saturating_add(name_bytes);
    Ok([0..header_bytes.saturating_add(extension::bytes_taken(area)), name])
}

/// The start of a file: header, extensions and backing file name, right behind each other.
pub(crate) struct Placed {
    pub(crate) bytes: Vec<u8>,
    pub(super) version: Version,
    pub(crate) extensions_at: usize,
    /// Where the extensions end, and the name begins if there is one.
    pub(crate) name_at: usize,
}

impl Placed {
    /// Returns the name of the backing file.
    pub(crate) fn name(&self) -> &[u8] {
        self.bytes.get(self.name_at..).unwrap_or_default()
    }

    /// Returns extensions and name.
    pub(crate) fn tail(&self) -> &[u8] {
        self.bytes.get(self.extensions_at..).unwrap_or_default()
    }

    /// Says whether the extensions can begin anywhere: version 2 has no field for it.
    pub(crate) fn has_length(&self) -> bool {
        self.version >= Version::V3
    }

    /// Returns the first sector, with the name at `at` instead.
    pub(crate) fn with_name_at(&self, at: u32) -> Vec<u8> {
        let mut bytes = self.bytes.get(..self.name_at).unwrap_or_default().to_vec();
        if !self.name().is_empty() {
            put(&mut bytes, NAME_OFFSET_AT, &u64::from(at).to_be_bytes());
        }
        bytes.resize(SECTOR, 0);
        bytes
    }

    /// Returns the first sector, with the extensions and the name behind them at `at` instead. What lies
    /// between counts as fields of a later version for others.
    pub(crate) fn with_tail_at(&self, at: u32) -> Vec<u8> {
        let mut bytes = self.bytes.get(..self.extensions_at).unwrap_or_default().to_vec();
        put(&mut bytes, HEADER_BYTES_AT, &at.to_be_bytes());
        if !self.name().is_empty() {
            let behind = self.name_at.saturating_sub(self.extensions_at) as u64;
            let name_at = u64::from(at).saturating_add(behind);
            put(&mut bytes, NAME_OFFSET_AT, &name_at.to_be_bytes());
        }
        bytes.resize(SECTOR, 0);
        bytes
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    for (place, byte) in bytes.iter_mut().skip(at).zip(field) {
        *place = *byte;
    }
}
