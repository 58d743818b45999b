//! A server of one disk, and clients that say to it whatever a test wants.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna_export::{
    Address, Export, ExportOptions, Exports, Limits, Listener, Plain, Server, ServerOptions,
};
use pollster::block_on;
use tempfile::TempDir;

pub(crate) const SIZE_BYTES: u64 = 64 << 20;

/// Command numbers.
pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const RESIZE: u16 = 8;

pub(crate) const EINVAL: u32 = 22;

/// A server on a socket file, all connections with one worker.
pub(crate) struct Served {
    pub(crate) server: Server<Plain<Raw<MemoryStorage>>>,
    folder: TempDir,
}

impl Served {
    pub(crate) fn start(limits: Limits) -> Self {
        Self::start_with(limits, ExportOptions::default())
    }

    /// Clients may ask for another size.
    pub(crate) fn resizable() -> Self {
        let options = ExportOptions { resize: true, ..ExportOptions::default() };
        Self::start_with(Limits::default(), options)
    }

    fn start_with(limits: Limits, export: ExportOptions) -> Self {
        let disk = block_on(Raw::create(MemoryStorage::new(), SIZE_BYTES)).unwrap();
        let exports = Arc::new(Exports::default());
        exports.add(Export::new("", Plain(disk), export).unwrap()).unwrap();
        let options = ServerOptions { workers: 1, limits, ..ServerOptions::default() };
        let server = Server::start(exports, options).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for listener in Listener::bind(&Address::Unix(folder.path().join("sock"))).unwrap() {
            server.listen(listener);
        }
        Self { server, folder }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    pub(crate) fn connect(&self) -> Client {
        Client(UnixStream::connect(self.path()).unwrap())
    }

    /// Returns a client that has chosen the disk.
    pub(crate) fn ready(&self) -> Client {
        let mut client = self.connect();
        client.send(&hello());
        client.receive(18);
        while client.option_reply() != ACK {}
        client
    }

    /// Fails where the server does not serve any more.
    pub(crate) fn assert_serves(&self) {
        let mut client = self.ready();
        client.send(&request(WRITE, 77, 512, 4));
        client.send(b"data");
        assert_eq!(client.answer(), (0, 77));
        client.send(&request(READ, 78, 512, 4));
        assert_eq!(client.answer(), (0, 78));
        assert_eq!(client.receive(4), b"data");
        client.send(&request(DISCONNECT, 0, 0, 0));
        assert_eq!(client.rest(), b"");
    }
}

/// The last reply to an option.
const ACK: u32 = 1;

/// What a client that wants the default export sends at once: flags, and `NBD_OPT_GO`.
pub(crate) fn hello() -> Vec<u8> {
    [&[0, 0, 0, 3][..], &option(7, &[0; 6])].concat()
}

pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u32).to_be_bytes();
    [b"IHAVEOPT", &number.to_be_bytes()[..], &len, data].concat()
}

/// A request as a client sends it that was granted neither structured replies nor more.
pub(crate) fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let (command, cookie) = (command.to_be_bytes(), cookie.to_be_bytes());
    let magic = 0x2560_9513_u32.to_be_bytes();
    [&magic[..], &[0, 0], &command, &cookie, &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// The client's end of a connection.
pub(crate) struct Client(pub(crate) UnixStream);

impl Client {
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Returns the kind of a reply to an option.
    pub(crate) fn option_reply(&mut self) -> u32 {
        let header = self.receive(20);
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        self.receive(word(16) as usize);
        word(12)
    }

    /// Returns the error and the cookie of a simple reply.
    pub(crate) fn answer(&mut self) -> (u32, u64) {
        let header = self.receive(16);
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(header[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(header[8..].try_into().unwrap()))
    }

    /// Returns what comes until the server closes its end.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.0.read_to_end(&mut bytes) {
            // A server that closes while it has bytes unread resets the connection.
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
            _ => bytes,
        }
    }
}
