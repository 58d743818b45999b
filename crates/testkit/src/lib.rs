//! What lacuna's tests share: a seeded executor, storage that crashes, a model of a disk.
//!
//! * Always: what is random follows from a seed, and the seed is in the message of a failure.
//! * Never: a missing foreign tool is passed over in silence.

mod builder;
pub mod certificates;
mod executor;
pub mod foreign;
pub mod fuzz;
mod model;
mod operations;
mod random;
pub mod sim;
mod sparse;
mod storage_conformance;

pub use builder::{Built, ImageBuilder};
pub use executor::{Device, DropPoint, Executor, Stalled, Task};
pub use model::{AfterDiscard, ModelDisk, Rules};
pub use operations::{Menu, Operation, Operations, content};
pub use random::{Random, seeds};
pub use sparse::SparseBytes;
pub use storage_conformance::storage_conformance;
