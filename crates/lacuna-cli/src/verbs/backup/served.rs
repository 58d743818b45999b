//! A disk that is served: the server keeps what it is at one moment for as long as it is copied.
//!
//! * Always: the point of the server has the name of the restore point. So a run after one that was
//!   killed finds it, and goes on with the same moment.
//! * Always: what was frozen at the moment begins there once the restore point counts, and goes on as
//!   if nothing had been where it does not.

use std::path::{Path, PathBuf};

use lacuna_backup::{Point, PointName, Points};
use serde_json::{Map, Value, json};

use super::asked::{By, Wish};
use super::plan;
use crate::args::Parsed;
use crate::control::{Conversation, commands};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::size;

/// The command of the control socket.
const POINT: &str = "point";

/// A moment of a served disk.
#[derive(Clone)]
pub(super) struct Moment {
    server: Server,
    /// What the restore point is called, and the point of the server.
    pub(super) name: PointName,
    /// The export that has the disk of the moment.
    pub(super) export: String,
    /// When it was, in seconds since 1970.
    pub(super) since: u64,
    /// Tells it from every other one.
    pub(super) identity: String,
}

/// What becomes of what was frozen at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It begins there.
    Done,
    /// It goes on as if the moment had never been.
    Given,
}

/// The server of an export.
#[derive(Clone)]
struct Server {
    socket: PathBuf,
    export: String,
}

impl Moment {
    /// Finds the moment that a run which was killed was copying; else has the server keep the disk as
    /// it is now.
    pub(super) fn take(
        parsed: &Parsed,
        wish: &Wish,
        socket: &Path,
        export: &str,
        points: &Points,
    ) -> CliResult<Self> {
        let server = Server { socket: socket.to_owned(), export: export.to_owned() };
        // What cannot be is refused before anything is asked of the server.
        let below = match &wish.by {
            By::Bitmap { name, is_kept } => plan::began_bitmap(wish, points, name, *is_kept)?,
            _ => None,
        };
        let there = server.points()?;
        for point in &there {
            if let Some(counts) = counting(points, point) {
                // Only the last step was cut off.
                server.remove(counts.name(), outcome_of(counts))?;
            }
        }
        let mut begun = there.iter().filter_map(|point| Some((begun(points, wish, point)?, point)));
        if let Some((name, found)) = begun.next() {
            match found["state"] == "kept" && freezes(found, wish, below.is_some()) {
                true => return server.moment(name, found),
                false => server.remove(&name, Outcome::Given)?,
            }
        }
        let name = wish.name.clone().map_or_else(|| plan::free_name(points, plan::now()), Ok)?;
        let made = server.add(parsed, wish, &name, below.is_some())?;
        server.moment(name, &made)
    }

    /// Has the server give up the moment.
    pub(super) fn end(&self, outcome: Outcome) -> CliResult<()> {
        self.server.remove(&self.name, outcome)
    }

    /// Says why the moment is lost, where it is.
    pub(super) fn failure(&self) -> Option<CliError> {
        let points = self.server.points().ok()?;
        let own = points.iter().find(|point| point["point"] == self.name.as_str())?;
        let is_broken = own["state"] == "broken";
        is_broken.then(|| {
            CliError::from_value(&own["error"])
                .under("The server could not keep what the disk was")
                .with_better_hint("--space gives it more room; --when-full wait has guests wait")
        })
    }
}

/// Returns the restore point for which a point of the server was made, where it counts by now.
fn counting<'a>(points: &'a Points, point: &Value) -> Option<&'a Point> {
    let facts = |it: &&Point| it.manifest.facts.identity.as_deref() == identity(point).as_deref();
    points.sound.iter().filter(|it| point["point"] == it.name().as_str()).find(facts)
}

