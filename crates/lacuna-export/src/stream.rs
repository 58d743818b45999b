//! The socket of one client, of whatever kind, with TLS on it or without.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use lacuna_tls::ServerTls;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

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

    /// A connected stream is read and written in one way, whatever family its addresses are of:
    /// the type of a Unix socket does for one of a virtual machine.
    pub(crate) fn vsock(socket: OwnedFd, peer: String) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: Raw::Unix(socket), peer })
    }

    /// Makes it one of the runtime that calls.
    pub(crate) fn register(self) -> io::Result<Stream> {
        Ok(Stream::Plain(match self.socket {
            Raw::Tcp(socket) => Socket::Tcp(TcpStream::from_std(socket)?),
            Raw::Unix(socket) => Socket::Unix(UnixStream::from_std(socket)?),
        }))
    }
}

/// Bytes from and to a client, as they are on the wire.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Own(Box<dyn OwnStream>),
}

/// A stream that the caller has.
pub(crate) trait OwnStream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> OwnStream for S {}

/// Bytes from and to a client.
pub(crate) enum Stream {
    Plain(Socket),
    /// In a box: it has a kilobyte of state, which plain connections do not pay for.
    Tls(Box<TlsStream<Socket>>),
}

impl Stream {
    /// Takes a stream that the caller has.
    pub(crate) fn own(stream: impl OwnStream + 'static) -> Self {
        Self::Plain(Socket::Own(Box::new(stream)))
    }

    /// Shakes hands as the server of TLS.
    pub(crate) async fn secure(self, tls: &ServerTls) -> io::Result<Self> {
        match self {
            Self::Plain(socket) => {
                let acceptor = TlsAcceptor::from(Arc::clone(tls.config()));
                Ok(Self::Tls(Box::new(acceptor.accept(socket).await?)))
            }
            Self::Tls(_) => Err(io::Error::other("TLS within TLS")),
        }
    }

    pub(crate) const fn is_secure(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Says that nothing more comes, where a client could not tell that from a cut wire; does not
    /// wait for a client that takes nothing.
    pub(crate) fn poll_farewell(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Tls(stream) = self {
            let _it_left_already = Pin::new(stream).poll_shutdown(cx);
        }
        Poll::Ready(())
    }
}

/// Calls a method of whichever it is.
macro_rules! each {
    ($self:ident, $($kind:ident)|*, $method:ident $arguments:tt) => {
        match Pin::get_mut($self) {
            $(Self::$kind(socket) => each!(@call socket.$method $arguments),)*
        }
    };
    (@call $socket:ident.$method:ident($($argument:expr),*)) => {
        Pin::new($socket).$method($($argument),*)
    };
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, Tcp | Unix | Own, poll_read(cx, buffer))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::get_mut(self) {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::Tls(stream) => end_for_cut(Pin::new(stream).poll_read(cx, buffer)),
        }
    }
}

/// Takes a client that leaves without a word of TLS for one that left.
///
/// Whoever cuts the wire cannot make us do what was not asked: a request of which a part is
/// missing is never begun.
fn end_for_cut(read: Poll<io::Result<()>>) -> Poll<io::Result<()>> {
    match read {
        Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Poll::Ready(Ok(()))
        }
        other => other,
    }
}

macro_rules! writes {
    ($type:ty, $($kind:ident)|*) => {
        impl AsyncWrite for $type {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                each!(self, $($kind)|*, poll_write(cx, bytes))
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                parts: &[IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                each!(self, $($kind)|*, poll_write_vectored(cx, parts))
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                each!(self, $($kind)|*, poll_flush(cx))
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                each!(self, $($kind)|*, poll_shutdown(cx))
            }
        }
    };
}

writes!(Socket, Tcp | Unix | Own);
writes!(Stream, Plain | Tls);
