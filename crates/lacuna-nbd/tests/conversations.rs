//! Our client and our server talk to each other, in pieces of any size.

mod talk;

use lacuna_nbd::client::{self, Ask, Goal, Headers, TlsWish, Wish};
use lacuna_nbd::context::{BASE_ALLOCATION, LAYERS};
use lacuna_nbd::server::{
    self, Last, Replies, Request, StatusExtent, TlsMode, TransmissionEvent, WantedContexts,
};
use lacuna_nbd::wire::{CommandFlags, ErrorCode, InitState, TransmissionFlags};
use lacuna_nbd::{BlockSizes, ByteRange, Command, ContextId, Cookie, Error, ErrorKind, ExportName};
use proptest::prelude::*;
use talk::{SIZE_BYTES, find};

/// Bytes on their way, which arrive in pieces.
#[derive(Default)]
struct Wire {
    bytes: Vec<u8>,
    taken: usize,
}

impl Wire {
    /// What has arrived: at most `piece` bytes.
    fn arrived(&self, piece: usize) -> &[u8] {
        let rest = &self.bytes[self.taken..];
        &rest[..rest.len().min(piece)]
    }
}

enum Outcome {
    Transmission(Box<client::Transmission>, Box<server::Transmission>),
    Event(client::Event),
}

/// Lets both sides talk until the client is done.
fn shake_hands(wish: Wish, tls: TlsMode, piece: usize) -> Result<Outcome, Error> {
    let (mut client, mut server) = (client::Handshake::new(wish), server::Handshake::new(tls));
    let (mut up, mut down) = (Wire::default(), Wire::default());
    let mut of_server = None;
    let mut tls_of_client = false;
    for _ in 0..100_000 {
        let mut input = up.arrived(piece);
        let before = input.len();
        if of_server.is_none() {
            let event = server.advance(&mut input);
            up.taken += before - input.len();
            match event {
                Ok(server::Event::FindExport(question)) => server.answer_export(find(&question)),
                Ok(server::Event::ListExports) => {
                    let name = ExportName::new("disk").unwrap();
                    let description = "A disk".into();
                    server.answer_list(&[server::ListedExport { name, description }]);
                }
                Ok(server::Event::StartTls) => {
                    if tls_of_client {
                        server.tls_established();
                    }
                }
                Ok(server::Event::Transmission(transmission)) => of_server = Some(transmission),
                Ok(server::Event::NeedInput | server::Event::Aborted) => {}
                Err(error) => return Err(error),
            }
            down.bytes.extend(server.take_output());
        }
        let mut input = down.arrived(piece);
        let before = input.len();
        let event = client.advance(&mut input);
        down.taken += before - input.len();
        up.bytes.extend(client.take_output());
        match event? {
            client::Event::NeedInput => {}
            client::Event::StartTls => {
                client.tls_established();
                tls_of_client = true;
            }
            client::Event::Transmission(transmission) => {
                if let Ok(server::Event::Transmission(ready)) = server.advance(&mut &[][..]) {
                    of_server = Some(ready);
                }
                let of_server = of_server.expect("the server is as far");
                return Ok(Outcome::Transmission(transmission, of_server));
            }
            event => return Ok(Outcome::Event(event)),
        }
    }
    panic!("they never come to an end");
}

fn wish(name: &str) -> Wish {
    Wish::to_use(ExportName::new(name).unwrap())
}

