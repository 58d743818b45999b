//! What would have been right, where it takes a look around to say so.

use std::fs::FileType;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use lacuna::qcow2::check::is_beyond_repair;
use lacuna::{Error, ErrorKind};

use crate::args;
use crate::error::CliError;

/// The host's number for a file that this user may not open.
const EACCES: i32 = 13;

/// The host's number for one open file too many.
const EMFILE: i32 = 24;

/// What sizes look like.
pub(super) const SIZES: &str = "sizes are like 512, 64k, 1.5G or 0x10000; units are powers of 1024";

/// The cache modes that there are.
pub(super) const CACHE_MODES: &str =
    "cache modes are none, writeback, writethrough, directsync and unsafe";

/// What formats there are.
pub(super) const FORMATS: &str = "formats are qcow2 and raw";

/// Adds the nearest name to an error about a file that is not there.
pub(super) fn on_missing(failure: CliError, missing: &Path, error: &std::io::Error) -> CliError {
    let near = (error.kind() == std::io::ErrorKind::NotFound).then(|| nearest_file(missing));
    match near.flatten() {
        Some(near) => failure.with_hint(format!("{near} is the nearest name there")),
        None => failure,
    }
}

/// Returns the name in the folder of a missing file that was most likely meant.
fn nearest_file(missing: &Path) -> Option<String> {
    const MOST_FILES: usize = 4096;
    let folder = missing.parent().filter(|folder| !folder.as_os_str().is_empty());
    let entries = std::fs::read_dir(folder.unwrap_or_else(|| Path::new("."))).ok()?;
    let names =
        entries.take(MOST_FILES).filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.collect();
    names.sort();
    args::nearest(missing.file_name()?.to_str()?, names.iter().map(String::as_str))
        .map(str::to_owned)
}

/// Adds what helps where the engine could not open an image.
pub(super) fn on_opening(failure: CliError, error: &Error) -> CliError {
    let says = |text: &str| error.message().contains(text);
    if failure.text().starts_with("Could not open backing file")
        && error.raw_os_error() != Some(EMFILE)
    {
        return failure.with_hint("`lacuna info IMAGE` shows which file the image names");
    }
    match error.kind() {
        // No repair can know the right name.
        ErrorKind::Corrupt if says("chain is a loop") || says("file name: ") => {
            failure.with_hint("`lacuna info IMAGE` shows which file the image names")
        }
        ErrorKind::Corrupt if says("Not a qcow2 image") => {
            failure.with_hint("without -f its format is found out; -f raw takes it as it is")
        }
        ErrorKind::Corrupt if is_beyond_repair(error) => failure
            .with_hint("the beginning of the file is cut off or damaged; only a copy of it helps"),
        _ if error.raw_os_error() == Some(EMFILE) => failure.with_hint(
            "each image of a chain is an open file; `ulimit -n` says how many there may be",
        ),
        ErrorKind::Corrupt => failure.with_hint("`lacuna check -r all IMAGE` may repair it"),
        ErrorKind::Io if error.raw_os_error() == Some(EACCES) => {
            failure.with_hint("`ls -l` shows whom it belongs to and who may open it")
        }
        _ => failure,
    }
}

/// What a file is that is neither regular nor a block device.
pub(super) fn kind_word(kind: FileType) -> &'static str {
    match kind {
        kind if kind.is_dir() => "folder",
        kind if kind.is_fifo() => "pipe",
        kind if kind.is_socket() => "socket",
        _ => "character device",
    }
}
