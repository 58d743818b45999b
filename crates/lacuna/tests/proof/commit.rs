//! Power cuts at every change of a commit, and drops at its awaits: whatever is left, the top reads
//! what it read, over the files that it names; run again, all of it is in the base.

use std::path::Path;
use std::sync::Arc;

use lacuna::Result;
use lacuna::block::{AllocationDepth, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, ChainOptions, Disk, Format, FormatChoice};
use lacuna::job::{commit, empty_top};
use lacuna::qcow2::check::{CheckOptions, check};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{Access, BackingName, CreateOptions, create};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::foreign::qemu_img_check;
use testkit::sim::{HostOpener, Pace, SimHost, SimStorage, crash};
use testkit::{DropPoint, Executor, Random, SparseBytes, content};

use crate::drive::whole_content;

/// States per crash point where not all can be looked at.
const STATES: usize = 6;
/// One in this many states is also shown to qemu-img.
const QEMU_SAMPLE: usize = 150;
/// The files of a host, the top first.
const NAMES: [&str; 3] = ["top", "base", "between"];

fn options(access: Access) -> ChainOptions {
    ChainOptions { backing: Allow::Named, ..ChainOptions::new(Format::Qcow2, access) }
}

/// A chain to be made.
#[derive(Clone, Copy, Debug)]
struct Shape {
    version: Version,
    cluster_bits: u32,
    base: Format,
    base_bytes: u64,
    top_bytes: u64,
    between_bytes: Option<u64>,
}

const PLAIN: Shape = Shape {
    version: Version::V3,
    cluster_bits: 12,
    base: Format::Qcow2,
    base_bytes: 160 << 10,
    top_bytes: 160 << 10,
    between_bytes: None,
};

const SHAPES: [Shape; 8] = [
    PLAIN,
    Shape { base: Format::Raw, ..PLAIN },
    Shape { version: Version::V2, cluster_bits: 9, ..PLAIN },
    Shape { base_bytes: 50_176, ..PLAIN },
    Shape { base: Format::Raw, base_bytes: 50_176, ..PLAIN },
    Shape { base_bytes: 200 << 10, ..PLAIN },
    Shape { between_bytes: Some(80 << 10), ..PLAIN },
    Shape { base: Format::Raw, between_bytes: Some(180 << 10), base_bytes: 64 << 10, ..PLAIN },
];

struct Scene {
    shape: Shape,
    files: Vec<SparseBytes>,
    /// What the top reads.
    top: SparseBytes,
    /// What the base reads before.
    base: SparseBytes,
}

impl Scene {
    fn set(shape: Shape, seed: u64) -> Self {
        let host = SimHost::without_record(Pace::AtOnce, seed);
        let mut random = Random::new(seed);
        let (top, base) = pollster::block_on(async {
            make(&host, shape).await;
            if shape.between_bytes.is_some() {
                fill(&host, "between", shape.cluster_bits, &mut random).await;
            }
            fill(&host, "top", shape.cluster_bits, &mut random).await;
            (seen(&host, "top").await.unwrap(), seen(&host, "base").await.unwrap())
        });
        let count = if shape.between_bytes.is_some() { 3 } else { 2 };
        let files = (0..count).map(|index| host.content(index)).collect();
        Self { shape, files, top, base }
    }

    fn on(&self, host: &SimHost) {
        for file in &self.files {
            host.add_file(file.clone());
        }
    }

    fn drops(&self) -> bool {
        self.shape.between_bytes.is_some()
    }

    async fn run(&self, host: SimHost) -> Result<()> {
        let level = if self.drops() { 2 } else { 1 };
        let opener = HostOpener::new(host, &NAMES);
        let options = options(Access::ReadWrite);
        let chain = chain::open_split(&opener, Path::new("top"), &options, level).await?;
        commit(&chain, &mut |_| ()).await?;
        if !self.drops() {
            empty_top(&chain).await?;
        }
        chain.above.into_disk().close().await
    }

