//! Power cuts at every change of an amendment: the image is of the old kind or of the new one,
//! reads the same, and leaks at worst.

use std::sync::Arc;

use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::format::{AutoclearFeatures, Header, Version};
use lacuna::qcow2::{Access, AmendOptions, Image, OpenOptions, SnapshotChoice};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage, crash};
use testkit::{DropPoint, Executor, SparseBytes, content, seeds};

use crate::case::{Backing, Case, Kind};
use crate::drive::{assert_safe, is_dirty, whole_content};

/// States per crash point where not all can be looked at.
const STATES: usize = 10;
/// One in this many states is also shown to qemu-img.
const QEMU_SAMPLE: usize = 60;

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len)
}

/// Data, and zeros with and without a place of their own.
async fn fill(image: &Image<SimStorage>, kind: &Kind) -> lacuna::Result<()> {
    let cluster = kind.cluster_bytes();
    let data = range(2 * cluster, 4 * cluster);
    image.write(data.start, Buffer::from(&content(3, data)[..]), WriteFlags::empty()).await.0?;
    image.write_zeroes(range(3 * cluster, cluster), ZeroFlags::empty()).await?;
    image.write_zeroes(range(4 * cluster, cluster), ZeroFlags::MAY_UNMAP).await?;
    image.write_zeroes(range(8 * cluster, 2 * cluster), ZeroFlags::empty()).await
}

fn with_content(case: &Case, host: &SimHost) -> Case {
    let mut content = vec![host.content(0)];
    content.extend(case.data.as_ref().map(|_| host.content(1)));
    case.with_content(content)
}

/// What of the header the amendments change.
fn nature(case: &Case) -> (Version, u32, u64, u64) {
    let header = Header::decode(&case.image.read_vec(0, case.kind.cluster_bytes() as usize));
    let header = header.unwrap();
    let features = header.features;
    let geometry = header.geometry;
    let names = header.extensions.feature_names.len() as u64;
    (geometry.version(), geometry.refcount_order(), features.compatible.bits(), names)
}

async fn examine(left: &Case, old: &SparseBytes, ask_qemu: bool) -> Result<(), String> {
    let version = match nature(left).0 {
        Version::V2 => 2,
        Version::V3 => 3,
    };
    let left = Case { kind: Kind { version, ..left.kind }, ..left.clone() };
    if !is_dirty(&left) {
        assert_safe(&left, ask_qemu).await?;
    }
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let mut files = left.on(&host);
    files.options = OpenOptions::new(Access::ReadWrite);
    let image = files.open().await.map_err(|error| format!("Opening: {error}"))?;
    let seen = whole_content(&image).await.map_err(|error| format!("Reading: {error}"))?;
    image.close().await.map_err(|error| format!("Closing: {error}"))?;
    match seen.to_vec() == old.to_vec() {
        true => Ok(()),
        false => Err("The disk reads otherwise".to_owned()),
    }
}

/// Records an amendment of an image with content, or of an empty one, and looks at every state.
fn crash_everywhere(kind: &Kind, options: &AmendOptions, is_filled: bool, seed: u64) {
    let case = kind.build(seed);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let files = case.on(&host);
    let old = pollster::block_on(async {
        let image = files.open().await.unwrap();
        if is_filled {
            fill(&image, kind).await.unwrap();
        }
        let old = whole_content(&image).await.unwrap();
        image.close().await.unwrap();
        old
    });
    let case = with_content(&case, &host);
    let host = SimHost::new(Pace::AtOnce, 1);
    let files = case.on(&host);
    host.start_record();
    pollster::block_on(async {
        files.open().await.unwrap().amend(options, &mut |_, _| ()).await.unwrap();
    });
    let (before, after) = (nature(&case), nature(&with_content(&case, &host)));
    assert_ne!(before, after, "{kind:?}, {options:?} changed nothing");
    let (mut count, mut changed) = (0, 0);
    for point in crash::points(&host) {
        for state in point.states(seed, STATES) {
            count += 1;
            let survivors = state.survivors;
            let left = case.with_content(state.files);
            changed += usize::from(nature(&left) == after);
            if let Err(error) = pollster::block_on(examine(&left, &old, count % QEMU_SAMPLE == 1)) {
                let story = survivors.join("\n  ");
                panic!("{kind:?}, {options:?}, seed {seed}: {error}\n  {story}");
            }
        }
    }
    assert!(0 < changed && changed < count, "{kind:?}, {options:?}: {changed} of {count}");
}

/// Drops an amendment at its awaits, one after the other.
fn drop_everywhere(kind: &Kind, options: &AmendOptions) {
    let case = kind.build(1);
    let old = pollster::block_on(async {
        let image = case.on(&SimHost::without_record(Pace::AtOnce, 1)).open().await.unwrap();
        whole_content(&image).await.unwrap()
    });
    let mut polls = 1;
    loop {
        let host = SimHost::without_record(Pace::Executor, 1);
        let files = case.on(&host);
        let mut executor = Executor::new(1);
        executor.attach(Arc::new(host.clone()));
        let amend = async move { files.open().await?.amend(options, &mut |_, _| ()).await };
        let task = executor.spawn_until(DropPoint::AfterPoll(polls), amend);
        executor.settle().unwrap_or_else(|stalled| panic!("{kind:?}: {stalled}"));
        let ended = task.take();
        if let Err(error) = pollster::block_on(examine(&with_content(&case, &host), &old, false)) {
            panic!("{kind:?}, {options:?}, dropped at poll {polls}: {error}");
        }
        if let Some(result) = ended {
            result.unwrap();
            break;
        }
        polls += 1 + polls / 16;
    }
    assert!(polls > 8, "{kind:?}, {options:?}: only {polls} awaits were reached");
}

