//! The socket of one client, of whatever kind.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A socket on its way to the worker that will serve it.
pub(crate) struct Accepted {
    socket: Raw,
    /// Who it is, for lists.
    pub(crate) peer: String,
}

enum Raw {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Accepted {
    /// Small replies go out at once: a client waits for them.
    pub(crate) fn tcp(socket: std::net::TcpStream, peer: SocketAddr) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        Ok(Self { socket: Raw::Tcp(socket), peer: peer.to_string() })
    }

    pub(crate) fn unix(socket: std::os::unix::net::UnixStream) -> Self {
        Self { socket: Raw::Unix(socket), peer: "unix".into() }
    }

    /// Makes it one of the runtime that calls.
    pub(crate) fn register(self) -> io::Result<Stream> {
        Ok(match self.socket {
            Raw::Tcp(socket) => Stream::Tcp(TcpStream::from_std(socket)?),
            Raw::Unix(socket) => Stream::Unix(UnixStream::from_std(socket)?),
        })
    }
}

/// Bytes from and to a client.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Calls a method of whichever socket it is.
macro_rules! each {
    ($self:ident, $method:ident($($argument:expr),*)) => {
        match Pin::get_mut($self) {
            Self::Tcp(socket) => Pin::new(socket).$method($($argument),*),
            Self::Unix(socket) => Pin::new(socket).$method($($argument),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, poll_read(cx, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, poll_write_vectored(cx, parts))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_shutdown(cx))
    }
}
