//! Many futures on one thread, in an order that a seed decides.
//!
//! * Always: the same seed and the same futures give the same order of polls and completions.
//! * Always: a future that nobody can wake any more is reported, not waited for.
//! * Never: a clock or a thread of its own.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::Random;

/// Something with calls in flight that the executor completes in random order.
pub trait Device {
    /// Returns how many calls wait for completion.
    fn pending(&self) -> usize;

    /// Completes one of them: `index` is below what [`pending`](Self::pending) returned.
    fn complete(&self, index: usize);
}

/// When a future is dropped unfinished, to explore cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropPoint {
    /// Right after its n-th poll (from 1) found it pending.
    AfterPoll(usize),
    /// When it was woken for its n-th poll (from 1): the wake-up is lost with it.
    InsteadOfPoll(usize),
    /// It runs to its end.
    Never,
}

/// The result of a task, to be taken when the executor has run.
#[derive(Debug)]
pub struct Task<T>(Rc<RefCell<Ending<T>>>);

#[derive(Debug)]
enum Ending<T> {
    Running,
    Returned(T),
    Dropped,
}

impl<T> Task<T> {
    /// Returns what the future returned, or nothing where it was dropped before.
    ///
    /// # Panics
    /// If the task still runs, or was asked before.
    #[must_use]
    pub fn take(&self) -> Option<T> {
        match self.0.replace(Ending::Running) {
            Ending::Returned(value) => Some(value),
            Ending::Dropped => None,
            Ending::Running => panic!("the task has not ended, or its result was taken"),
        }
    }
}

/// Nothing can move although tasks wait: a lost wake-up or a deadlock.
#[derive(Debug)]
pub struct Stalled {
    /// The indices of the tasks that wait, in the order of spawning from 0.
    pub waiting: Vec<usize>,
    /// The seed, for the message.
    pub seed: u64,
}

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tasks {:?} wait for ever (seed {})", self.waiting, self.seed)
    }
}

/// Polls woken futures and completes device calls in an order that follows from a seed.
///
/// ```
/// let mut executor = testkit::Executor::new(1);
/// let (first, second) = (executor.spawn(async { 1 }), executor.spawn(async { 2 }));
/// executor.run().unwrap();
/// assert_eq!((first.take(), second.take()), (Some(1), Some(2)));
/// ```
pub struct Executor<'a> {
    seed: u64,
    random: Random,
    /// One in this many steps completes a device call although a task could be polled.
    patience: u64,
    tasks: Vec<Option<Slot<'a>>>,
    /// How many of them have not ended.
    running: usize,
    woken: Arc<Woken>,
    devices: Vec<Arc<dyn Device + 'a>>,
}

struct Slot<'a> {
    future: Pin<Box<dyn Future<Output = ()> + 'a>>,
    /// Told when the future is dropped unfinished.
    dropped: Box<dyn FnOnce() + 'a>,
    polls: usize,
    drop_point: DropPoint,
    waker: Waker,
}

/// The tasks that asked to be polled.
#[derive(Default)]
struct Woken(Mutex<Vec<usize>>);

impl Woken {
    fn add(&self, task: usize) {
        let mut woken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !woken.contains(&task) {
            woken.push(task);
        }
    }

    fn take(&self, random: &mut Random) -> Option<usize> {
        let mut woken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if woken.is_empty() {
            return None;
        }
        let index = random.index(woken.len());
        Some(woken.swap_remove(index))
    }
}

struct TaskWaker {
    task: usize,
    woken: Arc<Woken>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.woken.add(self.task);
    }
}

