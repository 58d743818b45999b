//! `point`: a disk as it is at this moment, for whoever copies it, while its guests go on.

use std::path::{Path, PathBuf};

use lacuna::block::WhenFull;
use serde_json::{Value, json};

use super::super::arguments::{Arguments, invalid};
use super::super::points::{Outcome, Wanted};
use super::{Command, Control, Members, one_export, shown, table};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::size;
use crate::verbs::{serve, unnamed};

const ADD: Flag = Flag::valued('\0', "add", "NAME", "point: keep what the disk is now").long_only();
const REMOVE: Flag = Flag::valued('\0', "remove", "NAME", "point: keep it no longer").long_only();
const CHANGE: Flag =
    Flag::valued('\0', "change", "NAME", "point: another --space for one that is there")
        .long_only();
const DONE: Flag =
    Flag::switch('\0', "done", "point: what it was for is done; frozen bitmaps begin there")
        .long_only();
const NEW_BITMAP: Flag =
    Flag::valued('\0', "new-bitmap", "NAME", "point: make a bitmap that begins there").long_only();
const GRANULARITY: Flag =
    Flag::valued('\0', "granularity", "BYTES", "point: for a bit of new bitmaps").long_only();
/// Where the server saves what guests overwrite.
pub(crate) const DIRECTORY: Flag =
    Flag::valued('\0', "directory", "PATH", "point: where to save what guests overwrite")
        .long_only();
/// How much may be saved.
pub(crate) const SPACE: Flag =
    Flag::valued('\0', "space", "BYTES", "point: how much may be saved (half of what is free)")
        .long_only();
/// What happens when there is no more space.
pub(crate) const WHEN_FULL: Flag = Flag::valued(
    '\0',
    "when-full",
    "break|wait",
    "point: what then happens, to the point or to guests (break)",
)
.long_only();

/// Options of no other command.
pub(crate) const FLAGS: [Flag; 9] =
    [ADD, REMOVE, CHANGE, DONE, NEW_BITMAP, GRANULARITY, DIRECTORY, SPACE, WHEN_FULL];

pub(super) const COMMAND: Command = Command {
    name: "point",
    operands: "[EXPORT]",
    summary: "keep a disk as it is now, as an export of its own; without options, list those",
    flags: &[
        ADD,
        REMOVE,
        CHANGE,
        DONE,
        serve::BITMAP,
        NEW_BITMAP,
        GRANULARITY,
        DIRECTORY,
        SPACE,
        WHEN_FULL,
    ],
    ask,
    run,
    tell,
};

/// Longest name.
const MOST_NAME_BYTES: usize = 64;

fn ask(parsed: &Parsed, operands: &[String]) -> CliResult<Members> {
    let mut arguments = one_export(parsed, operands)?;
    for flag in [ADD, REMOVE, CHANGE, WHEN_FULL] {
        if let Some(text) = parsed.last(flag.long) {
            arguments.insert(member(flag), text.into());
        }
    }
    for flag in [GRANULARITY, SPACE] {
        if let Some(text) = parsed.last(flag.long) {
            let bytes = size::within(flag.long, text, 0, i64::MAX as u64)?;
            arguments.insert(member(flag), bytes.into());
        }
    }
    for (flag, member) in [(serve::BITMAP, "bitmaps"), (NEW_BITMAP, "new_bitmaps")] {
        let names: Vec<Value> = parsed.all(flag.long).map(Value::from).collect();
        if !names.is_empty() {
            arguments.insert(member.to_owned(), names.into());
        }
    }
    if parsed.has(DONE.long) {
        arguments.insert(DONE.long.to_owned(), true.into());
    }
    if let Some(path) = parsed.last(DIRECTORY.long) {
        arguments.insert(DIRECTORY.long.to_owned(), absolute(path)?.into());
    }
    Ok(arguments)
}

fn member(flag: Flag) -> String {
    flag.long.replace('-', "_")
}

/// The server may stand in another folder.
pub(crate) fn absolute(path: &str) -> CliResult<String> {
    let path = std::path::absolute(path)
        .map_err(|error| lacuna::Error::io(error, format!("Finding {path}")))?;
    path.into_os_string()
        .into_string()
        .map_err(|_| CliError::new("The name of the folder is not UTF-8 text"))
}

