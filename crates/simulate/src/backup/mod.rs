//! Restore points of a disk, in a folder that loses what was not flushed.
//!
//! * Always: a point that was acknowledged is there, whole; any that counts is what the disk was.
//! * Always: whatever was cut off, the next point can be made, and is what the disk is.

mod place;

use std::path::Path;

use lacuna::Result;
use lacuna::chain::{self, Allow, ChainOptions, Format};
use lacuna::qcow2::{Access, DirtyExtent};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna_backup::{
    Basis, Changes, CopyOptions, Folder, Form, GoOn, Point, PointDisk, PointFacts, PointName,
    Points, verify,
};
use pollster::block_on;
use testkit::sim::crash;
use testkit::{Random, SparseBytes};

use self::place::SimFolder;
use crate::files::whole;
use crate::history::Fill;
use crate::scenario::{Backups, Round};
use crate::{Looks, Tally, world};

const PATH: &str = "points";
/// Parts of the disk that are told apart by changes.
const UNIT: u64 = 512;
/// States of the folder that one crash chooses from.
const STATES: usize = 12;

/// A point, and what it must hold.
#[derive(Clone, Debug)]
struct Known {
    name: PointName,
    content: Vec<u8>,
}

/// A disk, and the folder of its points.
struct Archive<'a> {
    backups: &'a Backups,
    looks: &'a Looks,
    disk: Vec<u8>,
    /// Another one for each state of the disk.
    identity: u64,
    files: Vec<(String, SparseBytes)>,
    /// Those that were acknowledged, or found after a crash.
    known: Vec<Known>,
    tally: Tally,
}

/// Makes points, with cuts of power in between.
///
/// # Errors
/// What must not be, and in which round.
pub(crate) fn run(backups: &Backups, looks: &Looks) -> std::result::Result<Tally, String> {
    let mut archive = Archive {
        backups,
        looks,
        disk: vec![0; backups.size_bytes as usize],
        identity: 0,
        files: Vec::new(),
        known: Vec::new(),
        tally: Tally { runs: 1, ..Tally::default() },
    };
    for (number, round) in backups.rounds.iter().enumerate() {
        archive.round(number, round).map_err(|error| format!("round {number}: {error}"))?;
    }
    Ok(archive.tally)
}

