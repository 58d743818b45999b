//! What `--object` describes: for now, the certificates of one end of TLS.
//!
//! * Always: a description is understood whole, or refused; the files it names are read by whoever
//!   uses it.

use std::path::PathBuf;

use lacuna::ErrorKind;
use lacuna_tls::{NO_PSK, VerifyPeer};

use crate::error::{CliError, CliResult};
use crate::options::{self, Asked};
use crate::verbs::spec::keys::{Keys, Scalar};
use crate::verbs::spec::object_keys;

/// Types that QEMU's tools know and we have no use for yet.
const THEIRS: [&str; 11] = [
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "iothread",
    "main-loop",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "throttle-group",
];

/// Which end of a connection certificates are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Client,
    Server,
}

/// A folder of certificates, as `tls-creds-x509` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TlsFolder {
    pub(crate) path: PathBuf,
    pub(crate) verify: VerifyPeer,
    endpoint: Endpoint,
}

/// All objects of a command line, by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Objects(Vec<(String, TlsFolder)>);

impl Objects {
    /// Reads the values of all `--object`: lists of options, or JSON.
    pub(crate) fn read<'a>(definitions: impl Iterator<Item = &'a str>) -> CliResult<Self> {
        let mut objects = Self::default();
        for definition in definitions {
            let (id, folder) = read(definition)?;
            if objects.0.iter().any(|(name, _)| *name == id) {
                let text = format!(
                    "attempt to add duplicate property '{id}' to object (type 'container')"
                );
                return Err(CliError::new(text)
                    .in_our_words(format!("There are two objects with the id '{id}'")));
            }
            objects.0.push((id, folder));
        }
        Ok(objects)
    }

    /// Finds the certificates that an option names.
    pub(crate) fn tls(&self, id: &str, endpoint: Endpoint) -> CliResult<&TlsFolder> {
        let found = self.0.iter().find(|(name, _)| name == id).map(|(_, folder)| folder);
        let folder = found.ok_or_else(|| {
            CliError::new(format!("No TLS credentials with id '{id}'")).with_hint(format!(
                "--object tls-creds-x509,id={id},dir=FOLDER,endpoint={} describes them",
                endpoint.word()
            ))
        })?;
        if folder.endpoint != endpoint {
            let word = endpoint.word();
            let error = CliError::new(format!("Expected TLS credentials for a {word} endpoint"));
            return Err(error.with_hint(format!("the object '{id}' needs endpoint={word}")));
        }
        Ok(folder)
    }
}

