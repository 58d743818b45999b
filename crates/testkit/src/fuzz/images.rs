//! Images made by choices, damaged by choices, and used by choices.
//!
//! * Always: a repair leaves no more harm than there was, and what could be read, cluster by cluster
//!   and in every snapshot that could, reads the same afterwards.
//! * Always: what is done to an image stays within the file that it had and what was asked for.

use std::sync::Arc;

use lacuna::Result;
use lacuna::block::{Layer, is_zero};
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{
    CheckOptions, CheckReport, FindingClass, FindingKind, Harm, Repair, check,
};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts, Shrink, SnapshotChoice};
use lacuna::storage::{MemoryStorage, Storage};
use lacuna::units::{GuestOffset, GuestRange, HostCluster};
use pollster::block_on;

use super::choices::Choices;
use super::recipe::{Recipe, operation};
use crate::{AfterDiscard, ModelDisk, Operation, Rules, content, drive};

pub(super) type Memory = Arc<MemoryStorage>;

/// Snapshots read at most: two were made, and damage may tell of 65,536.
const SNAPSHOTS: usize = 3;
/// Operations done at most.
pub(super) const OPERATIONS: usize = 48;
/// By how much tables may make a file longer: those of all kinds have at most 8 MiB here, and may be made
/// anew.
pub(super) const GROWTH: u64 = 64 << 20;

/// Takes choices of an image and of damage: opens, reads, maps, checks and repairs it.
///
/// # Panics
/// If a repair makes anything worse, or a check writes.
pub fn damaged_image(data: &[u8]) {
    let mut choices = Choices::new(data);
    let recipe = Recipe::choose(&mut choices);
    let repair = *choices.pick(&[Repair::All, Repair::All, Repair::Leaks]);
    let mut file = recipe.file.clone();
    let found = report(&memory(&file), Repair::None).expect("a valid image is checked");
    assert!(found.is_clean(), "the recipe makes valid images: {found:?}");
    recipe.damage(&mut file, &mut choices);
    repaired(&recipe, &file, repair);
}

pub(super) fn memory(file: &[u8]) -> Memory {
    Arc::new(MemoryStorage::from(file))
}

pub(super) fn report(storage: &Memory, repair: Repair) -> Result<CheckReport> {
    block_on(check(storage, &CheckOptions { repair }, &mut |_| ()))
}

pub(super) fn open(storage: &Memory, access: Access) -> Result<Image<Memory>> {
    block_on(Image::open(Parts::alone(Arc::clone(storage)), OpenOptions::new(access)))
}

fn repaired(recipe: &Recipe, file: &[u8], repair: Repair) {
    let storage = memory(file);
    let readable = guest(&storage, recipe);
    let found = report(&storage, Repair::None);
    assert!(storage.to_vec() == file, "reading and checking write nothing");
    let Ok(found) = found else { return };
    let Ok(done) = report(&storage, repair) else { return };
    let after = storage.to_vec();
    assert!(after.len() as u64 <= file.len() as u64 + GROWTH, "the file grows to {}", after.len());
    let left = report(&storage, Repair::None).expect("it could be checked before");
    // A repair looks closer, where it is about to write.
    if ![&found, &done].iter().any(|report| tables_share_places(report, recipe.cluster_bytes)) {
        no_worse(&found, &left);
        let is_told = (done.corruptions, done.leaks) == (left.corruptions, left.leaks);
        assert!(is_told, "what is left is not what is told: {}", differ(&left, &done));
    }
    let reads = guest(&storage, recipe);
    assert!(reads.len() >= readable.len(), "a disk is not there any more");
    for (index, (read, now)) in readable.iter().zip(&reads).enumerate() {
        let is_same = read.as_ref().is_none_or(|read| {
            now.as_ref() == Some(read) || shows_metadata(read, file, &after, recipe)
        });
        assert!(is_same, "cluster {index} reads otherwise after the repair");
    }
}

/// Says whether a table lies over others or the header, as far as the report lists that: what it holds
/// changes with what is repaired of those, and cannot be compared.
fn tables_share_places(found: &CheckReport, cluster_bytes: u64) -> bool {
    let is_shared = |kind: &FindingKind| match kind {
        FindingKind::RefcountBlockShared { .. } | FindingKind::L2Overlaps { .. } => true,
        FindingKind::ReferencePastEnd { len, .. } => *len > cluster_bytes,
        FindingKind::RefcountMismatch { cluster: HostCluster(0), references, .. } => {
            *references > 1
        }
        _ => false,
    };
    found.findings_omitted > 0 || found.findings.iter().any(|finding| is_shared(&finding.kind))
}

