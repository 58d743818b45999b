//! What a guest sees: requests, extents and the [`Layer`] trait.

mod extent;
mod layer;
mod zero;

pub use extent::{AllocationDepth, Extent, ExtentBuilder, ExtentStatus};
pub use layer::{BoxFuture, DiscardMode, DynLayer, Layer, WriteFlags, ZeroFlags};
pub use zero::{first_nonzero, is_zero};
