//! A guest that reaches the disk through `lacuna-remote`, over wires that are cut.
//!
//! * Always: the client makes lost connections again, and asks again what was under way. A server begins
//!   with a new connection once it is done with those that were cut: what it still did for them later
//!   would overwrite what was asked again, and no client can help that.
//! * Never: a change is dropped half-way. It would go on, and only what holds its locks could wait for it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lacuna::block::ZeroFlags;
use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{HostStatus, Storage, ZeroMode};
use lacuna::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use lacuna_remote::{Duplex, NbdOptions, NbdStorage, Surroundings, Uri, Work};
use testkit::{Device, Random};
use tokio::sync::oneshot;

use crate::guest::{Answer, Truth, dropped_after};
use crate::scenario::{Remote, Request, What};
use crate::wire::{End, Watch, Wire, wire};

/// Longer than all the time that passes in a phase.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Connections that a client can make.
pub(crate) const MOST_CONNECTIONS: usize = 24;

/// What a client has instead of sockets.
pub(crate) struct Harbour {
    /// Servers that wait for a connection.
    servers: Mutex<VecDeque<oneshot::Sender<End>>>,
    wires: Mutex<Vec<Arc<Wire>>>,
    random: Mutex<Random>,
    /// How many connections are cut yet.
    cuts: Mutex<usize>,
    work: Mutex<Vec<Work>>,
    /// Whether wires change what they carry.
    lies: bool,
    was_cut: AtomicBool,
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Harbour {
    /// Makes one, and what its servers wait for.
    pub(crate) fn new(plan: Remote, lies: bool) -> (Arc<Self>, Vec<oneshot::Receiver<End>>) {
        let (servers, ends) = (0..MOST_CONNECTIONS).map(|_| oneshot::channel()).unzip();
        let harbour = Self {
            servers: Mutex::new(servers),
            wires: Mutex::default(),
            random: Mutex::new(Random::new(plan.seed)),
            cuts: Mutex::new(plan.cuts),
            work: Mutex::default(),
            lies,
            was_cut: AtomicBool::new(false),
        };
        (Arc::new(harbour), ends)
    }

    fn was_cut(&self) -> bool {
        self.was_cut.load(Ordering::Relaxed)
    }

    /// Does the work of connections beside a guest, until all is done.
    async fn drive<T>(&self, guest: impl Future<Output = T>) -> T {
        let (mut guest, mut work, mut done) = (pin!(guest), FuturesUnordered::new(), None);
        poll_fn(move |cx| {
            loop {
                if done.is_none()
                    && let Poll::Ready(value) = guest.as_mut().poll(cx)
                {
                    done = Some(value);
                }
                while let Poll::Ready(Some(())) = work.poll_next_unpin(cx) {}
                let more = std::mem::take(&mut *lock(&self.work));
                if more.is_empty() {
                    let value = done.take_if(|_| work.is_empty());
                    return value.map_or(Poll::Pending, Poll::Ready);
                }
                work.extend(more);
            }
        })
        .await
    }
}

impl Surroundings for Harbour {
    fn connect(&self) -> io::Result<Box<dyn Duplex>> {
        let server = lock(&self.servers).pop_front().ok_or(io::ErrorKind::ConnectionRefused)?;
        let mut random = lock(&self.random);
        let (wire, near, far) = wire(random.next());
        let mut cuts = lock(&self.cuts);
        if *cuts > 0 {
            *cuts -= 1;
            wire.cut_after(1 + random.index(80));
        }
        if self.lies {
            wire.lie();
        }
        lock(&self.wires).push(wire);
        // Nobody is there where a phase is over.
        drop(server.send(far));
        Ok(Box::new(near))
    }

    fn spawn(&self, work: Work) {
        lock(&self.work).push(work);
    }
}

impl Device for Harbour {
    fn pending(&self) -> usize {
        lock(&self.wires).iter().map(|wire| wire.pending()).sum()
    }