/// Where something can be looked at since the repair, it may show what was wrong there all along, as much as a
/// table has.
fn no_worse(found: &CheckReport, left: &CheckReport) {
    assert!(left.check_errors <= found.check_errors, "more errors: before {}", differ(found, left));
    // Where only leaks are freed, a copied flag may come to be missing beside other damage.
    let harmful = left.corruptions - harmless(left);
    let can_compare = left.check_errors == found.check_errors;
    assert!(
        !can_compare || harmful <= found.corruptions,
        "more corruptions: before {}",
        differ(found, left)
    );
}

/// The counts of both reports, and what only one of them lists: there may be thousands in both.
fn differ(one: &CheckReport, other: &CheckReport) -> String {
    let counts = |report: &CheckReport| (report.check_errors, report.corruptions, report.leaks);
    let only = |report: &CheckReport, other: &CheckReport| {
        let only = report.findings.iter().filter(|finding| !other.findings.contains(finding));
        format!("{:?}, only there {:?}", counts(report), only.take(20).collect::<Vec<_>>())
    };
    format!("{}; {}", only(one, other), only(other, one))
}

/// How many of the corruptions cost nobody anything.
fn harmless(report: &CheckReport) -> u64 {
    let corruptions = report.findings.iter().filter(|finding| {
        finding.kind.class() == FindingClass::Corruption && finding.harm() == Harm::Harmless
    });
    corruptions.map(|finding| finding.occurrences).sum()
}

/// Says whether guest bytes are a part of the file that the repair has changed: a damaged entry may
/// show tables.
fn shows_metadata(read: &[u8], before: &[u8], after: &[u8], recipe: &Recipe) -> bool {
    let cluster = recipe.cluster_bytes as usize;
    let mut clusters = before.chunks(cluster).zip(after.chunks(cluster));
    clusters.any(|(old, new)| old != new && (old.starts_with(read) || old == read))
}

/// What can be read of the disk, and then of its first snapshots, by clusters.
pub(super) fn guest(storage: &Memory, recipe: &Recipe) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = open(storage, Access::ReadOnly) else { return Vec::new() };
    maps(&image, image.size_bytes().min(recipe.size_bytes));
    let mut clusters = clusters(&image, recipe);
    for snapshot in block_on(image.snapshots()).unwrap_or_default().into_iter().take(SNAPSHOTS) {
        if let Ok(layer) = block_on(image.snapshot(&SnapshotChoice::Id(snapshot.id))) {
            clusters.extend(self::clusters(&layer, recipe));
        }
    }
    clusters
}

fn clusters(disk: &impl Layer, recipe: &Recipe) -> Vec<Option<Vec<u8>>> {
    let size_bytes = disk.size_bytes().min(recipe.size_bytes);
    let starts = (0..size_bytes).step_by(recipe.cluster_bytes as usize);
    let read = |start: u64| {
        let len = recipe.cluster_bytes.min(size_bytes - start);
        block_on(drive::read(disk, GuestRange::new(GuestOffset(start), len))).ok()
    };
    starts.map(read).collect()
}

/// Extents make headway, stay in what was asked, and claim no zeros over anything else.
///
/// Where a private bit claims zeros of the whole disk extents believe it: whether that is a lie is the
/// check's to say (docs/private-bits.md).
fn maps(image: &Image<Memory>, size_bytes: u64) {
    let claimed = !image.header().zero_claims().is_empty();
    let mut rest = GuestRange::new(GuestOffset(0), size_bytes);
    while !rest.is_empty() {
        let Ok(extents) = block_on(image.extents(rest)) else { return };
        let len: u64 = extents.iter().map(|extent| extent.range.len).sum();
        assert!(len > 0 && len <= rest.len, "extents make headway and stay in the range");
        for extent in extents.iter().filter(|extent| extent.status.reads_zero && !claimed) {
            let bytes = block_on(drive::read(image, extent.range));
            assert!(bytes.is_ok_and(|bytes| is_zero(&bytes)), "{extent:?}");
        }
        rest = GuestRange::new(rest.start + len, rest.len - len);
    }
}

/// Takes choices of an image and of operations, and holds them against the model disk.
///
/// # Panics
/// If anything reads otherwise than written, or the image is not sound in the end.
pub fn operations(data: &[u8]) {
    let mut choices = Choices::new(data);
    let recipe = Recipe::choose(&mut choices);
    let storage = memory(&recipe.file);
    let mut image = open(&storage, Access::ReadWrite).expect("a valid image opens");
    let mut model = model(&recipe);
    for _ in 0..OPERATIONS {
        if choices.is_over() {
            break;
        }
        let next = operation(&mut choices, model.size_bytes(), recipe.cluster_bytes);
        if next == Operation::Reopen {
            block_on(image.close()).expect("nothing keeps it from closing");
            image = open(&storage, Access::ReadWrite).expect("what was closed opens");
            continue;
        }
        ask(&image, &mut model, &next);
    }
    block_on(model.verify(&image)).unwrap_or_else(|wrong| panic!("{wrong}"));
    block_on(image.close()).expect("nothing keeps it from closing");
    let report = report(&storage, Repair::None).expect("nothing keeps it from being checked");
    assert!(report.is_clean(), "{report:?}");
    let image = open(&storage, Access::ReadOnly).expect("what was closed opens");
    block_on(model.verify(&image)).unwrap_or_else(|wrong| panic!("opened again: {wrong}"));
}

