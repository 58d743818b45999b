//! What an open image needs to know of its internal snapshots: where their tables lie.

use super::format::{Header, Snapshot, SnapshotTableDecoder};
use super::overlap::{Structure, Structures};
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostRange;
use crate::{Error, Result};

/// Reads the snapshot table. Returns the snapshots and the bytes the table takes.
pub(super) async fn read_table<S: Storage>(
    storage: &S,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64)> {
    let decoder = decode_table(storage, header).await?;
    let table_bytes = decoder.table_bytes();
    Ok((decoder.into_snapshots(), table_bytes))
}

/// Reads the snapshot table to its end, which lies in the file.
pub(super) async fn decode_table<S: Storage>(
    storage: &S,
    header: &Header,
) -> Result<SnapshotTableDecoder> {
    let mut decoder = SnapshotTableDecoder::new(header.snapshots);
    let file_bytes = storage.len().await?;
    while let Some(range) = decoder.wanted() {
        if range.start.0 >= file_bytes {
            return Err(Error::corrupt(format!(
                "Snapshot table of {} entries at {} passes the end of the file at {file_bytes:#x}",
                header.snapshots.count, header.snapshots.offset
            )));
        }
        let buffer = Buffer::new(range.len as usize);
        let (result, bytes) = storage.read_at(range.start, buffer).await;
        result.map_err(|error| error.context("Reading the snapshot table"))?;
        decoder.feed(&bytes)?;
    }
    Ok(decoder)
}

/// Adds the snapshot table and the snapshots' L1 tables to what no write may hit.
pub(super) async fn add_structures<S: Storage>(
    storage: &S,
    header: &Header,
    structures: &mut Structures,
) -> Result<()> {
    let (snapshots, table_bytes) = read_table(storage, header).await?;
    structures.add(HostRange::new(header.snapshots.offset, table_bytes), Structure::SnapshotTable);
    for snapshot in snapshots {
        snapshot.check_l1(&header.geometry)?;
        structures.add_inactive_l1(snapshot.l1.range());
    }
    Ok(())
}
