//! The settings of a server.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;

use crate::folder::{Belief, End, Folder};
use crate::{Error, Result, VerifyPeer, provider};

/// The settings of a server: who it is, and whom it lets in.
///
/// ```
/// use std::path::Path;
/// use lacuna_tls::{ServerTls, VerifyPeer};
/// let folder = tempfile::tempdir().unwrap();
/// let error = ServerTls::from_folder(folder.path(), VerifyPeer::On).unwrap_err();
/// let text = error.to_string();
/// assert!(text.starts_with("There is no ca-cert.pem in ") && text.contains("a client"), "{text}");
/// ```
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verify: VerifyPeer,
}

impl ServerTls {
    /// Reads `server-cert.pem` and `server-key.pem`, and `ca-cert.pem` (with `ca-crl.pem`), which
    /// is needed to verify clients and checked against where it is there.
    ///
    /// # Errors
    /// Where a file is missing, broken, or does not fit the others, and where a client would
    /// refuse the certificate.
    pub fn from_folder(folder: &Path, verify: VerifyPeer) -> Result<Self> {
        let folder = Folder { path: folder, end: End::Server };
        let provider = provider();
        let belief = folder.belief(verify)?;
        let Some(identity) = folder.identity(belief.as_ref(), &provider)? else {
            return Err(Error::invalid("A server has a certificate"));
        };
        let clients = match (verify, belief) {
            (VerifyPeer::On, Some(belief)) => verifier(folder, belief, &provider)?,
            _ => WebPkiClientVerifier::no_client_auth(),
        };
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::invalid(error.to_string()))?;
        let mut config = builder
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config), verify })
    }

    /// Returns the settings in the words of rustls.
    pub const fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// Says whether clients must have a certificate.
    pub const fn verifies(&self) -> VerifyPeer {
        self.verify
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("verify", &self.verify).finish_non_exhaustive()
    }
}

fn verifier(
    folder: Folder<'_>,
    belief: Belief,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>> {
    WebPkiClientVerifier::builder_with_provider(belief.roots, Arc::clone(provider))
        .with_crls(belief.revocations)
        // A list says nothing about the certificates of other authorities.
        .allow_unknown_revocation_status()
        .enforce_revocation_expiration()
        .build()
        .map_err(|error| folder.unusable(error))
}
