//! Where connections come from and where their work is done: sockets on a thread of their own, or what a
//! caller gives.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use lacuna::{Error, Result};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

static RUNTIME: OnceLock<Result<Handle>> = OnceLock::new();

/// Bytes in both directions, as they are on the wire.
///
/// ```
/// fn wire() -> Box<dyn lacuna_remote::Duplex> {
///     Box::new(tokio::io::duplex(64).0)
/// }
/// # let _ = wire();
/// ```
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Work that somebody has to do.
pub type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Connections, and somebody who does what is to be done for them, instead of sockets on a thread: for
/// tests in which nothing is left to chance. See [`NbdStorage::open_in`](crate::NbdStorage::open_in).
///
/// ```
/// use std::io;
/// use lacuna_remote::{Duplex, Surroundings, Work};
///
/// struct Nobody;
/// impl Surroundings for Nobody {
///     fn connect(&self) -> io::Result<Box<dyn Duplex>> {
///         Err(io::ErrorKind::ConnectionRefused.into())
///     }
///     fn spawn(&self, work: Work) {
///         drop(work);
///     }
/// }
/// assert!(Nobody.connect().is_err());
///
/// async fn disk(here: std::sync::Arc<dyn Surroundings>) -> lacuna::Result<lacuna_remote::NbdStorage> {
///     let uri = lacuna_remote::Uri::parse("nbd://nowhere/disk").unwrap();
///     lacuna_remote::NbdStorage::open_in(&uri, &lacuna_remote::NbdOptions::default(), here).await
/// }
/// # let _ = disk;
/// ```
pub trait Surroundings: Send + Sync {
    /// Connects to the server.
    ///
    /// # Errors
    /// Why nobody answers; it is tried again as long as the options say.
    fn connect(&self) -> io::Result<Box<dyn Duplex>>;

    /// Does work until it is done, where timers of tokio run out.
    fn spawn(&self, work: Work);
}

/// Where the connections of one export live.
#[derive(Clone)]
pub(crate) enum Runtime {
    Given(Arc<dyn Surroundings>),
    Sockets(Handle),
}

impl Runtime {
    /// Returns the thread of the sockets, which is started with the first call and lives as long as the
    /// process.
    pub(crate) fn sockets() -> Result<Self> {
        RUNTIME.get_or_init(start).clone().map(Self::Sockets)
    }

    /// Does work to its end, whoever still waits for it.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        match self {
            Self::Given(surroundings) => surroundings.spawn(Box::pin(work)),
            // It is done whether somebody knows of it or not.
            Self::Sockets(handle) => drop(handle.spawn(work)),
        }
    }

    /// Does work to its end, and tells whoever still waits what came of it.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        self.spawn(async move { drop(sender.send(work.await)) });
        receiver
    }

    /// Says whether waiting for the work is possible on any thread but its own.
    pub(crate) const fn has_own_thread(&self) -> bool {
        matches!(self, Self::Sockets(_))
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.has_own_thread() { "Sockets" } else { "Given" })
    }
}

fn start() -> Result<Handle> {
    let failed = |error| Error::io(error, "Starting the thread for sockets");
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let handle = runtime.handle().clone();
    let forever = move || runtime.block_on(std::future::pending::<()>());
    std::thread::Builder::new().name("lacuna-remote".into()).spawn(forever).map_err(failed)?;
    Ok(handle)
}
