//! Where the tables of an image lie, and who points to them.

use std::collections::BTreeMap;

use super::plan::Run;
use crate::qcow2::bitmaps;
use crate::qcow2::check::read::{read_vec, read_words};
use crate::qcow2::format::{BITMAPS_MAGIC, Geometry, Header, L1Entry};
use crate::qcow2::snapshots::decode_table;
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// Where the header names the active L1 table, the refcount table and the snapshot table (B.1).
pub(super) const L1_AT: HostOffset = HostOffset(40);
const REFCOUNTS_AT: HostOffset = HostOffset(48);
const SNAPSHOTS_AT: HostOffset = HostOffset(64);

/// What a table is; one of a later kind points to those of earlier kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Bitmap,
    L1,
    Directory,
    Snapshots,
    Refcounts,
}

/// A table that begins with a cluster and has clusters of its own.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) kind: Kind,
    pub(super) run: Run,
    pub(super) range: HostRange,
    /// The words that name it.
    pub(super) pointers: Vec<HostOffset>,
}

/// All tables but refcount blocks.
#[derive(Debug)]
pub(super) struct Structures {
    pub(super) geometry: Geometry,
    /// By first cluster.
    pub(super) tables: BTreeMap<u64, Table>,
    /// L2 tables by cluster, with the number of references to each.
    pub(super) l2: BTreeMap<u64, u64>,
    /// The L1 table of the pins of shared clusters, where there is one.
    pub(super) pin_l1: Option<HostRange>,
}

impl Structures {
    /// Reads them from an image that was found clean.
    pub(super) async fn read<S: Storage>(storage: &S) -> Result<Self> {
        let header = crate::qcow2::read_header(storage).await?;
        let geometry = header.geometry;
        let (tables, l2) = (BTreeMap::new(), BTreeMap::new());
        let mut all = Self { geometry, tables, l2, pin_l1: None };
        all.add(Kind::L1, header.l1.range(), L1_AT)?;
        let refcounts = header.refcount_table;
        let bytes = u64::from(refcounts.clusters) << geometry.cluster_bits();
        all.add(Kind::Refcounts, HostRange::new(refcounts.offset, bytes), REFCOUNTS_AT)?;
        all.add_snapshots(storage, &header).await?;
        all.add_bitmaps(storage, &header).await?;
        all.add_l2(storage).await?;
        Ok(all)
    }

    async fn add_snapshots<S: Storage>(&mut self, storage: &S, header: &Header) -> Result<()> {
        if header.snapshots.count == 0 {
            return Ok(());
        }
        let decoder = decode_table(storage, header).await?;
        let table = header.snapshots.offset;
        self.add(Kind::Snapshots, HostRange::new(table, decoder.table_bytes()), SNAPSHOTS_AT)?;
        let starts = decoder.starts().to_vec();
        for (start, snapshot) in starts.into_iter().zip(decoder.into_snapshots()) {
            snapshot.check_l1(&self.geometry)?;
            self.add(Kind::L1, snapshot.l1.range(), table + start)?;
            if snapshot.is_pin() {
                self.pin_l1 = Some(snapshot.l1.range());
            }
        }
        Ok(())
    }

    async fn add_bitmaps<S: Storage>(&mut self, storage: &S, header: &Header) -> Result<()> {
        let Some(extension) = header.valid_bitmaps() else { return Ok(()) };
        let range = HostRange::new(extension.directory_offset, extension.directory_bytes);
        let at = directory_pointer(storage, header, range.start).await?;
        self.add(Kind::Directory, range, at)?;
        for (at, entry) in bitmaps::directory(storage, header).await? {
            let bytes = u64::from(entry.table_entries) * 8;
            self.add(Kind::Bitmap, HostRange::new(entry.table_offset, bytes), at)?;
        }
        Ok(())
    }

    /// Walks every L1 table, as often as somebody has it.
    async fn add_l2<S: Storage>(&mut self, storage: &S) -> Result<()> {
        let l1: Vec<(HostRange, u64)> =
            self.of(Kind::L1).map(|table| (table.range, table.pointers.len() as u64)).collect();
        for (range, times) in l1 {
            for word in read_words(storage, range.start, range.len / 8).await? {
                if let Some(table) = L1Entry(word).table() {
                    *self.l2.entry(self.geometry.host_cluster(table).0).or_insert(0) += times;
                }
            }
        }
        Ok(())
    }

    pub(super) fn of(&self, kind: Kind) -> impl Iterator<Item = &Table> {
        self.tables.values().filter(move |table| table.kind == kind)
    }

    /// Adds a table; one that several have is one.
    fn add(&mut self, kind: Kind, range: HostRange, pointer: HostOffset) -> Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        let first = self.geometry.host_cluster(range.start).0;
        let run = Run { first, clusters: self.geometry.clusters_for(range.len) };
        let below = self.tables.range(..run.end()).next_back().map(|(_, table)| table);
        let clash =
            below.is_some_and(|it| it.run.end() > first && (it.run != run || it.kind != kind));
        if clash || !self.geometry.is_aligned(range.start.0) {
            return Err(Error::unsupported(format!(
                "The table at {} overlaps another one; such images are not compacted",
                range.start
            ))
            .at(range.start));
        }
        let table = self.tables.entry(first).or_insert_with(|| Table {
            kind,
            run,
            range,
            pointers: Vec::new(),
        });
        table.range.len = table.range.len.max(range.len);
        table.pointers.push(pointer);
        Ok(())
    }
}

/// Finds the word of the header extension that names the bitmap directory (B.3): behind its magic and
/// length lie the number of bitmaps, a reserved word and the size.
async fn directory_pointer<S: Storage>(
    storage: &S,
    header: &Header,
    directory: HostOffset,
) -> Result<HostOffset> {
    let bytes = read_vec(storage, HostOffset(0), header.geometry.cluster_bytes()).await?;
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 4).and_then(|it| it.try_into().ok());
        bytes.map_or(0, u32::from_be_bytes)
    };
    let mut at = match header.geometry.version() {
        crate::qcow2::format::Version::V2 => 72,
        crate::qcow2::format::Version::V3 => word(100) as usize,
    };
    while word(at) != 0 {
        let pointer = u64::from(word(at + 24)) << 32 | u64::from(word(at + 28));
        if word(at) == BITMAPS_MAGIC && pointer == directory.0 {
            return Ok(HostOffset(at as u64 + 24));
        }
        at = at.saturating_add(8 + (word(at + 4) as usize).next_multiple_of(8));
    }
    Err(Error::corrupt("The header extension that names the bitmap directory was not found"))
}
