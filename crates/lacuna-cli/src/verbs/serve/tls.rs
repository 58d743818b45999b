//! TLS as the command line asks for it: by objects as qemu-nbd does, or by a folder.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use lacuna::ErrorKind;
use lacuna_export::Tls;
use lacuna_tls::{ServerTls, VerifyPeer};

use super::sparing::{Say, Sparing};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::objects::{Endpoint, Objects};
use crate::output;

pub(super) const TLS: Flag =
    Flag::valued('\0', "tls", "FOLDER", "TLS only, with server-cert.pem and server-key.pem there")
        .long_only();
pub(super) const TLS_VERIFY_PEER: Flag =
    Flag::switch('\0', "tls-verify-peer", "clients need a certificate that ca-cert.pem backs")
        .long_only();
pub(super) const TLS_OPTIONAL: Flag =
    Flag::switch('\0', "tls-optional", "clients may do without TLS").long_only();
pub(super) const TLS_CREDS: Flag =
    Flag::valued('\0', "tls-creds", "ID", "TLS only, by an --object as of qemu-nbd").long_only();
pub(super) const TLS_AUTHZ: Flag =
    Flag::valued('\0', "tls-authz", "ID", "not supported").long_only();

/// What a server does about TLS, and where its certificates lie.
#[derive(Clone, Debug, Default)]
pub(crate) struct Secured {
    pub(crate) tls: Tls,
    /// For the URI of clients on this machine.
    folder: Option<PathBuf>,
}

impl Secured {
    /// Reads the options of `serve`.
    pub(super) fn new(parsed: &Parsed) -> CliResult<Self> {
        if parsed.has(TLS_AUTHZ.long) {
            return Err(no_authorization());
        }
        let optional = parsed.has(TLS_OPTIONAL.long);
        match (parsed.last(TLS.long), parsed.last(TLS_CREDS.long)) {
            (Some(_), Some(_)) => {
                Err(CliError::new("--tls and --tls-creds are mutually exclusive"))
            }
            (Some(folder), None) => {
                let verifies = parsed.has(TLS_VERIFY_PEER.long);
                let verify = if verifies { VerifyPeer::On } else { VerifyPeer::Off };
                Self::of_folder(Path::new(folder), verify, optional)
            }
            (None, _) if parsed.has(TLS_VERIFY_PEER.long) => {
                Err(CliError::new("--tls-verify-peer needs --tls")
                    .with_hint("objects say verify-peer=on, which is their default"))
            }
            (None, Some(id)) => {
                let objects = Objects::read(parsed.all("object"))?;
                Self::of_object(&objects, id, optional)
            }
            (None, None) if optional => Err(CliError::new("--tls-optional needs --tls")),
            (None, None) => Ok(Self::default()),
        }
    }

    /// Takes the object that `--tls-creds` names.
    pub(crate) fn of_object(objects: &Objects, id: &str, optional: bool) -> CliResult<Self> {
        let folder = objects.tls(id, Endpoint::Server);
        let folder = folder.map_err(|error| error.under("Failed to get TLS creds"))?;
        Self::of_folder(&folder.path, folder.verify, optional)
    }

    fn of_folder(path: &Path, verify: VerifyPeer, optional: bool) -> CliResult<Self> {
        let settings = ServerTls::from_folder(path, verify).map_err(refused)?;
        let tls = if optional { Tls::Optional(settings) } else { Tls::Required(settings) };
        Ok(Self { tls, folder: Some(path.to_owned()) })
    }

    /// Returns the letter that makes `nbd` `nbds`.
    pub(super) const fn scheme_end(&self) -> &'static str {
        if self.folder.is_some() { "s" } else { "" }
    }

    /// Returns the folder that clients on this machine may use as well.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }
}

/// Says that lists of clients are not there.
pub(crate) fn no_authorization() -> CliError {
    let text = "--tls-authz is not supported: a client is let in by the authority in ca-cert.pem";
    CliError::new(text)
        .with_class(ErrorKind::Unsupported)
        .with_hint("an authority of its own for the clients of this server does the same")
}

pub(crate) fn refused(error: lacuna_tls::Error) -> CliError {
    let class = match error.kind() {
        lacuna_tls::ErrorKind::Io => ErrorKind::Io,
        lacuna_tls::ErrorKind::NotFound => ErrorKind::NotFound,
        lacuna_tls::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::InvalidRequest,
    };
    let ours = error.to_string();
    match error.path().filter(|_| class == ErrorKind::NotFound) {
        None => CliError::new(ours),
        Some(path) => {
            let path = path.display();
            let text = format!("Unable to access credentials {path}: No such file or directory");
            CliError::new(text).in_our_words(ours)
        }
    }
    .with_class(class)
}

/// Says why a client was not let in, where it is about TLS: nobody else knows both sides.
pub(super) fn report(peer: &str, error: &io::Error) {
    static SPARING: Mutex<Sparing> = Mutex::new(Sparing::new());
    let Some(why) = lacuna_tls::explain(error) else { return };
    let say = SPARING.lock().unwrap_or_else(PoisonError::into_inner).one_more(Instant::now());
    let Say::Line { left_out } = say else { return };
    let others = match left_out {
        0 => String::new(),
        left_out => format!(" (and {left_out} before, not told)"),
    };
    output::warn(&output::tame(&format!("A client ({peer}) was not let in{others}: {why}")));
}
