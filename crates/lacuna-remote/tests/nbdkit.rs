//! The storage against nbdkit: connections that are lost, and many at once.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::future::join_all;
use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{Capability, HostStatus, Storage, ZeroMode};
use lacuna::units::{HostOffset, HostRange};
use lacuna::{ErrorKind, Result};
use lacuna_remote::{NbdOptions, NbdStorage, Uri};
use pollster::block_on;

const MIB: u64 = 1 << 20;

/// A server in a folder of its own, ended with the value.
struct Server {
    folder: tempfile::TempDir,
    process: Child,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let process = spawn(folder.path(), arguments);
        Self { folder, process }
    }

    /// Ends the server as a crash does, and starts another one in its place.
    fn crash(&mut self, arguments: &[&str]) {
        self.end();
        for name in ["s", "pid"] {
            std::fs::remove_file(self.path(name)).unwrap();
        }
        self.process = spawn(self.folder.path(), arguments);
    }

    fn end(&mut self) {
        // It may have ended by itself.
        drop(self.process.kill());
        self.process.wait().unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self, options: &NbdOptions) -> Result<NbdStorage> {
        let uri = format!("nbd+unix:///?socket={}", self.path("s").display());
        block_on(NbdStorage::open(&Uri::parse(&uri).unwrap(), options))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts nbdkit and waits until it listens, which is when it writes its number.
fn spawn(folder: &Path, arguments: &[&str]) -> Child {
    let mut process = Command::new("nbdkit")
        .args(["-f", "-U", "s", "-P", "pid"])
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("nbdkit: {error}; apt-get install nbdkit"));
    while std::fs::read(folder.join("pid")).unwrap_or_default().is_empty() {
        assert!(process.try_wait().unwrap().is_none(), "nbdkit {arguments:?} ended");
        std::thread::yield_now();
    }
    process
}

fn writing() -> NbdOptions {
    NbdOptions { writes: true, ..NbdOptions::default() }
}

fn patient() -> NbdOptions {
    NbdOptions { reconnect_delay: Duration::from_secs(20), ..writing() }
}

fn write(storage: &NbdStorage, offset: u64, byte: u8, len: usize) -> Result<()> {
    let mut buffer = Buffer::new(len);
    buffer.fill(byte);
    block_on(storage.write_at(HostOffset(offset), buffer)).0
}

fn read(storage: &NbdStorage, offset: u64, len: usize) -> Result<Vec<u8>> {
    let (result, buffer) = block_on(storage.read_at(HostOffset(offset), Buffer::new(len)));
    result.map(|()| buffer.to_vec())
}

