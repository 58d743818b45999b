//! Pins while clusters move: the new place of a pinned cluster is pinned, too, before anything else
//! points there, and the old one until nothing else does.
//!
//! So, whatever part of the pointers a crash leaves at either place, there is a pin beside them, and a
//! repair of leaks leaves no entry without COPIED alone with its cluster. These second pins, the anchors,
//! are free entries of the tables of pins; where those are too few, tables are added for the time.
//!
//! * What is split without an anchor (clusters and L2 tables that the disk shares with snapshots, or
//!   sharers without pins) has the dirty bit set meanwhile, so that any opener repairs it. Version 2
//!   has none: there `check -r leaks` of stock QEMU leaves a COPIED flag that `-r all` puts right.
//! * Always: an anchor is counted beside the references that move.

use super::Compaction;
use super::bits::Bits;
use super::counts::Changes;
use super::moves::{Load, Move, Pointer};
use crate::Result;
use crate::buffer::Buffer;
use crate::qcow2::check::copied::entries;
use crate::qcow2::check::read::{read_bytes, read_words};
use crate::qcow2::format::{EntryWidth, Geometry, IncompatibleFeatures, L1Entry, L2Entry, Version};
use crate::qcow2::header_change::write_features;
use crate::qcow2::patch::Word;
use crate::qcow2::sharing::sharing_entry;
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset, HostRange};

/// Where clusters that move can be pinned a second time.
#[derive(Debug, Default)]
pub(super) struct Anchors {
    /// Tables of pins.
    tables: Bits,
    /// Entries of theirs that are free, as many as a batch may need.
    free: Vec<HostOffset>,
    added: Vec<Added>,
}

/// A table of pins that is there for the time.
#[derive(Clone, Copy, Debug)]
struct Added {
    cluster: u64,
    /// The entry of the L1 table that names it, and where that lies.
    name: u64,
    named_at: HostOffset,
}

/// The pointers of a batch, in the order in which they change.
#[derive(Debug, Default)]
pub(super) struct Crossing {
    /// Free entries that pin the new places for the time.
    pub(super) anchors: Vec<Word>,
    /// All pointers but the pins of what has an anchor.
    pub(super) words: Vec<Word>,
    pub(super) pins: Vec<Word>,
    /// New places with an anchor.
    anchored: Vec<u64>,
    /// Whether pointers to one place change one by one without an anchor.
    pub(super) splits: bool,
}

/// What nobody needs.
#[derive(Debug, Default)]
struct Unused {
    pinned: Bits,
    /// What clusters count without such pins.
    clusters: Changes,
    /// The pins.
    words: Vec<Word>,
    tables: Vec<Added>,
}

/// Returns the words of an entry that changes. All lie in one sector.
fn words(
    at: HostOffset,
    new: L2Entry,
    old: L2Entry,
    width: EntryWidth,
) -> impl Iterator<Item = Word> {
    let word = Word { at, old: old.word, new: new.word, mask: !0 };
    let more = Word { at: at + 8, old: old.subclusters.0, new: new.subclusters.0, mask: !0 };
    std::iter::once(word).chain((width == EntryWidth::Extended).then_some(more))
}

impl Anchors {
    fn holds(&self, geometry: &Geometry, pointer: &Pointer) -> bool {
        self.tables.contains(geometry.host_cluster(pointer.at).0)
    }

    /// Returns the rank at which as many pinned clusters come before it as there are anchors; nothing
    /// where there are enough, or none at all.
    pub(super) fn end_of_batch(&self, geometry: &Geometry, pointers: &[Pointer]) -> Option<usize> {
        if self.free.is_empty() {
            return None;
        }
        let pinned = pointers.iter().filter(|pointer| self.holds(geometry, pointer));
        pinned.map(|pointer| pointer.rank as usize).nth(self.free.len())
    }
}

