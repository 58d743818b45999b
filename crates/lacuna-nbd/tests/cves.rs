//! Faults that other programs of this protocol had, each as a test that it is not here.
//!
//! Not here because they are about something else: address lists (CVE-2013-6410), signals
//! (CVE-2015-0847), certificates (CVE-2024-7383). CVE-2025-47711 and 47712 are in
//! `server_transmission.rs`, with the other rules of block status.

mod listen;
mod talk;

use lacuna_nbd::client::{Ask, Event, Goal, Headers, TlsWish, TransmissionEvent};
use lacuna_nbd::server::{self, MAX_HANDSHAKE_BYTES, TlsMode};
use lacuna_nbd::wire::ErrorCode;
use lacuna_nbd::{ByteRange, Command, Cookie, ErrorKind};
use listen::{SIZE_BYTES, connected, hear, receive, reply, reply_header, wish};
use talk::{End, answers, drive, info_data, kinds, option, option_header, replies, started};

const RANGE: ByteRange = ByteRange { start: 0, len: 4096 };

/// A request larger than any buffer crashed the server.
#[test]
fn cve_2011_0530_requests_of_any_length_are_bounded() {
    let mut transmission = talk::chosen(&[], "disk");
    let read = talk::compact(0, 0, 1, 0, u32::MAX);
    let event = transmission.advance(&mut &read[..]).unwrap();
    assert!(matches!(event, server::TransmissionEvent::Rejected(_)));
    let write = talk::compact(0, 1, 1, 0, u32::MAX);
    assert_eq!(transmission.advance(&mut &write[..]).unwrap_err().kind(), ErrorKind::Violation);
}

/// A negotiation that fails, or a client that leaves in its midst, ended the whole server.
#[test]
fn cve_2011_1925_cve_2013_7441_a_client_may_leave_or_fail_at_any_byte() {
    let conversation = [
        option(talk::LIST, b""),
        option(talk::INFO, &info_data("other", &[])),
        option(talk::STRUCTURED_REPLY, b""),
        option(talk::GO, &info_data("disk", &[3])),
    ]
    .concat();
    for end in 0..conversation.len() {
        let mut handshake = started(TlsMode::Off);
        assert!(
            matches!(drive(&mut handshake, &mut &conversation[..end]), End::NeedInput),
            "{end}"
        );
    }
    let mut handshake = started(TlsMode::Off);
    assert!(matches!(drive(&mut handshake, &mut &option(1, b"other")[..]), End::Failed(_)));
}

/// A name of 0xffffffff bytes, to which 1 was added; and a long one on the stack.
#[test]
fn cve_2022_26495_cve_2022_26496_lengths_of_names_are_compared_before_they_are_used() {
    for len in [u32::MAX, u32::MAX - 1, 0x7fff_ffff, 5, 4097] {
        for number in [talk::INFO, talk::GO, 9, 10] {
            let data = [&len.to_be_bytes()[..], &[b'x'; 8]].concat();
            let structured = option(talk::STRUCTURED_REPLY, b"");
            let kinds = kinds(&[structured, option(number, &data)]);
            assert_eq!(kinds[1], talk::INVALID, "{len:#x} in {number}");
        }
    }
    let data = info_data(&"x".repeat(60_000), &[]);
    assert_eq!(kinds(&[option(talk::GO, &data)]), [talk::INVALID]);
}

/// Data that nobody expected while options were negotiated; requests before the negotiation ended.
#[test]
fn cve_2017_7539_cve_2017_9524_data_out_of_turn_ends_the_connection() {
    for early in [talk::compact(0, 0, 1, 0, 512), talk::extended(0, 2, 1, 0, 0), vec![0xff; 64]] {
        let mut handshake = started(TlsMode::Off);
        assert!(matches!(drive(&mut handshake, &mut &early[..]), End::Failed(_)));
    }
}

/// Names of 257 to 4096 bytes smashed the stack, after TLS where that was mandatory.
#[test]
fn cve_2017_15118_names_up_to_4096_bytes_are_looked_up() {
    for len in [256, 257, 3000, 4096] {
        let name = "n".repeat(len);
        let mut handshake = started(TlsMode::Required);
        assert!(matches!(drive(&mut handshake, &mut &option(talk::STARTTLS, b"")[..]), End::Tls));
        handshake.tls_established();
        let _acknowledged = handshake.take_output();
        let go = option(talk::GO, &info_data(&name, &[]));
        assert_eq!(answers(&mut handshake, &[go])[0].kind, talk::UNKNOWN, "{len}");
        let end = drive(&mut handshake, &mut &option(talk::EXPORT_NAME, name.as_bytes())[..]);
        assert!(matches!(end, End::Failed(error) if error.kind() == ErrorKind::Refused), "{len}");
    }
}

