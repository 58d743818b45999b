//! A request on its way to a connection, and its answer on the way back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lacuna::Result;
use lacuna::buffer::{Buffer, Hold};
use lacuna_nbd::ByteRange;
use lacuna_nbd::client::Command;
use lacuna_nbd::wire::CommandFlags;
use tokio::sync::{OwnedMutexGuard, OwnedRwLockReadGuard, oneshot};

use crate::keeper::Common;

/// What is asked of the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) command: Command,
    pub(crate) flags: CommandFlags,
    pub(crate) range: ByteRange,
}

impl Wanted {
    pub(crate) const fn new(command: Command, start: u64, len: u64) -> Self {
        Self { command, flags: CommandFlags::empty(), range: ByteRange { start, len } }
    }

    pub(crate) fn with(self, flags: CommandFlags) -> Self {
        Self { flags: self.flags | flags, ..self }
    }

    /// Says whether the server has something new to keep after this, which it may yet forget.
    pub(crate) const fn changes(&self) -> bool {
        matches!(self.command, Command::Trim | Command::Write | Command::WriteZeroes)
            && !self.flags.contains(CommandFlags::FUA)
    }
}

/// What is kept until the server is done with a request, whoever still waits for it.
#[derive(Clone, Default)]
#[expect(dead_code, reason = "they are there to be dropped")]
pub(crate) struct Kept {
    /// Locks of the caller, where its buffer does not have them.
    pub(crate) hold: Option<Arc<Hold>>,
    /// Keeps edges of blocks from being rewritten meanwhile.
    pub(crate) edges: Option<Arc<OwnedRwLockReadGuard<()>>>,
    /// Keeps the size from being changed in two ways at once.
    pub(crate) turn: Option<Arc<OwnedMutexGuard<()>>>,
}

/// A request that belongs to a connection until it is answered.
pub(crate) struct Request {
    pub(crate) wanted: Wanted,
    /// The bytes of a write, the place for those of a read.
    pub(crate) buffer: Buffer,
    pub(crate) kept: Kept,
    pub(crate) load: Load,
    pub(crate) common: Arc<Common>,
    pub(crate) waiter: oneshot::Sender<Answer>,
}

/// One of the requests that a connection has to do.
pub(crate) struct Load(Arc<AtomicUsize>);

impl Load {
    pub(crate) fn on(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What became of a request.
pub(crate) struct Answer {
    pub(crate) result: Result<()>,
    /// That of the request.
    pub(crate) buffer: Buffer,
    /// The answer to a block status: runs from its start on.
    pub(crate) runs: Vec<StatusRun>,
}

/// A run of one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StatusRun {
    pub(crate) len: u64,
    /// As the server says it, in the words of the context that was asked.
    pub(crate) status: u64,
}

impl Request {
    /// Answers, also where nobody waits any more.
    pub(crate) fn answer(self, result: Result<()>, runs: Vec<StatusRun>) {
        let Self { wanted, buffer, kept, load, common, waiter } = self;
        if wanted.command == Command::Resize {
            common.resized(wanted.range.start, &result);
        }
        if result.is_ok() && wanted.changes() {
            common.durability.lock().acknowledged += 1;
        }
        drop((kept, load));
        // Whoever asked may be gone; the buffer goes then, too.
        drop(waiter.send(Answer { result, buffer, runs }));
    }
}
