//! Our client against servers that others wrote.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lacuna_nbd::client::{
    Ask, Event, Failure, Goal, Handshake, Headers, Transmission, TransmissionEvent, Wish,
};
use lacuna_nbd::context::{BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH};
use lacuna_nbd::wire::{CommandFlags, ErrorCode, TransmissionFlags};
use lacuna_nbd::{ByteRange, Command, ErrorKind, ExportName, Replies};

const INSTALL: &str = "apt-get install qemu-utils nbdkit";

/// A foreign server that ends with the test.
struct Server {
    program: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _gone = self.program.kill();
        let _status = self.program.wait();
    }
}

/// Starts a server; `{}` in its arguments is the socket.
fn start(folder: &Path, words: &[&str]) -> Server {
    let socket = folder.join("socket");
    let arguments = words[1..].iter().map(|word| word.replace("{}", socket.to_str().unwrap()));
    let program = Program::new(words[0])
        .args(arguments)
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}: {INSTALL}", words[0]));
    let server = Server { program, socket };
    let deadline = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(&server.socket).is_err() {
        assert!(Instant::now() < deadline, "{words:?} does not listen");
        thread::sleep(Duration::from_millis(10));
    }
    server
}

fn run(words: &[&str]) {
    let output = Program::new(words[0]).args(&words[1..]).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}: {INSTALL}", words[0]));
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Receives in pieces that are no multiple of anything.
fn receive(socket: &mut UnixStream, input: &mut Vec<u8>) {
    let mut buffer = [0; 10_007];
    let len = socket.read(&mut buffer).unwrap();
    assert!(len > 0, "the server hung up");
    input.extend_from_slice(&buffer[..len]);
}

/// Shakes hands up to the first event that is not about bytes.
fn shake_hands(socket: &mut UnixStream, wish: Wish) -> Result<Event, lacuna_nbd::Error> {
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut handshake = Handshake::new(wish);
    let mut received = Vec::new();
    loop {
        let mut input = &received[..];
        let event = handshake.advance(&mut input);
        let taken = received.len() - input.len();
        received.drain(..taken);
        socket.write_all(&handshake.take_output()).unwrap();
        match event {
            Ok(Event::NeedInput) => receive(socket, &mut received),
            end => {
                assert!(received.is_empty(), "nothing comes unasked");
                return end;
            }
        }
    }
}

struct Connection {
    socket: UnixStream,
    transmission: Transmission,
}

/// What came back for one request.
#[derive(Debug, Default)]
struct Answer {
    bytes: Vec<u8>,
    extents: Vec<(String, ByteRange, u64)>,
    result: Option<Result<(), Box<Failure>>>,
}

impl Connection {
    fn new(server: &Server, wish: Wish) -> Self {
        let mut socket = UnixStream::connect(&server.socket).unwrap();
        match shake_hands(&mut socket, wish) {
            Ok(Event::Transmission(transmission)) => Self { socket, transmission: *transmission },
            end => panic!("{end:?}"),
        }
    }

    fn ask(&mut self, ask: &Ask<'_>, payload: &[u8]) -> Answer {
        let (_, header) = self.transmission.request(ask).unwrap();
        self.socket.write_all(&header).unwrap();
        self.socket.write_all(payload).unwrap();
        let mut answer = Answer::default();
        if ask.command == Command::Read {
            answer.bytes = vec![0xee; ask.range.len as usize];
        }
        let place = |range: ByteRange| (range.start - ask.range.start) as usize;
        let (mut received, mut at) = (Vec::new(), 0);
        loop {
            let mut input = &received[..];
            match self.transmission.advance(&mut input).unwrap() {
                TransmissionEvent::NeedInput => {
                    received.clear();
                    receive(&mut self.socket, &mut received);
                    continue;
                }
                TransmissionEvent::Data { range, .. } => at = place(range),
                TransmissionEvent::Payload(bytes) => {
                    answer.bytes[at..][..bytes.len()].copy_from_slice(bytes);
                    at += bytes.len();
                }
                TransmissionEvent::Hole { range, .. } => {
                    answer.bytes[place(range)..][..range.len as usize].fill(0);
                }
                TransmissionEvent::Extent { context, range, flags, .. } => {
                    let contexts = &self.transmission.info().contexts;
                    let name = &contexts.iter().find(|known| known.id == context).unwrap().name;
                    answer.extents.push((name.clone(), range, flags));
                }
                TransmissionEvent::Done { result, .. } => {
                    assert!(input.is_empty());
                    answer.result = Some(result);
                    return answer;
                }
            }
            let taken = received.len() - input.len();
            received.drain(..taken);
        }
    }
}

