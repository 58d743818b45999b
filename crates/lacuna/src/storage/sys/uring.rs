//! Transfers through io_uring.
//!
//! Submitting happens on the caller's thread; completions are reaped by whoever comes first: a
//! waiting future that is polled, the reactor thread, or a foreign event loop.
//!
//! * Always: a slot keeps buffer, descriptor and rider of its request from before the kernel sees
//!   it until its completion was reaped, whether or not anybody waits.
//! * Always: locks in the order submission, then slots, or completion, then slots; nothing foreign
//!   (a waker, a hold) runs under any of them.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use parking_lot::{Mutex, MutexGuard};

use super::transfer::{Attempt, CALL_BYTES, Direction};

/// Requests queued at once for one system call; more wait for it. The kernel keeps completions
/// that find no room, so this bounds nothing else.
const ENTRIES: u32 = 256;
/// The user data of requests nobody waits for.
const NOBODY: u64 = u64::MAX;
/// Completions taken at once.
const REAP: usize = 64;

/// A ring, the requests in it, and their owners' things.
pub(crate) struct Ring {
    ring: IoUring,
    submission: Mutex<()>,
    completion: Mutex<()>,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    by_key: Vec<Option<Slot>>,
    free: Vec<usize>,
}

struct Slot {
    attempt: Attempt,
    state: State,
}

enum State {
    /// With the kernel; somebody waits.
    Flying(Option<Waker>),
    /// With the kernel; nobody waits.
    Abandoned,
    /// Back, with the kernel's answer.
    Landed(i32),
}

static SHARED: Mutex<Option<Arc<Ring>>> = Mutex::new(None);

