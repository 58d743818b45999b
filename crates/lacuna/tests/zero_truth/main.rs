//! What zeroing, discarding and zero writes leave: threads 000, 001, 002 and 004, row by row.
//!
//! Each claim is about the extents, the bytes and the allocated size at once, and about stock QEMU
//! where it has the behaviour.

mod batches;
mod claims;
mod contiguous;
mod detection;
mod l2_results;
mod mapping;
mod policy;
mod remembered;
mod scenario;
mod shared_zero;
mod subclusters;
mod sweep;
mod unallocate;
