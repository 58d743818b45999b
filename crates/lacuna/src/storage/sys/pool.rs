//! A few threads for calls that block, or that compute.
//!
//! * Always: a job runs to its end, even when nobody waits for it any more.
//! * Never: more than `limit` threads; unused ones leave after a minute.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::task::{Promise, Task, promise};

/// Enough to keep a disk queue busy (measured: 16 threads reach the IOPS of a ring at queue depth
/// 32), few enough not to matter when idle.
const SHARED_LIMIT: usize = 16;
const IDLE: Duration = Duration::from_secs(60);

type Job = Box<dyn FnOnce() + Send>;

/// Threads that start when there is work.
pub(crate) struct Pool {
    limit: usize,
    name: &'static str,
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static SHARED: LazyLock<Arc<Pool>> = LazyLock::new(|| Pool::new(SHARED_LIMIT, "lacuna-storage"));

/// An eventfd that tells a foreign event loop that something is done.
#[derive(Clone, Debug)]
pub(crate) struct Bell(pub(crate) Arc<OwnedFd>);

impl Bell {
    /// Adds one to the counter. A counter that is full wakes the loop just as well.
    pub(crate) fn ring(&self) {
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => (),
            Err(error) => panic!("an eventfd refused a count: {error}"),
        }
    }
}

impl Pool {
    /// Makes a pool of at most `limit` threads of that name; none runs yet.
    pub(crate) fn new(limit: usize, name: &'static str) -> Arc<Self> {
        Arc::new(Self { limit, name, queue: Mutex::default(), work: Condvar::new() })
    }

    /// Returns the one pool of the process.
    pub(crate) fn shared() -> Arc<Self> {
        Arc::clone(&SHARED)
    }

    /// Runs `job` on a thread of the pool, then rings the bell.
    pub(crate) fn run<T: Send + 'static>(
        self: &Arc<Self>,
        bell: Option<Bell>,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Task<T> {
        let (promise, task): (Promise<T>, _) = promise();
        self.push(Box::new(move || {
            promise.keep(job());
            if let Some(bell) = bell {
                bell.ring();
            }
        }));
        task
    }

    fn push(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue.lock();
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() {
            self.work.notify_one();
        } else if queue.threads < self.limit {
            queue.threads += 1;
            drop(queue);
            self.start_thread();
        }
    }

    fn start_thread(self: &Arc<Self>) {
        let pool = Arc::clone(self);
        let named = std::thread::Builder::new().name(self.name.into());
        if named.spawn(move || pool.work()).is_ok() {
            return;
        }
        // No thread to be had: others will come to the job, or the caller does it himself.
        let mut queue = self.queue.lock();
        queue.threads -= 1;
        let job = if queue.threads == 0 { queue.jobs.pop_front() } else { None };
        drop(queue);
        if let Some(job) = job {
            job();
        }
    }

    fn work(&self) {
        while let Some(job) = self.next_job() {
            // A panic is reported to the waiter by its broken promise; the thread goes on.
            drop(catch_unwind(AssertUnwindSafe(job)));
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue.idle += 1;
            let waited = self.work.wait_for(&mut queue, IDLE);
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() {
                queue.threads -= 1;
                return None;
            }
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("limit", &self.limit).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn more_jobs_than_threads_all_get_done() {
        let pool = Pool::new(2, "test");
        let tasks: Vec<_> = (0..50).map(|n| pool.run(None, move || n * 2)).collect();
        let sum: i32 = tasks.into_iter().map(pollster::block_on).sum();
        assert_eq!(sum, 49 * 50);
        assert!(pool.queue.lock().threads <= 2);
    }

    #[test]
    fn a_job_nobody_waits_for_runs_and_drops_its_value_there() {
        let pool = Pool::new(1, "test");
        let (open_gate, gate) = channel::<()>();
        let (dropped, drops) = channel::<()>();
        struct Value(std::sync::mpsc::Sender<()>);
        impl Drop for Value {
            fn drop(&mut self) {
                self.0.send(()).expect("the test listens");
            }
        }
        drop(pool.run(None, move || {
            gate.recv().expect("the test opens the gate");
            Value(dropped)
        }));
        assert!(drops.try_recv().is_err());
        open_gate.send(()).expect("the job waits");
        drops.recv().expect("the value is dropped");
    }

    #[test]
    fn a_panicking_job_leaves_the_pool_alive() {
        let pool = Pool::new(1, "test");
        drop(pool.run(None, || panic!("on purpose")));
        assert_eq!(pollster::block_on(pool.run(None, || 7)), 7);
    }
}
