//! Decides what a new point is: full or incremental, by what, and on which point it stands.

use std::time::{SystemTime, UNIX_EPOCH};

use lacuna::qcow2::format::StoredName;
use lacuna::qcow2::{DirtyBitmap, NewBitmap, SnapshotChoice, SnapshotLayer};
use lacuna::{Error, ErrorKind};
use lacuna_backup::{Basis, Point, PointFacts, PointName, Points};
use pollster::block_on;

use super::asked::{By, Wish};
use super::export::{ExportChanges, Question};
use super::source::Source;
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::output;

/// What tells which parts changed.
pub(super) enum Told {
    All,
    Bitmap(DirtyBitmap<AnyStorage>),
    Export(ExportChanges),
    Levels(u32),
    Snapshot(SnapshotLayer<AnyStorage>),
}

/// What is to be made.
pub(super) struct Plan {
    pub(super) facts: PointFacts,
    pub(super) told: Told,
    /// The bitmap that begins anew when the point counts.
    pub(super) begins: Option<StoredName>,
}

impl Plan {
    pub(super) fn new(wish: &Wish, source: &Source, points: &Points) -> CliResult<Self> {
        let below = Below { wish, points };
        let (below, basis, told) = match &wish.by {
            By::Nothing => (None, Basis::Full, Told::All),
            By::Bitmap { name, is_kept } => below.by_bitmap(source, name, *is_kept)?,
            By::Snapshot(choice) => below.by_snapshot(source, choice)?,
            By::Levels(count) => below.by_levels(source, *count)?,
        };
        let begins = match &wish.by {
            By::Bitmap { name, is_kept: false } if source.begins_bitmaps() => Some(name),
            _ => None,
        };
        let (created, name) = match &source.moment {
            Some(moment) => (moment.since, Some(moment.name.clone())),
            None => (now(), wish.name.clone()),
        };
        let name = name.map_or_else(|| free_name(points, created), Ok)?;
        let facts = PointFacts {
            created,
            basis,
            stands_on: below.map(Point::reference),
            begins_bitmap: begins.cloned(),
            holds_snapshot: source.snapshot.clone(),
            source: output::tame(&source.shown),
            source_format: source.disk().format().name().to_owned(),
            // Asked last: making a bitmap changes the image.
            identity: source.identity(),
            ..PointFacts::full(name, source.size_bytes())
        };
        // A server sees to that when it gives up the moment.
        let begins = begins.filter(|_| source.moment.is_none());
        Ok(Self { facts, told, begins: begins.map(|name| name.as_str().into()) })
    }
}

type Incremental<'a> = (Option<&'a Point>, Basis, Told);

/// Looks for the point to stand on.
struct Below<'a> {
    wish: &'a Wish,
    points: &'a Points,
}

