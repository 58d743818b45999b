//! What an incremental point has to hold: four ways to know it.

use lacuna::Result;
use lacuna::block::{AllocationDepth, Extent, Layer};
use lacuna::qcow2::{DirtyBitmap, DirtyExtent};
use lacuna::storage::Storage;
use lacuna::units::GuestRange;

/// Extents that are asked for at a time.
const AT_ONCE: usize = 1024;

/// Tells which parts of a disk may differ from what they were at an earlier point.
///
/// It may name more than what changed, and never less.
///
/// ```
/// use lacuna::units::{GuestOffset, GuestRange};
/// use lacuna_backup::{Changes, Everything};
/// let range = GuestRange::new(GuestOffset(0), 4096);
/// let found = pollster::block_on(Everything.changes(range)).unwrap();
/// assert!(found[0].is_dirty && found[0].range == range);
/// ```
pub trait Changes: Send + Sync {
    /// Returns the leading runs of `range`, which is not empty: at least one, in guest order without
    /// gaps. They may end before the range does (then ask on from there).
    fn changes(&self, range: GuestRange) -> impl Future<Output = Result<Vec<DirtyExtent>>> + Send;
}

/// All of the disk: what a full point holds.
///
/// See [`Changes`] for an example.
#[derive(Clone, Copy, Debug)]
pub struct Everything;

impl Changes for Everything {
    async fn changes(&self, range: GuestRange) -> Result<Vec<DirtyExtent>> {
        Ok(vec![DirtyExtent { range, is_dirty: true }])
    }
}

impl<S: Storage> Changes for DirtyBitmap<S> {
    async fn changes(&self, range: GuestRange) -> Result<Vec<DirtyExtent>> {
        self.extents(range, AT_ONCE).await
    }
}

/// What the highest levels of a chain hold themselves; what they leave to the levels below is
/// unchanged.
///
/// ```
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna_backup::{Changes, UpperLevels};
/// use lacuna::block::Layer;
/// pollster::block_on(async {
///     let disk = Raw::create(MemoryStorage::from(&[7; 4096][..]), 4096).await?;
///     let found = UpperLevels { disk: &disk, count: 1 }.changes(disk.whole()).await?;
///     assert!(found[0].is_dirty);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
#[derive(Clone, Copy, Debug)]
pub struct UpperLevels<'a, L> {
    /// The disk, as seen from the top of its chain.
    pub disk: &'a L,
    /// How many levels are above what the earlier point holds.
    pub count: u32,
}

impl<L: Layer> Changes for UpperLevels<'_, L> {
    async fn changes(&self, range: GuestRange) -> Result<Vec<DirtyExtent>> {
        let above = |extent: Extent| DirtyExtent {
            range: extent.range,
            is_dirty: (1..=self.count).contains(&extent.status.depth.0),
        };
        Ok(self.disk.extents(range).await?.into_iter().map(above).collect())
    }
}

/// What differs between two states of one image, by what its tables say: nothing is read.
///
/// Both states are of the same open image: a range that both keep at the same place of the same file
/// reads the same, and so does one that both leave to the backing file.
///
/// ```no_run
/// # async fn example<S: lacuna::storage::Storage>(
/// #     image: &lacuna::qcow2::Image<S>,
/// # ) -> lacuna::Result<()> {
/// use lacuna::block::Layer;
/// use lacuna::qcow2::SnapshotChoice;
/// use lacuna_backup::{Changes, Difference};
///
/// let monday = image.snapshot(&SnapshotChoice::Name("monday".into())).await?;
/// let difference = Difference { before: &monday, now: image };
/// for run in difference.changes(image.whole()).await? {
///     println!("{} bytes: changed is {}", run.range.len, run.is_dirty);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Difference<'a, A, B> {
    /// The state that the earlier point holds.
    pub before: &'a A,
    /// The state that is copied.
    pub now: &'a B,
}

impl<A: Layer, B: Layer> Changes for Difference<'_, A, B> {
    async fn changes(&self, range: GuestRange) -> Result<Vec<DirtyExtent>> {
        let before = self.before.extents(range).await?;
        let now = self.now.extents(range).await?;
        let (mut found, mut old) = (Vec::new(), before.iter().peekable());
        for extent in now {
            // Both lists begin with the range; what one of them does not reach is asked for next.
            while let Some(other) = old.peek() {
                if let Some(range) = extent.range.intersection(&other.range) {
                    let (now, before) = (part(&extent, range), part(other, range));
                    found.push(DirtyExtent { range, is_dirty: !is_same(&before, &now) });
                }
                if other.range.end() > extent.range.end() {
                    break;
                }
                old.next();
            }
        }
        Ok(found)
    }
}

fn part(extent: &Extent, range: GuestRange) -> Extent {
    let distance = range.start - extent.range.start;
    Extent { range, status: extent.status.advanced(distance) }
}

/// Says whether two states of an image have the same content in a range.
fn is_same(before: &Extent, now: &Extent) -> bool {
    let (old, new) = (before.status, now.status);
    let is_own = |depth| depth == AllocationDepth::TOP;
    match (is_own(old.depth), is_own(new.depth)) {
        _ if old.reads_zero && new.reads_zero => true,
        // Both see the backing file there.
        (false, false) => old.depth == new.depth,
        // What lies at one place is one thing; compressed data does not say where it lies.
        (true, true) => old.host.is_some() && old.host == new.host && !new.is_compressed,
        _ => false,
    }
}

impl<C: Changes> Changes for &C {
    fn changes(&self, range: GuestRange) -> impl Future<Output = Result<Vec<DirtyExtent>>> + Send {
        (**self).changes(range)
    }
}
