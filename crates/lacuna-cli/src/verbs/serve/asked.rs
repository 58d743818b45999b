//! What the command line of `serve` says.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lacuna::block::ZeroDetection;
use lacuna::qcow2::Access;
use lacuna_export::{Address, ExportOptions, Limits, Listener};

use super::bitmaps;
use super::fork::Ready;
use super::open::{self, Request};
use super::sockets::{self, AlsoGiven};
use super::tls::Secured;
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::size::within;
use crate::verbs::spec::runtime::zero_detection;

/// The port of the protocol.
const PORT: u16 = 10809;
/// The largest number that options take.
const MOST: u64 = i32::MAX as u64;

/// This machine, for sockets of virtual machines.
const LOOPBACK_CID: u32 = 1;

/// An image and the name of its export.
pub(crate) struct Named {
    pub(super) name: String,
    file: String,
}

impl Named {
    pub(crate) fn new(name: &str, file: &str) -> Self {
        Self { name: name.to_owned(), file: file.to_owned() }
    }
}

/// What is served, where, and until when, whatever the command line looked like.
pub(crate) struct Serving {
    pub(crate) images: Vec<Named>,
    pub(crate) address: Address,
    pub(crate) export: ExportOptions,
    pub(crate) limits: Limits,
    pub(crate) is_persistent: bool,
    pub(crate) pid_file: Option<PathBuf>,
    /// The socket file for `lacuna ctl`.
    pub(crate) control: Option<PathBuf>,
    /// A command of the shell; serving ends with it.
    pub(crate) run: Option<String>,
    /// Whether an export that is alone answers to the empty name as well.
    pub(crate) only_is_default: bool,
    /// Whether the sockets are told on standard output.
    pub(crate) says_where: bool,
    /// Whether the address was asked for.
    pub(crate) has_address: bool,
    pub(crate) secured: Secured,
    /// Sockets that somebody else opened, in place of the address.
    pub(crate) inherited: Option<Vec<Listener>>,
    /// Who waits to hear that clients can come.
    pub(crate) ready: Option<Ready>,
}

impl Serving {
    pub(super) fn new(parsed: &Parsed, ready: Option<Ready>) -> CliResult<Self> {
        let has_address = ["socket", "bind", "port", "vsock"].iter().any(|flag| parsed.has(flag));
        if ready.is_some() && parsed.has("run") {
            return Err(CliError::new("--fork and --run are mutually exclusive"));
        }
        Ok(Self {
            images: images(parsed)?,
            address: address(parsed)?,
            export: export(parsed)?,
            limits: limits(parsed)?,
            is_persistent: parsed.has("persistent"),
            pid_file: parsed.last("pid-file").map(PathBuf::from),
            control: parsed.last("control").map(PathBuf::from),
            run: parsed.last("run").map(str::to_owned),
            only_is_default: true,
            says_where: true,
            secured: Secured::new(parsed)?,
            inherited: inherited(parsed)?,
            ready,
            has_address,
        })
    }

    /// A command needs a way to us and does not care which.
    pub(super) const fn needs_own_socket(&self) -> bool {
        self.run.is_some() && !self.has_address
    }

    /// Returns where a client finds the only export, or all of them; `names` are the sockets'.
    pub(super) fn uri(&self, address: &Address, names: &[String]) -> String {
        let export = match &self.images[..] {
            [only] => escaped(&only.name),
            _ => String::new(),
        };
        let s = self.secured.scheme_end();
        let of_path = |path: &Path| escaped(&path.display().to_string());
        let certificates =
            self.secured.folder().map(|folder| format!("tls-certificates={}", of_path(folder)));
        let beside =
            |sign| certificates.as_ref().map_or_else(String::new, |it| format!("{sign}{it}"));
        match (address, names.first()) {
            (Address::Unix(path), _) => {
                let path = of_path(path);
                format!("nbd{s}+unix:///{export}?socket={path}{}", beside('&'))
            }
            (Address::Tcp(..), Some(name)) => {
                let name = reachable(name);
                format!("nbd{s}://{name}/{export}{}", beside('?'))
            }
            (Address::Tcp(..), None) => format!("nbd{s}://{address}/{export}{}", beside('?')),
            (Address::Vsock(cid, port), _) => {
                // A client on this machine finds us at the loopback's number.
                let cid = if *cid == Address::ANY_CID { LOOPBACK_CID } else { *cid };
                format!("nbd{s}+vsock://{cid}:{port}/{export}{}", beside('?'))
            }
        }
    }
}

/// Names this machine where all of its addresses are meant: a certificate has no such name.
fn reachable(name: &str) -> String {
    let port = ["[::]:", "0.0.0.0:"].iter().find_map(|all| name.strip_prefix(all));
    port.map_or_else(|| name.to_owned(), |port| format!("localhost:{port}"))
}

/// Spells out what has a meaning in a URI.
fn escaped(text: &str) -> String {
    let spelt = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(spelt).collect()
}

