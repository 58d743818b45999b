//! Simulated time: it jumps when the executor says so, and goes on where nothing else moves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use testkit::Device;
use tokio::runtime::{Builder, Runtime};

/// The time of a run. Timers of tokio that are made while it is entered are of this time.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    runtime: Arc<Runtime>,
    jumps: Arc<Mutex<Vec<Duration>>>,
}

impl Clock {
    /// Makes a clock that stands still.
    ///
    /// # Errors
    /// Where the host has no means for a runtime.
    pub(crate) fn new() -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build()?;
        Ok(Self { runtime: Arc::new(runtime), jumps: Arc::default() })
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Says what jumps there are to be at some time or other; others are forgotten.
    pub(crate) fn set_jumps(&self, jumps: &[Duration]) {
        *self.jumps() = jumps.to_vec();
    }

    /// Lets time pass, and timers run out.
    pub(crate) fn advance(&self, by: Duration) {
        self.runtime.block_on(tokio::time::advance(by));
    }

    fn jumps(&self) -> MutexGuard<'_, Vec<Duration>> {
        self.jumps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Clock {
    fn pending(&self) -> usize {
        usize::from(!self.jumps().is_empty())
    }

    fn complete(&self, _: usize) {
        let jump = self.jumps().pop();
        if let Some(jump) = jump {
            self.advance(jump);
        }
    }
}

#[cfg(test)]
mod tests {
    use testkit::Executor;
    use tokio::time::{Instant, sleep};

    use super::*;

    #[test]
    fn timers_run_out_when_time_jumps_and_not_before() {
        let clock = Clock::new().unwrap();
        let _entered = clock.runtime().enter();
        let mut executor = Executor::new(1);
        executor.attach(Arc::new(clock.clone()));
        let sleeping = executor.spawn(async {
            let begun = Instant::now();
            sleep(Duration::from_secs(3)).await;
            begun.elapsed()
        });
        assert!(executor.run_for(1000));
        assert!(!executor.is_done());
        clock.set_jumps(&[Duration::from_secs(1), Duration::from_secs(1)]);
        assert!(executor.run_for(1000));
        assert!(!executor.is_done());
        clock.advance(Duration::from_secs(2));
        assert!(executor.run_for(1000));
        let slept = sleeping.take().unwrap();
        assert!((Duration::from_secs(3)..Duration::from_secs(5)).contains(&slept), "{slept:?}");
    }
}
