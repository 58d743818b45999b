//! The server against stock clients.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna_export::{
    Address, Export, ExportOptions, Exports, Limits, Listener, Plain, ServedDisk, Server,
    ServerOptions, WhenFull,
};
use pollster::block_on;
use tempfile::TempDir;
use testkit::foreign::{NBDINFO, QEMU_IMG, QEMU_IO};

/// A server on a socket file, and the folder that it lies in.
struct Served<D: ServedDisk> {
    server: Server<D>,
    folder: TempDir,
}

impl<D: ServedDisk> Served<D> {
    fn start(disk: D, options: ExportOptions) -> Self {
        Self::start_within(disk, options, Limits::default())
    }

    fn start_within(disk: D, options: ExportOptions, limits: Limits) -> Self {
        let exports = Arc::new(Exports::default());
        exports.add(Export::new("", disk, options).unwrap()).unwrap();
        let server = Server::start(exports, ServerOptions { limits, ..ServerOptions::default() });
        let server = server.unwrap();
        let folder = tempfile::tempdir().unwrap();
        for listener in Listener::bind(&Address::Unix(folder.path().join("sock"))).unwrap() {
            server.listen(listener);
        }
        Self { server, folder }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.folder.path().join("sock").display())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn raw(size_bytes: u64) -> Plain<Raw<MemoryStorage>> {
    Plain(block_on(Raw::create(MemoryStorage::new(), size_bytes)).unwrap())
}

fn qcow2(size_bytes: u64) -> Plain<Image<MemoryStorage>> {
    let storage = MemoryStorage::new();
    let options = CreateOptions { size_bytes, ..CreateOptions::default() };
    block_on(create(&storage, &options)).unwrap();
    let options = OpenOptions::new(Access::ReadWrite);
    Plain(block_on(Image::open(Parts::alone(storage), options)).unwrap())
}

#[test]
fn what_qemu_io_writes_it_reads_back() {
    let served = Served::start(qcow2(64 << 20), ExportOptions::default());
    let uri = served.uri();
    let script = ["write -P 7 1M 3M", "write -z 2M 64k", "discard 3M 64k", "flush"];
    let words = script.iter().flat_map(|line| ["-c", line]);
    QEMU_IO.succeed(["-f", "raw"].into_iter().chain(words).chain([&*uri]));
    let script =
        ["read -P 7 1M 1M", "read -P 0 2M 64k", "read -P 0 3M 64k", "read -P 7 3136k 896k"];
    let words = script.iter().flat_map(|line| ["-c", line]);
    let finished = QEMU_IO.succeed(["-r", "-f", "raw"].into_iter().chain(words).chain([&*uri]));
    assert!(!finished.contains("failed"), "{finished}");
    served.server.stop();
}

#[test]
fn a_conversion_over_the_socket_is_equal() {
    let served = Served::start(raw(8 << 20), ExportOptions::default());
    let source = served.file("source.raw");
    let bytes: Vec<u8> = (0..8 << 20).map(|at: u32| (at / 4096) as u8).collect();
    std::fs::write(&source, bytes).unwrap();
    let (source, uri) = (source.to_str().unwrap(), served.uri());
    QEMU_IMG.succeed(["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]);
    QEMU_IMG.succeed(["compare", "-f", "raw", "-F", "raw", source, &uri]);
    served.server.stop();
}

#[test]
fn nbdinfo_shows_flags_contexts_and_the_map() {
    let served = Served::start(qcow2(64 << 20), ExportOptions::default());
    let uri = served.uri();
    QEMU_IO.succeed(["-f", "raw", "-c", "write 1M 64k", &uri]);
    let told = NBDINFO.succeed([&*uri]);
    for line in [
        "can_multi_conn: true",
        "can_fast_zero: true",
        "base:allocation",
        "qemu:allocation-depth",
        "export-size: 67108864",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    let map = NBDINFO.succeed(["--map", &uri]);
    let fields: Vec<Vec<&str>> = map.lines().map(|it| it.split_whitespace().collect()).collect();
    let kinds: Vec<(&str, &str)> = fields.iter().map(|line| (line[0], line[2])).collect();
    assert_eq!(kinds, [("0", "3"), ("1048576", "0"), ("1114112", "3")]);
    served.server.stop();
}

#[test]
fn a_server_that_stops_ends_idle_connections_and_removes_its_socket() {
    let served = Served::start(raw(1 << 20), ExportOptions::default());
    let path = served.file("sock");
    let idle: Vec<_> = (0..50).map(|_| UnixStream::connect(&path).unwrap()).collect();
    served.server.stop();
    assert!(served.server.connections().is_empty());
    assert!(!path.exists());
    drop(idle);
}

/// Connects and waits for the greeting.
fn greeted(path: &Path) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket.read_exact(&mut [0; 18]).unwrap();
    socket
}

#[test]
fn who_is_one_too_many_waits_where_that_is_wished() {
    let limits = Limits { connections: 1, when_full: WhenFull::Wait, ..Limits::default() };
    let served = Served::start_within(raw(1 << 20), ExportOptions::default(), limits);
    let path = served.file("sock");
    let first = greeted(&path);
    let second = {
        let path = path.clone();
        thread::spawn(move || greeted(&path))
    };
    assert_eq!(served.server.connections().len(), 1);
    drop(first);
    // The first is gone, so this one is greeted.
    let second = second.join().unwrap();
    let numbers: Vec<u64> = served.server.connections().iter().map(|it| it.number).collect();
    assert_eq!(numbers, [2]);
    drop(second);
    served.server.stop();
}

#[test]
fn an_export_that_retires_lets_nobody_in_and_its_clients_can_be_sent_away() {
    let served = Served::start(qcow2(64 << 20), ExportOptions::default());
    let export = served.server.exports().all().remove(0);
    assert!(export.wait_until_left(Duration::ZERO));
    let mut client = greeted(&served.file("sock"));
    // Client flags, then GO for the default export, asking for no information.
    let go = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";
    client.write_all(go).unwrap();
    // A flush: who answers it is in the transmission phase.
    client.write_all(&[&b"\x25\x60\x95\x13\0\0\0\x03"[..], &[0; 20]].concat()).unwrap();
    let mut told = Vec::new();
    while !told.ends_with(b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\0") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        told.extend(byte);
    }
    let one = served.server.connections().remove(0);
    assert_eq!((one.export.as_deref(), one.requests, one.received_bytes), (Some(""), 1, 28));
    assert_eq!((one.in_flight, one.is_tls), (0, false));
    export.retire();
    assert!(!export.wait_until_left(Duration::ZERO));
    let other = QEMU_IO.run(["-f", "raw", "-c", "read 0 512", &served.uri()]);
    assert!(other.stderr.contains("can't open"), "{}", other.stderr);
    assert_eq!(served.server.disconnect(&export), 1);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "the end of the stream");
    assert!(export.wait_until_left(Duration::from_secs(20)));
    served.server.stop();
}
