//! What is done to an image as a whole, mostly with writes of a guest around it.

use std::path::Path;
use std::sync::Arc;

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, ChainOptions, Format};
use lacuna::job::{
    DedupWrites, DedupWritesOptions, Encoding, Onto, RebaseOptions, commit, empty_top, rebase,
    sweep,
};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{
    Access, AmendOptions, BackingName, CompactOptions, CompactOrder, Image, KeptMapping,
    LiveCompactOptions, LiveCompaction, OnDiscard, OpenOptions,
};
use lacuna::raw::Raw;
use lacuna::units::{GuestCluster, GuestOffset, GuestRange};
use testkit::case::{Backing, Kind, Store};
use testkit::sim::{HostOpener, Pace, SimHost, SimStorage};
use testkit::{Operation, SparseBytes, content};

use super::guest::filled;
use super::{Ran, stage, told};
use crate::stage::{Beside, Stage};

/// Clusters that are filled, and groups of which are alike.
const FILLED: u64 = 14;
const GROUPS: u64 = 3;

/// Writes here and there.
pub(super) async fn scribble(
    stage: &mut Stage,
    image: &Image<SimStorage>,
    count: u64,
) -> Result<(), String> {
    for _ in 0..count {
        let operation = scribbled(stage);
        stage.guest(image, operation).await?;
    }
    Ok(())
}

/// A change of some clusters or parts of them.
pub(super) fn scribbled(stage: &mut Stage) -> Operation {
    let kind = stage.random.below(6);
    let range = match kind {
        0 | 3 => stage.clusters(2, FILLED),
        _ => stage.part(FILLED),
    };
    match kind {
        0 => stage.discard(range),
        1 => stage.compressed(FILLED),
        2 => stage.zero(range),
        _ => stage.write(range),
    }
}

// ---- snapshots -----------------------------------------------------------------------------

/// An image with two snapshots and a disk that differs from both.
async fn with_history(stage: &mut Stage) -> Result<Image<SimStorage>, String> {
    let image = stage.open().await.map_err(told("Opening"))?;
    for name in ["one", "two"] {
        scribble(stage, &image, 4).await?;
        stage.snapshot(&image, name).await.map_err(told("Snapshot"))?;
    }
    scribble(stage, &image, 3).await?;
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    stage.open().await.map_err(told("Opening"))
}

