//! A point that is being made: begun, gone on with after a cut, and made to count.
//!
//! * Always: what a point was begun as is durable before its first byte, and the manifest is written
//!   when all that it names is durable. A cut at any place leaves no point, or a whole one.
//! * Always: a copy goes on only where the source is known to be what it was; else it begins anew.
//! * Never: a file of a point that counts is changed.

use lacuna::block::Layer;
use lacuna::units::GuestOffset;
use lacuna::{Error, Result};

use crate::changes::Changes;
use crate::checksum::Checksum;
use crate::copy::{self, CopyOptions};
use crate::cut::Cutter;
use crate::durable;
use crate::folder::{Folder, Point, Points};
use crate::image::ImageKeeper;
use crate::name::PointName;
use crate::place::{Host, Place};
use crate::point::{Begun, Form, Manifest, PointFacts};
use crate::sealed;
use crate::segments::SegmentKeeper;

/// When a copy that was cut off goes on.
///
/// ```
/// assert!(!lacuna_backup::GoOn::default().is_unchanged);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct GoOn {
    /// Only one of the same name; else whatever its name was.
    pub is_named: bool,
    /// The caller vouches that the source is what it was, where nothing else can tell.
    pub is_unchanged: bool,
}

/// How a point was begun.
///
/// Returned by [`Work::start`]; see [`Folder`](crate::Folder) for the whole way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// From the beginning, as nothing was there to go on with.
    New,
    /// From the beginning, instead of a copy of this name, of something else or of what may have
    /// changed since.
    Instead(PointName),
    /// Where a copy was cut off.
    Resumed(GuestOffset),
}

/// A point that is being made. Others are kept from adding points until it is dropped.
///
/// See [`Folder`](crate::Folder) for an example.
pub struct Work<'a, P: Place = Host> {
    folder: &'a Folder<P>,
    facts: PointFacts,
    start: Start,
    /// Where the disk of the point below ends: what lies behind that was nowhere.
    known: GuestOffset,
    kept: Kept<P>,
}

enum Kept<P: Place> {
    Segments(Box<SegmentKeeper<P>>),
    Image(Box<ImageKeeper<P>>),
}

impl<P: Place> Folder<P> {
    /// Begins a point, or goes on with one that was begun as the same and cut off. What else was
    /// begun and does not count is removed.
    ///
    /// # Errors
    /// `Busy` where somebody else makes one; `InvalidRequest` for a name that is taken; what
    /// [`Points::chain`] gives for the point below; else what writing gives.
    pub async fn begin(&self, mut facts: PointFacts, go_on: GoOn) -> Result<Work<'_, P>> {
        self.lock()?;
        let points = self.points()?;
        let known = GuestOffset(self.size_below(&points, &facts)?);
        facts.number = points.sound.last().map_or(0, |point| point.manifest.facts.number) + 1;
        let (found, mut start) = self.leftover(&facts, go_on)?;
        if let Some((begun, seal)) = found {
            let kept = self.keeper(&begun.facts, known, seal).await?;
            start = Start::Resumed(kept.position());
            return Ok(Work { folder: self, facts: begun.facts, start, known, kept });
        }
        let is_taken = points.sound.iter().map(|point| point.name().as_str());
        let mut is_taken = is_taken.chain(points.broken.iter().map(|(name, _)| name.as_str()));
        if is_taken.any(|name| name == facts.point.as_str()) {
            let text = format!("There is a restore point '{}' already", facts.point);
            return Err(Error::invalid(text));
        }
        let begun = Begun::new(facts);
        let (bytes, seal) = sealed::encode(&begun)?;
        durable::replace(self.place(), &self.file(&begun.facts.point, "begun"), &bytes).await?;
        let kept = self.keeper(&begun.facts, known, seal).await?;
        Ok(Work { folder: self, facts: begun.facts, start, known, kept })
    }

    /// Returns the size of the disk at the point below, which has to be whole down to a full one.
    fn size_below(&self, points: &Points, facts: &PointFacts) -> Result<u64> {
        let Some(below) = &facts.stands_on else { return Ok(0) };
        let point = points.find(Some(&below.point))?;
        if point.checksum != below.checksum {
            return Err(Error::corrupt(format!("Point '{}' is another one by now", below.point)));
        }
        points.chain(point)?;
        Ok(point.manifest.facts.size)
    }

    /// Looks through what was begun: finds the one to go on with, and removes all else that does not
    /// count.
    fn leftover(
        &self,
        facts: &PointFacts,
        go_on: GoOn,
    ) -> Result<(Option<(Begun, Checksum)>, Start)> {
        let (mut found, mut start) = (None, Start::New);
        for (name, ending) in self.names()? {
            let ("begun", Ok(name)) = (ending.as_str(), PointName::new(name)) else { continue };
            if self.place().has(&self.file(&name, "json")) {
                // It counts; only tidying up was cut off.
                continue;
            }
            let begun = sealed::read::<Begun>(self.place(), &self.file(&name, "begun")).ok();
            match begun.filter(|(begun, _)| found.is_none() && goes_on(begun, &name, facts, go_on))
            {
                Some(begun) => found = Some(begun),
                None => start = Start::Instead(name),
            }
        }
        self.tidy_up(found.as_ref().map(|(begun, _)| &begun.facts.point))?;
        Ok((found, start))
    }

    /// Removes what belongs to points that do not count, but for one; of those that do, what was there
    /// to make them.
    fn tidy_up(&self, kept: Option<&PointName>) -> Result<()> {
        for (name, ending) in self.names()? {
            let Ok(name) = PointName::new(name) else { continue };
            let counts = self.place().has(&self.file(&name, "json"));
            let is_needed = match Role::of(&ending) {
                None => true,
                Some(Role::Content) => counts,
                Some(Role::Making) => false,
            };
            if !is_needed && kept != Some(&name) {
                self.place().remove(&self.file(&name, &ending))?;
            }
        }
        Ok(())
    }

    async fn keeper(
        &self,
        facts: &PointFacts,
        known: GuestOffset,
        seal: Checksum,
    ) -> Result<Kept<P>> {
        Ok(match self.form() {
            Form::Segments => Kept::Segments(Box::new(
                SegmentKeeper::open(self, &facts.point, known, seal).await?,
            )),
            Form::Qcow2 => Kept::Image(Box::new(ImageKeeper::open(self, facts, known).await?)),
        })
    }
}

