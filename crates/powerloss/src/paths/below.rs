//! What an image stands on: another name for it, and images that hold no more than it does.

use std::sync::Arc;

use lacuna::qcow2::BackingName;
use lacuna::raw::Raw;
use testkit::case::{Backing, Below, Kind};
use testkit::sim::{Pace, SimHost};
use testkit::{ModelDisk, SparseBytes};

use super::guest::filled;
use super::whole::scribble;
use super::{Ran, stage, told};
use crate::stage::{Beside, Stage};

fn raw(name: &str, file: SparseBytes) -> Beside {
    let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(file.clone());
    let layer = pollster::block_on(Raw::open(storage)).expect("memory can be opened");
    Beside { name: name.to_owned(), file, layer: Arc::new(layer) }
}

/// The same content gets another name, shorter or longer, and another format.
pub(super) async fn rename(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, 2).await?;
    scribble(&mut stage, &image, 2).await?;
    let guest = stage.case.backing.as_ref().map(|below| below.guest.clone());
    let is_needed = guest.is_some();
    let name = format!("{}.raw", "n".repeat(1 + stage.random.index(60)));
    let new = raw(&name, guest.unwrap_or_default());
    let named = BackingName { name, format: Some("raw".to_owned()) };
    let named = (is_needed || stage.random.one_in(2)).then_some(named);
    stage.beside.push(new);
    image.close_onto(named).await.map_err(told("Naming"))?;
    stage.flushed();
    Ok(stage)
}

/// An image whose content came into what it stands on is emptied, as after a commit.
pub(super) async fn empty(kind: &Kind, seed: u64) -> Ran {
    let backing = match kind.backing {
        Backing::Qcow2Shorter => Backing::RawShorter,
        Backing::Qcow2Longer => Backing::RawLonger,
        raw => raw,
    };
    let kind = Kind { backing, ..*kind };
    let mut stage = stage(&kind, seed);
    let image = stage.open().await.map_err(told("Opening"))?;
    if kind.version == 3 && stage.random.one_in(2) {
        stage.add_bitmap(&image, "a").await.map_err(told("Bitmap"))?;
    }
    scribble(&mut stage, &image, 6).await?;
    image.close().await.map_err(told("Closing"))?;
    commit_below(&mut stage);
    stage.begin();
    let image = stage.open().await.map_err(told("Opening"))?;
    image.make_empty().await.map_err(told("Emptying"))?;
    stage.flushed();
    scribble(&mut stage, &image, 2).await?;
    stage.close(image).await?;
    Ok(stage)
}

/// What the image stands on reads as the disk does.
fn commit_below(stage: &mut Stage) {
    let guest = stage.model.content().clone();
    let below = Below { format: "raw", file: guest.clone(), guest: guest.clone() };
    stage.beside = vec![raw(below.name(), guest.clone())];
    stage.model = ModelDisk::new(stage.kind().rules(), guest.len(), Some(guest));
    stage.case.backing = Some(below);
}
