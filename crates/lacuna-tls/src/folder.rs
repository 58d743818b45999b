//! Which file of a folder is read for what.

use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateRevocationListDer;

use crate::pem::PemFile;
use crate::{Error, Result, VerifyPeer, own};

const AUTHORITIES: &str = "ca-cert.pem";
const REVOCATIONS: &str = "ca-crl.pem";

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Client,
    Server,
}

impl End {
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// A folder as one end reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Folder<'a> {
    pub(crate) path: &'a Path,
    pub(crate) end: End,
}

/// Whom one end believes, and what it no longer does.
#[derive(Debug)]
pub(crate) struct Belief {
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) revocations: Vec<CertificateRevocationListDer<'static>>,
}

impl Folder<'_> {
    /// Reads whom this end believes; nothing, where it does not verify and there is no file.
    pub(crate) fn belief(self, verify: VerifyPeer) -> Result<Option<Belief>> {
        let Some(file) = self.file(AUTHORITIES)? else {
            return match verify {
                VerifyPeer::Off => Ok(None),
                VerifyPeer::On => Err(self.missing(
                    AUTHORITIES,
                    &format!(
                        "what the certificate of a {} is verified by",
                        self.end.other().word()
                    ),
                )),
            };
        };
        let mut roots = RootCertStore::empty();
        for certificate in file.certificates()? {
            let added = roots.add(certificate);
            added.map_err(|error| file.wrong(format!("a certificate in it is broken: {error}")))?;
        }
        let revocations = match self.file(REVOCATIONS)? {
            Some(file) => file.revocations()?,
            None => Vec::new(),
        };
        Ok(Some(Belief { roots: Arc::new(roots), revocations }))
    }

    /// Reads who this end is; nothing, where it is a client that has no certificate.
    pub(crate) fn identity(
        self,
        belief: Option<&Belief>,
        provider: &CryptoProvider,
    ) -> Result<Option<Arc<CertifiedKey>>> {
        let word = self.end.word();
        let names = [format!("{word}-cert.pem"), format!("{word}-key.pem")];
        let (certificate, key) = match (self.file(&names[0])?, self.file(&names[1])?) {
            (Some(certificate), Some(key)) => (certificate, key),
            (None, None) if self.end == End::Client => return Ok(None),
            (None, _) => return Err(self.missing(&names[0], &format!("who the {word} is"))),
            (_, None) => {
                return Err(self.missing(&names[1], &format!("the key of {}", names[0])));
            }
        };
        let pair = own::pair(&certificate, &key, provider)?;
        own::check(self.end, &certificate, &pair, belief, provider)?;
        Ok(Some(Arc::new(pair)))
    }

    /// Says that lists of revoked certificates cannot be used.
    pub(crate) fn unusable(self, why: impl std::fmt::Display) -> Error {
        let path = self.path.join(REVOCATIONS);
        Error::invalid(format!("{}, or {AUTHORITIES} beside it: {why}", path.display()))
    }

    fn file(self, name: &str) -> Result<Option<PemFile>> {
        PemFile::read(&self.path.join(name))
    }

    fn missing(self, name: &str, what: &str) -> Error {
        let place = self.path.display();
        let text = match self.path.is_dir() {
            true => format!("There is no {name} in {place}: it holds {what}"),
            false => format!("{place} is no folder; {name} in it would hold {what}"),
        };
        Error::missing(self.path.join(name), text)
    }
}
