//! The limits that decoding and encoding share (B.1, B.11).

use super::super::extension;
use super::super::features::{AutoclearFeatures, Features};
use super::super::geometry::{Geometry, Version};
use super::super::name::StoredName;
use super::{CompressionType, Demand, Header, backing_name_too_long};
use super::{MAX_BACKING_NAME_BYTES, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS};
use crate::units::HostOffset;
use crate::{Error, Result};

impl Header {
    pub(super) fn check_room(&self, bytes: usize) -> Result<()> {
        let cluster_bytes = self.geometry.cluster_bytes();
        if bytes as u64 > cluster_bytes {
            return Err(Error::new(
                crate::ErrorKind::NoSpace,
                format!(
                    "Header with extensions and backing file name needs {bytes} bytes; \
                     the first cluster has {cluster_bytes}"
                ),
            ));
        }
        Ok(())
    }

    /// Checks the limits that decoding and encoding share.
    pub(super) fn check(&self, demand: Demand) -> Result<()> {
        self.check_refcount_table(demand)?;
        self.check_snapshot_table()?;
        self.check_l1()?;
        self.check_names()?;
        if self.geometry.version() == Version::V2 {
            self.check_version_2()?;
        } else if !self.unknown_fields.len().is_multiple_of(8) {
            return Err(Error::corrupt("Unknown header fields must have a multiple of 8 bytes"));
        }
        self.features.refuse_unknown(&self.extensions.feature_names)?;
        if self.features.autoclear.contains(AutoclearFeatures::BITMAPS) {
            self.extensions.bitmaps.map_or(Ok(()), |bitmaps| bitmaps.check(&self.geometry))?;
        }
        Ok(())
    }

    fn check_refcount_table(&self, demand: Demand) -> Result<()> {
        let table = self.refcount_table;
        let len_bytes = u64::from(table.clusters).saturating_mul(self.geometry.cluster_bytes());
        check_table(
            &self.geometry,
            "Refcount table",
            table.offset,
            len_bytes,
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        if demand == Demand::Usable && (table.clusters == 0 || table.offset.0 == 0) {
            return Err(Error::corrupt(format!(
                "Refcount table has {} clusters at offset {}; at least 1 past the header would be right",
                table.clusters, table.offset
            )));
        }
        Ok(())
    }

    fn check_snapshot_table(&self) -> Result<()> {
        if self.snapshots.count > MAX_SNAPSHOTS {
            return Err(Error::corrupt(format!(
                "Snapshot table has {} entries; at most {MAX_SNAPSHOTS} are allowed",
                self.snapshots.count
            )));
        }
        // An entry has at least 40 bytes; the whole size shows only when the table is read.
        let least_bytes = u64::from(self.snapshots.count).saturating_mul(40);
        check_table(&self.geometry, "Snapshot table", self.snapshots.offset, least_bytes, u64::MAX)
    }

    fn check_l1(&self) -> Result<()> {
        let entries = u64::from(self.l1.entries);
        let len_bytes = entries.saturating_mul(8);
        check_table(&self.geometry, "Active L1 table", self.l1.offset, len_bytes, MAX_L1_BYTES)?;
        let needed = self.geometry.l1_entries_for(self.size_bytes);
        if entries < needed {
            return Err(Error::corrupt(format!(
                "Active L1 table has {entries} entries; a disk of {} bytes needs {needed}",
                self.size_bytes
            )));
        }
        if entries > 0 && self.l1.offset.0 == 0 {
            return Err(Error::corrupt("Active L1 table offset is 0, which is the header's place"));
        }
        Ok(())
    }

    fn check_names(&self) -> Result<()> {
        let backing_bytes = self.backing_name.as_ref().map_or(0, StoredName::len);
        if backing_bytes > MAX_BACKING_NAME_BYTES {
            return Err(backing_name_too_long(backing_bytes as u64, MAX_BACKING_NAME_BYTES));
        }
        let format_bytes = self.extensions.backing_format.as_ref().map_or(0, StoredName::len);
        extension::check_format_bytes(format_bytes)
    }

    fn check_version_2(&self) -> Result<()> {
        let plain = self.features == Features::default()
            && self.compression == CompressionType::Deflate
            && !self.geometry.has_subclusters()
            && self.unknown_fields.is_empty();
        if plain {
            Ok(())
        } else {
            Err(Error::corrupt(
                "Version 2 has no feature bits, extended L2 entries, compression type or unknown \
                 header fields",
            ))
        }
    }
}

/// Checks a table's place; its end must stay within 2^63 bytes, as file offsets do.
pub(crate) fn check_table(
    geometry: &Geometry,
    what: &str,
    offset: HostOffset,
    len_bytes: u64,
    max_bytes: u64,
) -> Result<()> {
    if len_bytes > max_bytes {
        return Err(Error::corrupt(format!(
            "{what} has {len_bytes} bytes; at most {max_bytes} are allowed"
        )));
    }
    let end = offset.0.checked_add(len_bytes).filter(|end| i64::try_from(*end).is_ok());
    if end.is_none() || !geometry.is_aligned(offset.0) {
        return Err(Error::corrupt(format!(
            "{what} offset {offset} is not a multiple of the cluster size {:#x} below 2^63",
            geometry.cluster_bytes()
        )));
    }
    Ok(())
}
