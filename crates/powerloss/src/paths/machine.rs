//! The state of a virtual machine behind the disk, with snapshots that keep it.

use testkit::Operation;
use testkit::case::Kind;

use super::whole::scribble;
use super::{Ran, snapshots, stage, told};

/// A part of it lies in the second table that maps it, where clusters are small.
const BYTES: usize = 50_000;

pub(super) async fn vm_state(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    stage.machine = vec![0; BYTES];
    let image = stage.open().await.map_err(told("Opening"))?;
    scribble(&mut stage, &image, 3).await?;
    if stage.random.one_in(2) {
        stage.save_state(&image).await.map_err(told("Saving"))?;
    }
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    for name in ["one", "two"] {
        for _ in 0..1 + stage.random.below(2) {
            stage.save_state(&image).await.map_err(told("Saving"))?;
        }
        match stage.random.below(3) {
            0 if snapshots(kind) => {
                stage.snapshot(&image, name).await.map_err(told("Snapshot"))?;
            }
            _ => stage.guest(&image, Operation::Flush).await?,
        }
        scribble(&mut stage, &image, 1).await?;
    }
    let first = stage.truth.snapshots.first().map(|kept| kept.name.clone());
    if let Some(name) = first.filter(|_| stage.random.one_in(2)) {
        stage.apply(&image, &name).await.map_err(told("Applying"))?;
    }
    stage.close(image).await?;
    Ok(stage)
}

/// With another size of the disk it would lie elsewhere: it ends.
pub(super) async fn vm_state_ends(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    stage.machine = vec![0; BYTES];
    let image = stage.open().await.map_err(told("Opening"))?;
    scribble(&mut stage, &image, 3).await?;
    stage.save_state(&image).await.map_err(told("Saving"))?;
    image.close().await.map_err(told("Closing"))?;
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    scribble(&mut stage, &image, 1).await?;
    let most = kind.size_bytes() * 2 / 512;
    let size_bytes = (1 + stage.random.below(most)) * 512;
    stage.end_state();
    stage.guest(&image, Operation::Resize { size_bytes }).await?;
    stage.close(image).await?;
    Ok(stage)
}
