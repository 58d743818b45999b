//! An image on a host that records, what is done to it, and what that may leave.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use lacuna::Result;
use lacuna::block::{DiscardMode, DynLayer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{FrozenBitmaps, Image, NewBitmap, OpenOptions, Parts, SnapshotChoice};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::case::{Case, Kind};
use testkit::drive::{Candidates, perform, settle};
use testkit::sim::crash::Crash;
use testkit::sim::{Choice, Event, Pace, SimHost, SimStorage};
use testkit::{ModelDisk, Operation, Random, SparseBytes, content};

use crate::judge;
use crate::truth::{Claim, Kept, Life, Marked, Truth};
use crate::versions::Disk;

/// A file that an image may name as what it stands on, and the layer that it is.
pub(crate) struct Beside {
    pub(crate) name: String,
    pub(crate) file: SparseBytes,
    pub(crate) layer: Arc<dyn DynLayer>,
}

/// One run.
pub(crate) struct Stage {
    pub(crate) case: Case,
    pub(crate) host: SimHost,
    pub(crate) model: ModelDisk,
    pub(crate) truth: Truth,
    pub(crate) random: Random,
    /// How the image is opened.
    pub(crate) options: OpenOptions,
    /// Files below it that nobody writes to.
    pub(crate) beside: Vec<Beside>,
    /// Whether the last file of the host is what the image stands on.
    pub(crate) has_base: bool,
    /// Whether a larger disk must show zeros where a smaller one was cut.
    pub(crate) regrows: bool,
    /// From which moment on there is an image.
    pub(crate) made: usize,
    /// From which moment on a check finds leaks at worst; before that a repair has work to do.
    pub(crate) sound_from: usize,
    /// The state of a virtual machine, in images that keep one.
    pub(crate) machine: Vec<u8>,
    /// Which events are the flushes that made writes with FUA durable.
    pub(crate) fua_flushes: Vec<usize>,
    /// Whether losses are looked at by now.
    has_begun: bool,
}

impl Stage {
    /// An image without content, on a host where calls take effect at once, or in any order.
    pub(crate) fn new(kind: &Kind, seed: u64, pace: Pace) -> Self {
        Self::of(kind.build(seed), seed, pace)
    }

    pub(crate) fn of(case: Case, seed: u64, pace: Pace) -> Self {
        let host = SimHost::new(pace, seed);
        let files = case.on(&host);
        drop(files);
        let beside = case.backing.as_ref().map(|below| Beside {
            name: below.name().to_owned(),
            file: below.file.clone(),
            layer: case.backing_layer().expect("there is a file below"),
        });
        Self {
            model: case.model(),
            options: case.options.clone(),
            host,
            truth: Truth::default(),
            random: Random::new(seed ^ 0x9a7),
            beside: beside.into_iter().collect(),
            has_base: false,
            regrows: false,
            made: 0,
            sound_from: 0,
            machine: Vec::new(),
            fua_flushes: Vec::new(),
            has_begun: false,
            case,
        }
    }

    /// What a loss left of another run is all that there is.
    pub(crate) fn after(
        first: Self,
        point: &Crash,
        choice: &Choice,
        seed: u64,
    ) -> std::result::Result<Self, String> {
        let files = point.files_with(choice);
        let found = judge::find(&first, point.event, &files)?;
        let case = first.case.with_content(files);
        let (options, model) = (first.options, case.model_of(&found.disk));
        let truth =
            Truth { snapshots: found.snapshots, bitmaps: found.bitmaps, ..Truth::default() };
        Ok(Self { options, model, truth, ..Self::of(case, seed, Pace::AtOnce) })
    }

    pub(crate) const fn kind(&self) -> &Kind {
        &self.case.kind
    }

    pub(crate) const fn cluster(&self) -> u64 {
        self.case.kind.cluster_bytes()
    }

    pub(crate) fn moment(&self) -> usize {
        self.host.events_len()
    }

    pub(crate) async fn open(&self) -> Result<Image<SimStorage>> {
        let data = self.case.data.as_ref().map(|_| self.host.open_file(1));
        let backing = self.beside.first().map(|beside| Arc::clone(&beside.layer));
        let parts = Parts { storage: self.host.open_file(0), data, backing };
        Image::open(parts, self.options.clone()).await
    }

    /// From here on losses are looked at; what is there counts as durable.
    pub(crate) fn begin(&mut self) {
        self.has_begun = true;
        self.fua_flushes.clear();
        self.host.start_record();
        self.truth.restart(self.model.content().to_vec(), self.machine.clone());
    }

    // ---- guests ----------------------------------------------------------------------------

    /// Does what a guest asks.
    pub(crate) async fn guest(
        &mut self,
        image: &Image<SimStorage>,
        operation: Operation,
    ) -> std::result::Result<(), String> {
        let told = |error: lacuna::Error| format!("{operation:x?}: {error}");
        self.foresee(&operation);
        perform(image, operation).await.map_err(told)?;
        self.answered(image, &operation).await
    }

    /// What an operation may leave counts from its beginning on.
    pub(crate) fn foresee(&mut self, operation: &Operation) {
        if !operation.changes_bytes() || !self.has_begun {
            return;
        }
        let moment = self.moment();
        for content in Candidates::foresee(&self.model, operation, &self.case).0 {
            self.truth.disk.see(moment, content.to_vec(), false);
        }
    }

    pub(crate) async fn answered(
        &mut self,
        image: &Image<SimStorage>,
        operation: &Operation,
    ) -> std::result::Result<(), String> {
        settle(image, &mut self.model, operation).await?;
        if operation.changes_bytes() {
            self.seen();
            self.kept(operation);
        }
        if *operation == Operation::Flush {
            self.flushed();
        }
        Ok(())
    }

    /// A request was answered: with FUA that is the flush of its own bytes.
    pub(crate) fn kept(&mut self, operation: &Operation) {
        let range = match operation {
            Operation::Write { range, flags, .. } if flags.contains(WriteFlags::FUA) => range,
            Operation::WriteZeroes { range, flags } if flags.contains(ZeroFlags::FUA) => range,
            _ => return,
        };
        if !self.has_begun {
            return;
        }
        let moment = self.moment();
        self.truth.disk.kept(moment, range.start.0 as usize..range.end().0 as usize);
        let (_, events) = self.host.record();
        let last = events.iter().rposition(|event| matches!(event, Event::Flushed { .. }));
        self.fua_flushes.extend(last);
        self.host.mark(moment as u64);
    }

    /// The disk may look as the model does.
    pub(crate) fn seen(&mut self) {
        if !self.has_begun {
            return;
        }
        self.truth.disk.see(self.moment(), self.model.content().to_vec(), false);
    }

    /// A flush was answered, or what does as much.
    pub(crate) fn flushed(&mut self) {
        if !self.has_begun {
            return;
        }
        let moment = self.moment();
        self.truth.disk.flushed(moment);
        self.truth.machine.flushed(moment);
        let lives = self.truth.bitmaps.iter_mut().map(|marked| &mut marked.life);
        for life in lives {
            life.made = life.made.or(Some(moment));
            life.gone = life.gone.or_else(|| life.going.map(|_| moment));
        }
        for marked in &mut self.truth.bitmaps {
            let last = marked.claims.len() - 1;
            for claim in &mut marked.claims[..last] {
                claim.until = claim.until.or(Some(moment));
            }
        }
        self.host.mark(moment as u64);
    }

    pub(crate) async fn close(
        &mut self,
        image: Image<SimStorage>,
    ) -> std::result::Result<(), String> {
        image.close().await.map_err(|error| format!("Closing: {error}"))?;
        self.flushed();
        Ok(())
    }

    /// Writes a part of the state of the machine.
    pub(crate) async fn save_state(&mut self, image: &Image<SimStorage>) -> Result<()> {
        let start = self.random.below(self.machine.len() as u64);
        let len = 1 + self.random.below(self.machine.len() as u64 - start);
        let bytes = content(self.random.next(), GuestRange::new(GuestOffset(start), len));
        self.machine[start as usize..][..bytes.len()].copy_from_slice(&bytes);
        self.truth.machine.see(self.moment(), self.machine.clone(), false);
        image.write_vm_state(start, Buffer::from(&bytes[..])).await.0
    }

    /// With another size of the disk there is no such state.
    pub(crate) fn end_state(&mut self) {
        self.machine.fill(0);
        self.truth.machine.see(self.moment(), self.machine.clone(), false);
    }

    // ---- snapshots -------------------------------------------------------------------------

    pub(crate) async fn snapshot(&mut self, image: &Image<SimStorage>, name: &str) -> Result<()> {
        let life = Life::since(self.moment());
        let (disk, machine) = (self.now(), self.machine.clone());
        self.truth.snapshots.push(Kept { name: name.to_owned(), disk, machine, life });
        let made = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        image.create_snapshot(&name.into(), made).await?;
        let moment = self.moment();
        self.album(name).life.made = Some(moment);
        self.flushed();
        Ok(())
    }

    pub(crate) async fn delete(&mut self, image: &Image<SimStorage>, name: &str) -> Result<()> {
        let moment = self.moment();
        self.album(name).life.going = Some(moment);
        image.delete_snapshot(&SnapshotChoice::Name(name.into())).await?;
        let moment = self.moment();
        self.album(name).life.gone = Some(moment);
        self.flushed();
        Ok(())
    }

    /// What was not flushed is gone or not; the disk changes as a whole.
    pub(crate) async fn apply(&mut self, image: &Image<SimStorage>, name: &str) -> Result<()> {
        let kept = self.album(name);
        let (disk, machine) = (kept.disk.to_vec(), kept.machine.clone());
        let moment = self.moment();
        self.truth.disk.see(moment, disk.clone(), true);
        self.truth.machine.see(moment, machine.clone(), true);
        image.apply_snapshot(&SnapshotChoice::Name(name.into())).await?;
        self.model.adopt(GuestRange::new(GuestOffset(0), disk.len() as u64), &disk);
        self.machine = machine;
        self.flushed();
        Ok(())
    }

    fn album(&mut self, name: &str) -> &mut Kept {
        let kept = self.truth.snapshots.iter_mut().find(|kept| kept.name == name);
        kept.expect("a snapshot that was made")
    }

    // ---- bitmaps ---------------------------------------------------------------------------

    fn now(&self) -> Disk {
        Arc::new(self.model.content().to_vec())
    }

    fn claim(&self, changes: Vec<(Disk, Option<Disk>)>) -> Claim {
        Claim { from: self.moment(), until: None, changes }
    }

    pub(crate) async fn add_bitmap(&mut self, image: &Image<SimStorage>, name: &str) -> Result<()> {
        let granularity = 512 << self.random.below(3);
        let new = NewBitmap { granularity_bytes: Some(granularity), ..NewBitmap::new(name) };
        let claims = vec![self.claim(vec![(self.now(), None)])];
        let life = Life::since(self.moment());
        self.truth.bitmaps.push(Marked { name: name.to_owned(), life, claims });
        image.add_bitmap(&new).await
    }

    /// A bitmap is about to be copied here, of which storage may have each step: it names what changes
    /// from now on, and then also where `named` is not zero.
    pub(crate) fn expect_bitmap(&mut self, name: &str, named: Vec<u8>) {
        let none: Disk = Arc::new(vec![0; named.len()]);
        let claims = vec![self.claim(vec![(self.now(), None)])];
        let life = Life::since(self.moment());
        self.truth.bitmaps.push(Marked { name: name.to_owned(), life, claims });
        self.reclaim(name, vec![(self.now(), None), (none, Some(Arc::new(named)))]);
    }

    pub(crate) fn bitmap(&mut self, name: &str) -> &mut Marked {
        let marked = self.truth.bitmaps.iter_mut().find(|marked| marked.name == name);
        marked.expect("a bitmap that was made")
    }

    /// From here on a bitmap has to name what these changes are, or still what it had to before.
    pub(crate) fn reclaim(&mut self, name: &str, changes: Vec<(Disk, Option<Disk>)>) {
        let claim = self.claim(changes);
        self.bitmap(name).claims.push(claim);
    }

    pub(crate) async fn clear_bitmap(
        &mut self,
        image: &Image<SimStorage>,
        name: &str,
    ) -> Result<()> {
        self.reclaim(name, vec![(self.now(), None)]);
        image.clear_bitmap(&name.into()).await
    }

    pub(crate) async fn remove_bitmap(
        &mut self,
        image: &Image<SimStorage>,
        name: &str,
    ) -> Result<()> {
        let moment = self.moment();
        self.bitmap(name).life.going = Some(moment);
        image.remove_bitmap(&name.into()).await
    }

    pub(crate) async fn merge_bitmap(
        &mut self,
        image: &Image<SimStorage>,
        into: &str,
        from: &str,
    ) -> Result<()> {
        let last = |marked: &Marked| marked.claims[marked.claims.len() - 1].changes.clone();
        let mut changes = last(self.bitmap(into));
        changes.extend(last(self.bitmap(from)));
        self.reclaim(into, changes);
        let merged = image.bitmap(&from.into()).await?;
        image.merge_bitmap(&into.into(), &merged).await
    }

    /// What changes from here on it need not name.
    pub(crate) async fn disable_bitmap(
        &mut self,
        image: &Image<SimStorage>,
        name: &str,
    ) -> Result<()> {
        let now = self.now();
        let marked = self.bitmap(name);
        let mut claim = marked.claims[marked.claims.len() - 1].clone();
        claim.end(&now);
        self.reclaim(name, claim.changes);
        image.enable_bitmap(&name.into(), false).await
    }

    pub(crate) fn is_there(&self, name: &str) -> bool {
        let there = |marked: &Marked| marked.name == name && marked.life.going.is_none();
        self.truth.bitmaps.iter().any(there)
    }

    /// From here on a new bitmap names what changes, and the old one still what it did.
    pub(crate) async fn freeze(
        &mut self,
        image: &Image<SimStorage>,
        old: &str,
        new: &str,
    ) -> Result<FrozenBitmaps<SimStorage>> {
        let claims = vec![self.claim(vec![(self.now(), None)])];
        let life = Life::since(self.moment());
        self.truth.bitmaps.push(Marked { name: new.to_owned(), life, claims });
        let made = NewBitmap { granularity_bytes: Some(512), ..NewBitmap::new(new) };
        let frozen = image.freeze_bitmaps(&[old.into()], &[made]).await?;
        let moment = self.moment();
        self.bitmap(new).life.made = Some(moment);
        self.host.mark(moment as u64);
        Ok(frozen)
    }

    // ---- ranges ----------------------------------------------------------------------------

    /// Whole clusters, at most so many, among the first so many of the disk.
    pub(crate) fn clusters(&mut self, most: u64, among: u64) -> GuestRange {
        let cluster = self.cluster();
        let among = among.min(self.model.size_bytes() / cluster).max(1);
        let first = self.random.below(among);
        let count = 1 + self.random.below(most.min(among - first));
        GuestRange::new(GuestOffset(first * cluster), count * cluster)
    }

    /// A part of one cluster or two.
    pub(crate) fn part(&mut self, among: u64) -> GuestRange {
        let cluster = self.cluster();
        let whole = self.clusters(2, among);
        let start = whole.start + self.random.below(cluster);
        let len = (1 + self.random.below(cluster)).min(whole.end() - start);
        GuestRange::new(start, len)
    }

    pub(crate) const fn write(&mut self, range: GuestRange) -> Operation {
        let flags = if self.random.one_in(12) { WriteFlags::FUA } else { WriteFlags::empty() };
        Operation::Write { range, seed: self.random.next() >> 32, flags }
    }

    pub(crate) fn zero(&mut self, range: GuestRange) -> Operation {
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, self.random.one_in(2));
        flags.set(ZeroFlags::FUA, self.random.one_in(12));
        flags.set(ZeroFlags::THOROUGH, self.random.one_in(4));
        Operation::WriteZeroes { range, flags }
    }

    pub(crate) const fn discard(&mut self, range: GuestRange) -> Operation {
        let mode = if self.random.one_in(3) { DiscardMode::Full } else { DiscardMode::Guest };
        Operation::Discard { range, mode }
    }

    pub(crate) fn compressed(&mut self, among: u64) -> Operation {
        let range = self.clusters(1, among);
        match self.kind().allows_compression() {
            true => Operation::WriteCompressed { range, seed: self.random.next() >> 32 },
            false => self.write(range),
        }
    }
}
