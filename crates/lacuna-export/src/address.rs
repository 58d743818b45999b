//! Where clients come from.

use std::fmt;
use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Type};
use tokio::io::Interest;

use crate::stream::Accepted;

/// Clients that wait to be accepted, where we ask ourselves; as the standard library does.
const BACKLOG: i32 = 128;

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
    /// A socket for virtual machines: the number of the one that listens, [`Address::ANY_CID`] for
    /// whichever we are, and a port.
    Vsock(u32, u32),
}

impl Address {
    /// Whichever machine we are, in [`Address::Vsock`].
    pub const ANY_CID: u32 = u32::MAX;
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Vsock(Self::ANY_CID, port) => write!(f, "vsock:any:{port}"),
            Self::Vsock(cid, port) => write!(f, "vsock:{cid}:{port}"),
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
    Vsock(socket2::Socket),
}

impl Listener {
    /// Opens an address: one socket for each address that a host name stands for.
    ///
    /// A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// What the host says where a socket cannot be made.
    pub fn bind(address: &Address) -> io::Result<Vec<Self>> {
        match address {
            Address::Unix(path) => Self::bind_unix(path).map(|listener| vec![listener]),
            Address::Tcp(host, port) => Self::bind_tcp(host, *port),
            Address::Vsock(cid, port) => Self::bind_vsock(*cid, *port).map(|it| vec![it]),
        }
    }

    fn bind_unix(path: &Path) -> io::Result<Self> {
        remove_stale(path)?;
        let socket = UnixListener::bind(path)?;
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

    fn bind_vsock(cid: u32, port: u32) -> io::Result<Self> {
        let socket = socket2::Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        socket.bind(&SockAddr::vsock(cid, port))?;
        socket.listen(BACKLOG)?;
        Ok(Self { socket: Socket::Vsock(socket), file: None })
    }

    /// Takes a listening socket that somebody else opened, as systemd does: of the Internet, of
    /// the Unix kind, or of virtual machines.
    ///
    /// # Errors
    /// Where it is no such socket, or does not listen.
    pub fn inherited(socket: OwnedFd) -> io::Result<Self> {
        let socket = socket2::Socket::from(socket);
        let wrong = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text);
        if socket.r#type()? != Type::STREAM || !socket.is_listener()? {
            return Err(wrong("The socket does not listen for streams"));
        }
        let socket = match socket.domain()? {
            Domain::IPV4 | Domain::IPV6 => Socket::Tcp(socket.into()),
            Domain::UNIX => Socket::Unix(OwnedFd::from(socket).into()),
            Domain::VSOCK => Socket::Vsock(socket),
            _ => return Err(wrong("The socket is of a family that is not known")),
        };
        Ok(Self { socket, file: None })
    }

    /// Returns the port of the Internet, which the host may have chosen; nothing for other sockets.
    pub fn port(&self) -> Option<u16> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().ok().map(|address| address.port()),
            Socket::Unix(_) | Socket::Vsock(_) => None,
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
            Socket::Vsock(socket) => socket.local_addr().map(|it| vsock(&it)).unwrap_or_default(),
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
            Socket::Vsock(socket) => {
                socket.set_nonblocking(true)?;
                let watched =
                    std::os::unix::net::UnixStream::from(OwnedFd::from(socket.try_clone()?));
                Acceptor::Vsock(tokio::net::UnixStream::from_std(watched)?, socket.try_clone()?)
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

/// How an address of a virtual machine is written.
fn vsock(address: &SockAddr) -> String {
    let known = address.as_vsock_address();
    known.map_or_else(String::new, |(cid, port)| Address::Vsock(cid, port).to_string())
}

/// Removes a socket file that nobody listens on any more; leaves everything else alone.
///
/// ```
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("s");
/// drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
/// lacuna_export::remove_stale(&path).unwrap();
/// assert!(!path.exists());
/// ```
///
/// # Errors
/// Where the host does not remove it.
pub fn remove_stale(path: &Path) -> io::Result<()> {
    if is_stale(path) { fs::remove_file(path) } else { Ok(()) }
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
    /// The runtime knows no such sockets: it watches one as it would any other.
    Vsock(tokio::net::UnixStream, socket2::Socket),
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
            Self::Vsock(watched, listener) => {
                let accepted = watched.async_io(Interest::READABLE, || listener.accept());
                let (socket, peer) = accepted.await?;
                Accepted::vsock(socket.into(), vsock(&peer))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use tokio::io::AsyncReadExt;

    use super::*;

    /// Few machines have a loopback for sockets of virtual machines: a socket file stands in, which
    /// the host accepts from, reads and writes in the same way.
    #[test]
    fn a_listener_that_is_watched_by_hand_lets_clients_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let socket = OwnedFd::from(UnixListener::bind(&path).unwrap()).into();
        let listener = Listener { socket: Socket::Vsock(socket), file: None };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let acceptor = listener.register().unwrap();
            for _ in 0..3 {
                // The first one waits before anybody comes.
                let comes = async {
                    tokio::task::yield_now().await;
                    UnixStream::connect(&path).unwrap().write_all(b"hello").unwrap();
                };
                let (accepted, ()) = tokio::join!(acceptor.accept(), comes);
                let mut text = String::new();
                let mut stream = accepted.unwrap().register().unwrap();
                stream.read_to_string(&mut text).await.unwrap();
                assert_eq!(text, "hello");
            }
        });
    }

    #[test]
    fn what_was_inherited_is_known_by_its_family() {
        let tcp = TcpListener::bind("[::1]:0").unwrap();
        let name = tcp.local_addr().unwrap().to_string();
        assert_eq!(Listener::inherited(tcp.into()).unwrap().name(), name);
        let folder = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(folder.path().join("sock")).unwrap();
        assert!(Listener::inherited(unix.into()).unwrap().name().ends_with("/sock"));
        let (connected, _other) = UnixStream::pair().unwrap();
        let error = Listener::inherited(connected.into()).unwrap_err();
        assert!(error.to_string().contains("does not listen"), "{error}");
        assert!(Listener::inherited(fs::File::open("/dev/null").unwrap().into()).is_err());
    }
}
