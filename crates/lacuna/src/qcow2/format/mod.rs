//! The on-disk format as pure types: bytes in, checked values out, and back. No I/O here.
//!
//! * Always: a type that exists was decoded and checked, or built to the same rules.
//! * Never: panics, unchecked lengths or lossy casts on bytes from an image.

mod compressed;
mod geometry;
mod l1;
mod l2;

pub use compressed::CompressedRun;
pub use geometry::{
    EntryWidth, Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, SUBCLUSTERS, Version,
};
pub use l1::L1Entry;
pub use l2::{L2Entry, SubclusterBitmap, SubclusterState};
