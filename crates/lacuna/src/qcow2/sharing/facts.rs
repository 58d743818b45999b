//! What the pins of an image hold, without opening it.

use std::collections::HashSet;

use super::load::damaged;
use crate::Result;
use crate::qcow2::check::read::{read_bytes, read_words};
use crate::qcow2::check::refcounts::RefcountReader;
use crate::qcow2::format::{Header, L1Entry, L2Entry, Snapshot};
use crate::qcow2::image::Image;
use crate::qcow2::{snapshots, totals};
use crate::storage::Storage;

/// What is shared in an image, as its pins tell.
///
/// ```
/// assert_eq!(lacuna::qcow2::PinFacts::default().keepers, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PinFacts {
    /// Host clusters that are held for sharers.
    pub keepers: u64,
    /// Those of them that nobody shares any more: [`Image::drop_unused_pins`] frees them.
    pub without_sharers: u64,
    /// References of keepers other than by their pins: guest clusters, once for each snapshot too.
    pub references: u64,
    /// Bytes that the tables of the pins take.
    pub table_bytes: u64,
}

/// Counts what the pins of an image hold, by its file only; nothing where it has none, or where their
/// tables and the refcounts that may be asked for take more than `most_table_bytes`.
///
/// Reads the snapshot table, the tables of the pins and refcounts: about 10 bytes for each keeper. What
/// was not flushed is not counted.
///
/// # Errors
/// `Corrupt` where a table cannot be what it says; `Io`.
///
/// ```
/// # use lacuna::qcow2::{self, CreateOptions};
/// # use lacuna::storage::MemoryStorage;
/// # pollster::block_on(async {
/// let storage = MemoryStorage::new();
/// let options = CreateOptions { size_bytes: 1 << 30, ..CreateOptions::default() };
/// qcow2::create(&storage, &options).await?;
/// let header = qcow2::read_header(&storage).await?;
/// assert!(qcow2::pin_facts(&storage, &header, u64::MAX).await?.is_none());
/// # Ok::<_, lacuna::Error>(())
/// # })?;
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn pin_facts<S: Storage>(
    storage: &S,
    header: &Header,
    most_table_bytes: u64,
) -> Result<Option<PinFacts>> {
    if header.snapshots.count == 0 {
        return Ok(None);
    }
    let (all, _) = snapshots::read_table(storage, header).await?;
    match all.iter().find(|snapshot| snapshot.is_pin()) {
        Some(pin) => facts_of(storage, header, pin, most_table_bytes).await,
        None => Ok(None),
    }
}

async fn facts_of<S: Storage>(
    storage: &S,
    header: &Header,
    pin: &Snapshot,
    most_table_bytes: u64,
) -> Result<Option<PinFacts>> {
    let geometry = header.geometry;
    pin.check_l1(&geometry)?;
    let file_bytes = storage.len().await?;
    let l1_bytes = u64::from(pin.l1.entries) * 8;
    let inside = file_bytes.saturating_sub(pin.l1.offset.0).min(l1_bytes) / 8;
    let l1 = read_words(storage, pin.l1.offset, inside).await?;
    if l1_bytes.saturating_add(totals::table_bytes(header, &l1, file_bytes)) > most_table_bytes {
        return Ok(None);
    }
    let refcounts = totals::refcount_table(storage, header, file_bytes).await?;
    let mut reader = RefcountReader::new(storage, &refcounts);
    let mut facts = PinFacts {
        table_bytes: geometry.clusters_for(l1_bytes) * geometry.cluster_bytes(),
        ..PinFacts::default()
    };
    let mut seen = HashSet::new();
    for word in l1 {
        let Some(table) = L1Entry(word).table() else { continue };
        if !geometry.is_aligned(table.0) || table.0 >= file_bytes || !seen.insert(table) {
            return Err(damaged(format!("their L1 table names {table}")));
        }
        facts.table_bytes += geometry.cluster_bytes();
        let bytes = read_bytes(storage, table, geometry.cluster_bytes() as usize).await?;
        for entry in bytes.chunks_exact(geometry.entry_width().bytes() as usize) {
            let entry = L2Entry::at_start(entry, geometry.entry_width());
            if let Some(host) = entry.host() {
                let refcount = reader.read(geometry.host_cluster(host).0).await?;
                facts.keepers += 1;
                facts.without_sharers += u64::from(refcount <= 1);
                facts.references = facts.references.saturating_add(refcount.saturating_sub(1));
            }
        }
    }
    Ok(Some(facts))
}

impl<S: Storage> Image<S> {
    /// As [`pin_facts`] of this image's file.
    ///
    /// # Errors
    /// As for [`pin_facts`].
    pub async fn pin_facts(&self) -> Result<Option<PinFacts>> {
        pin_facts(self.storage(), &self.header(), u64::MAX).await
    }
}
