//! Files of certificates and keys.
//!
//! * Never: a file is read whose size has no bound, or a byte in it makes us panic.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::ec_key::with_number_of_right_length;
use crate::{Error, ErrorKind, Result};

/// Longest file that is read, in bytes: the certificates of all known authorities fit many times.
const MAX_BYTES: u64 = 8 << 20;

/// What a file holds, and where it lies.
#[derive(Debug)]
pub(crate) struct PemFile {
    pub(crate) path: PathBuf,
    bytes: Vec<u8>,
}

impl PemFile {
    /// Reads a file; nothing, where there is none.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|error| Error::reading(path, &error))?,
        };
        let mut bytes = Vec::new();
        let read = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|error| Error::reading(path, &error))?;
        if bytes.len() as u64 > MAX_BYTES {
            let path = path.display();
            return Err(Error::invalid(format!("{path} is longer than {} MiB", MAX_BYTES >> 20)));
        }
        Ok(Some(Self { path: path.to_owned(), bytes }))
    }

    /// Returns all certificates, at least one.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>> {
        self.all("CERTIFICATE")
    }

    /// Returns all lists of revoked certificates, at least one.
    pub(crate) fn revocations(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        self.all("X509 CRL")
    }

    /// Returns the first private key.
    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>> {
        if self.is_encrypted() {
            let path = self.path.display();
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "The key in {path} is encrypted, which is not supported: store it in plain, \
                     readable for its owner only (`openssl pkey -in ENCRYPTED -out PLAIN`)"
                ),
            ));
        }
        match PrivateKeyDer::from_pem_slice(&self.bytes) {
            Err(pem::Error::NoItemsFound) => Err(self.lacks("PRIVATE KEY")),
            key => key.map(with_number_of_right_length).map_err(|error| self.broken(&error)),
        }
    }

    /// Says what is wrong with the file.
    pub(crate) fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}: {what}", self.path.display()))
    }

    fn all<T: PemObject>(&self, kind: &str) -> Result<Vec<T>> {
        let items: Vec<T> = T::pem_slice_iter(&self.bytes)
            .collect::<Result<_, _>>()
            .map_err(|error| self.broken(&error))?;
        if items.is_empty() { Err(self.lacks(kind)) } else { Ok(items) }
    }

    /// Both ways of encryption that are in use say so in a line of text.
    fn is_encrypted(&self) -> bool {
        let lines = || self.bytes.split(|byte| *byte == b'\n');
        lines().any(|line| {
            line.starts_with(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
                || line.starts_with(b"Proc-Type:") && line.windows(9).any(|it| it == b"ENCRYPTED")
        })
    }

    fn lacks(&self, kind: &str) -> Error {
        self.wrong(format!("there is no `-----BEGIN {kind}-----` in it"))
    }

    /// The file's own bytes are no part of the text: they may be a key.
    fn broken(&self, error: &pem::Error) -> Error {
        self.wrong(match error {
            pem::Error::MissingSectionEnd { .. } => "a section has no end: the file is cut short",
            pem::Error::Base64Decode(_) => "a section is no base64",
            _ => "it is no PEM file",
        })
    }
}
