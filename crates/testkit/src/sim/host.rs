//! The simulated host: files, calls in flight, the record of what happened.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use lacuna::buffer::{Buffer, Hold};

use super::SimStorage;
use super::effect::Effect;
use super::fault::{EIO, Failure, Fault};
use crate::executor::Device;
use crate::{Random, SparseBytes};

/// When calls take effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// At the first poll: any block_on will do.
    AtOnce,
    /// When the [`Executor`](crate::Executor) picks them; the host must be attached to it.
    Executor,
}

/// The kinds of calls, for faults and for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationKind {
    /// `read_at`.
    Read,
    /// `write_at`.
    Write,
    /// `write_zeroes_at`.
    Zero,
    /// `punch_hole_at`.
    Punch,
    /// `allocate_at`.
    Allocate,
    /// `set_len`.
    SetLen,
    /// `flush`.
    Flush,
}

/// Something that happened, in order.
#[derive(Clone, Debug)]
pub enum Event {
    /// A call that changes bytes was handed over; from here on it may reach the medium.
    Issued {
        /// Number of the call.
        call: u64,
        /// Which file.
        file: usize,
        /// What it does.
        effect: Effect,
    },
    /// The call took effect: later reads see it.
    Applied {
        /// Number of the call.
        call: u64,
    },
    /// The call failed and left `remains` behind.
    Failed {
        /// Number of the call.
        call: u64,
        /// The parts that got through.
        remains: Vec<Effect>,
    },
    /// What had taken effect in `file` before event `since` became durable.
    Flushed {
        /// Which file.
        file: usize,
        /// Index of an event.
        since: usize,
    },
    /// A flush failed: of what it should have made durable only `kept` reached the medium.
    FlushFailed {
        /// Which file.
        file: usize,
        /// Index of an event.
        since: usize,
        /// The parts that got through.
        kept: Vec<Effect>,
    },
    /// A test made a note.
    Mark(u64),
}

/// How many calls took effect (or failed) since the start or [`SimHost::reset_counts`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes of the writes.
    pub write_bytes: u64,
    /// Zeroings.
    pub zeroes: u64,
    /// Punched holes.
    pub punches: u64,
    /// Changes of the length.
    pub set_lens: u64,
    /// Flushes.
    pub flushes: u64,
}

/// A call that was issued, for tests that look at what an operation does to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimulatedCall {
    /// Which file.
    pub file: usize,
    /// What was asked.
    pub kind: OperationKind,
    /// Where it starts; the new length for `SetLen`.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

pub(super) enum Request {
    Read { offset: u64, buffer: Buffer },
    Change { kind: OperationKind, effect: Effect, buffer: Option<Buffer>, hold: Hold },
    Flush,
}

impl Request {
    pub(super) const fn kind(&self) -> OperationKind {
        match self {
            Self::Read { .. } => OperationKind::Read,
            Self::Change { kind, .. } => *kind,
            Self::Flush => OperationKind::Flush,
        }
    }

    fn describe(&self, file: usize) -> SimulatedCall {
        let (offset, len) = match self {
            Self::Read { offset, buffer } => (*offset, buffer.len() as u64),
            Self::Change { effect: Effect::SetLen { len }, .. } => (*len, 0),
            Self::Change { effect, .. } => (effect.span().0, effect.span().1 - effect.span().0),
            Self::Flush => (0, 0),
        };
        SimulatedCall { file, kind: self.kind(), offset, len }
    }
}

/// The answer to a call: an error number, and the buffer that comes back.
pub(super) struct Reply {
    pub(super) errno: Option<i32>,
    pub(super) buffer: Option<Buffer>,
}

struct Pending {
    call: u64,
    file: usize,
    /// Number of events when it was issued, which is what a flush covers.
    since: usize,
    request: Request,
}

