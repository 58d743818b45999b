//! All connections to one export: which one a request takes, and what a flush promises.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak, mpsc as std_mpsc};
use std::time::Duration;

use futures_util::future::{AbortHandle, abortable};
use lacuna::buffer::Buffer;
use lacuna::{Error, Result};
use lacuna_nbd::Uri;
use lacuna_nbd::client::{Command, ExportInfo};
use lacuna_nbd::wire::TransmissionFlags;
use parking_lot::Mutex;
use tokio::sync::{RwLock, mpsc, oneshot};
use tokio::time::Instant;

use crate::connect::{Connected, Endpoint};
use crate::keeper::{Common, keep};
use crate::options::{MAX_CONNECTIONS, NbdOptions, target};
use crate::request::{Answer, Kept, Load, Request, Wanted};
use crate::runtime::Runtime;

/// How long the end of a session waits for goodbyes to leave.
const GOODBYE_BOUND: Duration = Duration::from_secs(1);

/// An export and the connections to it.
pub(crate) struct Session {
    pub(crate) common: Arc<Common>,
    pub(crate) runtime: Runtime,
    /// Taken for writing by who rewrites the edges of blocks, for reading by all who change
    /// something meanwhile.
    pub(crate) edges: Arc<RwLock<()>>,
    /// Held by who changes the size of the export.
    resizing: Arc<tokio::sync::Mutex<()>>,
    links: Mutex<Links>,
    most: usize,
}

/// The queues of the connections.
struct Links {
    ports: Vec<Port>,
    growth: Growth,
    /// Every connection has a copy, which goes with it.
    alive: Option<std_mpsc::Sender<()>>,
    ended: Option<std_mpsc::Receiver<()>>,
}

/// Whether more connections were made.
enum Growth {
    NotYet,
    Begun(AbortHandle),
}

struct Port {
    queue: mpsc::UnboundedSender<Request>,
    load: Arc<AtomicUsize>,
}

