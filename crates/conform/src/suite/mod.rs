//! The cases: data, a file for each group.
//!
//! * `read` — every form of an image, read and not changed
//! * `write` — data into every form of an image
//! * `zero` — zeroing and discarding
//! * `backing` — what is below, shorter and longer
//! * `sharing` — clusters and tables that have more than one owner
//! * `header` — bits and extensions, kept, cleared and refused
//! * `durable` — what a flush covered is there after the driver was killed
//! * `hostile` — damaged images: an answer in time, and no further damage
//! * `random` — sequences from a seed

mod backing;
mod durable;
mod header;
mod hostile;
mod random;
mod read;
mod sharing;
mod write;
mod zero;

use crate::Layout;
use crate::case::{Case, Step};
use crate::image::ImageBuilder;
use crate::protocol::Mode;

/// Returns all cases in the order in which they are run; random ones follow from `seed`.
///
/// ```
/// let cases = lacuna_conform::suite::all(7);
/// assert!(cases.len() > 150);
/// assert!(cases.iter().all(|case| case.name.contains('/')));
/// ```
#[must_use]
pub fn all(seed: u64) -> Vec<Case> {
    let groups = [
        read::cases(),
        write::cases(),
        zero::cases(),
        backing::cases(),
        sharing::cases(),
        header::cases(),
        durable::cases(),
        hostile::cases(),
        random::cases(seed),
    ];
    groups.concat()
}

const READ: Step = Step::Open(Mode::Read);
const WRITE: Step = Step::Open(Mode::Write);

/// Sections of the specification of qcow2.
mod section {
    pub(super) const HEADER: &str = "Header";
    pub(super) const EXTENSIONS: &str = "Header extensions";
    pub(super) const REFCOUNTS: &str = "Host cluster management";
    pub(super) const MAPPING: &str = "Cluster mapping";
    pub(super) const COMPRESSED: &str = "Cluster mapping: compressed clusters descriptor";
    pub(super) const STANDARD: &str = "Cluster mapping: standard cluster descriptor";
    pub(super) const EXTENDED: &str = "Extended L2 entries";
    pub(super) const SNAPSHOTS: &str = "Snapshots";
    pub(super) const BITMAPS: &str = "Bitmaps";
    pub(super) const DATA_FILE: &str = "Header: external data file";
    pub(super) const NONE: &str = "none: no engine may hang, crash or do harm";
}

const fn write(at: u64, len: u64, seed: u64) -> Step {
    Step::Write { at, len, seed }
}

const fn zero(at: u64, len: u64) -> Step {
    Step::Zero { at, len, unmap: false }
}

const fn zero_unmap(at: u64, len: u64) -> Step {
    Step::Zero { at, len, unmap: true }
}

const fn discard(at: u64, len: u64) -> Step {
    Step::Discard { at, len }
}

/// A field of the header: its offset, a number, and how many bytes that has.
type Field = (usize, u64, usize);

/// Overrides fields of the header.
fn patched(image: ImageBuilder, fields: &[Field]) -> ImageBuilder {
    fields
        .iter()
        .fold(image, |image, (at, number, len)| image.patch(*at, &number.to_be_bytes()[8 - len..]))
}

/// Everything is read, and nothing changed.
fn reading() -> Vec<Step> {
    vec![READ, Step::Verify, Step::Extents, Step::Close]
}

/// Changes, seen at once and after the image was opened again.
fn changing(changes: impl IntoIterator<Item = Step>) -> Vec<Step> {
    let mut steps = vec![WRITE];
    steps.extend(changes);
    steps.extend([Step::Verify, Step::Extents, Step::Close]);
    steps.extend(reading());
    steps
}

/// A disk with something of everything that its version has: data, zeros with and without a place,
/// nothing, compressed clusters, and an end in the middle of a cluster.
fn mixed(version: u32, cluster_bits: u32) -> Layout {
    let clusters = if cluster_bits < 12 { 150 } else { 10 };
    let bytes = 1_u64 << cluster_bits;
    let last = if bytes > 512 { bytes / 2 } else { bytes };
    let layout = Layout::new(version, cluster_bits, (clusters - 1) * bytes + last);
    mixed_into(layout).data(clusters - 1, 6)
}

/// Fills the first eight clusters of a layout.
fn mixed_into(layout: Layout) -> Layout {
    let layout = layout.data(0, 1).data(4, 2).compressed(5, 3).compressed(6, 4).data(7, 5);
    match layout.version() {
        2 => layout,
        _ => layout.zero(1).reserved_zero(3),
    }
}

/// The same with extended L2 entries: subclusters of all kinds.
fn mixed_extended(cluster_bits: u32) -> Layout {
    let layout = Layout::new(3, cluster_bits, 9 << cluster_bits).extended();
    mixed_into(layout).subclusters(2, 8, 0x0000_00ff, 0xff00_0000).subclusters(8, 9, 0, 0x0f0f_0f0f)
}
