//! The server's side of the transmission phase: requests in, events and replies out.

mod talk;

use lacuna_nbd::server::{
    Command, Last, MAX_EXTENTS, Replies, Request, StatusExtent, Tag, Transmission,
    TransmissionEvent, WantedContexts,
};
use lacuna_nbd::wire::{CommandFlags, ErrorCode};
use lacuna_nbd::{ByteRange, ContextId, Cookie, ErrorKind};
use talk::*;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;

fn simple(name: &str) -> Transmission {
    chosen(&[], name)
}

fn structured() -> Transmission {
    let set = option(SET_META_CONTEXT, &context_data("disk", &["base:allocation"]));
    chosen(&[option(STRUCTURED_REPLY, b""), set], "disk")
}

/// Contexts 0, 2 and 9.
fn extended_headers() -> Transmission {
    let queries = ["base:allocation", "qemu:dirty-bitmap:b", "x-lacuna:layers"];
    let set = option(SET_META_CONTEXT, &context_data("disk", &queries));
    chosen(&[option(EXTENDED_HEADERS, b""), set], "disk")
}

/// Hands in some bytes and returns all that came of them.
fn events<'a>(transmission: &mut Transmission, mut input: &'a [u8]) -> Vec<TransmissionEvent<'a>> {
    let mut found = Vec::new();
    loop {
        match transmission.advance(&mut input).expect("no violation") {
            TransmissionEvent::NeedInput => return found,
            TransmissionEvent::Disconnect => {
                found.push(TransmissionEvent::Disconnect);
                return found;
            }
            event => found.push(event),
        }
    }
}

/// Hands in one request and a disconnect, and returns the error of the rejection.
fn rejected(transmission: &mut Transmission, input: &[u8]) -> Option<u32> {
    let is_extended = transmission.replies() == Replies::Extended;
    let end = if is_extended { extended(0, 2, 0, 0, 0) } else { compact(0, 2, 0, 0, 0) };
    let input = [input, &end].concat();
    let events = events(transmission, &input);
    assert_eq!(events.last(), Some(&TransmissionEvent::Disconnect), "in step: {events:?}");
    match &events[..] {
        [TransmissionEvent::Rejected(rejection), _] => {
            assert_eq!(rejection.tag.cookie, Cookie(9));
            assert!(!rejection.message.is_empty());
            Some(rejection.error.0)
        }
        [_] | [_, _] | [_, _, _] => None,
        other => panic!("{other:?}"),
    }
}

fn is_violation(transmission: &mut Transmission, mut input: &[u8]) -> bool {
    loop {
        match transmission.advance(&mut input) {
            Err(error) => {
                assert_eq!(transmission.advance(&mut &[][..]), Err(error.clone()), "it stays so");
                return error.kind() == ErrorKind::Violation;
            }
            Ok(TransmissionEvent::NeedInput) => return false,
            Ok(_) => {}
        }
    }
}

#[test]
fn many_requests_of_one_buffer_come_in_order() {
    let mut transmission = simple("disk");
    let input = [
        compact(0, 0, 1, 4096, 512),
        compact(FUA, 1, 2, 0, 4),
        b"data".to_vec(),
        compact(0, 3, 3, 77, 77),
        compact(FUA | NO_HOLE | FAST_ZERO, 6, 4, 0, SIZE_BYTES as u32),
        compact(0, 4, 5, 1, 1),
        compact(0, 5, 6, 1, 1),
        compact(0, 8, 7, 1 << 40, 0),
        compact(0, 2, 8, 0, 0),
    ]
    .concat();
    let request = |cookie, command, flags, start, len| Request {
        tag: Tag { cookie: Cookie(cookie), offset: start },
        command,
        flags: CommandFlags::from_bits_retain(flags),
        range: ByteRange { start, len },
    };
    let zeroes = FUA | NO_HOLE | FAST_ZERO;
    assert_eq!(
        events(&mut transmission, &input),
        [
            TransmissionEvent::Request(request(1, Command::Read, 0, 4096, 512)),
            TransmissionEvent::Write(request(2, Command::Write, FUA, 0, 4)),
            TransmissionEvent::Payload(b"data"),
            TransmissionEvent::Request(request(3, Command::Flush, 0, 77, 77)),
            TransmissionEvent::Request(request(4, Command::WriteZeroes, zeroes, 0, SIZE_BYTES)),
            TransmissionEvent::Request(request(5, Command::Trim, 0, 1, 1)),
            TransmissionEvent::Request(request(6, Command::Cache, 0, 1, 1)),
            TransmissionEvent::Request(request(7, Command::Resize, 0, 1 << 40, 0)),
            TransmissionEvent::Disconnect,
        ]
    );
    // Nothing is taken after the goodbye.
    let mut more = &compact(0, 0, 1, 0, 1)[..];
    assert_eq!(transmission.advance(&mut more), Ok(TransmissionEvent::Disconnect));
    assert_eq!(more.len(), 28);
}