#[test]
fn every_form_is_negotiated_in_pieces_of_every_size() {
    for piece in [1, 2, 3, 5, 7, 16, 19, 1000] {
        for (headers, replies, flags) in [
            (Headers::Simple, Replies::Simple, 0x0f6d),
            (Headers::Structured, Replies::Structured, 0x0fed),
            (Headers::Extended, Replies::Extended, 0x1fed),
        ] {
            let contexts = vec![BASE_ALLOCATION.into(), LAYERS.into()];
            let wish = Wish { headers, contexts, ..wish("") };
            let outcome = shake_hands(wish, TlsMode::Off, piece).unwrap();
            let Outcome::Transmission(client, server) = outcome else { panic!() };
            let info = client.info();
            assert_eq!((info.replies, server.replies()), (replies, replies));
            assert_eq!(info.flags.bits(), flags);
            assert_eq!((info.flags, info.size_bytes), (server.flags(), SIZE_BYTES));
            assert_eq!(info.contexts, server.contexts());
            let count = match replies {
                Replies::Simple => 0,
                Replies::Structured => 1,
                Replies::Extended => 2,
            };
            assert_eq!(info.contexts.len(), count);
            assert_eq!(info.name.as_ref().unwrap().as_str(), "disk");
            assert_eq!(info.description.as_deref(), Some("A disk"));
            assert_eq!(info.init_state, InitState::ZERO);
        }
    }
}

#[test]
fn the_other_goals_end_with_what_was_asked() {
    let event =
        |goal: Goal, name: &str| match shake_hands(Wish { goal, ..wish(name) }, TlsMode::Off, 3)
            .unwrap()
        {
            Outcome::Event(event) => event,
            Outcome::Transmission(..) => panic!("nobody asked"),
        };
    let client::Event::Exports(exports) = event(Goal::ListExports, "") else { panic!() };
    assert_eq!(exports[0].name.as_str(), "disk");
    let client::Event::Described(info) = event(Goal::Describe, "blocks") else { panic!() };
    assert_eq!(info.block_sizes.minimum(), 512);
    let all = Goal::ListContexts(Vec::new());
    let client::Event::Contexts(names) = event(all, "disk") else { panic!() };
    assert_eq!(names.len(), 4);
    let client::Event::DescribedAll(all) = event(Goal::DescribeAll, "") else { panic!() };
    let names: Vec<&str> = all.iter().map(|export| export.listed.name.as_str()).collect();
    let listed: Vec<&str> = exports.iter().map(|export| export.name.as_str()).collect();
    assert_eq!(names, listed);
    assert_eq!(all[0].info.as_ref().map(|info| info.size_bytes), Some(SIZE_BYTES));
    assert_eq!((all[0].contexts.len(), all[0].block_sizes), (4, Some(BlockSizes::default())));
    let bitmaps = Goal::ListContexts(vec!["qemu:dirty-bitmap:".into()]);
    let client::Event::Contexts(names) = event(bitmaps, "disk") else { panic!() };
    assert_eq!(names, ["qemu:dirty-bitmap:b"]);
}

#[test]
fn tls_is_used_demanded_and_refused() {
    let tls = |wanted: TlsWish, mode: TlsMode, name: &str| {
        shake_hands(Wish { tls: wanted, ..wish(name) }, mode, 5)
    };
    for (wanted, mode) in [
        (TlsWish::Required, TlsMode::Required),
        (TlsWish::IfOffered, TlsMode::Allowed),
        (TlsWish::Required, TlsMode::Allowed),
    ] {
        assert!(matches!(tls(wanted, mode, "secret"), Ok(Outcome::Transmission(..))));
    }
    assert!(matches!(tls(TlsWish::IfOffered, TlsMode::Off, "disk"), Ok(Outcome::Transmission(..))));
    for (wanted, mode, name) in [
        (TlsWish::Required, TlsMode::Off, "disk"),
        (TlsWish::Never, TlsMode::Required, "disk"),
        (TlsWish::Never, TlsMode::Allowed, "secret"),
        (TlsWish::IfOffered, TlsMode::Off, "secret"),
    ] {
        let Err(error) = tls(wanted, mode, name) else { panic!("{wanted:?} {mode:?}") };
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    }
    let Err(error) = tls(TlsWish::Never, TlsMode::Required, "disk") else { panic!() };
    assert!(error.to_string().contains("nbds://"), "{error}");
}

#[test]
fn an_export_that_is_not_there_is_told() {
    let Err(error) = shake_hands(wish("other"), TlsMode::Off, 7) else { panic!() };
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(
        error.to_string(),
        "The server refuses NBD_OPT_GO for export 'other': there is no such export; it says \
         'There is no export 'other''"
    );
}