pub(super) fn model(recipe: &Recipe) -> ModelDisk {
    let rules = Rules {
        cluster_bytes: recipe.cluster_bytes,
        after_discard: AfterDiscard::Zeros,
        zero_is_kept: recipe.version == 3,
        starts_unallocated: true,
    };
    let mut model = ModelDisk::new(rules, recipe.size_bytes, None);
    let whole = GuestRange::new(GuestOffset(0), recipe.size_bytes);
    model.adopt(whole, &recipe.guest.read_vec(0, recipe.size_bytes as usize));
    model
}

pub(super) fn perform(image: &Image<Memory>, operation: &Operation) -> Result<()> {
    let bytes = |seed, range| Buffer::from(&content(seed, range)[..]);
    block_on(async {
        match *operation {
            Operation::Read(range) => drive::read(image, range).await.map(drop),
            Operation::Write { range, seed, flags } => {
                image.write(range.start, bytes(seed, range), flags).await.0
            }
            Operation::WriteCompressed { range, seed } => {
                image.write_compressed(range.start, bytes(seed, range)).await.0
            }
            Operation::WriteZeroes { range, flags } => image.write_zeroes(range, flags).await,
            Operation::Discard { range, mode } => image.discard(range, mode).await,
            Operation::Flush => image.flush().await,
            Operation::Resize { size_bytes } => image.resize(size_bytes, Shrink::Allow).await,
            Operation::Reopen => Ok(()),
        }
    })
}

/// Has a guest ask something of a valid image, and holds the answer against the model.
pub(super) fn ask(image: &Image<Memory>, model: &mut ModelDisk, next: &Operation) {
    // Refused as a whole: a size that this image cannot have, or space that refcounts cannot count.
    if perform(image, next).is_ok() {
        settle(image, model, next).unwrap_or_else(|wrong| panic!("{next:?}: {wrong}"));
    } else {
        let refusable = matches!(next, Operation::Resize { .. });
        assert!(refusable, "{next:?} failed: {:?}", perform(image, next));
    }
}

fn settle(
    image: &Image<Memory>,
    model: &mut ModelDisk,
    operation: &Operation,
) -> Result<(), String> {
    match *operation {
        Operation::Read(range) => {
            let seen = block_on(drive::read(image, range)).map_err(|error| error.to_string())?;
            model.compare(range, &seen)?;
        }
        Operation::Discard { range, mode } => {
            let seen = block_on(drive::read(image, range)).map_err(|error| error.to_string())?;
            model.settle_discard(range, mode, &seen)?;
        }
        _ => {}
    }
    model.apply(operation);
    Ok(())
}

/// Takes choices of an image, of damage and of operations: whatever they come to, it ends, and the
/// file stays within bounds.
///
/// # Panics
/// If the file grows without a reason.
pub fn damaged_operations(data: &[u8]) {
    let mut choices = Choices::new(data);
    let recipe = Recipe::choose(&mut choices);
    let mut file = recipe.file.clone();
    recipe.damage(&mut file, &mut choices);
    let storage = memory(&file);
    let Ok(mut image) = open(&storage, Access::ReadWrite) else { return };
    let mut asked = 0;
    for _ in 0..OPERATIONS {
        if choices.is_over() {
            break;
        }
        let size_bytes = image.size_bytes().min(1 << 40);
        let next = operation(&mut choices, size_bytes, recipe.cluster_bytes);
        if next == Operation::Reopen {
            drop(block_on(image.close()));
            let Ok(again) = open(&storage, Access::ReadWrite) else { break };
            image = again;
            continue;
        }
        asked += next.range().map_or(0, |range| range.len + 2 * recipe.cluster_bytes);
        drop(perform(&image, &next));
    }
    assert_length(&storage, file.len() as u64 + recipe.growth() + 2 * asked);
}

/// Says that the file has at most so many bytes.
pub(super) fn assert_length(storage: &Memory, most: u64) {
    let len = block_on(storage.len()).expect("memory has a length");
    assert!(len <= most, "{len} bytes in the file, {most} would have been enough");
}
