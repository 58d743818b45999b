//! Requests in, replies out.
//!
//! * Requests of one receive are started before anything is sent, and their replies go out together,
//!   until [`ENOUGH_TO_SEND_BYTES`] wait: more memory would be touched for the first time, and be cold
//!   when it is sent.
//! * A request is taken only while the limits allow one more; the socket fills up meanwhile, and the
//!   client waits, and nobody else.
//! * A client that disconnects, or a server that stops, waits for what is in flight.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use lacuna::buffer::Buffer;
use lacuna_nbd::server::{Request, Transmission, TransmissionEvent, WantedContexts};
use tokio::io::{AsyncRead, ReadBuf};

use super::Scratch;
use super::execute::{Job, execute};
use super::in_flight::InFlight;
use super::output::Output;
use super::reply::{Part, Reply};
use super::shake::Ready;
use super::status::Wanted;
use super::unread::Unread;
use crate::export::Guest;
use crate::population::{Stopping, Traffic};
use crate::server::Limits;
use crate::stream::Stream;
use crate::{Export, ServedDisk};

/// A rest of a payload that is at least this long is received where it belongs.
const DIRECT_FROM_BYTES: usize = 16 << 10;
/// Replies of so many bytes go out before more requests are taken.
const ENOUGH_TO_SEND_BYTES: u64 = 1 << 20;

/// Serves until the client leaves or the server ends.
pub(super) async fn until_the_end<D: ServedDisk>(
    ready: Ready<D>,
    limits: Limits,
    mut stopping: Stopping,
    scratch: Scratch,
    traffic: Arc<Traffic>,
) -> io::Result<()> {
    let Ready { stream, transmission, guest, early } = ready;
    let (replies, export) = (transmission.replies(), Arc::clone(guest.export()));
    traffic.received_bytes.add(early.len());
    let start = move |job| execute(Arc::clone(&export), replies, job);
    let mut connection = Connection {
        stream,
        transmission,
        guest,
        limits,
        scratch,
        start,
        in_flight: InFlight::new(),
        output: Output::default(),
        unread: Unread::new(early),
        payload: None,
        is_ending: false,
        traffic,
    };
    connection.run_until(&mut stopping).await?;
    poll_fn(|cx| connection.stream.poll_farewell(cx)).await;
    Ok(())
}

struct Connection<D, F, S> {
    stream: Stream,
    transmission: Transmission,
    guest: Guest<D>,
    limits: Limits,
    scratch: Scratch,
    /// Makes the future of a request.
    start: S,
    in_flight: InFlight<F>,
    output: Output,
    unread: Unread,
    payload: Option<Payload>,
    /// Nothing more is received.
    is_ending: bool,
    traffic: Arc<Traffic>,
}

/// A write whose bytes are arriving.
struct Payload {
    request: Request,
    buffer: Buffer,
    filled: usize,
}

/// What receiving came to.
enum Received {
    Nothing,
    Something,
}

