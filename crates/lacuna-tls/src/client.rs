//! The settings of a client.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::{DnsName, ServerName};

use crate::folder::{Belief, End, Folder};
use crate::verify::{AnyName, Anybody};
use crate::{Error, Result, VerifyPeer, provider};

/// The settings of a client: whom it believes, and who it is.
///
/// ```
/// use lacuna_tls::{ClientTls, VerifyPeer};
/// // Nothing is verified, so that nothing is needed.
/// let folder = tempfile::tempdir().unwrap();
/// let tls = ClientTls::from_folder(folder.path(), VerifyPeer::Off)?;
/// let target = tls.toward(Some("disks.example"))?;
/// assert_eq!(target.name.to_str(), "disks.example");
/// // target.config and target.name are what `tokio_rustls::TlsConnector` takes.
/// # Ok::<_, lacuna_tls::Error>(())
/// ```
#[derive(Clone)]
pub struct ClientTls {
    named: Arc<ClientConfig>,
    unnamed: Arc<ClientConfig>,
}

/// What a connection to one server takes.
///
/// ```
/// fn connector(target: &lacuna_tls::Target) -> rustls::ClientConnection {
///     let (config, name) = (target.config.clone(), target.name.clone());
///     rustls::ClientConnection::new(config, name).unwrap()
/// }
/// # let _ = connector;
/// ```
#[derive(Clone, Debug)]
pub struct Target {
    /// The settings in the words of rustls.
    pub config: Arc<ClientConfig>,
    /// The name that the server's certificate must have.
    pub name: ServerName<'static>,
}

impl ClientTls {
    /// Reads `ca-cert.pem` (with `ca-crl.pem`), which is needed to verify servers, and
    /// `client-cert.pem` and `client-key.pem` where they are there.
    ///
    /// # Errors
    /// Where a file is missing, broken, or does not fit the others, and where a server that has
    /// the same `ca-cert.pem` would refuse the certificate.
    pub fn from_folder(folder: &Path, verify: VerifyPeer) -> Result<Self> {
        let folder = Folder { path: folder, end: End::Client };
        let provider = provider();
        let belief = folder.belief(verify)?;
        let identity = folder.identity(belief.as_ref(), &provider)?;
        let (named, unnamed): (Arc<dyn ServerCertVerifier>, Arc<dyn ServerCertVerifier>) =
            match (verify, belief) {
                (VerifyPeer::On, Some(belief)) => {
                    let verifier = verifier(folder, belief, &provider)?;
                    (Arc::clone(&verifier) as _, Arc::new(AnyName(verifier)))
                }
                _ => {
                    let anybody = Arc::new(Anybody(Arc::clone(&provider)));
                    (Arc::clone(&anybody) as _, anybody)
                }
            };
        Ok(Self {
            named: config(named, identity.clone(), Arc::clone(&provider), true)?,
            unnamed: config(unnamed, identity, provider, false)?,
        })
    }

    /// Returns what a connection to the server called `host` takes: a DNS name or an address,
    /// version 4 or 6, which its certificate must have.
    ///
    /// Without a name, as over a socket file, any certificate will do that `ca-cert.pem` stands
    /// behind; QEMU does the same.
    ///
    /// # Errors
    /// Where `host` is neither a name nor an address.
    pub fn toward(&self, host: Option<&str>) -> Result<Target> {
        match host {
            None => Ok(Target { config: Arc::clone(&self.unnamed), name: nobody()? }),
            Some(host) => {
                let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                let name = ServerName::try_from(bare.unwrap_or(host).to_owned());
                let wrong = |_| {
                    Error::invalid(format!(
                        "'{host}' is no name that a server's certificate can have: it is a DNS \
                         name or an address"
                    ))
                };
                Ok(Target { config: Arc::clone(&self.named), name: name.map_err(wrong)? })
            }
        }
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").finish_non_exhaustive()
    }
}

/// A name that is neither sent nor compared, for where one is needed.
fn nobody() -> Result<ServerName<'static>> {
    let name = DnsName::try_from("localhost").map_err(|error| Error::invalid(error.to_string()))?;
    Ok(ServerName::DnsName(name))
}

fn verifier(
    folder: Folder<'_>,
    belief: Belief,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>> {
    WebPkiServerVerifier::builder_with_provider(belief.roots, Arc::clone(provider))
        .with_crls(belief.revocations)
        // A list says nothing about the certificates of other authorities.
        .allow_unknown_revocation_status()
        .enforce_revocation_expiration()
        .build()
        .map_err(|error| folder.unusable(error))
}

fn config(
    verifier: Arc<dyn ServerCertVerifier>,
    identity: Option<Arc<CertifiedKey>>,
    provider: Arc<CryptoProvider>,
    tells_name: bool,
) -> Result<Arc<ClientConfig>> {
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::invalid(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(pair) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair))),
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.enable_sni = tells_name;
    Ok(Arc::new(config))
}