impl Crossing {
    /// Returns counts that have the anchors in them, too.
    pub(super) fn raised(&self, settled: &Changes) -> Changes {
        let mut raised = settled.clone();
        for cluster in &self.anchored {
            raised.entry(*cluster).and_modify(|count| *count += 1);
        }
        raised
    }
}

impl<S: Storage> Compaction<'_, S> {
    /// Finds anchors for what is to move, and adds tables from cluster `from` on where they are too few.
    pub(super) async fn ready_anchors(&mut self, load: &Load, from: u64) -> Result<()> {
        self.anchors = Anchors::default();
        let Some((l1, names)) = self.pin_l1().await? else { return Ok(()) };
        let tables: Vec<u64> = names.iter().filter_map(|word| self.pin_table(*word)).collect();
        self.anchors.tables = Bits::new(self.clusters);
        tables.iter().for_each(|table| self.anchors.tables.insert(*table));
        let is_pin = |pointer: &&Pointer| self.anchors.holds(&self.geometry, pointer);
        let most = (self.batch_bytes >> self.geometry.cluster_bits()).max(1) as usize;
        let wanted = load.pointers.iter().filter(is_pin).take(most).count();
        // They are filled from the first one on.
        for table in tables.into_iter().rev() {
            if self.anchors.free.len() >= wanted {
                return Ok(());
            }
            self.find_free(table, wanted).await?;
        }
        let missing = wanted.saturating_sub(self.anchors.free.len()) as u64;
        let count = missing.div_ceil(self.geometry.l2_entries()) as usize;
        self.add_tables((l1, &names), (count, wanted), from).await
    }

    /// Reads the L1 table of the pins, where there is one.
    async fn pin_l1(&self) -> Result<Option<(HostRange, Vec<u64>)>> {
        let Some(l1) = self.structures.pin_l1 else { return Ok(None) };
        Ok(Some((l1, read_words(self.storage, l1.start, l1.len / 8).await?)))
    }

    /// Returns where a table of pins lies that nothing else has.
    fn pin_table(&self, word: u64) -> Option<u64> {
        let cluster = self.geometry.host_cluster(L1Entry(word).table()?).0;
        (self.structures.l2.get(&cluster) == Some(&1)).then_some(cluster)
    }

    /// Notes free entries of a table, until there are `wanted`.
    async fn find_free(&mut self, table: u64, wanted: usize) -> Result<()> {
        let at = self.geometry.host_offset(HostCluster(table));
        let width = self.geometry.entry_width().bytes();
        let bytes = self.read_table(table).await?;
        let entries = (0..).zip(bytes.chunks_exact(width as usize));
        let free = entries.filter(|(_, entry)| entry.iter().all(|byte| *byte == 0));
        let free = free.map(|(index, _): (u64, _)| at + index * width);
        self.anchors.free.extend(free.take(wanted - self.anchors.free.len()));
        Ok(())
    }

    /// Adds up to `count` empty tables of pins, as long as their L1 table has room: behind the goal and
    /// `from`, where they are in nobody's way.
    async fn add_tables(
        &mut self,
        (l1, names): (HostRange, &[u64]),
        (count, wanted): (usize, usize),
        from: u64,
    ) -> Result<()> {
        let unnamed = (0..).zip(names).filter(|(_, word)| **word == 0).map(|(index, _)| index);
        let behind = self.clusters..self.furthest().await?;
        let room = (from.max(self.plan.goal)..self.clusters).rev().chain(behind);
        let room = room.filter(|cluster| self.is_room(*cluster));
        let added: Vec<(u64, u64)> = unnamed.zip(room).take(count).collect();
        let Some(last) = added.iter().map(|(_, cluster)| *cluster).max() else { return Ok(()) };
        self.clusters = self.clusters.max(last + 1);
        self.counts.grow(self.clusters);
        let width = self.geometry.entry_width();
        let (mut counts, mut words) = (Changes::new(), Vec::new());
        for (index, cluster) in added {
            let at = self.geometry.host_offset(HostCluster(cluster));
            let zeros = Buffer::zeroed(self.geometry.cluster_bytes() as usize);
            self.report.metadata_bytes += zeros.len() as u64;
            self.storage.write_at(at, zeros).await.0?;
            counts.insert(cluster, 1);
            let (name, named_at) = (L1Entry::new(at).0, l1.start + index * 8);
            words.push(Word { at: named_at, old: 0, new: name, mask: !0 });
            let free = (0..self.geometry.l2_entries()).map(|index| at + index * width.bytes());
            self.anchors.free.extend(free.take(wanted - self.anchors.free.len()));
            self.anchors.added.push(Added { cluster, name, named_at });
        }
        self.write_counts(&counts).await?;
        self.storage.flush().await?;
        self.switch(&words).await
    }

    fn is_room(&self, cluster: u64) -> bool {
        self.counts.count(cluster) == 0 && self.counts.has_block(cluster)
    }

    async fn read_table(&self, table: u64) -> Result<Buffer> {
        let at = self.geometry.host_offset(HostCluster(table));
        read_bytes(self.storage, at, self.geometry.cluster_bytes() as usize).await
    }

    /// Takes the tables away that were added.
    pub(super) async fn drop_anchors(&mut self) -> Result<()> {
        let added = std::mem::take(&mut self.anchors).added;
        if added.is_empty() {
            return Ok(());
        }
        let word = |it: &Added| Word { at: it.named_at, old: it.name, new: 0, mask: !0 };
        let words: Vec<Word> = added.iter().map(word).collect();
        self.switch(&words).await?;
        let counts: Changes = added.iter().map(|it| (it.cluster, 0)).collect();
        self.write_counts(&counts).await?;
        self.storage.flush().await?;
        self.punch(&counts).await;
        Ok(())
    }

    // ---- what is in use without need --------------------------------------------------------

    /// Drops pins that hold a cluster for nobody, or beside another one, as a crash leaves them too, and
    /// tables of pins in which nothing is then.
    pub(super) async fn drop_unused_pins(&mut self) -> Result<()> {
        let Some(unused) = self.unused_pins().await? else { return Ok(()) };
        self.switch(&unused.words).await?;
        self.write_counts(&unused.clusters).await?;
        self.storage.flush().await?;
        self.punch(&unused.clusters).await;
        self.anchors.added = unused.tables;
        self.drop_anchors().await
    }

    /// Counts as free, for an estimate, what [`drop_unused_pins`](Self::drop_unused_pins) frees.
    pub(super) async fn forget_unused_pins(&mut self) -> Result<()> {
        let Some(unused) = self.unused_pins().await? else { return Ok(()) };
        let tables = unused.tables.iter().map(|it| (it.cluster, 0));
        tables.chain(unused.clusters).for_each(|(it, count)| self.counts.note(it, count));
        Ok(())
    }

    async fn unused_pins(&self) -> Result<Option<Unused>> {
        let Some((l1, names)) = self.pin_l1().await? else { return Ok(None) };
        let mut unused = Unused { pinned: Bits::new(self.clusters), ..Unused::default() };
        for (index, name) in (0..).zip(names) {
            let Some(cluster) = self.pin_table(name) else { continue };
            let used = self.look_for_unused(cluster, &mut unused).await?;
            let named_at = l1.start + index * 8;
            let table = Added { cluster, name, named_at };
            unused.tables.extend((used == 0).then_some(table));
        }
        Ok(Some(unused))
    }

    /// Says whether one pin of a cluster is of no use, and counts it as gone then.
    fn is_unused(&self, cluster: u64, unused: &mut Unused) -> bool {
        let is_second = unused.pinned.contains(cluster);
        unused.pinned.insert(cluster);
        let count = unused.clusters.get(&cluster).copied();
        let count = count.unwrap_or_else(|| self.counts.count(cluster));
        let is_unused = is_second || count == 1;
        if is_unused {
            unused.clusters.insert(cluster, count.saturating_sub(1));
        }
        is_unused
    }

    /// Returns how many entries of a table are in use.
    async fn look_for_unused(&self, table: u64, unused: &mut Unused) -> Result<u64> {
        let (start, width) =
            (self.geometry.host_offset(HostCluster(table)), self.geometry.entry_width());
        let mut used = 0;
        for (index, entry) in entries(&self.read_table(table).await?, width) {
            let at = start + index * width.bytes();
            let cluster = entry.host().map(|host| self.geometry.host_cluster(host).0);
            match cluster.is_some_and(|cluster| self.is_unused(cluster, unused)) {
                true => unused.words.extend(words(at, L2Entry::UNALLOCATED, entry, width)),
                false => used += 1,
            }
        }
        Ok(used)
    }

    // ---- a batch ---------------------------------------------------------------------------

    /// Says in which order the pointers of a batch change, which are sorted by what they point to.
    pub(super) fn crossing(&self, moves: &[Move], pointers: &[Pointer]) -> Crossing {
        let mut crossing = Crossing::default();
        let mut free = self.anchors.free.iter();
        for own in pointers.chunk_by(|a, b| a.rank == b.rank) {
            let moved = &moves[own[0].rank as usize];
            let is_pin = |pointer: &&Pointer| self.anchors.holds(&self.geometry, pointer);
            let has_room = moved.weight < self.geometry.refcount_max();
            let is_pinned = own.iter().any(|it| is_pin(&it)) && has_room;
            let anchor = if is_pinned { free.next() } else { None };
            let (pins, others): (Vec<&Pointer>, Vec<&Pointer>) =
                own.iter().partition(|it| anchor.is_some() && is_pin(it));
            crossing.splits |= anchor.is_none() && own.len() > 1 && !moved.is_stream();
            crossing.pins.extend(pins.iter().map(|it| moved.word(it.at)));
            crossing.words.extend(others.iter().map(|it| moved.word(it.at)));
            if let (Some(at), Some(to)) = (anchor, moved.to) {
                let entry = sharing_entry(&self.geometry, to.start);
                let width = self.geometry.entry_width();
                crossing.anchors.extend(words(*at, entry, L2Entry::UNALLOCATED, width));
                crossing.anchored.push(self.geometry.host_cluster(to.start).0);
            }
        }
        for words in [&mut crossing.anchors, &mut crossing.words, &mut crossing.pins] {
            words.sort_unstable_by_key(|word| word.at);
        }
        crossing
    }

    /// Takes anchors back, and then their counts. The last counts are not durable yet.
    pub(super) async fn lift_anchors(
        &mut self,
        crossing: &Crossing,
        settled: &Changes,
    ) -> Result<()> {
        let back = |word: &Word| Word { old: word.new, new: word.old, ..*word };
        let words: Vec<Word> = crossing.anchors.iter().map(back).collect();
        self.switch(&words).await?;
        let count = |cluster: &u64| Some((*cluster, *settled.get(cluster)?));
        self.write_counts(&crossing.anchored.iter().filter_map(count).collect()).await
    }

    // ---- the dirty bit ---------------------------------------------------------------------

    /// Has whoever opens the image after a crash repair it, where the version can say so.
    pub(super) async fn cover(&mut self) -> Result<()> {
        match self.geometry.version() {
            Version::V3 if !self.is_covered => self.set_covered(true).await,
            Version::V2 | Version::V3 => Ok(()),
        }
    }

    /// All is as it was before [`cover`](Self::cover), and durable.
    pub(super) async fn uncover(&mut self) -> Result<()> {
        match self.is_covered {
            true => self.set_covered(false).await,
            false => Ok(()),
        }
    }

    async fn set_covered(&mut self, is_covered: bool) -> Result<()> {
        let mut features = crate::qcow2::read_header(self.storage).await?.features;
        features.incompatible.set(IncompatibleFeatures::DIRTY, is_covered);
        self.report.metadata_bytes += write_features(self.storage, &features).await?;
        self.is_covered = is_covered;
        Ok(())
    }
}
