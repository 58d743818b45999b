//! Reads everything that points hold, and holds it against the checksums.
//!
//! * Memory: the index of one segment, and [`AT_ONCE`] frames.

use std::path::PathBuf;
use std::pin::pin;

use futures_util::{StreamExt, stream};
use lacuna::block::BoxFuture;
use lacuna::qcow2::Access;
use lacuna::{Error, Result};

use crate::disk::open_segment;
use crate::folder::{Folder, Point};
use crate::image::{changed, checksum_of, open_disk};
use crate::place::Place;
use crate::point::{Content, SegmentFacts};
use crate::segment::Kind;

/// Frames that are read and decompressed at once.
const AT_ONCE: usize = 8;

/// What was found to be wrong.
///
/// Returned by [`verify`], with an example.
#[derive(Debug)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub error: Error,
}

/// Reads all that a point holds itself, not what is below it; returns everything that is wrong.
/// `progress` is told how many bytes of files were read, of [`Manifest::stored_bytes`].
///
/// Every byte of every file is under a checksum; frames are decompressed besides, and the image of a
/// point is opened.
///
/// [`Manifest::stored_bytes`]: crate::Manifest::stored_bytes
///
/// ```no_run
/// use std::path::Path;
/// use lacuna_backup::{Folder, verify};
///
/// let folder = Folder::open(Path::new("backup"))?;
/// for point in &folder.points()?.sound {
///     for damage in pollster::block_on(verify(&folder, point, &mut |_| ())) {
///         println!("{}: {}", damage.path.display(), damage.error);
///     }
/// }
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn verify<P: Place>(
    folder: &Folder<P>,
    point: &Point,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Vec<Damage> {
    let mut found = Vec::new();
    match &point.manifest.content {
        Content::Segments { segments } => {
            let mut before = 0;
            for (number, facts) in segments.iter().enumerate() {
                let path = folder.segment_path(point.name(), number);
                let mut report = |done| progress(before + done);
                if let Err(error) = segment(folder.place(), &path, facts, &mut report).await {
                    found.push(Damage { path, error });
                }
                before += facts.bytes;
                progress(before);
            }
        }
        Content::Qcow2 { bytes, checksum } => {
            let path = folder.image_path(point.name());
            if let Err(error) = image(folder.place(), &path, (*bytes, *checksum)).await {
                found.push(Damage { path, error });
            }
            progress(*bytes);
        }
    }
    found
}

async fn segment<P: Place>(
    place: &P,
    path: &std::path::Path,
    facts: &SegmentFacts,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<()> {
    let segment = open_segment(place, path, facts).await?;
    let frames = segment.index.entries.iter().filter(|entry| entry.kind != Kind::Zero);
    let checks = frames.map(|entry| {
        let segment = &segment;
        let check = async move { segment.content(entry).await.map(|_| entry.stored.len) };
        Box::pin(check) as BoxFuture<'_, Result<u64>>
    });
    let mut checks = pin!(stream::iter(checks).buffered(AT_ONCE));
    let mut done = 0;
    while let Some(checked) = checks.next().await {
        done += checked.map_err(|error| error.context(path.display()))?;
        progress(done);
    }
    debug_assert_eq!(done, segment.stored_bytes);
    Ok(())
}

async fn image<P: Place>(
    place: &P,
    path: &std::path::Path,
    expected: (u64, crate::Checksum),
) -> Result<()> {
    if checksum_of(place, path).await? != expected {
        return Err(changed(path));
    }
    // The chain is there, and fits together.
    open_disk(place, path, Access::ReadOnly).await?.close().await
}
