//! Bytes as a client sends them, and a driver that answers out of a table.

#![allow(dead_code, reason = "every test takes what it needs")]

use lacuna_nbd::context::{BASE_ALLOCATION, Context, LAYERS, QEMU_ALLOCATION_DEPTH};
use lacuna_nbd::server::{
    Event, Export, Handshake, ListedExport, Question, Refusal, TlsMode, Transmission,
};
use lacuna_nbd::wire::{InitState, TransmissionFlags};
use lacuna_nbd::{BlockSizes, ContextId, Error, ExportName};

pub(crate) const SIZE_BYTES: u64 = 1 << 20;

/// Option numbers.
pub(crate) const EXPORT_NAME: u32 = 1;
pub(crate) const ABORT: u32 = 2;
pub(crate) const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
pub(crate) const INFO: u32 = 6;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const LIST_META_CONTEXT: u32 = 9;
pub(crate) const SET_META_CONTEXT: u32 = 10;
pub(crate) const EXTENDED_HEADERS: u32 = 11;

/// Reply numbers.
pub(crate) const ACK: u32 = 1;
pub(crate) const SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const META_CONTEXT: u32 = 4;
pub(crate) const UNSUP: u32 = 0x8000_0001;
pub(crate) const POLICY: u32 = 0x8000_0002;
pub(crate) const INVALID: u32 = 0x8000_0003;
pub(crate) const TLS_REQD: u32 = 0x8000_0005;
pub(crate) const UNKNOWN: u32 = 0x8000_0006;
pub(crate) const SHUTDOWN: u32 = 0x8000_0007;
pub(crate) const BLOCK_SIZE_REQD: u32 = 0x8000_0008;
pub(crate) const TOO_BIG: u32 = 0x8000_0009;
pub(crate) const EXT_HEADER_REQD: u32 = 0x8000_000a;

pub(crate) const FLAGS: [u8; 4] = [0, 0, 0, 3];

/// An option with its data.
pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = option_header(number, data.len() as u32);
    bytes.extend_from_slice(data);
    bytes
}

pub(crate) fn option_header(number: u32, len: u32) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &len.to_be_bytes()].concat()
}

pub(crate) fn counted(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// The data of INFO and GO.
pub(crate) fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|word| word.to_be_bytes()));
    data
}

/// The data of the options about meta contexts.
pub(crate) fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query.as_bytes())));
    data
}

pub(crate) fn compact(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    request(0x2560_9513, flags, command, cookie, offset, &len.to_be_bytes())
}

pub(crate) fn extended(flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    request(0x21e4_1c71, flags, command, cookie, offset, &len.to_be_bytes())
}

fn request(magic: u32, flags: u16, command: u16, cookie: u64, offset: u64, len: &[u8]) -> Vec<u8> {
    let (flags, command) = (flags.to_be_bytes(), command.to_be_bytes());
    let (cookie, offset) = (cookie.to_be_bytes(), offset.to_be_bytes());
    [&magic.to_be_bytes()[..], &flags, &command, &cookie, &offset, len].concat()
}

/// An answer to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) option: u32,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

impl Reply {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.data).expect("UTF-8")
    }
}

/// Takes answers to options apart.
pub(crate) fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (header, rest) = bytes.split_at(20);
        assert_eq!(header[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes(), "magic of a reply");
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let (data, rest) = rest.split_at(word(16) as usize);
        found.push(Reply { option: word(8), kind: word(12), data: data.to_vec() });
        bytes = rest;
    }
    found
}

/// Exports: "" and "disk" are whole, "blocks" has a minimum block of 512, "secret" is for TLS.
pub(crate) fn find(question: &Question) -> Result<Export, Refusal> {
    type Flags = TransmissionFlags;
    let mut export = Export::new(SIZE_BYTES);
    export.flags = Flags::SEND_FLUSH
        | Flags::SEND_FUA
        | Flags::SEND_TRIM
        | Flags::SEND_WRITE_ZEROES
        | Flags::SEND_FAST_ZERO
        | Flags::SEND_CACHE
        | Flags::SEND_RESIZE
        | Flags::CAN_MULTI_CONN;
    export.description = Some("A disk".into());
    export.init_state = InitState::ZERO;
    let names = [BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, "qemu:dirty-bitmap:b", LAYERS];
    let contexts = names.iter().zip([0, 1, 2, 9]);
    export.contexts = contexts.map(|(name, id)| Context::new(*name, ContextId(id))).collect();
    match question.name.as_str() {
        "" => export.name = ExportName::new("disk"),
        "disk" => {}
        "blocks" => export.block_sizes = BlockSizes::new(512, 4096, 1 << 20).unwrap(),
        "secret" if question.is_tls => {}
        "secret" => return Err(Refusal::TlsRequired),
        "plain" => export.flags = Flags::empty(),
        "read-only" => export.flags |= Flags::READ_ONLY,
        _ => return Err(Refusal::Unknown),
    }
    Ok(export)
}

/// How a conversation ended.
#[derive(Debug)]
pub(crate) enum End {
    Aborted,
    Failed(Error),
    NeedInput,
    Tls,
    Transmission(Box<Transmission>),
}

/// Lets a handshake go as far as the input allows.
pub(crate) fn drive(handshake: &mut Handshake, input: &mut &[u8]) -> End {
    loop {
        match handshake.advance(input) {
            Err(error) => return End::Failed(error),
            Ok(Event::Aborted) => return End::Aborted,
            Ok(Event::NeedInput) => return End::NeedInput,
            Ok(Event::StartTls) => return End::Tls,
            Ok(Event::Transmission(transmission)) => return End::Transmission(transmission),
            Ok(Event::FindExport(question)) => handshake.answer_export(find(&question)),
            Ok(Event::ListExports) => {
                let line = |name| ListedExport {
                    name: ExportName::new(name).unwrap(),
                    description: format!("is {name}"),
                };
                handshake.answer_list(&["disk", "blocks"].map(line));
            }
        }
    }
}

/// A handshake whose greeting is gone and whose client flags are there.
pub(crate) fn started(tls: TlsMode) -> Handshake {
    let mut handshake = Handshake::new(tls);
    let _greeting = handshake.take_output();
    assert!(matches!(drive(&mut handshake, &mut &FLAGS[..]), End::NeedInput));
    handshake
}

/// Sends options one after the other and returns the answers to all of them.
pub(crate) fn answers(handshake: &mut Handshake, options: &[Vec<u8>]) -> Vec<Reply> {
    let input = options.concat();
    let end = drive(handshake, &mut &input[..]);
    assert!(!matches!(end, End::Failed(_)), "{end:?}");
    replies(&handshake.take_output())
}

/// The kinds of the answers to some options after a fresh start.
pub(crate) fn kinds(options: &[Vec<u8>]) -> Vec<u32> {
    let replies = answers(&mut started(TlsMode::Off), options);
    replies.iter().map(|reply| reply.kind).collect()
}

/// Chooses an export after some options.
pub(crate) fn chosen(options: &[Vec<u8>], name: &str) -> Transmission {
    let mut handshake = started(TlsMode::Off);
    let mut input = options.concat();
    input.extend(option(GO, &info_data(name, &[3])));
    match drive(&mut handshake, &mut &input[..]) {
        End::Transmission(transmission) => *transmission,
        end => panic!("{end:?}: {:?}", replies(&handshake.take_output())),
    }
}