#[test]
fn what_is_written_is_read_and_ends_are_kept() {
    let server = Server::start(&["memory", "1000"]);
    let storage = server.open(&writing()).unwrap();
    write(&storage, 100, 7, 300).unwrap();
    assert_eq!(read(&storage, 399, 2).unwrap(), [7, 0]);
    // A disk ends with its last sector, which here is not all there.
    assert_eq!(read(&storage, 900, 124).unwrap(), [0; 124]);
    write(&storage, 950, 0, 74).unwrap();
    let error = write(&storage, 950, 1, 74).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert_eq!(write(&storage, 1024, 0, 1).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(block_on(storage.len()).unwrap(), 1000);
}

#[test]
fn zeros_and_holes_are_told_apart_from_data() {
    let server = Server::start(&["memory", "1M"]);
    let storage = server.open(&writing()).unwrap();
    write(&storage, 0, 1, 128 << 10).unwrap();
    let range = |start, len| HostRange::new(HostOffset(start), len);
    let zeroed = storage.write_zeroes_at(range(0, 64 << 10), ZeroMode::MayUnmap, Hold::none());
    block_on(zeroed).unwrap();
    assert_eq!(read(&storage, (64 << 10) - 1, 2).unwrap(), [0, 1]);
    let extents = block_on(storage.extents_at(range(0, 2 * MIB))).unwrap();
    let found: Vec<_> = extents.iter().map(|extent| (extent.len, extent.status)).collect();
    use HostStatus::{Data, Hole};
    assert_eq!(found, [(64 << 10, Hole), (64 << 10, Data), (MIB - (128 << 10), Hole)]);
    let first = block_on(storage.status_at(range(96 << 10, MIB))).unwrap();
    assert_eq!((first.len, first.status), (32 << 10, Data));
}

#[test]
fn a_server_without_zeros_is_sent_them() {
    let server = Server::start(&["--no-sr", "--filter=nozero", "memory", "4M"]);
    let storage = server.open(&writing()).unwrap();
    let abilities = storage.capabilities();
    assert_eq!(abilities.write_zeroes, Capability::Emulated);
    write(&storage, 0, 9, 4 << 20).unwrap();
    let range = HostRange::new(HostOffset(1000), 3 * MIB);
    block_on(storage.write_zeroes_at(range, ZeroMode::Allocate, Hold::none())).unwrap();
    let bytes = read(&storage, 0, 4 << 20).unwrap();
    let end = 1000 + 3 * MIB as usize;
    assert!(bytes[..1000].iter().chain(&bytes[end..]).all(|byte| *byte == 9));
    assert!(bytes[1000..end].iter().all(|byte| *byte == 0));
    let status = block_on(storage.status_at(range)).unwrap();
    assert_eq!(status.status, HostStatus::Data, "nothing is known without structured replies");
}

#[test]
fn parts_of_blocks_that_are_written_at_once_do_not_lose_each_other() {
    let policy = "blocksize-minimum=4096 blocksize-preferred=4096 blocksize-maximum=32768 \
                  blocksize-error-policy=error";
    let mut arguments = vec!["--filter=blocksize-policy", "memory", "1M"];
    arguments.extend(policy.split_whitespace());
    let server = Server::start(&arguments);
    let storage = server.open(&writing()).unwrap();
    let one = |at: u64| {
        let mut buffer = Buffer::new(100);
        buffer.fill(at as u8 + 1);
        storage.write_at(HostOffset(at * 100), buffer)
    };
    let written = block_on(join_all((0..200).map(one)));
    written.into_iter().for_each(|(result, _)| result.unwrap());
    let bytes = read(&storage, 0, 20_000).unwrap();
    for (at, part) in bytes.chunks(100).enumerate() {
        assert!(part.iter().all(|byte| *byte == at as u8 + 1), "{at}");
    }
}

#[test]
fn requests_that_overlap_make_more_connections_up_to_the_bound() {
    let arguments = ["--filter=log", "--filter=delay", "memory", "1M", "logfile=log", "rdelay=2ms"];
    for (connections, expected) in [(1, 1), (3, 3)] {
        let server = Server::start(&arguments);
        let storage = server.open(&NbdOptions { connections, ..writing() }).unwrap();
        let connects = || {
            let log = std::fs::read_to_string(server.path("log")).unwrap();
            log.lines().filter(|line| line.contains(" Connect ")).count()
        };
        loop {
            let reads = (0..16).map(|at| storage.read_at(HostOffset(at * 4096), Buffer::new(4096)));
            block_on(join_all(reads)).into_iter().for_each(|(result, _)| result.unwrap());
            if connects() >= expected {
                break;
            }
        }
        drop(storage);
        assert_eq!(connects(), expected);
    }
}

#[test]
fn a_lost_connection_is_final_without_a_delay() {
    let mut server = Server::start(&["memory", "1M"]);
    let storage = server.open(&writing()).unwrap();
    write(&storage, 0, 1, 512).unwrap();
    server.crash(&["memory", "1M"]);
    let error = read(&storage, 0, 512).unwrap_err();
    assert!(error.to_string().contains("nbd+unix:"), "{error}");
    assert!(read(&storage, 0, 512).is_err());
    assert!(block_on(storage.flush()).is_err());
}

#[test]
fn what_a_server_may_have_forgotten_fails_the_next_flush() {
    let mut server = Server::start(&["memory", "1M"]);
    let storage = server.open(&patient()).unwrap();
    write(&storage, 0, 1, 512).unwrap();
    block_on(storage.flush()).unwrap();
    server.crash(&["memory", "1M"]);
    // What was flushed is the server's to keep; nothing else was written.
    read(&storage, 0, 512).unwrap();
    block_on(storage.flush()).unwrap();
    write(&storage, 0, 2, 512).unwrap();
    server.crash(&["memory", "1M"]);
    read(&storage, 0, 512).unwrap();
    let error = block_on(storage.flush()).unwrap_err();
    assert!(error.to_string().contains("forgotten"), "{error}");
    block_on(storage.flush()).unwrap();
}

#[test]
fn one_durable_write_is_one_request_and_outlives_the_server() {
    // nbdkit's own flush is not told of: what comes with FUA is what the server has.
    let arguments =
        ["--filter=log", "--filter=fua", "file", "disk", "fuamode=native", "logfile=log"];
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let process = spawn(folder.path(), &arguments);
    let mut server = Server { folder, process };
    let storage = server.open(&patient()).unwrap();
    let durably =
        |offset, len| block_on(storage.write_durably_at(HostOffset(offset), Buffer::zeroed(len))).0;
    durably(4096, 4096).unwrap();
    durably(100, 100).unwrap();
    let log = std::fs::read_to_string(server.path("log")).unwrap();
    let lines = |what| log.lines().filter(|line| line.contains(what)).count();
    assert_eq!((lines(" Write id="), lines(" fua=1 "), lines(" Flush id=")), (2, 2, 0), "{log}");
    server.crash(&arguments);
    read(&storage, 0, 512).unwrap();
    block_on(storage.flush()).unwrap();
}

#[test]
fn an_export_that_comes_back_with_another_size_is_another_one() {
    let mut server = Server::start(&["memory", "1M"]);
    let storage = server.open(&patient()).unwrap();
    server.crash(&["memory", "2M"]);
    let error = read(&storage, 0, 512).unwrap_err();
    assert!(error.to_string().contains("not the same"), "{error}");
}

#[test]
fn errors_of_the_server_keep_their_number_and_say_where() {
    let server =
        Server::start(&["--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=1"]);
    let storage = server.open(&writing()).unwrap();
    let error = write(&storage, 4096, 1, 512).unwrap_err();
    assert_eq!((error.kind(), error.raw_os_error()), (ErrorKind::NoSpace, Some(28)));
    assert!(error.to_string().contains("Writing 512 bytes at 0x1000"), "{error}");
}

#[test]
fn a_patient_opener_waits_for_the_server_and_others_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("nbd+unix:///?socket={}", folder.path().join("s").display());
    let uri = Uri::parse(&uri).unwrap();
    let error = block_on(NbdStorage::open(&uri, &NbdOptions::default())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let options = NbdOptions { open_timeout: Duration::from_secs(20), ..NbdOptions::default() };
    let opening = std::thread::spawn(move || block_on(NbdStorage::open(&uri, &options)));
    let process = spawn(folder.path(), &["memory", "1M"]);
    let _server = Server { folder, process };
    opening.join().unwrap().unwrap();
}

#[test]
fn servers_of_the_old_style_are_used_as_they_are() {
    let server = Server::start(&["--oldstyle", "memory", "1M"]);
    let storage = server.open(&NbdOptions { writes: true, ..NbdOptions::default() }).unwrap();
    block_on(storage.write_at(HostOffset(4096), Buffer::from(&[7; 512][..]))).0.unwrap();
    let (result, bytes) = block_on(storage.read_at(HostOffset(4096), Buffer::new(1024)));
    result.unwrap();
    assert!(bytes[..512].iter().all(|byte| *byte == 7) && bytes[512..].iter().all(|b| *b == 0));
}

#[test]
fn the_last_client_says_goodbye() {
    let mut server = Server::start(&["--filter=exitlast", "memory", "1M"]);
    drop(server.open(&NbdOptions::default()).unwrap());
    assert!(server.process.wait().unwrap().success());
}
