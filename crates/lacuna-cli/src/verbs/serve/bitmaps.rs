//! The dirty bitmaps of a chain as clients see them.
//!
//! * By QEMU's rule a name means the bitmap of the highest level that has one of that name, whether
//!   or not it can be used.
//! * Never offered: a bitmap that may miss a change, or one of a snapshot's image.
//! * Bounded: unless asked for by name, at most [`MOST_UNASKED`] are offered, and opened ones stay
//!   in memory up to [`KEPT_BYTES`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use lacuna::block::Layer;
use lacuna::chain::Disk;
use lacuna::qcow2::format::StoredName;
use lacuna::qcow2::{DirtyBitmap, Image};
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};
use lacuna_export::{DirtyRun, LayerBitmaps};
use pollster::block_on;

use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, sentence};
use crate::nodes::{AnyStorage, FileChain};
use crate::output;

/// How many are offered where none is named.
const MOST_UNASKED: usize = 64;
/// What opened bitmaps take together, apart from the last one used.
const KEPT_BYTES: usize = 16 << 20;
/// Runs that a bitmap is asked for at a time.
const RUNS_AT_ONCE: usize = 1024;

/// Options about bitmaps.
pub(crate) const BITMAP: Flag =
    Flag::valued('B', "bitmap", "NAME", "offer this dirty bitmap, and no other (all)");
pub(super) const LAYERS_BITMAP: Flag = Flag::valued(
    '\0',
    "layers-bitmap",
    "[LEVEL=]NAME",
    "the bitmap that x-lacuna:layers tells of, on a level (0 is the image) or on all",
)
.long_only();

/// Which bitmaps the command line asks for.
#[derive(Debug)]
pub(crate) struct Wish {
    /// All that can be read, where nothing is said.
    named: Option<Vec<String>>,
    layers: LayerBitmaps,
}

impl Wish {
    pub(super) fn of(parsed: &Parsed) -> Self {
        let mut named: Vec<String> = Vec::new();
        for name in parsed.all("bitmap") {
            if !named.iter().any(|known| known == name) {
                named.push(name.to_owned());
            }
        }
        Self { named: Some(named).filter(|named| !named.is_empty()), layers: layers(parsed) }
    }

    /// Wants these and no other.
    pub(crate) fn only(named: Vec<String>) -> Self {
        Self { named: Some(named), layers: LayerBitmaps::default() }
    }

    /// Insists that what was named is there, in one of the images at least.
    pub(crate) fn check<'a>(
        &self,
        images: impl Iterator<Item = &'a Bitmaps> + Clone,
    ) -> CliResult<()> {
        let is_somewhere = |has: &dyn Fn(&Bitmaps) -> bool| images.clone().any(has);
        for name in self.named.iter().flatten() {
            if !is_somewhere(&|image| image.offered.contains_key(name)) {
                return Err(not_found(name));
            }
        }
        if let Some(name) = &self.layers.everywhere
            && !is_somewhere(&|image| image.levels.iter().any(|names| names.contains(name)))
        {
            return Err(not_found(name));
        }
        for (level, name) in &self.layers.at {
            let has = |image: &Bitmaps| image.level(*level).contains(name);
            if !is_somewhere(&has) {
                return Err(not_found(name).under(format!("Level {level}")));
            }
        }
        Ok(())
    }
}

/// Reads `[LEVEL=]NAME`: a number before the first `=` is a level.
pub(super) fn layers(parsed: &Parsed) -> LayerBitmaps {
    let mut chosen = LayerBitmaps::default();
    for text in parsed.all("layers-bitmap") {
        let level =
            text.split_once('=').and_then(|(level, name)| Some((level.parse().ok()?, name)));
        match level {
            Some((level, name)) => drop(chosen.at.insert(level, name.to_owned())),
            None => chosen.everywhere = Some(text.to_owned()),
        }
    }
    chosen
}

fn not_found(name: &str) -> CliError {
    CliError::new(format!("Bitmap '{name}' is not found"))
        .with_class(ErrorKind::NotFound)
        .with_hint("`lacuna info FILE` lists the bitmaps of an image")
}

type Bitmap = DirtyBitmap<AnyStorage>;

/// The bitmaps of a chain that clients may ask about.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    /// The level of each name.
    offered: BTreeMap<String, usize>,
    /// In order.
    names: Vec<String>,
    /// Of each level, those that can be read.
    levels: Vec<Vec<String>>,
    /// Opened ones, the last one used at the end.
    kept: Mutex<Vec<(usize, Bitmap)>>,
}

impl Bitmaps {
    /// Finds those that are asked for and can be read. One that is asked for by name and cannot be
    /// is an error; one that is not there is none yet.
    pub(super) fn of(chain: &FileChain, wish: &Wish) -> CliResult<Self> {
        let listed: Vec<Vec<String>> =
            (0..chain.levels().len()).map(|level| listed(chain, level)).collect();
        let mut found = Self {
            offered: BTreeMap::new(),
            names: Vec::new(),
            levels: vec![Vec::new(); listed.len()],
            kept: Mutex::default(),
        };
        for name in wanted(chain, &listed, wish) {
            found.add(chain, &listed, name, wish.named.is_some())?;
        }
        Ok(found)
    }

    fn add(
        &mut self,
        chain: &FileChain,
        listed: &[Vec<String>],
        name: String,
        is_named: bool,
    ) -> CliResult<()> {
        let mut with = (0..listed.len()).filter(|level| listed[*level].contains(&name));
        let Some(highest) = with.next() else { return Ok(()) };
        match self.open(chain, highest, &name) {
            Ok(_) => {}
            Err(error) if is_named => return Err(unusable(&name, &error)),
            Err(error) => {
                warn_of_unusable(&shown(chain, highest), &error);
                return Ok(());
            }
        }
        for level in self.readable(chain, highest, with, &name) {
            self.levels[level].push(name.clone());
        }
        self.offered.insert(name.clone(), highest);
        self.names.push(name);
        Ok(())
    }