/// What is asked for.
enum Asked {
    Add(Wanted),
    Change { name: String, space_bytes: u64 },
    List,
    Remove { name: String, outcome: Outcome },
}

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    let asked = asked(arguments)?;
    let _disks_stay_open = control.begin()?;
    let name = arguments.optional_text("export")?;
    if let (Asked::List, None) = (&asked, name) {
        return Ok(json!({ "points": control.points.list(None) }));
    }
    let export = control.export(name)?;
    match asked {
        Asked::Add(wanted) => control.points.add(&control.server, &export, wanted),
        Asked::Change { name, space_bytes } => control.points.change(&export, &name, space_bytes),
        Asked::List => Ok(json!({ "points": control.points.list(Some(&export)) })),
        Asked::Remove { name, outcome } => {
            control.points.remove(&control.server, &export, &name, outcome)
        }
    }
}

fn asked(arguments: &Arguments) -> CliResult<Asked> {
    let text = |name| -> CliResult<Option<String>> {
        Ok(arguments.optional_text(name)?.map(str::to_owned))
    };
    match (text("add")?, text("remove")?, text("change")?) {
        (Some(name), None, None) => wanted(name, arguments).map(Asked::Add),
        (None, Some(name), None) => {
            arguments.only(&["export", "remove", "done"])?;
            let outcome = if arguments.switch("done")? { Outcome::Done } else { Outcome::Given };
            Ok(Asked::Remove { name, outcome })
        }
        (None, None, Some(name)) => {
            arguments.only(&["export", "change", "space"])?;
            let space_bytes = arguments.optional_number("space")?;
            let space_bytes =
                space_bytes.ok_or_else(|| invalid("The member 'space' is missing".to_owned()))?;
            Ok(Asked::Change { name, space_bytes })
        }
        (None, None, None) => arguments.only(&["export"]).map(|()| Asked::List),
        _ => Err(invalid("One of 'add', 'change' and 'remove' is enough".to_owned())),
    }
}

fn wanted(name: String, arguments: &Arguments) -> CliResult<Wanted> {
    arguments.only(&[
        "export",
        "add",
        "bitmaps",
        "new_bitmaps",
        "granularity",
        "directory",
        "space",
        "when_full",
    ])?;
    let is_sound = |it: char| it.is_ascii_alphanumeric() || "-_.".contains(it);
    if name.is_empty() || name.len() > MOST_NAME_BYTES || !name.chars().all(is_sound) {
        let text = "The name of a point has 1 to 64 of letters, digits, '-', '_' and '.'";
        return Err(invalid(text.to_owned()));
    }
    Ok(Wanted {
        name,
        bitmaps: arguments.texts("bitmaps")?,
        new_bitmaps: arguments.texts("new_bitmaps")?,
        granularity_bytes: arguments.optional_number("granularity")?,
        folder: folder(arguments.optional_text("directory")?)?,
        space_bytes: arguments.optional_number("space")?,
        when_full: match arguments.optional_text("when_full")? {
            None | Some("break") => WhenFull::Break,
            Some("wait") => WhenFull::Wait,
            Some(_) => return Err(invalid("The member 'when_full' is break or wait".to_owned())),
        },
    })
}

fn folder(named: Option<&str>) -> CliResult<PathBuf> {
    match named.map(Path::new) {
        None => Ok(unnamed::folder()),
        Some(path) if path.is_absolute() => Ok(path.to_owned()),
        Some(_) => Err(invalid("The member 'directory' is an absolute path".to_owned())),
    }
}

fn tell(result: &Value) -> String {
    if let Some(points) = result["points"].as_array() {
        return listed(points);
    }
    match result["point_export"].as_str() {
        Some(_) => format!("'{}': {} bytes\n", shown(&result["point_export"]), result["size"]),
        None => String::new(),
    }
}

fn listed(points: &[Value]) -> String {
    let titles = ["EXPORT", "SIZE", "STATE", "SAVED", "SPACE", "WAITING", "CLIENTS", "BITMAPS"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for point in points {
        let number = |member: &str| point[member].to_string();
        let names = ["bitmaps", "new_bitmaps"].map(|member| point[member].as_array());
        let names: Vec<String> = names.into_iter().flatten().flatten().map(shown).collect();
        rows.push(vec![
            format!("'{}'", shown(&point["point_export"])),
            number("size"),
            shown(&point["state"]),
            number("saved_bytes"),
            number("space"),
            number("waiting"),
            number("clients"),
            names.join(" "),
        ]);
    }
    table(&rows)
}
