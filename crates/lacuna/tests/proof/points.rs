//! Points in time keep what the disk was, while writers, sizes and drops go on; frozen bitmaps name what
//! changed before, and afterwards what changed since.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use lacuna::ErrorKind;
use lacuna::block::{
    DiscardMode, Layer, Point, PointOptions, Points, WhenFull, WriteFlags, ZeroFlags,
};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{FrozenBitmaps, Image, NewBitmap, Shrink};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{DropPoint, Executor, Random, SparseBytes, seeds};

use crate::case::{Backing, Kind, Store};
use crate::drive::{read, whole_content};

const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;
const WRITERS: u64 = 3;
const CHANGES: usize = 25;
/// Points that each of those makes who make some.
const POINTS: usize = 3;
/// No disk becomes larger.
const LARGEST: u64 = 20_000 * SECTOR;
/// Bytes for a bit of the bitmap.
const GRAIN: u64 = 1024;

type Disk = Points<Image<SimStorage>, Raw<SimStorage>>;

/// What all tasks of a run share.
struct Scene {
    kind: Kind,
    image: Image<SimStorage>,
    disk: Disk,
    host: SimHost,
    writing: Cell<u64>,
    /// What was begun to be changed, and by whom, in order.
    touched: RefCell<Vec<(u64, GuestRange)>>,
    checks: Cell<usize>,
}

impl Scene {
    fn range(&self, random: &mut Random) -> GuestRange {
        let sectors = self.disk.size_bytes() / SECTOR;
        let start = random.below(sectors);
        let most = if random.one_in(5) { 300 } else { 20 };
        let len = 1 + random.below((sectors - start).min(most));
        GuestRange::new(GuestOffset(start * SECTOR), len * SECTOR)
    }

    fn touch(&self, writer: u64, range: GuestRange) {
        self.touched.borrow_mut().push((writer, range));
    }

    /// Returns what is changed from a moment on, with what waited for it.
    fn touched_since(&self, moment: usize) -> Vec<GuestRange> {
        let touched = self.touched.borrow();
        let (before, since) = touched.split_at(moment);
        let last = |writer| before.iter().rfind(|(by, _)| *by == writer);
        let waited = (0..WRITERS).filter_map(last);
        waited.chain(since).map(|(_, range)| *range).collect()
    }

    async fn resize(&self, writer: u64, size_bytes: u64) -> lacuna::Result<()> {
        // What lies between the sizes is known only when it is done: others resize as well.
        self.touch(writer, GuestRange::new(GuestOffset(0), LARGEST));
        let _change = self.disk.before_resize(size_bytes).await;
        self.image.resize(size_bytes, Shrink::Allow).await
    }

    async fn change(&self, writer: u64, random: &mut Random) -> lacuna::Result<()> {
        let range = self.range(random);
        self.touch(writer, range);
        match random.below(8) {
            0 => self.disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).await,
            1 => self.disk.write_zeroes(range, ZeroFlags::empty()).await,
            2 => self.disk.discard(range, DiscardMode::Guest).await,
            3 if random.one_in(2) => self.disk.flush().await,
            _ => {
                let byte = 1 + random.below(255) as u8;
                let bytes = Buffer::from(&vec![byte; range.len as usize][..]);
                self.disk.write(range.start, bytes, WriteFlags::empty()).await.0
            }
        }
    }
}

/// Counts a writer out, also one that is dropped.
struct Writing(Rc<Scene>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.writing.set(self.0.writing.get() - 1);
    }
}

async fn write(scene: Rc<Scene>, writer: u64, mut random: Random, resizes: bool) {
    let writing = Writing(scene);
    let scene = &writing.0;
    for _ in 0..CHANGES {
        if resizes && random.one_in(6) {
            let largest = scene.disk.size_bytes() + 40 * SECTOR;
            let size = (1 + random.below(largest / SECTOR)) * SECTOR;
            scene.resize(writer, size.max(20 * SECTOR)).await.unwrap();
            continue;
        }
        match scene.change(writer, &mut random).await {
            // Another writer cut it off.
            Err(error) if resizes && error.kind() == ErrorKind::OutOfBounds => {}
            done => done.unwrap(),
        }
    }
}

/// A point, with what it must hold.
struct Watched {
    point: Point<Image<SimStorage>, Raw<SimStorage>>,
    frozen: FrozenBitmaps<SimStorage>,
    content: SparseBytes,
    /// What was known to be zeros.
    zeros: Vec<GuestRange>,
    /// What the bitmap said, and how much had been touched.
    dirty: Vec<GuestRange>,
    touched: usize,
}

