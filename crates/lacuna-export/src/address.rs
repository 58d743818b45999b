//! Where clients come from.

use std::fmt;
use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::stream::Accepted;

/// A place where a server can be reached.
///
/// ```
/// use lacuna_export::Address;
/// assert_eq!(Address::Tcp("localhost".into(), 10809).to_string(), "localhost:10809");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket file.
    Unix(PathBuf),
    /// A host name or address, version 4 or 6, and a port; port 0 lets the host choose.
    Tcp(String, u16),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// A socket that clients connect to. A socket file is removed when it is dropped.
///
/// ```
/// use lacuna_export::{Address, Listener};
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("nbd.sock");
/// let listeners = Listener::bind(&Address::Unix(path.clone())).unwrap();
/// assert!(listeners.len() == 1 && path.exists());
/// drop(listeners);
/// assert!(!path.exists());
/// ```
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    /// Removed with the listener.
    file: Option<PathBuf>,
}

#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Opens an address: one socket for each address that a host name stands for.
    ///
    /// A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// Where a socket cannot be made, with the address.
    pub fn bind(address: &Address) -> io::Result<Vec<Self>> {
        let bound = match address {
            Address::Unix(path) => Self::bind_unix(path).map(|listener| vec![listener]),
            Address::Tcp(host, port) => Self::bind_tcp(host, *port),
        };
        bound.map_err(|error| {
            io::Error::new(error.kind(), format!("Listening on {address}: {error}"))
        })
    }

    fn bind_unix(path: &Path) -> io::Result<Self> {
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
                fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            bound => bound?,
        };
        Ok(Self { socket: Socket::Unix(socket), file: Some(path.to_owned()) })
    }

    fn bind_tcp(host: &str, port: u16) -> io::Result<Vec<Self>> {
        let mut listeners: Vec<Self> = Vec::new();
        let mut failure = None;
        for address in (host, port).to_socket_addrs()? {
            match TcpListener::bind(address) {
                Ok(socket) => listeners.push(Self { socket: Socket::Tcp(socket), file: None }),
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) if listeners.is_empty() => Err(error),
            _ => Ok(listeners),
        }
    }

    /// Takes a listening socket that somebody else opened, as systemd does.
    ///
    /// # Errors
    /// Where it is neither of the Internet nor of the Unix kind.
    pub fn inherited(socket: OwnedFd) -> io::Result<Self> {
        let unix = UnixListener::from(socket.try_clone()?);
        let socket = match unix.local_addr() {
            Ok(_) => Socket::Unix(unix),
            Err(_) => {
                let tcp = TcpListener::from(socket);
                tcp.local_addr()?;
                Socket::Tcp(tcp)
            }
        };
        Ok(Self { socket, file: None })
    }

    /// Returns the port, which the host may have chosen; nothing for a socket file.
    pub fn port(&self) -> Option<u16> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().ok().map(|address| address.port()),
            Socket::Unix(_) => None,
        }
    }

    /// Returns what clients call it.
    pub fn name(&self) -> String {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().map(|it| it.to_string()).unwrap_or_default(),
            Socket::Unix(socket) => {
                let address = socket.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                path.map(|path| path.display().to_string()).unwrap_or_default()
            }
        }
    }

    /// Makes it one of the runtime that calls.
    pub(crate) fn register(&self) -> io::Result<Acceptor> {
        Ok(match &self.socket {
            Socket::Tcp(socket) => {
                socket.set_nonblocking(true)?;
                Acceptor::Tcp(tokio::net::TcpListener::from_std(socket.try_clone()?)?)
            }
            Socket::Unix(socket) => {
                socket.set_nonblocking(true)?;
                Acceptor::Unix(tokio::net::UnixListener::from_std(socket.try_clone()?)?)
            }
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            // Somebody may have removed it already; then there is nothing left to do.
            drop(fs::remove_file(file));
        }
    }
}

/// A socket file whose server is gone refuses connections.
fn is_stale(path: &Path) -> bool {
    let is_socket = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let answer = std::os::unix::net::UnixStream::connect(path);
    is_socket && answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// A listener within a runtime.
pub(crate) enum Acceptor {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    /// Waits for a client.
    pub(crate) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                Accepted::tcp(socket.into_std()?, peer)
            }
            Self::Unix(listener) => Ok(Accepted::unix(listener.accept().await?.0.into_std()?)),
        }
    }
}
