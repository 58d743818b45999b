//! `snapshot`: the internal snapshots of an image; and how other verbs are told of one.

use std::time::SystemTime;

use lacuna::qcow2::format::{Snapshot, StoredName};
use lacuna::qcow2::{Access, SnapshotChoice};
use lacuna::{Error, ErrorKind};
use pollster::block_on;
use serde_json::Value;

use super::open::{self, FileChain, Request};
use super::{Example, Form, Task, Verb, common, form, info, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, MAKE_ROOM, errno_words, sentence};
use crate::options::{self, Asked, Given};
use crate::output;
use crate::persona::{Persona, Tool};

/// What the verb can be asked to do.
const ACTIONS: [&str; 4] = ["list", "apply", "create", "delete"];
/// QEMU cuts longer names off.
const NAME_BYTES: usize = 255;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "snapshot",
    task: Task::Change,
    summary: "List, make, apply or delete internal snapshots",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::FORMAT,
        common::IMAGE_OPTS,
        common::FORCE_SHARE,
        Flag::switch('l', "list", "list them (what is done without an option)"),
        Flag::valued(
            'a',
            "apply",
            "SNAPSHOT",
            "make the disk what it was then; what it is now is lost",
        ),
        Flag::valued('c', "create", "SNAPSHOT", "keep the disk as it is now, under this name"),
        Flag::valued('d', "delete", "SNAPSHOT", "delete one, and give back what only it uses"),
        common::OUTPUT.own(),
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example { shows: "which snapshots does an image have?", line: "-l snapshots.qcow2" },
        Example {
            shows: "the same for programs, with the size of each disk",
            line: "--output=json snapshots.qcow2",
        },
        Example { shows: "keep a disk as it is now", line: "-c before-upgrade disk.qcow2" },
        Example { shows: "go back to a snapshot", line: "-a monday snapshots.qcow2" },
        Example { shows: "delete it", line: "-d monday snapshots.qcow2" },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    if ACTIONS.into_iter().map(|action| parsed.all(action).count()).sum::<usize>() > 1 {
        return Err(CliError::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let file = one_image(parsed)?;
    let asked = ACTIONS[1..].iter().find_map(|it| Some((*it, parsed.last(it)?)));
    if let Some((action, name)) = asked {
        return change(tool, parsed, file, action, name);
    }
    let chain = open::open(tool, &Request::reading(file, parsed, "format")?)?;
    let snapshots = match chain.disk().as_qcow2() {
        Some(image) => block_on(image.snapshots())?,
        None => Vec::new(),
    };
    let text = match form {
        Form::Human => human(tool, &snapshots),
        Form::Json => output::pretty(&snapshots.iter().map(json).collect()) + "\n",
    };
    output::print(&text).map(|()| 0)
}

/// Makes, applies or deletes one.
fn change(tool: &Tool, parsed: &Parsed, file: &str, action: &str, name: &str) -> CliResult<u8> {
    let request =
        Request { access: Access::ReadWrite, ..Request::reading(file, parsed, "format")? };
    let chain = open::open(tool, &request)?;
    open::warn_of_guess(&request, &chain);
    let done = changed(tool, &chain, action, name);
    // The image is closed in any case; the first error is the one to tell.
    let closed = block_on(chain.into_disk().close());
    done.map_err(|error| error.under(format!("Could not {action} snapshot '{name}'")))?;
    closed?;
    Ok(0)
}

fn changed(tool: &Tool, chain: &FileChain, action: &str, name: &str) -> CliResult<()> {
    let Some(image) = chain.disk().as_qcow2() else {
        return Err(without_snapshots(action));
    };
    let word = StoredName::from(name);
    let done = match action {
        "apply" if has_bitmaps(image)? && !tool.is_own() => {
            return Err(CliError::new("Device has active dirty bitmaps"));
        }
        "apply" => block_on(image.apply_snapshot(&SnapshotChoice::IdOrName(word))),
        "create" => {
            let cut = word.len().min(if tool.is_own() { usize::MAX } else { NAME_BYTES });
            let word = StoredName::new(&word.as_bytes()[..cut]);
            block_on(image.create_snapshot(&word, SystemTime::now()))
        }
        _ if tool.is_own() => block_on(image.delete_snapshot(&SnapshotChoice::IdOrName(word))),
        _ => block_on(image.delete_snapshot(&SnapshotChoice::Name(word))),
    };
    done.map(drop).map_err(|error| failure(action, &error))
}

fn has_bitmaps(image: &lacuna::qcow2::Image<crate::nodes::AnyStorage>) -> CliResult<bool> {
    Ok(!block_on(image.bitmaps())?.is_empty())
}

/// What a format without snapshots is asked for.
pub(crate) fn without_snapshots(action: &str) -> CliError {
    let stock = match action {
        "apply" => "Block driver does not support snapshots",
        "create" => "Operation not supported",
        _ => "snapshot not found",
    };
    CliError::new(stock)
        .in_our_words("Only images of the format qcow2 have internal snapshots")
        .with_class(ErrorKind::Unsupported)
}

/// Says in QEMU's words and in ours what was wrong.
fn failure(action: &str, error: &Error) -> CliError {
    let stock = match (action, error.kind()) {
        ("delete", ErrorKind::NotFound | ErrorKind::Unsupported) => "snapshot not found",
        ("apply", ErrorKind::NotFound) => "Failed to load snapshot: No such file or directory",
        ("apply", ErrorKind::Unsupported) => "Failed to load snapshot: Operation not supported",
        (_, ErrorKind::InvalidRequest) => "Invalid argument",
        // The host's, not the refcounts'.
        (_, ErrorKind::NoSpace) if error.raw_os_error().is_some() => {
            return CliError::new(errno_words(error))
                .in_our_words(sentence(error))
                .with_class(ErrorKind::NoSpace)
                .with_hint(MAKE_ROOM);
        }
        (_, ErrorKind::NoSpace) => "File too large",
        (_, ErrorKind::Unsupported) => "Operation not supported",
        _ => return CliError::from(error.clone()),
    };
    let said = CliError::new(stock).in_our_words(error.to_string()).with_class(error.kind());
    match error.kind() {
        ErrorKind::NotFound => {
            said.with_hint("`lacuna snapshot -l FILE` lists the snapshots of an image")
        }
        _ => said,
    }
}

fn human(tool: &Tool, snapshots: &[Snapshot]) -> String {
    let list = snapshots.iter().map(info::snapshot);
    let list: Vec<Value> = match tool.is_own() {
        true => list.map(info::tamed).collect(),
        false => list.collect(),
    };
    info::snapshots(&list)
}

/// As QEMU describes one, and the size of its disk in bytes where the image says it.
pub(crate) fn json(snapshot: &Snapshot) -> Value {
    let mut value = info::snapshot(snapshot);
    if let (Some(size), Value::Object(members)) = (snapshot.disk_size_bytes, &mut value) {
        members.insert("disk-size".into(), size.into());
    }
    value
}

/// Reads the `-l` of verbs that read a snapshot: a word, or `snapshot.id=` and `snapshot.name=`.
pub(super) fn choice(tool: &Tool, text: &str) -> CliResult<SnapshotChoice> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotChoice::IdOrName(text.into()));
    }
    let in_parsing = |error: CliError| match tool.is_own() {
        true => error,
        false => {
            let quote = if tool.persona == Persona::QemuNbd { '`' } else { '\'' };
            let name = &tool.name;
            error.followed_by(format!("{name}: Failed in parsing snapshot param {quote}{text}'"))
        }
    };
    let given = match options::parse([text].into_iter()).map_err(in_parsing)? {
        Asked::Values(given) => given,
        Asked::Help => return Err(in_parsing(unknown("help"))),
    };
    of_options(&given).map_err(in_parsing)
}

