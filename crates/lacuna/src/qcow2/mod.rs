//! How a guest range becomes host ranges in a qcow2 image.
//!
//! A request meets the files in this order: [`Image`] (`image`, `layer`) takes it; `plan_write`
//! and `plan_zero` decide, purely, over the tables in `meta`; `read`, `write` and `zero` carry the
//! bytes; `write_back` brings storage after memory in a crash-safe order.
//!
//! * Always: a cluster is referenced on storage only once its refcount is there too.
//! * Always: a freed cluster is reused only once nothing on storage shows it any more.
//! * Never: a backing or data file is opened here; the caller hands them in.

mod amend;
mod bitmaps;
pub mod check;
mod clear;
pub(crate) mod codec;
mod compact;
mod copy;
mod create;
mod dirty;
mod dirty_scan;
mod discard;
mod empty;
mod encode;
mod extents;
mod flush;
pub mod format;
mod header_change;
mod history;
mod host_status;
mod image;
mod in_flight;
mod in_use;
mod layer;
mod live_compact;
mod mapping;
mod meta;
mod moved;
mod need;
mod open;
mod options;
mod overlap;
mod patch;
mod plan_write;
mod plan_zero;
mod pointers;
mod preallocate;
mod quarantine;
mod read;
mod refcount_space;
mod refcounts;
mod rename_backing;
mod repair;
mod resize;
mod right_of_way;
mod same_entries;
mod sharing;
mod snapshot;
mod snapshots;
mod sweep;
mod table_cache;
mod table_walk;
mod totals;
mod turn;
mod view;
mod vm_state;
mod write;
mod write_back;
mod zero;
mod zero_claims;
mod zero_cluster;

pub(crate) use host_status::HostStatuses;

pub use amend::AmendOptions;
pub use bitmaps::{BitmapRepairs, FrozenBitmap, FrozenBitmaps, NewBitmap, repair_bitmaps};
pub use compact::{
    CompactClusters, CompactEstimate, CompactExtents, CompactOptions, CompactOrder, CompactPace,
    CompactPhase, CompactProgress, CompactReport, CompactStep, KeptMapping, compact_estimate,
};
pub use create::{BackingName, CreateOptions, DataFileName, PreallocationLayout, create};
pub use dirty::{BitmapFacts, DirtyBitmap, DirtyExtent, DirtyRanges};
pub use encode::{Encoder, Stream};
pub use image::{Counts, Image};
pub use live_compact::{
    LiveCompactOptions, LiveCompactPhase, LiveCompactProgress, LiveCompacted, LiveCompaction,
};
pub use open::read_header;
pub use options::{
    Access, DiscardPolicy, DiscardUnit, ExtentDetail, GuestDiscard, OnDiscard, OpenOptions, Parts,
    SharedZeroCluster, ZeroUnmap,
};
pub(crate) use refcount_space::fully_allocated_bytes;
pub use refcounts::Placement;
pub use resize::Shrink;
pub(crate) use sharing::{HostStep, HostWalk, Hosts, Shown, Wanted};
pub use sharing::{PinFacts, Shared, Worth, pin_facts};
pub use snapshot::{SnapshotChoice, SnapshotLayer};
pub use totals::{Totals, totals};
