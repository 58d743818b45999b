//! Files without a name, so that nothing is left behind whatever ends the process.

use std::path::{Path, PathBuf};

use lacuna::storage::{Claim, FileOptions, FileStorage};

use crate::error::CliResult;

/// Where they go unless `TMPDIR` says so: they may become large.
const FOLDER: &str = "/var/tmp";

/// Returns the usual folder.
pub(crate) fn folder() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| FOLDER.into(), PathBuf::from)
}

/// Makes an empty one; `what` it is for is told where that fails.
pub(crate) fn file(folder: &Path, what: &str) -> CliResult<FileStorage> {
    let file = tempfile::tempfile_in(folder).map_err(|error| {
        lacuna::Error::io(error, format!("Making {what} in {}", folder.display()))
    })?;
    // Whoever opens it by its path claims it.
    let options = FileOptions { claim: Some(Claim::NONE), ..FileOptions::read_write() };
    Ok(FileStorage::from_file(file, &options)?)
}