#[test]
fn an_amendment_dropped_at_its_awaits_leaves_the_old_kind_or_the_new() {
    let unchanged = AmendOptions::default();
    for bits in [9, 14] {
        let plain = Kind { backing: Backing::RawShorter, ..Kind::plain(bits) };
        let downgrade = AmendOptions { version: Some(Version::V2), ..unchanged.clone() };
        drop_everywhere(&plain, &downgrade);
        drop_everywhere(&plain, &AmendOptions { refcount_bits: Some(64), ..unchanged.clone() });
        let version = Some(Version::V3);
        let upgrade = AmendOptions { version, lazy_refcounts: Some(true), ..unchanged.clone() };
        drop_everywhere(&Kind { version: 2, ..plain }, &upgrade);
    }
}

#[test]
fn a_crash_in_a_downgrade_leaves_either_version() {
    let options = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
    for bits in [9, 12, 16] {
        for backing in [Backing::None, Backing::RawShorter, Backing::Qcow2Longer] {
            for lazy in [false, true] {
                let kind = Kind { backing, lazy, ..Kind::plain(bits) };
                seeds(1).for_each(|seed| crash_everywhere(&kind, &options, true, seed));
            }
        }
    }
}

#[test]
fn a_crash_in_an_upgrade_leaves_either_version() {
    let version = Some(Version::V3);
    let lazy_refcounts = Some(true);
    let options = AmendOptions { version, lazy_refcounts, ..AmendOptions::default() };
    for bits in [9, 12, 16] {
        let kind = Kind { version: 2, backing: Backing::RawShorter, ..Kind::plain(bits) };
        seeds(1).for_each(|seed| crash_everywhere(&kind, &options, true, seed));
    }
}

#[test]
fn a_crash_in_a_change_of_refcount_width_leaves_either_width() {
    for (from, to) in [(4, 0), (4, 6), (0, 3), (6, 4), (3, 5)] {
        for bits in [9, 14] {
            let kind = Kind { refcount_order: from, ..Kind::plain(bits) };
            let refcount_bits = Some(1 << to);
            let options = AmendOptions { refcount_bits, ..AmendOptions::default() };
            seeds(1).for_each(|seed| crash_everywhere(&kind, &options, true, seed));
        }
    }
}

#[test]
fn a_crash_while_claims_are_put_up_never_shows_a_lie() {
    for is_filled in [false, true] {
        // Smaller clusters have no room for the names that are the wish.
        let kind = Kind::plain(16);
        let options = AmendOptions { zero_claims: Some(true), ..AmendOptions::default() };
        // An even seed begins with claims that nobody asked for.
        crash_everywhere(&kind, &options, is_filled, 1);
        let claimed = claims_after(&kind, is_filled);
        let expected =
            if is_filled { AutoclearFeatures::empty() } else { AutoclearFeatures::ZERO_CLAIMS };
        assert_eq!(claimed, expected);
    }
}

fn claims_after(kind: &Kind, is_filled: bool) -> AutoclearFeatures {
    let case = kind.build(1);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let files = case.on(&host);
    pollster::block_on(async {
        let image = files.open().await.unwrap();
        if is_filled {
            fill(&image, kind).await.unwrap();
        }
        let options = AmendOptions { zero_claims: Some(true), ..AmendOptions::default() };
        image.amend(&options, &mut |_, _| ()).await.unwrap();
    });
    let first = host.content(0).read_vec(0, kind.cluster_bytes() as usize);
    Header::decode(&first).unwrap().features.autoclear
}

/// Zero clusters with a place that only a snapshot has, or the snapshot and the disk.
#[test]
fn a_crash_in_a_downgrade_keeps_what_snapshots_read() {
    let options = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
    for (bits, seed) in [(9, 1), (12, 2), (12, 3)] {
        let kind = Kind::plain(bits);
        let (case, old) = kind.build_with_snapshot(seed);
        let host = SimHost::new(Pace::AtOnce, 1);
        let files = case.on(&host);
        host.start_record();
        pollster::block_on(async {
            files.open().await.unwrap().amend(&options, &mut |_, _| ()).await.unwrap();
        });
        assert_eq!(nature(&with_content(&case, &host)).0, Version::V2);
        for point in crash::points(&host).into_iter().step_by(2) {
            for state in point.states(seed, STATES) {
                let left = case.with_content(state.files);
                let result = pollster::block_on(async {
                    examine(&left, &old, false).await?;
                    let mut files = left.on(&SimHost::without_record(Pace::AtOnce, 1));
                    files.options = OpenOptions::new(Access::ReadWrite);
                    let image = files.open().await.map_err(|error| format!("Opening: {error}"))?;
                    let choice = SnapshotChoice::Name("one".into());
                    let snapshot = image.snapshot(&choice).await.map_err(|e| e.to_string())?;
                    let seen = whole_content(&snapshot).await.map_err(|e| e.to_string())?;
                    match seen.to_vec() == old.to_vec() {
                        true => Ok(()),
                        false => Err("The snapshot reads otherwise".to_owned()),
                    }
                });
                if let Err(error) = result {
                    panic!("{bits}, seed {seed}: {error}\n  {}", state.survivors.join("\n  "));
                }
            }
        }
    }
}
