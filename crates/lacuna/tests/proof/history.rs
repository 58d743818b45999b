//! Snapshots made, applied and deleted: in turns with QEMU, through power cuts, dropped at awaits.

use std::time::{Duration, UNIX_EPOCH};

use lacuna::ErrorKind;
use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, Image, OpenOptions, Shrink, SnapshotChoice};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::foreign::QEMU_IMG;
use testkit::sim::{Pace, SimHost, crash};
use testkit::{DropPoint, Executor, Random, SparseBytes, content, seeds};

use crate::case::{Backing, Case, Kind, Store};
use crate::crash::kinds;
use crate::drive::{own_check, qemu_check, whole_content};

/// States per crash point where not all can be looked at.
const STATES: usize = 6;
/// One in this many states is also shown to qemu-img.
const QEMU_SAMPLE: usize = 30;

/// All that somebody can read: the disk, and each snapshot by identifier.
#[derive(Clone, Debug, PartialEq)]
struct View {
    disk: Vec<u8>,
    snapshots: Vec<(String, String, Vec<u8>)>,
}

impl View {
    async fn of(case: &Case) -> lacuna::Result<Self> {
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let mut files = case.on(&host);
        files.options = OpenOptions::new(Access::ReadOnly);
        Self::of_image(&files.open().await?).await
    }

    async fn of_image<S: Storage>(image: &Image<S>) -> lacuna::Result<Self> {
        let mut snapshots = Vec::new();
        for snapshot in image.snapshots().await? {
            let layer = image.snapshot(&SnapshotChoice::Id(snapshot.id.clone())).await?;
            let bytes = whole_content(&layer).await?.to_vec();
            snapshots.push((snapshot.id.to_string(), snapshot.name.to_string(), bytes));
        }
        Ok(Self { disk: whole_content(image).await?.to_vec(), snapshots })
    }

    fn sizes(&self) -> (usize, Vec<(&str, usize)>) {
        let of = |it: &(String, String, Vec<u8>)| it.2.len();
        (self.disk.len(), self.snapshots.iter().map(|it| (&*it.0, of(it))).collect())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Create(String),
    Apply(String),
    Delete(String),
}

impl Step {
    fn random(random: &mut Random, view: &View, number: usize) -> Self {
        let some =
            |random: &mut Random| view.snapshots[random.index(view.snapshots.len())].1.clone();
        match random.below(5) {
            _ if view.snapshots.is_empty() => Self::Create(format!("s{number}")),
            0 | 1 => Self::Create(format!("s{number}")),
            2 => Self::Apply(some(random)),
            _ => Self::Delete(some(random)),
        }
    }

    async fn ours<S: Storage>(&self, image: &Image<S>) -> lacuna::Result<()> {
        let made = UNIX_EPOCH + Duration::new(1_700_000_000, 5);
        let named = |name: &String| SnapshotChoice::Name(name.as_str().into());
        match self {
            Self::Create(name) => image.create_snapshot(&name.as_str().into(), made).await,
            Self::Apply(name) => image.apply_snapshot(&named(name)).await,
            Self::Delete(name) => image.delete_snapshot(&named(name)).await,
        }
        .map(drop)
    }

    fn stock(&self, case: &Case) -> Case {
        let (flag, name) = match self {
            Self::Create(name) => ("-c", name),
            Self::Apply(name) => ("-a", name),
            Self::Delete(name) => ("-d", name),
        };
        let folder = tempfile::tempdir().unwrap();
        let path = case.save(folder.path());
        let file = path.file_name().unwrap().to_str().unwrap();
        QEMU_IMG.succeed_in(folder.path(), ["snapshot", flag, name, file]);
        case.with_content(vec![SparseBytes::load(&path)])
    }

