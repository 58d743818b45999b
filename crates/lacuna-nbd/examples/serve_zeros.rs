//! Serves a disk in memory, all zeros at first, to any NBD client: the smallest whole driver.
//!
//! ```text
//! cargo run -p lacuna-nbd --example serve_zeros -- /tmp/zeros.sock 1073741824
//! nbdinfo 'nbd+unix:///?socket=/tmp/zeros.sock'
//! ```
//!
//! One thread per connection, blocking calls. What to look at: the machines do no I/O; `Connection`
//! holds what was received, and moves bytes when an event says so.

use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::{env, fs, thread};

use lacuna_nbd::context::{BASE_ALLOCATION, Context};
use lacuna_nbd::server::{
    Command, Event, Export, Handshake, Last, ListedExport, Refusal, Request, StatusExtent, TlsMode,
    Transmission, TransmissionEvent, WantedContexts,
};
use lacuna_nbd::wire::{AllocationFlags, ErrorCode, InitState, TransmissionFlags};
use lacuna_nbd::{BlockSizes, ContextId, ExportName};

/// What is one extent at least.
const BLOCK_BYTES: usize = 4096;

/// A disk that all connections share.
pub(crate) type Disk = Arc<Mutex<Vec<u8>>>;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [path, size_bytes] = &arguments[..] else {
        return Err(io::Error::other("usage: serve_zeros SOCKET SIZE"));
    };
    let size_bytes = size_bytes.parse().map_err(io::Error::other)?;
    let disk = Arc::new(Mutex::new(vec![0; size_bytes]));
    if fs::exists(path)? {
        fs::remove_file(path)?;
    }
    for socket in UnixListener::bind(path)?.incoming() {
        let (socket, disk) = (socket?, Arc::clone(&disk));
        thread::spawn(move || {
            if let Err(error) = serve(socket, &disk) {
                eprintln!("{error}");
            }
        });
    }
    Ok(())
}

/// Serves one client until it leaves.
pub(crate) fn serve(socket: UnixStream, disk: &Disk) -> io::Result<()> {
    let mut connection = Connection { socket, received: Vec::new(), taken: 0 };
    let Some(transmission) = shake_hands(&mut connection, disk)? else { return Ok(()) };
    transmit(&mut connection, transmission, disk)
}

/// A socket, and what was received from it and is not used yet.
struct Connection {
    socket: UnixStream,
    received: Vec<u8>,
    taken: usize,
}

impl Connection {
    /// Replaces what was used up by what comes next; false at the end of the stream.
    fn receive(&mut self) -> io::Result<bool> {
        self.received.resize(256 << 10, 0);
        let len = self.socket.read(&mut self.received)?;
        self.received.truncate(len);
        self.taken = 0;
        Ok(len > 0)
    }

    /// Sends the parts as one message, without copying them together.
    fn send(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut slices = &mut slices[..];
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let sent = self.socket.write_vectored(slices)?;
            IoSlice::advance_slices(&mut slices, sent);
        }
        Ok(())
    }
}

fn shake_hands(connection: &mut Connection, disk: &Disk) -> io::Result<Option<Transmission>> {
    let mut handshake = Handshake::new(TlsMode::Off);
    loop {
        let mut input = &connection.received[connection.taken..];
        let event = handshake.advance(&mut input);
        connection.taken = connection.received.len() - input.len();
        connection.send(&[&handshake.take_output()])?;
        match event.map_err(io::Error::other)? {
            Event::NeedInput => {
                if !connection.receive()? {
                    return Ok(None);
                }
            }
            Event::ListExports => {
                let description = "A disk in memory".into();
                handshake.answer_list(&[ListedExport { name: ExportName::default(), description }]);
            }
            Event::FindExport(question) => handshake.answer_export(match question.name.as_str() {
                "" => Ok(describe(disk)),
                _ => Err(Refusal::Unknown),
            }),
            Event::Transmission(transmission) => return Ok(Some(*transmission)),
            Event::Aborted | Event::StartTls => return Ok(None),
        }
    }
}

/// Says what the disk is like at this moment.
fn describe(disk: &Disk) -> Export {
    type Flags = TransmissionFlags;
    let bytes = disk.lock().expect("nobody panics with it");
    let is_zero = bytes.iter().all(|byte| *byte == 0);
    let mut export = Export::new(bytes.len() as u64);
    export.description = Some("A disk in memory".into());
    export.flags = Flags::SEND_FLUSH
        | Flags::SEND_FUA
        | Flags::SEND_TRIM
        | Flags::SEND_WRITE_ZEROES
        | Flags::SEND_FAST_ZERO
        | Flags::CAN_MULTI_CONN
        | Flags::SEND_RESIZE
        | Flags::SEND_CACHE;
    export.block_sizes = BlockSizes::new(1, BLOCK_BYTES as u32, 32 << 20).expect("they are fine");
    export.init_state = if is_zero { InitState::ZERO } else { InitState::empty() };
    export.contexts = vec![Context::new(BASE_ALLOCATION, ContextId(0))];
    export
}

