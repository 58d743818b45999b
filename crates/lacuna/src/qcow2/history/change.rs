//! A change of the snapshots under way: what is to be written, and the switch to it.
//!
//! | step | what | a crash in it leaves |
//! |---|---|---|
//! | 1 | storage is brought as far as memory; everybody waits | the image as it was |
//! | 2 | L2 tables whose flags change, L1 tables, the snapshot table, refcount blocks and table, all to clusters that are free; a flush | the image as it was: what was written is free |
//! | 3 | 48 or 72 bytes of the header's first sector: size, and where the four tables lie; a flush | the old image or the new one, whole |
//! | 4 | memory goes by the new tables; what became free is punched | space not given back |
//!
//! * Always: nothing in use is overwritten but for the header's sector, so that neither COPIED flags
//!   nor refcounts are ever seen half changed. No dirty bit is needed, and version 2 is as safe as 3.
//! * A change that is dropped in step 3 or right after may have happened or not: the open image takes no
//!   more changes then, and what was acknowledged is whole in either case.

use std::sync::Arc;

use futures_util::{StreamExt, stream};

use super::counts::{Counted, Counts, Lack, NewRefcounts};
use super::quiet::Quiet;
use crate::buffer::Buffer;
use crate::qcow2::format::{
    AutoclearFeatures, Geometry, Header, L1Entry, L1Location, RefcountTableLocation, Snapshot,
    SnapshotTableLocation, Version,
};
use crate::qcow2::image::Image;
use crate::qcow2::meta::{L1Table, Meta};
use crate::qcow2::overlap::Structures;
use crate::qcow2::sharing::Pins;
use crate::qcow2::snapshots;
use crate::qcow2::turn::Taken;
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Bytes that wait to be written together.
const BATCH_BYTES: usize = 4 << 20;
/// So many writes are under way at once.
const WRITES_AT_ONCE: usize = 16;
/// Where the fields start that are switched.
const FIELDS_AT: usize = 24;

pub(super) struct Change<'a, S: Storage> {
    pub(super) image: &'a Image<S>,
    pub(super) geometry: Geometry,
    /// The file as it was.
    pub(super) file_bytes: u64,
    /// The header as it was.
    pub(super) header: Header,
    /// The disk's L1 table as it was.
    pub(super) l1: Vec<L1Entry>,
    /// The disk's L1 table as it is to be.
    pub(super) new_l1: Vec<L1Entry>,
    /// The snapshots: as they were, until somebody changes them.
    pub(super) snapshots: Vec<Snapshot>,
    /// Where the table of them lies.
    table_range: HostRange,
    counts: Counts,
    pending: Vec<(HostOffset, Buffer)>,
    pending_bytes: usize,
    quiet: Arc<Quiet>,
    /// Given up before others may go on.
    _bitmaps: [Taken<'a>; 2],
    _turn: Taken<'a>,
}

/// What the header is to say, beside where tables lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields {
    pub(super) size_bytes: u64,
    /// Claims of the whole disk that no longer hold.
    pub(super) dropped_claims: AutoclearFeatures,
}

/// Everything that memory needs of the new image.
struct NewImage {
    header: Header,
    refcounts: Vec<u64>,
    l1: Vec<L1Entry>,
}

impl<'a, S: Storage> Change<'a, S> {
    pub(super) async fn begin(image: &'a Image<S>) -> Result<Self> {
        let (quiet, bitmaps) = image.quiet().await?;
        let turn = image.0.turn.take().await;
        image.settle().await?;
        let header = image.header();
        let geometry = header.geometry;
        let (l1, table, location) = {
            let meta = image.0.meta.lock();
            let range = meta.refcounts.table_range();
            let clusters = (range.len >> geometry.cluster_bits()) as u32;
            let location = RefcountTableLocation { offset: range.start, clusters };
            (meta.l1.entries.clone(), meta.refcounts.block_offsets(), location)
        };
        let (snapshots, table_bytes) = snapshots::read_table(image.storage(), &header).await?;
        Ok(Self {
            image,
            geometry,
            file_bytes: image.storage().len().await?,
            table_range: HostRange::new(header.snapshots.offset, table_bytes),
            header,
            new_l1: l1.clone(),
            l1,
            snapshots,
            counts: Counts::new(geometry, table, location),
            pending: Vec::new(),
            pending_bytes: 0,
            quiet,
            _bitmaps: bitmaps,
            _turn: turn,
        })
    }

    /// Returns where the disk's L1 table lies.
    fn l1_range(&self) -> HostRange {
        HostRange::new(self.image.0.meta.lock().l1.offset, self.l1.len() as u64 * 8)
    }

    // ---- refcounts -------------------------------------------------------------------------