    /// What is to be seen afterwards.
    fn expected(&self, before: &View) -> View {
        let mut view = before.clone();
        let place = |name: &String| before.snapshots.iter().position(|it| it.1 == *name).unwrap();
        match self {
            Self::Create(name) => {
                let ids = before.snapshots.iter().map(|it| it.0.parse::<u64>().unwrap());
                let id = ids.max().unwrap_or(0) + 1;
                view.snapshots.push((id.to_string(), name.clone(), before.disk.clone()));
            }
            Self::Apply(name) => view.disk = before.snapshots[place(name)].2.clone(),
            Self::Delete(name) => {
                view.snapshots.remove(place(name));
            }
        }
        view
    }
}

/// Writes, compresses and discards here and there; now and then another size.
async fn scribble<S: Storage>(
    image: &Image<S>,
    kind: &Kind,
    random: &mut Random,
) -> lacuna::Result<()> {
    let cluster = kind.cluster_bytes();
    for _ in 0..6 {
        let clusters = image.size_bytes() / cluster;
        let start = random.below(clusters) * cluster;
        let range = GuestRange::new(GuestOffset(start), cluster);
        let buffer = Buffer::from(&content(random.next(), range)[..]);
        match random.below(6) {
            0 if kind.allows_compression() => image.write_compressed(range.start, buffer).await.0?,
            1 => image.discard(range, DiscardMode::Full).await?,
            2 => {
                let part = Buffer::from(&buffer[..512]);
                image
                    .write(range.start + cluster / 1024 * 512, part, WriteFlags::empty())
                    .await
                    .0?;
            }
            _ => image.write(range.start, buffer, WriteFlags::empty()).await.0?,
        }
    }
    if kind.version == 3 && random.one_in(4) {
        let size = kind.size_bytes() / 512 / 2 + random.below(kind.size_bytes() / 512);
        image.resize(size * 512, Shrink::Allow).await?;
    }
    Ok(())
}

fn usable(kind: &Kind) -> bool {
    !kind.has_data_file() && kind.refcount_order > 2
}

fn some_kinds() -> Vec<Kind> {
    let wanted = |kind: &Kind| usable(kind) && (kind.shared_zero || kind.extended || kind.lazy);
    let all = kinds(9).into_iter().chain(kinds(14));
    let mut kinds: Vec<Kind> = all.filter(wanted).collect();
    kinds.push(Kind::plain(9));
    kinds.push(Kind { version: 2, ..Kind::plain(9) });
    kinds.push(Kind { refcount_order: 3, ..Kind::plain(9) });
    kinds
}

async fn with_image<T>(
    case: &Case,
    work: impl AsyncFnOnce(&Image<testkit::sim::SimStorage>) -> lacuna::Result<T>,
) -> lacuna::Result<(Case, T)> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = case.on(&host).open().await?;
    let done = work(&image).await?;
    image.close().await?;
    Ok((case.with_content(vec![host.content(0)]), done))
}

fn assert_clean(case: &Case, story: &str) {
    let report = pollster::block_on(own_check(case));
    assert!(report.is_clean(), "{story}: {:?}", report.findings.iter().take(5).collect::<Vec<_>>());
    let theirs = qemu_check(case);
    assert!(theirs.is_clean(), "{story}: {theirs:?}");
}

fn prepared(kind: &Kind, seed: u64) -> Case {
    Case { options: OpenOptions::new(Access::ReadWrite), ..kind.build(seed) }
}

#[test]
fn in_turns_with_stock_all_that_can_be_read_is_as_expected() {
    for seed in seeds(1) {
        for kind in some_kinds() {
            let mut random = Random::new(seed ^ 0x5a);
            let mut case = prepared(&kind, seed);
            for number in 0..8 {
                let scribbled =
                    with_image(&case, async |image| scribble(image, &kind, &mut random).await);
                case = pollster::block_on(scribbled).unwrap().0;
                let before = pollster::block_on(View::of(&case)).unwrap();
                let step = Step::random(&mut random, &before, number);
                let expected = step.expected(&before);
                let is_ours = random.below(3) > 0;
                let story =
                    format!("LACUNA_SEED={seed} {kind:?} {number} {step:?} ours: {is_ours}");
                case = match is_ours {
                    true => {
                        let done = with_image(&case, async |image| {
                            step.ours(image).await?;
                            View::of_image(image).await
                        });
                        let (case, seen) = pollster::block_on(done)
                            .unwrap_or_else(|error| panic!("{story}: {error}"));
                        assert_eq!(seen.sizes(), expected.sizes(), "{story}");
                        assert!(seen == expected, "{story}: open");
                        case
                    }
                    false => step.stock(&case),
                };
                let after = pollster::block_on(View::of(&case)).unwrap();
                assert_eq!(after.sizes(), expected.sizes(), "{story}");
                assert!(after == expected, "{story}");
                assert_clean(&case, &story);
            }
        }
    }
}

