//! An encoded header whose parts can be put elsewhere in the first cluster.

use super::super::geometry::Version;

/// Where the header names the place of the backing file name.
const NAME_OFFSET_AT: usize = 8;
/// Where the header names its own length, behind which the extensions begin (version 3).
const HEADER_BYTES_AT: usize = 100;

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

    /// Returns everything up to the name, with the name at `at` instead.
    pub(crate) fn with_name_at(&self, at: u32) -> Vec<u8> {
        let mut bytes = self.bytes.get(..self.name_at).unwrap_or_default().to_vec();
        if !self.name().is_empty() {
            put(&mut bytes, NAME_OFFSET_AT, &u64::from(at).to_be_bytes());
        }
        bytes
    }

    /// Returns everything up to the extensions, with those and the name behind them at `at`
    /// instead. What lies between counts as fields of a later version.
    pub(crate) fn with_tail_at(&self, at: u32) -> Vec<u8> {
        let mut bytes = self.bytes.get(..self.extensions_at).unwrap_or_default().to_vec();
        put(&mut bytes, HEADER_BYTES_AT, &at.to_be_bytes());
        if !self.name().is_empty() {
            let behind = self.name_at.saturating_sub(self.extensions_at) as u64;
            let name_at = u64::from(at).saturating_add(behind);
            put(&mut bytes, NAME_OFFSET_AT, &name_at.to_be_bytes());
        }
        bytes
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    for (place, byte) in bytes.iter_mut().skip(at).zip(field) {
        *place = *byte;
    }
}
