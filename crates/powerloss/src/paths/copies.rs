//! What other disks hold, or their bitmaps, copied onto the image.

use lacuna::block::{Layer, WriteFlags, is_zero};
use lacuna::buffer::Buffer;
use lacuna::job::{
    ConvertOptions, Encoding, Threads, convert, copy_bitmaps, gather_common, write_difference,
};
use lacuna::qcow2::{Access, CreateOptions, Image, NewBitmap, OpenOptions, Parts, create};
use lacuna::raw::Raw;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::case::Kind;
use testkit::sim::SimStorage;
use testkit::{SparseBytes, content};

use super::guest::filled;
use super::layers::elsewhere;
use super::whole::scribble;
use super::{Ran, stage, told};
use crate::stage::Stage;

/// Only among the first so many clusters anything differs.
const AMONG: u64 = 24;

/// Writes the same to some clusters of each of some disks, as long as the image's.
fn strew(stage: &mut Stage, disks: &mut [&mut SparseBytes], count: u64) {
    for _ in 0..count {
        let range = stage.clusters(2, AMONG);
        let bytes = content(stage.random.next(), range);
        disks.iter_mut().for_each(|disk| disk.write(range.start.0, &bytes));
    }
}

async fn disk_of(content: SparseBytes) -> Result<Raw<SimStorage>, String> {
    Raw::open(elsewhere(content)).await.map_err(told("Opening another disk"))
}

/// The disk is to hold other bytes.
fn becomes(stage: &mut Stage, bytes: &[u8]) {
    stage.model.adopt(GuestRange::new(GuestOffset(0), bytes.len() as u64), bytes);
    stage.seen();
}

/// What was copied is durable; a guest goes on.
async fn copied(mut stage: Stage, image: Image<SimStorage>) -> Ran {
    stage.flushed();
    scribble(&mut stage, &image, 1).await?;
    stage.close(image).await?;
    Ok(stage)
}

/// Another disk is copied onto this one.
pub(super) async fn convert_onto(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let clusters = stage.random.below(8);
    let image = filled(&mut stage, clusters).await?;
    let (size, cluster) = (stage.model.size_bytes(), stage.cluster());
    let mut source = SparseBytes::default();
    source.set_len(size);
    strew(&mut stage, &mut [&mut source], 6);
    becomes(&mut stage, &source.to_vec());
    let source = disk_of(source).await?;
    let compresses = kind.allows_compression() && stage.random.one_in(2);
    let options = ConvertOptions {
        encoding: if compresses { Encoding::Compressed } else { Encoding::Plain },
        in_flight: 3,
        sparse_bytes: cluster,
        threads: Threads::Caller,
        ..ConvertOptions::default()
    };
    let converted = convert(&source, &image, &options, &mut |_| ()).await;
    converted.map_err(told("Converting"))?;
    copied(stage, image).await
}

/// What two other disks have in common is moved to this one.
pub(super) async fn gather(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let clusters = stage.random.below(4);
    let image = filled(&mut stage, clusters).await?;
    let (size, cluster) = (stage.model.size_bytes(), stage.cluster() as usize);
    let (mut one, mut other) = (SparseBytes::default(), SparseBytes::default());
    one.set_len(size);
    other.set_len(size);
    strew(&mut stage, &mut [&mut one], 2);
    strew(&mut stage, &mut [&mut one, &mut other], 5);
    strew(&mut stage, &mut [&mut other], 1);
    let mut wanted = stage.model.content().to_vec();
    let both = [one.to_vec(), other.to_vec()];
    for at in (0..wanted.len()).step_by(cluster) {
        let part = at..wanted.len().min(at + cluster);
        let bytes = &both[0][part.clone()];
        if bytes == &both[1][part.clone()] && !is_zero(bytes) {
            wanted[part].copy_from_slice(bytes);
        }
    }
    becomes(&mut stage, &wanted);
    let (one, other) = (disk_of(one).await?, disk_of(other).await?);
    let gathered = gather_common(&[&one, &other], &image, cluster as u64, &mut |_, _| ()).await;
    gathered.map_err(told("Gathering"))?;
    copied(stage, image).await
}

/// The image comes to read as another disk by what differs from its base.
pub(super) async fn difference(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, 0).await?;
    let cluster = stage.cluster();
    let below = stage.model.content().clone();
    let mut disk = below.clone();
    strew(&mut stage, &mut [&mut disk], 5);
    for _ in 0..2 {
        let range = stage.clusters(2, AMONG);
        disk.write(range.start.0, &vec![0; range.len as usize]);
    }
    becomes(&mut stage, &disk.to_vec());
    let (disk, below) = (disk_of(disk).await?, disk_of(below).await?);
    let written = write_difference(&disk, &below, &image, cluster, &mut |_, _| ()).await;
    written.map_err(told("Writing the difference"))?;
    copied(stage, image).await
}

/// Bitmaps of another image are copied, with what they name, while a guest goes on.
pub(super) async fn bitmaps_of_another(kind: &Kind, seed: u64) -> Ran {
    let mut stage = stage(kind, seed);
    let image = filled(&mut stage, 4).await?;
    let mut named = vec![0; stage.model.size_bytes() as usize];
    let source = tracked(&mut stage, &mut named).await.map_err(told("Making the source"))?;
    scribble(&mut stage, &image, 1).await?;
    stage.expect_bitmap("copied", named);
    let facts = source.bitmaps().await.map_err(told("Listing"))?;
    copy_bitmaps(&source, &image, &facts).await.map_err(told("Copying"))?;
    scribble(&mut stage, &image, 2).await?;
    stage.close(image).await?;
    Ok(stage)
}

/// Makes an image with a bitmap, and sets in `named` what that names at least.
async fn tracked(stage: &mut Stage, named: &mut [u8]) -> lacuna::Result<Image<SimStorage>> {
    let storage = elsewhere(SparseBytes::default());
    let options = CreateOptions { size_bytes: named.len() as u64, ..CreateOptions::default() };
    create(&storage, &options).await?;
    let source = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    let granularity_bytes = Some(512 << stage.random.below(3));
    source.add_bitmap(&NewBitmap { granularity_bytes, ..NewBitmap::new("copied") }).await?;
    for _ in 0..3 {
        let range = stage.part(AMONG);
        let bytes = Buffer::from(&content(stage.random.next(), range)[..]);
        source.write(range.start, bytes, WriteFlags::empty()).await.0?;
        named[range.start.0 as usize..range.end().0 as usize].fill(1);
    }
    Ok(source)
}