impl Session {
    /// Connects to an export.
    pub(crate) async fn open(
        uri: &Uri,
        options: &NbdOptions,
        runtime: Runtime,
    ) -> Result<Arc<Self>> {
        let (tls, writes) = (target(uri, options)?, options.writes);
        let (uri, context) = (uri.clone(), options.status_context.clone());
        let endpoint = Endpoint { uri, tls, writes, context, runtime: runtime.clone() };
        let (timeout, first) = (options.open_timeout, endpoint.clone());
        // Sockets are made where they live.
        let connect = async move { first.connect_until(Instant::now() + timeout).await };
        let (connect, abort) = abortable(connect);
        let _abort = AbortOnDrop(abort);
        let connected = runtime.run(connect).await;
        let connected = connected.ok().and_then(std::result::Result::ok).ok_or_else(|| {
            Error::io(io::ErrorKind::BrokenPipe.into(), "Nobody connects any more")
        })??;
        let info = connected.transmission.info().clone();
        let most = match info.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
            true => options.connections.clamp(1, MAX_CONNECTIONS),
            false => 1,
        };
        let (alive, ended) = std_mpsc::channel();
        let (alive, ended) = (Some(alive), Some(ended));
        let links = Links { ports: Vec::new(), growth: Growth::NotYet, alive, ended };
        let session = Self {
            common: Arc::new(Common::new(endpoint, options.reconnect_delay, info)),
            runtime,
            edges: Arc::default(),
            resizing: Arc::default(),
            links: Mutex::new(links),
            most,
        };
        session.add(connected);
        Ok(Arc::new(session))
    }

    /// Returns what the server said of the export.
    pub(crate) fn info(&self) -> &ExportInfo {
        &self.common.info
    }

    /// Says whether the server offers something.
    pub(crate) fn offers(&self, flags: TransmissionFlags) -> bool {
        self.info().flags.contains(flags)
    }

    /// Asks the server for something; the answer comes once, whatever happens to the connection.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        wanted: Wanted,
        buffer: Buffer,
        kept: Kept,
    ) -> Answer {
        let len = buffer.len();
        let answer = match self.submit(wanted, buffer, kept) {
            Ok(waiter) => waiter.await,
            Err(answer) => return self.located(answer),
        };
        self.located(answer.unwrap_or_else(|_| Answer {
            result: Err(Error::io(io::ErrorKind::BrokenPipe.into(), "The connection ended")),
            buffer: Buffer::new(len),
            runs: Vec::new(),
        }))
    }

    /// Says which export an error is about.
    fn located(&self, answer: Answer) -> Answer {
        let result = answer.result.map_err(|error| error.context(&self.common.endpoint.uri));
        Answer { result, ..answer }
    }

    fn submit(
        self: &Arc<Self>,
        wanted: Wanted,
        buffer: Buffer,
        kept: Kept,
    ) -> Result<oneshot::Receiver<Answer>, Answer> {
        if let Some(error) = self.common.failure() {
            return Err(Answer { result: Err(error), buffer, runs: Vec::new() });
        }
        let (waiter, answer) = oneshot::channel();
        let mut links = self.links.lock();
        let least = links.ports.iter().min_by_key(|port| port.load.load(Ordering::Relaxed));
        let Some(port) = least else {
            let error = Error::invalid("The export was closed");
            return Err(Answer { result: Err(error), buffer, runs: Vec::new() });
        };
        let is_busy = port.load.load(Ordering::Relaxed) > 0;
        let (load, common) = (Load::on(&port.load), Arc::clone(&self.common));
        let sent = port.queue.send(Request { wanted, buffer, kept, load, common, waiter });
        if let Err(mpsc::error::SendError(request)) = sent {
            let error = Error::invalid("The connection was closed");
            request.answer(Err(error), Vec::new());
        }
        if is_busy && self.most > 1 && matches!(links.growth, Growth::NotYet) {
            let (more, abort) = abortable(grow(Arc::downgrade(self)));
            self.runtime.spawn(async move {
                // Who ends it wants nothing of it.
                let _is_aborted = more.await;
            });
            links.growth = Growth::Begun(abort);
        }
        Ok(answer)
    }

    /// Starts to use a connection.
    fn add(&self, connected: Connected) {
        let mut links = self.links.lock();
        // Nothing where the session has ended meanwhile.
        let Some(alive) = links.alive.clone() else { return };
        let (queue, requests) = mpsc::unbounded_channel();
        links.ports.push(Port { queue, load: Arc::default() });
        let common = Arc::clone(&self.common);
        self.runtime.spawn(async move {
            keep(connected, requests, common).await;
            drop(alive);
        });
    }

    /// Gives the export another size, if the one that it has by then gives reason to.
    pub(crate) async fn resize(
        self: &Arc<Self>,
        size_bytes: u64,
        kept: Kept,
        when: impl Fn(u64) -> bool + Send,
    ) -> Result<()> {
        let turn = Arc::clone(&self.resizing).lock_owned().await;
        if !when(self.common.size_bytes()) {
            return Ok(());
        }
        self.common.resizing(size_bytes);
        let kept = Kept { turn: Some(Arc::new(turn)), ..kept };
        self.ask(Wanted::new(Command::Resize, size_bytes, 0), Buffer::new(0), kept).await.result
    }

    /// Makes durable what was acknowledged before.
    pub(crate) async fn flush(self: &Arc<Self>) -> Result<()> {
        if !self.offers(TransmissionFlags::SEND_FLUSH) {
            return Ok(());
        }
        let before = self.common.durability.lock().acknowledged;
        let wanted = Wanted::new(Command::Flush, 0, 0);
        let answer = self.ask(wanted, Buffer::new(0), Kept::default()).await;
        let mut durability = self.common.durability.lock();
        if durability.is_doubtful {
            durability.is_doubtful = false;
            durability.durable = durability.acknowledged;
            return Err(self.forgotten());
        }
        answer.result?;
        durability.durable = durability.durable.max(before);
        Ok(())
    }

    fn forgotten(&self) -> Error {
        let lost = Error::io(
            io::ErrorKind::ConnectionReset.into(),
            "A connection was lost after writes that the server had acknowledged and not flushed; \
             it may have forgotten them",
        );
        lost.context(&self.common.endpoint.uri)
    }

    /// Says goodbye on all connections once what is under way is done, and waits a little for that.
    pub(crate) fn close(&self) {
        let mut links = self.links.lock();
        links.ports.clear();
        links.alive = None;
        if let Growth::Begun(more) = &links.growth {
            more.abort();
        }
        let ended = links.ended.take().filter(|_| self.runtime.has_own_thread());
        // The thread of the sockets may want it before it can say goodbye.
        drop(links);
        // Ends with an error: that nobody is left who could send is what is waited for.
        let _all_are_gone = ended.map(|ended| ended.recv_timeout(GOODBYE_BOUND));
    }
}

/// Makes more connections, one after the other; a server that does not want them is left alone.
async fn grow(session: Weak<Session>) {
    let Some((endpoint, common, most)) = session.upgrade().map(|session| {
        (session.common.endpoint.clone(), Arc::clone(&session.common), session.most)
    }) else {
        return;
    };
    for _ in 1..most {
        let Ok(connected) = endpoint.connect_until(Instant::now()).await else { return };
        if common.compare(connected.transmission.info()).is_err() {
            return;
        }
        let Some(session) = session.upgrade() else { return };
        session.add(connected);
    }
}

/// A connection that nobody waits for any more is not made.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
