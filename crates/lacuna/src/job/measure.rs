//! How much room a new image takes, before it is made.
//!
//! * Never reads guest bytes: extents say what is zero.
//! * The figures are those of `qemu-img measure`. They are bounds: tables are counted as if every
//!   cluster were allocated.

use crate::Result;
use crate::block::{Layer, Preallocation};
use crate::qcow2::format::{BitmapEntry, Geometry};
use crate::qcow2::{CreateOptions, fully_allocated_bytes};
use crate::units::GuestRange;
use crate::{Error, ErrorKind};

/// Bytes of a bitmap directory entry before its name.
const BITMAP_ENTRY_BYTES: u64 = 24;

/// What a new image takes.
///
/// ```
/// use lacuna::job::{Estimate, measure_empty};
/// use lacuna::qcow2::CreateOptions;
///
/// let options = CreateOptions { size_bytes: 1 << 30, ..CreateOptions::default() };
/// let Estimate { required_bytes, fully_allocated_bytes } = measure_empty(&options)?;
/// assert_eq!((required_bytes, fully_allocated_bytes), (393_216, 1_074_135_040));
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of the new image with the content as it is now.
    pub required_bytes: u64,
    /// Bytes of the new image when every cluster of the disk has been written.
    pub fully_allocated_bytes: u64,
}

/// Returns what an empty image takes that is made with these options. Pure arithmetic.
///
/// # Errors
/// `InvalidRequest` where the options exclude each other or the disk is too large for them.
pub fn measure_empty(options: &CreateOptions) -> Result<Estimate> {
    estimate(options, options.size_bytes, 0)
}

/// Returns what a new image takes that is made with these options and gets the content of
/// `source`. The size comes from the source.
///
/// With a backing file in the options, which may share nothing with the source, all of the disk
/// is counted.
///
/// # Errors
/// As for [`measure_empty`], and what the source says when it is asked for its extents.
///
/// ```
/// use lacuna::job::measure;
/// use lacuna::qcow2::CreateOptions;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
///
/// let source = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?;
/// let estimate = pollster::block_on(measure(&source, &CreateOptions::default()))?;
/// assert_eq!(estimate.required_bytes, 327_680);
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn measure<L: Layer>(source: &L, options: &CreateOptions) -> Result<Estimate> {
    let size_bytes = source.size_bytes();
    // Refuses before the walk what it would refuse after it.
    estimate(options, size_bytes, 0)?;
    let needs_all = options.backing.is_some() || options.preallocation >= Preallocation::Falloc;
    let data_clusters = match needs_all {
        true => 0,
        false => count_data(source, &options.geometry()?).await?,
    };
    let mut found = estimate(options, size_bytes, data_clusters)?;
    if needs_all {
        found.required_bytes = found.fully_allocated_bytes;
    }
    Ok(found)
}

fn estimate(options: &CreateOptions, size_bytes: u64, data_clusters: u64) -> Result<Estimate> {
    let geometry = options.geometry()?;
    if geometry.l1_entries_for(size_bytes) * 8 > crate::qcow2::format::MAX_L1_BYTES {
        return Err(Error::new(
            ErrorKind::InvalidRequest,
            "The image size is too large (try using a larger cluster size)",
        ));
    }
    let full = fully_allocated_bytes(&geometry, size_bytes);
    let holds_all = options.preallocation >= Preallocation::Falloc;
    let missing = match holds_all {
        true => 0,
        false => geometry.clusters_for(size_bytes) - data_clusters,
    };
    let required_bytes = full - (missing << geometry.cluster_bits());
    Ok(Estimate { required_bytes, fully_allocated_bytes: full })
}

/// Counts the clusters of the new image that would hold a byte not known to be zero.
async fn count_data<L: Layer>(source: &L, geometry: &Geometry) -> Result<u64> {
    let whole = GuestRange::new(crate::units::GuestOffset(0), source.size_bytes());
    let (mut at, mut count, mut next) = (whole.start, 0, 0);
    while at < whole.end() {
        let extents = source.extents(GuestRange::new(at, whole.end() - at)).await?;
        let Some(last) = extents.last() else { return Err(crate::block::no_status(whole)) };
        at = last.range.end();
        for extent in extents.iter().filter(|extent| !extent.status.reads_zero) {
            let first = geometry.guest_cluster(extent.range.start).0.max(next);
            next = geometry.clusters_for(extent.range.end().0).max(first);
            count += next - first;
        }
    }
    Ok(count)
}

/// Returns what the bitmaps of an image would take in a new image with clusters of
/// `cluster_bytes`, by their directory entries; as QEMU does it, those that a crash left unusable
/// count as well.
///
/// ```
/// assert_eq!(lacuna::job::measure_bitmaps(&[], 1 << 30, 65536), 0);
/// ```
#[must_use]
pub fn measure_bitmaps(bitmaps: &[BitmapEntry], size_bytes: u64, cluster_bytes: u64) -> u64 {
    let (mut total, mut directory) = (0_u64, 0_u64);
    for bitmap in bitmaps {
        let granularity = 1_u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(u64::MAX);
        let clusters = size_bytes.div_ceil(granularity).div_ceil(8).div_ceil(cluster_bytes);
        let table = (clusters * 8).next_multiple_of(cluster_bytes);
        total = total.saturating_add(clusters * cluster_bytes + table);
        directory += (BITMAP_ENTRY_BYTES + bitmap.name.len() as u64).next_multiple_of(8);
    }
    total.saturating_add(directory.next_multiple_of(cluster_bytes))
}
