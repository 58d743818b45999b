//! Images made byte by byte, right or wrong on purpose.
//!
//! * `builder` — what is to be in an image
//! * `layout` — where it lies, and what it counts
//! * `sparse` — bytes of a file with holes

mod builder;
mod layout;
mod sparse;

pub use builder::{Built, ImageBuilder, SnapshotTables};
pub use sparse::SparseBytes;