/// Takes each operand apart. A name is what stands before the first `=`, unless that looks like
/// a part of a path or of options.
fn images(parsed: &Parsed) -> CliResult<Vec<Named>> {
    let has_names = !parsed.has("image-opts");
    let named = |operand: &String| match operand.split_once('=') {
        Some((name, file)) if has_names && !name.contains(['/', ':']) && !file.is_empty() => {
            Named { name: name.to_owned(), file: file.to_owned() }
        }
        _ => Named { name: String::new(), file: operand.clone() },
    };
    let images: Vec<Named> = parsed.operands.iter().map(named).collect();
    if images.is_empty() {
        return Err(CliError::usage("Expecting an image file name"));
    }
    if images.len() > 1 && images.iter().filter(|named| named.name.is_empty()).count() > 1 {
        return Err(CliError::new("Of several exports, at most one goes without a name")
            .with_hint("name them: lacuna serve a=a.qcow2 b=b.raw"));
    }
    Ok(images)
}

/// Takes sockets that somebody else opened, unless the command line contradicts.
fn inherited(parsed: &Parsed) -> CliResult<Option<Vec<Listener>>> {
    if sockets::activated() > 0 {
        let also = AlsoGiven {
            socket: parsed.has("socket"),
            bind: parsed.has("bind"),
            port: parsed.has("port"),
            vsock: parsed.has("vsock"),
            run: parsed.has("run"),
        };
        also.refuse_beside_activation()?;
    }
    sockets::inherited()
}

fn address(parsed: &Parsed) -> CliResult<Address> {
    let kinds = [
        ("--socket", parsed.has("socket")),
        ("--vsock", parsed.has("vsock")),
        ("--bind or --port", parsed.has("bind") || parsed.has("port")),
    ];
    let given: Vec<&str> =
        kinds.iter().filter(|(_, given)| *given).map(|(kind, _)| *kind).collect();
    if let [one, other, ..] = given[..] {
        return Err(CliError::new(format!("{one} and {other} are mutually exclusive")));
    }
    match (parsed.last("socket"), parsed.last("vsock")) {
        (Some(path), _) => Ok(Address::Unix(PathBuf::from(path))),
        (None, Some(text)) => sockets::vsock(text),
        (None, None) => {
            let port = parsed.last("port").map(|text| within("port", text, 0, u16::MAX.into()));
            let port = port.transpose()?.and_then(|port| u16::try_from(port).ok());
            let host = parsed.last("bind").unwrap_or("::").trim_matches(['[', ']']);
            Ok(Address::Tcp(host.to_owned(), port.unwrap_or(PORT)))
        }
    }
}

pub(super) fn export(parsed: &Parsed) -> CliResult<ExportOptions> {
    Ok(ExportOptions {
        description: parsed.last("description").map(str::to_owned),
        read_only: parsed.has("read-only"),
        shared: number(parsed, "shared", 0)?.unwrap_or(0) as usize,
        resize: parsed.has("resize"),
        layers: Some(bitmaps::layers(parsed)),
        ..ExportOptions::default()
    })
}

fn limits(parsed: &Parsed) -> CliResult<Limits> {
    let usual = Limits::default();
    let connections = number(parsed, "max-connections", 1)?.map(|number| number as usize);
    let handshake = number(parsed, "handshake-timeout", 1)?.map(Duration::from_secs);
    Ok(Limits {
        connections: connections.unwrap_or(usual.connections),
        handshake: handshake.unwrap_or(usual.handshake),
        ..usual
    })
}

fn number(parsed: &Parsed, flag: &str, least: u64) -> CliResult<Option<u64>> {
    parsed.last(flag).map(|text| within(flag, text, least, MOST)).transpose()
}

/// Says how an image is to be opened.
pub(super) fn request(named: &Named, parsed: &Parsed) -> CliResult<Request> {
    let reading = Request::reading(&named.file, parsed, "format")?;
    let access = if parsed.has("read-only") { Access::ReadOnly } else { Access::ReadWrite };
    let cache = match parsed.last("cache") {
        None => reading.cache,
        Some(mode) => open::cache_mode(mode).ok_or_else(|| CliError::new("Invalid cache mode"))?,
    };
    let sharing = open::served(reading.sharing);
    let mut request = Request { access, cache, sharing, ..reading };
    let common = &mut request.image.disk.common;
    if let Some(level) = parsed.last("detect-zeroes") {
        common.detect_zeroes = zero_detection(level).ok_or_else(|| {
            CliError::new(format!("Invalid detect-zeroes mode: {level}"))
                .with_hint("it is off, on, unmap or thorough")
        })?;
    }
    match parsed.last("discard") {
        None => common.discard = common.discard.or(Some(true)),
        Some("unmap" | "on") => common.discard = Some(true),
        Some("ignore" | "off") if common.detect_zeroes >= ZeroDetection::Unmap => {
            return Err(CliError::new("--detect-zeroes=unmap needs --discard=unmap"));
        }
        Some("ignore" | "off") => common.discard = Some(false),
        Some(other) => {
            return Err(CliError::new(format!("Invalid discard mode: {other}"))
                .with_hint("it is ignore or unmap"));
        }
    }
    Ok(request)
}
