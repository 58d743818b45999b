//! Disks as they were at one moment, each an export of its own beside the one whose disk it is.
//!
//! * Always: one is made or removed at a time.
//! * Always: what becomes of bitmaps is durable before a point is gone.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use lacuna::ErrorKind;
use lacuna::block::{Layer, PointOptions, WhenFull};
use lacuna::qcow2::NewBitmap;
use lacuna::raw::Raw;
use lacuna_export::{Export, ExportOptions, Server};
use pollster::block_on;
use serde_json::{Value, json};

use super::Exported;
use super::arguments::invalid;
use crate::error::{CliError, CliResult};
use crate::verbs::serve::point::{Asked, PointDisk};
use crate::verbs::serve::{ChainDisk, Served};
use crate::verbs::unnamed;

/// A point that somebody asks for.
pub(super) struct Wanted {
    pub(super) name: String,
    pub(super) bitmaps: Vec<String>,
    pub(super) new_bitmaps: Vec<String>,
    /// Bytes for a bit of new bitmaps.
    pub(super) granularity_bytes: Option<u64>,
    /// Where what is saved goes.
    pub(super) folder: PathBuf,
    pub(super) space_bytes: Option<u64>,
    pub(super) when_full: WhenFull,
}

/// What it was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Given,
}

/// The points of a server.
#[derive(Default)]
pub(super) struct Points {
    all: Mutex<Vec<Arc<Kept>>>,
    /// Of those who make or remove one.
    turn: Mutex<()>,
}

/// A point that is there.
struct Kept {
    name: String,
    of: Exported,
    export: Exported,
    since: SystemTime,
    bitmaps: Vec<String>,
    new_bitmaps: Vec<String>,
}

impl Points {
    /// Makes one; tells of it.
    pub(super) fn add(
        &self,
        server: &Server<Served>,
        of: &Exported,
        wanted: Wanted,
    ) -> CliResult<Value> {
        let _turn = self.turn();
        let chain = of.disk().as_chain().ok_or_else(|| of_a_point(of))?;
        let name = format!("{}@{}", of.name().as_str(), wanted.name);
        if server.exports().all().iter().any(|export| export.name().as_str() == name) {
            return Err(invalid(format!("There is an export '{name}' already")));
        }
        let asked = asked(&wanted)?;
        let file = unnamed::file(&wanted.folder, "a file for what a point saves")?;
        let scratch = block_on(Raw::create(file, chain.size_bytes()))?;
        let disk = block_on(chain.point(scratch, &asked))?;
        let export = Export::new(&name, Served::Point(disk), options(of, &wanted.name))?;
        let export = server.exports().add(export)?;
        let kept = Arc::new(Kept {
            name: wanted.name,
            of: Arc::clone(of),
            export,
            since: SystemTime::now(),
            bitmaps: wanted.bitmaps,
            new_bitmaps: wanted.new_bitmaps,
        });
        let told = kept.value();
        self.all().push(kept);
        Ok(told)
    }

    /// Takes one away.
    pub(super) fn remove(
        &self,
        server: &Server<Served>,
        of: &Exported,
        name: &str,
        outcome: Outcome,
    ) -> CliResult<Value> {
        let _turn = self.turn();
        let kept = self.find(of, name)?;
        if outcome == Outcome::Done {
            kept.finish()?;
        }
        self.all().retain(|other| !Arc::ptr_eq(other, &kept));
        kept.take_down(server, outcome)?;
        Ok(json!({ "point": name, "export": of.name().as_str(), "removed": true }))
    }

    /// Changes how much one may save; tells of it.
    pub(super) fn change(&self, of: &Exported, name: &str, space_bytes: u64) -> CliResult<Value> {
        let kept = self.find(of, name)?;
        if let Some(disk) = kept.export.disk().as_point() {
            disk.set_space(space_bytes);
        }
        Ok(kept.value())
    }

    /// Tells of all, or of those of one export.
    pub(super) fn list(&self, of: Option<&Exported>) -> Vec<Value> {
        let all = self.all();
        let asked = all.iter().filter(|kept| of.is_none_or(|of| Arc::ptr_eq(of, &kept.of)));
        asked.map(|kept| kept.value()).collect()
    }

    /// Refuses what ends the disk of an export, as it is, where a point needs it, or is it.
    pub(super) fn refuse_removal(&self, export: &Exported) -> CliResult<()> {
        if export.disk().as_point().is_some() {
            return Err(of_a_point(export));
        }
        match self.all().iter().find(|kept| Arc::ptr_eq(&kept.of, export)) {
            None => Ok(()),
            Some(kept) => Err(CliError::new(format!(
                "Export {} has point {}, which needs its disk",
                export.name(),
                kept.name
            ))
            .with_class(ErrorKind::Busy)
            .with_hint("`lacuna ctl point --remove` takes it away")),
        }
    }

    /// Does something to a disk of which there is no point, nor comes to be one meanwhile.
    pub(super) fn without<T>(
        &self,
        export: &Exported,
        work: impl FnOnce() -> CliResult<T>,
    ) -> CliResult<T> {
        let _turn = self.turn();
        self.refuse_removal(export)?;
        work()
    }

