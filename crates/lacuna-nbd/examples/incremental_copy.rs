//! Brings an older copy of a disk up to date: only what changed crosses the wire.
//!
//! ```text
//! lacuna serve -r -k /tmp/disk.sock top.qcow2 &
//! # The target is a raw copy of what the image below top.qcow2 held:
//! incremental_copy /tmp/disk.sock copy.raw --allocated 1
//! # The target is a raw copy from when the bitmap began:
//! incremental_copy /tmp/disk.sock copy.raw --dirty 1 --bitmap since-monday
//! ```
//!
//! `x-lacuna:layers` says of every range in one answer whether it reads as zeros, and for each level
//! of the chain whether the range is allocated there and whether it is dirty there. A range is
//! copied if one of the first `--allocated` levels has it, or it is dirty in one of the first
//! `--dirty` levels; zeros are written without being read.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use lacuna_nbd::client::{Ask, Event, Handshake, Transmission, TransmissionEvent, Wish};
use lacuna_nbd::context::{LAYERS, LAYERS_OF_BITMAP, LayersStatus};
use lacuna_nbd::{ByteRange, Command, ExportName};

/// How much is asked about at once, and how much is read at once.
const STATUS_BYTES: u64 = 1 << 40;
const PIECE_BYTES: u64 = 1 << 20;

/// What counts as changed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changed {
    /// Allocated in one of so many levels, from the top.
    pub(crate) allocated: u32,
    /// Dirty in one of so many levels, from the top.
    pub(crate) dirty: u32,
    /// In this bitmap; where none is named, in those that the server chose.
    pub(crate) bitmap: Option<String>,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Bytes that were read from the server.
    pub(crate) data_bytes: u64,
    /// Bytes that are zeros now and were not read.
    pub(crate) zero_bytes: u64,
}

#[allow(dead_code, reason = "a test takes this file for a module")]
fn main() -> io::Result<()> {
    let mut words = std::env::args().skip(1);
    let usage = || io::Error::other("usage: incremental_copy SOCKET TARGET [--allocated N] ...");
    let (socket, target) = (words.next().ok_or_else(usage)?, words.next().ok_or_else(usage)?);
    let mut changed = Changed::default();
    while let (Some(flag), Some(value)) = (words.next(), words.next()) {
        let levels = || value.parse().map_err(io::Error::other);
        match &*flag {
            "--allocated" => changed.allocated = levels()?,
            "--dirty" => changed.dirty = levels()?,
            "--bitmap" => changed.bitmap = Some(value),
            _ => return Err(usage()),
        }
    }
    let copied = copy(Path::new(&socket), "", Path::new(&target), &changed)?;
    println!("{} bytes read, {} zeroed", copied.data_bytes, copied.zero_bytes);
    Ok(())
}

/// Copies what changed from an export into a raw file.
pub(crate) fn copy(
    socket: &Path,
    export: &str,
    target: &Path,
    changed: &Changed,
) -> io::Result<Copied> {
    let mut source = Source::connect(socket, export, changed)?;
    let target = OpenOptions::new().write(true).open(target)?;
    let size_bytes = source.transmission.info().size_bytes;
    target.set_len(size_bytes)?;
    let (mut copied, mut at) = (Copied::default(), 0);
    while at < size_bytes {
        let range = ByteRange { start: at, len: STATUS_BYTES.min(size_bytes - at) };
        for (range, status) in source.layers(range)? {
            at = range.start + range.len;
            if has_changed(changed, status) {
                update(&mut source, &target, range, status, &mut copied)?;
            }
        }
    }
    target.sync_all()?;
    Ok(copied)
}

fn has_changed(changed: &Changed, status: LayersStatus) -> bool {
    (0..changed.allocated).any(|level| status.is_allocated(level))
        || (0..changed.dirty).any(|level| status.is_dirty(level))
}

