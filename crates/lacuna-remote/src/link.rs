//! One connection: requests out, replies in, as they come.
//!
//! * Always: whatever the link was doing when the connection broke is still in `flights`, to be
//!   asked again elsewhere or answered with an error.
//! * Always bounded: [`MAX_IN_FLIGHT`] requests, one read buffer of [`INPUT_BYTES`].
//! * Never copied: the bytes of a write, and those of a read of [`DIRECT_BYTES`] or more.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll};

use lacuna::{Error, Result};
use lacuna_nbd::client::{Ask, Command, Failure, Transmission, TransmissionEvent};
use lacuna_nbd::{ByteRange, Cookie, HeaderBytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::connect::Connected;
use crate::request::{Request, StatusRun};
use crate::stream::Stream;
use crate::wording::{hung_up, lost, of_failure, of_protocol};

/// Most requests that wait for their replies; more wait in the queue.
const MAX_IN_FLIGHT: usize = 64;
const INPUT_BYTES: usize = 64 << 10;
/// A read with so much of it missing goes where it belongs without a stop.
const DIRECT_BYTES: u64 = 16 << 10;
/// Most runs of a block status that are kept; the caller asks again behind them.
const MAX_RUNS: usize = 4096;
/// Most parts that go out in one call.
const MAX_PARTS: usize = 64;

/// A connection and what is under way on it.
pub(crate) struct Link {
    stream: Stream,
    transmission: Box<Transmission>,
    flights: HashMap<Cookie, Flight>,
    outgoing: VecDeque<Outgoing>,
    needs_flush: bool,
    input: Input,
    /// Where the next bytes of a read go.
    place: Option<(Cookie, usize)>,
    answers: u64,
}

/// A request that waits for its reply.
struct Flight {
    request: Request,
    runs: Vec<StatusRun>,
    /// The answer, where it came before all of the request had left.
    early: Option<Result<()>>,
}

/// A request that has not left yet, or in part.
struct Outgoing {
    header: HeaderBytes,
    cookie: Cookie,
    sent: usize,
}

/// Bytes that came and were not looked at yet.
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// How a link ended.
pub(crate) enum End {
    /// Nobody asks any more, and the server was told.
    Closed,
    /// The connection broke.
    Lost(Error),
    /// The server broke the protocol, and is not to be trusted.
    Broken(Error),
}

impl Link {
    pub(crate) fn new(connected: Connected) -> Self {
        let Connected { stream, transmission, received } = connected;
        Self {
            stream,
            transmission,
            flights: HashMap::new(),
            outgoing: VecDeque::new(),
            needs_flush: false,
            input: Input::new(&received),
            place: None,
            answers: 0,
        }
    }

    /// Serves requests until nobody can ask any more, or the connection ends.
    pub(crate) async fn run(&mut self, queue: &mut UnboundedReceiver<Request>) -> End {
        poll_fn(|cx| self.poll(cx, queue)).await
    }

    /// Returns how many requests were answered by the server.
    pub(crate) const fn answers(&self) -> u64 {
        self.answers
    }

    /// Sends a request.
    pub(crate) fn start(&mut self, request: Request) {
        self.learn_size(request.common.size_bytes());
        let ask = Ask::new(request.wanted.command, request.wanted.range);
        match self.transmission.request(&ask.with(request.wanted.flags)) {
            Ok((cookie, header)) => {
                self.outgoing.push_back(Outgoing { header, cookie, sent: 0 });
                self.flights.insert(cookie, Flight { request, runs: Vec::new(), early: None });
            }
            Err(error) => request.answer(Err(of_protocol(&error)), Vec::new()),
        }
    }

    /// Takes the size that the export has since a resize, on whichever connection.
    fn learn_size(&mut self, size_bytes: u64) {
        if self.transmission.info().size_bytes != size_bytes {
            self.transmission.set_size_bytes(size_bytes);
        }
    }

    /// Gives up what was not answered.
    pub(crate) fn into_requests(self) -> Vec<Request> {
        // In the order of asking: what is asked again takes the same way each time.
        let mut flights: Vec<_> = self.flights.into_iter().collect();
        flights.sort_unstable_by_key(|(cookie, _)| cookie.0);
        let flights = flights.into_iter().map(|(_, flight)| flight);
        let (early, open): (Vec<Flight>, Vec<Flight>) =
            flights.partition(|flight| flight.early.is_some());
        early.into_iter().for_each(Flight::finish);
        open.into_iter().map(|flight| flight.request).collect()
    }

    fn poll(&mut self, cx: &mut Context<'_>, queue: &mut UnboundedReceiver<Request>) -> Poll<End> {
        loop {
            let is_closed = self.poll_queue(cx, queue);
            let wrote = match self.poll_write(cx) {
                Ok(wrote) => wrote,
                Err(error) => return Poll::Ready(End::Lost(error)),
            };
            if is_closed && self.flights.is_empty() {
                return self.poll_goodbye(cx);
            }
            let read = match self.poll_read(cx) {
                Ok(read) => read,
                Err(end) => return Poll::Ready(end),
            };
            if !wrote && !read {
                return Poll::Pending;
            }
        }
    }

    /// Takes what is asked, as far as there is room; true where nobody can ask any more.
    fn poll_queue(&mut self, cx: &mut Context<'_>, queue: &mut UnboundedReceiver<Request>) -> bool {
        while self.flights.len() < MAX_IN_FLIGHT {
            match queue.poll_recv(cx) {
                Poll::Ready(Some(request)) => self.start(request),
                Poll::Ready(None) => return true,
                Poll::Pending => return false,
            }
        }
        false
    }

    /// Sends what waits; true where something left.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<bool> {
        let mut wrote = false;
        while !self.outgoing.is_empty() {
            let parts = parts(&self.outgoing, &self.flights);
            let written = Pin::new(&mut self.stream).poll_write_vectored(cx, &parts);
            drop(parts);
            match written {
                Poll::Ready(Ok(0)) => return Err(hung_up()),
                Poll::Ready(Ok(len)) => self.sent(len),
                Poll::Ready(Err(error)) => return Err(lost(error)),
                Poll::Pending => return Ok(wrote),
            }
            (wrote, self.needs_flush) = (true, true);
        }
        if self.needs_flush {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.needs_flush = false,
                Poll::Ready(Err(error)) => return Err(lost(error)),
                Poll::Pending => {}
            }
        }
        Ok(wrote)
    }

    /// Notes that `len` bytes left.
    fn sent(&mut self, mut len: usize) {
        while let Some(first) = self.outgoing.front_mut() {
            let left = first.bytes(&self.flights) - first.sent;
            if len < left {
                first.sent += len;
                return;
            }
            len -= left;
            let cookie = first.cookie;
            self.outgoing.pop_front();
            if self.flights.get(&cookie).is_some_and(|flight| flight.early.is_some())
                && let Some(flight) = self.flights.remove(&cookie)
            {
                flight.finish();
            }
        }
    }

    /// Says goodbye. The server may be gone already, which is all the same now.
    fn poll_goodbye(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let goodbye = self.transmission.disconnect();
        let mut stream = Pin::new(&mut self.stream);
        let sent = stream.as_mut().poll_write(cx, &goodbye);
        if matches!(sent, Poll::Ready(Ok(_))) {
            let _whether_it_arrives_or_not = stream.as_mut().poll_flush(cx);
            let _whether_it_arrives_or_not = stream.poll_shutdown(cx);
        }
        Poll::Ready(End::Closed)
    }

    /// Takes what came; true where something did.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let found = self.look()?;
        let len = match self.poll_receive(cx) {
            Poll::Pending => return Ok(found),
            Poll::Ready(received) => received.map_err(|error| End::Lost(lost(error)))?,
        };
        match len {
            0 => Err(End::Lost(hung_up())),
            _ => self.look().map(|_| true),
        }
    }

    /// Receives bytes: a large part of a read where it belongs, all else into `input`.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<usize>> {
        let missing = self.transmission.payload_remaining();
        let stream = Pin::new(&mut self.stream);
        if missing >= DIRECT_BYTES
            && let Some((cookie, at)) = self.place
            && let Some(flight) = self.flights.get_mut(&cookie)
        {
            let room = &mut flight.request.buffer[at..at + missing as usize];
            let mut target = ReadBuf::new(room);
            std::task::ready!(stream.poll_read(cx, &mut target))?;
            let len = target.filled().len();
            self.transmission.payload_taken(len as u64);
            self.place = Some((cookie, at + len));
            return Poll::Ready(Ok(len));
        }
        self.input.poll_fill(cx, stream)
    }

    /// Takes what `input` has.
    fn look(&mut self) -> Result<bool, End> {
        let mut found = false;
        loop {
            let (before, mut rest) = (self.input.end - self.input.start, self.input.rest());
            let event = self.transmission.advance(&mut rest);
            let taken = before - rest.len();
            let event = event.map_err(|error| End::Broken(of_protocol(&error)))?;
            match event {
                TransmissionEvent::NeedInput => {
                    self.input.start += taken;
                    return Ok(found);
                }
                TransmissionEvent::Payload(bytes) => {
                    if let Some((cookie, at)) = self.place
                        && let Some(flight) = self.flights.get_mut(&cookie)
                    {
                        flight.request.buffer[at..at + bytes.len()].copy_from_slice(bytes);
                        self.place = Some((cookie, at + bytes.len()));
                    }
                }
                TransmissionEvent::Data { cookie, range } => {
                    let flight = self.flights.get(&cookie);
                    self.place = flight.map(|flight| (cookie, flight.place(range)));
                }
                TransmissionEvent::Hole { cookie, range } => {
                    if let Some(flight) = self.flights.get_mut(&cookie) {
                        let at = flight.place(range);
                        flight.request.buffer[at..at + range.len as usize].fill(0);
                    }
                }
                TransmissionEvent::Extent { cookie, range, flags, .. } => {
                    if let Some(flight) = self.flights.get_mut(&cookie) {
                        flight.add_run(range.len, flags);
                    }
                }
                TransmissionEvent::Done { cookie, result } => {
                    self.answers += 1;
                    self.done(cookie, result);
                }
            }
            self.input.start += taken;
            found = true;
        }
    }

    fn done(&mut self, cookie: Cookie, result: Result<(), Box<Failure>>) {
        let Some(mut flight) = self.flights.remove(&cookie) else { return };
        let wanted = flight.request.wanted;
        flight.early =
            Some(result.map_err(|failure| of_failure(&failure, wanted.command, wanted.range)));
        match self.outgoing.iter().any(|outgoing| outgoing.cookie == cookie) {
            // The server still reads it.
            true => drop(self.flights.insert(cookie, flight)),
            false => flight.finish(),
        }
    }
}

