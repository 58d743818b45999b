//! The on-disk format as pure types: bytes in, checked values out, and back. No I/O here.
//!
//! * Always: a type that exists was decoded and checked, or built to the same rules.
//! * Never: panics, unchecked lengths or lossy casts on bytes from an image.

#![deny(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod bitmap;
mod compressed;
mod extension;
mod features;
mod geometry;
mod header;
mod l1;
mod l2;
mod name;
mod refcount;
mod snapshot;

pub use bitmap::{BitmapCluster, BitmapEntry, BitmapFlags, BitmapTableEntry};
pub use compressed::CompressedRun;
pub(crate) use extension::BITMAPS as BITMAPS_MAGIC;
pub use extension::{
    BitmapsExtension, EncryptionHeader, Extensions, UnknownExtension, ZeroClusterHint,
};
pub use features::{
    AutoclearFeatures, CompatibleFeatures, FeatureName, FeatureWord, Features, IncompatibleFeatures,
};
pub use geometry::{
    EntryWidth, Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, SUBCLUSTERS, Version,
};
pub use header::{
    CompressionType, Encryption, Header, L1Location, MAGIC, MAX_BACKING_NAME_BYTES, MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS, RefcountTableLocation, SnapshotTableLocation,
};
pub(crate) use header::{Placed, SECTOR, shown_parts};
pub use l1::L1Entry;
pub(crate) use l1::OFFSET_MASK;
pub use l2::{L2Entry, SubclusterBitmap, SubclusterState};
pub use name::StoredName;
pub use refcount::{RefcountTableEntry, RefcountWidth};
pub use snapshot::{Snapshot, SnapshotTableDecoder};