#[test]
fn a_driver_may_read_a_payload_itself() {
    let mut transmission = simple("disk");
    let input = [compact(0, 1, 1, 0, 8), b"1234".to_vec()].concat();
    let mut input = &input[..];
    let event = transmission.advance(&mut input).unwrap();
    assert!(matches!(event, TransmissionEvent::Write(_)));
    assert_eq!((transmission.payload_remaining(), input.len()), (8, 4), "4 bytes are here");
    transmission.payload_taken(8);
    assert_eq!(transmission.payload_remaining(), 0);
    let next = compact(0, 0, 2, 0, 1);
    assert!(matches!(events(&mut transmission, &next)[..], [TransmissionEvent::Request(_)]));
}

#[test]
fn requests_that_the_export_does_not_take_are_rejected_with_the_right_error() {
    let end = SIZE_BYTES;
    let max = 32 << 20;
    let write = |flags, offset, len: u32| {
        [compact(flags, 1, 9, offset, len), vec![7; len as usize]].concat()
    };
    let rows: Vec<(&str, &str, Vec<u8>, Option<u32>)> = vec![
        ("read of the last byte", "disk", compact(0, 0, 9, end - 1, 1), None),
        ("read of nothing", "disk", compact(0, 0, 9, end, 0), None),
        ("read past the end", "disk", compact(0, 0, 9, end, 1), Some(EINVAL)),
        ("read around the end of the world", "disk", compact(0, 0, 9, !0, 1), Some(EINVAL)),
        ("read of too much", "disk", compact(0, 0, 9, 0, max + 1), Some(EINVAL)),
        ("read with DF, simple", "disk", compact(DF, 0, 9, 0, 1), Some(EINVAL)),
        ("read with FUA", "disk", compact(FUA, 0, 9, 0, 1), None),
        ("FUA that was not offered", "plain", compact(FUA, 0, 9, 0, 1), Some(EINVAL)),
        ("unknown flag", "disk", compact(64, 0, 9, 0, 1), Some(EINVAL)),
        ("flag of another command", "disk", compact(NO_HOLE, 0, 9, 0, 1), Some(EINVAL)),
        ("PAYLOAD_LEN, compact", "disk", write(PAYLOAD_LEN, 0, 4), Some(EINVAL)),
        ("unknown command", "disk", compact(0, 99, 9, 0, 1), Some(EINVAL)),
        ("write of nothing", "disk", write(0, end, 0), None),
        ("write past the end", "disk", write(0, end - 1, 2), Some(ENOSPC)),
        ("write around", "disk", write(0, u64::MAX, 4), Some(ENOSPC)),
        ("write, read-only", "read-only", write(0, 0, 4096), Some(EPERM)),
        ("write with DF", "disk", write(DF, 0, 4096), Some(EINVAL)),
        ("write above the maximum", "blocks", write(0, 0, (1 << 20) + 512), Some(EINVAL)),
        ("zeroes past the end", "disk", compact(0, 6, 9, end, 1), Some(ENOSPC)),
        ("zeroes, read-only", "read-only", compact(0, 6, 9, 0, 1), Some(EPERM)),
        ("zeroes not offered", "plain", compact(0, 6, 9, 0, 1), Some(EINVAL)),
        ("fast zeroes not offered", "plain", compact(FAST_ZERO, 6, 9, 0, 1), Some(EINVAL)),
        ("trim past the end", "disk", compact(0, 4, 9, 1, end as u32), Some(EINVAL)),
        ("trim, read-only", "read-only", compact(0, 4, 9, 0, 1), Some(EPERM)),
        ("trim not offered", "plain", compact(0, 4, 9, 0, 1), Some(EINVAL)),
        ("cache past the end", "disk", compact(0, 5, 9, end, 1), Some(EINVAL)),
        ("cache not offered", "plain", compact(0, 5, 9, 0, 1), Some(EINVAL)),
        ("flush not offered", "plain", compact(0, 3, 9, 0, 0), Some(EINVAL)),
        ("flush with a flag", "disk", compact(REQ_ONE, 3, 9, 0, 0), Some(EINVAL)),
        ("status without contexts", "disk", compact(0, 7, 9, 0, 1), Some(EINVAL)),
        ("resize not offered", "plain", compact(0, 8, 9, 1, 0), Some(EINVAL)),
        ("resize, read-only", "read-only", compact(0, 8, 9, 1, 0), Some(EPERM)),
        ("resize with a length", "disk", compact(0, 8, 9, 1, 1), Some(EINVAL)),
        ("resize to 2^63", "disk", compact(0, 8, 9, 1 << 63, 0), Some(EINVAL)),
        ("unaligned offset", "blocks", compact(0, 0, 9, 1, 512), Some(EINVAL)),
        ("unaligned length", "blocks", compact(0, 6, 9, 512, 1), Some(EINVAL)),
        ("unaligned write", "blocks", write(0, 0, 3), Some(EINVAL)),
        ("aligned", "blocks", compact(0, 0, 9, 512, 512), None),
    ];
    for (what, name, input, expected) in rows {
        assert_eq!(rejected(&mut simple(name), &input), expected, "{what}");
    }
}

