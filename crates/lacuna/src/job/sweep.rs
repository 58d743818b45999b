//! Finds zeros that an image stores as data, and gives their space back.
//!
//! * Bounded: one request of [`PIECE_BYTES`], or of a cluster where that is larger, and its like.
//! * The image may be in use: clusters are given back only while nobody can write to them.

use super::yielding::yield_now;
use crate::Result;
use crate::block::Layer;
use crate::qcow2::Image;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

/// Bytes read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// What a sweep found.
///
/// ```
/// assert_eq!(lacuna::job::SweepReport::default().freed_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Clusters whose bytes were looked at.
    pub clusters: u64,
    /// Guest bytes that were read.
    pub read_bytes: u64,
    /// Guest bytes that were stored and are zeros by the map now.
    pub zeroed_bytes: u64,
    /// Bytes of the image file that nothing uses any more; the policy of the opened image decides
    /// whether they go back to the host or are kept for reuse. Not those of an external data file.
    pub freed_bytes: u64,
}

/// How far a sweep is.
///
/// ```
/// let progress = lacuna::job::SweepProgress { done_bytes: 1, total_bytes: 2, read_bytes: 1 };
/// assert!(progress.done_bytes < progress.total_bytes);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SweepProgress {
    /// Guest bytes that lie behind it.
    pub done_bytes: u64,
    /// The size of the disk when the sweep began.
    pub total_bytes: u64,
    /// Bytes that were read so far.
    pub read_bytes: u64,
}

/// Turns clusters and subclusters that hold only zeros into zeros that take no space, as writing
/// zeroes with leave to unmap does: by a zero flag, by no mapping where that reads as zeros, or by
/// sharing a cluster of zeros ([`SharedZeroCluster`](crate::qcow2::SharedZeroCluster)).
///
/// Reads only what the map calls data of this image. What guests read does not change, and they may
/// write meanwhile. Durable on return. Dropped half-way, it leaves what it did so far. Enabled bitmaps
/// count what is given back as changed.
///
/// Where the map cannot say "zero" (version 2 over a backing layer without a shared cluster) nothing is
/// read and nothing changes.
///
/// # Errors
/// `ReadOnly` for an image opened read-only; else as for reads and for writing zeroes.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::job::sweep;
/// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
///     image.write(GuestOffset(0), Buffer::zeroed(3 << 16), WriteFlags::empty()).await.0?;
///     let report = sweep(&image, &mut |_| {}).await?;
///     assert_eq!((report.clusters, report.freed_bytes), (3, 3 << 16));
///     image.close().await
/// }).unwrap();
/// ```
pub async fn sweep<S: Storage>(
    image: &Image<S>,
    progress: &mut (dyn FnMut(SweepProgress) + Send),
) -> Result<SweepReport> {
    let report = walk(image, Doing::Clear, progress).await?;
    image.flush().await?;
    Ok(report)
}

/// Tells what [`sweep`] would do, and changes nothing: the image may be opened read-only.
///
/// Reads as much as a sweep. What compressed clusters would free is not known before they are gone:
/// it is left out of `freed_bytes`.
///
/// # Errors
/// Those of reads.
///
/// ```
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::job::sweep_estimate;
/// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let storage = MemoryStorage::new();
///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
///     image.write(GuestOffset(0), Buffer::zeroed(3 << 16), WriteFlags::empty()).await.0?;
///     let report = sweep_estimate(&image, &mut |_| {}).await?;
///     assert_eq!((report.clusters, report.freed_bytes), (3, 3 << 16));
///     image.close().await
/// }).unwrap();
/// ```
pub async fn sweep_estimate<S: Storage>(
    image: &Image<S>,
    progress: &mut (dyn FnMut(SweepProgress) + Send),
) -> Result<SweepReport> {
    walk(image, Doing::Count, progress).await
}

/// What is done about zeros that are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Clear,
    Count,
}

async fn walk<S: Storage>(
    image: &Image<S>,
    doing: Doing,
    progress: &mut (dyn FnMut(SweepProgress) + Send),
) -> Result<SweepReport> {
    let mut sweep = Sweep { image, doing, report: SweepReport::default(), next_cluster: 0 };
    let total_bytes = image.size_bytes();
    let mut at = GuestOffset(0);
    while at.0 < total_bytes && image.can_say_zero() {
        // The disk may have shrunk meanwhile.
        let end = total_bytes.min(image.size_bytes());
        let rest = GuestRange::new(at, end.saturating_sub(at.0));
        let extents = image.extents(rest).await?;
        let Some(last) = extents.last() else { break };
        at = last.range.end();
        for extent in extents.iter().filter(|extent| extent.is_own_data()) {
            for piece in pieces(extent.range, image.geometry().cluster_bytes()) {
                sweep.piece(piece).await?;
                progress(sweep.reached(piece.end(), total_bytes));
                yield_now().await;
            }
        }
        progress(sweep.reached(at, total_bytes));
    }
    Ok(sweep.report)
}

/// Cuts a range at multiples of a piece, which is whole clusters.
fn pieces(range: GuestRange, cluster_bytes: u64) -> impl Iterator<Item = GuestRange> {
    let step = PIECE_BYTES.max(cluster_bytes);
    let first = range.start.0 / step;
    (first..range.end().0.div_ceil(step)).map(move |index| {
        let start = range.start.0.max(index * step);
        GuestRange::new(GuestOffset(start), range.end().0.min((index + 1) * step) - start)
    })
}

struct Sweep<'a, S: Storage> {
    image: &'a Image<S>,
    doing: Doing,
    report: SweepReport,
    /// Clusters before this one are counted already.
    next_cluster: u64,
}

impl<S: Storage> Sweep<'_, S> {
    const fn reached(&self, at: GuestOffset, total_bytes: u64) -> SweepProgress {
        SweepProgress { done_bytes: at.0, total_bytes, read_bytes: self.report.read_bytes }
    }

    async fn piece(&mut self, piece: GuestRange) -> Result<()> {
        let swept = match self.doing {
            Doing::Clear => self.image.sweep_range(piece).await?,
            Doing::Count => self.image.count_sweepable(piece).await?,
        };
        let Some(swept) = swept else { return Ok(()) };
        let geometry = self.image.geometry();
        let first = geometry.guest_cluster(piece.start).0.max(self.next_cluster);
        self.next_cluster = geometry.clusters_for(piece.end().0).max(first);
        self.report.read_bytes += piece.len;
        self.report.clusters += self.next_cluster - first;
        self.report.zeroed_bytes += swept.zeroed_bytes;
        self.report.freed_bytes += swept.freed_bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_multiples_of_a_piece_and_cover_the_range() {
        let range = |start, len| GuestRange::new(GuestOffset(start), len);
        let cut: Vec<_> = pieces(range(PIECE_BYTES - 512, PIECE_BYTES), 512).collect();
        assert_eq!(cut, [range(PIECE_BYTES - 512, 512), range(PIECE_BYTES, PIECE_BYTES - 512)]);
        assert_eq!(pieces(range(0, 4 << 20), 2 << 20).count(), 2);
    }
}
