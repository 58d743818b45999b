//! Servers that lie at every step: each lie is told of as what it is, takes little memory, and harms
//! neither the process nor other exports.
//!
//! What the bytes of a reply may be is tested where the protocol is (`lacuna-nbd`); this is about
//! whoever waits for an answer.

mod script;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{Storage, ZeroMode};
use lacuna::units::{HostOffset, HostRange};
use lacuna::{Error, ErrorKind, Result};
use lacuna_remote::{NbdOptions, NbdStorage};
use pollster::block_on;

use self::script::{
    ACK, BLOCK_STATUS, CONTEXT, DATA, DONE, EXTENDED_HEADERS, GO, META_CONTEXT, NONE, READ,
    Request, SET_META_CONTEXT, SIZE_BYTES, STRUCTURED_REPLY, Script, Served, answer, block_sizes,
    chunk, chunk_header, data, error, export, hole, status,
};

/// Longer than anything here takes, shorter than waiting for something that never comes.
const SOON: Duration = Duration::from_secs(20);

fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn read(storage: &NbdStorage, offset: u64, len: usize) -> Result<Vec<u8>> {
    let (result, buffer) = block_on(storage.read_at(HostOffset(offset), Buffer::new(len)));
    result.map(|()| buffer.to_vec())
}

fn whole() -> HostRange {
    HostRange::new(HostOffset(0), SIZE_BYTES)
}

/// Fails where something ended without a reason, as it does when our own code panics.
fn assert_told(what: &str, error: &Error) {
    let text = error.to_string();
    assert!(text.contains("nbd+unix:") && !text.contains("panic"), "{what}: {text}");
    assert!(!text.contains("The connection ended"), "{what}: {text}");
    assert!(text.len() < 5000 && !text.contains('\x1b'), "{what}: {text}");
}

#[test]
fn lies_before_there_is_an_export_are_refused_with_what_is_wrong() {
    let greeting = |bytes: &[u8]| Script { greeting: bytes.to_vec(), ..Script::default() };
    let go = |said: Vec<u8>| Script::at_option(GO, said);
    let fine = || answer(GO, ACK, b"");
    let sized = |sizes| go([export((SIZE_BYTES, 1)), block_sizes(sizes), fine()].concat());
    let context = |id: u32, name: &[u8]| {
        let data = [&id.to_be_bytes()[..], name].concat();
        answer(SET_META_CONTEXT, META_CONTEXT, &data)
    };
    let endless = answer(GO, 0x8000_0007, &[b'x'; 20]);
    let huge = [&endless[..16], &u32::MAX.to_be_bytes()].concat();
    let lies = [
        ("no server", greeting(b"HTTP/1.1 400 Bad Request\r\n"), "no NBD server"),
        ("other magic", greeting(b"NBDMAGICIHAVEOPS\0\x03"), "IHAVEOPT"),
        ("other answer", Script::at_option(EXTENDED_HEADERS, answer(GO, ACK, b"")), "answers"),
        ("no magic", Script::at_option(STRUCTURED_REPLY, vec![7; 20]), "begins with"),
        ("unknown kind", go(answer(GO, 99, b"")), "99"),
        ("huge answer", go(huge), "4294967295 bytes"),
        ("other context", Script::at_option(SET_META_CONTEXT, context(1, b"qemu:x")), "qemu:x"),
        ("no size", go(fine()), "how large"),
        ("2^63 bytes", go([export((1 << 63, 1)), fine()].concat()), "9223372036854775808"),
        ("2^64-1 bytes", go([export((u64::MAX, 1)), fine()].concat()), "18446744073709551615"),
        ("blocks of 3", sized([3, 512, 4096]), "3"),
        ("no block", sized([0, 512, 4096]), "0"),
        (
            "part of a block",
            go([export((513, 1)), block_sizes([512, 512, 4096]), fine()].concat()),
            "multiple",
        ),
        ("read-only", go([export((SIZE_BYTES, 3)), fine()].concat()), "read-only"),
    ];
    for (what, script, says) in lies {
        let error = Served::start(script).open(Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains(says), "{what}: {error}");
    }
}

