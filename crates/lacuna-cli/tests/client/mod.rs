//! A client that knows what stock ones do not: 64-bit status, the state at the start, resizing.

#![allow(dead_code, reason = "each test program uses its part of this module")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};

use lacuna_nbd::client::{
    Ask, Event, ExportInfo, Goal, Handshake, Headers, Transmission, TransmissionEvent, Wish,
};
use lacuna_nbd::wire::{CommandFlags, ErrorCode};
use lacuna_nbd::{ByteRange, Command, ExportName};

use crate::common::Sandbox;

/// A connection, one request at a time.
pub(crate) struct Client {
    socket: UnixStream,
    transmission: Transmission,
    received: Vec<u8>,
}

/// What came back.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
    /// The context, the length, the status.
    pub(crate) extents: Vec<(String, u64, u64)>,
    pub(crate) error: Option<ErrorCode>,
}

pub(crate) const fn range(start: u64, len: u64) -> ByteRange {
    ByteRange { start, len }
}

fn wish(export: &str) -> Wish {
    Wish::to_use(ExportName::new(export).unwrap())
}

impl Client {
    /// Connects with 64-bit headers and chooses contexts, all of which must be there.
    pub(crate) fn new(socket: &Path, export: &str, contexts: &[&str]) -> Self {
        Self::with(socket, export, Headers::Extended, contexts)
    }

    pub(crate) fn with(socket: &Path, export: &str, headers: Headers, contexts: &[&str]) -> Self {
        let names = contexts.iter().map(|name| (*name).to_owned()).collect();
        let wish = Wish { contexts: names, headers, ..wish(export) };
        match shake_hands(socket, wish) {
            (socket, Event::Transmission(transmission)) => {
                let client = Self { socket, transmission: *transmission, received: Vec::new() };
                assert_eq!(client.info().contexts.len(), contexts.len(), "{contexts:?}");
                client
            }
            (_, other) => panic!("{other:?}"),
        }
    }

    pub(crate) const fn info(&self) -> &ExportInfo {
        self.transmission.info()
    }

    /// Asks without flags and without bytes.
    pub(crate) fn ask(&mut self, command: Command, range: ByteRange) -> Answer {
        self.ask_with(&Ask::new(command, range), &[])
    }

    pub(crate) fn write(&mut self, start: u64, bytes: &[u8]) {
        let ask = Ask::new(Command::Write, range(start, bytes.len() as u64));
        assert_eq!(self.ask_with(&ask.with(CommandFlags::FUA), bytes).error, None);
    }

    /// Returns the length and the status of extents of the only context.
    pub(crate) fn status(&mut self, range: ByteRange) -> Vec<(u64, u64)> {
        let answer = self.ask(Command::BlockStatus, range);
        assert_eq!(answer.error, None);
        answer.extents.into_iter().map(|(_, len, flags)| (len, flags)).collect()
    }

    pub(crate) fn ask_with(&mut self, ask: &Ask<'_>, payload: &[u8]) -> Answer {
        let (_, header) = self.transmission.request(ask).unwrap();
        self.socket.write_all(&header).unwrap();
        self.socket.write_all(payload).unwrap();
        let mut answer = Answer::default();
        if ask.command == Command::Read {
            answer.bytes = vec![0; usize::try_from(ask.range.len).unwrap()];
        }
        let mut at = 0;
        loop {
            let mut input = &self.received[..];
            let (mut is_hungry, mut is_done) = (false, false);
            match self.transmission.advance(&mut input).unwrap() {
                TransmissionEvent::NeedInput => is_hungry = true,
                TransmissionEvent::Data { range, .. } => {
                    at = usize::try_from(range.start - ask.range.start).unwrap();
                }
                TransmissionEvent::Payload(bytes) => {
                    answer.bytes[at..at + bytes.len()].copy_from_slice(bytes);
                    at += bytes.len();
                }
                TransmissionEvent::Hole { .. } => {}
                TransmissionEvent::Extent { context, range, flags, .. } => {
                    let known = &self.transmission.info().contexts;
                    let name = &known.iter().find(|known| known.id == context).unwrap().name;
                    answer.extents.push((name.clone(), range.len, flags));
                }
                TransmissionEvent::Done { result, .. } => {
                    is_done = true;
                    answer.error = result.err().map(|failure| failure.code);
                }
            }
            let left = input.len();
            self.received.drain(..self.received.len() - left);
            if is_done {
                return answer;
            }
            if is_hungry {
                receive(&mut self.socket, &mut self.received);
            }
        }
    }
}

/// Returns the names of the contexts that match, by 64-bit headers or not.
pub(crate) fn contexts(socket: &Path, headers: Headers, queries: &[&str]) -> Vec<String> {
    let queries = queries.iter().map(|query| (*query).to_owned()).collect();
    let wish = Wish { headers, goal: Goal::ListContexts(queries), ..wish("") };
    match shake_hands(socket, wish) {
        (_, Event::Contexts(names)) => names,
        (_, other) => panic!("{other:?}"),
    }
}

fn shake_hands(socket: &Path, wish: Wish) -> (UnixStream, Event) {
    let mut socket = UnixStream::connect(socket).unwrap();
    let (mut handshake, mut received) = (Handshake::new(wish), Vec::new());
    loop {
        let mut input = &received[..];
        let event = handshake.advance(&mut input).unwrap();
        let left = input.len();
        received.drain(..received.len() - left);
        socket.write_all(&handshake.take_output()).unwrap();
        match event {
            Event::NeedInput => receive(&mut socket, &mut received),
            end => return (socket, end),
        }
    }
}

fn receive(socket: &mut UnixStream, received: &mut Vec<u8>) {
    let mut piece = [0; 64 << 10];
    let len = socket.read(&mut piece).unwrap();
    assert!(len > 0, "the server hung up");
    received.extend_from_slice(&piece[..len]);
}

/// A server on the socket `s` of a sandbox, until it is dropped.
pub(crate) struct Served<'s> {
    program: Child,
    sandbox: &'s Sandbox,
}

impl<'s> Served<'s> {
    /// Starts `lacuna serve` with these words and returns when clients can come.
    pub(crate) fn start(sandbox: &'s Sandbox, words: &str) -> Self {
        Self::start_in(sandbox, words, &std::env::temp_dir())
    }

    /// As [`start`](Self::start); temporary files go to `folder`.
    pub(crate) fn start_in(sandbox: &'s Sandbox, words: &str, folder: &Path) -> Self {
        let mut program = Program::new("bash")
            .args(["-c", &format!("exec \"$0\" serve -t -k s {words}")])
            .arg(sandbox.program("lacuna"))
            .current_dir(sandbox.path(""))
            .env("TMPDIR", folder)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(program.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("Listening on"), "{words}: {line}");
        Self { program, sandbox }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.sandbox.path("s")
    }

    /// Sends a signal and returns when the server is gone.
    pub(crate) fn signal(mut self, signal: &str) -> Option<i32> {
        self.end(signal)
    }

    fn end(&mut self, signal: &str) -> Option<i32> {
        let kill = Program::new("kill").args([signal, &self.program.id().to_string()]).status();
        assert!(kill.unwrap().success());
        self.program.wait().unwrap().code()
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        if self.program.try_wait().unwrap().is_none() {
            self.end("-TERM");
        }
    }
}