impl Ring {
    /// Makes a ring that nobody reaps yet.
    ///
    /// # Errors
    /// The kernel's refusal (EPERM, ENOSYS, ENOMEM), or ENOSYS where it is too old.
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let ring = IoUring::new(ENTRIES)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let knows = |code| probe.is_supported(code);
        if !ring.params().is_feature_nodrop()
            || !knows(opcode::Read::CODE)
            || !knows(opcode::Write::CODE)
        {
            return Err(rustix::io::Errno::NOSYS.into());
        }
        let ring = Self {
            ring,
            submission: Mutex::default(),
            completion: Mutex::default(),
            slots: Mutex::default(),
        };
        ring.try_out()?;
        Ok(Arc::new(ring))
    }

    /// Returns the one ring of the process, reaped by a thread of its own.
    ///
    /// # Errors
    /// As [`new`](Self::new). A refusal is not remembered: limits may be lifted.
    pub(crate) fn shared() -> io::Result<Arc<Self>> {
        let mut shared = SHARED.lock();
        if let Some(ring) = &*shared {
            return Ok(Arc::clone(ring));
        }
        let ring = Self::new()?;
        let reaped = Arc::clone(&ring);
        let reactor = std::thread::Builder::new().name("lacuna-ring".into());
        reactor.spawn(move || {
            loop {
                reaped.enter(1);
                reaped.reap();
            }
        })?;
        Ok(Arc::clone(shared.insert(ring)))
    }

    /// Has every completion counted in `eventfd`.
    pub(crate) fn register(&self, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.ring.submitter().register_eventfd(eventfd.as_raw_fd())
    }

    /// Hands `attempt` to the kernel; the future gives it back with the kernel's answer.
    pub(crate) fn submit(self: &Arc<Self>, attempt: Attempt) -> Flight {
        let key = self.slots.lock().insert(attempt);
        self.push(key);
        self.enter(0);
        Flight { ring: Arc::clone(self), key: Some(key) }
    }

    /// Takes up what the kernel has finished and wakes the waiters; returns how much it was.
    ///
    /// Waits for its turn: whoever is told that something is there must find it, even if somebody
    /// else has just looked.
    pub(crate) fn reap(&self) -> usize {
        self.reap_on(|| Some(self.completion.lock()))
    }

    /// As [`reap`](Self::reap), but leaves it to somebody else who is at it.
    fn reap_in_passing(&self) -> usize {
        self.reap_on(|| self.completion.try_lock())
    }

    fn reap_on<'a>(&'a self, mut turn: impl FnMut() -> Option<MutexGuard<'a, ()>>) -> usize {
        let mut total = 0;
        while let Some(turn) = turn() {
            let (done, count) = self.take_completions(turn);
            done[..count].iter().for_each(|&(key, answer)| self.deliver(key, answer));
            total += count;
            if count < REAP {
                break;
            }
        }
        total
    }

    /// Checks that the kernel lets us enter the ring as well as make it.
    fn try_out(&self) -> io::Result<()> {
        self.push_entry(&opcode::Nop::new().build().user_data(NOBODY));
        loop {
            match self.ring.submitter().submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
                Ok(_) => break,
            }
        }
        self.reap();
        Ok(())
    }

    fn push(&self, key: usize) {
        let mut slots = self.slots.lock();
        let slot = slots.by_key[key].as_mut().expect("the slot was just filled");
        let entry = slot.entry().user_data(key as u64);
        drop(slots);
        self.push_entry(&entry);
    }

    fn push_entry(&self, entry: &squeue::Entry) {
        loop {
            let turn = self.submission.lock();
            // SAFETY: the lock makes this the only view of the submission queue.
            let mut queue = unsafe { self.ring.submission_shared() };
            // SAFETY: the entry points to memory and to a descriptor that its slot keeps until
            // the completion was reaped (or to nothing at all); dropping the ring waits for that.
            let pushed = unsafe { queue.push(entry) };
            drop(queue);
            drop(turn);
            if pushed.is_ok() {
                return;
            }
            self.enter(0);
        }
    }

    /// Submits everything queued and waits for `wanted` completions.
    fn enter(&self, wanted: usize) {
        loop {
            match self.ring.submitter().submit_and_wait(wanted) {
                Ok(_) => return,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => (),
                    // The kernel wants completions taken first, or has no memory this moment.
                    io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock => {
                        self.reap();
                        std::thread::yield_now();
                    }
                    _ => panic!("a ring that worked is refused: {error}"),
                },
            }
        }
    }

    fn take_completions(&self, turn: MutexGuard<'_, ()>) -> ([(u64, i32); REAP], usize) {
        // SAFETY: the lock makes this the only view of the completion queue.
        let mut queue = unsafe { self.ring.completion_shared() };
        let mut done = [(NOBODY, 0); REAP];
        let mut count = 0;
        for (place, completion) in done.iter_mut().zip(&mut queue) {
            *place = (completion.user_data(), completion.result());
            count += 1;
        }
        drop(queue);
        drop(turn);
        (done, count)
    }

    fn deliver(&self, key: u64, answer: i32) {
        if key == NOBODY {
            return;
        }
        let (waker, unwanted) = self.slots.lock().land(key as usize, answer);
        drop(unwanted);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn flying(&self) -> usize {
        let slots = self.slots.lock();
        slots.by_key.len() - slots.free.len()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // No flight is left to wait, or it would own a part of us; the kernel may be at work yet.
        while self.flying() > 0 {
            self.enter(1);
            self.reap();
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("flying", &self.flying()).finish_non_exhaustive()
    }
}

impl Slots {
    fn insert(&mut self, attempt: Attempt) -> usize {
        let slot = Some(Slot { attempt, state: State::Flying(None) });
        match self.free.pop() {
            Some(key) => {
                self.by_key[key] = slot;
                key
            }
            None => {
                self.by_key.push(slot);
                self.by_key.len() - 1
            }
        }
    }

    fn remove(&mut self, key: usize) -> Option<Slot> {
        let slot = self.by_key[key].take();
        self.free.push(key);
        slot
    }

    /// Notes the kernel's answer: whom to wake, and what nobody wants any more.
    fn land(&mut self, key: usize, answer: i32) -> (Option<Waker>, Option<Slot>) {
        let slot = self.by_key[key].as_mut().expect("a completion has a slot");
        match std::mem::replace(&mut slot.state, State::Landed(answer)) {
            State::Flying(waker) => (waker, None),
            State::Abandoned => (None, self.remove(key)),
            State::Landed(_) => unreachable!("one request has one completion"),
        }
    }
}

impl Slot {
    fn entry(&mut self) -> squeue::Entry {
        let Attempt { file, direction, offset, buffer, start, .. } = &mut self.attempt;
        let file = types::Fd(file.as_fd().as_raw_fd());
        let bytes = &mut buffer[*start..];
        let len = bytes.len().min(CALL_BYTES) as u32;
        match direction {
            Direction::Read => {
                opcode::Read::new(file, bytes.as_mut_ptr(), len).offset(*offset).build()
            }
            Direction::Write => {
                opcode::Write::new(file, bytes.as_ptr(), len).offset(*offset).build()
            }
        }
    }
}

/// A request on its way; dropping it leaves everything with the ring.
pub(crate) struct Flight {
    ring: Arc<Ring>,
    key: Option<usize>,
}

impl Flight {
    /// Takes the request if it is back, else leaves word whom to wake.
    fn take(&mut self, context: &Context<'_>) -> Option<(io::Result<usize>, Attempt)> {
        let key = self.key.expect("a flight is over once");
        let mut slots = self.ring.slots.lock();
        let slot = slots.by_key[key].as_mut().expect("a flight keeps its slot");
        let State::Landed(answer) = slot.state else {
            slot.state = State::Flying(Some(context.waker().clone()));
            return None;
        };
        self.key = None;
        let attempt = slots.remove(key).expect("checked above").attempt;
        let result = usize::try_from(answer).map_err(|_| io::Error::from_raw_os_error(-answer));
        Some((result, attempt))
    }
}

impl Future for Flight {
    type Output = (io::Result<usize>, Attempt);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(output) = self.take(context) {
            return Poll::Ready(output);
        }
        // Reaping here saves the way over the reactor where the answer is there already.
        if self.ring.reap_in_passing() > 0
            && let Some(output) = self.take(context)
        {
            return Poll::Ready(output);
        }
        Poll::Pending
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut slots = self.ring.slots.lock();
        let slot = slots.by_key[key].as_mut().expect("a flight keeps its slot");
        let landed = match std::mem::replace(&mut slot.state, State::Abandoned) {
            State::Landed(_) => slots.remove(key),
            _ => None,
        };
        drop(slots);
        drop(landed);
    }
}