    /// Does something with refcounts, loading what it lacks.
    pub(super) async fn counted<T>(
        &mut self,
        mut step: impl FnMut(&mut Counts) -> Counted<T>,
    ) -> Result<T> {
        loop {
            match step(&mut self.counts) {
                Ok(done) => return Ok(done),
                Err(Lack::Block(index)) => self.load_block(index).await?,
                Err(Lack::Fail(error)) => return Err(error),
            }
        }
    }

    async fn load_block(&mut self, index: u64) -> Result<()> {
        let bytes = self.geometry.cluster_bytes();
        let block = match self.counts.place_of(index) {
            None => Buffer::zeroed(bytes as usize),
            Some(offset) if self.geometry.is_aligned(offset.0) && offset.0 < self.file_bytes => {
                self.image.load(offset, bytes, "refcount block").await?
            }
            Some(offset) => {
                return Err(Error::corrupt(format!(
                    "Refcount block {index} cannot lie at {offset}; run check -r all"
                ))
                .at(offset));
            }
        };
        self.counts.insert(index, block);
        Ok(())
    }

    /// Returns how often a cluster that an entry shows is counted.
    pub(super) async fn refcount(&mut self, host: HostOffset) -> Result<u64> {
        let cluster = self.geometry.host_cluster(host);
        self.counted(|counts| counts.of_shown(cluster)).await
    }

    /// Takes a run of free clusters.
    pub(super) async fn take(&mut self, clusters: u64) -> Result<HostOffset> {
        let first = self.counted(|counts| counts.take(clusters)).await?;
        let at = self.geometry.host_offset(first);
        self.expect_writes(HostRange::new(at, clusters * self.geometry.cluster_bytes())).await?;
        Ok(at)
    }

    /// Takes note of what is going to be written, which must be no metadata in use.
    async fn expect_writes(&self, range: HostRange) -> Result<()> {
        let checked = {
            let mut meta = self.image.0.meta.lock();
            // Also if this change is dropped: what it wrote is no zeros.
            meta.zero_from = meta.zero_from.max(range.end());
            meta.structures.check(range, None)
        };
        match checked {
            Ok(()) => Ok(()),
            Err(error) => Err(self.image.mark_corrupt(error).await),
        }
    }

    /// Takes a reference off a table.
    pub(super) async fn drop_range(&mut self, range: HostRange) -> Result<()> {
        self.counted(|counts| counts.drop_range(range)).await
    }

    // ---- writing ---------------------------------------------------------------------------

    /// Writes to clusters that were taken, in some while.
    pub(super) async fn write(&mut self, at: HostOffset, bytes: Buffer) -> Result<()> {
        self.pending_bytes += bytes.len();
        match self.pending.last_mut() {
            // Neighbours in the file that are neighbours in memory, as tables are that were read
            // together, go out together.
            Some((before, first))
                if *before + first.len() as u64 == at && first.is_followed_by(&bytes) =>
            {
                first.unsplit(bytes);
            }
            _ => self.pending.push((at, bytes)),
        }
        match self.pending_bytes >= BATCH_BYTES {
            true => self.write_pending().await,
            false => Ok(()),
        }
    }

    /// Writes a table to clusters that it is given, filled up with zeros.
    pub(super) async fn write_new(&mut self, mut bytes: Vec<u8>) -> Result<HostOffset> {
        let clusters = self.geometry.clusters_for(bytes.len() as u64).max(1);
        let at = self.take(clusters).await?;
        bytes.resize((clusters * self.geometry.cluster_bytes()) as usize, 0);
        self.write(at, Buffer::from(&bytes[..])).await?;
        Ok(at)
    }

    async fn write_pending(&mut self) -> Result<()> {
        self.pending_bytes = 0;
        let (storage, quiet) = (self.image.storage(), &self.quiet);
        let mut writes = stream::iter(std::mem::take(&mut self.pending))
            .map(|(at, mut bytes)| {
                bytes.set_hold(quiet.hold());
                async move { storage.write_at(at, bytes).await.0.map_err(|error| error.at(at)) }
            })
            .buffer_unordered(WRITES_AT_ONCE);
        while let Some(result) = writes.next().await {
            result.map_err(|error| error.context("Writing new tables"))?;
        }
        Ok(())
    }

    // ---- the end ---------------------------------------------------------------------------

    /// Writes all that is new and switches to it. Nothing has happened if it fails before the switch.
    pub(super) async fn finish(mut self, fields: Fields) -> Result<()> {
        match self.prepare(fields).await {
            Ok(new) => self.switch(new).await,
            Err(error) => Err(self.abandon(error).await),
        }
    }

    /// Gives up before the switch: the file is as long as it was.
    pub(super) async fn abandon(self, error: Error) -> Error {
        match self.image.storage().len().await {
            Ok(len) if len > self.file_bytes => {
                // What is behind is free either way.
                match self.image.storage().set_len(self.file_bytes, self.quiet.hold()).await {
                    Ok(()) => error,
                    Err(second) => error.context(format!("The file stays longer ({second})")),
                }
            }
            _ => error,
        }
    }

