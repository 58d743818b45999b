//! What comes after a loss or a damage: the next run, a repair, and the power goes once more.

use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::format::Header;
use lacuna::qcow2::repair_bitmaps;
use testkit::case::Kind;
use testkit::sim::{Pace, SimHost, crash};
use testkit::{Operation, Random, SparseBytes};

use super::whole::scribble;
use super::{Path, Ran, own_data, snapshots, stage, told};
use crate::stage::Stage;

/// Runs whose losses are recovered from.
const FIRST: [&str; 17] = [
    "write",
    "overwrite",
    "write-compressed",
    "zero",
    "discard",
    "reuse",
    "write-back",
    "mixed",
    "write-shared",
    "snapshot-create",
    "snapshot-apply",
    "snapshot-delete",
    "bitmap-write",
    "bitmap-edit",
    "bitmap-freeze",
    "share",
    "in-flight",
];

/// What a loss left of another run; that it is looked at once more has begun.
async fn lost(kind: &Kind, seed: u64) -> Ran {
    let mut random = Random::new(seed ^ 0x2e_c0);
    let path = loop {
        let path = Path::named(random.pick::<&str>(&FIRST)).expect("there is such a path");
        if (path.can)(kind) {
            break path;
        }
    };
    let first = (path.run)(kind, seed).await?;
    let points = crash::points(&first.host);
    let some = (0..4).map(|_| random.pick(&points));
    let point = some.max_by_key(|point| point.unflushed_len()).expect("there are four");
    let choice = point.random_choice(&mut random);
    let mut stage = Stage::after(first, point, &choice, seed)?;
    stage.begin();
    Ok(stage)
}

/// Opens it, and goes on.
async fn go_on(mut stage: Stage) -> Ran {
    let image = stage.open().await.map_err(told("Opening"))?;
    for _ in 0..2 {
        scribble(&mut stage, &image, 2).await?;
        if stage.random.one_in(2) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn after_loss(kind: &Kind, seed: u64) -> Ran {
    go_on(lost(kind, seed).await?).await
}

/// Leaks, and what a dirty bit stands for, are repaired without being opened.
pub(super) async fn repair_loss(kind: &Kind, seed: u64) -> Ran {
    let stage = lost(kind, seed).await?;
    go_on(repaired(stage).await?).await
}

/// Bitmaps that a loss left in use.
pub(super) async fn repair_lost_bitmaps(kind: &Kind, seed: u64) -> Ran {
    let mut stage = lost(kind, seed).await?;
    repair_bitmaps(&stage.host.open_file(0)).await.map_err(told("Repairing bitmaps"))?;
    stage.flushed();
    go_on(stage).await
}

/// Wrong refcounts and copied flags of an image with snapshots, if it can have any.
pub(super) async fn repair_damage(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = stage.open().await.map_err(told("Opening"))?;
    scribble(&mut stage, &image, 8).await?;
    if snapshots(kind) {
        stage.snapshot(&image, "one").await.map_err(told("Snapshot"))?;
        scribble(&mut stage, &image, 3).await?;
    }
    image.close().await.map_err(told("Closing"))?;
    let mut file = stage.host.content(0);
    damage(&mut file, &mut stage.random)?;
    let host = SimHost::new(Pace::AtOnce, seed);
    host.add_file(file);
    if !own_data(kind) {
        host.add_file(stage.host.content(1));
    }
    stage.host = host;
    stage.sound_from = usize::MAX;
    stage.begin();
    go_on(repaired(stage).await?).await
}

async fn repaired(mut stage: Stage) -> Ran {
    let options = CheckOptions { repair: Repair::All };
    let report = check(&stage.host.open_file(0), &options, &mut |_| {}).await;
    let report = report.map_err(told("Repairing"))?;
    if !report.is_clean() {
        return Err(format!("A repair leaves {report:x?}"));
    }
    stage.sound_from = stage.sound_from.min(stage.moment());
    stage.flushed();
    Ok(stage)
}

/// Changes some refcounts of 16 bits, and some copied flags.
fn damage(file: &mut SparseBytes, random: &mut Random) -> Result<(), String> {
    let header = Header::decode(&file.read_vec(0, 512)).map_err(told("Reading the header"))?;
    let cluster = header.geometry.cluster_bytes();
    let block = word(file, header.refcount_table.offset.0);
    for _ in 0..1 + random.below(3) {
        let index = random.below((file.len() / cluster).min(cluster / 2));
        let count = file.read_vec(block + 2 * index, 2);
        let count = u16::from_be_bytes([count[0], count[1]]);
        let wrong = *random.pick(&[0, count.saturating_sub(1), count + 1, count + 3]);
        file.write(block + 2 * index, &wrong.to_be_bytes());
    }
    let table = header.l1.offset.0;
    for _ in 0..random.below(3) {
        flip_copied(file, table);
        let entries = word(file, table) & OFFSET;
        if entries > 0 && !header.geometry.has_subclusters() {
            flip_copied(file, entries + 8 * random.below(cluster / 8));
        }
    }
    Ok(())
}

/// Where an entry points.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

fn word(file: &SparseBytes, at: u64) -> u64 {
    u64::from_be_bytes(file.read_vec(at, 8).try_into().expect("eight were read"))
}

/// An entry that points somewhere has the other flag.
fn flip_copied(file: &mut SparseBytes, at: u64) {
    let entry = word(file, at);
    if entry & OFFSET != 0 && entry & COMPRESSED == 0 {
        file.write(at, &(entry ^ 1 << 63).to_be_bytes());
    }
}
