//! `-L`: what another server has, as qemu-nbd prints it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use lacuna_export::Address;
use lacuna_nbd::client::{DescribedExport, Event, Goal, Handshake, Wish};
use lacuna_nbd::wire::TransmissionFlags;
use lacuna_nbd::{ExportName, Replies};

use crate::error::{CliError, CliResult};
use crate::output;
use crate::verbs::open::of_host;

/// How long a server may be silent.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much is received at once.
const PIECE_BYTES: usize = 16 << 10;

/// The words for bits of the flags, in order of the bits.
const FLAG_NAMES: [(TransmissionFlags, &str); 12] = [
    (TransmissionFlags::READ_ONLY, "readonly"),
    (TransmissionFlags::SEND_FLUSH, "flush"),
    (TransmissionFlags::SEND_FUA, "fua"),
    (TransmissionFlags::ROTATIONAL, "rotational"),
    (TransmissionFlags::SEND_TRIM, "trim"),
    (TransmissionFlags::SEND_WRITE_ZEROES, "zeroes"),
    (TransmissionFlags::SEND_DF, "df"),
    (TransmissionFlags::CAN_MULTI_CONN, "multi"),
    (TransmissionFlags::SEND_RESIZE, "resize"),
    (TransmissionFlags::SEND_CACHE, "cache"),
    (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
    (TransmissionFlags::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];

/// Asks the server at `address`, and prints.
pub(super) fn run(address: &Address) -> CliResult<u8> {
    let exports = match address {
        Address::Unix(path) => {
            let socket =
                UnixStream::connect(path).map_err(|error| cannot_connect(address, &error))?;
            socket.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
            ask(socket)
        }
        Address::Tcp(host, port) => {
            let socket = TcpStream::connect((&**host, *port));
            let socket = socket.map_err(|error| cannot_connect(address, &error))?;
            socket.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
            ask(socket)
        }
        // No option of qemu-nbd names one.
        Address::Vsock(..) => Err(CliError::new("Sockets of virtual machines are not asked")),
    }?;
    let mut text = format!("exports available: {}\n", exports.len());
    exports.iter().for_each(|export| describe(&mut text, export));
    output::print(&text).map(|()| 0)
}

fn cannot_connect(address: &Address, error: &io::Error) -> CliError {
    let name = match address {
        Address::Tcp(host, port) => format!("{host}:{port}"),
        other => other.to_string(),
    };
    CliError::new(format!("Failed to connect to '{name}': {}", of_host(error)))
}

fn lost(error: io::Error) -> CliError {
    CliError::new(format!("Talking to the server: {}", of_host(&error)))
}

/// Goes through the handshake.
fn ask(mut socket: impl Read + Write) -> CliResult<Vec<DescribedExport>> {
    let wish = Wish { goal: Goal::DescribeAll, ..Wish::to_use(ExportName::default()) };
    let (mut handshake, mut received) = (Handshake::new(wish), Vec::new());
    loop {
        let mut input = &received[..];
        let event = handshake.advance(&mut input);
        received.drain(..received.len() - input.len());
        // A server that has answered may have left.
        let sent = socket.write_all(&handshake.take_output());
        match event.map_err(|error| CliError::new(error.to_string()))? {
            Event::DescribedAll(exports) => return Ok(exports),
            _ => sent.map_err(lost)?,
        }
        let mut piece = [0; PIECE_BYTES];
        match socket.read(&mut piece).map_err(lost)? {
            0 => return Err(CliError::new("The server hung up in the middle of the handshake")),
            len => received.extend_from_slice(&piece[..len]),
        }
    }
}

fn describe(text: &mut String, export: &DescribedExport) {
    let (listed, tame) = (&export.listed, output::tame);
    *text += &format!(" export: '{}'\n", tame(listed.name.as_str()));
    let told = export.info.as_ref().and_then(|info| info.description.as_deref());
    let description = told.unwrap_or(&listed.description);
    if !description.is_empty() {
        *text += &format!("  description: {}\n", tame(description));
    }
    if let Some(info) = &export.info {
        *text += &format!("  size:  {}\n  flags: 0x{:x} (", info.size_bytes, info.flags.bits());
        let set = FLAG_NAMES.iter().filter(|(flag, _)| info.flags.contains(*flag));
        set.for_each(|(_, name)| *text += &format!(" {name}"));
        *text += " )\n";
    }
    if let Some(sizes) = export.block_sizes {
        let rows =
            [("min", sizes.minimum()), ("opt", sizes.preferred()), ("max", sizes.max_payload())];
        rows.iter().for_each(|(name, bytes)| *text += &format!("  {name} block: {bytes}\n"));
    }
    if let Some(info) = &export.info {
        let is_wide = info.replies == Replies::Extended;
        *text += &format!("  transaction size: {}-bit\n", if is_wide { 64 } else { 32 });
    }
    if !export.contexts.is_empty() {
        *text += &format!("  available meta contexts: {}\n", export.contexts.len());
        export.contexts.iter().for_each(|name| *text += &format!("   {}\n", tame(name)));
    }
}