/// What a file of a point is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It holds what the point holds.
    Content,
    /// It is needed until the point counts.
    Making,
}

impl Role {
    /// Returns that of a file by the end of its name; nothing where it is none of ours, and for
    /// manifests, which stay.
    fn of(ending: &str) -> Option<Self> {
        let whole = ending.strip_suffix(".part").unwrap_or(ending);
        let is_segment = whole.strip_suffix(".seg").is_some_and(|number| {
            number.len() >= 6 && number.bytes().all(|byte| byte.is_ascii_digit())
        });
        match whole {
            "begun" | "done" => Some(Self::Making),
            "json" | "qcow2" if whole != ending => Some(Self::Making),
            _ if is_segment && whole != ending => Some(Self::Making),
            "qcow2" => Some(Self::Content),
            _ => is_segment.then_some(Self::Content),
        }
    }
}

fn goes_on(begun: &Begun, name: &PointName, wanted: &PointFacts, go_on: GoOn) -> bool {
    let is_it = !go_on.is_named || *name == wanted.point;
    begun.facts.point == *name && is_it && begun.facts.goes_on_as(wanted, go_on.is_unchanged)
}

impl<P: Place> Kept<P> {
    fn position(&self) -> GuestOffset {
        match self {
            Self::Segments(keeper) => keeper.position(),
            Self::Image(keeper) => keeper.position(),
        }
    }
}

impl<P: Place> Work<'_, P> {
    /// Returns what the point was begun as: that of the copy that goes on, where one does.
    #[must_use]
    pub const fn facts(&self) -> &PointFacts {
        &self.facts
    }

    /// Says how it was begun.
    #[must_use]
    pub const fn start(&self) -> &Start {
        &self.start
    }

    /// Copies what changed, from where a copy was cut off; `progress` is told how many bytes of the
    /// disk are done.
    ///
    /// # Errors
    /// `InvalidRequest` where the source has another size than the point was begun with; else what
    /// reading, asking for changes and writing give. What was copied is kept for the next run.
    pub async fn copy<L: Layer, C: Changes>(
        &mut self,
        source: &L,
        changes: &C,
        options: CopyOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<()> {
        if source.size_bytes() != self.facts.size {
            return Err(Error::invalid(format!(
                "The source has {} bytes, and the point was begun with {}",
                source.size_bytes(),
                self.facts.size
            )));
        }
        let from = self.kept.position();
        let cutter = Cutter::new(source, changes, from, self.known);
        let mut report = |at: GuestOffset| progress(at.0);
        report(from);
        match &mut self.kept {
            Kept::Segments(keeper) => {
                copy::run(source, cutter, &mut **keeper, options, &mut report).await?;
            }
            Kept::Image(keeper) => {
                copy::run(source, cutter, &mut **keeper, options, &mut report).await?;
            }
        }
        report(GuestOffset(self.facts.size));
        Ok(())
    }

    /// Makes the point count, durably. Only after a [`copy`](Self::copy) that succeeded.
    ///
    /// # Errors
    /// What writing gives; the point does not count then.
    pub async fn finish(self) -> Result<Point> {
        let end = GuestOffset(self.facts.size);
        let (totals, content) = match self.kept {
            Kept::Segments(keeper) => keeper.finish(end).await?,
            Kept::Image(keeper) => keeper.finish().await?,
        };
        let manifest = Manifest::new(self.facts, totals, content);
        let (bytes, checksum) = sealed::encode(&manifest)?;
        let name = &manifest.facts.point;
        // Names of files before the one that makes them count.
        let place = self.folder.place();
        place.sync_folder(self.folder.path())?;
        durable::replace(place, &self.folder.file(name, "json"), &bytes).await?;
        place.remove(&self.folder.file(name, "done"))?;
        place.remove(&self.folder.file(name, "begun"))?;
        Ok(Point { manifest, checksum })
    }
}

#[cfg(test)]
mod tests {
    use super::Role;

    #[test]
    fn files_of_others_are_none_of_ours() {
        for ending in ["json", "txt", "qcow2.bak", "seg", "x.seg", "00000.seg", "part", ""] {
            assert_eq!(Role::of(ending), None, "{ending}");
        }
        for ending in ["qcow2", "000000.seg", "1234567.seg"] {
            assert_eq!(Role::of(ending), Some(Role::Content), "{ending}");
            assert_eq!(Role::of(&format!("{ending}.part")), Some(Role::Making), "{ending}");
        }
        for ending in ["begun", "begun.part", "done", "done.part", "json.part"] {
            assert_eq!(Role::of(ending), Some(Role::Making), "{ending}");
        }
    }
}
