//! A server that says what a test wants, on a socket file, each connection in a thread of its own.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lacuna::Result;
use lacuna_remote::{NbdOptions, NbdStorage, Uri};
use pollster::block_on;
use tempfile::TempDir;

pub(crate) const SIZE_BYTES: u64 = 1 << 20;

/// Options and replies to them.
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const SET_META_CONTEXT: u32 = 10;
pub(crate) const EXTENDED_HEADERS: u32 = 11;
pub(crate) const ACK: u32 = 1;
pub(crate) const INFO: u32 = 3;
pub(crate) const META_CONTEXT: u32 = 4;
pub(crate) const UNSUP: u32 = 0x8000_0001;

/// Commands.
pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const BLOCK_STATUS: u16 = 7;

/// Kinds of chunks.
pub(crate) const NONE: u16 = 0;
pub(crate) const DATA: u16 = 1;
pub(crate) const HOLE: u16 = 2;
pub(crate) const STATUS: u16 = 5;
pub(crate) const ERROR: u16 = 0x8001;
pub(crate) const DONE: u16 = 1;

/// The id of `base:allocation` here.
pub(crate) const CONTEXT: u32 = 1;

/// A request of 28 bytes; a write has its payload.
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) start: u64,
    pub(crate) len: u32,
}

type Says<I> = Box<dyn Fn(I) -> Option<Vec<u8>> + Send + Sync>;

/// What a server says, where it is not what an honest one would.
pub(crate) struct Script {
    pub(crate) greeting: Vec<u8>,
    /// What is said of the export in the connection of that number: size and flags.
    pub(crate) export: fn(usize) -> (u64, u16),
    /// Instead of the answer to an option.
    pub(crate) option: Says<u32>,
    /// Instead of the answer to a request.
    pub(crate) reply: Says<Request>,
    /// After so many bytes the connection ends.
    pub(crate) cut_after: usize,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            greeting: b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
            // HAS_FLAGS, SEND_FLUSH, SEND_WRITE_ZEROES.
            export: |_| (SIZE_BYTES, 0x45),
            option: Box::new(|_| None),
            reply: Box::new(|_| None),
            cut_after: usize::MAX,
        }
    }
}

impl Script {
    pub(crate) fn replying(reply: impl Fn(Request) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self { reply: Box::new(move |request| Some(reply(request))), ..Self::default() }
    }

    /// Says something to one option, and to all others what is right.
    pub(crate) fn at_option(number: u32, said: Vec<u8>) -> Self {
        let option = move |asked| (asked == number).then(|| said.clone());
        Self { option: Box::new(option), ..Self::default() }
    }
}

pub(crate) struct Served {
    folder: TempDir,
    /// How many bytes were said to the first client.
    pub(crate) said: Arc<AtomicUsize>,
}

impl Served {
    pub(crate) fn start(script: Script) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let (script, said) = (Arc::new(script), Arc::new(AtomicUsize::new(0)));
        let served = Self { folder, said: Arc::clone(&said) };
        // It ends with the process.
        std::thread::spawn(move || {
            for (nth, stream) in listener.incoming().enumerate() {
                let (script, said) = (Arc::clone(&script), Arc::clone(&said));
                let mut peer = Peer { stream: stream.unwrap(), left: script.cut_after, said };
                std::thread::spawn(move || drop(peer.serve(&script, nth)));
            }
        });
        served
    }

    pub(crate) fn open(&self, reconnect_delay: Duration) -> Result<NbdStorage> {
        let options = NbdOptions { reconnect_delay, writes: true, ..NbdOptions::default() };
        self.open_with(&options)
    }

    pub(crate) fn open_with(&self, options: &NbdOptions) -> Result<NbdStorage> {
        let uri = format!("nbd+unix:///?socket={}", self.folder.path().join("s").display());
        block_on(NbdStorage::open(&Uri::parse(&uri).unwrap(), options))
    }
}

/// The server's end of a connection.
struct Peer {
    stream: UnixStream,
    left: usize,
    said: Arc<AtomicUsize>,
}

impl Peer {
    fn serve(&mut self, script: &Script, nth: usize) -> io::Result<()> {
        self.say(&script.greeting)?;
        self.take::<4>()?;
        while self.option(script, (script.export)(nth))? != GO {}
        loop {
            let request = self.request()?;
            if request.command == DISCONNECT {
                return Ok(());
            }
            let honest = || honest_reply(&request);
            let said = match (script.reply)(Request { ..request }) {
                Some(said) => said,
                None => honest(),
            };
            self.say(&said)?;
        }
    }

