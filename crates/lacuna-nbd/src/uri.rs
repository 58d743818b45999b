//! NBD URIs (C.11, doc/uri.md) as typed values.
//!
//! | URI | where |
//! |---|---|
//! | `nbd://HOST[:PORT]/EXPORT`, `nbds://...` | TCP, port 10809 unless said; `nbds` requires TLS |
//! | `nbd+unix:///EXPORT?socket=PATH`, `nbds+unix:///...` | a Unix socket; `%00` first: abstract |
//! | `nbd+vsock://[CID[:PORT]]/EXPORT`, `nbds+vsock://...` | a virtual socket; 2, the host, unless said |
//!
//! Everything may be percent-encoded. Query keys: `socket`, `tls-type`, `tls-hostname`,
//! `tls-verify-peer`, and libnbd's `tls-certificates`, `tls-psk-file`; those that begin with `x-`
//! are kept, any other is an error.

use std::fmt;

use crate::text::quoted;
use crate::{Error, ExportName, Result};

/// The port that NBD has at IANA.
pub const DEFAULT_PORT: u16 = 10809;
/// The host, seen from a guest.
const DEFAULT_CID: u32 = 2;

/// Where to find an export, and how to get to it.
///
/// ```
/// use lacuna_nbd::{Address, Uri};
/// let uri = Uri::parse("nbds://example.com/my%20disk?tls-verify-peer=0")?;
/// assert_eq!(uri.export.as_str(), "my disk");
/// assert!(uri.requires_tls);
/// assert_eq!(uri.address, Address::Tcp { host: "example.com".into(), port: 10809 });
/// assert_eq!(uri.to_string(), "nbds://example.com/my%20disk?tls-verify-peer=0");
/// # Ok::<_, lacuna_nbd::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Whether to fail rather than go on without TLS (`nbds`).
    pub requires_tls: bool,
    /// Where the server listens.
    pub address: Address,
    /// The name of the export; empty for the default one.
    pub export: ExportName,
    /// The part of the authority before `@`: a name for TLS.
    pub user: Option<String>,
    /// What TLS is to be like.
    pub tls: TlsParameters,
    /// Keys that begin with `x-`, and their values.
    pub experimental: Vec<(String, String)>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP socket. IPv6 addresses have lost their brackets.
    Tcp {
        /// A name or an address; `localhost` where the URI has none.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket: a path, or with a NUL in front a name in the abstract namespace. Paths are
    /// bytes.
    Unix(Vec<u8>),
    /// A virtual socket between hosts and guests.
    Vsock {
        /// Which machine: 2 is the host.
        cid: u32,
        /// The port.
        port: u32,
    },
}

/// What the query says about TLS; nothing where it does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsParameters {
    /// How to authenticate.
    pub kind: Option<TlsKind>,
    /// The name to look for in the certificate.
    pub hostname: Option<String>,
    /// Whether to verify who the server is.
    pub verifies_peer: Option<bool>,
    /// A folder with certificates.
    pub certificates: Option<String>,
    /// A file with keys.
    pub psk_file: Option<String>,
}

/// How TLS authenticates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsKind {
    /// Not at all.
    Anonymous,
    /// By keys that both know.
    Psk,
    /// By certificates.
    X509,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Tcp,
    Unix,
    Vsock,
}

impl Uri {
    /// Says whether a text begins as a URI of this kind does, right or wrong in what follows.
    #[must_use]
    pub fn has_scheme(text: &str) -> bool {
        text.split_once(':').is_some_and(|(scheme, _)| transport(scheme).is_some())
    }