fn transmit(
    connection: &mut Connection,
    mut transmission: Transmission,
    disk: &Disk,
) -> io::Result<()> {
    let replies = transmission.replies();
    // The write whose payload is arriving, and how much of it is there.
    let mut writing: Option<(Request, Vec<u8>)> = None;
    loop {
        transmission.set_size_bytes(disk.lock().expect("nobody panics with it").len() as u64);
        let mut input = &connection.received[connection.taken..];
        let event = transmission.advance(&mut input).map_err(io::Error::other)?;
        let taken = connection.received.len() - input.len();
        let mut output = Vec::new();
        match event {
            TransmissionEvent::NeedInput => {
                if !connection.receive()? {
                    return Ok(());
                }
                continue;
            }
            TransmissionEvent::Disconnect => return Ok(()),
            TransmissionEvent::Rejected(rejection) => replies.rejection(&rejection, &mut output),
            TransmissionEvent::Write(request) => {
                writing = Some((request, Vec::with_capacity(request.range.len as usize)));
            }
            TransmissionEvent::Payload(bytes) => {
                let (_, payload) = writing.as_mut().expect("a payload follows its request");
                payload.extend_from_slice(bytes);
            }
            TransmissionEvent::BlockStatus(request, wanted) => {
                block_status(&transmission, &request, &wanted, disk, &mut output);
            }
            TransmissionEvent::Request(request) => {
                connection.taken = taken;
                execute(connection, replies, &request, disk)?;
            }
        }
        connection.taken = taken;
        let is_whole = transmission.payload_remaining() == 0;
        if let Some((request, payload)) = writing.take_if(|_| is_whole) {
            let start = request.range.start as usize;
            let mut bytes = disk.lock().expect("nobody panics with it");
            bytes[start..start + payload.len()].copy_from_slice(&payload);
            output.extend_from_slice(&replies.success(request.tag));
        }
        connection.send(&[&output])?;
    }
}

/// Does what needs no payload and replies.
fn execute(
    connection: &mut Connection,
    replies: lacuna_nbd::server::Replies,
    request: &Request,
    disk: &Disk,
) -> io::Result<()> {
    let (tag, range) = (request.tag, request.range);
    let mut bytes = disk.lock().expect("nobody panics with it");
    match request.command {
        Command::Read => {
            let part = &bytes[range.start as usize..][..range.len as usize];
            return connection.send(&[&replies.whole_read(tag, range), part]);
        }
        Command::Resize if range.start > 1 << 32 => {
            let mut output = Vec::new();
            replies.error(tag, ErrorCode::ENOSPC, "This disk stays below 4 GiB", &mut output);
            return connection.send(&[&output]);
        }
        Command::Resize => bytes.resize(range.start as usize, 0),
        Command::Trim | Command::WriteZeroes => {
            bytes[range.start as usize..][..range.len as usize].fill(0);
        }
        Command::Cache | Command::Flush => {}
        Command::BlockStatus | Command::Write => unreachable!("they have events of their own"),
    }
    connection.send(&[&replies.success(tag)])
}

/// Answers for the one context there is, `base:allocation`.
fn block_status(
    transmission: &Transmission,
    request: &Request,
    wanted: &WantedContexts,
    disk: &Disk,
    output: &mut Vec<u8>,
) {
    let bytes = disk.lock().expect("nobody panics with it");
    let range = &bytes[request.range.start as usize..][..request.range.len as usize];
    let extents = range.chunks(BLOCK_BYTES).map(|block| {
        let is_zero = block.iter().all(|byte| *byte == 0);
        let zero = (AllocationFlags::HOLE | AllocationFlags::ZERO).bits().into();
        StatusExtent { len: block.len() as u64, flags: if is_zero { zero } else { 0 } }
    });
    let replies = transmission.replies();
    let minimum = transmission.block_sizes().minimum();
    match transmission.contexts() {
        [context] if wanted.wants(context.id) => {
            replies.block_status(request, context.id, extents, minimum, Last::Yes, output);
        }
        _ => output.extend_from_slice(&replies.end(request.tag)),
    }
}
