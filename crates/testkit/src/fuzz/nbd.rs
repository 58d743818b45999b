//! The NBD machines against streams that nobody vouches for.
//!
//! * Always: a stream says the same however it is cut into pieces.
//! * The first byte chooses where the conversation starts, the second how the stream is cut.

use lacuna_nbd::client::{self, Ask, Goal, Headers, TlsWish, Wish};
use lacuna_nbd::context::{BASE_ALLOCATION, Context, LAYERS};
use lacuna_nbd::server::{self, Export, Refusal, TlsMode};
use lacuna_nbd::wire::{CommandFlags, InitState, TransmissionFlags};
use lacuna_nbd::{BlockSizes, ByteRange, Command, ContextId, ExportName, Uri};

use crate::Random;

/// What was said, and the stream of bytes that was read for it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Record {
    events: Vec<String>,
    payload: Vec<u8>,
    output: Vec<u8>,
}

/// Takes two bytes of choices and what a client sends.
///
/// # Panics
/// If pieces make a difference, or a machine panics.
pub fn nbd_server(data: &[u8]) {
    let Some(([start, cut], stream)) = data.split_first_chunk() else { return };
    let whole = serve(*start, stream, &mut |rest| rest);
    assert_eq!(whole, serve(*start, stream, &mut |_| 1), "byte by byte");
    let mut random = Random::new((*cut).into());
    assert_eq!(whole, serve(*start, stream, &mut |rest| random.index(rest.min(64)) + 1));
}

/// Takes two bytes of choices and what a server sends.
///
/// # Panics
/// If pieces make a difference, or a machine panics.
pub fn nbd_client(data: &[u8]) {
    let Some(([start, cut], stream)) = data.split_first_chunk() else { return };
    let whole = ask(*start, stream, &mut |rest| rest);
    assert_eq!(whole, ask(*start, stream, &mut |_| 1), "byte by byte");
    let mut random = Random::new((*cut).into());
    assert_eq!(whole, ask(*start, stream, &mut |rest| random.index(rest.min(64)) + 1));
}

/// Takes a text that is to be a URI.
///
/// # Panics
/// If what parses is not written as something that parses to the same.
pub fn nbd_uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Uri::parse(text) {
        Ok(uri) => assert_eq!(Uri::parse(&uri.to_string()), Ok(uri)),
        Err(error) => assert!(error.to_string().len() < 4096, "a message stays short"),
    }
}

/// Hands a stream in piece by piece: what is left of a piece comes in front of the next.
struct Pieces<'a> {
    stream: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Pieces<'a> {
    const fn new(stream: &'a [u8]) -> Self {
        Self { stream, at: 0, end: 0 }
    }

    fn input(&self) -> &'a [u8] {
        &self.stream[self.at..self.end]
    }

    fn rest(&mut self, rest: &[u8]) {
        self.at = self.end - rest.len();
    }

    /// Lets the next piece arrive; false at the end.
    fn arrive(&mut self, piece: &mut dyn FnMut(usize) -> usize) -> bool {
        assert!(self.at == self.end, "a machine that wants more has taken all");
        let rest = self.stream.len() - self.end;
        if rest > 0 {
            self.end += piece(rest).clamp(1, rest);
        }
        rest > 0
    }
}

pub(super) fn export(name: &ExportName) -> Result<Export, Refusal> {
    let mut export = Export::new(1 << 20);
    export.flags = TransmissionFlags::all();
    export.flags.remove(TransmissionFlags::READ_ONLY);
    export.init_state = InitState::all();
    export.description = Some("A disk".into());
    let contexts = [(BASE_ALLOCATION, 0), ("qemu:dirty-bitmap:b", 3), (LAYERS, 9)];
    export.contexts = contexts.map(|(name, id)| Context::new(name, ContextId(id))).to_vec();
    match name.as_str() {
        "" => Ok(export),
        "blocks" => {
            export.block_sizes = BlockSizes::new(512, 4096, 1 << 16).expect("they are fine");
            Ok(export)
        }
        "tls" => Err(Refusal::TlsRequired),
        _ => Err(Refusal::Unknown),
    }
}

/// A prefix of the stream that leads to where the conversation is to start.
fn lead(start: u8) -> Vec<u8> {
    let option = |number: u32, data: &[u8]| {
        let header = [&b"IHAVEOPT"[..], &number.to_be_bytes()].concat();
        [&header, &(data.len() as u32).to_be_bytes()[..], data].concat()
    };
    let contexts = b"\0\0\0\0\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x0fx-lacuna:layers";
    let go = b"\0\0\0\0\0\0";
    let flags = b"\0\0\0\x03".to_vec();
    match start % 8 {
        0 => Vec::new(),
        1 => flags,
        2 => [flags, option(8, b"")].concat(),
        3 => [flags, option(11, b"")].concat(),
        4 => [flags, option(7, go)].concat(),
        5 => [flags, option(8, b""), option(10, contexts), option(7, go)].concat(),
        6 => [flags, option(11, b""), option(10, contexts), option(7, go)].concat(),
        _ => [flags, option(1, b"")].concat(),
    }
}