impl<'a> Executor<'a> {
    /// Makes an executor whose order follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            seed,
            patience: *random.pick(&[2, 2, 4, 16]),
            random,
            tasks: Vec::new(),
            running: 0,
            woken: Arc::default(),
            devices: Vec::new(),
        }
    }

    /// Lets the executor complete the calls of `device`.
    pub fn attach(&mut self, device: Arc<dyn Device + 'a>) {
        self.devices.push(device);
    }

    /// Adds a future; it is first polled by [`run`](Self::run).
    pub fn spawn<T: 'a>(&mut self, future: impl Future<Output = T> + 'a) -> Task<T> {
        self.spawn_until(DropPoint::Never, future)
    }

    /// Adds a future that is dropped at `drop_point` unless it has ended before.
    pub fn spawn_until<T: 'a>(
        &mut self,
        drop_point: DropPoint,
        future: impl Future<Output = T> + 'a,
    ) -> Task<T> {
        let ending = Rc::new(RefCell::new(Ending::Running));
        let (at_end, at_drop) = (Rc::clone(&ending), Rc::clone(&ending));
        let task = self.tasks.len();
        self.tasks.push(Some(Slot {
            future: Box::pin(async move {
                let value = future.await;
                at_end.replace(Ending::Returned(value));
            }),
            dropped: Box::new(move || {
                at_drop.replace(Ending::Dropped);
            }),
            polls: 0,
            drop_point,
            waker: Waker::from(Arc::new(TaskWaker { task, woken: Arc::clone(&self.woken) })),
        }));
        self.running += 1;
        self.woken.add(task);
        Task(ending)
    }

    /// Runs until every task has returned or was dropped. Calls of dropped tasks may be left over.
    ///
    /// # Errors
    /// [`Stalled`] where tasks wait and nothing is left that could wake them.
    pub fn run(&mut self) -> Result<(), Stalled> {
        while !self.is_done() {
            if !self.step() {
                let waiting = self.waiting();
                return Err(Stalled { waiting, seed: self.seed });
            }
        }
        Ok(())
    }

    /// Runs until nothing moves, calls of dropped tasks included.
    ///
    /// # Errors
    /// [`Stalled`] where tasks are still waiting then.
    pub fn settle(&mut self) -> Result<(), Stalled> {
        while self.step() {}
        match self.waiting() {
            waiting if waiting.is_empty() => Ok(()),
            waiting => Err(Stalled { waiting, seed: self.seed }),
        }
    }

    /// Takes so many steps, or as many as there are until nothing moves: then it says so. Tasks that
    /// still wait are dropped with the executor.
    pub fn run_for(&mut self, steps: usize) -> bool {
        !(0..steps).all(|_| self.step())
    }

    /// Says whether every task has returned or was dropped.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        self.running == 0
    }

    /// Runs one future (and whatever else was spawned) to its end.
    ///
    /// # Panics
    /// If the tasks stall.
    pub fn block_on<T: 'a>(&mut self, future: impl Future<Output = T> + 'a) -> T {
        let task = self.spawn(future);
        if let Err(stalled) = self.run() {
            panic!("{stalled}");
        }
        task.take().expect("a task without drop point returns")
    }

    /// Polls one task or completes one call; false where there is neither.
    fn step(&mut self) -> bool {
        let device_first = self.random.one_in(self.patience);
        if device_first && self.complete_one() {
            return true;
        }
        match self.woken.take(&mut self.random) {
            Some(task) => self.poll(task),
            None => return !device_first && self.complete_one(),
        }
        true
    }

    fn complete_one(&mut self) -> bool {
        let total: usize = self.devices.iter().map(|device| device.pending()).sum();
        if total == 0 {
            return false;
        }
        let mut index = self.random.index(total);
        for device in &self.devices {
            let pending = device.pending();
            if index < pending {
                device.complete(index);
                return true;
            }
            index -= pending;
        }
        false
    }

    fn poll(&mut self, task: usize) {
        let Some(mut slot) = self.tasks[task].take() else { return };
        self.running -= 1;
        if slot.drop_point == DropPoint::InsteadOfPoll(slot.polls + 1) {
            return drop_unfinished(slot);
        }
        slot.polls += 1;
        match slot.future.as_mut().poll(&mut Context::from_waker(&slot.waker)) {
            Poll::Ready(()) => {}
            Poll::Pending if slot.drop_point == DropPoint::AfterPoll(slot.polls) => {
                drop_unfinished(slot);
            }
            Poll::Pending => {
                self.tasks[task] = Some(slot);
                self.running += 1;
            }
        }
    }

    fn waiting(&self) -> Vec<usize> {
        (0..self.tasks.len()).filter(|task| self.tasks[*task].is_some()).collect()
    }
}

fn drop_unfinished(slot: Slot<'_>) {
    drop(slot.future);
    (slot.dropped)();
}

impl fmt::Debug for Executor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor")
            .field("seed", &self.seed)
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}
