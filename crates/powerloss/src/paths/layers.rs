//! Layers and jobs that lie on an image and write it.

use lacuna::block::{DetectZeroes, Layer, PointOptions, Points, ZeroDetection};
use lacuna::buffer::Buffer;
use lacuna::job::{Dedup, DedupOptions};
use lacuna::qcow2::Image;
use lacuna::raw::Raw;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::case::Kind;
use testkit::drive::{perform, read};
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Operation, SparseBytes, content};

use super::guest::filled;
use super::whole::{alike, movable, scribble, scribbled, with_bitmaps};
use super::{Ran, bitmaps, stage, told};
use crate::stage::Stage;

/// A disk of which points are kept, in memory that no power loss is looked at of.
type Disk = Points<Image<SimStorage>, Raw<SimStorage>>;

pub(super) fn elsewhere(content: SparseBytes) -> SimStorage {
    SimHost::without_record(Pace::AtOnce, 1).add_file(content)
}

// ---- points in time ------------------------------------------------------------------------

/// A guest goes on while somebody reads what the disk was, with bitmaps of that moment.
pub(super) async fn point(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let freezes = bitmaps(kind) && stage.random.one_in(2);
    let image = match freezes {
        true => with_bitmaps(&mut stage).await?,
        false => filled(&mut stage, 4).await?,
    };
    let disk = Points::new(image.clone());
    ask(&mut stage, &disk, 1).await?;
    let target = Raw::create(elsewhere(SparseBytes::default()), stage.model.size_bytes()).await;
    let then = stage.model.content().to_vec();
    let target = target.map_err(told("Making a target"))?;
    let made = disk.add(target, PointOptions::default(), async {
        match freezes {
            true => stage.freeze(&image, "a", "new").await.map(Some),
            false => Ok(None),
        }
    });
    let (point, frozen) = made.await.map_err(told("Making a point"))?;
    let frozen_at = freezes.then(|| stage.bitmap("new").claims[0].changes.clone());
    ask(&mut stage, &disk, 3).await?;
    let seen = read(&point, point.whole()).await.map_err(told("Reading the point"))?;
    point.end();
    if seen != then {
        return Err("The point reads otherwise than the disk did".to_owned());
    }
    if let (Some(frozen), Some(changes)) = (frozen, frozen_at) {
        stage.reclaim("a", changes);
        frozen.finish().await.map_err(told("Finishing"))?;
    }
    ask(&mut stage, &disk, 1).await?;
    stage.close(image).await?;
    Ok(stage)
}

/// Has a guest write so often.
async fn ask(stage: &mut Stage, disk: &Disk, count: u64) -> Result<(), String> {
    for _ in 0..count {
        let operation = scribbled(stage);
        one(stage, disk, operation).await?;
        if stage.random.one_in(3) {
            one(stage, disk, Operation::Flush).await?;
        }
    }
    Ok(())
}

async fn one(stage: &mut Stage, disk: &Disk, operation: Operation) -> Result<(), String> {
    let image = disk.below();
    stage.foresee(&operation);
    let done = match operation {
        Operation::Write { range, seed, flags } => {
            let bytes = content(seed, range);
            disk.write(range.start, Buffer::from(&bytes[..]), flags).await.0
        }
        Operation::WriteZeroes { range, flags } => disk.write_zeroes(range, flags).await,
        Operation::Discard { range, mode } => disk.discard(range, mode).await,
        Operation::Flush => disk.flush().await,
        Operation::WriteCompressed { range, .. } => {
            let _change = disk.before_change(range).await;
            perform(image, operation).await.map(drop)
        }
        other => return Err(format!("{other:?} is not asked for")),
    };
    done.map_err(|error| format!("{operation:x?}: {error}"))?;
    stage.answered(image, &operation).await
}

// ---- zeros ---------------------------------------------------------------------------------

/// Writes with zeros in them become zeroing in part.
pub(super) async fn detect_zeroes(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, 8).await?;
    let levels = [ZeroDetection::On, ZeroDetection::Unmap, ZeroDetection::Thorough];
    let level = *stage.random.pick(&levels);
    let disk = DetectZeroes::new(image.clone(), level);
    for _ in 0..3 + stage.random.below(4) {
        let range = if stage.random.one_in(2) { stage.part(10) } else { stage.clusters(3, 10) };
        let write = stage.write(range);
        let Operation::Write { seed, flags, .. } = write else { continue };
        let mut bytes = content(seed, range);
        let zeros = stage.random.below(range.len);
        bytes[zeros as usize..][..stage.random.below(range.len - zeros + 1) as usize].fill(0);
        stage.model.adopt(range, &bytes);
        stage.seen();
        let written = disk.write(range.start, Buffer::from(&bytes[..]), flags).await.0;
        written.map_err(told("Writing"))?;
        stage.kept(&write);
        if stage.random.one_in(4) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

/// The whole disk becomes zeros.
pub(super) async fn make_zero(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, 6).await?;
    scribble(&mut stage, &image, 2).await?;
    let zeros = vec![0; stage.model.size_bytes() as usize];
    stage.model.adopt(GuestRange::new(GuestOffset(0), zeros.len() as u64), &zeros);
    stage.seen();
    image.make_zero().await.map_err(told("Zeroing"))?;
    stage.flushed();
    scribble(&mut stage, &image, 2).await?;
    stage.close(image).await?;
    Ok(stage)
}

// ---- jobs ----------------------------------------------------------------------------------

/// Equal clusters are found and share, step by step, while a guest writes.
pub(super) async fn dedup(kind: &Kind, seed: u64) -> Ran {
    let mut stage = movable(kind, seed);
    let image = alike(&mut stage).await?;
    let options = DedupOptions {
        slice_bytes: 4 * stage.cluster(),
        memory_bytes: 1 << 20,
        ..DedupOptions::default()
    };
    let mut work = Dedup::new(&image, options).map_err(told("Sharing"))?;
    while work.step().await.map_err(told("Sharing"))?.is_some() {
        if stage.random.one_in(3) {
            scribble(&mut stage, &image, 1).await?;
        }
        if stage.random.one_in(4) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}
