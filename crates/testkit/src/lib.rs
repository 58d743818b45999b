//! What lacuna's tests share: a seeded executor, storage that crashes, a model of a disk.
//!
//! * Always: what is random follows from a seed, and the seed is in the message of a failure.
//! * Never: a missing foreign tool is passed over in silence.

mod executor;
mod random;
pub mod sim;
mod sparse;

pub use executor::{Device, DropPoint, Executor, Stalled, Task};
pub use random::{Random, seeds};
pub use sparse::SparseBytes;