    /// The top reads what it read, and no image is corrupt.
    async fn examine(
        &self,
        left: &[SparseBytes],
        ask_qemu: bool,
    ) -> std::result::Result<(), String> {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        for file in left {
            host.add_file(file.clone());
        }
        for (index, name) in NAMES.iter().enumerate().take(left.len()) {
            if index == 1 && self.shape.base == Format::Raw {
                continue;
            }
            let storage = host.open_file(index);
            let report = check(&storage, &CheckOptions::default(), &mut |_| {}).await;
            let report = report.map_err(|error| format!("{name}: {error}"))?;
            if report.corruptions + report.check_errors > 0 {
                return Err(format!("{name}: {report:?}"));
            }
            if ask_qemu {
                let folder = tempfile::tempdir().unwrap();
                for (name, file) in NAMES.iter().zip(left) {
                    file.save(&folder.path().join(name));
                }
                let found = qemu_img_check(&folder.path().join(name));
                assert!(found.is_safe(), "{name}: {}", found.text);
            }
        }
        let top = seen(&host, "top").await.map_err(|error| format!("Reading: {error}"))?;
        match top.to_vec() == self.top.to_vec() {
            true => Ok(()),
            false => Err("The top reads otherwise".to_owned()),
        }
    }

    /// All is in the base, and the top is empty where it was to be.
    async fn examine_end(&self, left: &[SparseBytes]) -> std::result::Result<(), String> {
        self.examine(left, true).await?;
        let host = SimHost::without_record(Pace::AtOnce, 1);
        left.iter().for_each(|file| drop(host.add_file(file.clone())));
        let base = seen(&host, "base").await.map_err(|error| error.to_string())?;
        let mut expected = self.base.to_vec();
        expected.resize(expected.len().max(self.top.len() as usize), 0);
        expected[..self.top.len() as usize].copy_from_slice(&self.top.to_vec());
        if base.to_vec() != expected {
            return Err("The base reads otherwise than the top".to_owned());
        }
        let opener = HostOpener::new(host, &NAMES);
        let top = chain::open(&opener, Path::new("top"), &options(Access::ReadOnly)).await.unwrap();
        let extents = top.disk().extents(top.disk().whole()).await.unwrap();
        let is_empty = extents.iter().all(|extent| extent.status.depth != AllocationDepth::TOP);
        match is_empty != self.drops() {
            true => Ok(()),
            false => Err(format!("The top holds {extents:?}")),
        }
    }
}

fn files_of(host: &SimHost, scene: &Scene) -> Vec<SparseBytes> {
    (0..scene.files.len()).map(|index| host.content(index)).collect()
}

/// Makes the images, the base with content.
async fn make(host: &SimHost, shape: Shape) {
    let files: Vec<SimStorage> = NAMES.map(|_| host.add_file(SparseBytes::default())).into();
    let plain = CreateOptions {
        version: shape.version,
        cluster_bytes: 1 << shape.cluster_bits,
        ..CreateOptions::default()
    };
    let over = |name: &str, format: Format| {
        Some(BackingName { name: name.to_owned(), format: Some(format.to_string()) })
    };
    match shape.base {
        Format::Raw => {
            let len = shape.base_bytes as usize;
            let bytes = content(7, GuestRange::new(GuestOffset(0), len as u64 / 3));
            let hold = lacuna::buffer::Hold::none();
            files[1].set_len(shape.base_bytes, hold).await.unwrap();
            files[1]
                .write_at(lacuna::units::HostOffset(0), Buffer::from(&bytes[..]))
                .await
                .0
                .unwrap();
        }
        Format::Qcow2 => {
            let options = CreateOptions {
                size_bytes: shape.base_bytes,
                cluster_bytes: 1 << 14,
                ..plain.clone()
            };
            create(&files[1], &options).await.unwrap();
            fill(host, "base", 14, &mut Random::new(5)).await;
        }
    }
    let below = match shape.between_bytes {
        None => over("base", shape.base),
        Some(size_bytes) => {
            let backing = over("base", shape.base);
            create(&files[2], &CreateOptions { size_bytes, backing, ..plain.clone() })
                .await
                .unwrap();
            over("between", Format::Qcow2)
        }
    };
    let options = CreateOptions { size_bytes: shape.top_bytes, backing: below, ..plain };
    create(&files[0], &options).await.unwrap();
}

/// Writes data, zeros and nothing here and there.
async fn fill(host: &SimHost, name: &str, cluster_bits: u32, random: &mut Random) {
    let opener = HostOpener::new(host.clone(), &NAMES);
    let options = options(Access::ReadWrite);
    let chain = chain::open(&opener, Path::new(name), &options).await.unwrap();
    let disk = chain.into_disk();
    for index in 0..disk.size_bytes() >> cluster_bits {
        let range = GuestRange::new(GuestOffset(index << cluster_bits), 1 << cluster_bits);
        match random.below(6) {
            0 | 1 => {
                let bytes = Buffer::from(&content(random.next(), range)[..]);
                disk.write(range.start, bytes, WriteFlags::empty()).await.0.unwrap();
            }
            2 => disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).await.unwrap(),
            3 if index % 3 == 0 => {
                let bytes = Buffer::from(&[9; 512][..]);
                disk.write(range.start, bytes, WriteFlags::empty()).await.0.unwrap();
            }
            _ => {}
        }
    }
    disk.close().await.unwrap();
}