#[derive(Default)]
struct Files {
    /// What reads see.
    current: Vec<SparseBytes>,
    /// What the medium held at the start of the record.
    initial: Vec<SparseBytes>,
    pending: Vec<Pending>,
    /// Replies nobody has fetched yet, and who waits for them.
    replies: Vec<(u64, Reply)>,
    wakers: Vec<(u64, Waker)>,
    /// Calls whose future is gone.
    orphans: Vec<u64>,
    /// Flushes that failed, with their files, which nobody has heard of: each later one fails too.
    unheard: Vec<(u64, usize)>,
    next_call: u64,
    events: Vec<Event>,
    calls: Vec<SimulatedCall>,
    counts: Counts,
    faults: Vec<Fault>,
    struck: bool,
}

/// A host with any number of files, crashed as a whole.
///
/// ```
/// use lacuna::{buffer::Buffer, storage::Storage, units::HostOffset};
/// use testkit::sim::{Pace, SimHost};
/// let host = SimHost::new(Pace::AtOnce, 1);
/// let file = host.add_file(b"lacuna"[..].into());
/// let write = file.write_at(HostOffset(0), Buffer::from(&b"L"[..]));
/// assert!(pollster::block_on(write).0.is_ok());
/// assert_eq!(host.content(0).to_vec(), b"Lacuna");
/// ```
#[derive(Clone)]
pub struct SimHost(Arc<Shared>);

pub(super) struct Shared {
    pace: Pace,
    recording: bool,
    random: Mutex<Random>,
    files: Mutex<Files>,
}

impl SimHost {
    /// Makes a host without files that records all it does.
    #[must_use]
    pub fn new(pace: Pace, seed: u64) -> Self {
        Self::make(pace, seed, true)
    }

    /// Makes a host that keeps no record, for long runs without crashes.
    #[must_use]
    pub fn without_record(pace: Pace, seed: u64) -> Self {
        Self::make(pace, seed, false)
    }

    fn make(pace: Pace, seed: u64, recording: bool) -> Self {
        let random = Mutex::new(Random::new(seed ^ 0x51_0e));
        Self(Arc::new(Shared { pace, recording, random, files: Mutex::default() }))
    }

    /// Adds a file whose content is durable; files are numbered from 0.
    pub fn add_file(&self, content: SparseBytes) -> SimStorage {
        let mut files = self.files();
        files.current.push(content.clone());
        files.initial.push(content);
        SimStorage::new(self.clone(), files.current.len() - 1)
    }

    /// Returns another way to reach file `index`, as a second process that opens it.
    #[must_use]
    pub fn open_file(&self, index: usize) -> SimStorage {
        assert!(index < self.files().current.len(), "there is no file {index}");
        SimStorage::new(self.clone(), index)
    }

    /// Returns what reads of file `index` see now.
    #[must_use]
    pub fn content(&self, index: usize) -> SparseBytes {
        self.files().current[index].clone()
    }

    /// Orders a failure. Several may stand at once; the first that strikes decides.
    pub fn order(&self, fault: Fault) {
        self.files().faults.push(fault);
    }

    /// Takes back all failures that were ordered.
    pub fn heal(&self) {
        self.files().faults.clear();
    }

    /// Says whether any call failed by order.
    #[must_use]
    pub fn struck(&self) -> bool {
        self.files().struck
    }