    /// Returns the levels with a bitmap of this name, the highest of which can be read. None where
    /// one of the lower ones cannot: what it may miss must not look clean.
    fn readable(
        &self,
        chain: &FileChain,
        highest: usize,
        lower: impl Iterator<Item = usize>,
        name: &str,
    ) -> Vec<usize> {
        let mut levels = vec![highest];
        for level in lower {
            if let Err(error) = self.open(chain, level, name) {
                warn_of_unusable(&shown(chain, level), &error);
                return Vec::new();
            }
            levels.push(level);
        }
        levels
    }

    /// Returns the names that stand for a bitmap of some level.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns the names of a level's own bitmaps.
    pub(super) fn level(&self, level: usize) -> &[String] {
        self.levels.get(level).map_or(&[], Vec::as_slice)
    }

    /// Returns the level that a name stands for.
    pub(super) fn level_of(&self, name: &str) -> Result<usize> {
        self.offered.get(name).copied().ok_or_else(|| none(name))
    }

    /// Returns the leading runs of `range` in a level's own bitmap; what passes its end is clean.
    pub(super) async fn dirty(
        &self,
        chain: &FileChain,
        level: usize,
        name: &str,
        range: GuestRange,
    ) -> Result<Vec<DirtyRun>> {
        let bitmap = match self.kept(level, name) {
            Some(bitmap) => bitmap,
            None => self.keep(level, image(chain, level, name)?.bitmap(&name.into()).await?),
        };
        let size_bytes = chain.level_disk(level).map_or(0, Layer::size_bytes);
        let end = range.end().min(GuestOffset(size_bytes));
        if end <= range.start {
            return Ok(vec![DirtyRun { range, is_dirty: false }]);
        }
        let within = GuestRange::new(range.start, end - range.start);
        let extents = bitmap.extents(within, RUNS_AT_ONCE).await?;
        let run =
            |it: lacuna::qcow2::DirtyExtent| DirtyRun { range: it.range, is_dirty: it.is_dirty };
        Ok(extents.into_iter().map(run).collect())
    }

    fn open(&self, chain: &FileChain, level: usize, name: &str) -> Result<Bitmap> {
        Ok(self.keep(level, block_on(image(chain, level, name)?.bitmap(&name.into()))?))
    }

    fn kept(&self, level: usize, name: &str) -> Option<Bitmap> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let name = StoredName::from(name);
        let at = kept.iter().position(|(of, bitmap)| *of == level && *bitmap.name() == name)?;
        let found = kept.remove(at);
        kept.push(found);
        kept.last().map(|(_, bitmap)| bitmap.clone())
    }

    fn keep(&self, level: usize, bitmap: Bitmap) -> Bitmap {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have opened it meanwhile.
        kept.retain(|(of, known)| *of != level || known.name() != bitmap.name());
        kept.push((level, bitmap.clone()));
        let bytes = |kept: &[(usize, Bitmap)]| -> usize {
            kept.iter().map(|(_, bitmap)| bitmap.memory_bytes()).sum()
        };
        while kept.len() > 1 && bytes(&kept) > KEPT_BYTES {
            kept.remove(0);
        }
        bitmap
    }
}

/// Lists the names of a level's bitmaps, as far as the protocol can say them.
fn listed(chain: &FileChain, level: usize) -> Vec<String> {
    let Some(Disk::Qcow2(image)) = chain.level_disk(level) else { return Vec::new() };
    let facts = block_on(image.bitmaps()).unwrap_or_else(|error| {
        warn_of_unusable(&shown(chain, level), &error);
        Vec::new()
    });
    let name = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
    let names = facts.iter().filter_map(|facts| name(facts.name.as_bytes()));
    names.filter(|name| !name.is_empty() && !name.contains('\0')).collect()
}

/// Returns the names to be looked for.
fn wanted(chain: &FileChain, listed: &[Vec<String>], wish: &Wish) -> Vec<String> {
    if let Some(named) = &wish.named {
        return named.clone();
    }
    let mut all = unique(listed);
    if all.len() > MOST_UNASKED {
        output::warn(&format!(
            "{}: of {} bitmaps the first {MOST_UNASKED} are offered; name others by --bitmap",
            shown(chain, 0),
            all.len()
        ));
        all.truncate(MOST_UNASKED);
    }
    all
}

fn unique(listed: &[Vec<String>]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    listed.iter().flatten().filter(|name| seen.insert(*name)).cloned().collect()
}

fn image<'a>(chain: &'a FileChain, level: usize, name: &str) -> Result<&'a Image<AnyStorage>> {
    chain.level_image(level).ok_or_else(|| none(name))
}

fn none(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("There is no bitmap {name}"))
}

fn shown(chain: &FileChain, level: usize) -> String {
    let path = chain.levels().get(level).map(|facts| facts.path.display().to_string());
    output::tame(&path.unwrap_or_default())
}

fn unusable(name: &str, error: &Error) -> CliError {
    CliError::new(format!("Bitmap '{name}' is inconsistent and cannot be used"))
        .in_our_words(output::tame(&sentence(error)))
        .with_class(error.kind())
}

fn warn_of_unusable(file: &str, error: &Error) {
    output::warn(&format!("{file}: not offered: {}", output::tame(&sentence(error))));
}
