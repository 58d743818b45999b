//! The folder of a backup: its points, and who may add to them.
//!
//! ```text
//! lacuna-backup.json     what this folder is, and how its points keep what they hold
//! POINT.json             a manifest: POINT counts from the moment that this is there
//! POINT.000000.seg ...   its segments, or
//! POINT.qcow2            its image
//! POINT.begun            what a point that does not count yet was begun as
//! POINT.done             how far the copy into its image is durable
//! *.part                 files that are being written; nothing relies on them
//! ```

use std::path::{Path, PathBuf};

use lacuna::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use pollster::block_on;
use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::durable;
use crate::name::{PointName, RESERVED};
use crate::place::{Host, Place};
use crate::point::{Form, Manifest, PointRef};
use crate::sealed::{self, Sealed};

const MARK: &str = "lacuna-backup.json";
const _: () = assert!(MARK.len() == RESERVED.len() + ".json".len());
const VERSION: u32 = 1;

/// What a folder is.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mark {
    version: u32,
    form: Form,
}

impl Sealed for Mark {
    const MEMBER: &'static str = "lacuna-backup";

    fn check(&self) -> Result<(), String> {
        match self.version {
            VERSION => Ok(()),
            version => Err(format!("It has version {version}; {VERSION} can be read")),
        }
    }
}

/// A point that counts.
///
/// Found by [`Folder::points`], with an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// What it is.
    pub manifest: Manifest,
    /// The checksum of its manifest.
    pub checksum: Checksum,
}

impl Point {
    /// Returns its name.
    #[must_use]
    pub const fn name(&self) -> &PointName {
        &self.manifest.facts.point
    }

    /// Returns how a point that stands on it refers to it.
    #[must_use]
    pub fn reference(&self) -> PointRef {
        PointRef { point: self.name().clone(), checksum: self.checksum }
    }
}

/// The points of a folder: those that count, and what keeps others from it.
///
/// Returned by [`Folder::points`], with an example.
#[derive(Debug, Default)]
pub struct Points {
    /// In the order in which they were begun.
    pub sound: Vec<Point>,
    /// Names of points whose manifest cannot be read, and why.
    pub broken: Vec<(String, Error)>,
    /// Points that were begun and do not count yet.
    pub begun: Vec<PointName>,
}

impl Points {
    /// Finds a point by its name; the last one where there is none.
    ///
    /// # Errors
    /// `NotFound`; for a broken one what is wrong with it.
    pub fn find(&self, name: Option<&PointName>) -> Result<&Point> {
        let Some(name) = name else {
            return self
                .sound
                .last()
                .ok_or_else(|| Error::new(ErrorKind::NotFound, "There is no restore point yet"));
        };
        if let Some(point) = self.sound.iter().find(|point| point.name() == name) {
            return Ok(point);
        }
        match self.broken.iter().find(|(broken, _)| broken == name.as_str()) {
            Some((_, error)) => Err(error.clone()),
            None => {
                Err(Error::new(ErrorKind::NotFound, format!("There is no restore point '{name}'")))
            }
        }
    }

    /// Returns a point and those that it stands on, down to a full one.
    ///
    /// # Errors
    /// `NotFound` or `Corrupt` where one of them is not there, or is another one by now.
    pub fn chain(&self, top: &Point) -> Result<Vec<Point>> {
        let mut chain = vec![top.clone()];
        while let Some(below) =
            chain.last().and_then(|point| point.manifest.facts.stands_on.clone())
        {
            let above = chain.last().map_or(u64::MAX, |point| point.manifest.facts.number);
            let found = self.find(Some(&below.point)).map_err(|error| {
                error.context(format!("Point '{}' stands on '{}'", top.name(), below.point))
            })?;
            // Numbers fall, so that this ends.
            if found.checksum != below.checksum || found.manifest.facts.number >= above {
                return Err(Error::corrupt(format!(
                    "Point '{}' stands on a point '{}' that was another one than that which is there",
                    top.name(),
                    below.point
                )));
            }
            chain.push(found.clone());
        }
        Ok(chain)
    }
}

/// The folder of a backup.
///
/// ```
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna_backup::{CopyOptions, Everything, Folder, Form, GoOn, PointFacts, PointName};
///
/// pollster::block_on(async {
///     let place = tempfile::tempdir().unwrap();
///     let folder = Folder::open_or_create(&place.path().join("backup"), Form::Segments)?;
///     let disk = Raw::create(MemoryStorage::from(&[7; 4096][..]), 1 << 20).await?;
///     let facts = PointFacts::full(PointName::new("monday")?, 1 << 20);
///     let mut work = folder.begin(facts, GoOn::default()).await?;
///     work.copy(&disk, &Everything, CopyOptions::default(), &mut |_| ()).await?;
///     let monday = work.finish().await?;
///     assert_eq!(folder.points()?.sound, [monday]);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub struct Folder<P: Place = Host> {
    place: P,
    path: PathBuf,
    form: Form,
    lock: Mutex<Option<P::Lock>>,
}

