//! An image that changes, a model of it, and a folder of points.

#![allow(dead_code, reason = "each test program uses its part of this module")]

use std::cell::Cell;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use lacuna::block::{DiscardMode, DynLayer, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, ChainOptions, FileOpener, Format};
use lacuna::qcow2::{
    Access, BackingName, CreateOptions, Image, NewBitmap, OpenOptions, Parts, Shrink, create,
};
use lacuna::raw::Raw;
use lacuna::storage::{FileOptions, MemoryStorage};
use lacuna::units::{GuestOffset, GuestRange};
use lacuna_backup::{
    Basis, Content, CopyOptions, Everything, Folder, Form, GoOn, Point, PointDisk, PointFacts,
    PointName, Start, verify,
};
use pollster::block_on;
use tempfile::TempDir;
use testkit::Random;

const BITMAP: &str = "b0";

/// Whether copies are cut off now and then.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    Never,
    Often,
}

pub(crate) struct Bench {
    _place: TempDir,
    pub(crate) folder: Folder,
    pub(crate) image: Image<MemoryStorage>,
    pub(crate) model: Vec<u8>,
    /// How many copies went on where they had been cut off.
    pub(crate) resumed: Cell<u32>,
}

/// A disk to stand on, and what it reads as.
pub(crate) type Below = (Arc<dyn DynLayer>, Vec<u8>);

impl Bench {
    pub(crate) fn new(form: Form, random: &mut Random) -> Self {
        let place = TempDir::new().unwrap();
        let folder = Folder::open_or_create(&place.path().join("points"), form).unwrap();
        let size_bytes = (random.below(12) + 1) << 19;
        Self::on(None, size_bytes, place, folder, random)
    }

    /// Makes an image that stands on a shorter disk.
    pub(crate) fn over_raw(form: Form, random: &mut Random) -> Self {
        let place = TempDir::new().unwrap();
        let folder = Folder::open_or_create(&place.path().join("points"), form).unwrap();
        let bytes: Vec<u8> = (0..700_u32 << 10).map(|at| (at >> 16) as u8 & 3).collect();
        let raw = block_on(Raw::open(MemoryStorage::from(&bytes[..]))).unwrap();
        Self::on(Some((Arc::new(raw), bytes)), 2 << 20, place, folder, random)
    }

    /// Makes an image that stands on this one, with the same folder.
    pub(crate) fn overlay(&self, size_bytes: u64, random: &mut Random) -> Self {
        let folder = Folder::open(self.folder.path()).unwrap();
        let below: Below = (Arc::new(self.image.clone()), self.model.clone());
        Self::on(Some(below), size_bytes, TempDir::new().unwrap(), folder, random)
    }

    fn on(
        below: Option<Below>,
        size_bytes: u64,
        place: TempDir,
        folder: Folder,
        random: &mut Random,
    ) -> Self {
        let storage = MemoryStorage::new();
        let cluster_bytes = 4096 << random.below(5);
        let name = || BackingName { name: "below".into(), format: Some("raw".into()) };
        let backing = below.as_ref().map(|_| name());
        let options =
            CreateOptions { size_bytes, cluster_bytes, backing, ..CreateOptions::default() };
        let mut model = below.as_ref().map(|(_, bytes)| bytes.clone()).unwrap_or_default();
        model.resize(size_bytes as usize, 0);
        let image = block_on(async {
            create(&storage, &options).await?;
            let parts = Parts { backing: below.map(|(disk, _)| disk), ..Parts::alone(storage) };
            let image = Image::open(parts, OpenOptions::new(Access::ReadWrite)).await?;
            let granularity_bytes = Some(4096 << random.below(6));
            image.add_bitmap(&NewBitmap { granularity_bytes, ..NewBitmap::new(BITMAP) }).await?;
            Ok::<_, lacuna::Error>(image)
        });
        Self { _place: place, folder, image: image.unwrap(), model, resumed: Cell::default() }
    }

