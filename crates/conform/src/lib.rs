//! A conformance kit for qcow2 engines: images, operations, and what must be there afterwards.
//!
//! A [`driver`] is a program that puts the line [`protocol`] before an engine; [`serve`] is its loop,
//! and [`engines`] has those for lacuna and qemu-io. The [`suite`] is data: each [`Case`] has an
//! [`image`], the requests that are made of it, and what they must leave. [`run`] makes them, and
//! [`judge`](run) reads the result back: through the driver, and by lacuna's own engine and check.
//!
//! * Always: a driver that hangs, dies, floods or talks nonsense is ended and reported.
//! * Always: a case starts from files that it has to itself.
//! * Never: anything random that does not follow from the seed.

mod case;
mod content;
pub mod driver;
pub mod engines;
mod folder;
pub mod image;
mod judge;
mod layout;
mod model;
pub mod protocol;
mod random;
mod read_back;
pub mod report;
pub mod run;
pub mod serve;
pub mod suite;

pub use case::{Case, Expect, Fact, Step};
pub use content::content;
pub use layout::Layout;
pub use random::Random;
