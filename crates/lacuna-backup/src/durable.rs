//! Files that are there whole or not at all, also after a power cut.

use std::path::{Path, PathBuf};

use lacuna::buffer::Buffer;
use lacuna::storage::Storage;
use lacuna::units::HostOffset;
use lacuna::{Error, Result};

use crate::place::{OpenAs, Place, folder_of};

/// Writes a file under another name, makes it durable, and gives it its name.
pub(crate) async fn replace<P: Place>(place: &P, path: &Path, bytes: &[u8]) -> Result<()> {
    let part = part(path);
    let write = async {
        let file = place.open(&part, OpenAs::New)?;
        file.write_at(HostOffset(0), Buffer::from(bytes)).await.0?;
        file.flush().await
    };
    write.await.map_err(|error| error.context(format!("Writing {}", path.display())))?;
    rename(place, &part, path)
}

/// Returns the name of a file as long as it is being written.
pub(crate) fn part(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    part.into()
}

/// Gives a durable file its name, durably.
pub(crate) fn rename<P: Place>(place: &P, from: &Path, to: &Path) -> Result<()> {
    place.rename(from, to)?;
    place.sync_folder(&folder_of(to))
}

pub(crate) fn failed(error: std::io::Error, doing: &str, path: &Path) -> Error {
    Error::io(error, format!("{doing} {}", path.display()))
}