async fn seen(host: &SimHost, name: &str) -> Result<SparseBytes> {
    let opener = HostOpener::new(host.clone(), &NAMES);
    let mut options = options(Access::ReadOnly);
    options.format = FormatChoice::Probe;
    let chain = chain::open(&opener, Path::new(name), &options).await?;
    let disk: &Disk<SimStorage> = chain.disk();
    whole_content(disk).await
}

fn scenes() -> impl Iterator<Item = (u64, Scene)> {
    (1..).zip(SHAPES).map(|(seed, shape)| (seed, Scene::set(shape, seed)))
}

#[test]
fn a_crash_in_a_commit_leaves_what_the_top_read() {
    let mut count = 0;
    for (seed, scene) in scenes() {
        let host = SimHost::new(Pace::AtOnce, 1);
        scene.on(&host);
        host.start_record();
        pollster::block_on(scene.run(host.clone())).unwrap();
        let left = files_of(&host, &scene);
        if let Err(error) = pollster::block_on(scene.examine_end(&left)) {
            panic!("{:?}: {error}", scene.shape);
        }
        let points = crash::points(&host);
        let step = if std::env::var_os("LACUNA_LONG").is_some() { 1 } else { 5 };
        for point in points.into_iter().skip(seed as usize % step).step_by(step) {
            for state in point.states(seed, STATES) {
                count += 1;
                let result = scene.examine(&state.files, count % QEMU_SAMPLE == 1);
                if let Err(error) = pollster::block_on(result) {
                    let story = state.survivors.join("\n  ");
                    panic!("{:?}, seed {seed}: {error}\n  {story}", scene.shape);
                }
            }
        }
    }
    assert!(count > 100, "only {count} crashes were tried");
}

#[test]
fn a_commit_dropped_at_its_awaits_leaves_what_the_top_read_and_can_be_run_again() {
    for (seed, scene) in scenes() {
        let mut polls = 1;
        loop {
            let host = SimHost::without_record(Pace::Executor, seed);
            scene.on(&host);
            let mut executor = Executor::new(seed);
            executor.attach(Arc::new(host.clone()));
            let run = scene.run(host.clone());
            let task = executor.spawn_until(DropPoint::AfterPoll(polls), run);
            executor.settle().unwrap_or_else(|stalled| panic!("{:?}: {stalled}", scene.shape));
            let ended = task.take();
            let left = files_of(&host, &scene);
            if let Err(error) = pollster::block_on(scene.examine(&left, false)) {
                panic!("{:?}, seed {seed}, dropped at poll {polls}: {error}", scene.shape);
            }
            let again = SimHost::without_record(Pace::AtOnce, 1);
            left.iter().for_each(|file| drop(again.add_file(file.clone())));
            pollster::block_on(scene.run(again.clone())).unwrap();
            let done = files_of(&again, &scene);
            if let Err(error) = pollster::block_on(scene.examine_end(&done)) {
                panic!("{:?}, seed {seed}, run again after poll {polls}: {error}", scene.shape);
            }
            if let Some(result) = ended {
                result.unwrap();
                break;
            }
            polls += 1 + polls / 4;
        }
        assert!(polls > 8, "{:?}: only {polls} awaits were reached", scene.shape);
    }
}

#[test]
fn a_commit_run_again_after_a_crash_brings_all_into_the_base() {
    for (seed, scene) in scenes() {
        let host = SimHost::new(Pace::AtOnce, 1);
        scene.on(&host);
        host.start_record();
        pollster::block_on(scene.run(host.clone())).unwrap();
        for point in crash::points(&host).into_iter().step_by(17) {
            let state = point.states(seed, 1).next().unwrap();
            let again = SimHost::without_record(Pace::AtOnce, 1);
            state.files.iter().for_each(|file| drop(again.add_file(file.clone())));
            pollster::block_on(scene.run(again.clone())).unwrap();
            let done = files_of(&again, &scene);
            if let Err(error) = pollster::block_on(scene.examine_end(&done)) {
                panic!("{:?}, seed {seed}: {error}", scene.shape);
            }
        }
    }
}
