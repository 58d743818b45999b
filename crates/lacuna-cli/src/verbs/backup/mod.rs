//! `backup`: copies a disk, or what changed of it, into restore points.
//!
//! ```text
//!   asked.rs    what the command line wants
//!      │
//!   source.rs   what is copied, and what tells that it is still the same; export.rs: over NBD
//!      │
//!   served.rs   a moment of a disk that is served
//!      │
//!   plan.rs     full or incremental, by what, and on which point it stands
//!      │
//!   make.rs     the copy, and what happens when the point counts
//!
//!   list.rs     which points there are
//! ```

mod asked;
mod export;
mod list;
mod make;
mod plan;
mod served;
mod source;

use std::path::Path;

use lacuna_backup::{Folder, Point, PointName, Points};

use super::ctl::CONTROL;
use super::{Example, ExitCode, Task, Verb, common};
use crate::args::{Flag, Parsed};
use crate::control::commands::{DIRECTORY, SPACE, WHEN_FULL};
use crate::error::{CliError, CliResult};
use crate::interrupt::INTERRUPTED;
use crate::output;
use crate::persona::Tool;

/// Which point is meant.
pub(super) const POINT: Flag =
    Flag::valued('\0', "point", "NAME", "the restore point (the last one)").long_only();

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "backup",
    task: Task::Make,
    summary: "Add a restore point of a disk; also: restore, verify",
    operands: "SOURCE FOLDER | --list FOLDER",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('l', "source-snapshot", "SNAPSHOT", "copy this internal snapshot of SOURCE"),
        Flag::valued('B', "bitmap", "NAME", "what this dirty bitmap names; all where it begins"),
        Flag::switch('\0', "keep-bitmap", "the next point holds what is copied now once more")
            .long_only(),
        Flag::valued('\0', "since-snapshot", "SNAPSHOT", "what differs from a snapshot of SOURCE")
            .long_only(),
        Flag::valued('\0', "levels", "COUNT", "what the COUNT highest images of its chain hold")
            .long_only(),
        Flag::valued('\0', "since", "POINT", "the point that it stands on (the last that fits)")
            .long_only(),
        Flag::switch('\0', "full", "copy all, though a point is there to stand on").long_only(),
        Flag::valued('O', "target-format", "FORM", "of a new FOLDER: segments (default) or qcow2"),
        Flag::valued('\0', "level", "NUMBER", "how hard zstd tries, 1 to 22 (3)").long_only(),
        Flag::valued('\0', "segment-size", "SIZE", "stored bytes of a segment at most (64M)")
            .long_only(),
        Flag::valued('\0', "point", "NAME", "what to call the point (the time)").long_only(),
        Flag::switch('\0', "unchanged", "SOURCE is what it was when the last try was cut off")
            .long_only(),
        Flag {
            help: "SOURCE is an export of the server with this socket: copy one moment",
            ..CONTROL
        },
        Flag { help: "with --control: where the server saves what guests overwrite", ..DIRECTORY },
        Flag { help: "with --control: how much it may save there", ..SPACE },
        Flag { help: "with --control: what happens then, to the copy or guests", ..WHEN_FULL },
        Flag::switch('\0', "list", "list the points of FOLDER").long_only(),
        common::FORCE_SHARE,
        common::OUTPUT,
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example { shows: "all of a disk", line: "disk.qcow2 backup" },
        Example {
            shows: "every night: all the first time, then what changed since",
            line: "--bitmap nightly disk.qcow2 nights",
        },
        Example {
            shows: "a snapshot, as qcow2 images that stand on each other",
            line: "-O qcow2 -l monday snapshots.qcow2 chain",
        },
        Example {
            shows: "which points are there? for programs",
            line: "--list --output=json points",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "done" },
        ExitCode { code: 1, means: "not done; standard error says why" },
        ExitCode { code: INTERRUPTED, means: "interrupted; run it again, and it goes on" },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    match (parsed.has("list"), &parsed.operands[..]) {
        (true, [folder]) => list::list(parsed, Path::new(folder)),
        (true, _) => Err(CliError::usage("Expecting one folder of restore points")),
        (false, [source, folder]) => make::make(tool, parsed, source, Path::new(folder)),
        (false, _) => Err(CliError::usage("Expecting a source and a folder for restore points")),
    }
}

/// Opens a folder of points, and finds one of them with those below.
pub(super) fn open_point(parsed: &Parsed, folder: &str) -> CliResult<(Folder, Vec<Point>)> {
    let (folder, points) = open(Path::new(folder))?;
    let name = parsed.last(POINT.long).map(PointName::new).transpose()?;
    let chain = points.find(name.as_ref()).and_then(|point| points.chain(point));
    let chain = chain.map_err(|error| {
        CliError::from(error).with_hint("`lacuna backup --list FOLDER` lists the points there are")
    })?;
    Ok((folder, chain))
}

/// Opens a folder of points, and says which of them are broken.
fn open(path: &Path) -> CliResult<(Folder, Points)> {
    let folder = Folder::open(path)?;
    let points = folder.points()?;
    for (_, error) in &points.broken {
        output::warn(&error.to_string());
    }
    Ok((folder, points))
}