    /// Parses a URI.
    ///
    /// # Errors
    /// `InvalidRequest`, which says what would have been right.
    pub fn parse(text: &str) -> Result<Self> {
        let (scheme, rest) = text.split_once(':').ok_or_else(|| wrong_scheme(text))?;
        let (transport, requires_tls) = transport(scheme).ok_or_else(|| wrong_scheme(text))?;
        if let Some(bad) = rest.chars().find(|c| c.is_control() || *c == ' ') {
            return Err(Error::invalid(format!(
                "URI {} has {bad:?} in it, which is written %{:02X}",
                quoted(text.as_bytes()),
                u32::from(bad)
            )));
        }
        if rest.contains('#') {
            return Err(Error::invalid(format!(
                "URI {} has a fragment (#), which NBD has not; in a name it is written %23",
                quoted(text.as_bytes())
            )));
        }
        let rest = rest.strip_prefix("//").ok_or_else(|| {
            Error::invalid(format!(
                "URI {} goes on without //; it should be {}",
                quoted(text.as_bytes()),
                example(transport)
            ))
        })?;
        let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, query)| (rest, query));
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let mut parameters = Parameters::parse(query)?;
        let (user, address) = address(transport, authority, &mut parameters)?;
        let export = export(path)?;
        let Parameters { tls, experimental, .. } = parameters;
        Ok(Self { requires_tls, address, export, user, tls, experimental })
    }
}

/// Returns what a scheme stands for.
fn transport(scheme: &str) -> Option<(Transport, bool)> {
    let known = [
        ("nbd", Transport::Tcp, false),
        // QEMU's other word for it.
        ("nbd+tcp", Transport::Tcp, false),
        ("nbds", Transport::Tcp, true),
        ("nbd+unix", Transport::Unix, false),
        ("nbds+unix", Transport::Unix, true),
        ("nbd+vsock", Transport::Vsock, false),
        ("nbds+vsock", Transport::Vsock, true),
    ];
    let found = known.iter().find(|(name, ..)| scheme.eq_ignore_ascii_case(name));
    found.map(|(_, transport, requires_tls)| (*transport, *requires_tls))
}

fn wrong_scheme(text: &str) -> Error {
    Error::invalid(format!(
        "{} is no NBD URI; it should begin with nbd://, nbds://, nbd+unix:///, nbds+unix:///, \
         nbd+vsock:// or nbds+vsock://",
        quoted(text.as_bytes())
    ))
}

const fn example(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "nbd://HOST:PORT/EXPORT",
        Transport::Unix => "nbd+unix:///EXPORT?socket=PATH",
        Transport::Vsock => "nbd+vsock://CID:PORT/EXPORT",
    }
}

fn address(
    transport: Transport,
    authority: &str,
    parameters: &mut Parameters,
) -> Result<(Option<String>, Address)> {
    let socket = parameters.socket.take();
    if transport == Transport::Unix {
        return unix(authority, socket);
    }
    if socket.is_some() {
        return Err(Error::invalid(
            "Only URIs of Unix sockets have socket=: it should be nbd+unix:///EXPORT?socket=PATH",
        ));
    }
    let (user, place) = match authority.rsplit_once('@') {
        Some((user, place)) => (Some(decoded_text(user)?), place),
        None => (None, authority),
    };
    let (host, port) = host_and_port(place)?;
    let address = match transport {
        Transport::Vsock => {
            let cid = if host.is_empty() { Some(DEFAULT_CID) } else { host.parse().ok() };
            let default = Some(DEFAULT_PORT.into());
            let port = port.map_or(default, |port| port.parse().ok());
            let (cid, port) = cid.zip(port).ok_or_else(|| wrong_place(place, transport))?;
            Address::Vsock { cid, port }
        }
        _ => {
            let port = port.map_or(Some(DEFAULT_PORT), |port| port.parse().ok());
            let port = port.ok_or_else(|| wrong_place(place, transport))?;
            let host = if host.is_empty() { "localhost".into() } else { decoded_text(host)? };
            Address::Tcp { host, port }
        }
    };
    Ok((user, address))
}