#[test]
fn the_largest_export_is_used_without_an_overflow() {
    for size_bytes in [i64::MAX as u64, (i64::MAX as u64) & !511] {
        let said = [export((size_bytes, 0x45)), answer(GO, ACK, b"")].concat();
        let storage = Served::start(Script::at_option(GO, said)).open(Duration::ZERO).unwrap();
        assert_eq!(block_on(storage.len()).unwrap(), size_bytes);
        let end = HostRange::new(HostOffset(size_bytes - 100), u64::MAX - size_bytes);
        assert_eq!(read(&storage, end.start.0, 200).unwrap()[99..101], [7, 0]);
        block_on(storage.extents_at(end)).unwrap();
        let zeroed = block_on(storage.write_zeroes_at(end, ZeroMode::MayUnmap, Hold::none()));
        assert_eq!(zeroed.unwrap_err().kind(), ErrorKind::NoSpace);
    }
}

type Lie = (&'static str, fn(Request) -> Vec<u8>);

/// Lies about a read of 8192 bytes at 4096.
const ABOUT_READS: [Lie; 16] = [
    ("no magic", |_| vec![0; 20]),
    ("simple reply", |it| {
        [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &it.cookie.to_be_bytes()].concat()
    }),
    ("another request", |it| data(DONE, it.cookie ^ 1, it.start, &[0; 8192])),
    ("a request long ago", |it| data(DONE, it.cookie & 0xffff_ffff, it.start, &[0; 8192])),
    ("before it", |it| data(DONE, it.cookie, it.start - 1, &[0; 8192])),
    ("behind it", |it| data(DONE, it.cookie, it.start + 1, &[0; 8192])),
    ("at the end of all", |it| data(DONE, it.cookie, u64::MAX, &[0; 8192])),
    ("a long hole", |it| hole(DONE, it.cookie, it.start, u32::MAX)),
    ("an empty hole", |it| hole(DONE, it.cookie, it.start, 0)),
    ("twice", |it| {
        [data(0, it.cookie, it.start, &[0; 512]), hole(DONE, it.cookie, it.start, 8192)].concat()
    }),
    ("a part missing", |it| data(DONE, it.cookie, it.start, &[0; 512])),
    ("all missing", |it| chunk(DONE, NONE, it.cookie, b"")),
    ("2^32 bytes", |it| {
        [&chunk_header(DONE, DATA, it.cookie, u32::MAX)[..], &it.start.to_be_bytes()].concat()
    }),
    ("unknown chunk", |it| chunk(DONE, 77, it.cookie, b"whatever")),
    ("never the last chunk", |it| chunk(0, NONE, it.cookie, b"")),
    ("long error", |it| error(DONE, it.cookie, 5, u16::MAX, &[b'x'; 4000])),
];

#[test]
fn lies_about_reads_end_the_connection_and_say_so() {
    let before = resident_bytes();
    for (what, lie) in ABOUT_READS {
        // Nobody asks a liar again, however patient.
        for delay in [Duration::ZERO, SOON] {
            let served = Served::start(Script::replying(lie));
            let storage = served.open(delay).unwrap();
            let started = Instant::now();
            let error = read(&storage, 4096, 8192).unwrap_err();
            assert_told(what, &error);
            assert_eq!(error.kind(), ErrorKind::Io, "{what}: {error}");
            assert!(read(&storage, 0, 512).is_err(), "{what}");
            assert!(block_on(storage.flush()).is_err(), "{what}");
            assert!(started.elapsed() < SOON, "{what}");
        }
    }
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes for what servers only announced");
}

#[test]
fn lies_about_block_status_end_the_connection_and_say_so() {
    let lies: [Lie; 6] = [
        ("no extent", |it| status(DONE, it.cookie, CONTEXT, &[])),
        ("an empty one", |it| status(DONE, it.cookie, CONTEXT, &[0, 4096])),
        ("another context", |it| status(DONE, it.cookie, CONTEXT + 1, &[it.len])),
        ("more behind the end", |it| status(DONE, it.cookie, CONTEXT, &[it.len, 4096])),
        ("said twice", |it| status(0, it.cookie, CONTEXT, &[it.len]).repeat(2)),
        ("none at all", |it| chunk(DONE, NONE, it.cookie, b"")),
    ];
    for (what, lie) in lies {
        let storage = Served::start(Script::replying(lie)).open(Duration::ZERO).unwrap();
        assert_told(what, &block_on(storage.extents_at(whole())).unwrap_err());
    }
}

#[test]
fn extents_beyond_what_was_asked_about_are_cut() {
    let script = Script::replying(|it| status(DONE, it.cookie, CONTEXT, &[4096, u32::MAX - 4096]));
    let storage = Served::start(script).open(Duration::ZERO).unwrap();
    let found = block_on(storage.extents_at(HostRange::new(HostOffset(0), 8192))).unwrap();
    assert_eq!(found.iter().map(|extent| extent.len).collect::<Vec<_>>(), [4096, 4096]);
}

#[test]
fn many_extents_are_kept_as_far_as_there_is_room() {
    let script = Script::replying(|it| status(DONE, it.cookie, CONTEXT, &[1; 1 << 19]));
    let storage = Served::start(script).open(Duration::ZERO).unwrap();
    let found = block_on(storage.extents_at(whole())).unwrap();
    assert_eq!(found.len(), 4096, "the rest is asked about again");
}

#[test]
fn errors_without_end_are_not_listened_to_for_ever() {
    let script = Script::replying(|it| error(0, it.cookie, 5, 0, b"").repeat(100_000));
    let storage = Served::start(script).open(Duration::ZERO).unwrap();
    assert_told("errors", &read(&storage, 0, 512).unwrap_err());
}

#[test]
fn what_a_server_says_of_an_error_is_short_and_tame() {
    let text = |it: Request| error(DONE, it.cookie, 28, 4000, &b"\x1b[2Jgone \n".repeat(400));
    let storage = Served::start(Script::replying(text)).open(Duration::ZERO).unwrap();
    let error = read(&storage, 0, 512).unwrap_err();
    assert_told("error", &error);
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    // An error is no lie: the connection goes on.
    assert_eq!(read(&storage, 0, 512).unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn an_export_that_comes_back_as_another_one_is_not_used() {
    type Exports = fn(usize) -> (u64, u16);
    let changes: [(&str, Exports); 4] = [
        ("smaller", |nth| if nth == 0 { (SIZE_BYTES, 0x45) } else { (SIZE_BYTES / 2, 0x45) }),
        ("huge", |nth| if nth == 0 { (SIZE_BYTES, 0x45) } else { (1 << 62, 0x45) }),
        ("less able", |nth| if nth == 0 { (SIZE_BYTES, 0x45) } else { (SIZE_BYTES, 5) }),
        ("read-only", |nth| if nth == 0 { (SIZE_BYTES, 0x45) } else { (SIZE_BYTES, 0x47) }),
    ];
    for (what, export) in changes {
        // Enough for the handshake, not for a read.
        let script = Script { export, cut_after: 500, ..Script::default() };
        let error = read(&Served::start(script).open(SOON).unwrap(), 0, 4096).unwrap_err();
        assert_told(what, &error);
        let says = if what == "read-only" { "read-only" } else { "not the same" };
        assert!(error.to_string().contains(says), "{what}: {error}");
    }
}

/// Says something to a server in every way.
fn converse(served: &Served, delay: Duration) -> Result<()> {
    let storage = served.open(delay)?;
    block_on(storage.extents_at(whole()))?;
    read(&storage, 0, 64)?;
    block_on(storage.write_at(HostOffset(0), Buffer::zeroed(64))).0?;
    block_on(storage.write_zeroes_at(whole(), ZeroMode::MayUnmap, Hold::none()))?;
    block_on(storage.flush())
}

#[test]
fn a_conversation_that_ends_at_any_byte_is_an_error_or_goes_on() {
    let served = Served::start(Script::default());
    converse(&served, Duration::ZERO).unwrap();
    let all = served.said.load(Ordering::SeqCst);
    assert!(all > 250, "{all}");
    for cut_after in 0..all {
        let served = Served::start(Script { cut_after, ..Script::default() });
        let error = converse(&served, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("lost"), "{cut_after}: {error}");
    }
    converse(&Served::start(Script { cut_after: all, ..Script::default() }), SOON).unwrap();
}

#[test]
fn a_server_that_never_answers_keeps_nobody_from_leaving() {
    let script = Script::replying(|it| match it.command {
        READ | BLOCK_STATUS => Vec::new(),
        _ => chunk(DONE, NONE, it.cookie, b""),
    });
    let served = Served::start(script);
    let storage = served.open(SOON).unwrap();
    let started = Instant::now();
    let mut reading = Box::pin(storage.read_at(HostOffset(0), Buffer::new(512)));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(reading.as_mut().poll(&mut context).is_pending());
    drop(reading);
    block_on(storage.flush()).unwrap();
    drop(storage);
    assert!(started.elapsed() < SOON);
}

#[test]
fn a_handshake_takes_no_longer_than_whoever_opens_wants_to_wait() {
    let served = Served::start(Script::at_option(GO, Vec::new()));
    let open_timeout = Duration::from_millis(200);
    let started = Instant::now();
    let error =
        served.open_with(&NbdOptions { open_timeout, ..NbdOptions::default() }).unwrap_err();
    assert!(error.to_string().contains("for the server to agree"), "{error}");
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
}
