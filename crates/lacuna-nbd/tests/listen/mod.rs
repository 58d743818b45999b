//! Bytes as a server sends them, and a client that waits for them.

#![allow(dead_code, reason = "every test takes what it needs")]

use lacuna_nbd::client::{Event, Handshake, Headers, Transmission, TransmissionEvent, Wish};
use lacuna_nbd::context::BASE_ALLOCATION;
use lacuna_nbd::{Error, ExportName};

pub(crate) const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
pub(crate) const SIZE_BYTES: u64 = 1 << 20;

/// Numbers of options and replies.
pub(crate) const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const SET_META_CONTEXT: u32 = 10;
pub(crate) const EXTENDED_HEADERS: u32 = 11;
pub(crate) const ACK: u32 = 1;
pub(crate) const SERVER: u32 = 2;
pub(crate) const INFO: u32 = 3;
pub(crate) const META_CONTEXT: u32 = 4;
pub(crate) const UNSUP: u32 = 0x8000_0001;
pub(crate) const POLICY: u32 = 0x8000_0002;
pub(crate) const TLS_REQD: u32 = 0x8000_0005;
pub(crate) const UNKNOWN: u32 = 0x8000_0006;

/// An answer to an option.
pub(crate) fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = reply_header(option, kind, data.len() as u32);
    bytes.extend_from_slice(data);
    bytes
}

pub(crate) fn reply_header(option: u32, kind: u32, len: u32) -> Vec<u8> {
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// Size and flags, as GO has them.
pub(crate) fn export(size_bytes: u64, flags: u16) -> Vec<u8> {
    [&[0, 0][..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// How a handshake ended.
pub(crate) fn hear(wish: Wish, words: &[Vec<u8>]) -> Result<Event, Error> {
    let input = [GREETING, &words.concat()].concat();
    Handshake::new(wish).advance(&mut &input[..])
}

pub(crate) fn wish(headers: Headers) -> Wish {
    let contexts = vec![BASE_ALLOCATION.into()];
    Wish { headers, contexts, ..Wish::to_use(ExportName::new("disk").unwrap()) }
}

/// What a server may be asked: everything.
const FLAGS: u16 = 0x1fed;

/// A connection in that form, with context 5 where there are contexts.
pub(crate) fn connected(headers: Headers) -> Transmission {
    let mut words = match headers {
        Headers::Simple => Vec::new(),
        Headers::Structured => vec![reply(STRUCTURED_REPLY, ACK, b"")],
        Headers::Extended => vec![reply(EXTENDED_HEADERS, ACK, b"")],
    };
    if headers != Headers::Simple {
        words.push(reply(SET_META_CONTEXT, META_CONTEXT, b"\0\0\0\x05base:allocation"));
        words.push(reply(SET_META_CONTEXT, ACK, b""));
    }
    words.push(reply(GO, INFO, &export(SIZE_BYTES, FLAGS)));
    words.push(reply(GO, ACK, b""));
    match hear(wish(headers), &words) {
        Ok(Event::Transmission(transmission)) => *transmission,
        end => panic!("{end:?}"),
    }
}

pub(crate) fn simple(error: u32, cookie: u64) -> Vec<u8> {
    [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
}

pub(crate) fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let header = [
        &0x668e_33ef_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &(payload.len() as u32).to_be_bytes(),
    ];
    [&header.concat(), payload].concat()
}

pub(crate) fn wide_chunk(
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    payload: &[u8],
) -> Vec<u8> {
    let header = [
        &0x6e8a_278c_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &(payload.len() as u64).to_be_bytes(),
    ];
    [&header.concat(), payload].concat()
}

/// A payload of numbers, each with its width in bytes.
pub(crate) fn words(numbers: &[(u64, usize)]) -> Vec<u8> {
    numbers.iter().flat_map(|(number, width)| number.to_be_bytes()[8 - width..].to_vec()).collect()
}

/// All that comes of some bytes.
pub(crate) fn receive<'a>(
    transmission: &mut Transmission,
    mut input: &'a [u8],
) -> Result<Vec<TransmissionEvent<'a>>, Error> {
    let mut events = Vec::new();
    loop {
        match transmission.advance(&mut input)? {
            TransmissionEvent::NeedInput => return Ok(events),
            event => events.push(event),
        }
    }
}
