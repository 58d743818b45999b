//! `-L`: what another server has, as qemu-nbd prints it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use lacuna_export::Address;
use lacuna_nbd::client::{DescribedExport, Event, Goal, Handshake, TlsWish, Wish};
use lacuna_nbd::wire::TransmissionFlags;
use lacuna_nbd::{ExportName, Replies};
use lacuna_tls::{ClientTls, Target, VerifyPeer};
use rustls::{ClientConnection, StreamOwned};

use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::objects::{Endpoint, Objects};
use crate::output;
use crate::verbs::open::of_host;
use crate::verbs::serve::tls::refused;

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

/// Which server is asked, and how.
pub(super) struct Listing {
    address: Address,
    tls: Option<Target>,
}

impl Listing {
    pub(super) fn new(parsed: &Parsed, address: Address) -> CliResult<Self> {
        let Some(id) = parsed.last("tls-creds") else { return Ok(Self { address, tls: None }) };
        let objects = Objects::read(parsed.all("object"))?;
        let folder = objects.tls(id, Endpoint::Client);
        let folder = folder.map_err(|error| error.under("Failed to get TLS creds"))?;
        let tls = ClientTls::from_folder(&folder.path, folder.verify).map_err(refused)?;
        let host = match (parsed.last("tls-hostname"), &address) {
            (Some(name), _) => Some(name),
            (None, Address::Tcp(host, _)) => Some(&**host),
            (None, _) if folder.verify == VerifyPeer::On => {
                return Err(CliError::new("No hostname for certificate validation"));
            }
            (None, _) => None,
        };
        let target = tls.toward(host).map_err(refused)?;
        Ok(Self { address, tls: Some(target) })
    }
}

/// Asks a server, and prints.
pub(super) fn run(listing: &Listing) -> CliResult<u8> {
    let exports = ask(connected(&listing.address)?, listing.tls.as_ref())?;
    let mut text = format!("exports available: {}\n", exports.len());
    exports.iter().for_each(|export| describe(&mut text, export));
    output::print(&text).map(|()| 0)
}

/// A stream of bytes both ways, with TLS or without.
trait Duplex: Read + Write {}

impl<S: Read + Write> Duplex for S {}

fn connected(address: &Address) -> CliResult<Box<dyn Duplex>> {
    let cannot = |error| cannot_connect(address, &error);
    Ok(match address {
        Address::Unix(path) => {
            let socket = UnixStream::connect(path).map_err(cannot)?;
            socket.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
            Box::new(socket)
        }
        Address::Tcp(host, port) => {
            let socket = TcpStream::connect((&**host, *port)).map_err(cannot)?;
            socket.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
            Box::new(socket)
        }
        // No option of qemu-nbd names one.
        Address::Vsock(..) => {
            return Err(CliError::new("Sockets of virtual machines are not asked"));
        }
    })
}

/// Goes on under TLS, which shakes hands with the first bytes.
fn secured(socket: Box<dyn Duplex>, target: &Target) -> CliResult<Box<dyn Duplex>> {
    let connection = ClientConnection::new(Arc::clone(&target.config), target.name.clone());
    let connection = connection.map_err(|error| lost(io::Error::other(error)))?;
    Ok(Box::new(StreamOwned::new(connection, socket)))
}

fn cannot_connect(address: &Address, error: &io::Error) -> CliError {
    let name = match address {
        Address::Tcp(host, port) => format!("{host}:{port}"),
        other => other.to_string(),
    };
    CliError::new(format!("Failed to connect to '{name}': {}", of_host(error)))
}

fn lost(error: io::Error) -> CliError {
    match lacuna_tls::explain(&error) {
        Some(why) => CliError::new(why),
        None => CliError::new(format!("Talking to the server: {}", of_host(&error))),
    }
}

/// Goes through the handshake.
fn ask(mut socket: Box<dyn Duplex>, target: Option<&Target>) -> CliResult<Vec<DescribedExport>> {
    let tls = if target.is_some() { TlsWish::Required } else { TlsWish::Never };
    let wish = Wish { goal: Goal::DescribeAll, tls, ..Wish::to_use(ExportName::default()) };
    let (mut handshake, mut received) = (Handshake::new(wish), Vec::new());
    loop {
        let mut input = &received[..];
        let event = handshake.advance(&mut input);
        received.drain(..received.len() - input.len());
        // A server that has answered may have left.
        let sent = socket.write_all(&handshake.take_output()).and_then(|()| socket.flush());
        match (event.map_err(|error| CliError::new(error.to_string()))?, target) {
            (Event::DescribedAll(exports), _) => return Ok(exports),
            (Event::StartTls, Some(target)) => {
                sent.map_err(lost)?;
                received.clear();
                socket = secured(socket, target)?;
                handshake.tls_established();
            }
            _ => {
                sent.map_err(lost)?;
                receive(&mut *socket, &mut received)?;
            }
        }
    }
}

fn receive(socket: &mut dyn Duplex, received: &mut Vec<u8>) -> CliResult<()> {
    let mut piece = [0; PIECE_BYTES];
    match socket.read(&mut piece).map_err(lost)? {
        0 => Err(CliError::new("The server hung up in the middle of the handshake")),
        len => {
            received.extend_from_slice(&piece[..len]);
            Ok(())
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
