//! Computing on other threads, as many as the host has cores.
//!
//! * Always: what a dropped copy left with a thread ends there and is dropped there.

#[cfg(target_os = "linux")]
mod threads {
    use std::sync::{Arc, LazyLock};

    use crate::storage::Pool;

    /// All copies of the process share the cores.
    static POOL: LazyLock<Arc<Pool>> = LazyLock::new(|| {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Pool::new(cores, "lacuna-compute")
    });

    pub(in super::super) async fn compute<T: Send + 'static>(
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        POOL.run(None, work).await
    }
}

#[cfg(not(target_os = "linux"))]
mod threads {
    pub(in super::super) async fn compute<T>(work: impl FnOnce() -> T) -> T {
        work()
    }
}

pub(super) use threads::compute;
