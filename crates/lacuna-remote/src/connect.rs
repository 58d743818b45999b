//! From an address to an agreed connection.

use std::io;
use std::time::Duration;

use lacuna::{Error, ErrorKind, Result};
use lacuna_nbd::client::{Event, ExportInfo, Handshake, TlsWish, Transmission, Wish};
use lacuna_nbd::context::BASE_ALLOCATION;
use lacuna_nbd::wire::TransmissionFlags;
use lacuna_nbd::{Address, Uri};
use lacuna_tls::Target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

use crate::runtime::Runtime;
use crate::stream::Stream;
use crate::wording::{hung_up, lost, of_protocol};

/// Longest time from the first packet to an agreement.
const HANDSHAKE_BOUND: Duration = Duration::from_secs(60);
/// How long to wait before the second try; each wait is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What is read at once while options are haggled over.
const READ_BYTES: usize = 16 << 10;

/// Where the server is, and how to talk to it.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    pub(crate) uri: Uri,
    pub(crate) tls: Option<Target>,
    pub(crate) writes: bool,
    /// What block status is asked of, where not `base:allocation`.
    pub(crate) context: Option<String>,
    pub(crate) runtime: Runtime,
}

/// A connection that both sides agree on.
pub(crate) struct Connected {
    pub(crate) stream: Stream,
    pub(crate) transmission: Box<Transmission>,
    /// What came behind the handshake.
    pub(crate) received: Vec<u8>,
}

/// Why there is no connection.
pub(crate) struct Failed {
    pub(crate) error: Error,
    /// Whether it may be different in a moment.
    may_pass: bool,
}

impl Failed {
    fn for_good(error: Error) -> Self {
        Self { error, may_pass: false }
    }

    fn of_io(error: io::Error) -> Self {
        Self { may_pass: lacuna_tls::explain(&error).is_none(), error: lost(error) }
    }
}

impl Endpoint {
    /// Tries to connect until `deadline`, at least once. A deadline that has not passed bounds each
    /// try; the only try has [`HANDSHAKE_BOUND`].
    pub(crate) async fn connect_until(&self, deadline: Instant) -> Result<Connected> {
        let mut pause = FIRST_PAUSE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let bound = if left.is_zero() { HANDSHAKE_BOUND } else { left.min(HANDSHAKE_BOUND) };
            let failed = match self.connect_once(bound).await {
                Ok(connected) => return Ok(connected),
                Err(failed) => failed,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if !failed.may_pass || left.is_zero() {
                return Err(failed.error);
            }
            sleep(pause.min(left)).await;
            if deadline <= Instant::now() {
                return Err(failed.error);
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn connect_once(&self, bound: Duration) -> Result<Connected, Failed> {
        timeout(bound, self.attempt()).await.unwrap_or_else(|_| {
            let late = io::Error::from(io::ErrorKind::TimedOut);
            let doing = format!("Waiting {bound:.1?} for the server to agree");
            Err(Failed { error: Error::io(late, doing), may_pass: true })
        })
    }

    async fn attempt(&self) -> Result<Connected, Failed> {
        let stream = self.stream().await.map_err(|error| Failed {
            error: Error::io(error, format!("Connecting to {}", place(&self.uri.address))),
            may_pass: true,
        })?;
        let connected = self.shake_hands(stream).await?;
        self.judge(connected.transmission.info()).map_err(Failed::for_good)?;
        Ok(connected)
    }

    async fn stream(&self) -> io::Result<Stream> {
        match &self.runtime {
            Runtime::Given(surroundings) => surroundings.connect().map(Stream::given),
            Runtime::Sockets(_) => Stream::connect(&self.uri.address).await,
        }
    }

    async fn shake_hands(&self, mut stream: Stream) -> Result<Connected, Failed> {
        let mut handshake = Handshake::new(self.wish());
        let mut received = Vec::new();
        loop {
            let mut rest = &received[..];
            let event = handshake.advance(&mut rest);
            let taken = received.len() - rest.len();
            received.drain(..taken);
            let output = handshake.take_output();
            let sent = send(&mut stream, &output).await;
            let event = event.map_err(|error| Failed::for_good(of_protocol(&error)))?;
            sent.map_err(Failed::of_io)?;
            match event {
                Event::NeedInput => read_more(&mut stream, &mut received).await?,
                Event::StartTls => {
                    received.clear();
                    stream = self.secured(stream).await?;
                    handshake.tls_established();
                }
                Event::Transmission(transmission) => {
                    return Ok(Connected { stream, transmission, received });
                }
                _ => {
                    return Err(Failed::for_good(hung_up()));
                }
            }
        }
    }

    async fn secured(&self, stream: Stream) -> Result<Stream, Failed> {
        let Some(target) = &self.tls else {
            return Err(Failed::for_good(Error::invalid("TLS was not asked for")));
        };
        stream.secure(target).await.map_err(Failed::of_io)
    }

    fn wish(&self) -> Wish {
        Wish {
            tls: if self.tls.is_some() { TlsWish::Required } else { TlsWish::Never },
            contexts: vec![self.context.clone().unwrap_or_else(|| BASE_ALLOCATION.into())],
            ..Wish::to_use(self.uri.export.clone())
        }
    }

    /// Refuses what cannot be used.
    fn judge(&self, info: &ExportInfo) -> Result<()> {
        if self.writes && info.flags.contains(TransmissionFlags::READ_ONLY) {
            let text = "The export is read-only; it can be opened for reading alone";
            return Err(Error::new(ErrorKind::ReadOnly, text));
        }
        if let (Some(context), []) = (&self.context, &info.contexts[..]) {
            let text = format!("The export has no meta context {context}");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        let unit = info.block_sizes.minimum();
        match info.size_bytes.is_multiple_of(unit.into()) {
            true => Ok(()),
            false => Err(Error::unsupported(format!(
                "The export has {} bytes, which is no multiple of its smallest block, {unit}: its \
                 end cannot be read",
                info.size_bytes
            ))),
        }
    }
}

/// Returns what people call an address.
fn place(address: &Address) -> String {
    match address {
        Address::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
        Address::Tcp { host, port } => format!("{host}:{port}"),
        Address::Unix(path) => String::from_utf8_lossy(path).replace('\0', "@"),
        Address::Vsock { cid, port } => format!("vsock:{cid}:{port}"),
    }
}

async fn send(stream: &mut Stream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

async fn read_more(stream: &mut Stream, received: &mut Vec<u8>) -> Result<(), Failed> {
    let old = received.len();
    received.resize(old + READ_BYTES, 0);
    let read = stream.read(&mut received[old..]).await.map_err(Failed::of_io)?;
    received.truncate(old + read);
    match read {
        0 => Err(Failed { error: hung_up(), may_pass: true }),
        _ => Ok(()),
    }
}