    /// Returns how many calls there were.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.files().counts
    }

    /// Starts counting (and listing calls) anew.
    pub fn reset_counts(&self) {
        let mut files = self.files();
        files.counts = Counts::default();
        files.calls.clear();
    }

    /// Returns the calls in order of issue.
    #[must_use]
    pub fn calls(&self) -> Vec<SimulatedCall> {
        self.files().calls.clone()
    }

    /// Returns how many events the record has.
    #[must_use]
    pub fn events_len(&self) -> usize {
        self.files().events.len()
    }

    /// Notes `label` in the record; a crash at the note happens after all before it.
    pub fn mark(&self, label: u64) {
        self.note(&mut self.files(), Some(Event::Mark(label)));
    }

    /// Returns what was durable at the start of the record and all that has happened since.
    #[must_use]
    pub fn record(&self) -> (Vec<SparseBytes>, Vec<Event>) {
        self.with_record(|initial, events| (initial.to_vec(), events.to_vec()))
    }

    /// Looks at what [`record`](Self::record) returns, where it lies.
    pub(super) fn with_record<T>(&self, look: impl FnOnce(&[SparseBytes], &[Event]) -> T) -> T {
        let files = self.files();
        look(&files.initial, &files.events)
    }

    /// Forgets the record: what reads see now counts as durable from here on.
    ///
    /// # Panics
    /// If calls are in flight.
    pub fn start_record(&self) {
        let mut files = self.files();
        assert!(files.pending.is_empty(), "a record starts with nothing in flight");
        files.initial = files.current.clone();
        files.events.clear();
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.0.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a call over; returns its number.
    pub(super) fn issue(&self, file: usize, request: Request) -> u64 {
        let mut files = self.files();
        let call = files.next_call;
        files.next_call += 1;
        files.calls.push(request.describe(file));
        if let (true, Request::Change { effect, .. }) = (self.0.recording, &request) {
            files.events.push(Event::Issued { call, file, effect: effect.clone() });
        }
        let since = files.events.len();
        files.pending.push(Pending { call, file, since, request });
        drop(files);
        if self.0.pace == Pace::AtOnce {
            self.finish(call);
        }
        call
    }

    /// Fetches the reply to `call`, or leaves a waker for it.
    pub(super) fn reply(&self, call: u64, waker: &Waker) -> Option<Reply> {
        let mut files = self.files();
        files.wakers.retain(|(waiting, _)| *waiting != call);
        match files.replies.iter().position(|(answered, _)| *answered == call) {
            Some(index) => {
                files.unheard.retain(|(failed, _)| *failed != call);
                Some(files.replies.swap_remove(index).1)
            }
            None => {
                files.wakers.push((call, waker.clone()));
                None
            }
        }
    }

    /// Takes note that nobody waits for `call` any more.
    pub(super) fn abandon(&self, call: u64) {
        let mut files = self.files();
        files.wakers.retain(|(waiting, _)| *waiting != call);
        let answered = files.replies.iter().position(|(answered, _)| *answered == call);
        let reply = answered.map(|index| files.replies.swap_remove(index).1);
        if reply.is_none() {
            files.orphans.push(call);
        }
        // The hold in a buffer calls the engine: never under our lock.
        drop(files);
        drop(reply);
    }

    pub(super) fn with_content<T>(&self, file: usize, look: impl FnOnce(&SparseBytes) -> T) -> T {
        look(&self.files().current[file])
    }

    /// Lets a call take effect and answers it.
    fn finish(&self, call: u64) {
        let mut files = self.files();
        let Some(index) = files.pending.iter().position(|pending| pending.call == call) else {
            return;
        };
        let pending = files.pending.swap_remove(index);
        let (kind, file) = (pending.request.kind(), pending.file);
        files.counts.add(&pending.request.describe(pending.file));
        let struck =
            files.faults.iter_mut().find_map(|fault| fault.strikes(kind).then_some(*fault));
        let is_silent = |fault: &Fault| fault.failure == Failure::Silent;
        files.struck |= struck.is_some_and(|fault| !is_silent(&fault));
        let (reply, hold) = match struck {
            Some(fault) if is_silent(&fault) => self.lose(&mut files, pending),
            Some(fault) => self.fail(&mut files, pending, fault),
            None => self.succeed(&mut files, pending),
        };
        let orphan = files.orphans.iter().position(|orphan| *orphan == call);
        if kind == OperationKind::Flush && reply.errno.is_some() {
            files.unheard.push((call, file));
        }
        let waker = files.wakers.iter().position(|(waiting, _)| *waiting == call);
        let waker = waker.map(|index| files.wakers.swap_remove(index).1);
        let unwanted = match orphan {
            Some(index) => {
                files.orphans.swap_remove(index);
                Some(reply)
            }
            None => {
                files.replies.push((call, reply));
                None
            }
        };
        // Holds and wakers call the engine and the executor: never under our lock.
        drop(files);
        drop((unwanted, hold));
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn succeed(&self, files: &mut Files, pending: Pending) -> (Reply, Hold) {
        let (file, call) = (pending.file, pending.call);
        let (event, buffer, hold) = match pending.request {
            Request::Read { offset, mut buffer } => {
                files.current[file].read(offset, &mut buffer);
                (None, Some(buffer), Hold::none())
            }
            Request::Change { effect, buffer, hold, .. } => {
                effect.apply(&mut files.current[file]);
                (Some(Event::Applied { call }), buffer, hold)
            }
            Request::Flush if files.unheard.iter().any(|(_, failed)| *failed == file) => {
                return (Reply { errno: Some(EIO), buffer: None }, Hold::none());
            }
            Request::Flush => {
                (Some(Event::Flushed { file, since: pending.since }), None, Hold::none())
            }
        };
        self.note(files, event);
        (Reply { errno: None, buffer }, hold)
    }

    /// Answers as if a call had gone well.
    fn lose(&self, files: &mut Files, pending: Pending) -> (Reply, Hold) {
        let call = pending.call;
        let (event, buffer, hold) = match pending.request {
            Request::Read { buffer, .. } => (None, Some(buffer), Hold::none()),
            Request::Change { buffer, hold, .. } => {
                (Some(Event::Failed { call, remains: Vec::new() }), buffer, hold)
            }
            Request::Flush => (None, None, Hold::none()),
        };
        self.note(files, event);
        (Reply { errno: None, buffer }, hold)
    }

    fn fail(&self, files: &mut Files, pending: Pending, fault: Fault) -> (Reply, Hold) {
        let mut random = self.0.random.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, call) = (pending.file, pending.call);
        let (event, buffer, hold) = match pending.request {
            Request::Read { buffer, .. } => (None, Some(buffer), Hold::none()),
            Request::Change { effect, buffer, hold, .. } => {
                let remains = match fault.failure {
                    Failure::Clean | Failure::Silent => Vec::new(),
                    Failure::Short => super::crash::tear(&effect, &mut random),
                };
                remains.iter().for_each(|part| part.apply(&mut files.current[file]));
                (Some(Event::Failed { call, remains }), buffer, hold)
            }
            Request::Flush => {
                let since = pending.since;
                let lost = super::crash::unflushed(&files.events, file, since);
                let kept = lost.iter().flat_map(|effect| super::crash::tear(effect, &mut random));
                let kept = kept.collect();
                (Some(Event::FlushFailed { file, since, kept }), None, Hold::none())
            }
        };
        drop(random);
        self.note(files, event);
        (Reply { errno: Some(fault.errno), buffer }, hold)
    }

    fn note(&self, files: &mut Files, event: Option<Event>) {
        if self.0.recording {
            files.events.extend(event);
        }
    }
}

impl Counts {
    const fn add(&mut self, call: &SimulatedCall) {
        match call.kind {
            OperationKind::Read => self.reads += 1,
            OperationKind::Write => {
                self.writes += 1;
                self.write_bytes += call.len;
            }
            OperationKind::Zero => self.zeroes += 1,
            OperationKind::Punch => self.punches += 1,
            OperationKind::SetLen => self.set_lens += 1,
            OperationKind::Flush => self.flushes += 1,
            OperationKind::Allocate => {}
        }
    }
}

impl Device for SimHost {
    fn pending(&self) -> usize {
        self.files().pending.len()
    }

    fn complete(&self, index: usize) {
        let call = self.files().pending[index].call;
        self.finish(call);
    }
}

impl std::fmt::Debug for SimHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files = self.files();
        f.debug_struct("SimHost")
            .field("files", &files.current.len())
            .field("pending", &files.pending.len())
            .field("counts", &files.counts)
            .finish_non_exhaustive()
    }
}