#[test]
fn chunks_allow_unfragmented_reads_and_status() {
    let status = |flags, offset, len| compact(flags, 7, 9, offset, len);
    assert_eq!(rejected(&mut structured(), &compact(DF, 0, 9, 0, 1)), None);
    assert_eq!(rejected(&mut structured(), &compact(0, 0, 9, 0, (32 << 20) + 1)), Some(EOVERFLOW));
    assert_eq!(rejected(&mut structured(), &status(REQ_ONE, 0, 1)), None);
    assert_eq!(rejected(&mut structured(), &status(0, 0, 0)), Some(EINVAL));
    assert_eq!(rejected(&mut structured(), &status(0, SIZE_BYTES, 1)), Some(EINVAL));
    assert_eq!(rejected(&mut structured(), &status(PAYLOAD_LEN, 0, 8)), Some(EINVAL));
}

#[test]
fn extended_requests_have_64_bit_lengths_and_say_when_a_payload_follows() {
    let write = |flags, len: u64| [extended(flags, 1, 9, 0, len), vec![7; len as usize]].concat();
    let with_payload = |command, len: u64, bytes: usize| {
        [extended(PAYLOAD_LEN, command, 9, 0, len), vec![0; bytes]].concat()
    };
    let rows: Vec<(&str, Vec<u8>, Option<u32>)> = vec![
        ("write", write(PAYLOAD_LEN, 512), None),
        ("write without the flag", write(0, 512), None),
        ("write of nothing", write(PAYLOAD_LEN, 0), None),
        ("write with a wrong flag", write(PAYLOAD_LEN | DF, 512), Some(EINVAL)),
        ("read with a payload", with_payload(0, 16, 16), Some(EINVAL)),
        ("flush with a payload", with_payload(3, 16, 16), Some(EINVAL)),
        ("unknown command with a payload", with_payload(99, 16, 16), Some(EINVAL)),
        ("zeroes of 2^63", extended(0, 6, 9, 0, 1 << 63), Some(ENOSPC)),
        ("trim of all", extended(0, 4, 9, 0, SIZE_BYTES), None),
        ("status of 2^64 - 1", extended(0, 7, 9, 0, u64::MAX), Some(EINVAL)),
        ("read of 2^40", extended(0, 0, 9, 0, 1 << 40), Some(EOVERFLOW)),
    ];
    for (what, input, expected) in rows {
        assert_eq!(rejected(&mut extended_headers(), &input), expected, "{what}");
    }
}

