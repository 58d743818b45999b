//! Work on the whole image while guests use it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use lacuna::ErrorKind;
use lacuna::job::sweep;
use lacuna::qcow2::{Image, SnapshotChoice};
use testkit::drive;
use testkit::sim::SimStorage;

use crate::files::whole;
use crate::front::Disk;
use crate::guest::Truth;
use crate::history::{Eyes, History};
use crate::scenario::Job;

/// Snapshots there are at most: each keeps the history that it was made in.
const MOST_SNAPSHOTS: usize = 3;
/// Fixed, so that a seed replays.
pub(crate) const FINGERPRINT_SEED: u64 = 1;

/// A snapshot, and what it may hold.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) name: String,
    content: Content,
    /// Whether it must be there; what was asked for and not answered may be there or not.
    pub(crate) is_sure: bool,
}

#[derive(Clone, Debug)]
enum Content {
    /// The disk as it was between two moments.
    Of(History, Eyes),
    /// It was seen, and must stay.
    Seen(Rc<[u8]>),
    /// It is being made since that moment.
    Since(crate::history::Tick),
}

/// The snapshots of the image.
pub(crate) type Album = Rc<RefCell<Vec<Kept>>>;

/// Does a job to its end; what it cannot do with this image it leaves.
pub(crate) async fn work(
    job: Job,
    disk: Disk,
    image: Image<SimStorage>,
    truth: Truth,
    album: Album,
) -> Result<(), String> {
    let done = match job {
        Job::Compact => compact(&image).await,
        Job::Dedup => dedup(&image).await,
        Job::DropSnapshot => drop_snapshot(&image, &album).await,
        Job::DropUnusedPins => image.drop_unused_pins().await.map(drop),
        Job::Resize { size_bytes, .. } => resize(&disk, &image, size_bytes, &truth).await,
        Job::Point { .. } | Job::Silent { .. } => Ok(()),
        Job::Snapshot => snapshot(&image, &truth, &album).await,
        Job::Sweep => sweep(&image, &mut |_| {}).await.map(drop),
    };
    match done {
        Err(error) if !truth.host.struck() => Err(format!("{job:?}: {error}")),
        _ => Ok(()),
    }
}

async fn compact(image: &Image<SimStorage>) -> lacuna::Result<()> {
    match image.why_not_compact() {
        Some(_) => Ok(()),
        None => drive::compact_in_use(image).await,
    }
}

async fn resize(
    disk: &Disk,
    image: &Image<SimStorage>,
    size_bytes: u64,
    truth: &Truth,
) -> lacuna::Result<()> {
    let begun = truth.history.borrow_mut().begin_resize(size_bytes);
    let done = disk.resize(image, size_bytes).await;
    match done {
        Ok(()) => truth.history.borrow_mut().resized(begun),
        // Version 2 with snapshots.
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            truth.history.borrow_mut().keep_size(begun);
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

async fn dedup(image: &Image<SimStorage>) -> lacuna::Result<()> {
    match image.why_not_share() {
        Some(_) => Ok(()),
        None => drive::dedup(image, FINGERPRINT_SEED).await,
    }
}

// ---- snapshots -----------------------------------------------------------------------------

async fn snapshot(image: &Image<SimStorage>, truth: &Truth, album: &Album) -> lacuna::Result<()> {
    // With one bit no cluster can have two references; a data file keeps nothing.
    let can_have = image.geometry().refcount_bits() > 1 && !image.header().has_external_data_file();
    if !can_have || album.borrow().len() >= MOST_SNAPSHOTS {
        return Ok(());
    }
    let begun = truth.history.borrow_mut().tick();
    let name = format!("at-{begun}");
    let kept = Kept { name: name.clone(), content: Content::Since(begun), is_sure: false };
    album.borrow_mut().push(kept);
    let made = UNIX_EPOCH + Duration::from_secs(begun);
    let result = image.create_snapshot(&name.as_str().into(), made).await;
    if let Some(kept) = album.borrow_mut().iter_mut().find(|kept| kept.name == name) {
        kept.develop(&truth.history);
        kept.is_sure = result.is_ok();
    }
    match result {
        // Two bits count three references, four of them fifteen.
        Err(_) if image.geometry().refcount_bits() < 8 => Ok(()),
        result => result.map(drop),
    }
}

async fn drop_snapshot(image: &Image<SimStorage>, album: &Album) -> lacuna::Result<()> {
    let finished = |kept: &&mut Kept| kept.is_sure;
    let name = album.borrow_mut().iter_mut().find(finished).map(|kept| {
        kept.is_sure = false;
        kept.name.clone()
    });
    let Some(name) = name else { return Ok(()) };
    image.delete_snapshot(&SnapshotChoice::Name(name.as_str().into())).await?;
    album.borrow_mut().retain(|kept| kept.name != name);
    Ok(())
}

/// Keeps for snapshots that were being made what the disk can have been until now.
pub(crate) fn develop(album: &Album, history: &Rc<RefCell<History>>) {
    album.borrow_mut().iter_mut().for_each(|kept| kept.develop(history));
}

/// Compares all snapshots of an image with what they were. What was uncertain is known then.
pub(crate) async fn verify(image: &Image<SimStorage>, album: &Album) -> Result<(), String> {
    let fail = |error: lacuna::Error| format!("Snapshots: {error}");
    let there = image.snapshots().await.map_err(fail)?;
    let mut left = Vec::new();
    for mut kept in album.take() {
        let is_there = there.iter().any(|snapshot| snapshot.name.to_string() == kept.name);
        match (is_there, kept.is_sure) {
            (false, true) => return Err(format!("Snapshot {} is gone", kept.name)),
            (false, false) => {}
            (true, _) => {
                let choice = SnapshotChoice::Name(kept.name.as_str().into());
                let layer = image.snapshot(&choice).await.map_err(fail)?;
                let seen = whole(&layer).await.map_err(fail)?;
                kept.judge(&seen).map_err(|error| format!("Snapshot {}: {error}", kept.name))?;
                left.push(Kept { content: Content::Seen(seen.into()), is_sure: true, ..kept });
            }
        }
    }
    let own = there.iter().filter(|snapshot| !snapshot.is_pin()).count();
    if own != left.len() {
        return Err(format!("{own} snapshots, expected {}", left.len()));
    }
    album.replace(left);
    Ok(())
}

impl Kept {
    fn develop(&mut self, history: &Rc<RefCell<History>>) {
        if let Content::Since(begun) = self.content {
            let now = history.borrow_mut().tick();
            self.content = Content::Of(history.borrow().clone(), Eyes::Reader(begun, now));
        }
    }

    fn judge(&mut self, seen: &[u8]) -> Result<(), String> {
        match &self.content {
            Content::Of(history, eyes) => history.judge_all(seen, *eyes),
            Content::Seen(before) if **before == *seen => Ok(()),
            Content::Seen(before) => {
                let at = before.iter().zip(seen).position(|(before, seen)| before != seen);
                Err(format!("it has changed, first at {at:x?}"))
            }
            Content::Since(_) => Err("it is still being made".into()),
        }
    }
}