/// A disk whose byte at `n` is `n / 512`, mixed; holes where that is even.
fn byte_at(offset: u64) -> u8 {
    if (offset >> 12).is_multiple_of(2) { 0 } else { (offset >> 9) as u8 }
}

/// Answers as a server would that knows its holes.
fn answer(
    replies: Replies,
    request: &Request,
    wanted: &WantedContexts,
    contexts: &[ContextId],
) -> Vec<u8> {
    let (tag, range) = (request.tag, request.range);
    let end = range.start + range.len;
    let mut output = Vec::new();
    let bytes = |range: ByteRange| (range.start..range.start + range.len).map(byte_at);
    match request.command {
        Command::Read if replies == Replies::Simple || request.flags.contains(CommandFlags::DF) => {
            output.extend_from_slice(&replies.whole_read(tag, range));
            output.extend(bytes(range));
        }
        Command::Read => {
            let mut parts = Vec::new();
            let mut start = range.start;
            while start < end {
                let len = (end - start).min(4096 - start % 4096);
                parts.push(ByteRange { start, len });
                start += len;
            }
            // Any order is fine.
            parts.reverse();
            for part in parts {
                if (part.start >> 12).is_multiple_of(2) {
                    output.extend_from_slice(&replies.hole(tag, part, Last::No));
                } else {
                    output.extend_from_slice(&replies.data(tag, part, Last::No));
                    output.extend(bytes(part));
                }
            }
            output.extend_from_slice(&replies.end(tag));
        }
        Command::BlockStatus => {
            let asked: Vec<_> = contexts.iter().filter(|id| wanted.wants(**id)).collect();
            for (index, id) in asked.iter().enumerate() {
                let last = if index + 1 == asked.len() { Last::Yes } else { Last::No };
                let mut start = range.start;
                let extents = std::iter::from_fn(|| {
                    let len = 4096 - start % 4096;
                    let flags = if (start >> 12).is_multiple_of(2) { 3 } else { 0 };
                    start += len;
                    (start <= SIZE_BYTES).then_some(StatusExtent { len, flags })
                });
                replies.block_status(request, **id, extents, 1, last, &mut output);
            }
        }
        Command::Flush => replies.error(tag, ErrorCode::EIO, "disk on fire", &mut output),
        _ => output.extend_from_slice(&replies.success(tag)),
    }
    output
}

/// What came back for one request.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    bytes: Vec<(u64, u8)>,
    extents: Vec<(ContextId, ByteRange, u64)>,
    result: Option<Result<(), ErrorCode>>,
}