fn wish(headers: Headers) -> Wish {
    let contexts = vec![BASE_ALLOCATION.into(), QEMU_ALLOCATION_DEPTH.into()];
    Wish { headers, contexts, ..Wish::to_use(ExportName::new("disk").unwrap()) }
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange { start, len }
}

/// 4 MiB with 64 KiB of sevens at 1 MiB, served by qemu-nbd.
fn qemu(folder: &Path) -> Server {
    let image = folder.join("image");
    let image = image.to_str().unwrap();
    run(&["qemu-img", "create", "-q", "-f", "qcow2", image, "4M"]);
    run(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", image]);
    let words = ["qemu-nbd", "-t", "-e", "9", "-f", "qcow2", "-x", "disk", "-A", "-k", "{}", image];
    start(folder, &words)
}

#[test]
fn qemu_nbd_understands_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let server = qemu(folder.path());
    for (headers, replies) in [
        (Headers::Simple, Replies::Simple),
        (Headers::Structured, Replies::Structured),
        (Headers::Extended, Replies::Extended),
    ] {
        let mut connection = Connection::new(&server, wish(headers));
        let info = connection.transmission.info().clone();
        assert_eq!((info.replies, info.size_bytes), (replies, 4 << 20));
        let sizes = info.block_sizes;
        assert_eq!((sizes.minimum(), sizes.preferred(), sizes.max_payload()), (1, 4096, 32 << 20));
        let read = Ask::new(Command::Read, range((1 << 20) - 4096, 128 << 10));
        let answer = connection.ask(&read, b"");
        assert_eq!(answer.result, Some(Ok(())));
        let expected = |n: usize| if (4096..4096 + (64 << 10)).contains(&n) { 7 } else { 0 };
        assert!(answer.bytes.iter().enumerate().all(|(n, byte)| *byte == expected(n)));
        if headers == Headers::Simple {
            continue;
        }
        let answer = connection.ask(&read.with(CommandFlags::DF), b"");
        assert_eq!(answer.result, Some(Ok(())));
        let answer = connection.ask(&Ask::new(Command::BlockStatus, range(0, 4 << 20)), b"");
        assert_eq!(answer.result, Some(Ok(())));
        let row = |name: &str, start, len, flags| (name.to_owned(), range(start, len), flags);
        let (base, depth) = (BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH);
        let (first, second, last) = (1 << 20, 64 << 10, (3 << 20) - (64 << 10));
        let expected = [
            row(base, 0, first, 3),
            row(base, first, second, 0),
            row(base, first + second, last, 3),
            row(depth, 0, first, 0),
            row(depth, first, second, 1),
            row(depth, first + second, last, 0),
        ];
        assert_eq!(answer.extents, expected);
    }
}

#[test]
fn qemu_nbd_does_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let server = qemu(folder.path());
    for headers in [Headers::Simple, Headers::Extended] {
        let mut connection = Connection::new(&server, wish(headers));
        let mut done = |ask: Ask<'_>, payload: &[u8]| {
            let answer = connection.ask(&ask, payload);
            assert_eq!(answer.result, Some(Ok(())), "{ask:?}");
            answer.bytes
        };
        let place = range(4096, 8192);
        done(Ask::new(Command::Write, place).with(CommandFlags::FUA), &[9; 8192]);
        assert!(done(Ask::new(Command::Read, place), b"") == [9; 8192]);
        done(Ask::new(Command::WriteZeroes, place).with(CommandFlags::NO_HOLE), b"");
        assert!(done(Ask::new(Command::Read, place), b"") == [0; 8192]);
        done(Ask::new(Command::Trim, range(1 << 20, 64 << 10)), b"");
        done(Ask::new(Command::Cache, place), b"");
        done(Ask::new(Command::Flush, range(0, 0)), b"");
        done(Ask::new(Command::Write, range(1 << 20, 64 << 10)), &[7; 64 << 10]);
    }
    // QEMU cannot zero a part of a data cluster fast.
    let mut connection = Connection::new(&server, wish(Headers::Extended));
    let fast = Ask::new(Command::WriteZeroes, range(1 << 20, 512)).with(CommandFlags::FAST_ZERO);
    let failure = connection.ask(&fast, b"").result.unwrap().unwrap_err();
    assert_eq!(failure.code, ErrorCode::ENOTSUP);
    let ids: Vec<_> = connection.transmission.info().contexts.iter().map(|one| one.id).collect();
    let some = Ask { contexts: Some(&ids[1..]), ..Ask::new(Command::BlockStatus, range(0, 512)) };
    let answer = connection.ask(&some.with(CommandFlags::REQ_ONE), b"");
    assert_eq!(answer.extents.len(), 1);
    assert_eq!(answer.extents[0].0, QEMU_ALLOCATION_DEPTH);
}

