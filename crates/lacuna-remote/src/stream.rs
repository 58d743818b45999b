//! The socket to a server, with TLS on it or without.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use lacuna_nbd::Address;
use lacuna_tls::Target;
use socket2::{Domain, SockAddr, SockRef, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::runtime::Duplex;

/// Bytes from and to a server, as they are on the wire.
pub(crate) enum Socket {
    Tcp(TcpStream),
    /// Of virtual machines as well: a connected stream is one, whatever its addresses are like.
    Unix(UnixStream),
    Given(Box<dyn Duplex>),
}

/// Bytes from and to a server.
pub(crate) enum Stream {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

impl Stream {
    /// Connects to a server.
    pub(crate) async fn connect(address: &Address) -> io::Result<Self> {
        let socket = match address {
            Address::Tcp { host, port } => tcp(host, *port).await?,
            Address::Unix(path) => unix(path).await?,
            Address::Vsock { cid, port } => vsock(*cid, *port).await?,
        };
        Ok(Self::Plain(socket))
    }

    /// Takes bytes from and to a server that somebody else is connected to.
    pub(crate) fn given(socket: Box<dyn Duplex>) -> Self {
        Self::Plain(Socket::Given(socket))
    }

    /// Shakes hands as a client of TLS.
    pub(crate) async fn secure(self, target: &Target) -> io::Result<Self> {
        match self {
            Self::Plain(socket) => {
                let connector = TlsConnector::from(target.config.clone());
                let stream = connector.connect(target.name.clone(), socket).await?;
                Ok(Self::Tls(Box::new(stream)))
            }
            Self::Tls(_) => Err(io::Error::other("TLS within TLS")),
        }
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<Socket> {
    let stream = TcpStream::connect((host, port)).await?;
    // Small requests go out at once: somebody waits for them.
    stream.set_nodelay(true)?;
    // A server that is gone without a word is noticed one day.
    SockRef::from(&stream).set_keepalive(true)?;
    Ok(Socket::Tcp(stream))
}

async fn unix(path: &[u8]) -> io::Result<Socket> {
    use std::os::unix::ffi::OsStrExt;
    // A NUL in front makes an abstract name.
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(path));
    Ok(Socket::Unix(UnixStream::connect(path).await?))
}

/// The kernel has no way to wait for such a connection but with a thread.
async fn vsock(cid: u32, port: u32) -> io::Result<Socket> {
    let connecting = tokio::task::spawn_blocking(move || {
        let socket = socket2::Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        socket.connect(&SockAddr::vsock(cid, port))?;
        socket.set_nonblocking(true)?;
        Ok::<_, io::Error>(OwnedFd::from(socket))
    });
    let socket = std::os::unix::net::UnixStream::from(connecting.await??);
    Ok(Socket::Unix(UnixStream::from_std(socket)?))
}

/// Calls a method of whichever it is.
macro_rules! each {
    ($self:ident, [$($kind:ident)*], $socket:ident => $call:expr) => {
        match Pin::get_mut($self) {
            $(Self::$kind(socket) => {
                let $socket = Pin::new(socket);
                $call
            })*
        }
    };
}

macro_rules! both_ways {
    ($type:ty, $kinds:tt) => {
        impl AsyncRead for $type {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                each!(self, $kinds, socket => socket.poll_read(cx, buffer))
            }
        }

        impl AsyncWrite for $type {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                each!(self, $kinds, socket => socket.poll_write(cx, bytes))
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                parts: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                each!(self, $kinds, socket => socket.poll_write_vectored(cx, parts))
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                each!(self, $kinds, socket => socket.poll_flush(cx))
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                each!(self, $kinds, socket => socket.poll_shutdown(cx))
            }
        }
    };
}

both_ways!(Socket, [Tcp Unix Given]);
both_ways!(Stream, [Plain Tls]);
