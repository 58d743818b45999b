//! Files that are there whole or not at all, also after a power cut.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use lacuna::{Error, Result};

/// Writes a file under another name, makes it durable, and gives it its name.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let write = || {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| failed(error, "Writing", path))?;
    rename(Path::new(&part), path)
}

/// Gives a durable file its name, durably.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|error| failed(error, "Naming", to))?;
    sync_folder(to)
}

/// Removes a file, where it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(failed(error, "Removing", path))
        }
        _ => Ok(()),
    }
}

/// Makes durable what the folder of `path` says of it.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| failed(error, "Flushing", folder))
}

pub(crate) fn failed(error: std::io::Error, doing: &str, path: &Path) -> Error {
    Error::io(error, format!("{doing} {}", path.display()))
}
