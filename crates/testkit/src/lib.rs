//! What lacuna's tests share: a seeded executor, storage that crashes, a model of a disk.
//!
//! * Always: what is random follows from a seed, and the seed is in the message of a failure.
//! * Never: a missing foreign tool is passed over in silence.

pub mod case;
pub mod certificates;
pub mod drive;
mod executor;
pub mod foreign;
pub mod fuzz;
mod model;
mod operations;
mod seeds;
pub mod sim;
mod storage_conformance;

pub use executor::{Device, DropPoint, Executor, Stalled, Task};
pub use lacuna_conform::Random;
pub use lacuna_conform::image::{Built, ImageBuilder, SparseBytes};
pub use model::{AfterDiscard, ModelDisk, Rules};
pub use operations::{Menu, Operation, Operations, content};
pub use seeds::seeds;
pub use storage_conformance::storage_conformance;