#[test]
fn a_status_may_name_its_contexts() {
    let status = |payload: &[u8]| {
        [extended(PAYLOAD_LEN, 7, 9, 4096, payload.len() as u64), payload.to_vec()].concat()
    };
    let payload = |len: u64, ids: &[u32]| -> Vec<u8> {
        let ids = ids.iter().flat_map(|id| id.to_be_bytes());
        len.to_be_bytes().into_iter().chain(ids).collect()
    };
    let mut transmission = extended_headers();
    let input = status(&payload(512, &[9, 0]));
    let [TransmissionEvent::BlockStatus(request, wanted)] = &events(&mut transmission, &input)[..]
    else {
        panic!("one status");
    };
    assert_eq!(request.range, ByteRange { start: 4096, len: 512 });
    assert_eq!(request.flags, CommandFlags::empty());
    assert!(wanted.wants(ContextId(0)) && wanted.wants(ContextId(9)));
    assert!(!wanted.wants(ContextId(2)));
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("too short", vec![0; 7]),
        ("half an id", payload(512, &[0])[..10].to_vec()),
        ("more ids than there are", payload(512, &[0, 2, 9, 0])),
        ("an id twice", payload(512, &[0, 0])),
        ("an unknown id", payload(512, &[1])),
        ("of nothing", payload(0, &[0])),
        ("past the end", payload(SIZE_BYTES, &[0])),
        ("2^64 - 1", payload(u64::MAX, &[0])),
        ("nothing at all", vec![]),
    ];
    for (what, payload) in rows {
        let input = status(&payload);
        assert_eq!(rejected(&mut extended_headers(), &input), Some(EINVAL), "{what}");
    }
    let input = extended(0, 7, 9, 0, 512);
    let all = events(&mut transmission, &input);
    assert!(matches!(&all[..], [TransmissionEvent::BlockStatus(_, WantedContexts::All)]));
}

#[test]
fn what_breaks_the_protocol_ends_the_connection() {
    let wrong = |magic: u32| [&magic.to_be_bytes()[..], &[0; 28]].concat();
    for magic in [0, 0x2560_9512, 0x21e4_1c71, 0x6744_6698, 0x2560_9514, 0x1256_0953] {
        assert!(is_violation(&mut simple("disk"), &wrong(magic)), "{magic:#x}");
    }
    assert!(is_violation(&mut extended_headers(), &wrong(0x2560_9513)), "compact after extended");
    let most = 32 << 20;
    assert!(is_violation(&mut simple("disk"), &compact(0, 1, 1, 0, most + 1)), "payload");
    assert!(!is_violation(&mut simple("disk"), &compact(0, 1, 1, 0, most)), "drained");
    let payload = |command, len| extended(PAYLOAD_LEN, command, 1, 0, len);
    for command in [0, 1, 3, 7, 99] {
        assert!(is_violation(&mut extended_headers(), &payload(command, 1 + u64::from(most))));
        assert!(is_violation(&mut extended_headers(), &payload(command, u64::MAX)));
    }
}

#[test]
fn a_server_that_ends_rejects_what_comes_and_lets_go() {
    let mut transmission = simple("disk");
    transmission.shut_down();
    let input = [compact(0, 1, 9, 0, 4), b"data".to_vec()].concat();
    assert_eq!(rejected(&mut transmission, &input), Some(108));
}

