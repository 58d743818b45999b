//! The server's side of the handshake: bytes that go out for bytes that come in.

mod talk;

use lacuna_nbd::ErrorKind;
use lacuna_nbd::server::{Handshake, MAX_OPTION_BYTES, MAX_OPTIONS, TlsMode};
use talk::*;

#[test]
fn greeting_is_fixed_newstyle_and_offers_no_zeroes() {
    let greeting = Handshake::new(TlsMode::Off).take_output();
    assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn client_flags_that_were_not_offered_end_the_connection() {
    for word in [4_u32, 1 << 31, u32::MAX] {
        let mut handshake = Handshake::new(TlsMode::Off);
        let end = drive(&mut handshake, &mut &word.to_be_bytes()[..]);
        assert!(matches!(end, End::Failed(error) if error.kind() == ErrorKind::Violation));
    }
}

#[test]
fn a_client_without_fixed_newstyle_can_only_choose_an_export() {
    for (number, is_fine) in [(EXPORT_NAME, true), (LIST, false), (GO, false), (99, false)] {
        let mut handshake = Handshake::new(TlsMode::Off);
        let input = [vec![0; 4], option(number, b"")].concat();
        let end = drive(&mut handshake, &mut &input[..]);
        assert_eq!(matches!(end, End::Transmission(_)), is_fine, "{number}: {end:?}");
    }
}

#[test]
fn export_name_is_answered_without_header_and_with_zeros_unless_negotiated_away() {
    for (flags, len) in [(3_u8, 10), (1, 134)] {
        let mut handshake = Handshake::new(TlsMode::Off);
        let _greeting = handshake.take_output();
        let input = [vec![0, 0, 0, flags], option(EXPORT_NAME, b"disk")].concat();
        let End::Transmission(transmission) = drive(&mut handshake, &mut &input[..]) else {
            panic!("no transmission");
        };
        let output = handshake.take_output();
        assert_eq!(output.len(), len);
        assert_eq!(output[..8], SIZE_BYTES.to_be_bytes());
        // No DF without chunks: HAS_FLAGS, FLUSH, FUA, TRIM, ZEROES, MULTI, RESIZE, CACHE, FAST.
        assert_eq!(output[8..10], 0x0f6d_u16.to_be_bytes());
        assert!(output[10..].iter().all(|byte| *byte == 0));
        assert_eq!(transmission.export_name().as_str(), "disk");
    }
}

#[test]
fn export_name_that_cannot_be_served_ends_the_connection() {
    let extended = option(EXTENDED_HEADERS, b"");
    for (before, name) in [
        (&[][..], "nothing"),
        (&[], "secret"),
        (&[], "blocks"),
        (std::slice::from_ref(&extended), "disk"),
    ] {
        let mut handshake = started(TlsMode::Off);
        let input = [before.concat(), option(EXPORT_NAME, name.as_bytes())].concat();
        let end = drive(&mut handshake, &mut &input[..]);
        assert!(matches!(&end, End::Failed(error) if error.kind() == ErrorKind::Refused), "{name}");
    }
}

#[test]
fn list_names_all_exports() {
    let replies = answers(&mut started(TlsMode::Off), &[option(LIST, b"")]);
    assert_eq!(replies.iter().map(|reply| reply.kind).collect::<Vec<_>>(), [SERVER, SERVER, ACK]);
    assert_eq!(replies[0].data, b"\0\0\0\x04diskis disk");
}

#[test]
fn go_states_what_was_asked_in_the_order_of_qemu() {
    let mut handshake = started(TlsMode::Off);
    let data = info_data("", &[3, 1, 2, 4, 77]);
    let replies = answers(&mut handshake, &[option(STRUCTURED_REPLY, b""), option(GO, &data)]);
    let infos: Vec<_> = replies[1..].iter().map(|reply| &reply.data[..]).collect();
    assert_eq!(
        infos,
        [
            &b"\0\x01disk"[..],
            b"\0\x02A disk",
            b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0",
            b"\0\x04\0\x02",
            b"\0\0\0\0\0\0\0\x10\0\0\x0f\xed",
            b"",
        ]
    );
    assert!(replies[1..6].iter().all(|reply| reply.kind == REP_INFO && reply.option == GO));
    assert_eq!(replies[6].kind, ACK);
}

#[test]
fn init_state_name_and_description_are_for_those_who_ask() {
    let replies = answers(&mut started(TlsMode::Off), &[option(INFO, &info_data("", &[]))]);
    let kinds: Vec<_> = replies.iter().map(|reply| reply.data.get(1).copied()).collect();
    assert_eq!(kinds, [Some(3), Some(0), None], "sizes, export, acknowledgement");
}

#[test]
fn flags_depend_on_what_was_negotiated() {
    let flags = |options: &[Vec<u8>], last: u32, name: &str| {
        let mut all = options.to_vec();
        all.push(option(last, &info_data(name, &[])));
        let replies = answers(&mut started(TlsMode::Off), &all);
        let export = replies.iter().find(|reply| {
            reply.kind == REP_INFO && reply.data.starts_with(&[0, 0]) && reply.data.len() == 12
        });
        u16::from_be_bytes(export.expect("an export").data[10..].try_into().unwrap())
    };
    let structured = option(STRUCTURED_REPLY, b"");
    let extended = option(EXTENDED_HEADERS, b"");
    let context = option(SET_META_CONTEXT, &context_data("disk", &["base:allocation"]));
    assert_eq!(flags(&[], GO, "disk"), 0x0f6d);
    assert_eq!(flags(std::slice::from_ref(&structured), GO, "disk"), 0x0fed);
    assert_eq!(flags(std::slice::from_ref(&extended), GO, "disk"), 0x0fed);
    assert_eq!(flags(std::slice::from_ref(&extended), INFO, "disk"), 0x1fed);
    assert_eq!(flags(&[extended.clone(), context.clone()], GO, "disk"), 0x1fed);
    assert_eq!(flags(&[structured, context], GO, "disk"), 0x0fed);
    assert_eq!(flags(&[], GO, "plain"), 0x0001);
    // Read-only: no TRIM, no ZEROES, no FAST_ZERO, no RESIZE.
    assert_eq!(flags(&[], GO, "read-only"), 0x050f);
}

#[test]
fn a_minimum_block_is_insisted_on() {
    let replies = answers(&mut started(TlsMode::Off), &[option(GO, &info_data("blocks", &[1]))]);
    assert_eq!(replies.iter().map(|r| r.kind).collect::<Vec<_>>(), [REP_INFO, BLOCK_SIZE_REQD]);
    assert_eq!(replies[0].data, b"\0\x03\0\0\x02\0\0\0\x10\0\0\x10\0\0");
    assert_eq!(chosen(&[], "blocks").block_sizes().minimum(), 512);
}

/// What an option's data may not be, and the answer.
#[test]
fn wrong_data_is_answered_with_an_error_and_haggling_goes_on() {
    let long = "x".repeat(4097);
    let structured = || option(STRUCTURED_REPLY, b"");
    let rows: Vec<(&str, Vec<Vec<u8>>, u32)> = vec![
        ("list with data", vec![option(LIST, b"x")], INVALID),
        ("starttls with data", vec![option(STARTTLS, b"x")], POLICY),
        ("structured with data", vec![option(STRUCTURED_REPLY, b"x")], INVALID),
        ("extended with data", vec![option(EXTENDED_HEADERS, b"x")], INVALID),
        ("structured twice", vec![structured(), structured()], INVALID),
        ("extended twice", vec![option(11, b""), option(11, b"")], INVALID),
        ("structured after extended", vec![option(11, b""), structured()], EXT_HEADER_REQD),
        ("unknown option", vec![option(77, b"data")], UNSUP),
        ("peek export", vec![option(4, b"")], UNSUP),
        ("go without data", vec![option(GO, b"")], INVALID),
        ("go without count", vec![option(GO, &counted(b"disk"))], INVALID),
        ("name past the end", vec![option(GO, b"\0\0\0\x05disk\0\0")], INVALID),
        ("name of 4 GiB", vec![option(GO, b"\xff\xff\xff\xffdisk\0\0")], INVALID),
        ("too few infos", vec![option(GO, b"\0\0\0\0\0\x02\0\x03")], INVALID),
        ("bytes behind infos", vec![option(GO, b"\0\0\0\0\0\0\0")], INVALID),
        ("long name", vec![option(GO, &info_data(&long, &[]))], INVALID),
        ("name with NUL", vec![option(GO, &info_data("a\0b", &[]))], INVALID),
        ("name not UTF-8", vec![option(GO, b"\0\0\0\x01\xff\0\0")], INVALID),
        ("unknown name", vec![option(GO, &info_data("other", &[]))], UNKNOWN),
        ("name for TLS", vec![option(GO, &info_data("secret", &[]))], TLS_REQD),
        ("too long data", vec![option(GO, &vec![0; MAX_OPTION_BYTES as usize + 1])], TOO_BIG),
        ("contexts too early", vec![option(10, &context_data("disk", &[]))], INVALID),
        ("contexts without count", vec![structured(), option(10, &counted(b""))], INVALID),
        ("contexts of nothing", vec![structured(), option(10, b"")], INVALID),
        (
            "contexts of an unknown export",
            vec![structured(), option(10, &context_data("other", &["base:allocation"]))],
            UNKNOWN,
        ),
        ("long query", vec![structured(), option(10, &context_data("disk", &[&long]))], INVALID),
        ("fewer queries than said", vec![option(9, b"\0\0\0\0\0\0\0\x01")], INVALID),
        ("2^32 queries", vec![option(9, b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0")], INVALID),
        ("query past the end", vec![option(9, b"\0\0\0\0\0\0\0\x01\0\0\0\x02x")], INVALID),
        ("bytes behind queries", vec![option(9, b"\0\0\0\0\0\0\0\0x")], INVALID),
    ];
    for (what, mut options, expected) in rows {
        options.push(option(LIST, b""));
        let kinds = kinds(&options);
        assert_eq!(kinds[kinds.len() - 4], expected, "{what}: {kinds:x?}");
        assert_eq!(kinds[kinds.len() - 3..], [SERVER, SERVER, ACK], "{what}: not in step");
    }
}

#[test]
fn abort_is_acknowledged_whatever_comes_with_it() {
    for data in [&b""[..], b"so long"] {
        let mut handshake = started(TlsMode::Required);
        assert!(matches!(drive(&mut handshake, &mut &option(ABORT, data)[..]), End::Aborted));
        assert_eq!(replies(&handshake.take_output())[0].kind, ACK);
    }
}

#[test]
fn contexts_are_listed_by_wildcard_and_chosen_by_whole_name() {
    let names = |number, queries: &[&str]| {
        let options = [option(11, b""), option(number, &context_data("disk", queries))];
        let replies = answers(&mut started(TlsMode::Off), &options);
        let contexts = replies.iter().filter(|reply| reply.kind == META_CONTEXT);
        let names: Vec<_> = contexts
            .map(|reply| {
                let id = u32::from_be_bytes(reply.data[..4].try_into().unwrap());
                (id, String::from_utf8(reply.data[4..].to_vec()).unwrap())
            })
            .collect();
        assert_eq!(replies.last().unwrap().kind, ACK);
        names
    };
    let own = |rows: &[(u32, &str)]| -> Vec<(u32, String)> {
        rows.iter().map(|(id, name)| (*id, (*name).to_owned())).collect()
    };
    let (base, depth) = ("base:allocation", "qemu:allocation-depth");
    let (bitmap, layers) = ("qemu:dirty-bitmap:b", "x-lacuna:layers");
    let all = own(&[(0, base), (0, depth), (0, bitmap), (0, layers)]);
    assert_eq!(names(LIST_META_CONTEXT, &[]), all);
    assert_eq!(names(LIST_META_CONTEXT, &["base:"]), own(&[(0, base)]));
    assert_eq!(names(LIST_META_CONTEXT, &["qemu:"]), own(&[(0, depth), (0, bitmap)]));
    assert_eq!(names(LIST_META_CONTEXT, &["qemu:dirty-bitmap:"]), own(&[(0, bitmap)]));
    assert_eq!(names(LIST_META_CONTEXT, &["other:", "base"]), []);
    assert_eq!(names(SET_META_CONTEXT, &[]), []);
    assert_eq!(names(SET_META_CONTEXT, &["base:", "qemu:", "qemu:dirty-bitmap:", "x:y"]), []);
    assert_eq!(
        names(SET_META_CONTEXT, &[layers, base, bitmap, base]),
        own(&[(0, base), (2, bitmap), (9, layers)])
    );
}

#[test]
fn wide_contexts_need_extended_headers() {
    let query = context_data("disk", &["x-lacuna:layers"]);
    let structured = option(STRUCTURED_REPLY, b"");
    assert_eq!(kinds(&[structured.clone(), option(SET_META_CONTEXT, &query)]), [ACK, ACK]);
    let all = option(LIST_META_CONTEXT, &context_data("disk", &[]));
    assert_eq!(kinds(&[structured, all]), [ACK, META_CONTEXT, META_CONTEXT, META_CONTEXT, ACK]);
}

#[test]
fn contexts_belong_to_the_export_they_were_chosen_for() {
    let structured = option(STRUCTURED_REPLY, b"");
    let set = |name: &str, queries: &[&str]| option(SET_META_CONTEXT, &context_data(name, queries));
    let contexts = |options: &[Vec<u8>], name: &str| chosen(options, name).contexts().len();
    let base = &["base:allocation"][..];
    assert_eq!(contexts(&[structured.clone(), set("disk", base)], "disk"), 1);
    // The default export is this disk too, but under another name.
    assert_eq!(contexts(&[structured.clone(), set("", base)], "disk"), 0);
    // Chosen anew, in vain, or failing: what was chosen before is gone.
    for second in [set("disk", &[]), set("other", base), option(SET_META_CONTEXT, b"x")] {
        assert_eq!(contexts(&[structured.clone(), set("disk", base), second], "disk"), 0);
    }
    let too_long = option(SET_META_CONTEXT, &vec![0; MAX_OPTION_BYTES as usize + 1]);
    assert_eq!(contexts(&[structured, set("disk", base), too_long], "disk"), 0);
}

#[test]
fn without_tls_starttls_is_refused_and_never_demanded() {
    assert_eq!(kinds(&[option(STARTTLS, b"")]), [POLICY]);
}

#[test]
fn where_tls_is_required_nothing_else_is_answered_before() {
    let mut handshake = started(TlsMode::Required);
    let options = [LIST, STRUCTURED_REPLY, INFO, 9, 10, 11, 77, GO].map(|n| option(n, b"data"));
    let replies = answers(&mut handshake, &options);
    assert!(replies.len() == 8 && replies.iter().all(|reply| reply.kind == TLS_REQD));
    let end = drive(&mut handshake, &mut &option(EXPORT_NAME, b"disk")[..]);
    assert!(matches!(end, End::Failed(_)), "EXPORT_NAME");
}

#[test]
fn exports_for_tls_are_there_under_tls_only() {
    let mut handshake = started(TlsMode::Allowed);
    let go = option(GO, &info_data("secret", &[]));
    assert_eq!(answers(&mut handshake, std::slice::from_ref(&go))[0].kind, TLS_REQD);
    assert!(matches!(drive(&mut handshake, &mut &option(STARTTLS, b"")[..]), End::Tls));
    handshake.tls_established();
    assert_eq!(answers(&mut handshake, &[option(STARTTLS, b"")])[1].kind, INVALID, "twice");
    assert!(matches!(drive(&mut handshake, &mut &go[..]), End::Transmission(_)));
}

#[test]
fn a_server_that_ends_says_so() {
    let mut handshake = started(TlsMode::Off);
    handshake.shut_down();
    assert_eq!(answers(&mut handshake, &[option(LIST, b"")])[0].kind, SHUTDOWN);
    assert!(matches!(drive(&mut handshake, &mut &option(ABORT, b"")[..]), End::Aborted));
}

#[test]
fn options_have_a_right_magic_number() {
    let mut handshake = started(TlsMode::Off);
    let end = drive(&mut handshake, &mut &b"IHAVEOPS\0\0\0\x03\0\0\0\0"[..]);
    assert!(matches!(end, End::Failed(_)));
    // And it stays so.
    assert!(matches!(drive(&mut handshake, &mut &option(LIST, b"")[..]), End::Failed(_)));
}

#[test]
fn options_without_end_end_the_connection() {
    let mut handshake = started(TlsMode::Off);
    let input = option(LIST, b"x").repeat(MAX_OPTIONS as usize + 1);
    assert!(matches!(drive(&mut handshake, &mut &input[..]), End::Failed(_)));
    assert_eq!(replies(&handshake.take_output()).len(), MAX_OPTIONS as usize);
}