    fn complete(&self, mut index: usize) {
        let wires = lock(&self.wires).clone();
        for wire in wires {
            let pending = wire.pending();
            if index < pending {
                wire.complete(index);
                let is_cut = wire.is_cut();
                self.was_cut.fetch_or(is_cut, Ordering::Relaxed);
                return;
            }
            index -= pending;
        }
    }
}

// ---- servers -------------------------------------------------------------------------------

/// Which connections a server has, and who waits for it to be done with some.
#[derive(Clone, Default)]
pub(crate) struct Serving(Rc<RefCell<Served>>);

#[derive(Default)]
struct Served {
    /// Connections that a server is at work on; nothing where it is done.
    watched: Vec<Option<Watch>>,
    waiting: Vec<Waker>,
}

/// A server at work on a connection.
pub(crate) struct AtWork {
    serving: Serving,
    number: usize,
}

impl Serving {
    /// Begins with a connection, once nothing is left of those that were cut.
    pub(crate) async fn begin(&self, end: &End) -> AtWork {
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            let is_cut = |end: &Option<Watch>| end.as_ref().is_some_and(Watch::is_cut);
            match state.watched.iter().any(is_cut) {
                true => {
                    state.waiting.push(cx.waker().clone());
                    Poll::Pending
                }
                false => Poll::Ready(()),
            }
        })
        .await;
        let mut state = self.0.borrow_mut();
        state.watched.push(Some(end.watch()));
        AtWork { serving: self.clone(), number: state.watched.len() - 1 }
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        let mut state = self.serving.0.borrow_mut();
        state.watched[self.number] = None;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

// ---- the guest -----------------------------------------------------------------------------

/// Asks in bursts. Where others change the size, a connection that was lost may be the last.
pub(crate) async fn by_remote(
    harbour: Arc<Harbour>,
    plan: Remote,
    bursts: Vec<Vec<Request>>,
    truth: Truth,
    size_changes: bool,
) -> Result<(), String> {
    let guest = async {
        let uri = Uri::parse("nbd://simulated/disk").map_err(|error| error.to_string())?;
        let options = NbdOptions {
            connections: plan.connections,
            open_timeout: PATIENCE,
            reconnect_delay: PATIENCE,
            writes: true,
            ..NbdOptions::default()
        };
        let surroundings = Arc::clone(&harbour) as Arc<dyn Surroundings>;
        let storage = NbdStorage::open_in(&uri, &options, surroundings).await;
        let storage = storage.map_err(|error| format!("Connecting: {error}"))?;
        let guest = RemoteGuest { storage, harbour: &harbour, truth: &truth, size_changes };
        for burst in bursts {
            let answers = join_all(burst.into_iter().map(|request| guest.ask(request))).await;
            answers.into_iter().collect::<Result<Vec<()>, String>>()?;
        }
        Ok(())
    };
    let done = harbour.drive(guest).await;
    // Servers that nobody needed go home.
    lock(&harbour.servers).clear();
    done
}

struct RemoteGuest<'a> {
    storage: NbdStorage,
    harbour: &'a Harbour,
    truth: &'a Truth,
    size_changes: bool,
}

impl RemoteGuest<'_> {
    async fn ask(&self, request: Request) -> Result<(), String> {
        let asked = self.truth.ask(request);
        let polls = request.dropped_after.filter(|_| !request.what.changes());
        let Some(answer) = dropped_after(polls, self.perform(request)).await else {
            return Ok(());
        };
        match answer {
            Err(_) if self.may_fail(request) => Ok(()),
            answer => self.truth.answer(&asked, answer.map_err(|error| error.to_string())),
        }
    }

    /// After a cut a flush fails where it could promise nothing of what was acknowledged, and an export
    /// that has another size since is not taken for the same.
    fn may_fail(&self, request: Request) -> bool {
        self.harbour.was_cut() && (request.what == What::Flush || self.size_changes)
    }

    async fn perform(&self, request: Request) -> lacuna::Result<Answer> {
        let (offset, mut answer) = (HostOffset(request.start), Answer::default());
        let range = HostRange::new(offset, request.len);
        let storage = &self.storage;
        match request.what {
            What::Read => {
                let read = storage.read_at(offset, Buffer::new(request.len as usize)).await;
                read.0?;
                answer.bytes = read.1.to_vec();
            }
            What::Write { fill, fua: true } => {
                let bytes = Buffer::from(&fill.bytes(request.range())[..]);
                storage.write_durably_at(offset, bytes).await.0?;
            }
            What::Write { fill, fua: false } | What::Compress { fill } => {
                let bytes = Buffer::from(&fill.bytes(request.range())[..]);
                storage.write_at(offset, bytes).await.0?;
            }
            What::Zero { flags } => {
                let mode = match flags.contains(ZeroFlags::MAY_UNMAP) {
                    true => ZeroMode::MayUnmap,
                    false => ZeroMode::Allocate,
                };
                match flags.contains(ZeroFlags::FUA) {
                    true => storage.write_zeroes_durably_at(range, mode, Hold::none()).await?,
                    false => storage.write_zeroes_at(range, mode, Hold::none()).await?,
                }
            }
            What::Discard => storage.discard_at(range, Hold::none()).await?,
            What::Flush => storage.flush().await?,
            What::Extents => answer.zeros = self.zeros(range).await?,
        }
        Ok(answer)
    }

    async fn zeros(&self, range: HostRange) -> lacuna::Result<Vec<GuestRange>> {
        let (mut zeros, mut at, end) = (Vec::new(), range.start.0, range.end().0);
        while at < end {
            let rest = HostRange::new(HostOffset(at), end - at);
            for extent in self.storage.extents_at(rest).await? {
                let len = extent.len.min(end - at);
                if matches!(extent.status, HostStatus::Hole | HostStatus::Unwritten) {
                    zeros.push(GuestRange::new(GuestOffset(at), len));
                }
                at += len;
            }
        }
        Ok(zeros)
    }
}