#[test]
fn ranges_are_checked_against_the_size_of_the_moment() {
    let mut transmission = simple("disk");
    transmission.set_size_bytes(2 * SIZE_BYTES);
    assert_eq!(rejected(&mut transmission, &compact(0, 0, 9, SIZE_BYTES, 512)), None);
    let mut transmission = simple("disk");
    transmission.set_size_bytes(512);
    assert_eq!(rejected(&mut transmission, &compact(0, 0, 9, 512, 512)), Some(EINVAL));
}

const TAG: Tag = Tag { cookie: Cookie(0x0102_0304_0506_0708), offset: 0x1000 };

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn replies_are_the_bytes_of_the_specification() {
    let range = ByteRange { start: 0x1200, len: 0x200 };
    let cookie = "0102030405060708";
    let (simple, structured, extended) = (Replies::Simple, Replies::Structured, Replies::Extended);
    let old = |error: &str| format!("67446698{error}{cookie}");
    let new = |flags: &str, kind: &str, len: &str| format!("668e33ef{flags}{kind}{cookie}{len}");
    let wide = |flags: &str, kind: &str, len: &str| {
        format!("6e8a278c{flags}{kind}{cookie}000000000000100000000000{len}")
    };
    let start = "0000000000001200";
    assert_eq!(hex(&simple.success(TAG)), old("00000000"));
    assert_eq!(hex(&structured.success(TAG)), old("00000000"));
    assert_eq!(hex(&extended.success(TAG)), wide("0001", "0000", "00000000"));
    assert_eq!(hex(&simple.whole_read(TAG, range)), old("00000000"));
    let data = new("0001", "0001", "00000208") + start;
    assert_eq!(hex(&structured.whole_read(TAG, range)), data);
    let data = wide("0001", "0001", "00000208") + start;
    assert_eq!(hex(&extended.whole_read(TAG, range)), data);
    let nothing = ByteRange { start: 0x1000, len: 0 };
    assert_eq!(hex(&structured.whole_read(TAG, nothing)), new("0001", "0000", "00000000"));
    assert_eq!(hex(&structured.data(TAG, range, Last::No))[..16], new("0000", "0001", "")[..16]);
    let hole = new("0001", "0002", "0000000c") + start + "00000200";
    assert_eq!(hex(&structured.hole(TAG, range, Last::Yes)), hole);
    let hole = wide("0000", "0002", "0000000c") + start + "00000200";
    assert_eq!(hex(&extended.hole(TAG, range, Last::No)), hole);
    assert_eq!(hex(&extended.end(TAG)), wide("0001", "0000", "00000000"));
}

#[test]
fn errors_are_the_bytes_of_the_specification() {
    let error = |replies: Replies| {
        let mut output = Vec::new();
        replies.error(TAG, ErrorCode::EIO, "no", &mut output);
        hex(&output)
    };
    assert_eq!(error(Replies::Simple), "67446698000000050102030405060708");
    let payload = "0000000500026e6f";
    assert_eq!(
        error(Replies::Structured),
        format!("668e33ef00018001010203040506070800000008{payload}")
    );
    assert_eq!(
        error(Replies::Extended),
        format!("6e8a278c00018001010203040506070800000000000010000000000000000008{payload}")
    );
    let mut output = Vec::new();
    Replies::Structured.error_at(TAG, (ErrorCode::EIO, ""), 0x1234, Last::No, &mut output);
    let expected = "668e33ef0000800201020304050607080000000e0000000500000000000000001234";
    assert_eq!(hex(&output), expected);
}

#[test]
fn long_error_texts_are_cut() {
    let mut output = Vec::new();
    Replies::Structured.error(TAG, ErrorCode::EIO, &"x".repeat(70_000), &mut output);
    assert_eq!(output.len(), 20 + 6 + 4096);
    assert_eq!(output[16..20], 4102_u32.to_be_bytes());
}