impl Endpoint {
    const fn word(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

fn read(definition: &str) -> CliResult<(String, TlsFolder)> {
    let mut keys = keys(definition)?;
    let kind = keys.take_text("qom-type").ok_or_else(|| missing("qom-type"))?;
    check_kind(&kind)?;
    let id = keys.take_text("id").ok_or_else(|| missing("id"))?;
    let folder = tls_folder(&mut keys)?;
    match keys.first() {
        None => Ok((id, folder)),
        Some(key) => Err(CliError::new(format!("Parameter '{key}' is unexpected"))),
    }
}

/// The type may go without its key where it comes first.
fn keys(definition: &str) -> CliResult<Keys> {
    if definition.is_empty() {
        return Ok(Keys::default());
    }
    if definition.starts_with('{') {
        return object_keys(definition);
    }
    let first = definition.split(',').next().unwrap_or_default();
    let has_key = first.contains('=') || matches!(first, "help" | "?");
    let implied = if has_key { "" } else { "qom-type=" };
    match options::parse([&*format!("{implied}{definition}")].into_iter())? {
        Asked::Values(given) => Ok(Keys::from_pairs(given.into_pairs())),
        Asked::Help => Err(CliError::new(
            "Objects are described as \
             tls-creds-x509,id=NAME,dir=FOLDER,endpoint=client|server[,verify-peer=on|off]",
        )),
    }
}

fn check_kind(kind: &str) -> CliResult<()> {
    let unsupported = |text: String| CliError::new(text).with_class(ErrorKind::Unsupported);
    match kind {
        "tls-creds-x509" => Ok(()),
        "tls-creds-psk" => Err(unsupported(NO_PSK.into())),
        "tls-creds-anon" => Err(unsupported(
            "TLS without certificates (tls-creds-anon) is not supported: it protects from nobody \
             who can change what is sent; use tls-creds-x509"
                .into(),
        )),
        known if THEIRS.contains(&known) => Err(unsupported(format!(
            "--object is not supported for '{known}': objects are tls-creds-x509"
        ))),
        other => {
            Err(CliError::new(format!("Parameter 'qom-type' does not accept value '{other}'"))
                .with_hint("objects are tls-creds-x509"))
        }
    }
}

fn tls_folder(keys: &mut Keys) -> CliResult<TlsFolder> {
    let endpoint = match keys.take_text("endpoint").as_deref() {
        None | Some("client") => Endpoint::Client,
        Some("server") => Endpoint::Server,
        Some(other) => {
            let text = format!("Parameter 'endpoint' does not accept value '{other}'");
            return Err(CliError::new(text).with_hint("it is client or server"));
        }
    };
    let verify = match keys.take_switch("verify-peer")? {
        None | Some(true) => VerifyPeer::On,
        Some(false) => VerifyPeer::Off,
    };
    refuse_unsupported(keys)?;
    let path = keys.take_text("dir").ok_or_else(|| {
        CliError::new("Missing 'dir' property value")
            .with_hint("dir names a folder of certificates")
    })?;
    Ok(TlsFolder { path: path.into(), verify, endpoint })
}

/// What may not be ignored: it would be less than what was asked for.
fn refuse_unsupported(keys: &mut Keys) -> CliResult<()> {
    let refused = |text: &str| Err(CliError::new(text).with_class(ErrorKind::Unsupported));
    if keys.take_switch("sanity-check")? == Some(false) {
        return refused("'sanity-check=off' is not supported: what cannot work is told at once");
    }
    match (keys.take("passwordid"), keys.take("priority")) {
        (Some(Scalar::Text(_)), _) => {
            refused("'passwordid' is not supported: keys are stored without a password")
        }
        (_, Some(Scalar::Text(_))) => {
            refused("'priority' is not supported: TLS 1.2 and 1.3 are used with safe ciphers only")
        }
        _ => Ok(()),
    }
}

fn missing(key: &str) -> CliError {
    CliError::new(format!("Parameter '{key}' is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(definition: &str, endpoint: Endpoint) -> CliResult<TlsFolder> {
        Objects::read([definition].into_iter())?.tls("t", endpoint).cloned()
    }

    #[test]
    fn one_folder_three_ways() {
        let expected =
            TlsFolder { path: "a,b".into(), verify: VerifyPeer::Off, endpoint: Endpoint::Server };
        for definition in [
            "tls-creds-x509,id=t,dir=a,,b,endpoint=server,verify-peer=off",
            "verify-peer=off,dir=a,,b,qom-type=tls-creds-x509,id=t,endpoint=server",
            r#"{"qom-type":"tls-creds-x509","id":"t","dir":"a,b","endpoint":"server","verify-peer":false}"#,
        ] {
            let got = folder(definition, Endpoint::Server);
            assert_eq!(got.unwrap(), expected, "{definition}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_in_the_words_of_qemu() {
        for (definition, message) in [
            ("tls-creds-x509,dir=a", "Parameter 'id' is missing"),
            ("id=t,dir=a", "Parameter 'qom-type' is missing"),
            ("tls-creds-x509,id=t", "Missing 'dir' property value"),
            ("tls-creds-x509,id=t,dir=a,foo=1", "Parameter 'foo' is unexpected"),
            ("tls-creds-x509,id=t,dir=a,endpoint=x", "does not accept value 'x'"),
            ("tls-creds-x509,id=t,dir=a,verify-peer=x", "expects 'on' or 'off'"),
            ("tls-creds-x509,id=t,dir=a,passwordid=s", "'passwordid' is not supported"),
            ("tls-creds-x509,id=t,dir=a,priority=NORMAL", "'priority' is not supported"),
            ("tls-creds-x509,id=t,dir=a,endpoint=client", "for a server endpoint"),
            ("tls-creds-x509,id=u,dir=a,endpoint=server", "No TLS credentials with id 't'"),
            ("tls-creds-psk,id=t,dir=a", "pre-shared keys is not supported: rustls"),
            ("tls-creds-anon,id=t", "without certificates"),
            ("secret,id=t,data=a", "--object is not supported for 'secret'"),
            ("tls-creds-foo,id=t", "Parameter 'qom-type' does not accept value 'tls-creds-foo'"),
            ("", "Parameter 'qom-type' is missing"),
            ("{", "Could not parse"),
            ("help", "Objects are described as"),
        ] {
            let error = folder(definition, Endpoint::Server).unwrap_err();
            assert!(error.text().contains(message), "{definition}: {}", error.text());
        }
        let twice = ["tls-creds-x509,id=t,dir=a"; 2];
        let error = Objects::read(twice.into_iter()).unwrap_err();
        assert!(error.text().contains("duplicate property 't'"), "{}", error.text());
    }
}
