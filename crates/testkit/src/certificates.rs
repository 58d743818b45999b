//! Folders of certificates, as TLS tests need them: right ones, and wrong in one way each.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber, date_time_ymd,
};

/// Names of a server on this machine.
pub const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Which end a certificate is for.
///
/// ```
/// assert_ne!(testkit::certificates::End::Client, testkit::certificates::End::Server);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `client-cert.pem`.
    Client,
    /// `server-cert.pem`.
    Server,
}

/// When a certificate is valid.
///
/// ```
/// assert_ne!(testkit::certificates::Valid::Now, testkit::certificates::Valid::Past);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Valid {
    /// Not any more.
    Past,
    /// Today.
    Now,
    /// Not yet.
    Future,
}

/// Somebody who signs certificates.
///
/// ```
/// use testkit::certificates::{Authority, LOCAL};
/// let folder = tempfile::tempdir().unwrap();
/// let authority = Authority::new("test");
/// authority.trusted_in(folder.path());
/// authority.server_in(folder.path(), &LOCAL);
/// authority.client_in(folder.path());
/// assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 5);
/// ```
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// Makes one with a key of its own.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Makes it the one that is believed in `folder`.
    pub fn trusted_in(&self, folder: &Path) {
        fs::write(folder.join("ca-cert.pem"), self.0.pem()).unwrap();
    }

    /// Makes it the server of `folder`, which an authority is not to be.
    pub fn serves_in(&self, folder: &Path) {
        fs::write(folder.join("server-cert.pem"), self.0.pem()).unwrap();
        fs::write(folder.join("server-key.pem"), self.0.key().serialize_pem()).unwrap();
    }

    /// Gives `folder` a server's certificate for some names.
    pub fn server_in(&self, folder: &Path, names: &[&str]) {
        self.sign(folder, End::Server, names, Valid::Now, 2);
    }

    /// Gives `folder` a client's certificate, of serial number 3.
    pub fn client_in(&self, folder: &Path) {
        self.sign(folder, End::Client, &[], Valid::Now, 3);
    }

    /// Gives `folder` a certificate and its key.
    pub fn sign(&self, folder: &Path, end: End, names: &[&str], valid: Valid, serial: u8) {
        let (word, purpose) = match end {
            End::Client => ("client", ExtendedKeyUsagePurpose::ClientAuth),
            End::Server => ("server", ExtendedKeyUsagePurpose::ServerAuth),
        };
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, word);
        params.serial_number = Some(SerialNumber::from_slice(&[serial]));
        params.subject_alt_names = names.iter().map(|name| subject(name)).collect();
        // QEMU 10.0 asks for the second, which keys of elliptic curves have no use for.
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        (params.not_before, params.not_after) = match valid {
            Valid::Past => (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1)),
            Valid::Now => (date_time_ymd(2001, 1, 1), date_time_ymd(2100, 1, 1)),
            Valid::Future => (date_time_ymd(2099, 1, 1), date_time_ymd(2100, 1, 1)),
        };
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &self.0).unwrap();
        fs::write(folder.join(format!("{word}-cert.pem")), signed.pem()).unwrap();
        fs::write(folder.join(format!("{word}-key.pem")), key.serialize_pem()).unwrap();
    }

    /// Revokes in `folder` the certificates of some serial numbers.
    pub fn revoke_in(&self, folder: &Path, serials: &[u8]) {
        let revoked = |serial: &u8| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&[*serial]),
            revocation_time: date_time_ymd(2002, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2002, 1, 1),
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from_slice(&[1]),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.0).unwrap();
        fs::write(folder.join("ca-crl.pem"), list.pem().unwrap()).unwrap();
    }
}

fn subject(name: &str) -> SanType {
    match name.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(name.try_into().unwrap()),
    }
}