    async fn prepare(&mut self, fields: Fields) -> Result<NewImage> {
        let l1 = std::mem::take(&mut self.new_l1);
        let l1_at = self.write_new(L1Entry::encode(&l1)).await?;
        self.drop_range(self.l1_range()).await?;
        let snapshots = self.write_snapshot_table().await?;
        self.counted(Counts::settle).await?;
        let NewRefcounts { location, table, pieces } = self.counts.finish()?;
        for range in self.counts.taken() {
            self.expect_writes(*range).await?;
        }
        for (at, bytes) in pieces {
            self.write(at, Buffer::from(&bytes[..])).await?;
        }
        self.write_pending().await?;
        self.image.sync().await?;
        let mut header = self.header.clone();
        header.size_bytes = fields.size_bytes;
        header.l1 = L1Location { offset: l1_at, entries: l1.len() as u32 };
        header.refcount_table = location;
        header.snapshots = snapshots;
        header.features.autoclear -= fields.dropped_claims;
        Ok(NewImage { header, refcounts: table, l1 })
    }

    async fn write_snapshot_table(&mut self) -> Result<SnapshotTableLocation> {
        let snapshots = std::mem::take(&mut self.snapshots);
        let bytes = Snapshot::encode_table(&snapshots, self.header.size_bytes)?;
        let offset = match bytes.is_empty() {
            true => HostOffset(0),
            false => self.write_new(bytes).await?,
        };
        self.drop_range(self.table_range).await?;
        Ok(SnapshotTableLocation { offset, count: snapshots.len() as u32 })
    }

    async fn switch(self, new: NewImage) -> Result<()> {
        let image = self.image;
        let structures =
            super::super::open::structures(image.storage(), &new.header, &new.l1, &new.refcounts)
                .await?;
        let mut undecided = Undecided { image, is_armed: true };
        image.wait_for_metadata_writes().await;
        let bytes = fields_of(&new.header);
        image.write_header_field(HostOffset(FIELDS_AT as u64), &bytes).await?;
        let file_bytes = image.storage().len().await?;
        {
            let mut meta = image.0.meta.lock();
            let mut header = image.0.header.lock();
            *header = new.header;
            meta.go_by(&header, new.l1, new.refcounts, structures, file_bytes);
        }
        // Reads that began by the old tables go on in clusters that are free now.
        image.wait_for_older().await;
        undecided.is_armed = false;
        for range in self.counts.freed() {
            // Space that is not given back is no harm, and not every host can (D.1-6).
            if image.storage().punch_hole_at(range, self.quiet.hold()).await.is_err() {
                break;
            }
        }
        image.recall_zero_cluster_again().await;
        Ok(())
    }
}

impl Meta {
    /// Goes by other tables, all of which storage has, instead of those in memory.
    fn go_by(
        &mut self,
        header: &Header,
        l1: Vec<L1Entry>,
        refcounts: Vec<u64>,
        structures: Structures,
        file_bytes: u64,
    ) {
        self.size_bytes = header.size_bytes / 512 * 512;
        self.claims = header.zero_claims();
        self.l1 = L1Table::new(l1, header.l1.offset);
        self.l2.forget_all();
        self.loaded_table = None;
        self.loaded_block = None;
        self.refcounts.go_by(refcounts, header.refcount_table, file_bytes);
        self.structures = structures;
        self.pins = Pins::default();
        let end = file_bytes.next_multiple_of(self.geometry().cluster_bytes());
        self.zero_from = self.zero_from.max(HostOffset(end));
        self.doubt_zero_cluster();
        self.histories += 1;
    }
}

/// Encodes the fields of the first sector that a change of snapshots switches, from byte 24 on.
fn fields_of(header: &Header) -> Vec<u8> {
    let mut bytes = vec![0; 48];
    let mut put = |at: HostOffset, field: &[u8]| {
        bytes[at.0 as usize - FIELDS_AT..][..field.len()].copy_from_slice(field);
    };
    // Between size and L1 table lies crypt_method, which is 0 in what we open.
    let (at, field) = Header::size_update(header.size_bytes);
    put(at, &field);
    for (at, field) in [
        header.l1.header_update(),
        header.refcount_table.header_update(),
        header.snapshots.header_update(),
    ] {
        put(at, &field);
    }
    if header.geometry.version() == Version::V3 {
        bytes.extend(header.features.header_update().1);
    }
    bytes
}

/// Closes the image to changes where a switch is dropped or fails: storage may have either state.
struct Undecided<'a, S: Storage> {
    image: &'a Image<S>,
    is_armed: bool,
}

impl<S: Storage> Drop for Undecided<'_, S> {
    fn drop(&mut self) {
        if self.is_armed {
            let error = Error::new(
                ErrorKind::Io,
                "A change of the snapshots was cut off while it took effect; open the image again",
            );
            self.image.0.meta.lock().failed.get_or_insert(error);
        }
    }
}
