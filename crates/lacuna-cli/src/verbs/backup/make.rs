//! The copy, and what happens when the point counts.

use std::path::Path;

use lacuna::block::Layer;
use lacuna_backup::{
    Changes, CopyOptions, Difference, Everything, Folder, GoOn, Point, Start, UpperLevels, Work,
};
use pollster::block_on;

use super::super::open::Request;
use super::super::progress::Meter;
use super::super::{Form, form};
use super::asked::Wish;
use super::list;
use super::plan::{Plan, Told};
use super::served::{Moment, Outcome};
use super::source::{Source, nbd};
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::interrupt::{INTERRUPTED, Interrupted};
use crate::output;
use crate::persona::Tool;

/// Makes a point of `name` in `folder`.
pub(super) fn make(tool: &Tool, parsed: &Parsed, name: &str, folder: &Path) -> CliResult<u8> {
    let (shape, wish) = (form(parsed)?, Wish::read(tool, parsed)?);
    let meter = Meter::new(tool, parsed, "backup")?;
    let point = match &wish.control {
        Some(socket) => make_of_moment(tool, parsed, name, folder, &wish, socket, meter)?,
        None => {
            let source = Source::open(tool, parsed, name, &wish)?;
            let folder = open_folder(folder, &wish)?;
            let made = made(parsed, &wish, &source, &folder, meter);
            let closed = source.close();
            let point = made?;
            closed?;
            point
        }
    };
    match shape {
        Form::Json => output::print(&(output::pretty(&list::json(&point)?) + "\n"))?,
        Form::Human if parsed.has("quiet") => {}
        Form::Human => output::print(&list::told(&point))?,
    }
    Ok(0)
}

/// Copies what a server keeps of a disk, and has it give that up.
fn make_of_moment(
    tool: &Tool,
    parsed: &Parsed,
    name: &str,
    folder: &Path,
    wish: &Wish,
    socket: &Path,
    meter: Meter,
) -> CliResult<Point> {
    let mut request = Request::reading(name, parsed, "format")?;
    let export = nbd(&mut request)?.uri.export.as_str().to_owned();
    let folder = open_folder(folder, wish)?;
    let moment = Moment::take(parsed, wish, socket, &export, &folder.points()?)?;
    let made = Source::open_moment(tool, request, name, wish, &moment).and_then(|source| {
        let made = made(parsed, wish, &source, &folder, meter);
        // Nothing was written to it, and an error of the copy says more.
        made.and_then(|point| source.close().map(|()| point))
    });
    let (made, outcome) = match made {
        Ok(point) if point.manifest.facts.begins_bitmap.is_some() => (Ok(point), Outcome::Done),
        Ok(point) => (Ok(point), Outcome::Given),
        Err(error) => (Err(moment.failure().unwrap_or(error)), Outcome::Given),
    };
    if let Err(error) = moment.end(outcome) {
        // A point that counts does so all the same, and what went wrong before is what is told.
        output::warn(&format!("The server keeps the moment: {}", error.text()));
    }
    made
}

fn open_folder(path: &Path, wish: &Wish) -> CliResult<Folder> {
    let folder = Folder::open_or_create(path, wish.form.unwrap_or_default())?;
    match wish.form {
        Some(form) if form != folder.form() => Err(CliError::new(format!(
            "The points of {} are kept as {}, not as {}",
            path.display(),
            folder.form().name(),
            form.name()
        ))
        .with_hint("another folder takes points of another form")),
        _ => {
            // Before a server is asked for anything: what it keeps may be somebody else's to copy.
            folder.lock().map_err(|error| {
                CliError::from(error).with_better_hint("try again when that has ended")
            })?;
            Ok(folder)
        }
    }
}

fn made(
    parsed: &Parsed,
    wish: &Wish,
    source: &Source,
    folder: &Folder,
    mut meter: Meter,
) -> CliResult<Point> {
    let points = folder.points()?;
    for (_, error) in &points.broken {
        output::warn(&error.to_string());
    }
    let plan = Plan::new(wish, source, &points)?;
    let is_named = wish.name.is_some() || source.moment.is_some();
    let go_on = GoOn { is_named, is_unchanged: wish.is_unchanged };
    let total = source.size_bytes();
    let point = block_on(async {
        let mut work = folder.begin(plan.facts.clone(), go_on).await?;
        if !parsed.has("quiet") {
            tell_start(&work);
        }
        let interrupted = Interrupted::watch();
        let mut report = |done| meter.update("copy", done, total);
        let copied = copy(&mut work, source, &plan.told, wish.copy, &mut report);
        interrupted.or(copied).await.ok_or_else(|| interrupted_copy(source))??;
        meter.update("finish", 0, total);
        let point = work.finish().await?;
        // The point counts by now: where this fails, the next one holds more than it had to.
        if let Some(bitmap) = &plan.begins {
            source.image()?.clear_bitmap(bitmap).await?;
        }
        Ok::<_, CliError>(point)
    });
    meter.finish(point.is_ok());
    point
}

fn interrupted_copy(source: &Source) -> CliError {
    if source.moment.is_some() {
        let text = "Interrupted; the server gives up the moment, and half a copy does not count";
        return CliError::new(text)
            .with_code(INTERRUPTED)
            .with_hint("run it again, and it copies another moment");
    }
    CliError::new("Interrupted; what was copied is kept, and does not count yet")
        .with_code(INTERRUPTED)
        .with_hint("run it again, and it goes on from here")
}

fn tell_start(work: &Work<'_>) {
    let (point, size) = (&work.facts().point, work.facts().size);
    match work.start() {
        Start::New => {}
        Start::Instead(other) => output::warn(&format!(
            "The copy '{other}' that was cut off is of something else, or its source may have \
             changed since: '{point}' begins anew"
        )),
        Start::Resumed(at) => {
            output::warn(&format!("Point '{point}' goes on at {} of {size} bytes", at.0));
        }
    }
}

async fn copy(
    work: &mut Work<'_>,
    source: &Source,
    told: &Told,
    options: CopyOptions,
    report: &mut (dyn FnMut(u64) + Send),
) -> lacuna::Result<()> {
    let disk = source.disk();
    match told {
        Told::All => copy_by(work, disk, &Everything, options, report).await,
        Told::Bitmap(bitmap) => copy_by(work, disk, bitmap, options, report).await,
        Told::Export(changes) => copy_by(work, disk, changes, options, report).await,
        Told::Levels(count) => {
            copy_by(work, disk, &UpperLevels { disk, count: *count }, options, report).await
        }
        Told::Snapshot(before) => {
            copy_by(work, disk, &Difference { before, now: disk }, options, report).await
        }
    }
}

async fn copy_by<L: Layer, C: Changes>(
    work: &mut Work<'_>,
    disk: &L,
    changes: &C,
    options: CopyOptions,
    report: &mut (dyn FnMut(u64) + Send),
) -> lacuna::Result<()> {
    work.copy(disk, changes, options, report).await
}
