//! What guests ask.

use lacuna::block::{DiscardMode, ZeroFlags};
use lacuna::qcow2::{Image, OnDiscard};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::case::Kind;
use testkit::sim::SimStorage;
use testkit::{Operation, Operations};

use super::{Ran, stage, told};
use crate::stage::Stage;

/// Clusters at the start of the disk that most requests go to.
const FIRST: u64 = 14;

/// Fills the first clusters of an image, so many, and opens it for what is looked at.
pub(super) async fn filled(stage: &mut Stage, clusters: u64) -> Result<Image<SimStorage>, String> {
    let image = stage.open().await.map_err(told("Opening"))?;
    if clusters > 0 {
        let len = (clusters * stage.cluster()).min(stage.model.size_bytes());
        let all = stage.write(GuestRange::new(GuestOffset(0), len));
        stage.guest(&image, all).await?;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    stage.open().await.map_err(told("Opening"))
}

/// Does some requests with flushes between them, and closes.
async fn script(
    kind: &Kind,
    seed: u64,
    (fill, count): (u64, u64),
    next: impl Fn(&mut Stage, u64) -> Operation,
) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, fill).await?;
    for index in 0..2 + stage.random.below(count) {
        let operation = next(&mut stage, index);
        stage.guest(&image, operation).await?;
        if stage.random.one_in(3) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn write(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (0, 5), |stage, index| {
        let among = if index % 2 == 0 { FIRST } else { u64::MAX };
        let range = stage.clusters(3, among);
        stage.write(range)
    })
    .await
}

pub(super) async fn overwrite(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (FIRST, 5), |stage, _| {
        let range =
            if stage.random.one_in(2) { stage.part(FIRST) } else { stage.clusters(2, FIRST) };
        stage.write(range)
    })
    .await
}

pub(super) async fn partial(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (2, 5), |stage, _| {
        let range = stage.part(u64::MAX);
        stage.write(range)
    })
    .await
}

pub(super) async fn compressed(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (4, 6), |stage, _| match stage.random.below(5) {
        0 => {
            let range = stage.part(8);
            stage.write(range)
        }
        1 => {
            let range = stage.clusters(2, 8);
            stage.discard(range)
        }
        _ => stage.compressed(8),
    })
    .await
}

pub(super) async fn zero(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (10, 6), |stage, _| match stage.random.below(4) {
        0 => {
            let range = stage.part(FIRST);
            stage.zero(range)
        }
        1 => {
            let range = stage.part(FIRST);
            stage.write(range)
        }
        _ => {
            let range = stage.clusters(3, FIRST);
            stage.zero(range)
        }
    })
    .await
}

pub(super) async fn discard(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (10, 6), |stage, _| match stage.random.below(4) {
        0 => {
            let range = stage.part(FIRST);
            stage.discard(range)
        }
        1 => {
            let range = stage.clusters(2, u64::MAX);
            stage.write(range)
        }
        _ => {
            let range = stage.clusters(3, FIRST);
            stage.discard(range)
        }
    })
    .await
}

/// What became free is used again at once.
pub(super) async fn reuse(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (8, 8), |stage, index| {
        let cluster = stage.cluster();
        match index % 2 {
            0 => {
                let range = stage.clusters(2, 8);
                let mode = DiscardMode::Full;
                Operation::Discard { range, mode }
            }
            _ => {
                let last = stage.model.size_bytes() / cluster;
                let start = GuestOffset((8 + stage.random.below(last - 8)) * cluster);
                stage.write(GuestRange::new(start, cluster))
            }
        }
    })
    .await
}

pub(super) async fn subclusters(kind: &Kind, seed: u64) -> Ran {
    script(kind, seed, (2, 7), |stage, _| {
        let subcluster = stage.cluster() / 32;
        let first = stage.random.below(5 * 32);
        let count = 1 + stage.random.below(6);
        let range = GuestRange::new(GuestOffset(first * subcluster), count * subcluster);
        match stage.random.below(5) {
            0 => stage.zero(range),
            1 => stage.discard(range),
            2 => {
                let range = stage.part(5);
                stage.write(range)
            }
            _ => stage.write(range),
        }
    })
    .await
}