impl Watched {
    async fn new(scene: &Scene, names: &[&str]) -> Self {
        // As large as the disk may become until the moment.
        let saved = Raw::create(scene.host.add_file(SparseBytes::default()), LARGEST);
        let saved = saved.await.unwrap();
        let names: Vec<_> = names.iter().map(|name| (*name).into()).collect();
        let at_the_moment = async {
            let frozen = scene.image.freeze_bitmaps(&names, &[]).await?;
            let content = whole_content(&scene.image).await?;
            let zeros = zeros(&scene.image).await?;
            let dirty = named(&scene.image).await?;
            Ok((frozen, content, zeros, dirty, scene.touched.borrow().len()))
        };
        let added = scene.disk.add(saved, PointOptions::default(), at_the_moment).await;
        let (point, (frozen, content, zeros, dirty, touched)) = added.unwrap();
        Self { point, frozen, content, zeros, dirty, touched }
    }

    /// Compares a part, and what is known of it.
    async fn check(&self, range: GuestRange) {
        let seen = read(&self.point, range).await.unwrap();
        let right = self.content.read_vec(range.start.0, range.len as usize);
        assert!(seen == right, "{range:?} reads otherwise than it was");
        let extents = self.point.extents(range).await.unwrap();
        assert_eq!(extents[0].range.start, range.start);
        for extent in extents {
            assert!(extent.status.host.is_none());
            let part = self.content.read_vec(extent.range.start.0, extent.range.len as usize);
            let is_zero = part.iter().all(|byte| *byte == 0);
            assert!(is_zero || !extent.status.reads_zero, "{extent:?} is not zero");
            let was_zero = self.zeros.iter().find(|it| it.overlaps(&extent.range));
            let is_told = extent.status.reads_zero || was_zero.is_none();
            assert!(is_told, "{extent:?} was known as zeros: {was_zero:?}");
        }
    }

    fn check_frozen(&self) {
        let Some(bitmap) = self.frozen.bitmap("daily") else { return };
        let whole = self.point.whole();
        let extents = bitmap.extents(whole, usize::MAX);
        let dirty: Vec<_> = extents.iter().filter(|it| it.is_dirty).map(|it| it.range).collect();
        assert_eq!(dirty, self.dirty);
        assert_eq!(extents.iter().map(|it| it.range.len).sum::<u64>(), whole.len);
    }

    /// Ends it, finished or not, and looks at what the bitmap names then.
    async fn end(self, scene: &Scene, is_finished: bool) {
        let Self { point, frozen, content, dirty, touched, .. } = self;
        let has_frozen = frozen.bitmap("daily").is_some();
        let end = async {
            match is_finished {
                true => frozen.finish().await?,
                false => drop(frozen),
            }
            Ok((named(&scene.image).await?, whole_content(&scene.image).await?))
        };
        let (named, now) = scene.disk.at_rest(end).await.unwrap();
        drop(point);
        if !has_frozen {
            return;
        }
        let named = grains(&named);
        let size = content.len().min(now.len());
        let changed = (0..size.div_ceil(GRAIN)).filter(|grain| {
            let len = GRAIN.min(size - grain * GRAIN) as usize;
            content.read_vec(grain * GRAIN, len) != now.read_vec(grain * GRAIN, len)
        });
        for grain in changed {
            assert!(named.contains(&grain), "grain {grain} changed, and is not named");
        }
        let inside = |grain: &u64| *grain < now.len().div_ceil(GRAIN);
        match is_finished {
            true => {
                let touched = scene.touched_since(touched);
                let covered: Vec<_> = touched.iter().map(|it| scene.kind.cover(*it)).collect();
                let most = grains(&covered);
                let more: Vec<_> = named.difference(&most).collect();
                assert!(more.is_empty(), "{more:?} are named, and nobody touched them");
            }
            false => {
                let before = grains(&dirty);
                let kept = before.iter().filter(|grain| inside(grain));
                kept.for_each(|grain| assert!(named.contains(grain), "{grain} is forgotten"));
            }
        }
    }
}

fn grains(ranges: &[GuestRange]) -> BTreeSet<u64> {
    let of = |range: &GuestRange| range.start.0 / GRAIN..range.end().0.div_ceil(GRAIN);
    ranges.iter().filter(|range| !range.is_empty()).flat_map(of).collect()
}