pub(super) async fn write_shared(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = with_history(&mut stage).await?;
    for _ in 0..3 {
        let count = 1 + stage.random.below(2);
        scribble(&mut stage, &image, count).await?;
        stage.guest(&image, Operation::Flush).await?;
    }
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn snapshot_create(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = with_history(&mut stage).await?;
    let count = stage.random.below(3);
    scribble(&mut stage, &image, count).await?;
    stage.snapshot(&image, "three").await.map_err(told("Snapshot"))?;
    scribble(&mut stage, &image, 2).await?;
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn snapshot_apply(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = with_history(&mut stage).await?;
    let count = stage.random.below(3);
    scribble(&mut stage, &image, count).await?;
    let name = if stage.random.one_in(2) { "one" } else { "two" };
    stage.apply(&image, name).await.map_err(told("Applying"))?;
    scribble(&mut stage, &image, 2).await?;
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn snapshot_delete(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = with_history(&mut stage).await?;
    let count = stage.random.below(3);
    scribble(&mut stage, &image, count).await?;
    let name = if stage.random.one_in(2) { "one" } else { "two" };
    stage.delete(&image, name).await.map_err(told("Deleting"))?;
    // What became free is used again.
    let range = stage.clusters(3, u64::MAX);
    let write = stage.write(range);
    stage.guest(&image, write).await?;
    stage.close(image).await?;
    Ok(stage)
}

// ---- bitmaps -------------------------------------------------------------------------------

/// Two bitmaps that name something.
pub(super) async fn with_bitmaps(stage: &mut Stage) -> Result<Image<SimStorage>, String> {
    let image = stage.open().await.map_err(told("Opening"))?;
    for name in ["a", "b"] {
        stage.add_bitmap(&image, name).await.map_err(told("Bitmap"))?;
        scribble(stage, &image, 2).await?;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    stage.open().await.map_err(told("Opening"))
}

pub(super) async fn bitmap_write(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = with_bitmaps(&mut stage).await?;
    for _ in 0..2 + stage.random.below(2) {
        let count = 1 + stage.random.below(3);
        scribble(&mut stage, &image, count).await?;
        if stage.random.one_in(2) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn bitmap_edit(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = with_bitmaps(&mut stage).await?;
    for _ in 0..2 {
        let count = stage.random.below(2);
        scribble(&mut stage, &image, count).await?;
        let edited = match stage.random.below(5) {
            0 if stage.truth.bitmaps.len() == 2 => stage.add_bitmap(&image, "c").await,
            1 if stage.is_there("b") => stage.remove_bitmap(&image, "b").await,
            2 if stage.is_there("b") => stage.merge_bitmap(&image, "a", "b").await,
            3 if stage.is_there("b") => stage.disable_bitmap(&image, "b").await,
            _ => stage.clear_bitmap(&image, "a").await,
        };
        edited.map_err(told("Editing"))?;
        if stage.random.one_in(2) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    scribble(&mut stage, &image, 1).await?;
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn bitmap_freeze(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = with_bitmaps(&mut stage).await?;
    let count = stage.random.below(3);
    scribble(&mut stage, &image, count).await?;
    let frozen = stage.freeze(&image, "a", "new").await.map_err(told("Freezing"))?;
    let frozen_at = stage.bitmap("new").claims[0].changes.clone();
    scribble(&mut stage, &image, 2).await?;
    stage.reclaim("a", frozen_at);
    frozen.finish().await.map_err(told("Finishing"))?;
    scribble(&mut stage, &image, 1).await?;
    stage.close(image).await?;
    Ok(stage)
}

// ---- moves ---------------------------------------------------------------------------------

/// Fills the start of the disk and makes holes, with snapshots and bitmaps where there can be.
async fn with_holes(stage: &mut Stage) -> Result<Image<SimStorage>, String> {
    let image = stage.open().await.map_err(told("Opening"))?;
    let cluster = stage.cluster();
    if stage.kind().version == 3 && stage.random.one_in(2) {
        stage.add_bitmap(&image, "a").await.map_err(told("Bitmap"))?;
    }
    for index in 0..FILLED {
        let operation = match stage.random.one_in(4) {
            true => stage.compressed(FILLED),
            false => stage.write(GuestRange::new(GuestOffset(index * cluster), cluster)),
        };
        stage.guest(&image, operation).await?;
    }
    if stage.kind().refcount_order > 2 && stage.random.one_in(2) {
        stage.snapshot(&image, "one").await.map_err(told("Snapshot"))?;
        scribble(stage, &image, 3).await?;
    }
    for _ in 0..5 {
        let range = stage.clusters(1, FILLED);
        let operation = stage.discard(range);
        stage.guest(&image, operation).await?;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    stage.open().await.map_err(told("Opening"))
}

/// Discards that keep places are for another day: what moves is moved.
pub(super) fn movable(kind: &Kind, seed: u64) -> Stage {
    let mut stage = stage(kind, seed);
    stage.options = stage.options.clone().on_discard(OnDiscard::Free);
    stage
}

pub(super) async fn compact(kind: &Kind, seed: u64) -> Ran {
    let mut stage = movable(kind, seed);
    let image = with_holes(&mut stage).await?;
    let order = if stage.random.one_in(2) { CompactOrder::Any } else { CompactOrder::Guest };
    let options = CompactOptions {
        batch_bytes: Some((3 + stage.random.below(8)) * kind.cluster_bytes()),
        memory_bytes: 6000,
        kept_mapping: KeptMapping::Move,
        order,
        ..CompactOptions::default()
    };
    image.compact(&options, &mut |_| ()).await.map_err(told("Compacting"))?;
    stage.flushed();
    Ok(stage)
}

pub(super) async fn compact_live(kind: &Kind, seed: u64) -> Ran {
    let mut stage = movable(kind, seed);
    let image = with_holes(&mut stage).await?;
    let slice_bytes = (3 + stage.random.below(5)) * kind.cluster_bytes();
    let options = LiveCompactOptions { slice_bytes, memory_bytes: 20_000 };
    let mut work = LiveCompaction::new(&image, options).map_err(told("Compacting"))?;
    while work.step().await.map_err(told("Compacting"))?.is_some() {
        if stage.random.one_in(3) {
            let range = stage.part(FILLED);
            let write = stage.write(range);
            stage.guest(&image, write).await?;
        }
        if stage.random.one_in(4) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

/// Fills clusters with what is alike in groups.
pub(super) async fn alike(stage: &mut Stage) -> Result<Image<SimStorage>, String> {
    let image = stage.open().await.map_err(told("Opening"))?;
    let cluster = stage.cluster();
    for index in 0..FILLED {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        let bytes = content(index % GROUPS + 100, GuestRange::new(GuestOffset(0), cluster));
        stage.model.adopt(range, &bytes);
        let buffer = Buffer::from(&bytes[..]);
        let (result, _) = match index % 4 == 3 {
            true => image.write_compressed(range.start, buffer).await,
            false => image.write(range.start, buffer, WriteFlags::empty()).await,
        };
        result.map_err(told("Filling"))?;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    stage.open().await.map_err(told("Opening"))
}

fn groups() -> Vec<Vec<GuestCluster>> {
    let group = |group: u64| (0..FILLED + 3).filter(move |index| index % GROUPS == group);
    (0..GROUPS).map(|index| group(index).map(GuestCluster).collect()).collect()
}

pub(super) async fn share(kind: &Kind, seed: u64) -> Ran {
    let mut stage = movable(kind, seed);
    let image = alike(&mut stage).await?;
    let chosen = groups().into_iter().take(1 + stage.random.index(3)).collect::<Vec<_>>();
    image.share(&chosen).await.map_err(told("Sharing"))?;
    // What became free is used again, and what is shared is written.
    let count = 1 + stage.random.below(3);
    scribble(&mut stage, &image, count).await?;
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn unpin(kind: &Kind, seed: u64) -> Ran {
    let mut stage = movable(kind, seed);
    let image = alike(&mut stage).await?;
    image.share(&groups()).await.map_err(told("Sharing"))?;
    let cluster = stage.cluster();
    for index in (0..FILLED).step_by(GROUPS as usize) {
        let range = GuestRange::new(GuestOffset(index * cluster), 9);
        let write = stage.write(range);
        stage.guest(&image, write).await?;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    if stage.random.one_in(2) {
        image.unpin().await.map_err(told("Unpinning"))?;
        stage.flushed();
        return Ok(stage);
    }
    image.drop_unused_pins().await.map_err(told("Dropping pins"))?;
    scribble(&mut stage, &image, 1).await?;
    stage.close(image).await?;
    Ok(stage)
}

/// What is shared, and pinned by nothing, as after a repair by stock tools.
pub(super) async fn repin(kind: &Kind, seed: u64) -> Ran {
    let mut stage = movable(kind, seed);
    let image = alike(&mut stage).await?;
    image.share(&groups()).await.map_err(told("Sharing"))?;
    image.unpin().await.map_err(told("Unpinning"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    image.repin().await.map_err(told("Pinning"))?;
    stage.flushed();
    let image = stage.open().await.map_err(told("Opening"))?;
    scribble(&mut stage, &image, 2).await?;
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn dedup_writes(kind: &Kind, seed: u64) -> Ran {
    let mut stage = movable(kind, seed);
    let image = filled(&mut stage, 2).await?;
    let cluster = stage.cluster();
    let options =
        DedupWritesOptions { batch_bytes: 4 * cluster, seed: Some(1), ..Default::default() };
    let disk = DedupWrites::new(image.clone(), options).map_err(told("Sharing"))?;
    for _ in 0..6 + stage.random.below(6) {
        let content =
            content(100 + stage.random.below(3), GuestRange::new(GuestOffset(0), cluster));
        let start = GuestOffset(stage.random.below(12) * cluster);
        stage.model.adopt(GuestRange::new(start, cluster), &content);
        stage.seen();
        let written = disk.write(start, Buffer::from(&content[..]), WriteFlags::empty()).await.0;
        written.map_err(told("Writing"))?;
        if stage.random.one_in(4) {
            disk.flush().await.map_err(told("Flushing"))?;
            stage.flushed();
        }
    }
    disk.finish().await.map_err(told("Finishing"))?;
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn sweep_zeros(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = stage.open().await.map_err(told("Opening"))?;
    let cluster = stage.cluster();
    for index in 0..12 {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        let bytes = match stage.random.one_in(2) {
            true => content(index, range),
            false => vec![0; cluster as usize],
        };
        stage.model.adopt(range, &bytes);
        let buffer = Buffer::from(&bytes[..]);
        image.write(range.start, buffer, WriteFlags::empty()).await.0.map_err(told("Filling"))?;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    sweep(&image, &mut |_| {}).await.map_err(told("Sweeping"))?;
    let range = stage.clusters(3, u64::MAX);
    let write = stage.write(range);
    stage.guest(&image, write).await?;
    stage.close(image).await?;
    Ok(stage)
}

// ---- what an image is ----------------------------------------------------------------------

/// An image that every opener understands, whatever becomes of it.
async fn amended(kind: &Kind, seed: u64, options: AmendOptions) -> Ran {
    let mut stage = stage(kind, seed);
    let shared_zero = kind.shared_zero;
    if !shared_zero {
        stage.options = OpenOptions::new(Access::ReadWrite);
    }
    let image = stage.open().await.map_err(told("Opening"))?;
    scribble(&mut stage, &image, 8).await?;
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    image.amend(&options, &mut |_, _| ()).await.map_err(told("Amending"))?;
    stage.flushed();
    Ok(stage)
}

pub(super) async fn amend_version(kind: &Kind, seed: u64) -> Ran {
    let options = match kind.version {
        2 => AmendOptions {
            version: Some(Version::V3),
            lazy_refcounts: seed.is_multiple_of(2).then_some(true),
            ..AmendOptions::default()
        },
        _ => AmendOptions { version: Some(Version::V2), ..AmendOptions::default() },
    };
    // Version 2 has refcounts of 16 bits, no subclusters and deflate alone.
    let store = Store::Deflate;
    let kind = Kind { refcount_order: 4, extended: false, shared_zero: false, store, ..*kind };
    amended(&kind, seed, options).await
}

pub(super) async fn amend_refcounts(kind: &Kind, seed: u64) -> Ran {
    let orders = [0, 3, 4, 5, 6];
    let other = orders.into_iter().cycle().skip(seed as usize % 5);
    let order = other.into_iter().find(|order| *order != kind.refcount_order);
    let refcount_bits = order.map(|order| 1 << order);
    // Streams share clusters, which a bit cannot count.
    let store = match order {
        Some(0) if kind.allows_compression() => Store::DataFile,
        _ => kind.store,
    };
    let options = AmendOptions { refcount_bits, ..AmendOptions::default() };
    amended(&Kind { store, ..*kind }, seed, options).await
}

pub(super) async fn amend_features(kind: &Kind, seed: u64) -> Ran {
    let options = AmendOptions {
        lazy_refcounts: Some(seed.is_multiple_of(2)),
        zero_claims: Some((seed / 2).is_multiple_of(2)),
        data_file_raw: (kind.store == Store::RawDataFile).then_some(false),
        ..AmendOptions::default()
    };
    amended(kind, seed, options).await
}

/// What an image is put onto: shorter than the disk, with data here and there, some of it as before.
fn onto(stage: &mut Stage) -> Beside {
    let size = stage.model.size_bytes() * 3 / 4 / 512 * 512;
    let unit = stage.cluster();
    let mut file = SparseBytes::default();
    file.set_len(size);
    for index in 0..size / unit {
        let range = GuestRange::new(GuestOffset(index * unit), unit);
        match stage.random.below(4) {
            0 => file.write(range.start.0, &stage.model.bytes(range)),
            1 => file.write(range.start.0, &content(index, range)),
            _ => {}
        }
    }
    let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(file.clone());
    let layer = pollster::block_on(Raw::open(storage)).expect("memory can be opened");
    Beside { name: "new.raw".into(), file, layer: Arc::new(layer) }
}

pub(super) async fn rebase_it(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, 0).await?;
    scribble(&mut stage, &image, 3).await?;
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    let new = onto(&mut stage);
    let encoding = match kind.allows_compression() && seed.is_multiple_of(2) {
        true => Encoding::Compressed,
        false => Encoding::Plain,
    };
    let options = RebaseOptions { encoding, ..RebaseOptions::default() };
    let name = BackingName { name: new.name.clone(), format: Some("raw".to_owned()) };
    let onto = Onto { layer: &*new.layer, name, shared_from: None };
    let onto = stage.random.below(3).gt(&0).then_some(onto);
    rebase(image, onto, &options, &mut |_, _| ()).await.map_err(told("Rebasing"))?;
    stage.flushed();
    stage.beside.push(new);
    Ok(stage)
}

/// A disk on a base that is an image, too.
pub(super) async fn commit_it(kind: &Kind, seed: u64) -> Ran {
    let backing = if seed.is_multiple_of(2) { Backing::Qcow2Shorter } else { Backing::Qcow2Longer };
    let mut stage = stage(&Kind { backing, ..*kind }, seed);
    let image = filled(&mut stage, 0).await?;
    scribble(&mut stage, &image, 6).await?;
    image.close().await.map_err(told("Closing"))?;
    let base = stage.beside.pop().expect("it stands on a base");
    stage.host.add_file(base.file);
    stage.has_base = true;
    stage.begin();
    let options = ChainOptions {
        backing: Allow::Named,
        ..ChainOptions::new(Format::Qcow2, Access::ReadWrite)
    };
    let opener = HostOpener::new(stage.host.clone(), &["top", &base.name]);
    let chain = chain::open_split(&opener, Path::new("top"), &options, 1).await;
    let chain = chain.map_err(told("Opening the chain"))?;
    commit(&chain, &mut |_| ()).await.map_err(told("Committing"))?;
    empty_top(&chain).await.map_err(told("Emptying"))?;
    chain.above.into_disk().close().await.map_err(told("Closing"))?;
    stage.flushed();
    Ok(stage)
}
