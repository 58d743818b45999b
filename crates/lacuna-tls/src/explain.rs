//! What a failed handshake means, in words.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// Says what an error of a TLS stream means; nothing, where TLS is not what failed.
///
/// ```
/// use std::io;
/// use rustls::{AlertDescription, Error};
/// let refused = Error::AlertReceived(AlertDescription::CertificateRequired);
/// let text = lacuna_tls::explain(&io::Error::other(refused)).unwrap();
/// assert!(text.contains("client-cert.pem"));
/// assert_eq!(lacuna_tls::explain(&io::ErrorKind::BrokenPipe.into()), None);
/// ```
pub fn explain(error: &io::Error) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    Some(match error {
        Error::InvalidCertificate(_) => {
            format!("The other end's certificate is refused: {}", certificate(error))
        }
        Error::NoCertificatesPresented => "The client has no certificate, and must have one".into(),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "The other end does not speak TLS".into()
        }
        Error::AlertReceived(alert) => received(*alert),
        other => format!("TLS failed: {other}"),
    })
}

/// Says what is wrong with a certificate.
pub(crate) fn certificate(error: &Error) -> String {
    use CertificateError as Wrong;
    let Error::InvalidCertificate(wrong) = error else { return error.to_string() };
    match wrong {
        Wrong::Expired | Wrong::ExpiredContext { .. } => "it has expired".into(),
        Wrong::NotValidYet | Wrong::NotValidYetContext { .. } => {
            "it is not valid yet, or the clock is wrong".into()
        }
        Wrong::Revoked => "it was revoked (ca-crl.pem)".into(),
        Wrong::UnknownIssuer => "ca-cert.pem does not stand behind it".into(),
        Wrong::ExpiredRevocationList | Wrong::ExpiredRevocationListContext { .. } => {
            "the list of revoked ones (ca-crl.pem) is out of date".into()
        }
        Wrong::NotValidForName => "it is for another host name".into(),
        Wrong::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            format!("it is not for {expected}, {}", names(presented))
        }
        Wrong::InvalidPurpose | Wrong::InvalidPurposeContext { .. } => {
            "it is for another purpose: a server's says TLS server in its extended key usage, a \
             client's TLS client"
                .into()
        }
        Wrong::BadEncoding => "it is broken".into(),
        other if other.to_string().contains("CaUsedAsEndEntity") => {
            "it is the certificate of an authority: a server or client has one that is signed by it"
                .into()
        }
        other => other.to_string(),
    }
}

/// A server may have many names; the first few show what kind they are.
fn names(presented: &[String]) -> String {
    const SHOWN: usize = 5;
    match presented {
        [] => "since it has no subject alternative name".into(),
        names => {
            let names: Vec<&str> = names.iter().take(SHOWN).map(|name| bare(name)).collect();
            format!("but for {}", names.join(", "))
        }
    }
}

/// A name comes as `DnsName("disks.example")`.
fn bare(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.unwrap_or(name).trim_matches('"')
}

fn received(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRequired => "The server lets in clients with a certificate \
             only: client-cert.pem and client-key.pem hold one"
            .into(),
        AlertDescription::UnknownCA => {
            "The other end does not know the authority behind our certificate".into()
        }
        AlertDescription::BadCertificate
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied => {
            format!("The other end refuses our certificate ({alert:?})")
        }
        alert => format!("The other end ended TLS with an alert: {alert:?}"),
    }
}
