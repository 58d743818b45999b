//! Whether connections are under TLS.

use lacuna_nbd::server::TlsMode;
use lacuna_tls::ServerTls;

/// Whether the connections of a server are under TLS.
///
/// ```
/// use lacuna_export::{ServerOptions, Tls};
/// use lacuna_tls::ServerTls;
///
/// fn encrypted_only(tls: ServerTls) -> ServerOptions {
///     ServerOptions { tls: Tls::Required(tls), ..ServerOptions::default() }
/// }
/// # let _ = encrypted_only;
/// ```
#[derive(Clone, Debug, Default)]
pub enum Tls {
    /// None are; who asks for it is told that there is none.
    #[default]
    Off,
    /// Those that ask for it are; the others get the same exports in plaintext.
    Optional(ServerTls),
    /// All are; without it, a client learns nothing but that it is needed.
    Required(ServerTls),
}

impl Tls {
    pub(crate) const fn mode(&self) -> TlsMode {
        match self {
            Self::Off => TlsMode::Off,
            Self::Optional(_) => TlsMode::Allowed,
            Self::Required(_) => TlsMode::Required,
        }
    }

    pub(crate) const fn settings(&self) -> Option<&ServerTls> {
        match self {
            Self::Off => None,
            Self::Optional(settings) | Self::Required(settings) => Some(settings),
        }
    }
}
