//! Listeners, workers, and a stop that loses nothing.
//!
//! * One thread and one runtime for each worker; a connection stays with the worker that got it.
//! * The first worker accepts; each client goes to the worker that has the fewest.
//! * A stop lets no client in, takes no more requests, waits for what is in flight as long as the
//!   limit says, and returns when all connections are over.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Builder;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::LocalSet;

use crate::connection::{self, Scratch};
use crate::population::{Connection, Place, Population, Stopping};
use crate::stream::{Accepted, Stream};
use crate::{Export, Exports, Listener, ServedDisk, Tls};

/// How long accepting rests where the host has no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// What one client, and all together, may use.
///
/// Memory: `connections` times `bytes` plus one payload of at most 32 MiB each, in the worst case;
/// what a client only announces takes none.
///
/// ```
/// assert_eq!(lacuna_export::Limits::default().requests, 128);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// What happens to more.
    pub when_full: WhenFull,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// Requests of one connection that run at once.
    pub requests: usize,
    /// Bytes of one connection in requests that run and in replies that wait.
    pub bytes: u64,
    /// How long a stop waits for what is in flight.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            when_full: WhenFull::Close,
            handshake: Duration::from_secs(10),
            requests: 128,
            bytes: 32 << 20,
            stop: Duration::from_secs(10),
        }
    }
}

/// What happens to a client that is one too many.
///
/// ```
/// assert_eq!(lacuna_export::Limits::default().when_full, lacuna_export::WhenFull::Close);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// It sees the end of the stream at once.
    Close,
    /// It waits, unanswered, until another one leaves.
    Wait,
}

/// How a server works.
///
/// ```
/// assert!(lacuna_export::ServerOptions::default().workers >= 1);
/// ```
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Threads that serve.
    pub workers: usize,
    /// What clients may use.
    pub limits: Limits,
    /// Whether connections are under TLS.
    pub tls: Tls,
    /// Is told why a connection did not end well: who it was, and the error.
    pub report: Option<fn(&str, &io::Error)>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        Self { workers, limits: Limits::default(), tls: Tls::Off, report: None }
    }
}