fn of_options(given: &Given) -> CliResult<SnapshotChoice> {
    const KNOWN: [&str; 2] = ["snapshot.id", "snapshot.name"];
    if let Some(key) = given.keys().find(|key| !KNOWN.contains(key)) {
        return Err(unknown(key));
    }
    match (given.last(KNOWN[0]), given.last(KNOWN[1])) {
        (Some(id), Some(name)) => Ok(SnapshotChoice::Both { id: id.into(), name: name.into() }),
        (Some(id), None) => Ok(SnapshotChoice::Id(id.into())),
        (None, Some(name)) => Ok(SnapshotChoice::Name(name.into())),
        (None, None) => Err(unknown("snapshot.")),
    }
}

fn unknown(key: &str) -> CliError {
    CliError::new(format!("Invalid parameter '{key}'"))
        .with_hint("-l takes an identifier or a name, or snapshot.id=ID,snapshot.name=NAME")
}

/// Returns a chain with its disk as it was when a snapshot was made.
pub(super) fn at(tool: &Tool, chain: FileChain, choice: &SnapshotChoice) -> CliResult<FileChain> {
    let is_raw = chain.disk().as_qcow2().is_none();
    block_on(chain.at_snapshot(choice)).map_err(|error| {
        let class = error.kind();
        let failure = match class {
            ErrorKind::NotFound => CliError::new("Can't find snapshot")
                .in_our_words(error.to_string())
                .with_hint("`lacuna snapshot -l FILE` lists the snapshots of an image"),
            ErrorKind::Unsupported if is_raw && !tool.is_own() => CliError::new(
                "Block format 'raw' used by device '' does not support temporarily loading \
                 internal snapshots",
            ),
            _ => CliError::from(error),
        };
        failure.with_class(class).under("Failed to load snapshot")
    })
}