impl<P: Place> std::fmt::Debug for Folder<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Folder").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Folder {
    /// Opens the folder of a backup.
    ///
    /// # Errors
    /// `NotFound` where there is none; `Corrupt`; else what reading gives.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_in(Host, path)
    }

    /// Opens the folder of a backup; where there is nothing yet, or an empty folder, makes it.
    ///
    /// # Errors
    /// As [`open`](Self::open); `InvalidRequest` for a folder of something else.
    pub fn open_or_create(path: &Path, form: Form) -> Result<Self> {
        block_on(Self::open_or_create_in(Host, path, form))
    }
}

impl<P: Place> Folder<P> {
    /// Opens the folder of a backup that lies in some place.
    ///
    /// # Errors
    /// As [`open`](Folder::open).
    pub fn open_in(place: P, path: &Path) -> Result<Self> {
        let mark = sealed::read::<Mark>(&place, &path.join(MARK));
        let (found, _) = mark.map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(
                ErrorKind::NotFound,
                format!("{} is no folder of a backup: there is no {MARK}", path.display()),
            ),
            _ => error,
        })?;
        Ok(Self { place, path: path.to_owned(), form: found.form, lock: Mutex::default() })
    }

    /// Opens the folder of a backup in some place; where there is nothing yet, or an empty folder,
    /// makes it.
    ///
    /// # Errors
    /// As [`open_or_create`](Folder::open_or_create).
    pub async fn open_or_create_in(place: P, path: &Path, form: Form) -> Result<Self> {
        place.make_folder(path)?;
        let mark = path.join(MARK);
        if !place.has(&mark) {
            check_empty(&place, path)?;
            let (bytes, _) = sealed::encode(&Mark { version: VERSION, form })?;
            durable::replace(&place, &mark, &bytes).await?;
        }
        Self::open_in(place, path)
    }

    /// Keeps others from adding points until this is dropped; [`begin`](Self::begin) does so too.
    ///
    /// # Errors
    /// `Busy` where somebody else adds one; else what locking gives.
    pub fn lock(&self) -> Result<()> {
        let mut lock = self.lock.lock();
        if lock.is_none() {
            *lock = self.place.lock(&self.path.join(MARK))?;
        }
        match *lock {
            Some(_) => Ok(()),
            None => Err(Error::new(
                ErrorKind::Busy,
                format!("Somebody else adds a point to {}", self.path.display()),
            )),
        }
    }

    pub(crate) const fn place(&self) -> &P {
        &self.place
    }

    /// Returns how its points keep what they hold.
    #[must_use]
    pub const fn form(&self) -> Form {
        self.form
    }

    /// Returns where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a file of a point.
    pub(crate) fn file(&self, point: &PointName, ending: &str) -> PathBuf {
        self.path.join(format!("{point}.{ending}"))
    }

    /// Returns the path of the image of a point, in a folder of such.
    #[must_use]
    pub fn image_path(&self, point: &PointName) -> PathBuf {
        self.file(point, "qcow2")
    }

    /// Returns the path of a segment of a point.
    pub(crate) fn segment_path(&self, point: &PointName, number: usize) -> PathBuf {
        self.file(point, &format!("{number:06}.seg"))
    }

    /// Lists the points.
    ///
    /// # Errors
    /// What reading the folder gives; a manifest that cannot be read is no reason.
    pub fn points(&self) -> Result<Points> {
        let mut points = Points::default();
        for (name, ending) in self.names()? {
            match (ending.as_str(), PointName::new(&*name)) {
                ("json", _) if format!("{name}.json") == MARK => {}
                ("json", Ok(name)) => match self.point(&name) {
                    Ok(point) => points.sound.push(point),
                    Err(error) => points.broken.push((name.to_string(), error)),
                },
                ("begun", Ok(name)) => points.begun.push(name),
                _ => {}
            }
        }
        let is_whole = |name: &PointName| points.sound.iter().any(|point| point.name() == name);
        points.begun = points.begun.iter().filter(|name| !is_whole(name)).cloned().collect();
        points.sound.sort_by_key(|point| (point.manifest.facts.number, point.name().clone()));
        points.broken.sort_by(|left, right| left.0.cmp(&right.0));
        points.begun.sort();
        Ok(points)
    }

    /// Lists the files: what stands in front of the first dot of each name, and what behind it.
    pub(crate) fn names(&self) -> Result<Vec<(String, String)>> {
        let names = self.place.names(&self.path)?;
        let split = |name: &String| {
            name.split_once('.').map(|(name, ending)| (name.to_owned(), ending.to_owned()))
        };
        Ok(names.iter().filter_map(split).collect())
    }

    fn point(&self, name: &PointName) -> Result<Point> {
        let path = self.file(name, "json");
        let (manifest, checksum) = sealed::read::<Manifest>(&self.place, &path)?;
        let wrong = |what| Err(Error::corrupt(what).context(path.display()));
        if manifest.facts.point != *name {
            return wrong(format!("It is the manifest of point '{}'", manifest.facts.point));
        }
        if manifest.content.form() != self.form {
            return wrong(format!("It is of no point in {}", self.form.name()));
        }
        Ok(Point { manifest, checksum })
    }
}

fn check_empty(place: &impl Place, path: &Path) -> Result<()> {
    let names = place.names(path)?;
    // What an earlier try may have left.
    match names.iter().all(|name| *name == format!("{MARK}.part")) {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{} holds something else than a backup; an empty folder, or a new one, would be right",
            path.display()
        ))),
    }
}