impl Archive<'_> {
    fn round(&mut self, number: usize, round: &Round) -> std::result::Result<(), String> {
        let mut random = Random::new(round.seed);
        self.change(round, &mut random);
        let folder = SimFolder::new(self.files.clone(), round.seed);
        round.faults.iter().for_each(|fault| folder.host().order(*fault));
        let lie = self.looks.lie.and_then(|lie| world::fault_of(lie, round.seed));
        lie.into_iter().for_each(|fault| folder.host().order(fault));
        let made = block_on(self.make_point(&folder, number, round));
        let maybe = Known { name: name(number), content: self.disk.clone() };
        if round.has_crash {
            return self.after_crash(&folder, &maybe, made.is_ok(), &mut random);
        }
        self.files = folder.files();
        match made {
            Ok(point) => {
                self.tally.requests += 1;
                let content = self.disk.clone();
                self.known.push(Known { name: point.name().clone(), content });
                self.look(&self.files, None).map(drop)
            }
            Err(_) if folder.host().struck() => {
                self.known = self.look(&self.files, Some(&maybe))?;
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Changes the disk.
    fn change(&mut self, round: &Round, random: &mut Random) {
        if let Some(size_bytes) = round.size_bytes {
            self.disk.resize(size_bytes as usize, 0);
            self.identity += 1;
        }
        let size_bytes = self.disk.len() as u64;
        for _ in 0..round.changes {
            let start = random.below(size_bytes);
            let len = 1 + random.below((size_bytes - start).min(8000));
            let range = GuestRange::new(GuestOffset(start), len);
            let fill = match random.below(4) {
                0 => Fill::Zeros,
                _ => Fill::Pattern { seed: random.below(5), cluster_bytes: 4096 },
            };
            let place = start as usize..range.end().0 as usize;
            self.disk[place].copy_from_slice(&fill.bytes(range));
            self.identity += 1;
        }
    }

    async fn make_point(&self, folder: &SimFolder, number: usize, round: &Round) -> Result<Point> {
        let folder =
            Folder::open_or_create_in(folder.clone(), Path::new(PATH), self.backups.form).await?;
        let points = folder.points()?;
        let below = points.sound.last().filter(|_| !round.is_full);
        let full = PointFacts::full(name(number), self.disk.len() as u64);
        let (basis, before) = match below.and_then(|below| self.content_of(below)) {
            Some(before) => (Basis::Bitmap { name: "b".into() }, Some(before)),
            None => (Basis::Full, None),
        };
        let stands_on = below.filter(|_| before.is_some()).map(Point::reference);
        let identity = Some(self.identity.to_string());
        let facts = PointFacts { basis, stands_on, identity, ..full };
        let mut work = folder.begin(facts, GoOn::default()).await?;
        let source = Raw::open(MemoryStorage::from(&self.disk[..])).await?;
        let changes = Differs { before, now: &self.disk };
        let options = CopyOptions {
            in_flight: 2,
            durable_every_bytes: round.durable_every_bytes,
            ..CopyOptions::default()
        };
        work.copy(&source, &changes, options, &mut |_| ()).await?;
        work.finish().await
    }

    fn content_of(&self, point: &Point) -> Option<&[u8]> {
        let known = self.known.iter().find(|known| known.name == *point.name());
        known.map(|known| &known.content[..])
    }

    // ---- looking ---------------------------------------------------------------------------

    /// The power went at some moment of what was done. Looks at what may be left, and goes on with one
    /// state of it.
    fn after_crash(
        &mut self,
        folder: &SimFolder,
        maybe: &Known,
        was_made: bool,
        random: &mut Random,
    ) -> std::result::Result<(), String> {
        self.tally.crashes += 1;
        let points = crash::points_len(folder.host());
        // After the end all that was acknowledged must be there.
        let is_over = was_made && random.one_in(6);
        let index = if is_over { points - 1 } else { random.index(points) };
        let crash = crash::point(folder.host(), index);
        let most = self.looks.states.max(STATES);
        let mut remnants = crash.remnants(random.next(), most);
        let last = remnants.swap_remove(random.index(remnants.len()));
        let sure = is_over.then(|| maybe.clone());
        let others = remnants.iter().take(self.looks.states.saturating_sub(1));
        for remnant in others.chain([&last]) {
            self.tally.states += 1;
            let left = folder.left(&crash, remnant, random);
            let told = |error| {
                let names: Vec<_> = left.iter().map(|(name, _)| name.as_str()).collect();
                format!("{error}\n  at change {index}, of the folder there is: {names:?}")
            };
            let found = self.look(&left, Some(maybe)).map_err(told)?;
            if let Some(sure) = &sure
                && !found.iter().any(|known| known.content == sure.content)
            {
                return Err(told(format!("Point {} is gone", sure.name)));
            }
            self.files = left;
            if std::ptr::eq(remnant, &last) {
                self.known = found;
            }
        }
        Ok(())
    }

    /// Reads all points of a folder; returns those that count. One may be there or not.
    fn look(
        &self,
        files: &[(String, SparseBytes)],
        maybe: Option<&Known>,
    ) -> std::result::Result<Vec<Known>, String> {
        let place = SimFolder::new(files.to_vec(), 1);
        let looked = async {
            let form = self.backups.form;
            let folder = Folder::open_or_create_in(place.clone(), Path::new(PATH), form).await?;
            Ok::<_, lacuna::Error>((folder.points()?, folder))
        };
        let (points, folder) =
            block_on(looked).map_err(|error| format!("Opening the folder: {error}"))?;
        if let Some((name, error)) = points.broken.first() {
            return Err(format!("Point {name} is broken: {error}"));
        }
        for known in &self.known {
            if !points.sound.iter().any(|point| *point.name() == known.name) {
                return Err(format!("Point {} is gone", known.name));
            }
        }
        let mut found = Vec::new();
        for point in &points.sound {
            let name = point.name();
            // What was cut off goes on under the name that it had.
            let content = self.content_of(point).or_else(|| maybe.map(|it| &it.content[..]));
            let content = content.ok_or_else(|| format!("Point {name} is nobody's"))?;
            let seen = block_on(read(&place, &folder, &points, point));
            let seen = seen.map_err(|error| format!("Reading point {name}: {error}"))?;
            if seen != content {
                let at = seen.iter().zip(content).position(|(seen, wanted)| seen != wanted);
                return Err(format!("Point {name} is not what the disk was, first at {at:x?}"));
            }
            if let Some(damage) = block_on(verify(&folder, point, &mut |_| ())).first() {
                return Err(format!("Point {name}: {damage:?}"));
            }
            found.push(Known { name: name.clone(), content: content.to_vec() });
        }
        Ok(found)
    }
}

fn name(number: usize) -> PointName {
    PointName::new(format!("p{number}")).expect("it is a name")
}

async fn read(
    place: &SimFolder,
    folder: &Folder<SimFolder>,
    points: &Points,
    point: &Point,
) -> Result<Vec<u8>> {
    let chain = points.chain(point)?;
    match folder.form() {
        Form::Segments => whole(&PointDisk::open(folder, &chain)?).await,
        Form::Qcow2 => {
            let path = folder.image_path(point.name());
            let backing = Allow::Named;
            let options =
                ChainOptions { backing, ..ChainOptions::new(Format::Qcow2, Access::ReadOnly) };
            whole(chain::open(place, &path, &options).await?.disk()).await
        }
    }
}

/// What is not what it was, in whole units.
struct Differs<'a> {
    /// Nothing where all counts.
    before: Option<&'a [u8]>,
    now: &'a [u8],
}

impl Changes for Differs<'_> {
    async fn changes(&self, range: GuestRange) -> Result<Vec<DirtyExtent>> {
        let Some(before) = self.before else {
            return Ok(vec![DirtyExtent { range, is_dirty: true }]);
        };
        let (mut found, mut at) = (Vec::<DirtyExtent>::new(), range.start.0);
        while at < range.end().0 {
            let end = ((at / UNIT + 1) * UNIT).min(range.end().0);
            let part = at as usize..end as usize;
            let is_dirty = before.get(part.clone()) != self.now.get(part);
            let unit = GuestRange::new(GuestOffset(at), end - at);
            match found.last_mut().filter(|last| last.is_dirty == is_dirty) {
                Some(last) => last.range.len += unit.len,
                None => found.push(DirtyExtent { range: unit, is_dirty }),
            }
            at = end;
        }
        Ok(found)
    }
}