    /// Changes the image and the model alike.
    pub(crate) fn change(&mut self, random: &mut Random) {
        for _ in 0..random.below(14) {
            let size = self.model.len() as u64;
            match random.below(9) {
                8 => self.write_compressed(random),
                0 => self.resize(random),
                1 | 2 => {
                    let range = some_range(random, size);
                    block_on(self.image.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap();
                    self.part(range).fill(0);
                }
                3 => {
                    let range = some_range(random, size);
                    block_on(self.image.discard(range, DiscardMode::Guest)).unwrap();
                    // What a discard leaves is the image's to say.
                    let (read, bytes) =
                        block_on(self.image.read(range.start, Buffer::new(range.len as usize)));
                    read.unwrap();
                    self.part(range).copy_from_slice(&bytes);
                }
                _ => self.write(random, size),
            }
        }
    }

    fn write(&mut self, random: &mut Random, size: u64) {
        let range = some_range(random, size);
        let bytes: Vec<u8> = match random.below(3) {
            0 => vec![0; range.len as usize],
            1 => vec![random.next() as u8; range.len as usize],
            _ => (0..range.len).map(|_| random.next() as u8).collect(),
        };
        let write = self.image.write(range.start, Buffer::from(&bytes[..]), WriteFlags::empty());
        block_on(write).0.unwrap();
        self.part(range).copy_from_slice(&bytes);
    }

    /// Stores a cluster compressed.
    fn write_compressed(&mut self, random: &mut Random) {
        let unit = self.image.geometry().cluster_bytes();
        let range =
            GuestRange::new(GuestOffset(random.below(self.model.len() as u64 / unit) * unit), unit);
        let bytes = vec![random.next() as u8; unit as usize];
        let write = self.image.write_compressed(range.start, Buffer::from(&bytes[..]));
        block_on(write).0.unwrap();
        self.part(range).copy_from_slice(&bytes);
    }

    fn resize(&mut self, random: &mut Random) {
        let size = (random.below(12) + 1) << 19;
        block_on(self.image.resize(size, Shrink::Allow)).unwrap();
        self.model.resize(size as usize, 0);
    }

    fn part(&mut self, range: GuestRange) -> &mut [u8] {
        &mut self.model[range.start.0 as usize..range.end().0 as usize]
    }

    /// What a point of this image is begun as.
    pub(crate) fn facts(&self, name: &str, is_incremental: bool) -> PointFacts {
        let mut facts = PointFacts::full(PointName::new(name).unwrap(), self.model.len() as u64);
        facts.begins_bitmap = Some(BITMAP.into());
        facts.identity = Some(format!("as of {name}"));
        if is_incremental {
            let points = self.folder.points().unwrap();
            facts.stands_on = Some(points.find(None).unwrap().reference());
            facts.basis = Basis::Bitmap { name: BITMAP.into() };
        }
        facts
    }

    /// Makes a point of what the image holds.
    pub(crate) fn point(&self, name: &str, is_incremental: bool, random: &mut Random, cut: Cut) {
        let facts = self.facts(name, is_incremental);
        let before = self.folder.points().unwrap().sound;
        while cut == Cut::Often && !random.one_in(3) {
            let mut facts = facts.clone();
            if random.one_in(3) {
                // Of a source that is known to be another one by the next run.
                facts.identity = Some("something else".into());
            }
            let done = polled(random.below(60), self.copied(facts));
            assert!(done.is_none_or(|done| done.is_ok() || is_busy(&done)));
            assert_eq!(self.folder.points().unwrap().sound, before, "a cut copy does not count");
        }
        let finished = || block_on(self.finished(&facts, cut));
        let mut made = finished();
        while cut == Cut::Often && is_busy(&made) {
            std::thread::yield_now();
            made = finished();
        }
        let point = made.unwrap();
        assert_eq!(self.folder.points().unwrap().sound.last(), Some(&point));
        block_on(self.image.clear_bitmap(&BITMAP.into())).unwrap();
    }

    async fn finished(&self, facts: &PointFacts, cut: Cut) -> lacuna::Result<Point> {
        let folder = Folder::open(self.folder.path())?;
        let mut work = folder.begin(facts.clone(), GoOn::default()).await?;
        assert!(cut == Cut::Often || *work.start() == Start::New);
        if matches!(work.start(), Start::Resumed(at) if at.0 > 0) {
            self.resumed.set(self.resumed.get() + 1);
        }
        self.copy(&mut work, facts).await?;
        work.finish().await
    }

    /// Copies and does not finish, as one whose process was killed.
    async fn copied(&self, facts: PointFacts) -> lacuna::Result<()> {
        // A process of its own: the lock goes with the last descriptor.
        let folder = Folder::open(self.folder.path())?;
        let mut work = folder.begin(facts.clone(), GoOn::default()).await?;
        self.copy(&mut work, &facts).await
    }

    async fn copy(
        &self,
        work: &mut lacuna_backup::Work<'_>,
        facts: &PointFacts,
    ) -> lacuna::Result<()> {
        let options = CopyOptions { level: 1, in_flight: 3, durable_every_bytes: 64 << 10 };
        let mut progress = |_| ();
        match facts.basis.is_incremental() {
            true => {
                let bitmap = self.image.bitmap(&BITMAP.into()).await?;
                work.copy(&self.image, &bitmap, options, &mut progress).await
            }
            false => work.copy(&self.image, &Everything, options, &mut progress).await,
        }
    }

    /// What is wrong with any point.
    pub(crate) fn damage(&self) -> Vec<String> {
        damage(&self.folder)
    }
}

/// A request of a future that was dropped keeps its file locked until it has ended; a process that was
/// killed has none.
fn is_busy<T>(done: &lacuna::Result<T>) -> bool {
    done.as_ref().is_err_and(|error| error.kind() == lacuna::ErrorKind::Busy)
}

/// What is wrong with any point of a folder.
pub(crate) fn damage(folder: &Folder) -> Vec<String> {
    let points = folder.points().unwrap();
    let mut found: Vec<String> =
        points.broken.iter().map(|(name, error)| format!("{name}: {error}")).collect();
    for point in &points.sound {
        if let Err(error) = points.chain(point) {
            found.push(error.to_string());
        }
        let damage = block_on(verify(folder, point, &mut |_| ()));
        found.extend(damage.iter().map(|it| format!("{}: {}", it.path.display(), it.error)));
    }
    found
}

/// Reads all of a point.
pub(crate) fn content(folder: &Folder, name: &str) -> Vec<u8> {
    let points = folder.points().unwrap();
    let point = points.find(Some(&PointName::new(name).unwrap())).unwrap();
    match &point.manifest.content {
        Content::Segments { .. } => {
            let chain = points.chain(point).unwrap();
            read_all(&PointDisk::open(folder, &chain).unwrap())
        }
        Content::Qcow2 { .. } => read_image(&folder.image_path(point.name())),
    }
}

fn read_image(path: &Path) -> Vec<u8> {
    let options = ChainOptions {
        backing: Allow::Named,
        ..ChainOptions::new(Format::Qcow2, Access::ReadOnly)
    };
    let opener = FileOpener::new(FileOptions::default());
    read_all(block_on(chain::open(&opener, path, &options)).unwrap().disk())
}

/// Reads a disk, and holds what it says of zeros against what it reads.
pub(crate) fn read_all(disk: &impl Layer) -> Vec<u8> {
    let (read, bytes) =
        block_on(disk.read(GuestOffset(0), Buffer::new(disk.size_bytes() as usize)));
    read.unwrap();
    let mut at = GuestOffset(0);
    while at.0 < disk.size_bytes() {
        let rest = GuestRange::new(at, disk.size_bytes() - at.0);
        for extent in block_on(disk.extents(rest)).unwrap() {
            assert_eq!(extent.range.start, at);
            at = extent.range.end();
            let part = &bytes[extent.range.start.0 as usize..at.0 as usize];
            assert!(!extent.status.reads_zero || part.iter().all(|byte| *byte == 0));
        }
    }
    bytes.to_vec()
}

fn some_range(random: &mut Random, size: u64) -> GuestRange {
    let start = random.below(size / 512) * 512;
    let most = if random.one_in(4) { size } else { 64 << 10 };
    let len = (random.below(most / 512) + 1) * 512;
    GuestRange::new(GuestOffset(start), len.min(size - start))
}

/// Polls a future so often, and drops it.
fn polled<T>(times: u64, future: impl Future<Output = T>) -> Option<T> {
    struct Thread(std::thread::Thread);
    impl Wake for Thread {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Thread(std::thread::current())));
    let mut future = pin!(future);
    for _ in 0..times {
        if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(done);
        }
        std::thread::park();
    }
    None
}

/// A point that was made, for those who damage it.
pub(crate) fn sample(form: Form, seed: u64) -> (Bench, Vec<Point>) {
    let mut random = Random::new(seed);
    let mut bench = Bench::new(form, &mut random);
    for number in 0..2 {
        bench.change(&mut random);
        bench.point(&format!("p{number}"), number > 0, &mut random, Cut::Never);
    }
    let points = bench.folder.points().unwrap().sound;
    (bench, points)
}
