//! Exports of NBD servers: URIs, QEMU's older names, and options.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lacuna::Error;
use lacuna_remote::{Address, NbdOptions, Tls, Uri};
use lacuna_tls::ClientTls;
use serde_json::{Map, Value};

use super::keys::Keys;
use super::runtime::Common;
use crate::error::{CliError, CliResult};
use crate::objects::{Endpoint, Objects, TlsFolder};

/// The port that NBD has at IANA, as QEMU's options write it.
const DEFAULT_PORT: &str = "10809";
/// How options say how many connections there may be; ours.
const CONNECTIONS: &str = "connections";
/// The same in the query of a URI.
const URI_CONNECTIONS: &str = "x-connections";

/// An export of a server.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NbdSpec {
    pub(crate) uri: Uri,
    reconnect_delay: Duration,
    open_timeout: Duration,
    /// The context that stands in for `base:allocation`.
    status_context: Option<String>,
    connections: Option<usize>,
    /// The name of an object with certificates.
    tls_creds: Option<String>,
    tls_hostname: Option<String>,
    /// What that object describes.
    certificates: Option<TlsFolder>,
    pub(crate) common: Common,
    /// As QEMU writes it.
    shown: PathBuf,
}

impl NbdSpec {
    /// Says whether a name is one of an export, right or wrong in what follows.
    pub(crate) fn is_name(name: &str) -> bool {
        name.starts_with("nbd:") || Uri::has_scheme(name)
    }

    /// Reads a name alone, as an image has it.
    pub(crate) fn from_name(name: &str) -> CliResult<Self> {
        Self::read(Keys::default(), Some(name))
    }

    /// Reads options and, if given, the name that stands beside them.
    pub(super) fn read(mut keys: Keys, name: Option<&str>) -> CliResult<Self> {
        let common = Common::take(&mut keys)?;
        let named = keys.take_text("filename");
        let uri = match name.or(named.as_deref()) {
            Some(name) if Uri::has_scheme(name) && !is_legacy(name) => parsed(name)?,
            Some(name) if name.starts_with("nbd:") => legacy(name)?,
            Some(_) => {
                return Err(CliError::new(
                    "File name string for new protocols must start with 'nbd:'",
                ));
            }
            None => of_options(&mut keys)?,
        };
        let seconds = |keys: &mut Keys, key| {
            keys.take_number(key).map(|seconds| Duration::from_secs(seconds.unwrap_or(0)))
        };
        let reconnect_delay = seconds(&mut keys, "reconnect-delay")?;
        let open_timeout = seconds(&mut keys, "open-timeout")?;
        let connections = connections(&mut keys, &uri)?;
        let (tls_creds, tls_hostname) =
            (keys.take_text("tls-creds"), keys.take_text("tls-hostname"));
        let status_context = keys.take_text("x-dirty-bitmap");
        keys.none_for_storage("nbd")?;
        let shown = shown(&uri).into();
        Ok(Self {
            uri,
            reconnect_delay,
            open_timeout,
            status_context,
            connections,
            tls_creds,
            tls_hostname,
            certificates: None,
            common,
            shown,
        })
    }

    /// Returns the name by which it is known.
    pub(crate) fn path(&self) -> &Path {
        &self.shown
    }

    /// Finds the certificates that it is to be asked with.
    pub(super) fn find_certificates(&mut self, objects: &Objects) -> CliResult<()> {
        if let Some(id) = &self.tls_creds {
            self.certificates = Some(objects.tls(id, Endpoint::Client)?.clone());
        }
        Ok(())
    }

    /// Returns how to get to it.
    pub(crate) fn options(&self, writes: bool) -> lacuna::Result<NbdOptions> {
        let usual = NbdOptions::default();
        Ok(NbdOptions {
            connections: self.connections.unwrap_or(usual.connections),
            open_timeout: self.open_timeout,
            reconnect_delay: self.reconnect_delay,
            status_context: self.status_context.clone(),
            writes: writes && self.common.read_only != Some(true),
            tls: self.tls()?,
        })
    }

    fn tls(&self) -> lacuna::Result<Option<Tls>> {
        let folder = match (&self.certificates, &self.tls_creds) {
            (Some(folder), _) => folder,
            (None, None) => return Ok(None),
            // Never without TLS where it was asked for.
            (None, Some(id)) => {
                let text = format!("The certificates of tls-creds={id} cannot be used here");
                return Err(Error::unsupported(text));
            }
        };
        let credentials = ClientTls::from_folder(&folder.path, folder.verify)
            .map_err(|error| Error::invalid(error.to_string()))?;
        Ok(Some(Tls { credentials, hostname: self.tls_hostname.clone() }))
    }

    /// Describes it as an object.
    pub(super) fn json(&self) -> Value {
        let mut members = Map::new();
        let mut add = |key: &str, value: String| {
            members.insert(key.into(), value.into());
        };
        add("driver", "nbd".into());
        if !self.uri.export.as_str().is_empty() {
            add("export", self.uri.export.as_str().to_owned());
        }
        match &self.uri.address {
            Address::Tcp { host, port } => {
                add("server.type", "inet".into());
                add("server.host", host.clone());
                add("server.port", port.to_string());
            }
            Address::Unix(path) => {
                add("server.type", "unix".into());
                add("server.path", String::from_utf8_lossy(path).into_owned());
            }
            Address::Vsock { cid, port } => {
                add("server.type", "vsock".into());
                add("server.cid", cid.to_string());
                add("server.port", port.to_string());
            }
        }
        Value::Object(members)
    }
}

