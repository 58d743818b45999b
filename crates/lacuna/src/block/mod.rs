//! What a guest sees: requests, extents and the [`Layer`] trait.

mod extent;
mod layer;

pub use extent::{AllocationDepth, Extent, ExtentBuilder, ExtentStatus};
pub use layer::{BoxFuture, DiscardMode, DynLayer, Layer, WriteFlags, ZeroFlags};