async fn zeros(disk: &impl Layer) -> lacuna::Result<Vec<GuestRange>> {
    let (mut at, mut zeros) = (GuestOffset(0), Vec::new());
    while at < disk.whole().end() {
        for extent in disk.extents(GuestRange::new(at, disk.whole().end() - at)).await? {
            at = extent.range.end();
            // Hosts keep holes by blocks.
            let start = extent.range.start.0.next_multiple_of(BLOCK);
            let end = extent.range.end().0 / BLOCK * BLOCK;
            let blocks = GuestRange::new(GuestOffset(start), end.saturating_sub(start));
            zeros.extend(Some(blocks).filter(|it| extent.status.reads_zero && !it.is_empty()));
        }
    }
    Ok(zeros)
}

async fn named(image: &Image<SimStorage>) -> lacuna::Result<Vec<GuestRange>> {
    let mut ranges = image.bitmap(&"daily".into()).await?.ranges();
    let mut named = Vec::new();
    while let Some(range) = ranges.next().await? {
        named.push(range);
    }
    Ok(named)
}

/// Makes points one after the other, and looks at each while others write.
async fn keep(scene: Rc<Scene>, mut random: Random, names: &[&str]) {
    for _ in 0..POINTS {
        let watched = Watched::new(&scene, names).await;
        let size = watched.point.size_bytes();
        for _ in 0..8 {
            let start = random.below(size / SECTOR) * SECTOR;
            let len = (1 + random.below(100)) * SECTOR;
            watched.check(GuestRange::new(GuestOffset(start), len.min(size - start))).await;
            scene.checks.set(scene.checks.get() + 1);
        }
        watched.check(watched.point.whole()).await;
        watched.check_frozen();
        watched.end(&scene, random.one_in(2)).await;
    }
}

fn run(kind: &Kind, seed: u64, resizes: bool, drops: bool) {
    let host = SimHost::without_record(Pace::Executor, seed);
    let files = kind.build(seed).on(&host);
    let mut executor = Executor::new(seed);
    executor.attach(Arc::new(host.clone()));
    let image: lacuna::Result<_> = executor.block_on(async move {
        let image = files.open().await?;
        let granularity_bytes = Some(GRAIN);
        image.add_bitmap(&NewBitmap { granularity_bytes, ..NewBitmap::new("daily") }).await?;
        Ok(image)
    });
    let image = image.unwrap();
    let scene = Rc::new(Scene {
        kind: *kind,
        disk: Points::new(image.clone()),
        image,
        host,
        writing: Cell::new(WRITERS),
        touched: RefCell::default(),
        checks: Cell::default(),
    });
    let mut random = Random::new(seed);
    for number in 0..WRITERS {
        let drop_point = match drops {
            true => DropPoint::AfterPoll(1 + random.below(400) as usize),
            false => DropPoint::Never,
        };
        let writer = write(Rc::clone(&scene), number, random.split(), resizes);
        executor.spawn_until(drop_point, writer);
    }
    for names in [&["daily"][..], &[]] {
        executor.spawn(keep(Rc::clone(&scene), random.split(), names));
    }
    executor.run().unwrap_or_else(|stalled| panic!("{stalled}"));
    assert_eq!(scene.checks.get(), 2 * POINTS * 8);
    assert_eq!(scene.writing.get(), 0);
}

#[test]
fn points_keep_what_the_disk_was_and_bitmaps_what_changed() {
    let kinds = [
        Kind::plain(9),
        Kind::plain(12),
        Kind { backing: Backing::RawShorter, ..Kind::plain(12) },
        Kind { store: Store::DataFile, ..Kind::plain(12) },
        Kind { extended: true, backing: Backing::Qcow2Longer, ..Kind::plain(14) },
    ];
    for seed in seeds(4) {
        for kind in &kinds {
            for (resizes, drops) in [(false, false), (true, false), (false, true), (true, true)] {
                println!("LACUNA_SEED={seed}, {kind:?}, resizes {resizes}, drops {drops}");
                run(kind, seed, resizes, drops);
            }
        }
    }
}

const THREADS_DISK: u64 = 4 << 20;