/// Options of 4 GiB were read and thrown away, again and again.
#[test]
fn cve_2017_15119_data_of_options_has_a_limit() {
    let mut handshake = started(TlsMode::Off);
    let huge = option_header(77, u32::MAX);
    assert!(matches!(drive(&mut handshake, &mut &huge[..]), End::Failed(_)));
    // Nor in small pieces.
    let mut handshake = started(TlsMode::Off);
    let piece = option(77, &vec![0; 1 << 20]);
    let ends = (0..=MAX_HANDSHAKE_BYTES >> 20).map(|_| drive(&mut handshake, &mut &piece[..]));
    assert_eq!(ends.filter(|end| matches!(end, End::Failed(_))).count(), 1, "the last one");
}

/// A name of nearly 4096 bytes, quoted in an error, made the error longer than allowed.
#[test]
fn cve_2020_10761_errors_quote_names_in_part() {
    for name in ["n".repeat(4096), "\u{1b}".repeat(4096), "ä".repeat(2048)] {
        let mut handshake = started(TlsMode::Off);
        let replies = answers(&mut handshake, &[option(talk::GO, &info_data(&name, &[]))]);
        assert_eq!(replies[0].kind, talk::UNKNOWN);
        assert!(replies[0].data.len() < 1024, "{}", replies[0].data.len());
    }
}

/// A server that was stopped under its clients crashed.
#[test]
fn cve_2024_7409_a_stop_is_fine_in_any_state() {
    let go = option(talk::GO, &info_data("disk", &[3]));
    for at in 0..go.len() {
        let mut handshake = started(TlsMode::Off);
        let mut input = &go[..at];
        assert!(matches!(drive(&mut handshake, &mut input), End::NeedInput));
        handshake.shut_down();
        let end = drive(&mut handshake, &mut &go[at..]);
        // What was known in full before is finished, the rest is refused.
        assert!(matches!(end, End::NeedInput | End::Transmission(_)), "{at}");
    }
    let mut transmission = talk::chosen(&[], "disk");
    let write = [talk::compact(0, 1, 9, 0, 4), b"data".to_vec()].concat();
    let mut input = &write[..30];
    assert!(matches!(transmission.advance(&mut input), Ok(server::TransmissionEvent::Write(_))));
    transmission.shut_down();
    let mut input = &write[28..];
    let payload = transmission.advance(&mut input);
    assert_eq!(payload, Ok(server::TransmissionEvent::Payload(b"data")));
    let read = talk::compact(0, 0, 9, 0, 4);
    let next = transmission.advance(&mut &read[..]).unwrap();
    assert!(matches!(next, server::TransmissionEvent::Rejected(rejection)
        if rejection.error == ErrorCode::ESHUTDOWN));
}

/// The backend was opened, at its cost, before a client had proved anything; options in an order
/// that nobody thought of failed an assertion.
#[test]
fn cve_2019_14850_cve_2019_14851_nobody_is_asked_for_an_export_before_its_name_is_known() {
    let mut handshake = started(TlsMode::Required);
    let options: Vec<Vec<u8>> =
        (0..20).filter(|number| ![1, 2, 5].contains(number)).map(|n| option(n, b"")).collect();
    let mut input = &options.concat()[..];
    let event = handshake.advance(&mut input).unwrap();
    assert!(matches!(event, server::Event::NeedInput), "{event:?} before TLS");
    // Any two options one after the other.
    for first in 0..13 {
        for second in 0..13 {
            let data = info_data("disk", &[3]);
            let mut handshake = started(TlsMode::Allowed);
            let input = [option(first, &data), option(second, b""), option(second, &data)].concat();
            let mut input = &input[..];
            while let End::Tls = drive(&mut handshake, &mut input) {
                handshake.tls_established();
            }
        }
    }
}