/// An image with two snapshots and a disk that differs from both, in all ways.
fn with_history(kind: &Kind, seed: u64) -> Case {
    let mut random = Random::new(seed);
    let mut case = prepared(kind, seed);
    for name in ["one", "two", ""] {
        let work = with_image(&case, async |image| {
            scribble(image, kind, &mut random).await?;
            match name {
                "" => Ok(()),
                name => Step::Create(name.to_owned()).ours(image).await,
            }
        });
        case = pollster::block_on(work).unwrap().0;
    }
    case
}

fn steps() -> [Step; 4] {
    let name = String::from;
    [
        Step::Create(name("new")),
        Step::Apply(name("one")),
        Step::Delete(name("two")),
        Step::Delete(name("one")),
    ]
}

async fn crashed(case: &Case, step: &Step, seed: u64) -> Result<usize, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let before = View::of(case).await.map_err(fail)?;
    let expected = step.expected(&before);
    let host = SimHost::new(Pace::AtOnce, seed);
    let files = case.on(&host);
    host.start_record();
    let image = files.open().await.map_err(fail)?;
    step.ours(&image).await.map_err(fail)?;
    host.mark(0);
    image.close().await.map_err(fail)?;
    let mut count = 0;
    for point in crash::points(&host) {
        for state in point.states(seed, STATES) {
            count += 1;
            let after = case.with_content(state.files);
            let report = own_check(&after).await;
            if report.corruptions + report.check_errors > 0 {
                return Err(format!("event {}: {:?}", point.event, report.findings));
            }
            let seen = View::of(&after).await.map_err(fail)?;
            if seen != expected && (seen != before || point.mark.is_some()) {
                return Err(format!("event {}: {:?}", point.event, seen.sizes()));
            }
            if count % QEMU_SAMPLE == 1 && !qemu_check(&after).is_clean() {
                return Err(format!("event {}: qemu-img finds something", point.event));
            }
        }
    }
    Ok(count)
}

#[test]
fn a_power_cut_leaves_the_old_image_or_the_new_one_whole() {
    for seed in seeds(1) {
        for kind in some_kinds() {
            let case = with_history(&kind, seed);
            for step in steps() {
                let count = pollster::block_on(crashed(&case, &step, seed));
                let story = format!("LACUNA_SEED={seed} {kind:?} {step:?}");
                let count = count.unwrap_or_else(|error| panic!("{story}: {error}"));
                assert!(count > 5, "{story}: only {count} states");
            }
        }
    }
}