fn parsed(text: &str) -> CliResult<Uri> {
    Uri::parse(text)
        .map_err(|error| CliError::new("No valid URL specified").in_our_words(error.to_string()))
}

/// `nbd:` without slashes.
fn is_legacy(name: &str) -> bool {
    name.strip_prefix("nbd:").is_some_and(|rest| !rest.starts_with("//"))
}

/// Makes the URI of an address and an export.
fn uri(address: Address, export: &str) -> CliResult<Uri> {
    let mut uri = parsed("nbd://localhost/")?;
    uri.address = address;
    uri.export = lacuna_remote::ExportName::new(export).ok_or_else(|| {
        CliError::new("export name too long to send to server")
            .in_our_words("The name of the export is no text of at most 4096 bytes")
    })?;
    Ok(uri)
}

/// `nbd:HOST:PORT[:exportname=NAME]` and `nbd:unix:PATH[:exportname=NAME]`.
fn legacy(name: &str) -> CliResult<Uri> {
    let rest = name.strip_prefix("nbd:").unwrap_or(name);
    let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    if place.is_empty() {
        return Err(CliError::new("NBD server address missing")
            .in_our_words("Where the server is is not said; nbd://HOST/EXPORT would be right"));
    }
    let address = match place.strip_prefix("unix:") {
        Some(path) => Address::Unix(path.as_bytes().to_vec()),
        None => tcp(place)?,
    };
    uri(address, export)
}

fn tcp(place: &str) -> CliResult<Address> {
    let wrong = || CliError::new(format!("address '{place}' must be HOST:PORT"));
    let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Address::Tcp { host, port: port.parse().map_err(|_| wrong())? })
}

/// `server.*`, or `host`, `port` and `path` alone, with `export`.
fn of_options(keys: &mut Keys) -> CliResult<Uri> {
    let export = keys.take_text("export").unwrap_or_default();
    let mut server = keys.take_below("server");
    for key in ["host", "port", "path"] {
        if let Some(value) = keys.take(key) {
            server.set(key.to_owned(), value);
        }
    }
    let (path, host) = (server.take_text("path"), server.take_text("host"));
    let kind = server.take_text("type");
    let address = match (kind.as_deref(), path, host) {
        (_, Some(_), Some(_)) => {
            return Err(CliError::new("path and host may not be used at the same time"));
        }
        (None | Some("unix"), Some(path), None) => Address::Unix(path.into_bytes()),
        (None | Some("inet"), None, Some(host)) => {
            let port = server.take_text("port").unwrap_or_else(|| DEFAULT_PORT.into());
            Address::Tcp { host, port: number("port", &port)? }
        }
        (Some("vsock"), None, None) => {
            let mut word = |key: &str| {
                let value = server.take_text(key);
                let value =
                    value.ok_or_else(|| CliError::new(format!("Parameter '{key}' is missing")));
                value.and_then(|value| number(key, &value))
            };
            Address::Vsock { cid: word("cid")?, port: word("port")? }
        }
        (None, None, None) => {
            return Err(CliError::new("NBD server address missing")
                .with_hint("host=, path= or server.type= says where it is"));
        }
        (Some(kind), ..) => {
            return Err(CliError::new(format!("server.type is '{kind}'")).with_hint(
                "inet with host, unix with path, and vsock with cid and port are right",
            ));
        }
    };
    server.none_for_storage("nbd")?;
    uri(address, &export)
}

fn number<T: std::str::FromStr>(key: &str, text: &str) -> CliResult<T> {
    text.parse().map_err(|_| CliError::new(format!("Parameter '{key}' expects a number")))
}

fn connections(keys: &mut Keys, uri: &Uri) -> CliResult<Option<usize>> {
    let in_uri = uri.experimental.iter().find(|(key, _)| key == URI_CONNECTIONS);
    let text = keys.take_text(CONNECTIONS).or_else(|| in_uri.map(|(_, value)| value.clone()));
    let Some(text) = text else { return Ok(None) };
    let most = lacuna_remote::MAX_CONNECTIONS;
    match text.parse() {
        Ok(count) if (1..=most).contains(&count) => Ok(Some(count)),
        _ => Err(CliError::new(format!("{CONNECTIONS} is {text}; it should be 1 to {most}"))),
    }
}

/// Writes an export as QEMU does: nothing is escaped, the port is always there.
fn shown(uri: &Uri) -> String {
    let export = uri.export.as_str();
    let slash = if export.is_empty() { "" } else { "/" };
    match &uri.address {
        _ if uri.requires_tls => uri.to_string(),
        Address::Unix(path) => {
            format!("nbd+unix://{slash}{export}?socket={}", String::from_utf8_lossy(path))
        }
        Address::Tcp { host, port } => format!("nbd://{host}:{port}{slash}{export}"),
        Address::Vsock { .. } => uri.to_string(),
    }
}
