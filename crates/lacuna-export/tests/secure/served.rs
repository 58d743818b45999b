//! A server with certificates, and the folder that they lie in.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna_export::{
    Address, Export, ExportOptions, Exports, Limits, Listener, Plain, Server, ServerOptions, Tls,
};
use lacuna_tls::{ClientTls, ServerTls, VerifyPeer};
use pollster::block_on;
use tempfile::TempDir;
use testkit::certificates::{Authority, LOCAL};

pub(crate) const SIZE: u64 = 8 << 20;

pub(crate) struct Served {
    server: Server<Plain<Raw<MemoryStorage>>>,
    folder: TempDir,
    pub(crate) authority: Authority,
    pub(crate) port: u16,
}

/// How a server goes about TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Off,
    Optional,
    Required,
}

impl Served {
    /// Serves on 127.0.0.1, ::1 (another port) and a socket file.
    pub(crate) fn start(wish: Wish, verify: VerifyPeer) -> Self {
        Self::with(wish, verify, Limits::default(), &LOCAL)
    }

    /// As [`Served::start`], with a certificate for some names.
    pub(crate) fn with(wish: Wish, verify: VerifyPeer, limits: Limits, names: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("ours");
        authority.trusted_in(folder.path());
        authority.server_in(folder.path(), names);
        authority.client_in(folder.path());
        let settings = || ServerTls::from_folder(folder.path(), verify).unwrap();
        let tls = match wish {
            Wish::Off => Tls::Off,
            Wish::Optional => Tls::Optional(settings()),
            Wish::Required => Tls::Required(settings()),
        };
        let disk = block_on(Raw::create(MemoryStorage::new(), SIZE)).unwrap();
        let exports = Arc::new(Exports::default());
        let export = Export::new("", Plain(disk), ExportOptions::default()).unwrap();
        exports.add(export).unwrap();
        let options = ServerOptions { limits, tls, ..ServerOptions::default() };
        let server = Server::start(exports, options).unwrap();
        let file = Address::Unix(folder.path().join("sock"));
        let mut listeners = Listener::bind(&Address::Tcp("127.0.0.1".into(), 0)).unwrap();
        let port = listeners[0].port().unwrap();
        listeners.extend(Listener::bind(&file).unwrap());
        listeners.into_iter().for_each(|listener| server.listen(listener));
        Self { server, folder, authority, port }
    }

    /// Listens on version 6 of the Internet as well; its port.
    pub(crate) fn also_on_version_6(&self) -> u16 {
        let listener = Listener::bind(&Address::Tcp("::1".into(), 0)).unwrap().remove(0);
        let port = listener.port().unwrap();
        self.server.listen(listener);
        port
    }

    /// Returns how many clients there are.
    pub(crate) fn clients(&self) -> usize {
        self.server.connections().len()
    }

    pub(crate) fn stop(&self) {
        self.server.stop();
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Returns a folder for a client that believes us and has no certificate.
    pub(crate) fn believer(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(self.path().join("ca-cert.pem"), folder.path().join("ca-cert.pem")).unwrap();
        folder
    }

    /// Returns the URI for libnbd by TCP.
    pub(crate) fn uri(&self, certificates: &Path) -> String {
        let port = self.port;
        format!("nbds://localhost:{port}/?tls-certificates={}", certificates.display())
    }

    pub(crate) fn plain_uri(&self) -> String {
        format!("nbd://127.0.0.1:{}", self.port)
    }

    pub(crate) fn unix_uri(&self) -> String {
        let path = self.path().display();
        format!("nbds+unix:///?socket={path}/sock&tls-certificates={path}")
    }

    /// Returns what QEMU's programs take for us and for their own certificates.
    pub(crate) fn qemu(&self, certificates: &Path, host: &str) -> [String; 4] {
        [
            "--object".into(),
            format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", certificates.display()),
            "--image-opts".into(),
            format!(
                "driver=raw,file.driver=nbd,file.server.type=inet,file.server.host={host},\
                 file.server.port={},file.tls-creds=tls0",
                self.port
            ),
        ]
    }

    /// Returns the settings of a client with everything that it needs.
    pub(crate) fn client(&self) -> ClientTls {
        ClientTls::from_folder(self.path(), VerifyPeer::On).unwrap()
    }
}
