//! Files of a simulated host by name, for chains.

use std::path::{Path, PathBuf};

use lacuna::chain::{Identity, Opener};
use lacuna::qcow2::Access;
use lacuna::storage::Claim;
use lacuna::{Error, ErrorKind, Result};

use super::{SimHost, SimStorage};

/// Opens the files of a host, which have names here.
///
/// ```
/// use lacuna::{chain::Opener, qcow2::Access, storage::Storage};
/// use testkit::sim::{HostOpener, Pace, SimHost};
/// let host = SimHost::new(Pace::AtOnce, 1);
/// host.add_file(b"lacuna"[..].into());
/// let opener = HostOpener::new(host, &["a.raw"]);
/// let file = pollster::block_on(opener.open("a.raw".as_ref(), Access::ReadOnly)).unwrap();
/// assert_eq!(pollster::block_on(file.len()).unwrap(), 6);
/// ```
#[derive(Clone, Debug)]
pub struct HostOpener {
    host: SimHost,
    names: Vec<PathBuf>,
}

impl HostOpener {
    /// Gives the files of `host` names, in their order.
    #[must_use]
    pub fn new(host: SimHost, names: &[&str]) -> Self {
        Self { host, names: names.iter().map(PathBuf::from).collect() }
    }
}

impl Opener for HostOpener {
    type Storage = SimStorage;

    async fn open(&self, path: &Path, _: Access) -> Result<SimStorage> {
        let index = self.names.iter().position(|name| name == path);
        let missing = || Error::new(ErrorKind::NotFound, path.display().to_string());
        index.map(|index| self.host.open_file(index)).ok_or_else(missing)
    }

    async fn claim(&self, _: &SimStorage, _: Claim) -> Result<()> {
        Ok(())
    }

    async fn identify(&self, path: &Path) -> Result<Identity> {
        Ok(Identity::Path(path.to_owned()))
    }
}