/// A running server. Dropping it stops it.
///
/// ```
/// use std::sync::Arc;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna_export::{
///     Address, Export, ExportOptions, Exports, Listener, Plain, Server, ServerOptions,
/// };
///
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20)).unwrap();
/// let exports = Arc::new(Exports::default());
/// exports.add(Export::new("", Plain(disk), ExportOptions::default()).unwrap()).unwrap();
/// let server = Server::start(exports, ServerOptions::default()).unwrap();
///
/// let folder = tempfile::tempdir().unwrap();
/// let address = Address::Unix(folder.path().join("nbd.sock"));
/// for listener in Listener::bind(&address).unwrap() {
///     server.listen(listener);
/// }
/// // Clients come and go.
/// server.stop();
/// ```
pub struct Server<D: ServedDisk> {
    shared: Arc<Shared<D>>,
    workers: Vec<Worker<D>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Waits for the last client to leave; made by [`Server::all_left`].
///
/// ```
/// fn end_with_the_last_client<D: lacuna_export::ServedDisk>(server: &lacuna_export::Server<D>) {
///     server.all_left().wait();
///     server.stop();
/// }
/// ```
pub struct AllLeft<D>(Arc<Shared<D>>);

impl<D> AllLeft<D> {
    /// Waits until a client has used an export and none is left. Clients that only look around do
    /// not count.
    pub fn wait(&self) {
        let mut population = self.0.population.lock();
        while !population.is_over() {
            self.0.changed.wait(&mut population);
        }
    }
}

/// What all workers know.
pub(crate) struct Shared<D> {
    exports: Arc<Exports<D>>,
    limits: Limits,
    tls: Tls,
    report: Option<fn(&str, &io::Error)>,
    stop: watch::Sender<bool>,
    pub(crate) population: Mutex<Population>,
    pub(crate) changed: Condvar,
    /// Told when a place becomes free.
    pub(crate) left: Notify,
}

struct Worker<D> {
    inbox: mpsc::UnboundedSender<Errand<D>>,
    connections: Arc<AtomicUsize>,
}

/// What a worker is given to do.
enum Errand<D> {
    Listen(Listener),
    Serve(Accepted, Place<D>),
}

impl<D: ServedDisk> Server<D> {
    /// Starts the workers; nobody can connect yet.
    ///
    /// # Errors
    /// Where the host gives no threads or no event queue.
    pub fn start(exports: Arc<Exports<D>>, options: ServerOptions) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(exports, &options));
        let (workers, inboxes): (Vec<_>, Vec<_>) =
            (0..options.workers.max(1)).map(|_| Worker::new()).unzip();
        let mut threads = Vec::new();
        for (number, inbox) in inboxes.into_iter().enumerate() {
            let (shared, workers) = (Arc::clone(&shared), workers.clone());
            // Made here, so that its failure is ours.
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let work = move || {
                let local = LocalSet::new();
                local.block_on(&runtime, work(inbox, shared, workers));
            };
            threads.push(thread::Builder::new().name(format!("export-{number}")).spawn(work)?);
        }
        Ok(Self { shared, workers, threads: Mutex::new(threads) })
    }

    /// Lets clients in by a listener.
    pub fn listen(&self, listener: Listener) {
        self.workers[0].send(Errand::Listen(listener));
    }

    /// Returns the exports, which may come and go.
    pub fn exports(&self) -> &Arc<Exports<D>> {
        &self.shared.exports
    }

    /// Returns the connections there are, in order of arrival.
    pub fn connections(&self) -> Vec<Connection> {
        self.shared.population.lock().list()
    }

    /// Ends the connections of an export as a stop would: what is in flight is finished. Returns
    /// how many there are, which end soon afterwards.
    pub fn disconnect(&self, export: &Arc<Export<D>>) -> usize {
        self.shared.population.lock().end(export.number())
    }

    /// Returns what waits for the last client to leave, on any thread. From then on nobody is let in
    /// any more.
    pub fn all_left(&self) -> AllLeft<D> {
        self.shared.population.lock().ends_with_the_last();
        AllLeft(Arc::clone(&self.shared))
    }

    /// Stops: returns when all connections are over. What was acknowledged and not flushed is in
    /// the disks, which the caller closes.
    pub fn stop(&self) {
        self.shared.stop.send_replace(true);
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // A worker that panicked has said so already.
            drop(thread.join());
        }
    }
}

impl<D: ServedDisk> Drop for Server<D> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl<D> Shared<D> {
    fn new(exports: Arc<Exports<D>>, options: &ServerOptions) -> Self {
        Self {
            exports,
            limits: options.limits,
            tls: options.tls.clone(),
            report: options.report,
            stop: watch::Sender::new(false),
            population: Mutex::default(),
            changed: Condvar::new(),
            left: Notify::new(),
        }
    }

    pub(crate) const fn limits(&self) -> Limits {
        self.limits
    }

    pub(crate) const fn tls(&self) -> &Tls {
        &self.tls
    }

    pub(crate) const fn exports(&self) -> &Arc<Exports<D>> {
        &self.exports
    }

    pub(crate) fn stopping(&self) -> Stopping {
        Stopping::new(&self.stop, self.limits.stop)
    }

    /// Finds a place for a connection; where all are taken, in the way of [`WhenFull`].
    async fn place(self: &Arc<Self>, peer: &str, worker: &Worker<D>) -> Option<Place<D>> {
        loop {
            // Made before the look, so that whoever leaves after it is heard.
            let left = self.left.notified();
            let place = self.enter(peer, worker);
            if place.is_some() || self.limits.when_full == WhenFull::Close {
                return place;
            }
            left.await;
        }
    }

    /// Counts a connection in, unless there are as many as there may be.
    fn enter(self: &Arc<Self>, peer: &str, worker: &Worker<D>) -> Option<Place<D>> {
        let mut population = self.population.lock();
        if population.is_over() || population.len() >= self.limits.connections {
            return None;
        }
        let (number, seat) = population.enter(peer);
        Some(Place::new(Arc::clone(self), number, seat, Arc::clone(&worker.connections)))
    }
}