/// A cache of a table or two: tables are written back all the time.
pub(super) async fn write_back(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    stage.options = stage.options.clone().cache_bytes(1);
    let image = filled(&mut stage, 4).await?;
    for _ in 0..6 + stage.random.below(6) {
        let range = stage.clusters(2, u64::MAX);
        let operation = match stage.random.below(5) {
            0 => stage.discard(range),
            1 => stage.zero(range),
            _ => stage.write(range),
        };
        stage.guest(&image, operation).await?;
    }
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn reopen(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let mut image = filled(&mut stage, 3).await?;
    for index in 0..4 + stage.random.below(4) {
        let range = stage.part(FIRST);
        let operation = if index % 3 == 2 { stage.discard(range) } else { stage.write(range) };
        stage.guest(&image, operation).await?;
        if stage.random.one_in(2) {
            stage.close(image).await?;
            image = stage.open().await.map_err(told("Opening"))?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

/// Requests of all kinds and sizes.
pub(super) async fn mixed(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let menu = testkit::Menu { resize_up_to: None, reopen: false, ..kind.menu() };
    let mut operations = Operations::new(seed, menu);
    let image = filled(&mut stage, 4).await?;
    for _ in 0..4 + stage.random.below(8) {
        let operation = operations.next(stage.model.size_bytes());
        if !matches!(operation, Operation::Read(_)) {
            stage.guest(&image, operation).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

pub(super) async fn resize(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    stage.regrows = true;
    let image = filled(&mut stage, 4).await?;
    for index in 0..2 + stage.random.below(4) {
        let most = kind.size_bytes() * 5 / 2 / 512;
        let operation = match index % 2 {
            0 => Operation::Resize { size_bytes: (1 + stage.random.below(most)) * 512 },
            _ => {
                let size_bytes = stage.model.size_bytes();
                let len = stage.cluster().min(size_bytes);
                let start = (size_bytes - len) / 512 * 512;
                stage.write(GuestRange::new(GuestOffset(start), size_bytes - start))
            }
        };
        stage.guest(&image, operation).await?;
        if stage.random.one_in(3) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}

/// The L1 table gets more entries than fit into the clusters that it has.
pub(super) async fn l1_growth(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, 3).await?;
    // A cluster of the table maps 64 tables of 64 clusters.
    let most = 64 * 64 * stage.cluster();
    for _ in 0..2 {
        let operation = stage.part(FIRST);
        let operation = stage.write(operation);
        stage.guest(&image, operation).await?;
        let size_bytes = most + (1 + stage.random.below(40)) * 512;
        stage.guest(&image, Operation::Resize { size_bytes }).await?;
        let end = GuestRange::new(GuestOffset(size_bytes - 512), 512);
        let last = stage.write(end);
        stage.guest(&image, last).await?;
    }
    stage.close(image).await?;
    Ok(stage)
}

/// Refcounts of 64 bits: a cluster of their table is full with 2 MiB of file.
pub(super) async fn refcount_growth(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    stage.options = stage.options.clone().on_discard(OnDiscard::Free);
    let cluster = stage.cluster();
    let image = stage.open().await.map_err(told("Opening"))?;
    let size_bytes = 2300 << 10;
    stage.guest(&image, Operation::Resize { size_bytes }).await?;
    let (mut at, full) = (0, (2 << 20) - (8 + stage.random.below(12)) * cluster);
    while stage.host.content(0).len() < full {
        let range = GuestRange::new(GuestOffset(at), 4 * cluster);
        stage.guest(&image, Operation::Write { range, seed, flags: Default::default() }).await?;
        at = range.end().0;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    for index in 0..6 {
        let range = GuestRange::new(GuestOffset(at), (1 + index % 4) * cluster);
        let operation = match index {
            3 => Operation::WriteZeroes { range, flags: ZeroFlags::empty() },
            _ => stage.write(range),
        };
        stage.guest(&image, operation).await?;
        at = range.end().0;
        if stage.random.one_in(3) {
            stage.guest(&image, Operation::Flush).await?;
        }
    }
    stage.close(image).await?;
    Ok(stage)
}