fn serve(start: u8, stream: &[u8], piece: &mut dyn FnMut(usize) -> usize) -> Record {
    let stream = [&lead(start), stream].concat();
    let mode = [TlsMode::Off, TlsMode::Allowed, TlsMode::Required];
    let mut handshake = server::Handshake::new(mode[usize::from(start >> 3) % 3]);
    let mut record = Record::default();
    let mut pieces = Pieces::new(&stream);
    loop {
        let mut input = pieces.input();
        let event = handshake.advance(&mut input);
        pieces.rest(input);
        record.output.extend(handshake.take_output());
        match event {
            Ok(server::Event::NeedInput) => {
                if !pieces.arrive(piece) {
                    return record;
                }
            }
            Ok(server::Event::FindExport(question)) => {
                record.events.push(format!("{question:?}"));
                handshake.answer_export(export(&question.name));
            }
            Ok(server::Event::ListExports) => handshake.answer_list(&[]),
            Ok(server::Event::Transmission(transmission)) => {
                transmit(*transmission, pieces, piece, &mut record);
                return record;
            }
            end => {
                record.events.push(format!("{end:?}"));
                return record;
            }
        }
    }
}

fn transmit(
    mut transmission: server::Transmission,
    mut pieces: Pieces<'_>,
    piece: &mut dyn FnMut(usize) -> usize,
    record: &mut Record,
) {
    let replies = transmission.replies();
    loop {
        let mut input = pieces.input();
        let event = transmission.advance(&mut input);
        pieces.rest(input);
        match event {
            Ok(server::TransmissionEvent::NeedInput) => {
                if !pieces.arrive(piece) {
                    return;
                }
            }
            Ok(server::TransmissionEvent::Payload(bytes)) => {
                record.payload.extend_from_slice(bytes);
            }
            Ok(server::TransmissionEvent::Rejected(rejection)) => {
                assert!(rejection.message.len() < 4096, "a message stays short");
                replies.rejection(&rejection, &mut record.output);
            }
            Ok(server::TransmissionEvent::Disconnect) => return,
            Ok(event) => {
                judge(&transmission, &event);
                record.events.push(format!("{event:?}"));
            }
            Err(error) => return record.events.push(error.to_string()),
        }
    }
}

/// What reaches a driver keeps to the export.
fn judge(transmission: &server::Transmission, event: &server::TransmissionEvent<'_>) {
    let (server::TransmissionEvent::Request(request)
    | server::TransmissionEvent::Write(request)
    | server::TransmissionEvent::BlockStatus(request, _)) = event
    else {
        return;
    };
    assert!(!request.flags.contains(CommandFlags::PAYLOAD_LEN));
    if !matches!(request.command, Command::Flush | Command::Resize) {
        assert!(request.range.is_within(transmission.size_bytes()));
    }
    if request.command == Command::Write {
        assert_eq!(request.range.len, transmission.payload_remaining());
    }
}

pub(super) fn wish(start: u8) -> Wish {
    let mut wish = Wish::to_use(ExportName::default());
    wish.headers =
        [Headers::Extended, Headers::Structured, Headers::Simple][usize::from(start & 3) % 3];
    wish.contexts = vec![BASE_ALLOCATION.into(), LAYERS.into()];
    wish.tls = [TlsWish::Never, TlsWish::IfOffered][usize::from(start >> 6) % 2];
    wish.goal = match start >> 2 & 7 {
        0 => Goal::Describe,
        1 => Goal::ListExports,
        2 => Goal::ListContexts(vec!["base:".into()]),
        4 => Goal::DescribeAll,
        _ => Goal::Use,
    };
    wish
}

fn ask(start: u8, stream: &[u8], piece: &mut dyn FnMut(usize) -> usize) -> Record {
    let mut handshake = client::Handshake::new(wish(start));
    let mut record = Record::default();
    let mut pieces = Pieces::new(stream);
    loop {
        let mut input = pieces.input();
        let event = handshake.advance(&mut input);
        pieces.rest(input);
        record.output.extend(handshake.take_output());
        match event {
            Ok(client::Event::NeedInput) => {
                if !pieces.arrive(piece) {
                    return record;
                }
            }
            Ok(client::Event::Transmission(transmission)) => {
                record.events.push(format!("{:?}", transmission.info()));
                receive(*transmission, pieces, piece, &mut record);
                return record;
            }
            end => {
                record.events.push(format!("{end:?}"));
                return record;
            }
        }
    }
}

const RANGE: ByteRange = ByteRange { start: 4096, len: 8192 };

pub(super) fn asks() -> [Ask<'static>; 6] {
    let status = Ask::new(Command::BlockStatus, RANGE);
    let read = Ask::new(Command::Read, RANGE);
    [
        read,
        read.with(CommandFlags::DF),
        status,
        status.with(CommandFlags::REQ_ONE),
        Ask::new(Command::Flush, ByteRange { start: 0, len: 0 }),
        Ask::new(Command::WriteZeroes, RANGE),
    ]
}

/// Has one request of each kind open, and takes what the stream answers.
fn receive(
    mut transmission: client::Transmission,
    mut pieces: Pieces<'_>,
    piece: &mut dyn FnMut(usize) -> usize,
    record: &mut Record,
) {
    let asks = asks();
    // What this server did not offer is not open.
    let mut cookies = asks.iter().filter_map(|ask| transmission.request(ask).ok());
    record.output.extend(cookies.by_ref().flat_map(|(_, header)| header.to_vec()));
    drop(cookies);
    loop {
        let mut input = pieces.input();
        let event = transmission.advance(&mut input);
        pieces.rest(input);
        match event {
            Ok(client::TransmissionEvent::NeedInput) => {
                if !pieces.arrive(piece) {
                    return;
                }
            }
            Ok(client::TransmissionEvent::Payload(bytes)) => {
                record.payload.extend_from_slice(bytes);
            }
            Ok(event) => {
                if let client::TransmissionEvent::Data { range: part, .. }
                | client::TransmissionEvent::Hole { range: part, .. } = &event
                {
                    assert!(RANGE.contains(*part), "content lies in the request");
                }
                record.events.push(format!("{event:?}"));
            }
            Err(error) => return record.events.push(error.to_string()),
        }
    }
}
