//! `verify`: reads restore points, and holds them against their checksums.

use lacuna_backup::{Folder, Point, verify};
use pollster::block_on;
use serde_json::json;

use super::backup::{POINT, open_point};
use super::progress::Meter;
use super::{Example, ExitCode, Form, Task, Verb, common, form};
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::interrupt::{INTERRUPTED, Interrupted};
use crate::output;
use crate::persona::Tool;

/// The exit code for damage, that of `check`.
const DAMAGED: u8 = 2;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "verify",
    task: Task::Beside,
    summary: "Read restore points of `backup`, and check every byte of them",
    operands: "FOLDER",
    flags: &[common::QUIET, common::PROGRESS, POINT_ONLY, common::OUTPUT],
    examples: &[
        Example { shows: "all points of a folder", line: "points" },
        Example { shows: "one, with those that it stands on", line: "--point monday points" },
    ],
    codes: &[
        ExitCode { code: 0, means: "every point can be restored" },
        ExitCode { code: 1, means: "not done; standard error says why" },
        ExitCode { code: DAMAGED, means: "something is damaged; standard output says what" },
        ExitCode { code: INTERRUPTED, means: "interrupted" },
    ],
    run,
};

const POINT_ONLY: crate::args::Flag =
    crate::args::Flag { help: "only this restore point, and those that it stands on", ..POINT };

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let [name] = &parsed.operands[..] else {
        return Err(CliError::usage("Expecting one folder of restore points"));
    };
    let mut meter = Meter::new(tool, parsed, "verify")?;
    let (folder, points, mut damage) = match parsed.has(POINT.long) {
        true => {
            let (folder, points) = open_point(parsed, name)?;
            (folder, points, Vec::new())
        }
        false => all(name)?,
    };
    let interrupted = Interrupted::watch();
    let read = read(&folder, &points, &mut meter);
    let read = block_on(interrupted.or(read));
    meter.finish(read.is_some());
    damage.extend(read.ok_or_else(|| CliError::new("Interrupted").with_code(INTERRUPTED))?);
    let text = match form {
        Form::Json => output::pretty(&json!({ "points": points.len(), "damage": damage })) + "\n",
        Form::Human if parsed.has("quiet") && damage.is_empty() => String::new(),
        Form::Human => told(points.len(), &damage),
    };
    output::print(&text)?;
    Ok(if damage.is_empty() { 0 } else { DAMAGED })
}

/// Returns all points of a folder, and what keeps any of them from being restored.
fn all(name: &str) -> CliResult<(Folder, Vec<Point>, Vec<String>)> {
    let folder = Folder::open(name.as_ref())?;
    let points = folder.points()?;
    let broken = points.broken.iter().map(|(_, error)| error.to_string());
    let chains = points.sound.iter().filter_map(|point| points.chain(point).err());
    let damage = broken.chain(chains.map(|error| error.to_string())).collect();
    Ok((folder, points.sound, damage))
}

async fn read(folder: &Folder, points: &[Point], meter: &mut Meter) -> Vec<String> {
    let total = points.iter().map(|point| point.manifest.stored_bytes).sum();
    let (mut found, mut before) = (Vec::new(), 0);
    meter.update("read", 0, total);
    for point in points {
        let mut report = |done| meter.update("read", before + done, total);
        let damage = verify(folder, point, &mut report).await;
        found.extend(damage.iter().map(|it| it.error.to_string()));
        before += point.manifest.stored_bytes;
    }
    meter.update("read", total, total);
    found
}

fn told(points: usize, damage: &[String]) -> String {
    let mut text: String = damage.iter().map(|line| format!("{}\n", output::tame(line))).collect();
    text += &match damage.len() {
        0 => format!("{points} points, and no damage.\n"),
        count => format!("{points} points, and {count} faults.\n"),
    };
    text
}