/// What was negotiated in plaintext, perhaps by somebody in between, survived the turn to TLS.
#[test]
fn cve_2021_3716_nothing_from_before_tls_counts_after() {
    let contexts = talk::context_data("disk", &["base:allocation"]);
    for headers in [talk::STRUCTURED_REPLY, talk::EXTENDED_HEADERS] {
        let mut handshake = started(TlsMode::Allowed);
        let injected = option(talk::STRUCTURED_REPLY, b"");
        let input = [
            option(headers, b""),
            option(talk::SET_META_CONTEXT, &contexts),
            option(talk::STARTTLS, b""),
            // Sent along, so that it would be read as if it had come under TLS.
            injected[..10].to_vec(),
            injected,
        ]
        .concat();
        let mut input = &input[..];
        assert!(matches!(drive(&mut handshake, &mut input), End::Tls));
        assert!(input.is_empty(), "thrown away");
        let kinds: Vec<_> = replies(&handshake.take_output()).iter().map(|r| r.kind).collect();
        assert_eq!(kinds, [talk::ACK, talk::META_CONTEXT, talk::ACK, talk::ACK]);
        handshake.tls_established();
        // As if nothing had been said: EXPORT_NAME is allowed, replies are simple.
        let choose = option(talk::EXPORT_NAME, b"disk");
        let End::Transmission(transmission) = drive(&mut handshake, &mut &choose[..]) else {
            panic!("no transmission");
        };
        assert!(!transmission.replies().has_chunks() && transmission.contexts().is_empty());
    }
    // The same for what needs structured replies.
    let mut handshake = started(TlsMode::Allowed);
    let input = [option(talk::STRUCTURED_REPLY, b""), option(talk::STARTTLS, b"")].concat();
    assert!(matches!(drive(&mut handshake, &mut &input[..]), End::Tls));
    let _acknowledged = handshake.take_output();
    handshake.tls_established();
    let set = option(talk::SET_META_CONTEXT, &contexts);
    assert_eq!(answers(&mut handshake, &[set])[0].kind, talk::INVALID);
}

/// A list of exports with long names smashed the stack of the client.
#[test]
fn cve_2017_2630_lists_are_bounded() {
    let list = || lacuna_nbd::client::Wish { goal: Goal::ListExports, ..wish(Headers::Simple) };
    for len in [u32::MAX, 1 << 20] {
        let end = hear(list(), &[reply_header(listen::LIST, listen::SERVER, len)]);
        assert_eq!(end.unwrap_err().kind(), ErrorKind::Violation);
    }
    let name = [&5000_u32.to_be_bytes()[..], &[b'x'; 5000]].concat();
    let end = hear(list(), &[reply(listen::LIST, listen::SERVER, &name)]);
    assert_eq!(end.unwrap_err().kind(), ErrorKind::Violation);
    let line = reply(listen::LIST, listen::SERVER, &[b"\0\0\0\x01x", &[b'd'; 4000][..]].concat());
    let end = hear(list(), &vec![line; 10_000]);
    assert_eq!(end.unwrap_err().kind(), ErrorKind::Violation, "an endless list");
}

/// A client that required TLS went on without.
#[test]
fn cve_2019_14842_required_tls_is_not_given_up() {
    for kind in [listen::UNSUP, listen::POLICY, 0x8000_0003, 0x8000_0004, 0x8000_0063] {
        let wish = lacuna_nbd::client::Wish { tls: TlsWish::Required, ..wish(Headers::Extended) };
        let error = hear(wish, &[reply(listen::STARTTLS, kind, b"")]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Refused | ErrorKind::Unsupported), "{error}");
    }
    // What came along with the answer, in plaintext, is thrown away.
    let wish = lacuna_nbd::client::Wish { tls: TlsWish::Required, ..wish(Headers::Extended) };
    let mut handshake = lacuna_nbd::client::Handshake::new(wish);
    let words = [
        listen::GREETING.to_vec(),
        reply(listen::STARTTLS, listen::ACK, b""),
        reply(listen::EXTENDED_HEADERS, listen::ACK, b""),
    ]
    .concat();
    let mut input = &words[..];
    assert!(matches!(handshake.advance(&mut input), Ok(Event::StartTls)));
    assert!(input.is_empty());
    handshake.tls_established();
    assert!(matches!(handshake.advance(&mut input), Ok(Event::NeedInput)));
}

