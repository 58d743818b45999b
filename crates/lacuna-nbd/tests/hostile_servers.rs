//! What a client does not believe.

mod listen;

use lacuna_nbd::client::{Ask, Event, Goal, Handshake, Headers, TlsWish, TransmissionEvent, Wish};
use lacuna_nbd::wire::{CommandFlags, ErrorCode};
use lacuna_nbd::{ByteRange, Command, Cookie, ErrorKind, ExportName};
use listen::*;

const DONE: u16 = 1;
const NONE: u16 = 0;
const DATA: u16 = 1;
const HOLE: u16 = 2;
const STATUS: u16 = 5;
const STATUS_EXT: u16 = 6;
const ERROR: u16 = 0x8001;
const ERROR_OFFSET: u16 = 0x8002;

#[test]
fn greetings_that_are_none_are_told_apart() {
    let rows: [(&[u8], ErrorKind, &str); 2] = [
        (b"HTTP/1.1 400 Bad R", ErrorKind::Violation, "no NBD server"),
        (b"NBDMAGICIHAVEOPS\0\x03", ErrorKind::Violation, "IHAVEOPT"),
    ];
    for (input, kind, text) in rows {
        let mut handshake = Handshake::new(wish(Headers::Extended));
        let error = handshake.advance(&mut &input[..]).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn an_oldstyle_server_has_one_disk_and_no_options() {
    let greeting =
        [&b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53"[..], &SIZE_BYTES.to_be_bytes()].concat();
    let greeting = [&greeting[..], &[0, 0, 0, 5], &[0; 124]].concat();
    let unnamed = Wish { export: ExportName::default(), ..wish(Headers::Extended) };
    // However it arrives.
    for cut in [1, 16, 17, 18, 20, 27, 28, 151] {
        let mut handshake = Handshake::new(unnamed.clone());
        assert!(matches!(handshake.advance(&mut &greeting[..cut]), Ok(Event::NeedInput)), "{cut}");
        let Ok(Event::Transmission(found)) = handshake.advance(&mut &greeting[cut..]) else {
            panic!("{cut}");
        };
        assert_eq!(found.info().size_bytes, SIZE_BYTES);
        assert_eq!(found.info().flags.bits(), 5);
        assert!(handshake.take_output().is_empty());
    }
    for (refused, text) in [
        (wish(Headers::Extended), "names of exports"),
        (Wish { goal: Goal::ListExports, ..unnamed.clone() }, "no lists"),
        (Wish { tls: TlsWish::Required, ..unnamed.clone() }, "no TLS"),
    ] {
        let error = Handshake::new(refused).advance(&mut &greeting[..]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(text), "{error}");
    }
    let mut large = greeting;
    large[16] = 0x80;
    let error = Handshake::new(unnamed).advance(&mut &large[..]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Violation);
}

#[test]
fn a_newstyle_server_that_is_not_fixed_is_used_by_name_only() {
    let mut handshake = Handshake::new(wish(Headers::Extended));
    let mut input = &b"NBDMAGICIHAVEOPT\0\0"[..];
    assert!(matches!(handshake.advance(&mut input), Ok(Event::NeedInput)));
    let output = handshake.take_output();
    assert_eq!(output, b"\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
    let answer = [&SIZE_BYTES.to_be_bytes()[..], &[0, 1], &[0; 124]].concat();
    assert!(matches!(handshake.advance(&mut &answer[..]), Ok(Event::Transmission(_))));
    let mut handshake = Handshake::new(Wish { goal: Goal::ListExports, ..wish(Headers::Simple) });
    let error = handshake.advance(&mut &b"NBDMAGICIHAVEOPT\0\0"[..]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn options_are_sent_as_the_specification_has_them() {
    let mut handshake = Handshake::new(wish(Headers::Extended));
    let mut step = |input: &[u8]| {
        assert!(matches!(handshake.advance(&mut &input[..]), Ok(Event::NeedInput)));
        handshake.take_output()
    };
    assert_eq!(step(GREETING), b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0");
    let structured = step(&reply(EXTENDED_HEADERS, UNSUP, b""));
    assert_eq!(structured, b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    let contexts = step(&reply(STRUCTURED_REPLY, ACK, b""));
    let data = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    assert_eq!(contexts, [b"IHAVEOPT\0\0\0\x0a\0\0\0\x1f", &data[..]].concat());
    let go = step(&reply(SET_META_CONTEXT, UNSUP, b"not here"));
    let data = b"\0\0\0\x04disk\0\x04\0\x03\0\x01\0\x02\0\x04";
    assert_eq!(go, [b"IHAVEOPT\0\0\0\x07\0\0\0\x12", &data[..]].concat());
    let by_name = step(&reply(GO, UNSUP, b""));
    assert_eq!(by_name, b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
}

/// Words of a server that end a handshake.
#[test]
fn wrong_answers_end_the_handshake() {
    let simple = || wish(Headers::Simple);
    let sizes =
        |minimum, preferred, most| words(&[(3, 2), (minimum, 4), (preferred, 4), (most, 4)]);
    let fine = || reply(GO, INFO, &export(SIZE_BYTES, 1));
    let rows: Vec<(&str, Wish, Vec<Vec<u8>>)> = vec![
        ("another option", simple(), vec![reply(LIST, ACK, b"")]),
        ("wrong magic", simple(), vec![vec![7; 20]]),
        ("unknown kind", simple(), vec![reply(GO, 99, b"")]),
        ("kind of another option", simple(), vec![reply(GO, SERVER, b"\0\0\0\0")]),
        ("acknowledged with data", simple(), vec![fine(), reply(GO, ACK, b"x")]),
        ("no size", simple(), vec![reply(GO, ACK, b"")]),
        ("size of 2^63", simple(), vec![reply(GO, INFO, &export(1 << 63, 1))]),
        ("too long answer", simple(), vec![reply_header(GO, INFO, (16 << 10) + 1)]),
        ("endless answer", simple(), vec![reply_header(GO, UNKNOWN, u32::MAX)]),
        ("no kind of information", simple(), vec![reply(GO, INFO, b"\0")]),
        ("short export", simple(), vec![reply(GO, INFO, &[0; 11])]),
        ("long export", simple(), vec![reply(GO, INFO, &[0; 13])]),
        ("short sizes", simple(), vec![reply(GO, INFO, b"\0\x03\0\0")]),
        ("minimum 0", simple(), vec![reply(GO, INFO, &sizes(0, 512, 4096))]),
        ("minimum 3", simple(), vec![reply(GO, INFO, &sizes(3, 512, 4096))]),
        ("minimum above 64 KiB", simple(), vec![reply(GO, INFO, &sizes(1 << 17, 1 << 17, !0))]),
        ("preferred below minimum", simple(), vec![reply(GO, INFO, &sizes(1024, 512, 4096))]),
        ("maximum below preferred", simple(), vec![reply(GO, INFO, &sizes(1, 4096, 512))]),
        ("name with NUL", simple(), vec![reply(GO, INFO, b"\0\x01a\0")]),
        ("description not UTF-8", simple(), vec![reply(GO, INFO, b"\0\x02\xff")]),
        ("init state too long", simple(), vec![reply(GO, INFO, b"\0\x04\0\0\0\0")]),
        (
            "extended headers without GO",
            wish(Headers::Extended),
            vec![
                reply(EXTENDED_HEADERS, ACK, b""),
                reply(SET_META_CONTEXT, ACK, b""),
                reply(GO, UNSUP, b""),
            ],
        ),
        (
            "a context nobody asked for",
            wish(Headers::Structured),
            vec![
                reply(STRUCTURED_REPLY, ACK, b""),
                reply(SET_META_CONTEXT, META_CONTEXT, b"\0\0\0\0qemu:x"),
            ],
        ),
        (
            "a context without id",
            wish(Headers::Structured),
            vec![reply(STRUCTURED_REPLY, ACK, b""), reply(SET_META_CONTEXT, META_CONTEXT, b"\0\0")],
        ),
        (
            "a context twice",
            wish(Headers::Structured),
            vec![
                reply(STRUCTURED_REPLY, ACK, b""),
                reply(SET_META_CONTEXT, META_CONTEXT, b"\0\0\0\x01base:allocation"),
                reply(SET_META_CONTEXT, META_CONTEXT, b"\0\0\0\x02base:allocation"),
            ],
        ),
        (
            "a listed name past its end",
            Wish { goal: Goal::ListExports, ..simple() },
            vec![reply(LIST, SERVER, b"\0\0\0\x09disk")],
        ),
    ];
    for (what, wish, words) in rows {
        let end = hear(wish, &words);
        assert!(
            matches!(&end, Err(error) if error.kind() == ErrorKind::Violation),
            "{what}: {end:?}"
        );
    }
}

#[test]
fn what_nobody_knows_is_passed_over() {
    let words = [
        reply(GO, INFO, b"\0\x63whatever"),
        reply(GO, INFO, &export(SIZE_BYTES, 0xe001)),
        reply(GO, ACK, b""),
    ];
    let Ok(Event::Transmission(transmission)) = hear(wish(Headers::Simple), &words) else {
        panic!("no transmission");
    };
    assert_eq!(transmission.info().flags.bits(), 0xe001);
    // Flags that say they are none.
    let words = [reply(GO, INFO, &export(SIZE_BYTES, 0x0ffe)), reply(GO, ACK, b"")];
    let Ok(Event::Transmission(transmission)) = hear(wish(Headers::Simple), &words) else {
        panic!("no transmission");
    };
    assert!(transmission.info().flags.is_empty());
}

#[test]
fn refusals_say_what_the_server_says_escaped() {
    let words = [reply(GO, POLICY, b"go away\x1b[2J")];
    let error = hear(wish(Headers::Simple), &words).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().ends_with("it may not; it says 'go away\\u{1b}[2J'"), "{error}");
}

const RANGE: ByteRange = ByteRange { start: 4096, len: 8192 };

/// Asks one thing in that form and hands in the reply; returns how it ended.
fn answered(
    headers: Headers,
    ask: Ask<'_>,
    words: &dyn Fn(u64) -> Vec<u8>,
) -> Result<Option<Result<(), ErrorCode>>, ErrorKind> {
    let mut transmission = connected(headers);
    let (Cookie(cookie), _) = transmission.request(&ask).unwrap();
    let input = words(cookie);
    let events = receive(&mut transmission, &input).map_err(|error| {
        assert_eq!(transmission.advance(&mut &[][..]), Err(error.clone()), "it stays so");
        error.kind()
    })?;
    Ok(events.into_iter().find_map(|event| match event {
        TransmissionEvent::Done { result, .. } => Some(result.map_err(|failure| failure.code)),
        _ => None,
    }))
}

type Row = (&'static str, Ask<'static>, Box<dyn Fn(u64) -> Vec<u8>>);

fn read() -> Ask<'static> {
    Ask::new(Command::Read, RANGE)
}

fn status() -> Ask<'static> {
    Ask::new(Command::BlockStatus, RANGE)
}

/// A data chunk.
fn data(flags: u16, cookie: u64, start: u64, len: usize) -> Vec<u8> {
    chunk(flags, DATA, cookie, &[&start.to_be_bytes()[..], &vec![7; len]].concat())
}

fn hole(flags: u16, cookie: u64, start: u64, len: u64) -> Vec<u8> {
    chunk(flags, HOLE, cookie, &words(&[(start, 8), (len, 4)]))
}

/// A status chunk of context 5.
fn rows(flags: u16, cookie: u64, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut payload = vec![(5, 4)];
    payload.extend(extents.iter().flat_map(|(len, flags)| [(*len, 4), (*flags, 4)]));
    chunk(flags, STATUS, cookie, &words(&payload))
}

fn wide_rows(cookie: u64, count: u64, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut payload = vec![(5, 4), (count, 4)];
    payload.extend(extents.iter().flat_map(|(len, flags)| [(*len, 8), (*flags, 8)]));
    wide_chunk(DONE, STATUS_EXT, cookie, RANGE.start, &words(&payload))
}

fn error(kind: u16, code: u64, len: u64, behind: &[u8]) -> impl Fn(u64) -> Vec<u8> + use<> {
    let payload = [&words(&[(code, 4), (len, 2)]), behind].concat();
    move |cookie| chunk(DONE, kind, cookie, &payload)
}

#[test]
fn replies_that_do_not_fit_their_request_end_the_connection() {
    let flush = Ask::new(Command::Flush, ByteRange { start: 0, len: 0 });
    let df = read().with(CommandFlags::DF);
    let one = status().with(CommandFlags::REQ_ONE);
    let rows: Vec<Row> = vec![
        ("wrong magic", read(), Box::new(|_| vec![0; 20])),
        ("extended", read(), Box::new(|c| wide_chunk(DONE, NONE, c, RANGE.start, b""))),
        ("unknown cookie", read(), Box::new(|c| data(DONE, c + 1, 4096, 8192))),
        ("cookie of another time", read(), Box::new(|c| data(DONE, c ^ 1 << 32, 4096, 8192))),
        ("unknown chunk", read(), Box::new(|c| chunk(0, 77, c, b""))),
        ("reserved chunk", read(), Box::new(|c| chunk(0, 3, c, b""))),
        ("end that is none", read(), Box::new(|c| chunk(0, NONE, c, b""))),
        ("end with a payload", read(), Box::new(|c| chunk(DONE, NONE, c, b"x"))),
        ("nothing at all", read(), Box::new(|c| chunk(DONE, NONE, c, b""))),
        ("half of it", read(), Box::new(|c| data(DONE, c, 4096, 4096))),
        ("one byte missing", read(), Box::new(|c| data(DONE, c, 4096, 8191))),
        ("no data in data", read(), Box::new(|c| data(0, c, 4096, 0))),
        ("data without offset", read(), Box::new(|c| chunk(0, DATA, c, b"1234567"))),
        ("data before", read(), Box::new(|c| data(0, c, 4095, 2))),
        ("data behind", read(), Box::new(|c| data(0, c, 12_287, 2))),
        ("data around the world", read(), Box::new(|c| data(0, c, u64::MAX, 2))),
        ("data twice", read(), Box::new(|c| [data(0, c, 4096, 2), data(0, c, 4097, 2)].concat())),
        (
            "hole over data",
            read(),
            Box::new(|c| [data(0, c, 9000, 9), hole(0, c, 8999, 2)].concat()),
        ),
        ("empty hole", read(), Box::new(|c| hole(0, c, 4096, 0))),
        ("hole past the end", read(), Box::new(|c| hole(0, c, 4096, 8193))),
        ("long hole", read(), Box::new(|c| chunk(0, HOLE, c, &[0; 16]))),
        (
            "parts under DF",
            df,
            Box::new(|c| [hole(0, c, 4096, 4096), hole(1, c, 8192, 4096)].concat()),
        ),
        ("simple reply to a read", read(), Box::new(|c| simple(0, c))),
        ("simple error to a read", read(), Box::new(|c| simple(5, c))),
        ("simple reply to a status", status(), Box::new(|c| simple(0, c))),
        ("status of a read", read(), Box::new(|c| rows(DONE, c, &[(8192, 0)]))),
        ("data of a status", status(), Box::new(|c| data(DONE, c, 4096, 8192))),
        ("data of a flush", flush, Box::new(|c| data(DONE, c, 0, 1))),
        ("status without context", status(), Box::new(|c| chunk(DONE, NONE, c, b""))),
        ("wide status", status(), Box::new(|c| chunk(DONE, STATUS_EXT, c, &[0; 24]))),
        ("status without extents", status(), Box::new(|c| rows(DONE, c, &[]))),
        (
            "half an extent",
            status(),
            Box::new(|c| chunk(DONE, STATUS, c, &words(&[(5, 4), (1, 4)]))),
        ),
        ("empty extent", status(), Box::new(|c| rows(DONE, c, &[(0, 0)]))),
        ("empty extent behind", status(), Box::new(|c| rows(DONE, c, &[(512, 0), (0, 0)]))),
        ("extents behind the request", status(), Box::new(|c| rows(DONE, c, &[(8192, 0), (1, 3)]))),
        (
            "other context",
            status(),
            Box::new(|c| chunk(DONE, STATUS, c, &words(&[(6, 4), (512, 4), (0, 4)]))),
        ),
        (
            "context twice",
            status(),
            Box::new(|c| [rows(0, c, &[(512, 0)]), rows(1, c, &[(512, 0)])].concat()),
        ),
        ("two extents for one", one, Box::new(|c| rows(DONE, c, &[(512, 0), (512, 3)]))),
        ("too long an extent for one", one, Box::new(|c| rows(DONE, c, &[(8193, 0)]))),
        ("too short an error", flush, Box::new(|c| chunk(DONE, ERROR, c, &[0; 5]))),
        ("error 0", flush, Box::new(error(ERROR, 0, 0, b""))),
        ("text past the end", flush, Box::new(error(ERROR, 5, 3, b"no"))),
        ("bytes behind the text", flush, Box::new(error(ERROR, 5, 1, b"no"))),
        ("too long a text", flush, Box::new(error(ERROR, 5, 4097, &[b'x'; 4097]))),
        ("endless error", flush, Box::new(error(ERROR, 5, 9, &[b'x'; 5000]))),
        ("error without offset", read(), Box::new(error(ERROR_OFFSET, 5, 0, b""))),
        ("error before", read(), Box::new(error(ERROR_OFFSET, 5, 0, &4095_u64.to_be_bytes()))),
        ("error behind", read(), Box::new(error(ERROR_OFFSET, 5, 0, &12_288_u64.to_be_bytes()))),
        ("answered twice", flush, Box::new(|c| [simple(0, c), simple(0, c)].concat())),
    ];
    for (what, ask, words) in rows {
        let end = answered(Headers::Structured, ask, &words);
        assert_eq!(end, Err(ErrorKind::Violation), "{what}");
    }
}

#[test]
fn extended_replies_repeat_the_offset_and_count_their_extents() {
    let start = RANGE.start;
    let rows: Vec<Row> = vec![
        ("structured", read(), Box::new(|c| data(DONE, c, 4096, 8192))),
        ("simple", read(), Box::new(|c| simple(0, c))),
        ("other offset", status(), Box::new(|c| wide_chunk(DONE, ERROR, c, 0, b"\0\0\0\x05\0\0"))),
        ("narrow status", status(), Box::new(move |c| wide_chunk(1, STATUS, c, start, &[0; 12]))),
        ("one too few", status(), Box::new(|c| wide_rows(c, 2, &[(8192, 0)]))),
        ("one too many", status(), Box::new(|c| wide_rows(c, 1, &[(512, 0), (512, 3)]))),
        ("no extents", status(), Box::new(|c| wide_rows(c, 0, &[]))),
        ("empty extent", status(), Box::new(|c| wide_rows(c, 1, &[(0, 0)]))),
        ("wide flags", status(), Box::new(|c| wide_rows(c, 1, &[(512, 1 << 32)]))),
        ("past 2^64", status(), Box::new(|c| wide_rows(c, 1, &[(u64::MAX, 0)]))),
        (
            "4 GiB and more",
            read(),
            Box::new(|c| {
                let mut header = wide_chunk(0, DATA, c, 4096, b"");
                header[24..].copy_from_slice(&(1_u64 << 32).to_be_bytes());
                header
            }),
        ),
    ];
    for (what, ask, words) in rows {
        let end = answered(Headers::Extended, ask, &words);
        assert_eq!(end, Err(ErrorKind::Violation), "{what}");
    }
}

#[test]
fn replies_that_are_unusual_but_right_are_taken() {
    let flush = Ask::new(Command::Flush, ByteRange { start: 0, len: 0 });
    let fine: Vec<Row> = vec![
        (
            "in order",
            read(),
            Box::new(|c| [data(0, c, 4096, 4096), hole(1, c, 8192, 4096)].concat()),
        ),
        (
            "back to front",
            read(),
            Box::new(|c| {
                [data(0, c, 8192, 4096), hole(0, c, 4096, 4096), chunk(DONE, NONE, c, b"")].concat()
            }),
        ),
        ("more than asked", status(), Box::new(|c| rows(DONE, c, &[(512, 0), (1 << 30, 3)]))),
        ("less than asked", status(), Box::new(|c| rows(DONE, c, &[(512, 0)]))),
        ("equal neighbours", status(), Box::new(|c| rows(DONE, c, &[(512, 3), (512, 3)]))),
        ("unknown flags of a chunk", flush, Box::new(|c| chunk(DONE | 64, NONE, c, b""))),
        ("a simple reply to a flush", flush, Box::new(|c| simple(0, c))),
    ];
    for (what, ask, words) in fine {
        assert_eq!(answered(Headers::Structured, ask, &words), Ok(Some(Ok(()))), "{what}");
    }
    let failing: Vec<Row> = vec![
        ("with a text", flush, Box::new(error(ERROR, 5, 2, b"no"))),
        (
            "an error nobody knows",
            flush,
            Box::new(|c| chunk(DONE, 0x8777, c, b"\0\0\0\x05\0\0later")),
        ),
        (
            "data, then an error",
            read(),
            Box::new(|c| [data(0, c, 4096, 8192), error(ERROR, 5, 0, b"")(c)].concat()),
        ),
        (
            "an error, then the end",
            read(),
            Box::new(|c| {
                let mut error = error(ERROR_OFFSET, 5, 0, &5000_u64.to_be_bytes())(c);
                error[5] = 0;
                [error, chunk(DONE, NONE, c, b"")].concat()
            }),
        ),
        ("a simple error", status(), Box::new(|c| simple(5, c))),
    ];
    for (what, ask, words) in failing {
        let end = answered(Headers::Structured, ask, &words);
        assert_eq!(end, Ok(Some(Err(ErrorCode::EIO))), "{what}");
    }
    let strange = answered(Headers::Simple, read(), &|cookie| simple(4711, cookie));
    assert_eq!(
        strange,
        Ok(Some(Err(ErrorCode::EINVAL))),
        "an error that is none of the protocol's"
    );
}

#[test]
fn extents_are_cut_at_the_end_of_the_export() {
    let mut transmission = connected(Headers::Structured);
    let range = ByteRange { start: SIZE_BYTES - 512, len: 512 };
    let ask = Ask::new(Command::BlockStatus, range);
    let (Cookie(cookie), _) = transmission.request(&ask).unwrap();
    let input = rows(DONE, cookie, &[(0xffff_fe00, 3)]);
    let events = receive(&mut transmission, &input).unwrap();
    assert!(matches!(events[0], TransmissionEvent::Extent { range: found, .. } if found == range));
}

#[test]
fn cookies_are_not_used_again_before_they_are_free() {
    let mut transmission = connected(Headers::Simple);
    let flush = Ask::new(Command::Flush, ByteRange { start: 0, len: 0 });
    let mut seen = Vec::new();
    for _ in 0..3 {
        let cookies: Vec<u64> = (0..5).map(|_| transmission.request(&flush).unwrap().0.0).collect();
        assert_eq!(transmission.in_flight(), 5);
        let input: Vec<u8> = cookies.iter().rev().flat_map(|cookie| simple(0, *cookie)).collect();
        assert_eq!(receive(&mut transmission, &input).unwrap().len(), 5);
        seen.extend(cookies);
    }
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count);
    assert_eq!(transmission.in_flight(), 0);
}