impl<'a> Below<'a> {
    /// Returns the last point for which `fits` holds; where one was named, that one, if it fits.
    fn find(&self, fits: impl Fn(&PointFacts) -> bool) -> CliResult<Option<&'a Point>> {
        let fits = |point: &&Point| fits(&point.manifest.facts);
        match &self.wish.since {
            None => Ok(self.points.sound.iter().rev().find(fits)),
            Some(name) => Ok(Some(self.points.find(Some(name))?).filter(fits)),
        }
    }

    fn by_bitmap(&self, source: &Source, name: &str, is_kept: bool) -> CliResult<Incremental<'a>> {
        let basis = Basis::Bitmap { name: name.to_owned() };
        if let Some(export) = &source.export {
            let below = match source.moment {
                Some(_) => began_bitmap(self.wish, self.points, name, is_kept)?,
                // Which point the bitmap of a server began at is known to whoever made it.
                None => Some(self.required(|_| true, || no_point("to stand on"))?),
            };
            let Some(below) = below else { return Ok((None, Basis::Full, Told::All)) };
            let question = Question::Dirty(name.to_owned());
            let told = block_on(ExportChanges::open(export, question))?;
            return Ok((Some(below), basis, Told::Export(told)));
        }
        match began_bitmap(self.wish, self.points, name, is_kept)? {
            None => self.begin_bitmap(source, name),
            Some(below) => {
                let bitmap = block_on(self.bitmap(source, name, is_kept));
                let bitmap = bitmap.map_err(|error| lost_bitmap(error, name, below.name()))?;
                Ok((Some(below), basis, Told::Bitmap(bitmap)))
            }
        }
    }

    /// Opens a bitmap, which is to be one that goes on recording where it is to begin anew.
    async fn bitmap(
        &self,
        source: &Source,
        name: &str,
        is_kept: bool,
    ) -> CliResult<DirtyBitmap<AnyStorage>> {
        let (image, stored) = (source.image()?, StoredName::from(name));
        let all = image.bitmaps().await?;
        let records = all.iter().any(|it| it.name == stored && it.is_enabled);
        let bitmap = image.bitmap(&stored).await?;
        match records || is_kept {
            true => Ok(bitmap),
            false => Err(CliError::new(format!("Bitmap '{name}' is disabled: it records nothing"))
                .with_class(ErrorKind::InvalidRequest)
                .with_hint(
                    "`lacuna bitmap --enable` has it record; --keep-bitmap leaves it alone",
                )),
        }
    }

    /// Has a bitmap at hand before the first byte is copied, so that nothing is missed afterwards.
    fn begin_bitmap(&self, source: &Source, name: &str) -> CliResult<Incremental<'a>> {
        let image = source.image()?;
        let stored = StoredName::from(name);
        match block_on(image.bitmaps())?.iter().any(|it| it.name == stored) {
            true => block_on(self.bitmap(source, name, false)).map(drop)?,
            false => block_on(image.add_bitmap(&NewBitmap::new(name)))?,
        }
        Ok((None, Basis::Full, Told::All))
    }

    fn by_snapshot(&self, source: &Source, choice: &SnapshotChoice) -> CliResult<Incremental<'a>> {
        let since = source.snapshot_facts(choice)?;
        let below = self.required(
            |facts| facts.holds_snapshot.as_ref() == Some(&since),
            || {
                no_point(&format!("that holds snapshot '{}' of {}", since.name, source.shown))
                    .with_better_hint(format!("`lacuna backup -l {} ...` makes one", since.name))
            },
        )?;
        let layer = block_on(source.image()?.snapshot(choice))?;
        Ok((Some(below), Basis::Snapshot { since }, Told::Snapshot(layer)))
    }

    fn by_levels(&self, source: &Source, count: u32) -> CliResult<Incremental<'a>> {
        let below = self.required(|_| true, || no_point("to stand on"))?;
        let basis = Basis::Levels { count };
        if let Some(export) = &source.export {
            let told = block_on(ExportChanges::open(export, Question::Levels(count)))?;
            return Ok((Some(below), basis, Told::Export(told)));
        }
        let levels = source.chain.levels().len();
        match (count as usize) < levels {
            true => Ok((Some(below), basis, Told::Levels(count))),
            false => Err(CliError::new(format!(
                "The chain of {} has {levels} images: below {count} of them there is none that a \
                 point could hold",
                source.shown
            ))
            .with_class(ErrorKind::InvalidRequest)),
        }
    }

    fn required(
        &self,
        fits: impl Fn(&PointFacts) -> bool,
        missing: impl FnOnce() -> CliError,
    ) -> CliResult<&'a Point> {
        self.find(fits)?.ok_or_else(missing)
    }
}

/// Returns the point at which a bitmap began, if it is to be stood on; nothing where all is copied.
pub(super) fn began_bitmap<'a>(
    wish: &'a Wish,
    points: &'a Points,
    name: &str,
    is_kept: bool,
) -> CliResult<Option<&'a Point>> {
    let begun = |facts: &PointFacts| facts.begins_bitmap.as_deref() == Some(name);
    let below = Below { wish, points }.find(begun)?.filter(|_| !wish.is_full);
    match below.is_none() && (is_kept || wish.since.is_some()) {
        false => Ok(below),
        true => Err(no_point(&format!("that began bitmap '{name}'"))
            .with_better_hint("without --keep-bitmap and --since, all is copied and it begins")),
    }
}

fn no_point(what: &str) -> CliError {
    CliError::from(Error::new(ErrorKind::NotFound, format!("There is no restore point {what}")))
        .with_hint("an incremental point needs one below; without options, all is copied")
}

fn lost_bitmap(error: CliError, name: &str, point: &PointName) -> CliError {
    error
        .under(format!("What changed since point '{point}' is not known by bitmap '{name}'"))
        .with_hint("--full copies all, and begins the bitmap anew")
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Names a point by the time, with a number behind it where one of that second is there.
pub(super) fn free_name(points: &Points, created: u64) -> CliResult<PointName> {
    let time = output::date(created).replace(' ', "T").replace(':', "") + "Z";
    let is_taken = |name: &str| {
        points.sound.iter().any(|point| point.name().as_str() == name)
            || points.broken.iter().any(|(broken, _)| broken == name)
    };
    let numbered = (2_u32..).map(|number| format!("{time}-{number}"));
    let mut names = std::iter::once(time.clone()).chain(numbered);
    let name = names.find(|name| !is_taken(name)).unwrap_or_default();
    Ok(PointName::new(name)?)
}