#[test]
fn dropped_at_any_await_it_has_happened_or_not() {
    for kind in [Kind::plain(9), Kind { version: 2, ..Kind::plain(9) }] {
        let case = with_history(&kind, 3);
        let before = pollster::block_on(View::of(&case)).unwrap();
        for step in steps() {
            for polls in 1.. {
                let host = SimHost::without_record(Pace::Executor, polls as u64);
                let mut executor = Executor::new(polls as u64);
                executor.attach(std::sync::Arc::new(host.clone()));
                let files = case.on(&host);
                let image = executor.block_on(async move { files.open().await }).unwrap();
                let (worked, work) = (image.clone(), step.clone());
                let run = async move { work.ours(&worked).await };
                let task = executor.spawn_until(DropPoint::AfterPoll(polls), run);
                executor.settle().unwrap();
                let is_over = task.take().is_some();
                // Whoever goes on does so with an image that is whole, or closed to changes.
                let writer = image.clone();
                let write = async move {
                    let sector = Buffer::from(&[0x77; 512][..]);
                    writer.write(GuestOffset(0), sector, WriteFlags::FUA).await.0?;
                    writer.close().await
                };
                let went_on = executor.block_on(write);
                let after = case.with_content(vec![host.content(0)]);
                let story = format!("{kind:?} {step:?} dropped after poll {polls}");
                if let Err(error) = &went_on {
                    assert_eq!(error.kind(), ErrorKind::Io, "{story}: {error}");
                    assert!(!is_over, "{story}: {error}");
                }
                let written = |mut view: View| {
                    if went_on.is_ok() {
                        view.disk[..512].fill(0x77);
                    }
                    view
                };
                let seen = pollster::block_on(View::of(&after)).unwrap();
                let has_happened = seen == written(step.expected(&before));
                assert!(has_happened || seen == written(before.clone()), "{story}");
                assert!(has_happened || !is_over, "{story}");
                assert_clean(&after, &story);
                if is_over {
                    assert!(polls > 6, "{story}: over");
                    break;
                }
            }
        }
    }
}

#[test]
fn a_refcount_that_cannot_count_more_leaves_everything_as_it_was() {
    for order in 0..3 {
        let kind = Kind { refcount_order: order, ..Kind::plain(9) };
        let empty = prepared(&kind, 1);
        let write = with_image(&empty, async |image| {
            let buffer = Buffer::from(&[7; 2048][..]);
            image.write(GuestOffset(512), buffer, WriteFlags::empty()).await.0
        });
        let mut case = pollster::block_on(write).unwrap().0;
        for number in 0..16 {
            let before = pollster::block_on(View::of(&case)).unwrap();
            let host = SimHost::without_record(Pace::AtOnce, 1);
            let image = pollster::block_on(case.on(&host).open()).unwrap();
            let len = pollster::block_on(image.storage().len()).unwrap();
            let made = pollster::block_on(Step::Create(format!("s{number}")).ours(&image));
            let refused = made.is_err();
            if let Err(error) = made {
                assert_eq!(error.kind(), ErrorKind::InvalidRequest);
                assert!(error.to_string().contains("refcount_bits=16"), "{error}");
                assert_eq!(pollster::block_on(image.storage().len()).unwrap(), len);
            }
            pollster::block_on(image.close()).unwrap();
            case = case.with_content(vec![host.content(0)]);
            assert_clean(&case, &format!("{kind:?} {number}"));
            if refused {
                assert_eq!(number, (1 << (1 << order)) - 2, "{kind:?}");
                assert!(pollster::block_on(View::of(&case)).unwrap() == before);
                break;
            }
        }
    }
}

#[test]
fn a_snapshot_that_is_read_is_not_deleted() {
    let case = with_history(&Kind::plain(9), 5);
    let work = with_image(&case, async |image| {
        let one = SnapshotChoice::Name("one".into());
        let layer = image.snapshot(&one).await?;
        let before = whole_content(&layer).await?.to_vec();
        let error = image.delete_snapshot(&one).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        Step::Delete("two".into()).ours(image).await?;
        image.apply_snapshot(&one).await?;
        assert!(whole_content(&layer).await?.to_vec() == before);
        drop(layer);
        image.delete_snapshot(&one).await.map(drop)
    });
    let (after, ()) = pollster::block_on(work).unwrap();
    assert_clean(&after, "read and deleted");
}

#[test]
fn without_a_place_for_old_content_it_is_refused() {
    let kind = Kind { store: Store::DataFile, backing: Backing::None, ..Kind::plain(9) };
    let case = kind.build(1);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = pollster::block_on(case.on(&host).open()).unwrap();
    for step in steps() {
        let error = pollster::block_on(step.ours(&image)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{step:?}");
    }
}
