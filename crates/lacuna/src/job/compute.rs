//! Computing on other threads, as many as the host has cores.
//!
//! * Always: what a dropped job left with a thread ends there and is dropped there.

#[cfg(target_os = "linux")]
use std::sync::{Arc, LazyLock};

#[cfg(target_os = "linux")]
use crate::storage::Pool;

/// All jobs of the process share the cores.
#[cfg(target_os = "linux")]
static POOL: LazyLock<Arc<Pool>> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Pool::new(cores, "lacuna-compute")
});

/// Runs `work` on one of the library's threads for computing: as many as the host has cores, which all
/// jobs of the process share. Where the future is dropped, work that began goes on to its end.
///
/// ```
/// let sum = pollster::block_on(lacuna::job::compute(|| (1..=4).sum::<u32>()));
/// assert_eq!(sum, 10);
/// ```
#[cfg(target_os = "linux")]
pub async fn compute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    POOL.run(None, work).await
}

/// Runs `work`, here and now: this host has no threads of the library.
#[cfg(not(target_os = "linux"))]
pub async fn compute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    work()
}