#[test]
fn qemu_nbd_lists_and_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let server = qemu(folder.path());
    let hear = |wish: Wish| {
        let mut socket = UnixStream::connect(&server.socket).unwrap();
        shake_hands(&mut socket, wish)
    };
    let with = |goal: Goal| Wish { goal, ..wish(Headers::Extended) };
    let Ok(Event::Exports(exports)) = hear(with(Goal::ListExports)) else { panic!("no list") };
    assert_eq!(exports[0].name.as_str(), "disk");
    let Ok(Event::Described(info)) = hear(with(Goal::Describe)) else { panic!("no description") };
    assert_eq!(info.size_bytes, 4 << 20);
    assert!(info.flags.contains(TransmissionFlags::SEND_FAST_ZERO));
    let all = Goal::ListContexts(Vec::new());
    let Ok(Event::Contexts(names)) = hear(with(all)) else { panic!("no contexts") };
    assert_eq!(names, [BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH]);
    let Ok(Event::DescribedAll(all)) = hear(with(Goal::DescribeAll)) else { panic!("no survey") };
    assert_eq!((all.len(), &all[0].contexts), (1, &names));
    assert_eq!(all[0].info.as_ref().unwrap().size_bytes, 4 << 20);
    let other = Wish::to_use(ExportName::new("other").unwrap());
    let error = hear(other).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("there is no such export"), "{error}");
}

#[test]
fn nbdkit_is_read_in_its_own_form() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["nbdkit", "-f", "-U", "{}", "data", "data=1 2 3 @1048576 7*65536", "size=2M"];
    let server = start(folder.path(), &words);
    for headers in [Headers::Extended, Headers::Simple] {
        let mut connection = Connection::new(&server, wish(headers));
        let answer = connection.ask(&Ask::new(Command::Read, range(0, 2 << 20)), b"");
        assert_eq!(answer.result, Some(Ok(())));
        assert_eq!(answer.bytes[..4], [1, 2, 3, 0]);
        assert!(answer.bytes[1 << 20..][..65536].iter().all(|byte| *byte == 7));
        if connection.transmission.info().replies == Replies::Structured {
            let answer = connection.ask(&Ask::new(Command::BlockStatus, range(0, 2 << 20)), b"");
            let total: u64 = answer.extents.iter().map(|(_, range, _)| range.len).sum();
            assert_eq!((answer.result, total), (Some(Ok(())), 2 << 20));
        }
    }
}

#[test]
fn errors_of_nbdkit_arrive_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["nbdkit", "-f", "-U", "{}", "--filter=error", "memory", "1M"];
    let words = [&words[..], &["error-pread=ENOSPC", "error-pread-rate=100%"]].concat();
    let server = start(folder.path(), &words);
    let mut connection = Connection::new(&server, wish(Headers::Structured));
    let read = Ask::new(Command::Read, range(0, 4096));
    let failure = connection.ask(&read, b"").result.unwrap().unwrap_err();
    assert_eq!(failure.code, ErrorCode::ENOSPC);
    let flush = Ask::new(Command::Flush, range(0, 0));
    assert_eq!(connection.ask(&flush, b"").result, Some(Ok(())), "and it goes on");
}