/// Sends requests, all at once, and collects the answers.
fn ask(
    client: &mut client::Transmission,
    server: &mut server::Transmission,
    asks: &[Ask<'_>],
    piece: usize,
) -> Vec<Answer> {
    let mut up = Wire::default();
    let mut cookies: Vec<Cookie> = Vec::new();
    for ask in asks {
        let (cookie, header) = client.request(ask).unwrap();
        up.bytes.extend_from_slice(&header);
        if ask.command == Command::Write {
            up.bytes.extend(std::iter::repeat_n(7, ask.range.len as usize));
        }
        cookies.push(cookie);
    }
    up.bytes.extend_from_slice(&client.disconnect());
    let contexts: Vec<_> = server.contexts().iter().map(|context| context.id).collect();
    let mut replies: Vec<Vec<u8>> = Vec::new();
    let mut writing = None;
    loop {
        let mut input = up.arrived(piece);
        let before = input.len();
        let event = server.advance(&mut input).unwrap();
        let taken = before - input.len();
        let all = WantedContexts::All;
        match event {
            TransmissionEvent::Disconnect => break,
            TransmissionEvent::NeedInput => assert_eq!(taken, before, "all is used up"),
            TransmissionEvent::Request(request) => {
                replies.push(answer(server.replies(), &request, &all, &contexts));
            }
            TransmissionEvent::BlockStatus(request, wanted) => {
                replies.push(answer(server.replies(), &request, &wanted, &contexts));
            }
            TransmissionEvent::Write(request) => writing = Some(request),
            TransmissionEvent::Payload(bytes) => assert!(bytes.iter().all(|byte| *byte == 7)),
            TransmissionEvent::Rejected(rejection) => panic!("{rejection:?}"),
        }
        if let Some(request) = writing.take_if(|_| server.payload_remaining() == 0) {
            replies.push(answer(server.replies(), &request, &all, &contexts));
        }
        up.taken += taken;
    }
    // The last is answered first.
    let down = Wire { bytes: replies.into_iter().rev().flatten().collect(), taken: 0 };
    receive(client, down, &cookies, piece)
}

fn receive(
    client: &mut client::Transmission,
    mut down: Wire,
    cookies: &[Cookie],
    piece: usize,
) -> Vec<Answer> {
    let index = |cookie: Cookie| cookies.iter().position(|own| *own == cookie).unwrap();
    let mut answers: Vec<Answer> = cookies.iter().map(|_| Answer::default()).collect();
    let mut place = (0, 0);
    while client.in_flight() > 0 {
        let mut input = down.arrived(piece);
        let before = input.len();
        let event = client.advance(&mut input).unwrap();
        match event {
            client::TransmissionEvent::NeedInput => assert!(before > 0, "replies end early"),
            client::TransmissionEvent::Data { cookie, range } => {
                place = (index(cookie), range.start);
            }
            client::TransmissionEvent::Payload(bytes) => {
                let (index, start) = place;
                let offsets = start..start + bytes.len() as u64;
                place.1 = offsets.end;
                answers[index].bytes.extend(offsets.zip(bytes.iter().copied()));
            }
            client::TransmissionEvent::Hole { cookie, range } => {
                let bytes = (range.start..range.start + range.len).map(|offset| (offset, 0));
                answers[index(cookie)].bytes.extend(bytes);
            }
            client::TransmissionEvent::Extent { cookie, context, range, flags } => {
                answers[index(cookie)].extents.push((context, range, flags));
            }
            client::TransmissionEvent::Done { cookie, result } => {
                let result = result.map_err(|failure| failure.code);
                assert_eq!(answers[index(cookie)].result.replace(result), None);
            }
        }
        down.taken += before - input.len();
    }
    answers.iter_mut().for_each(|answer| answer.bytes.sort_unstable());
    answers
}

fn both(headers: Headers) -> (client::Transmission, server::Transmission) {
    let contexts = vec![BASE_ALLOCATION.into(), "qemu:dirty-bitmap:b".into(), LAYERS.into()];
    let wish = Wish { headers, contexts, ..wish("disk") };
    match shake_hands(wish, TlsMode::Off, 1000).unwrap() {
        Outcome::Transmission(client, server) => (*client, *server),
        Outcome::Event(event) => panic!("{event:?}"),
    }
}

#[test]
fn whole_conversations_come_out_the_same_in_every_form() {
    let range = |start, len| ByteRange { start, len };
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        for piece in [1, 3, 8, 20, 28, 31, 4096, 1 << 20] {
            let (mut client, mut server) = both(headers);
            let asks = [
                Ask::new(Command::Read, range(3000, 20_000)),
                Ask::new(Command::Write, range(512, 1000)).with(CommandFlags::FUA),
                Ask::new(Command::WriteZeroes, range(0, SIZE_BYTES)).with(CommandFlags::NO_HOLE),
                Ask::new(Command::Flush, range(0, 0)),
                Ask::new(Command::Read, range(0, 0)),
                Ask::new(Command::Trim, range(1, 1)),
                Ask::new(Command::Cache, range(0, 1)),
            ];
            let answers = ask(&mut client, &mut server, &asks, piece);
            let expected: Vec<_> = (3000..23_000).map(|n| (n, byte_at(n))).collect();
            assert!(answers[0].bytes == expected, "{headers:?}, {piece}");
            for (index, answer) in answers.iter().enumerate() {
                let expected = if index == 3 { Err(ErrorCode::EIO) } else { Ok(()) };
                assert_eq!(answer.result, Some(expected), "{index}");
            }
        }
    }
}

