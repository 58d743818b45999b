//! What a described disk is made of, opened: storages that play a file, and the disk on top.
//!
//! * A plain file is never wrapped: its calls cost one branch more than in the library.
//! * Each wrapper has one behaviour.

mod any;
mod below;
mod chain;
mod debug;
mod disk;
mod nested;
mod null;
mod opener;
mod tops;
mod window;

pub(crate) use any::AnyStorage;
pub(crate) use chain::{FileChain, FileChainParts, FileMap};
pub(crate) use debug::{Found, Rules, is_by_rule};
pub(crate) use disk::ToolDisk;
pub(crate) use opener::{Base, Opening, open_export};
