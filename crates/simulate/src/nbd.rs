//! A guest that is a client of a server, over a wire.

use std::collections::HashMap;
use std::io;
use std::pin::pin;

use lacuna::block::ZeroFlags;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna_export::Limits;
use lacuna_nbd::client::{
    Ask, Event, Failure, Handshake, Headers, TlsWish, Transmission, TransmissionEvent, Wish,
};
use lacuna_nbd::context::BASE_ALLOCATION;
use lacuna_nbd::wire::{AllocationFlags, CommandFlags, ErrorCode};
use lacuna_nbd::{ByteRange, Command, Cookie, ExportName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::guest::{Answer, Asked, Truth, within};
use crate::scenario::{NbdForm, Request, What};
use crate::wire::End;

/// Bytes that are received at a time.
const PIECE_BYTES: usize = 1000;

/// A connection that is ready for requests.
struct Session {
    end: End,
    transmission: Transmission,
    received: Vec<u8>,
    waiting: HashMap<Cookie, (Asked, Answer)>,
}

/// Asks in bursts; leaves in order, or by cutting the wire.
pub(crate) async fn by_nbd(
    end: (End, Instant),
    form: NbdForm,
    cut_after: Option<usize>,
    bursts: Vec<Vec<Request>>,
    truth: Truth,
) -> Result<(), String> {
    let Some(mut session) = Session::connect(end, form).await? else { return Ok(()) };
    let mut sent = 0;
    for burst in bursts {
        for request in burst {
            if cut_after == Some(sent) {
                // What is in flight may happen or not.
                return Ok(());
            }
            sent += 1;
            session.send(request, &truth).await?;
        }
        session.receive_all(&truth).await?;
    }
    session.leave().await
}

/// Asks for another size.
pub(crate) async fn resize_by_nbd(
    end: (End, Instant),
    form: NbdForm,
    size_bytes: u64,
    truth: Truth,
) -> Result<(), String> {
    let Some(mut session) = Session::connect(end, form).await? else { return Ok(()) };
    let fail = |error: String| format!("Resizing to {size_bytes:#x}: {error}");
    let range = ByteRange { start: size_bytes, len: 0 };
    let asked = session.transmission.request(&Ask::new(Command::Resize, range));
    let (_, header) = asked.map_err(|error| fail(error.to_string()))?;
    let begun = truth.history.borrow_mut().begin_resize(size_bytes);
    session.write_all(header.to_vec()).await.map_err(|error| fail(error.to_string()))?;
    match session.receive_one().await.map_err(fail)? {
        Ok(()) => truth.history.borrow_mut().resized(begun),
        // Version 2 with snapshots.
        Err(failure) if failure.code == ErrorCode::EINVAL => {
            truth.history.borrow_mut().keep_size(begun);
        }
        Err(_) if truth.host.struck() => {}
        Err(failure) => return Err(fail(failure.message)),
    }
    session.leave().await
}

/// Says some bytes of a handshake, at most all but the last, and waits to be shown out.
pub(crate) async fn silent((mut end, begun): (End, Instant), words: usize) -> Result<(), String> {
    // The client's flags, and options that are never complete: an option of many bytes.
    let mut said = vec![0, 0, 0, 1];
    said.extend(b"IHAVEOPT");
    said.extend(7_u32.to_be_bytes());
    said.extend(1000_u32.to_be_bytes());
    said.resize(100, 0);
    said.truncate(words);
    let mut piece = [0; PIECE_BYTES];
    // A server that has gone away takes nothing; how long that was is what counts.
    drop(end.write_all(&said).await);
    while end.read(&mut piece).await.is_ok_and(|len| len > 0) {}
    match begun.elapsed() {
        waited if waited >= Limits::default().handshake => Ok(()),
        waited => Err(format!("A silent client was shown out after {waited:?}")),
    }
}

impl Session {
    /// Receives the answer to the only request.
    async fn receive_one(&mut self) -> Result<Result<(), Box<Failure>>, String> {
        loop {
            let mut input = &self.received[..];
            let event = self.transmission.advance(&mut input);
            let event = event.map_err(|error| format!("The server said: {error}"))?;
            let answer = match event {
                TransmissionEvent::Done { result, .. } => return Ok(result),
                TransmissionEvent::NeedInput => None,
                other => Some(format!("The server said {other:?}")),
            };
            answer.map_or(Ok(()), Err)?;
            let left = input.len();
            self.received.drain(..self.received.len() - left);
            more(&mut self.end, &mut self.received).await?;
        }
    }

    async fn leave(mut self) -> Result<(), String> {
        let goodbye = self.transmission.disconnect();
        self.end.write_all(&goodbye).await.map_err(|error| format!("Leaving: {error}"))
    }

    /// Shakes hands; nothing where that took too long, and the server went away.
    async fn connect((end, begun): (End, Instant), form: NbdForm) -> Result<Option<Self>, String> {
        match Self::shake_hands(end, form).await {
            Ok(session) => Ok(Some(session)),
            Err(_) if begun.elapsed() >= Limits::default().handshake => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn shake_hands(mut end: End, form: NbdForm) -> Result<Self, String> {
        let headers = match form {
            NbdForm::Simple => Headers::Simple,
            NbdForm::Structured => Headers::Structured,
            NbdForm::Extended => Headers::Extended,
        };
        let name = ExportName::new("disk").ok_or("no name")?;
        let contexts = vec![BASE_ALLOCATION.to_owned()];
        let wish = Wish { headers, contexts, tls: TlsWish::Never, ..Wish::to_use(name) };
        let mut handshake = Handshake::new(wish);
        let mut received = Vec::new();
        loop {
            let mut input = &received[..];
            let event = handshake.advance(&mut input);
            let left = input.len();
            received.drain(..received.len() - left);
            let sent = end.write_all(&handshake.take_output()).await;
            sent.map_err(|error| format!("Shaking hands: {error}"))?;
            match event.map_err(|error| format!("Shaking hands: {error}"))? {
                Event::NeedInput => more(&mut end, &mut received).await?,
                Event::Transmission(transmission) => {
                    let (transmission, waiting) = (*transmission, HashMap::new());
                    return Ok(Self { end, transmission, received, waiting });
                }
                other => return Err(format!("Shaking hands: {other:?}")),
            }
        }
    }

    async fn send(&mut self, request: Request, truth: &Truth) -> Result<(), String> {
        let Some((command, flags, bytes)) = in_words_of_nbd(request, &self.transmission) else {
            return Ok(());
        };
        let range = match command {
            Command::Flush => ByteRange { start: 0, len: 0 },
            _ => ByteRange { start: request.start, len: request.len },
        };
        let ask = Ask::new(command, range).with(flags);
        let fail = |error: String| format!("{request:x?}: {error}");
        let (cookie, header) =
            self.transmission.request(&ask).map_err(|error| fail(error.to_string()))?;
        // From now on it may happen.
        let asked = truth.ask(request);
        let answer = Answer { bytes: vec![0; read_len(command, range)], ..Answer::default() };
        self.waiting.insert(cookie, (asked, answer));
        let sent = self.write_all([&header[..], &bytes].concat()).await;
        sent.map_err(|error| fail(error.to_string()))
    }

    /// Sends, and receives meanwhile: a server that cannot send takes nothing.
    async fn write_all(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        let (mut reader, mut writer) = tokio::io::split(&mut self.end);
        let mut writing = pin!(writer.write_all(&bytes));
        let mut piece = [0; PIECE_BYTES];
        loop {
            tokio::select! {
                biased;
                sent = &mut writing => return sent,
                len = reader.read(&mut piece) => match len? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    len => self.received.extend_from_slice(&piece[..len]),
                },
            }
        }
    }

    async fn receive_all(&mut self, truth: &Truth) -> Result<(), String> {
        let mut place = (Cookie(0), 0);
        while !self.waiting.is_empty() {
            let mut input = &self.received[..];
            let event = self.transmission.advance(&mut input);
            let event = event.map_err(|error| format!("The server said: {error}"))?;
            let hungry = event == TransmissionEvent::NeedInput;
            note(&mut self.waiting, &mut place, event, truth)?;
            let left = input.len();
            self.received.drain(..self.received.len() - left);
            if hungry {
                more(&mut self.end, &mut self.received).await?;
            }
        }
        Ok(())
    }
}

/// Takes note of a part of an answer.
fn note(
    waiting: &mut HashMap<Cookie, (Asked, Answer)>,
    place: &mut (Cookie, usize),
    event: TransmissionEvent<'_>,
    truth: &Truth,
) -> Result<(), String> {
    match event {
        TransmissionEvent::NeedInput | TransmissionEvent::Hole { .. } => {}
        TransmissionEvent::Data { cookie, range } => {
            let start = waiting.get(&cookie).map_or(0, |(asked, _)| asked.request.start);
            *place = (cookie, (range.start - start) as usize);
        }
        TransmissionEvent::Payload(bytes) => {
            let (_, answer) = waiting.get_mut(&place.0).ok_or("bytes for nobody")?;
            answer.bytes[place.1..place.1 + bytes.len()].copy_from_slice(bytes);
            place.1 += bytes.len();
        }
        TransmissionEvent::Extent { cookie, range, flags, .. } => {
            let (asked, answer) = waiting.get_mut(&cookie).ok_or("an extent for nobody")?;
            let range = GuestRange::new(GuestOffset(range.start), range.len);
            if AllocationFlags::from_bits_retain(flags as u32).contains(AllocationFlags::ZERO) {
                answer.zeros.push(within(range, asked.request.range()));
            }
        }
        TransmissionEvent::Done { cookie, result } => {
            let (asked, mut answer) = waiting.remove(&cookie).ok_or("an answer for nobody")?;
            let result = match (asked.request.what, result) {
                (What::Zero { flags }, Err(failure))
                    if flags.contains(ZeroFlags::FAST) && failure.code == ErrorCode::ENOTSUP =>
                {
                    answer.is_refused = true;
                    Ok(())
                }
                (_, result) => result.map_err(|failure| failure.message),
            };
            truth.answer(&asked, result.map(|()| answer))?;
        }
    }
    Ok(())
}

/// Returns command, flags and payload; nothing where the form has no word for it.
fn in_words_of_nbd(
    request: Request,
    transmission: &Transmission,
) -> Option<(Command, CommandFlags, Vec<u8>)> {
    let fua = |fua| if fua { CommandFlags::FUA } else { CommandFlags::empty() };
    let none = CommandFlags::empty();
    Some(match request.what {
        What::Read => (Command::Read, none, Vec::new()),
        What::Write { fill, fua: is_fua } => {
            (Command::Write, fua(is_fua), fill.bytes(request.range()))
        }
        What::Compress { fill } => (Command::Write, none, fill.bytes(request.range())),
        What::Zero { flags } => (Command::WriteZeroes, zero_flags(flags), Vec::new()),
        What::Discard => (Command::Trim, none, Vec::new()),
        What::Flush => (Command::Flush, none, Vec::new()),
        What::Extents if transmission.info().contexts.is_empty() => return None,
        What::Extents => (Command::BlockStatus, none, Vec::new()),
    })
}

fn zero_flags(flags: ZeroFlags) -> CommandFlags {
    let mut words = CommandFlags::empty();
    words.set(CommandFlags::NO_HOLE, !flags.contains(ZeroFlags::MAY_UNMAP));
    words.set(CommandFlags::FUA, flags.contains(ZeroFlags::FUA));
    words.set(CommandFlags::FAST_ZERO, flags.contains(ZeroFlags::FAST));
    words
}

fn read_len(command: Command, range: ByteRange) -> usize {
    if command == Command::Read { range.len as usize } else { 0 }
}

async fn more(end: &mut End, received: &mut Vec<u8>) -> Result<(), String> {
    let mut piece = [0; PIECE_BYTES];
    match end.read(&mut piece).await {
        Ok(0) => Err(format!("The server has cut the wire: {}", io::ErrorKind::UnexpectedEof)),
        Ok(len) => {
            received.extend_from_slice(&piece[..len]);
            Ok(())
        }
        Err(error) => Err(format!("Receiving: {error}")),
    }
}