fn unix(authority: &str, socket: Option<Vec<u8>>) -> Result<(Option<String>, Address)> {
    if !authority.is_empty() {
        return Err(Error::invalid(format!(
            "URI of a Unix socket names a host, {}; it should be nbd+unix:///EXPORT?socket=PATH, \
             with three slashes",
            quoted(authority.as_bytes())
        )));
    }
    let socket = socket.filter(|path| !path.is_empty()).ok_or_else(|| {
        Error::invalid(
            "URI of a Unix socket does not say which: it should be nbd+unix:///EXPORT?socket=PATH",
        )
    })?;
    if socket.iter().skip(1).any(|byte| *byte == 0) {
        return Err(Error::invalid(
            "Path of a socket has %00 in it; only in front it means something: an abstract name",
        ));
    }
    Ok((None, Address::Unix(socket)))
}

/// Splits `host:port` and `[address]:port`. An empty port counts as none.
fn host_and_port(place: &str) -> Result<(&str, Option<&str>)> {
    let wrong = || wrong_place(place, Transport::Tcp);
    let (host, rest) = if let Some(rest) = place.strip_prefix('[') {
        rest.split_once(']').ok_or_else(wrong)?
    } else {
        place.find(':').map_or((place, ""), |at| place.split_at(at))
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => Some(port),
        None if rest.is_empty() => None,
        None => return Err(wrong()),
    };
    let is_number = |port: &&str| port.bytes().all(|byte| byte.is_ascii_digit());
    match port.filter(|port| !port.is_empty()) {
        Some(port) if !is_number(&port) => Err(wrong()),
        port => Ok((host, port)),
    }
}

fn wrong_place(place: &str, transport: Transport) -> Error {
    Error::invalid(format!(
        "{} is no place to connect to; it should be {}, with brackets around an IPv6 address",
        quoted(place.as_bytes()),
        example(transport)
    ))
}

/// The path without exactly one slash in front.
fn export(path: &str) -> Result<ExportName> {
    let bytes = decoded(path.strip_prefix('/').unwrap_or(path))?;
    ExportName::decode(&bytes).ok_or_else(|| {
        Error::invalid(format!(
            "Export name {} is no UTF-8 text without NUL of at most 4096 bytes",
            quoted(&bytes)
        ))
    })
}

#[derive(Default)]
struct Parameters {
    socket: Option<Vec<u8>>,
    tls: TlsParameters,
    experimental: Vec<(String, String)>,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self> {
        let mut parameters = Self::default();
        for pair in query.split(['&', ';']).filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                Error::invalid(format!(
                    "Query of the URI has {}; it should be KEY=VALUE",
                    quoted(pair.as_bytes())
                ))
            })?;
            parameters.take(&decoded_text(key)?, value)?;
        }
        Ok(parameters)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<()> {
        let is_new = match key {
            "socket" => self.socket.replace(decoded(value)?).is_none(),
            "tls-type" => self.tls.kind.replace(TlsKind::parse(value)?).is_none(),
            "tls-hostname" => self.tls.hostname.replace(decoded_text(value)?).is_none(),
            "tls-verify-peer" => self.tls.verifies_peer.replace(truth(value)?).is_none(),
            "tls-certificates" => self.tls.certificates.replace(decoded_text(value)?).is_none(),
            "tls-psk-file" => self.tls.psk_file.replace(decoded_text(value)?).is_none(),
            _ if key.starts_with("x-") => {
                self.experimental.push((key.to_owned(), decoded_text(value)?));
                true
            }
            _ => {
                return Err(Error::invalid(format!(
                    "Query of the URI has the key {}; there are socket, tls-type, tls-hostname, \
                     tls-verify-peer, tls-certificates and tls-psk-file",
                    quoted(key.as_bytes())
                )));
            }
        };
        if is_new {
            return Ok(());
        }
        Err(Error::invalid(format!("Query of the URI has the key {key} twice")))
    }
}

impl TlsKind {
    fn parse(value: &str) -> Result<Self> {
        match value {
            "anon" => Ok(Self::Anonymous),
            "psk" => Ok(Self::Psk),
            "x509" => Ok(Self::X509),
            _ => Err(Error::invalid(format!(
                "tls-type is {}; it should be anon, psk or x509",
                quoted(value.as_bytes())
            ))),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anon",
            Self::Psk => "psk",
            Self::X509 => "x509",
        }
    }
}

