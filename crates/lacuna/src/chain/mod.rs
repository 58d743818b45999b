//! Opens an image with the images below it: probe, resolve, allow, then build.
//!
//! * Never guesses a format and never follows a name in an image unless the caller said so
//!   (D.1-40, D.1-41): [`ChainOptions`] starts with everything refused.
//! * Always opens backing layers for reading, but for the one that [`open_split`] is to write; a data
//!   file like its image.
//! * Always claims a file before it reads more of it than tells its format (`claims`).
//! * Never more than [`MAX_LEVELS`] images, never one of them twice.

mod below;
mod claims;
mod disk;
#[cfg(target_os = "linux")]
mod file;
mod info;
mod map;
mod name;
mod open;
mod opener;
mod policy;
mod probe;
mod resolved;
mod walk;

pub use claims::Sharing;
pub use disk::{Disk, RawDisk};
#[cfg(target_os = "linux")]
pub use file::FileOpener;
pub use info::{LevelInfo, Levels, inspect};
pub use map::{Map, MapRun};
pub use open::{Chain, LevelFacts, SplitChain, open, open_split};
pub use opener::{Identity, MemoryOpener, Opener};
pub use policy::{
    Allow, ChainOptions, Format, FormatChoice, Instead, Reference, Role, StandIn, UnnamedFormat,
};
pub use probe::probe;
pub use walk::MAX_LEVELS;