/// The rows of a status chunk.
fn status(
    replies: Replies,
    flags: CommandFlags,
    len: u64,
    extents: &[(u64, u64)],
) -> Vec<(u64, u64)> {
    let extents = extents.iter().map(|(len, flags)| StatusExtent { len: *len, flags: *flags });
    let range = ByteRange { start: TAG.offset, len };
    let request = Request { tag: TAG, command: Command::BlockStatus, flags, range };
    let mut output = b"before".to_vec();
    replies.block_status(&request, ContextId(7), extents, 1, Last::Yes, &mut output);
    let output = &output[6..];
    let (header, front, width) =
        if replies == Replies::Extended { (32, 8, 16) } else { (20, 4, 8) };
    let announced = u32::from_be_bytes(output[header - 4..header].try_into().unwrap());
    assert_eq!(output.len(), header + announced as usize);
    assert_eq!(output[header..header + 4], 7_u32.to_be_bytes());
    let rows = output[header + front..].chunks_exact(width);
    if replies == Replies::Extended {
        assert_eq!(output[header + 4..header + 8], (rows.len() as u32).to_be_bytes());
    }
    rows.map(|row| {
        let (len, flags) = row.split_at(width / 2);
        let number = |half: &[u8]| half.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        (number(len), number(flags))
    })
    .collect()
}

#[test]
fn status_chunks_join_neighbours_and_stop_where_the_request_is_covered() {
    for replies in [Replies::Structured, Replies::Extended] {
        let status = |flags, len, extents: &[(u64, u64)]| status(replies, flags, len, extents);
        let none = CommandFlags::empty();
        let joined = status(none, 4096, &[(0, 1), (512, 3), (512, 3), (0, 5), (512, 0), (9999, 1)]);
        assert_eq!(joined, [(1024, 3), (512, 0), (9999, 1)]);
        assert_eq!(status(none, 1024, &[(512, 3), (512, 0), (512, 1)]), [(512, 3), (512, 0)]);
        assert_eq!(status(none, 4096, &[(512, 3)]), [(512, 3)], "the client asks again");
        let one = CommandFlags::REQ_ONE;
        assert_eq!(status(one, 1024, &[(512, 3), (512, 0)]), [(512, 3)]);
        assert_eq!(status(one, 1024, &[(512, 3), (512, 3), (512, 3)]), [(1024, 3)]);
    }
}

#[test]
fn status_chunks_have_a_bound() {
    let extents = (0..u64::from(MAX_EXTENTS) + 9).map(|n| (512, n % 2)).collect::<Vec<_>>();
    let none = CommandFlags::empty();
    let rows = status(Replies::Extended, none, u64::MAX, &extents);
    assert_eq!(rows.len(), MAX_EXTENTS as usize);
}

#[test]
fn wide_status_fits_extended_replies() {
    let rows = status(Replies::Extended, CommandFlags::empty(), 1 << 40, &[(1 << 40, 1 << 63)]);
    assert_eq!(rows, [(1 << 40, 1 << 63)]);
}

/// CVE-2025-47711, CVE-2025-47712: a request of the largest size, and an extent that is larger yet.
#[test]
fn extents_of_4_gib_and_more_are_cut_to_an_aligned_length() {
    let none = CommandFlags::empty();
    let most = 0xffff_fe00;
    for len in [1 << 32, (1 << 32) + 1, u64::MAX] {
        let rows = status(Replies::Structured, none, 1 << 20, &[(len, 3)]);
        assert_eq!(rows, [(most, 3)], "{len}");
        let rows = status(Replies::Structured, CommandFlags::REQ_ONE, 0xffff_ffff, &[(len, 3)]);
        assert_eq!(rows, [(most, 3)], "{len}");
        let rows = status(Replies::Structured, none, 0xffff_ffff, &[(len, 3)]);
        assert_eq!(rows[0], (most, 3), "{len}");
        assert!(rows.len() == 2 && rows[1].0 > 0, "the rest of the request: {rows:?}");
    }
}
