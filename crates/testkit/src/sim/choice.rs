//! All of what a power cut may leave at one moment, or as much of it as can be looked at.
//!
//! * Always: a choice has some of the newest change in it; those without were there a moment before.

use super::Effect;
use super::crash::{Crash, describe, torn_runs};
use crate::{Random, SparseBytes};

/// How many states are looked at.
///
/// ```
/// use testkit::sim::Bounds;
/// assert!(Bounds::default().exhaustive <= 12);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Up to this many unflushed changes, all subsets of them; the same for sectors of them.
    pub exhaustive: usize,
    /// So many random ones where there are more.
    pub sampled: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { exhaustive: 10, sampled: 100 }
    }
}

/// What of the unflushed changes reached the medium: pieces, in the order of the changes.
///
/// See [`Crash::all_choices`] for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice(Vec<Piece>);

/// A change, or some of its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    change: usize,
    /// From which of its sectors to which (exclusive); all where nothing is said.
    sectors: Option<(u64, u64)>,
}

impl Piece {
    const fn whole(change: usize) -> Self {
        Self { change, sectors: None }
    }
}

impl Choice {
    /// Returns how many pieces there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Says whether nothing reached the medium.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Crash {
    /// Returns every subset of the sectors that were not flushed, where these are few; of many every
    /// subset of the changes, whole and torn; of more a sample.
    ///
    /// ```
    /// use lacuna::{buffer::Buffer, storage::Storage, units::HostOffset};
    /// use testkit::sim::{Bounds, Pace, SimHost, crash};
    /// let host = SimHost::new(Pace::AtOnce, 1);
    /// let file = host.add_file(vec![0; 1536][..].into());
    /// let write = file.write_at(HostOffset(0), Buffer::from(&[1; 1536][..]));
    /// assert!(pollster::block_on(write).0.is_ok());
    /// let point = &crash::points(&host)[1];
    /// let choices = point.all_choices(1, Bounds::default());
    /// // Three sectors, of which any but none may be new.
    /// assert_eq!(choices.count(), 7);
    /// ```
    pub fn all_choices(&self, seed: u64, bounds: Bounds) -> Box<dyn Iterator<Item = Choice> + '_> {
        let sectors: u64 = self.changes().map(Effect::sectors).sum();
        let mut random = Random::new(seed ^ (self.event as u64) << 20);
        if sectors <= bounds.exhaustive as u64 {
            return Box::new(self.by_sectors());
        }
        if self.unflushed_len() > bounds.exhaustive {
            let sample = self.sampled(&mut random, bounds.sampled);
            return Box::new(sample.into_iter());
        }
        Box::new(self.by_changes().flat_map(move |choice| {
            let torn = self.torn(&choice, &mut random);
            [Some(choice), torn].into_iter().flatten()
        }))
    }

    /// Returns a choice among many changes: none of them, few, half, most or all, torn every other time.
    ///
    /// ```
    /// use testkit::sim::{Pace, SimHost, crash};
    /// let host = SimHost::new(Pace::AtOnce, 1);
    /// host.add_file(b"old"[..].into());
    /// let choice = crash::now(&host).random_choice(&mut testkit::Random::new(1));
    /// assert!(choice.is_empty());
    /// ```
    #[must_use]
    pub fn random_choice(&self, random: &mut Random) -> Choice {
        let in_sixteen = *random.pick(&[0, 2, 8, 14, 16]);
        let chosen = (0..self.unflushed_len()).filter(|_| random.below(16) < in_sixteen);
        let choice = Choice(chosen.map(Piece::whole).collect());
        match random.one_in(2) {
            true => self.torn(&choice, random).unwrap_or(choice),
            false => choice,
        }
    }

    /// Returns what the files hold with a choice.
    #[must_use]
    pub fn files_with(&self, choice: &Choice) -> Vec<SparseBytes> {
        let mut files = self.flushed().to_vec();
        for piece in &choice.0 {
            let (file, effect) = self.change(piece.change);
            match piece.sectors {
                None => effect.apply(&mut files[file]),
                Some((from, to)) => effect.part(from, to).apply(&mut files[file]),
            }
        }
        files
    }

    /// Says what a choice is made of, for the message of a failing test.
    #[must_use]
    pub fn story_of(&self, choice: &Choice) -> Vec<String> {
        let told = choice.0.iter().map(|piece| {
            let (file, effect) = self.change(piece.change);
            let part = piece.sectors.map(|(from, to)| effect.part(from, to));
            let said = describe(part.as_ref().unwrap_or(effect));
            format!("change {} file {file}: {said}", piece.change)
        });
        told.collect()
    }

    fn by_sectors(&self) -> impl Iterator<Item = Choice> {
        let sectors = |(change, effect): (usize, &Effect)| match effect.sectors() {
            1 => vec![Piece::whole(change)],
            count => (0..count).map(|at| Piece { change, sectors: Some((at, at + 1)) }).collect(),
        };
        self.subsets(self.changes().enumerate().flat_map(sectors).collect())
    }

    fn by_changes(&self) -> impl Iterator<Item = Choice> {
        self.subsets((0..self.unflushed_len()).map(Piece::whole).collect())
    }

    /// All subsets of few pieces that have some of the newest change in them.
    fn subsets(&self, pieces: Vec<Piece>) -> impl Iterator<Item = Choice> + use<> {
        let newest = self.newest_change();
        let all = (0..1_u64 << pieces.len()).map(move |mask| {
            let chosen = pieces.iter().enumerate().filter(|(at, _)| mask >> at & 1 == 1);
            Choice(chosen.map(|(_, piece)| *piece).collect())
        });
        all.filter(move |choice| {
            newest.is_none_or(|newest| choice.0.iter().any(|piece| piece.change == newest))
        })
    }

    fn sampled(&self, random: &mut Random, limit: usize) -> Vec<Choice> {
        let mut sample = Vec::new();
        for chosen in self.choices(random, limit) {
            let choice = Choice(chosen.into_iter().map(Piece::whole).collect());
            sample.extend(self.torn(&choice, random));
            sample.push(choice);
        }
        sample
    }

    /// The same changes with some of their sectors lost, where they have more than one.
    fn torn(&self, choice: &Choice, random: &mut Random) -> Option<Choice> {
        let sectors = |piece: &Piece| self.change(piece.change).1.sectors();
        choice.0.iter().any(|piece| sectors(piece) > 1).then(|| {
            let parts = |piece: &Piece| -> Vec<Piece> {
                let runs = torn_runs(sectors(piece), random).into_iter();
                runs.map(|run| Piece { sectors: Some(run), ..*piece }).collect()
            };
            Choice(choice.0.iter().flat_map(parts).collect())
        })
    }
}