/// Writes all over a raw disk until told to stop.
fn write_all_over(
    disk: &Points<Raw<MemoryStorage>, Raw<MemoryStorage>>,
    mut random: Random,
    is_over: &AtomicBool,
) {
    while !is_over.load(Ordering::Relaxed) {
        let start = random.below(THREADS_DISK / SECTOR - 64) * SECTOR;
        let range = GuestRange::new(GuestOffset(start), (1 + random.below(64)) * SECTOR);
        match random.below(6) {
            0 => block_on(disk.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap(),
            1 => block_on(disk.discard(range, DiscardMode::Guest)).unwrap(),
            _ => {
                let byte = 1 + random.below(255) as u8;
                let bytes = Buffer::from(&vec![byte; range.len as usize][..]);
                block_on(disk.write(range.start, bytes, WriteFlags::empty())).0.unwrap();
            }
        }
    }
}

fn memory() -> Raw<MemoryStorage> {
    block_on(Raw::create(MemoryStorage::new(), THREADS_DISK)).unwrap()
}

#[test]
fn points_come_and_hold_beside_threads_that_never_stop_writing() {
    let disk = Points::new(memory());
    let is_over = AtomicBool::new(false);
    let mut random = Random::new(seeds(1).start);
    thread::scope(|scope| {
        for _ in 0..4 {
            let (random, is_over, disk) = (random.split(), &is_over, &disk);
            scope.spawn(move || write_all_over(disk, random, is_over));
        }
        let over = OverAtEnd(&is_over);
        for round in 0..12 {
            let content = whole_content(disk.below());
            let added = disk.add(memory(), PointOptions::default(), content);
            let (point, content) = block_on(added).unwrap();
            for _ in 0..=round % 3 {
                assert!(block_on(whole_content(&point)).unwrap() == content, "round {round}");
            }
        }
        drop(over);
    });
}

/// Has threads end, also where the test fails.
struct OverAtEnd<'a>(&'a AtomicBool);

impl Drop for OverAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn pattern(disk: &impl Layer, start: u64, len: usize, byte: u8) -> lacuna::Result<()> {
    let bytes = Buffer::from(&vec![byte; len][..]);
    block_on(disk.write(GuestOffset(start), bytes, WriteFlags::empty())).0
}

#[test]
fn a_point_without_space_breaks_and_the_guest_goes_on() {
    let disk = Points::new(memory());
    pattern(&disk, 0, 1 << 20, 1).unwrap();
    let options = PointOptions { space_bytes: 8 << 10, ..PointOptions::default() };
    let (point, ()) = block_on(disk.add(memory(), options, async { Ok(()) })).unwrap();
    pattern(&disk, 0, 8 << 10, 2).unwrap();
    let status = point.status();
    assert_eq!((status.saved_bytes, status.broken.is_none()), (8 << 10, true));
    // What is zeros takes no space.
    pattern(&disk, 2 << 20, 1 << 20, 2).unwrap();
    assert_eq!(block_on(read(&point, GuestRange::new(GuestOffset(2 << 20), 1))).unwrap(), [0]);
    pattern(&disk, 8 << 10, 1, 3).unwrap();
    assert_eq!(point.status().broken.map(|error| error.kind()), Some(ErrorKind::NoSpace));
    let refused = block_on(read(&point, GuestRange::new(GuestOffset(0), 512))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Io, "{refused}");
    assert!(block_on(point.extents(point.whole())).is_err());
    assert_eq!(block_on(read(&disk, GuestRange::new(GuestOffset(8 << 10), 1))).unwrap(), [3]);
}

#[test]
fn guests_wait_for_space_where_that_was_asked_for_and_others_go_on() {
    let disk = Points::new(memory());
    pattern(&disk, 0, 1 << 20, 1).unwrap();
    let options = PointOptions { space_bytes: 4 << 10, when_full: WhenFull::Wait };
    let (point, ()) = block_on(disk.add(memory(), options, async { Ok(()) })).unwrap();
    pattern(&disk, 0, 512, 2).unwrap();
    thread::scope(|scope| {
        let waiting = [4 << 10, 8 << 10].map(|start| {
            let disk = &disk;
            scope.spawn(move || pattern(disk, start, 512, 3).unwrap())
        });
        while point.status().waiting < 2 {
            thread::yield_now();
        }
        // Neither what is saved, nor another point, waits with them.
        pattern(&disk, 0, 512, 4).unwrap();
        let (other, ()) =
            block_on(disk.add(memory(), PointOptions::default(), async { Ok(()) })).unwrap();
        assert_eq!(block_on(read(&other, GuestRange::new(GuestOffset(4 << 10), 1))).unwrap(), [1]);
        point.set_space(8 << 10);
        while point.status().waiting > 1 {
            thread::yield_now();
        }
        assert_eq!(block_on(read(&point, GuestRange::new(GuestOffset(0), 1))).unwrap(), [1]);
        point.end();
        waiting.into_iter().for_each(|thread| thread.join().unwrap());
    });
    assert_eq!(block_on(read(&disk, GuestRange::new(GuestOffset(8 << 10), 1))).unwrap(), [3]);
    assert!(block_on(read(&point, GuestRange::new(GuestOffset(0), 1))).is_err());
}