impl Flight {
    fn place(&self, range: ByteRange) -> usize {
        (range.start - self.request.wanted.range.start) as usize
    }

    fn add_run(&mut self, len: u64, status: u64) {
        // What follows is asked about again.
        if self.runs.len() == MAX_RUNS {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if last.status == status => last.len += len,
            _ => self.runs.push(StatusRun { len, status }),
        }
    }

    fn finish(self) {
        if let Some(result) = self.early {
            self.request.answer(result, self.runs);
        }
    }

    fn payload(&self) -> &[u8] {
        match self.request.wanted.command {
            Command::Write => &self.request.buffer,
            _ => &[],
        }
    }
}

impl Outgoing {
    fn bytes(&self, flights: &HashMap<Cookie, Flight>) -> usize {
        self.header.len() + flights.get(&self.cookie).map_or(0, |flight| flight.payload().len())
    }
}

/// The first parts of what is to leave.
fn parts<'a>(
    outgoing: &'a VecDeque<Outgoing>,
    flights: &'a HashMap<Cookie, Flight>,
) -> Vec<IoSlice<'a>> {
    let mut parts = Vec::with_capacity(MAX_PARTS.min(2 * outgoing.len()));
    for one in outgoing.iter().take(MAX_PARTS / 2) {
        let payload = flights.get(&one.cookie).map_or(&[][..], Flight::payload);
        let in_header = one.sent.min(one.header.len());
        let in_payload = one.sent - in_header;
        for part in [&one.header[in_header..], &payload[in_payload..]] {
            if !part.is_empty() {
                parts.push(IoSlice::new(part));
            }
        }
    }
    parts
}

impl Input {
    fn new(received: &[u8]) -> Self {
        let mut bytes = vec![0; INPUT_BYTES.max(received.len())];
        bytes[..received.len()].copy_from_slice(received);
        Self { bytes: bytes.into(), start: 0, end: received.len() }
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Reads more, behind what is left or from the front again.
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        stream: Pin<&mut Stream>,
    ) -> Poll<std::io::Result<usize>> {
        // All that came was taken: the protocol's machine keeps what is incomplete.
        debug_assert_eq!(self.start, self.end);
        (self.start, self.end) = (0, 0);
        let mut target = ReadBuf::new(&mut self.bytes);
        std::task::ready!(stream.poll_read(cx, &mut target))?;
        self.end = target.filled().len();
        Poll::Ready(Ok(self.end))
    }
}