fn update(
    source: &mut Source,
    target: &File,
    range: ByteRange,
    status: LayersStatus,
    copied: &mut Copied,
) -> io::Result<()> {
    for start in (range.start..range.start + range.len).step_by(PIECE_BYTES as usize) {
        let len = PIECE_BYTES.min(range.start + range.len - start);
        if status.reads_zero() {
            target.write_all_at(&vec![0; len as usize], start)?;
            copied.zero_bytes += len;
        } else {
            target.write_all_at(&source.read(ByteRange { start, len })?, start)?;
            copied.data_bytes += len;
        }
    }
    Ok(())
}

/// A connection to the server, one request at a time.
struct Source {
    socket: UnixStream,
    transmission: Transmission,
    received: Vec<u8>,
}

impl Source {
    fn connect(socket: &Path, export: &str, changed: &Changed) -> io::Result<Self> {
        let name = ExportName::new(export).ok_or_else(|| io::Error::other("no such name"))?;
        let context = match &changed.bitmap {
            None => LAYERS.to_owned(),
            Some(bitmap) => format!("{LAYERS_OF_BITMAP}{bitmap}"),
        };
        let wish = Wish { contexts: vec![context.clone()], ..Wish::to_use(name) };
        let (socket, transmission) = shake_hands(UnixStream::connect(socket)?, wish)?;
        match transmission.info().contexts.len() {
            1 => Ok(Self { socket, transmission, received: Vec::new() }),
            _ => Err(io::Error::other(format!("the server does not offer {context}"))),
        }
    }

    /// Returns the leading extents of a range.
    fn layers(&mut self, range: ByteRange) -> io::Result<Vec<(ByteRange, LayersStatus)>> {
        let mut extents = Vec::new();
        self.ask(&Ask::new(Command::BlockStatus, range), |event| {
            if let TransmissionEvent::Extent { range, flags, .. } = event {
                extents.push((range, LayersStatus(flags)));
            }
        })?;
        Ok(extents)
    }

    fn read(&mut self, range: ByteRange) -> io::Result<Vec<u8>> {
        let (mut bytes, mut at) = (vec![0; range.len as usize], 0);
        self.ask(&Ask::new(Command::Read, range), |event| match event {
            TransmissionEvent::Data { range: part, .. } => at = (part.start - range.start) as usize,
            TransmissionEvent::Payload(piece) => {
                bytes[at..at + piece.len()].copy_from_slice(piece);
                at += piece.len();
            }
            // A hole is zeros, as the bytes are already.
            _ => {}
        })?;
        Ok(bytes)
    }

    fn ask(
        &mut self,
        ask: &Ask<'_>,
        mut each: impl FnMut(TransmissionEvent<'_>),
    ) -> io::Result<()> {
        let (_, header) = self.transmission.request(ask).map_err(io::Error::other)?;
        self.socket.write_all(&header)?;
        loop {
            let mut input = &self.received[..];
            let event = self.transmission.advance(&mut input).map_err(io::Error::other)?;
            let (is_hungry, mut done) = (event == TransmissionEvent::NeedInput, None);
            match event {
                TransmissionEvent::Done { result, .. } => done = Some(result),
                event => each(event),
            }
            let left = input.len();
            self.received.drain(..self.received.len() - left);
            match done {
                Some(result) => return result.map_err(|failure| io::Error::other(failure.message)),
                None if is_hungry => receive(&mut self.socket, &mut self.received)?,
                None => {}
            }
        }
    }
}

fn shake_hands(mut socket: UnixStream, wish: Wish) -> io::Result<(UnixStream, Transmission)> {
    let (mut handshake, mut received) = (Handshake::new(wish), Vec::new());
    loop {
        let mut input = &received[..];
        let event = handshake.advance(&mut input);
        let left = input.len();
        received.drain(..received.len() - left);
        socket.write_all(&handshake.take_output())?;
        match event.map_err(io::Error::other)? {
            Event::NeedInput => receive(&mut socket, &mut received)?,
            Event::Transmission(transmission) => return Ok((socket, *transmission)),
            other => return Err(io::Error::other(format!("unexpected: {other:?}"))),
        }
    }
}

fn receive(socket: &mut UnixStream, received: &mut Vec<u8>) -> io::Result<()> {
    let mut piece = [0; 64 << 10];
    match socket.read(&mut piece)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        len => {
            received.extend_from_slice(&piece[..len]);
            Ok(())
        }
    }
}
