//! TLS of NBD servers and clients, set up from the folders that QEMU's tools and libnbd read.
//!
//! | file | what it is | the server needs it | the client needs it |
//! |---|---|---|---|
//! | `ca-cert.pem` | whom to believe | to verify clients | to verify the server |
//! | `ca-crl.pem` | what is no longer to be believed | no | no |
//! | `server-cert.pem`, `server-key.pem` | who the server is | always | |
//! | `client-cert.pem`, `client-key.pem` | who the client is | | where the server asks for it |
//!
//! * `folder.rs`: which file is read for what, and what is said where it is missing
//! * `pem.rs`: the files, bounded and checked
//! * `own.rs`: whether a certificate of our own will be believed
//! * `server.rs`, `client.rs`: the settings of either end
//! * `verify.rs`: how a client verifies a server
//! * `explain.rs`: what a failed handshake means, in words
//!
//! Always and never:
//!
//! * Never: a certificate is taken that the other side would refuse for its dates or its purpose;
//!   the settings cannot be made from it, with a reason.
//! * Never: a session is resumed. Who reconnects is verified anew, and a server keeps nothing of
//!   clients that have left.
//! * Always TLS 1.2 or 1.3. There are no pre-shared keys ([`NO_PSK`]).

mod client;
mod ec_key;
mod error;
mod explain;
mod folder;
mod own;
mod pem;
mod server;
mod verify;

pub use client::{ClientTls, Target};
pub use error::{Error, ErrorKind, Result};
pub use explain::explain;
pub use server::ServerTls;

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

/// Why there are no pre-shared keys, as a sentence for the person who asked for them.
///
/// ```
/// assert!(lacuna_tls::NO_PSK.contains("x509"));
/// ```
pub const NO_PSK: &str = "TLS with pre-shared keys is not supported: rustls, the TLS library that \
     lacuna is built on, has none; use certificates (x509)";

/// Whether the certificate of the other end is asked for and verified.
///
/// ```
/// assert_ne!(lacuna_tls::VerifyPeer::On, lacuna_tls::VerifyPeer::Off);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerifyPeer {
    /// A server lets everybody in; a client talks to whoever answers, an impostor too.
    Off,
    /// The other end has a certificate that `ca-cert.pem` stands behind, or there is no connection.
    On,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