impl<D, F, S> Connection<D, F, S>
where
    D: ServedDisk,
    F: Future<Output = Reply>,
    S: Fn(Job) -> F,
{
    async fn run_until(&mut self, stopping: &mut Stopping) -> io::Result<()> {
        tokio::select! {
            ended = self.run() => return ended,
            () = stopping.begun() => {}
        }
        self.is_ending = true;
        tokio::select! {
            ended = self.run() => ended,
            () = stopping.overdue() => Ok(()),
        }
    }

    async fn run(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while let Some(reply) = self.in_flight.poll_next(cx) {
                self.answer(reply);
            }
            self.traffic.in_flight.set(self.in_flight.len() as u64);
            let waiting = self.output.bytes();
            let sent = self.output.poll_send(&mut self.stream, cx)?;
            self.traffic.sent_bytes.add((waiting - self.output.bytes()) as usize);
            if self.is_ending && self.in_flight.len() == 0 && sent.is_ready() {
                return Poll::Ready(Ok(()));
            }
            if self.is_ending || !self.has_room() {
                return Poll::Pending;
            }
            match self.receive(cx)? {
                Received::Something => {}
                Received::Nothing => {
                    self.rest();
                    return Poll::Pending;
                }
            }
        }
    }

    /// Says whether one more request may be taken.
    fn has_room(&self) -> bool {
        self.output.memory_bytes() < ENOUGH_TO_SEND_BYTES
            && self.in_flight.len() < self.limits.requests
            && self.in_flight.weight() + self.output.memory_bytes() < self.limits.bytes
    }

    /// Keeps no memory for a client that is quiet.
    fn rest(&mut self) {
        if self.in_flight.len() == 0 && self.output.is_empty() {
            self.in_flight.shrink();
            self.output.shrink();
        }
    }

    fn export(&self) -> &Export<D> {
        self.guest.export()
    }

    fn answer(&mut self, reply: Reply) {
        reply.parts.into_iter().for_each(|part| self.output.push(part));
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> io::Result<Received> {
        if !self.unread.is_empty() {
            return self.take_unread(cx);
        }
        if self.payload.as_ref().is_some_and(|it| it.buffer.len() - it.filled >= DIRECT_FROM_BYTES)
        {
            return self.receive_payload(cx);
        }
        let scratch = std::rc::Rc::clone(&self.scratch);
        let mut scratch = scratch.borrow_mut();
        let mut piece = ReadBuf::new(&mut scratch);
        if Pin::new(&mut self.stream).poll_read(cx, &mut piece)?.is_pending() {
            return Ok(Received::Nothing);
        }
        if piece.filled().is_empty() {
            self.is_ending = true;
        }
        self.traffic.received_bytes.add(piece.filled().len());
        let taken = self.take(piece.filled(), cx)?;
        self.unread = Unread::new(piece.filled()[taken..].to_vec());
        Ok(Received::Something)
    }

    /// Goes on where there was no room for more.
    fn take_unread(&mut self, cx: &mut Context<'_>) -> io::Result<Received> {
        let mut unread = std::mem::take(&mut self.unread);
        unread.took(self.take(unread.rest(), cx)?);
        self.unread = unread;
        Ok(Received::Something)
    }

    /// Receives the rest of a payload into its own buffer.
    fn receive_payload(&mut self, cx: &mut Context<'_>) -> io::Result<Received> {
        let Some(payload) = &mut self.payload else { return Ok(Received::Nothing) };
        let mut piece = ReadBuf::new(&mut payload.buffer[payload.filled..]);
        if Pin::new(&mut self.stream).poll_read(cx, &mut piece)?.is_pending() {
            return Ok(Received::Nothing);
        }
        let len = piece.filled().len();
        payload.filled += len;
        self.traffic.received_bytes.add(len);
        self.transmission.payload_taken(len as u64);
        self.is_ending = len == 0;
        self.write_if_whole(cx);
        Ok(Received::Something)
    }

    /// Starts the requests in what was received that there is room for; returns how many bytes
    /// those were.
    fn take(&mut self, received: &[u8], cx: &mut Context<'_>) -> io::Result<usize> {
        let mut input = received;
        let size_bytes = self.export().disk().size_bytes();
        if self.transmission.size_bytes() != size_bytes {
            self.transmission.set_size_bytes(size_bytes);
        }
        let replies = self.transmission.replies();
        while self.has_room() && !self.is_ending {
            match self.transmission.advance(&mut input).map_err(io::Error::other)? {
                TransmissionEvent::NeedInput => break,
                TransmissionEvent::Disconnect => self.is_ending = true,
                TransmissionEvent::Rejected(rejection) => {
                    self.traffic.requests.add(1);
                    let mut text = Vec::new();
                    replies.rejection(&rejection, &mut text);
                    self.output.push(Part::Text(text));
                }
                TransmissionEvent::Write(request) => {
                    let buffer = Buffer::new(request.range.len as usize);
                    self.payload = Some(Payload { request, buffer, filled: 0 });
                    self.write_if_whole(cx);
                }
                TransmissionEvent::Payload(bytes) => {
                    if let Some(payload) = &mut self.payload {
                        payload.buffer[payload.filled..][..bytes.len()].copy_from_slice(bytes);
                        payload.filled += bytes.len();
                    }
                    self.write_if_whole(cx);
                }
                TransmissionEvent::BlockStatus(request, wanted) => {
                    let wanted = self.wanted(&wanted);
                    self.begin(Job::Status(request, wanted), cx);
                }
                TransmissionEvent::Request(request) => self.begin(Job::Plain(request), cx),
            }
        }
        Ok(received.len() - input.len())
    }

    fn wanted(&self, wanted: &WantedContexts) -> Wanted {
        let chosen = self.transmission.contexts().iter().map(|context| context.id);
        chosen.filter(|id| wanted.wants(*id)).collect()
    }

    fn write_if_whole(&mut self, cx: &mut Context<'_>) {
        if let Some(payload) = self.payload.take_if(|it| it.filled == it.buffer.len()) {
            self.begin(Job::Write(payload.request, payload.buffer), cx);
        }
    }

    fn begin(&mut self, job: Job, cx: &mut Context<'_>) {
        self.traffic.requests.add(1);
        let weight = job.weight();
        if let Some(reply) = self.in_flight.start((self.start)(job), weight, cx) {
            self.answer(reply);
        }
    }
}
