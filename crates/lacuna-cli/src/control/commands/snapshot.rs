//! `snapshot`: internal snapshots of an image that is served.
//!
//! Making and deleting one changes nothing that a guest reads, and may happen under any load. Applying one
//! changes all of it: only while no client has the export.

use std::time::SystemTime;

use lacuna::ErrorKind;
use lacuna::qcow2::SnapshotChoice;
use lacuna::qcow2::format::Snapshot;
use pollster::block_on;
use serde_json::{Value, json};

use super::super::Exported;
use super::super::arguments::{Arguments, invalid};
use super::{Command, Control, Members, one_export};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::verbs::info;
use crate::verbs::serve::ChainDisk;
use crate::verbs::snapshot::{self, without_snapshots};

const CREATE: Flag =
    Flag::valued('\0', "create", "NAME", "snapshot: keep the disk as it is now").long_only();
const APPLY: Flag = Flag::valued(
    '\0',
    "apply",
    "SNAPSHOT",
    "snapshot: make the disk what it was then; only without clients",
)
.long_only();
const DELETE: Flag =
    Flag::valued('\0', "delete", "SNAPSHOT", "snapshot: delete one by its ID or name").long_only();

/// Options of no other command.
pub(crate) const FLAGS: [Flag; 3] = [CREATE, APPLY, DELETE];

pub(super) const COMMAND: Command = Command {
    name: "snapshot",
    operands: "[EXPORT]",
    summary: "make, apply or delete an internal snapshot; without options, list them",
    flags: &FLAGS,
    ask,
    run,
    tell,
};

fn ask(parsed: &Parsed, operands: &[String]) -> CliResult<Members> {
    let mut arguments = one_export(parsed, operands)?;
    for flag in FLAGS {
        if let Some(text) = parsed.last(flag.long) {
            arguments.insert(flag.long.to_owned(), text.into());
        }
    }
    Ok(arguments)
}

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["export", CREATE.long, APPLY.long, DELETE.long])?;
    let text = |flag: Flag| -> CliResult<Option<(&'static str, &str)>> {
        Ok(arguments.optional_text(flag.long)?.map(|text| (flag.long, text)))
    };
    let asked: Vec<(&str, &str)> =
        [text(CREATE)?, text(APPLY)?, text(DELETE)?].into_iter().flatten().collect();
    let _disks_stay_open = control.begin()?;
    let export = control.export(arguments.optional_text("export")?)?;
    match asked[..] {
        [] => list(&export),
        [(action, name)] => {
            let done = change(control, &export, action, name);
            let done = done.map_err(|error| error.under(format!("Could not {action} '{name}'")))?;
            Ok(json!({ "export": export.name().as_str(), "snapshot": snapshot::json(&done) }))
        }
        _ => Err(invalid("One of 'create', 'apply' and 'delete' is enough".to_owned())),
    }
}

fn list(export: &Exported) -> CliResult<Value> {
    let image = export.disk().as_chain().and_then(|chain| chain.disk().as_qcow2());
    let snapshots = image.map_or(Ok(Vec::new()), |image| block_on(image.snapshots()))?;
    let snapshots: Vec<Value> = snapshots.iter().map(snapshot::json).collect();
    Ok(json!({ "snapshots": snapshots }))
}

fn change(control: &Control, export: &Exported, action: &str, name: &str) -> CliResult<Snapshot> {
    if export.is_read_only() {
        let text = format!("Export {} is read-only", export.name());
        return Err(CliError::new(text).with_class(ErrorKind::ReadOnly));
    }
    let image = export.disk().as_chain().and_then(ChainDisk::image);
    let image = image.ok_or_else(|| without_snapshots(action))?;
    let choice = || SnapshotChoice::IdOrName(name.into());
    match action {
        "create" => Ok(block_on(image.create_snapshot(&name.into(), SystemTime::now()))?),
        "delete" => Ok(block_on(image.delete_snapshot(&choice()))?),
        _ => control.points.without(export, || apply(control, export, image, &choice())),
    }
}

/// Applies one where nobody notices: what a guest knows of its disk would be wrong.
fn apply(
    control: &Control,
    export: &Exported,
    image: &lacuna::qcow2::Image<AnyStorage>,
    choice: &SnapshotChoice,
) -> CliResult<Snapshot> {
    if let Some(job) = control.jobs.of(export) {
        let text = format!("Job {} is at work on export {}", job.number, export.name());
        return Err(CliError::new(text)
            .with_class(ErrorKind::Busy)
            .with_hint("`lacuna ctl cancel` ends it"));
    }
    let Some(_empty) = export.keep_out() else {
        return Err(CliError::new(format!(
            "Export {} has {} clients, whose disk would change under them",
            export.name(),
            export.clients().now
        ))
        .with_class(ErrorKind::Busy));
    };
    Ok(block_on(image.apply_snapshot(choice))?)
}

fn tell(result: &Value) -> String {
    match result["snapshots"].as_array() {
        Some(snapshots) => {
            info::snapshots(&snapshots.iter().cloned().map(info::tamed).collect::<Vec<_>>())
        }
        None => String::new(),
    }
}
