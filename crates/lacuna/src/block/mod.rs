//! What a guest sees: requests, extents and the [`Layer`] trait.

mod cursor;
mod detect_zeroes;
mod extent;
mod known_zeroes;
mod layer;
mod points;
mod preallocation;
mod step_aside;
mod zero;

pub(crate) use cursor::{ExtentCursor, no_status};
pub use detect_zeroes::{DetectZeroes, ZeroDetection};
pub use extent::{AllocationDepth, Extent, ExtentBuilder, ExtentStatus};
pub use known_zeroes::{KnownZeroes, is_all_zeroes};
pub use layer::{BoxFuture, DiscardMode, DynLayer, Layer, WriteFlags, ZeroFlags};
pub use points::{Change, Point, PointOptions, PointStatus, Points, WhenFull};
pub use preallocation::Preallocation;
pub(crate) use step_aside::step_aside;
pub use zero::{first_nonzero, is_zero};
