//! Whether a certificate of our own will be believed by the other end.
//!
//! Told when the settings are made: the other end could only say that it does not like it.

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, Error as TlsError, InconsistentKeys, RootCertStore};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::folder::{Belief, End};
use crate::pem::PemFile;
use crate::{Error, ErrorKind, Result, explain};

/// Puts a certificate, with those that it stands on, and its key together.
pub(crate) fn pair(
    certificate: &PemFile,
    key: &PemFile,
    provider: &CryptoProvider,
) -> Result<CertifiedKey> {
    let chain = certificate.certificates()?;
    let made = CertifiedKey::from_der(chain, key.key()?, provider);
    made.map_err(|error| match error {
        TlsError::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            key.wrong(format!("this is not the key of {}", certificate.path.display()))
        }
        TlsError::InvalidCertificate(_) => certificate.wrong("the certificate is broken"),
        _ => Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: a key of a kind that is not known, or broken; known are RSA of 2048 to 8192 \
                 bits, ECDSA on P-256 and P-384, and Ed25519",
                key.path.display()
            ),
        ),
    })
}

/// Refuses a certificate that the other end would refuse.
pub(crate) fn check(
    end: End,
    file: &PemFile,
    pair: &CertifiedKey,
    belief: Option<&Belief>,
    provider: &CryptoProvider,
) -> Result<()> {
    let Some((certificate, below)) = pair.cert.split_first() else {
        return Err(file.wrong("there is no certificate in it"));
    };
    match verify(end, certificate, below, belief, provider) {
        Ok(()) => Ok(()),
        // Who does not say whom it believes is not told that it would not believe itself.
        Err(TlsError::InvalidCertificate(CertificateError::UnknownIssuer)) if belief.is_none() => {
            Ok(())
        }
        Err(TlsError::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            Err(file.wrong("ca-cert.pem beside it does not stand behind this certificate"))
        }
        Err(error) => Err(file.wrong(explain::certificate(&error))),
    }
}

fn verify(
    end: End,
    certificate: &CertificateDer<'_>,
    below: &[CertificateDer<'_>],
    belief: Option<&Belief>,
    provider: &CryptoProvider,
) -> Result<(), TlsError> {
    let now = UnixTime::now();
    match (end, belief) {
        (End::Client, Some(belief)) => {
            let roots = std::sync::Arc::clone(&belief.roots);
            let builder =
                WebPkiClientVerifier::builder_with_provider(roots, provider.clone().into());
            let verifier = builder.build().map_err(|error| TlsError::General(error.to_string()))?;
            verifier.verify_client_cert(certificate, below, now).map(drop)
        }
        // A client that does not verify need not be a model either; its server says what is wrong.
        (End::Client, None) => Ok(()),
        (End::Server, belief) => {
            let nobody = RootCertStore::empty();
            verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(certificate)?,
                belief.map_or(&nobody, |belief| &belief.roots),
                below,
                now,
                provider.signature_verification_algorithms.all,
            )
        }
    }
}