fn truth(value: &str) -> Result<bool> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(Error::invalid(format!(
            "tls-verify-peer is {}; it should be 0 or 1",
            quoted(value.as_bytes())
        ))),
    }
}

/// Decodes `%XX`.
fn decoded(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.first_chunk::<2>().and_then(|digits| std::str::from_utf8(digits).ok());
        let is_hex = |digits: &&str| digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let byte = digits.filter(is_hex).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or_else(|| {
            Error::invalid(format!(
                "{} has a percent sign without two hexadecimal digits; the sign itself is %25",
                quoted(text.as_bytes())
            ))
        })?);
        rest = rest.get(2..).unwrap_or_default();
    }
    Ok(bytes)
}

fn decoded_text(text: &str) -> Result<String> {
    let bytes = decoded(text)?;
    let is_text = !bytes.contains(&0);
    String::from_utf8(bytes).ok().filter(|_| is_text).ok_or_else(|| {
        Error::invalid(format!("{} is no UTF-8 text without NUL", quoted(text.as_bytes())))
    })
}

/// What needs no encoding in a path or a value, besides letters and digits.
const PLAIN: &[u8] = b"-._~/:@,";
/// The same for a host, and for one in brackets.
const PLAIN_IN_HOST: &[u8] = b"-._~";
const PLAIN_IN_BRACKETS: &[u8] = b"-._~:";

fn encode(bytes: &[u8], plain: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || plain.contains(byte) {
            write!(f, "{}", char::from(*byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

/// Writes a URI that parses to the same.
impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.requires_tls { "nbds" } else { "nbd" })?;
        f.write_str(match self.address {
            Address::Tcp { .. } => "://",
            Address::Unix(_) => "+unix://",
            Address::Vsock { .. } => "+vsock://",
        })?;
        if let Some(user) = &self.user {
            encode(user.as_bytes(), PLAIN_IN_HOST, f)?;
            f.write_str("@")?;
        }
        match &self.address {
            Address::Tcp { host, port } => {
                // Only an address has colons.
                if host.contains(':') {
                    f.write_str("[")?;
                    encode(host.as_bytes(), PLAIN_IN_BRACKETS, f)?;
                    f.write_str("]")?;
                } else {
                    encode(host.as_bytes(), PLAIN_IN_HOST, f)?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
            }
            Address::Unix(_) => {}
            Address::Vsock { cid, port } => write!(f, "{cid}:{port}")?,
        }
        f.write_str("/")?;
        encode(self.export.as_str().as_bytes(), PLAIN, f)?;
        self.write_query(f)
    }
}

impl Uri {
    fn write_query(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "?";
        let mut pair = |f: &mut fmt::Formatter<'_>, key: &str, value: &[u8]| {
            f.write_str(std::mem::replace(&mut separator, "&"))?;
            encode(key.as_bytes(), PLAIN, f)?;
            f.write_str("=")?;
            encode(value, PLAIN, f)
        };
        if let Address::Unix(path) = &self.address {
            pair(f, "socket", path)?;
        }
        let tls = &self.tls;
        let verifies = tls.verifies_peer.map(|verifies| if verifies { "1" } else { "0" });
        let texts = [
            ("tls-type", tls.kind.map(TlsKind::name)),
            ("tls-hostname", tls.hostname.as_deref()),
            ("tls-verify-peer", verifies),
            ("tls-certificates", tls.certificates.as_deref()),
            ("tls-psk-file", tls.psk_file.as_deref()),
        ];
        for (key, value) in texts {
            if let Some(value) = value {
                pair(f, key, value.as_bytes())?;
            }
        }
        self.experimental.iter().try_for_each(|(key, value)| pair(f, key, value.as_bytes()))
    }
}
