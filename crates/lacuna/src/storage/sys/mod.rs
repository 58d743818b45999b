//! System calls and who runs them: the ring, the thread pool, and the calls with no safe wrapper.
//!
//! * Always: what the kernel may touch (memory, descriptor) belongs to the request until the
//!   kernel has answered, whether or not anybody still waits for the answer.
//! * Never: a decision about files; that is [`file`](super::file)'s.

mod fallocate;
mod fiemap;
mod lock;
mod pool;
mod probe;
mod rotational;
#[cfg(test)]
pub(crate) mod seccomp;
mod task;
mod transfer;
mod uring;

pub(crate) use fallocate::{allocate, punch_hole, zero_range};
pub(crate) use fiemap::{Mapping, Run, Writeback, first_run};
pub(crate) use lock::{Lock, OpenFile};
pub(crate) use pool::{Bell, Pool};
pub(crate) use probe::{
    DirectAlignment, Kind, device_zeroes_natively, direct_alignment, file_len, kind,
    punches_holes_by_reputation,
};
pub(crate) use rotational::is_rotational;
pub(crate) use task::Task;
pub(crate) use transfer::{Attempt, Direction, Rider, read_sector, uninterrupted, write_all};
pub(crate) use uring::Ring;
