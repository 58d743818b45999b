//! Restore points of disks: full and incremental copies that can be checked, and gone back to.
//!
//! ```text
//!   work.rs       a point is begun, copied and made to count
//!      │
//!   cut.rs        what changed and is no zeros is cut into pieces; changes.rs knows what changed
//!      │
//!   copy.rs       pieces are read ahead, packed on all cores, and kept in guest order
//!      │
//!   segments.rs, image.rs       as compressed segments, or as a qcow2 image on that below
//!
//!   folder.rs     which points there are, and on which others they stand
//!   place.rs      where files are
//!   disk.rs       a point in segments as a disk; verify.rs reads and checks everything
//! ```
//!
//! * Always: a point counts from the moment that its manifest is there, and that is written when all
//!   else is durable ([`Work`]).
//! * Always: every byte of every file is under a checksum, and the checksum of a manifest is part of
//!   each manifest that stands on it.
//! * Always: a length or name that comes out of a file is checked before it is used.
//! * Always bounded: memory, by frames of 1 MiB and indexes of segments.

mod changes;
mod checksum;
mod copy;
mod cut;
mod disk;
mod durable;
mod folder;
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod name;
mod place;
mod point;
mod sealed;
mod segment;
mod segments;
mod verify;
mod work;

pub use changes::{Changes, Difference, Everything, UpperLevels};
pub use checksum::Checksum;
pub use copy::CopyOptions;
pub use disk::PointDisk;
pub use folder::{Folder, Point, Points};
pub use name::PointName;
pub use place::{Host, OpenAs, Place};
pub use point::{
    Basis, Content, Form, Manifest, PointFacts, PointRef, SegmentFacts, SnapshotFacts,
};
pub use verify::{Damage, verify};
pub use work::{GoOn, Start, Work};