#[test]
fn block_status_comes_for_every_context_or_for_some() {
    let range = ByteRange { start: 100, len: 10_000 };
    for (headers, ids) in [(Headers::Structured, &[0, 2][..]), (Headers::Extended, &[0, 2, 9])] {
        let (mut client, mut server) = both(headers);
        let status = Ask::new(Command::BlockStatus, range);
        let answers = ask(&mut client, &mut server, &[status], 7);
        let rows = [(100, 3996, 3), (4096, 4096, 0), (8192, 4096, 3)];
        let expected: Vec<_> = ids
            .iter()
            .flat_map(|id| {
                rows.map(|(start, len, flags)| (ContextId(*id), ByteRange { start, len }, flags))
            })
            .collect();
        assert_eq!(answers[0].extents, expected);
        let (mut client, mut server) = both(headers);
        let one = status.with(CommandFlags::REQ_ONE);
        let answers = ask(&mut client, &mut server, &[one], 7);
        assert_eq!(answers[0].extents.len(), ids.len());
    }
    let (mut client, mut server) = both(Headers::Extended);
    assert!(client.info().flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    let wanted = [ContextId(9)];
    let some = Ask { contexts: Some(&wanted), ..Ask::new(Command::BlockStatus, range) };
    let answers = ask(&mut client, &mut server, &[some], 7);
    assert!(answers[0].extents.iter().all(|(id, ..)| *id == ContextId(9)));
}

#[test]
fn a_resize_moves_the_end_for_both() {
    let (mut client, mut server) = both(Headers::Extended);
    let read = Ask::new(Command::Read, ByteRange { start: SIZE_BYTES, len: 512 });
    let error = client.request(&read).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    let resize = Ask::new(Command::Resize, ByteRange { start: 2 * SIZE_BYTES, len: 0 });
    assert_eq!(ask(&mut client, &mut server, &[resize], 9)[0].result, Some(Ok(())));
    assert_eq!(client.info().size_bytes, 2 * SIZE_BYTES);
    assert!(client.request(&read).is_ok());
}

#[test]
fn what_the_server_would_reject_is_not_sent() {
    let range = |start, len| ByteRange { start, len };
    let (mut client, _server) = both(Headers::Simple);
    for ask in [
        Ask::new(Command::Read, range(SIZE_BYTES, 1)),
        Ask::new(Command::Read, range(0, 1)).with(CommandFlags::DF),
        Ask::new(Command::Write, range(u64::MAX, 2)),
        Ask::new(Command::BlockStatus, range(0, 1)),
        Ask { contexts: Some(&[]), ..Ask::new(Command::Read, range(0, 1)) },
    ] {
        assert_eq!(client.request(&ask).unwrap_err().kind(), ErrorKind::InvalidRequest);
    }
    assert_eq!(client.in_flight(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn reads_arrive_whole_in_any_pieces(
        asks in prop::collection::vec((0..SIZE_BYTES - 40_000, 0_u64..40_000, any::<bool>()), 1..5),
        piece in 1_usize..600,
        structured in any::<bool>(),
    ) {
        let headers = if structured { Headers::Structured } else { Headers::Extended };
        let (mut client, mut server) = both(headers);
        let requests: Vec<_> = asks.iter().map(|(start, len, whole)| {
            let ask = Ask::new(Command::Read, ByteRange { start: *start, len: *len });
            if *whole { ask.with(CommandFlags::DF) } else { ask }
        }).collect();
        let answers = ask(&mut client, &mut server, &requests, piece);
        for (answer, (start, len, _)) in answers.iter().zip(&asks) {
            prop_assert_eq!(answer.result, Some(Ok(())));
            let expected: Vec<_> = (*start..start + len).map(|n| (n, byte_at(n))).collect();
            prop_assert!(answer.bytes == expected);
        }
    }
}
