//! How to get to an export, besides where it is.

use std::path::Path;
use std::time::Duration;

use lacuna::{Error, ErrorKind, Result};
use lacuna_nbd::{Address, TlsKind, Uri};
use lacuna_tls::{ClientTls, Target, VerifyPeer};

/// Most connections to one export.
pub const MAX_CONNECTIONS: usize = 16;

/// How to get to an export, besides where it is.
///
/// ```
/// use std::time::Duration;
/// use lacuna_remote::NbdOptions;
/// let patient = NbdOptions { reconnect_delay: Duration::from_secs(30), ..NbdOptions::default() };
/// assert_eq!(patient.connections, 4);
/// ```
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Most connections, where the server says that they see each other's writes; at most
    /// [`MAX_CONNECTIONS`]. More than one are made only once requests overlap.
    pub connections: usize,
    /// For how long to try to connect when opening; zero tries once.
    pub open_timeout: Duration,
    /// For how long a lost connection is made again while requests wait; zero fails them at once.
    pub reconnect_delay: Duration,
    /// Whom to believe and who to be, instead of what the URI says.
    pub tls: Option<Tls>,
    /// The meta context that block status is asked of, instead of `base:allocation`; an export that
    /// does not have it is refused. See [`NbdStorage`](crate::NbdStorage).
    pub status_context: Option<String>,
    /// Whether changes are wanted: an export that takes none is refused then.
    pub writes: bool,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            open_timeout: Duration::ZERO,
            reconnect_delay: Duration::ZERO,
            status_context: None,
            tls: None,
            writes: false,
        }
    }
}

/// Whom to believe and who to be.
///
/// ```
/// use lacuna_remote::Tls;
/// use lacuna_tls::{ClientTls, VerifyPeer};
/// let folder = tempfile::tempdir().unwrap();
/// let credentials = ClientTls::from_folder(folder.path(), VerifyPeer::Off).unwrap();
/// let tls = Tls { credentials, hostname: Some("disks.example".into()) };
/// # let _ = tls;
/// ```
#[derive(Clone, Debug)]
pub struct Tls {
    /// The certificates.
    pub credentials: ClientTls,
    /// The name that the server's certificate must have, where not that of the address.
    pub hostname: Option<String>,
}

/// Returns what TLS to the server takes; nothing where there is to be none.
pub(crate) fn target(uri: &Uri, options: &NbdOptions) -> Result<Option<Target>> {
    let tls = match &options.tls {
        Some(tls) => tls.clone(),
        None if uri.requires_tls => of_uri(uri)?,
        None => return Ok(None),
    };
    let of_address = match &uri.address {
        Address::Tcp { host, .. } => Some(host.clone()),
        Address::Unix(_) | Address::Vsock { .. } => None,
    };
    let host = tls.hostname.or_else(|| uri.tls.hostname.clone()).or(of_address);
    tls.credentials.toward(host.as_deref()).map(Some).map_err(|error| of_tls(&error))
}

fn of_uri(uri: &Uri) -> Result<Tls> {
    if uri.tls.kind == Some(TlsKind::Psk) || uri.tls.psk_file.is_some() {
        return Err(Error::unsupported(lacuna_tls::NO_PSK));
    }
    let verify = match uri.tls.verifies_peer {
        Some(false) => VerifyPeer::Off,
        _ if uri.tls.kind == Some(TlsKind::Anonymous) => VerifyPeer::Off,
        _ => VerifyPeer::On,
    };
    let folder = match (&uri.tls.certificates, verify) {
        (Some(folder), _) => Path::new(folder),
        // Nothing is verified, and nothing is there to say who we are.
        (None, VerifyPeer::Off) => Path::new("/dev/null/nowhere"),
        (None, VerifyPeer::On) => {
            return Err(Error::invalid(
                "TLS needs to know whom to believe: tls-certificates=FOLDER in the URI, or \
                 tls-creds with an object of tls-creds-x509, names a folder with ca-cert.pem",
            ));
        }
    };
    let credentials = ClientTls::from_folder(folder, verify).map_err(|error| of_tls(&error))?;
    Ok(Tls { credentials, hostname: None })
}

fn of_tls(error: &lacuna_tls::Error) -> Error {
    let kind = match error.kind() {
        lacuna_tls::ErrorKind::NotFound => ErrorKind::NotFound,
        lacuna_tls::ErrorKind::Io => ErrorKind::Io,
        lacuna_tls::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::InvalidRequest,
    };
    Error::new(kind, error.to_string())
}