/// Serves one client on a stream that the caller has: memory, a socket of some other kind. Returns when
/// the client has left; of the options, `workers`, `report` and the number of connections mean nothing
/// here. Dropping the future is as cutting the wire.
///
/// To be polled within a runtime of tokio that has its timers.
///
/// # Errors
/// What the stream gives, and what the client did wrong.
///
/// ```
/// use std::sync::Arc;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna_export::{Export, ExportOptions, Exports, Plain, ServerOptions, serve_stream};
/// use tokio::io::AsyncReadExt;
///
/// let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
/// runtime.block_on(async {
///     let disk = Raw::create(MemoryStorage::new(), 1 << 20).await.unwrap();
///     let exports = Arc::new(Exports::default());
///     exports.add(Export::new("", Plain(disk), ExportOptions::default()).unwrap()).unwrap();
///     let (mut client, server) = tokio::io::duplex(4096);
///     let look = async {
///         let mut greeting = [0; 18];
///         client.read_exact(&mut greeting).await.unwrap();
///         drop(client);
///         greeting
///     };
///     let served = serve_stream(server, exports, ServerOptions::default());
///     let (served, greeting) = tokio::join!(served, look);
///     served.unwrap();
///     assert_eq!(&greeting[..8], b"NBDMAGIC");
/// });
/// ```
pub async fn serve_stream<D, S>(
    stream: S,
    exports: Arc<Exports<D>>,
    options: ServerOptions,
) -> io::Result<()>
where
    D: ServedDisk,
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let shared = Arc::new(Shared::new(exports, &options));
    let (number, seat) = shared.population.lock().enter("stream");
    let place = Place::new(shared, number, seat, Arc::default());
    let stopping = place.stopping();
    connection::serve(Stream::own(stream), &place, stopping, connection::scratch()).await
}

impl<D> Clone for Worker<D> {
    fn clone(&self) -> Self {
        Self { inbox: self.inbox.clone(), connections: Arc::clone(&self.connections) }
    }
}

impl<D> Worker<D> {
    fn new() -> (Self, mpsc::UnboundedReceiver<Errand<D>>) {
        let (inbox, errands) = mpsc::unbounded_channel();
        (Self { inbox, connections: Arc::default() }, errands)
    }

    fn send(&self, errand: Errand<D>) {
        // A worker that is gone has stopped with the server: what it was given ends with it.
        drop(self.inbox.send(errand));
    }
}

/// Runs until the server stops and all that was begun is over.
async fn work<D: ServedDisk>(
    mut inbox: mpsc::UnboundedReceiver<Errand<D>>,
    shared: Arc<Shared<D>>,
    workers: Vec<Worker<D>>,
) {
    let mut stopping = shared.stopping();
    let (scratch, mut tasks) = (connection::scratch(), tokio::task::JoinSet::new());
    loop {
        let errand = tokio::select! {
            errand = inbox.recv() => errand,
            () = stopping.begun() => None,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
        };
        match errand {
            None => break,
            Some(Errand::Listen(listener)) => {
                tasks.spawn_local(accept(listener, Arc::clone(&shared), workers.clone()));
            }
            Some(Errand::Serve(socket, place)) => {
                tasks.spawn_local(serve(socket, place, scratch.clone()));
            }
        }
    }
    while tasks.join_next().await.is_some() {}
}

/// Hands clients to the workers until the server stops.
async fn accept<D: ServedDisk>(
    listener: Listener,
    shared: Arc<Shared<D>>,
    workers: Vec<Worker<D>>,
) {
    let mut stopping = shared.stopping();
    let Ok(acceptor) = listener.register() else { return };
    loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept() => accepted,
            () = stopping.begun() => return,
        };
        let idlest = workers.iter().min_by_key(|it| it.connections.load(Ordering::SeqCst));
        match (accepted, idlest) {
            (Ok(socket), Some(worker)) => {
                let place = tokio::select! {
                    place = shared.place(&socket.peer, worker) => place,
                    () = stopping.begun() => return,
                };
                if let Some(place) = place {
                    worker.send(Errand::Serve(socket, place));
                }
            }
            // A client that left already, or no descriptors: neither ends the server.
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Serves one client; what it did wrong ends its own connection only.
async fn serve<D: ServedDisk>(socket: Accepted, place: Place<D>, scratch: Scratch) {
    let stopping = place.stopping();
    let peer = socket.peer.clone();
    let served = match socket.register() {
        Ok(stream) => connection::serve(stream, &place, stopping, scratch).await,
        Err(error) => Err(error),
    };
    if let (Err(error), Some(report)) = (served, place.shared().report) {
        report(&peer, &error);
    }
}