    /// Answers an option; returns which.
    fn option(&mut self, script: &Script, export: (u64, u16)) -> io::Result<u32> {
        let header = self.take::<16>()?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let (number, len) = (word(8), word(12));
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        let said = (script.option)(number).unwrap_or_else(|| honest_answer(number, export));
        self.say(&said)?;
        Ok(number)
    }

    fn request(&mut self) -> io::Result<Request> {
        let header = self.take::<28>()?;
        let command = u16::from_be_bytes(header[6..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(header[8..16].try_into().unwrap());
        let start = u64::from_be_bytes(header[16..24].try_into().unwrap());
        let len = u32::from_be_bytes(header[24..].try_into().unwrap());
        if command == WRITE {
            self.stream.read_exact(&mut vec![0; len as usize])?;
        }
        Ok(Request { command, cookie, start, len })
    }

    fn take<const LEN: usize>(&mut self) -> io::Result<[u8; LEN]> {
        let mut bytes = [0; LEN];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len().min(self.left);
        self.stream.write_all(&bytes[..len])?;
        self.said.fetch_add(len, Ordering::SeqCst);
        self.left -= len;
        match len == bytes.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// An answer to an option.
pub(crate) fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for word in [option, kind, data.len() as u32] {
        bytes.extend(word.to_be_bytes());
    }
    [bytes, data.to_vec()].concat()
}

/// The size and the flags of the export.
pub(crate) fn export((size_bytes, flags): (u64, u16)) -> Vec<u8> {
    let data = [&[0, 0][..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat();
    answer(GO, INFO, &data)
}

/// The smallest, preferred and longest block.
pub(crate) fn block_sizes(sizes: [u32; 3]) -> Vec<u8> {
    answer(GO, INFO, &[vec![0, 3], sizes.map(u32::to_be_bytes).concat()].concat())
}

fn honest_answer(number: u32, of: (u64, u16)) -> Vec<u8> {
    let fine = answer(number, ACK, b"");
    match number {
        STRUCTURED_REPLY => fine,
        SET_META_CONTEXT => {
            let context = [&CONTEXT.to_be_bytes()[..], b"base:allocation"].concat();
            [answer(number, META_CONTEXT, &context), fine].concat()
        }
        GO => [export(of), fine].concat(),
        _ => answer(number, UNSUP, b""),
    }
}

/// A chunk that says it has `len` bytes.
pub(crate) fn chunk_header(flags: u16, kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    let magic = 0x668e_33ef_u32.to_be_bytes();
    let kind = [flags.to_be_bytes(), kind.to_be_bytes()].concat();
    [&magic[..], &kind, &cookie.to_be_bytes(), &len.to_be_bytes()].concat()
}

pub(crate) fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    [chunk_header(flags, kind, cookie, data.len() as u32), data.to_vec()].concat()
}

/// A chunk of a read.
pub(crate) fn data(flags: u16, cookie: u64, start: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, DATA, cookie, &[&start.to_be_bytes()[..], bytes].concat())
}

pub(crate) fn hole(flags: u16, cookie: u64, start: u64, len: u32) -> Vec<u8> {
    chunk(flags, HOLE, cookie, &[&start.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

/// A block status of extents of these lengths.
pub(crate) fn status(flags: u16, cookie: u64, context: u32, lengths: &[u32]) -> Vec<u8> {
    let mut bytes = context.to_be_bytes().to_vec();
    for (nth, len) in lengths.iter().enumerate() {
        bytes.extend([len.to_be_bytes(), (nth as u32 % 2 * 3).to_be_bytes()].concat());
    }
    chunk(flags, STATUS, cookie, &bytes)
}

/// An error, with a text that says it has `says` bytes.
pub(crate) fn error(flags: u16, cookie: u64, number: u32, says: u16, text: &[u8]) -> Vec<u8> {
    let front = [&number.to_be_bytes()[..], &says.to_be_bytes()].concat();
    chunk(flags, ERROR, cookie, &[front, text.to_vec()].concat())
}

fn honest_reply(request: &Request) -> Vec<u8> {
    let cookie = request.cookie;
    match request.command {
        READ => data(DONE, cookie, request.start, &vec![7; request.len as usize]),
        BLOCK_STATUS => status(DONE, cookie, CONTEXT, &[request.len]),
        _ => chunk(DONE, NONE, cookie, b""),
    }
}