/// A chunk outside of what was asked for was written all the same: remote code execution.
#[test]
fn libnbd_2019_chunks_outside_of_the_request_are_refused() {
    for (start, len) in [(4096_u64, 1), (4095, 2), (u64::MAX, 1), (1 << 63, 8)] {
        let mut transmission = connected(Headers::Structured);
        let (Cookie(cookie), _) = transmission.request(&Ask::new(Command::Read, RANGE)).unwrap();
        let payload = [&start.to_be_bytes()[..], &vec![0; len]].concat();
        let input = listen::chunk(1, 1, cookie, &payload);
        assert!(receive(&mut transmission, &input).is_err());
    }
}

/// A server that went away in the midst of options failed an assertion of the client.
#[test]
fn cve_2021_20286_a_server_may_leave_at_any_byte() {
    let words = [
        listen::GREETING.to_vec(),
        reply(listen::EXTENDED_HEADERS, listen::UNSUP, b"no"),
        reply(listen::STRUCTURED_REPLY, listen::ACK, b""),
        reply(listen::SET_META_CONTEXT, listen::ACK, b""),
        reply(listen::GO, listen::INFO, &listen::export(SIZE_BYTES, 1)),
        reply(listen::GO, listen::ACK, b""),
    ]
    .concat();
    for end in 0..words.len() {
        let mut handshake = lacuna_nbd::client::Handshake::new(wish(Headers::Extended));
        assert!(matches!(handshake.advance(&mut &words[..end]), Ok(Event::NeedInput)), "{end}");
    }
}

/// Errors of reads were not looked at: the copy was zeros in part.
#[test]
fn cve_2022_0485_an_error_is_the_end_of_a_request_even_if_its_data_came() {
    let mut transmission = connected(Headers::Structured);
    let (Cookie(cookie), _) = transmission.request(&Ask::new(Command::Read, RANGE)).unwrap();
    let payload = [&0_u64.to_be_bytes()[..], &[0; 4096]].concat();
    let input = [
        listen::chunk(0, 0x8002, cookie, &listen::words(&[(5, 4), (0, 2), (0, 8)])),
        listen::chunk(1, 1, cookie, &payload),
    ]
    .concat();
    let events = receive(&mut transmission, &input).unwrap();
    let Some(TransmissionEvent::Done { result: Err(failure), .. }) = events.last() else {
        panic!("{events:?}");
    };
    assert_eq!((failure.code, failure.offset), (ErrorCode::EIO, Some(0)));
}

/// A block status that was malformed crashed the client.
#[test]
fn libnbd_2023_malformed_block_status_is_refused() {
    for len in [0, 3, 4, 5, 11, 13, 15] {
        let mut transmission = connected(Headers::Structured);
        let ask = Ask::new(Command::BlockStatus, RANGE);
        let (Cookie(cookie), _) = transmission.request(&ask).unwrap();
        let input = listen::chunk(1, 5, cookie, &vec![0; len]);
        assert!(receive(&mut transmission, &input).is_err(), "{len}");
    }
}

/// A size of 2^63 and more came back as a negative number.
#[test]
fn cve_2023_5215_sizes_are_below_2_to_the_63() {
    for (size_bytes, is_fine) in [((1 << 63) - 1, true), (1 << 63, false), (u64::MAX, false)] {
        let words = [
            reply(listen::GO, listen::INFO, &listen::export(size_bytes, 1)),
            reply(listen::GO, listen::ACK, b""),
        ];
        assert_eq!(hear(wish(Headers::Simple), &words).is_ok(), is_fine, "{size_bytes:#x}");
    }
}

/// Flags of 64 bits failed an assertion where 32 were expected.
#[test]
fn cve_2023_5871_wide_flags_of_a_narrow_context_are_refused() {
    for (flags, is_fine) in [(3_u64, true), (1 << 32, false), (u64::MAX, false)] {
        let mut transmission = connected(Headers::Extended);
        let ask = Ask::new(Command::BlockStatus, RANGE);
        let (Cookie(cookie), _) = transmission.request(&ask).unwrap();
        let payload = listen::words(&[(5, 4), (1, 4), (4096, 8), (flags, 8)]);
        let input = listen::wide_chunk(1, 6, cookie, 0, &payload);
        assert_eq!(receive(&mut transmission, &input).is_ok(), is_fine, "{flags:#x}");
    }
}