/// Returns the name of a copy that was cut off, and whose moment the server still keeps.
fn begun(points: &Points, wish: &Wish, point: &Value) -> Option<PointName> {
    let mut begun = points.begun.iter().filter(|name| point["point"] == name.as_str());
    let is_it = |name: &&PointName| wish.name.as_ref().is_none_or(|wanted| wanted == *name);
    begun.find(is_it).cloned()
}

/// Says whether the bitmap that is wanted was frozen, or made, at a moment.
fn freezes(point: &Value, wish: &Wish, is_incremental: bool) -> bool {
    let By::Bitmap { name, .. } = &wish.by else { return true };
    let has = |member: &str| {
        point[member].as_array().is_some_and(|names| names.iter().any(|it| it == name.as_str()))
    };
    has("bitmaps") || (!is_incremental && has("new_bitmaps"))
}

/// Returns what becomes of what was frozen for a point that counts.
fn outcome_of(point: &Point) -> Outcome {
    match point.manifest.facts.begins_bitmap {
        Some(_) => Outcome::Done,
        None => Outcome::Given,
    }
}

/// No other moment has the same name, export and time.
fn identity(point: &Value) -> Option<String> {
    let (name, export) = (point["point"].as_str()?, point["export"].as_str()?);
    Some(format!("{name} of export '{}' at {}", output::tame(export), point["since"].as_u64()?))
}

impl Server {
    fn ask(&self, arguments: Value) -> CliResult<Value> {
        let mut members = Map::from_iter([("export".to_owned(), self.export.as_str().into())]);
        if let Value::Object(more) = arguments {
            members.extend(more);
        }
        // A copy takes longer than the server waits for the next word.
        Conversation::begin(&self.socket)?.ask(POINT, members)
    }

    fn points(&self) -> CliResult<Vec<Value>> {
        match self.ask(json!({}))?["points"].take() {
            Value::Array(points) => Ok(points),
            _ => Err(no_sense()),
        }
    }

    fn moment(self, name: PointName, point: &Value) -> CliResult<Moment> {
        let identity = identity(point).ok_or_else(no_sense)?;
        let export = point["point_export"].as_str().ok_or_else(no_sense)?.to_owned();
        let since = point["since"].as_u64().unwrap_or(0);
        Ok(Moment { server: self, name, export, since, identity })
    }

    fn remove(&self, name: &PointName, outcome: Outcome) -> CliResult<()> {
        let done = outcome == Outcome::Done;
        self.ask(json!({ "remove": name.as_str(), "done": done })).map(drop)
    }

    fn add(
        &self,
        parsed: &Parsed,
        wish: &Wish,
        name: &PointName,
        is_incremental: bool,
    ) -> CliResult<Value> {
        let mut arguments = room(parsed)?;
        arguments["add"] = name.as_str().into();
        let By::Bitmap { name: bitmap, .. } = &wish.by else { return self.ask(arguments) };
        let with = |member: &str| {
            let mut arguments = arguments.clone();
            arguments[member] = json!([bitmap]);
            self.ask(arguments)
        };
        match is_incremental {
            true => with("bitmaps"),
            // One that is there already is taken as it is.
            false => with("new_bitmaps").or_else(|error| match error.class() {
                Some(lacuna::ErrorKind::InvalidRequest) => with("bitmaps"),
                _ => Err(error),
            }),
        }
    }
}

/// Returns how much room the server may take, and where.
fn room(parsed: &Parsed) -> CliResult<Value> {
    let mut arguments = json!({});
    if let Some(path) = parsed.last(commands::DIRECTORY.long) {
        arguments["directory"] = commands::absolute(path)?.into();
    }
    if let Some(text) = parsed.last(commands::SPACE.long) {
        arguments["space"] = size::within("space", text, 0, i64::MAX as u64)?.into();
    }
    if let Some(word) = parsed.last(commands::WHEN_FULL.long) {
        arguments["when_full"] = word.into();
    }
    Ok(arguments)
}

fn no_sense() -> CliError {
    CliError::new("The server tells of its points in a way that makes no sense")
}
