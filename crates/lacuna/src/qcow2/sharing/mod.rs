//! Equal guest clusters share one host cluster, in a way that any writer of the format may go on with.
//!
//! The story: `share` compares clusters that somebody believes equal, makes one cluster of them
//! (`keeper`), and has the map show it in all their places; `unite` does so with clusters that nobody writes in place, which `hosts` finds. `pins` holds on to each such cluster by one
//! entry more, in the tables of a snapshot that nobody applies (`table`). `unpin` takes that back,
//! `repin` makes it again, `facts` tells of it, `weigh` says whether it is worth what pins take. Why: docs/design/dedup.md.
//!
//! * Always: an entry that points to a shared cluster has no COPIED, so that every write copies first.
//! * Always: a pin is durable before the first entry of the disk shows its cluster. So a refcount never
//!   falls to 1 while such an entry is there: stock QEMU does not give COPIED back.
//! * Always: bytes are compared while nobody can change them.
//! * Never with an external data file; encrypted images are not opened.

mod facts;
mod hosts;
mod keeper;
mod load;
mod pins;
mod relocate;
mod repin;
mod share;
mod table;
mod unite;
mod unpin;
mod weigh;
mod write;

pub use facts::{PinFacts, pin_facts};
pub(crate) use hosts::{HostStep, HostWalk, Hosts, Shown, Wanted};
pub(super) use pins::{Pins, sharing_entry};
pub(super) use relocate::Relocated;
pub use share::Shared;
pub(super) use table::NewSnapshotTable;
pub use weigh::Worth;
