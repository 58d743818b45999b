//! A zero-aware virtual-disk engine for qcow2 images.
//!
//! A guest range travels down: [`block`] says what a guest may ask, [`qcow2`] turns guest ranges
//! into host ranges, [`storage`] moves the bytes. Vocabulary shared by all three is at the root.

pub mod block;
pub mod blocking;
pub mod buffer;
pub mod chain;
mod error;
pub mod job;
pub mod qcow2;
pub mod raw;
pub mod storage;
pub mod units;

pub use error::{Error, ErrorKind, Result};
