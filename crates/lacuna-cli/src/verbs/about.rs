//! What the verbs share that tell of the program itself: writing all that they make into a folder.

use std::path::Path;

use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};

/// All that the verb makes, as files.
pub(super) const ALL: Flag =
    Flag::valued('\0', "all", "DIR", "write all that there is, as files in this folder")
        .long_only();

/// Writes texts under their names into the folder of [`ALL`].
pub(super) fn write_all(
    parsed: &Parsed,
    files: impl Iterator<Item = (String, String)>,
) -> CliResult<u8> {
    if let Some(operand) = parsed.operands.first() {
        return Err(CliError::usage(format!("Unexpected argument: {operand}")));
    }
    let folder = Path::new(parsed.last(ALL.long).unwrap_or_default());
    let failed = |path: &Path, error: std::io::Error| {
        let error = lacuna::Error::io(error, format!("Writing {}", path.display()));
        CliError::from(error).with_fact("file", path.display().to_string())
    };
    std::fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
    for (name, text) in files {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|error| failed(&path, error))?;
    }
    Ok(0)
}
