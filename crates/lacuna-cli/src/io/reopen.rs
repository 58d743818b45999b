//! `reopen`: the same image, opened in another way.
//!
//! * A change that makes no sense leaves the image open as it was; only one that cannot be opened
//!   any more is closed.

use lacuna::qcow2::Access;

use super::commands::{Command, Done};
use super::session::Session;
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::options::{self, Asked};
use crate::verbs::open::{Request, cache_mode, of_chain};
use crate::verbs::spec::change::Opened;
use crate::verbs::spec::keys::Keys;

pub(super) fn reopen(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    if !parsed.operands.is_empty() {
        return Err(super::commands::Failure::Usage);
    }
    let request = wish(session, &parsed);
    match request.and_then(|request| session.reopen(|before| *before = request)) {
        Ok(()) => Ok(()),
        Err(error) => session.report(error.text()),
    }
}

/// How the image is to be opened from now on.
fn wish(session: &Session<'_>, parsed: &Parsed) -> CliResult<Request> {
    let image = session.image().map_err(|_| CliError::new("There is no image"))?;
    let mut request = image.request.clone();
    if parsed.has("r") && parsed.has("w") {
        return Err(CliError::new("Only one -r/-w option may be given"));
    }
    if let Some(name) = parsed.last("c") {
        let mode = cache_mode(name);
        request.cache =
            mode.ok_or_else(|| CliError::new(format!("Invalid cache option: {name}")))?;
    }
    let keys = match options::parse(parsed.all("o"))? {
        Asked::Help => return Err(CliError::new("Options are those of open -o")),
        Asked::Values(given) => Keys::from_pairs(given.into_pairs()),
    };
    check_twice(parsed, &keys)?;
    request.access = match (parsed.has("r"), parsed.has("w")) {
        (true, _) => Access::ReadOnly,
        (_, true) => Access::ReadWrite,
        _ => request.access,
    };
    let opened = Opened {
        format: of_chain(image.chain.disk().format()),
        below: image.chain.levels().get(1).map(|level| of_chain(level.format)),
    };
    request.image = request.image.changed(keys, opened)?;
    check_read_only(&mut request)?;
    if let Some(qcow2) = image.chain.disk().as_qcow2() {
        request.image.disk.runtime.check(&qcow2.header())?;
    }
    Ok(request)
}

/// One thing must not be said by a flag and by an option.
fn check_twice(parsed: &Parsed, keys: &Keys) -> CliResult<()> {
    let has = |key: &str| keys.text(key).is_some();
    if (parsed.has("r") || parsed.has("w")) && has("read-only") {
        return Err(CliError::new("Cannot set both -r/-w and 'read-only'"));
    }
    let has_cache = ["cache.writeback", "cache.direct", "cache.no-flush"].into_iter().any(has);
    match parsed.has("c") && has_cache {
        true => Err(CliError::new("Cannot set both -c and the cache options")),
        false => Ok(()),
    }
}

/// The shell itself writes: an image that it has open for writing cannot become one to read by an
/// option alone.
fn check_read_only(request: &mut Request) -> CliResult<()> {
    match (request.image.disk.common.read_only, request.access) {
        (Some(false), _) => request.access = Access::ReadWrite,
        (Some(true), Access::ReadWrite) => {
            let name = request.image.disk.common.node_name.as_deref().unwrap_or("#block000");
            return Err(CliError::new(format!(
                "Read-only block node '{name}' cannot support read-write users"
            )));
        }
        _ => {}
    }
    Ok(())
}
