//! Storage that behaves as badly as the contract of [`Storage`](lacuna::storage::Storage) allows.
//!
//! * A call is issued at its first poll. With [`Pace::Executor`] it takes effect when the executor
//!   picks it, in any order among the calls in flight; with [`Pace::AtOnce`] right then.
//! * A call whose future was dropped still takes effect at some later time; buffer and hold stay
//!   with it until then.
//! * Only a flush makes durable, and only what had taken effect before it was issued.
//! * Everything that happens is recorded, so that one run can be crashed at every event afterwards
//!   ([`crash`]).

mod choice;
pub mod crash;
mod effect;
mod fault;
mod host;
mod opener;
mod storage;

pub use choice::{Bounds, Choice};
pub use effect::Effect;
pub use fault::{Failure, Fault};
pub use host::{Counts, Event, OperationKind, Pace, SimHost, SimulatedCall};
pub use opener::HostOpener;
pub use storage::SimStorage;