    /// Keeps guests waiting no more.
    pub(super) fn release(&self) {
        self.all().iter().filter_map(|kept| kept.export.disk().as_point()).for_each(PointDisk::end);
    }

    /// Takes all away, as given up. The first failure is told.
    pub(super) fn end(&self, server: &Server<Served>) -> CliResult<()> {
        let all = std::mem::take(&mut *self.all());
        let taken = all.iter().map(|kept| kept.take_down(server, Outcome::Given));
        taken.fold(Ok(()), CliResult::and)
    }

    fn find(&self, of: &Exported, name: &str) -> CliResult<Arc<Kept>> {
        let all = self.all();
        let found = all.iter().find(|kept| kept.name == name && Arc::ptr_eq(&kept.of, of));
        found.map(Arc::clone).ok_or_else(|| {
            CliError::new(format!("Export {} has no point '{name}'", of.name()))
                .with_class(ErrorKind::NotFound)
                .with_hint("`lacuna ctl point` lists them")
        })
    }

    fn all(&self) -> MutexGuard<'_, Vec<Arc<Kept>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Has frozen bitmaps name what changed since.
    fn finish(&self) -> CliResult<()> {
        let Some(disk) = self.export.disk().as_point() else { return Ok(()) };
        match disk.status().broken {
            None => Ok(block_on(disk.finish())?),
            Some(error) => Err(CliError::new(format!(
                "Point {} broke, so that what it was for is not done: {error}",
                self.name
            ))
            .with_class(ErrorKind::InvalidRequest)
            .with_hint("without --done (\"done\": true) it is removed")),
        }
    }

    /// Lets nobody read it any more, and ends it.
    fn take_down(&self, server: &Server<Served>, outcome: Outcome) -> CliResult<()> {
        self.export.retire();
        server.exports().remove(self.export.name().as_str());
        server.disconnect(&self.export);
        if let Some(disk) = self.export.disk().as_point() {
            disk.end();
        }
        match (outcome, self.of.disk().as_chain().and_then(ChainDisk::image)) {
            (Outcome::Given, Some(image)) => {
                let removed = self
                    .new_bitmaps
                    .iter()
                    .map(|name| block_on(image.remove_bitmap(&name.as_str().into())));
                Ok(removed.fold(Ok(()), lacuna::Result::and)?)
            }
            _ => Ok(()),
        }
    }

    fn value(&self) -> Value {
        let status = self.export.disk().as_point().map(PointDisk::status);
        let broken = status.as_ref().and_then(|status| status.broken.clone());
        let waits = self.export.disk().as_point().map(PointDisk::when_full);
        let since = self.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        json!({
            "point": self.name,
            "export": self.of.name().as_str(),
            "point_export": self.export.name().as_str(),
            "size": self.export.disk().size_bytes(),
            "since": since.as_secs(),
            "state": if broken.is_some() { "broken" } else { "kept" },
            "error": broken.map_or(Value::Null, |error| why_broken(error).value()),
            "saved_bytes": status.as_ref().map(|status| status.saved_bytes),
            "space": status.as_ref().map(|status| status.space_bytes),
            "when_full": if waits == Some(WhenFull::Wait) { "wait" } else { "break" },
            "waiting": status.as_ref().map(|status| status.waiting),
            "clients": self.export.clients().now,
            "bitmaps": self.bitmaps,
            "new_bitmaps": self.new_bitmaps,
        })
    }
}

fn why_broken(error: lacuna::Error) -> CliError {
    CliError::from(error)
        .with_hint("remove it; another one may have more --space, or another folder")
}

/// Finds out what a point gets that somebody asks for.
fn asked(wanted: &Wanted) -> CliResult<Asked> {
    let space_bytes = match wanted.space_bytes {
        Some(bytes) => bytes,
        None => free_bytes(wanted)? / 2,
    };
    let new = |name: &String| NewBitmap {
        granularity_bytes: wanted.granularity_bytes,
        ..NewBitmap::new(name.as_str())
    };
    Ok(Asked {
        options: PointOptions { space_bytes, when_full: wanted.when_full },
        bitmaps: wanted.bitmaps.clone(),
        new_bitmaps: wanted.new_bitmaps.iter().map(new).collect(),
    })
}

fn free_bytes(wanted: &Wanted) -> CliResult<u64> {
    let doing = || format!("Asking what is free in {}", wanted.folder.display());
    let found = rustix::fs::statvfs(&wanted.folder)
        .map_err(|error| lacuna::Error::io(error.into(), doing()))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Says how a point is served.
fn options(of: &Exported, name: &str) -> ExportOptions {
    ExportOptions {
        description: Some(format!("{} as it was at point {name}", of.name())),
        read_only: true,
        allocation_depth: false,
        layers: None,
        block_sizes: of.options().block_sizes,
        is_companion: true,
        ..ExportOptions::default()
    }
}

fn of_a_point(export: &Exported) -> CliError {
    CliError::new(format!("Export {} is a point in time", export.name()))
        .with_class(ErrorKind::InvalidRequest)
        .with_hint("`lacuna ctl point --remove` takes it away")
}
