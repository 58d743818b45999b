//! Bringing clusters to their places through few free ones: pure.
//!
//! * A cluster whose place is free goes there, and leaves a free cell behind that may be the place of
//!   another: so most clusters move once.
//! * Where no free cell is anybody's place, a circle is opened: whoever lies in a place that is
//!   wanted steps aside, behind all places.
//! * Never: a cell is left and entered within one batch, as what was in it is there until the batch
//!   is durable.

use std::collections::{BTreeSet, HashMap};

use foldhash::fast::RandomState;

use super::bits::Bits;

/// A cluster that may have to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it is.
    pub(super) at: u64,
    /// Where it is to be; nothing if it is only in the way.
    pub(super) place: Option<u64>,
}

/// A step of one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) piece: usize,
    pub(super) to: u64,
}

/// Pieces on their way.
#[derive(Debug)]
pub(super) struct Shuffle {
    pieces: Vec<Piece>,
    /// Pieces by the cell in which they lie, those that are at their places left out.
    lying: HashMap<u64, usize, RandomState>,
    /// Pieces by the place that they have yet to reach.
    wanted: HashMap<u64, usize, RandomState>,
    /// Places that are wanted and free.
    ready: BTreeSet<u64>,
    /// Places that were wanted at first, in order; those before `next` were seen to.
    places: Vec<u64>,
    next: usize,
    free: Bits,
    /// From where on a cell is nobody's place.
    aside_from: u64,
}

impl Shuffle {
    /// `free` are the cells in which nothing is; `aside_from` lies behind all places.
    pub(super) fn new(pieces: Vec<Piece>, free: Bits, aside_from: u64) -> Self {
        let moving = || pieces.iter().enumerate().filter(|(_, it)| it.place != Some(it.at));
        let lying: HashMap<_, _, _> = moving().map(|(index, it)| (it.at, index)).collect();
        let wanted: HashMap<_, _, RandomState> =
            moving().filter_map(|(index, it)| Some((it.place?, index))).collect();
        let mut places: Vec<u64> = wanted.keys().copied().collect();
        places.sort_unstable();
        let ready = places.iter().copied().filter(|place| free.contains(*place)).collect();
        Self { pieces, lying, wanted, ready, places, next: 0, free, aside_from }
    }

    /// Chooses at most `most` steps that can be taken together, by where they lead; none where all
    /// is done, or where there is no free cell at all.
    pub(super) fn choose(&mut self, most: usize) -> Vec<Step> {
        let mut steps = Vec::new();
        while steps.len() < most
            && let Some(to) = self.ready.pop_first()
        {
            steps.extend(self.wanted.get(&to).map(|piece| Step { piece: *piece, to }));
        }
        let mut leaving: BTreeSet<usize> = steps.iter().map(|step| step.piece).collect();
        let mut from = self.aside_from;
        while steps.len() < most
            && let Some(place) = self.places.get(self.next)
        {
            let in_way = self.lying.get(place).filter(|piece| !leaving.contains(*piece));
            if let Some(piece) = in_way {
                let Some(to) = self.free.next(from) else { break };
                from = to + 1;
                steps.push(Step { piece: *piece, to });
                leaving.insert(*piece);
            }
            self.next += 1;
        }
        steps.sort_unstable_by_key(|step| step.to);
        steps
    }

    /// Notes that the steps were taken.
    pub(super) fn take(&mut self, steps: &[Step]) {
        for step in steps {
            let piece = &mut self.pieces[step.piece];
            let left = std::mem::replace(&mut piece.at, step.to);
            self.lying.remove(&left);
            self.free.remove(step.to);
            self.free.insert(left);
            match piece.place == Some(step.to) {
                true => self.wanted.remove(&step.to),
                false => self.lying.insert(step.to, step.piece),
            };
            if self.wanted.contains_key(&left) {
                self.ready.insert(left);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(clusters: impl IntoIterator<Item = u64>) -> Bits {
        let mut bits = Bits::new(1000);
        clusters.into_iter().for_each(|cluster| bits.insert(cluster));
        bits
    }

    /// Shuffles to the end; returns where everybody is, and how many steps that took.
    fn run(pieces: &[Piece], free: &[u64], aside_from: u64, most: usize) -> (Vec<u64>, usize) {
        let mut shuffle = Shuffle::new(pieces.to_vec(), bits(free.iter().copied()), aside_from);
        let mut at: Vec<u64> = pieces.iter().map(|it| it.at).collect();
        let mut count = 0;
        loop {
            let steps = shuffle.choose(most);
            if steps.is_empty() {
                return (at, count);
            }
            assert!(steps.len() <= most && steps.is_sorted_by(|a, b| a.to < b.to));
            let before = at.clone();
            for Step { piece, to } in &steps {
                assert!(!before.contains(to), "{to} was not free");
                at[*piece] = *to;
            }
            count += steps.len();
            shuffle.take(&steps);
        }
    }

    fn piece(at: u64, place: u64) -> Piece {
        Piece { at, place: Some(place) }
    }

    #[test]
    fn what_follows_a_hole_moves_once_but_for_who_steps_aside() {
        let pieces: Vec<Piece> = (10..20).map(|at| piece(at + 1, at)).collect();
        for most in [1, 3, 100] {
            let (at, count) = run(&pieces, &[10, 30], 21, most);
            // A batch that has room lets others step aside as well: batches are slow, moves are not.
            let all = if most > 1 { 10..=20 } else { 10..=10 };
            let is_done = at.iter().copied().eq(10..20);
            assert!(is_done && all.contains(&count), "{most}: {at:?} {count}");
        }
    }

    #[test]
    fn a_circle_takes_one_step_more_and_one_free_cell() {
        let pieces: Vec<Piece> = (0..10).map(|at| piece(at, (at + 3) % 10)).collect();
        let (at, count) = run(&pieces, &[10], 10, 100);
        assert!(at.iter().copied().eq((0..10).map(|at| (at + 3) % 10)), "{at:?}");
        assert_eq!(count, 11);
    }

    #[test]
    fn any_order_is_reached_with_at_most_twice_as_many_steps() {
        let mut random = 7_u64;
        let mut next = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            (random >> 33) as usize % below
        };
        for count in 2..60 {
            let mut places: Vec<u64> = (0..count as u64).collect();
            (1..count).for_each(|index| places.swap(index, next(index + 1)));
            let pieces: Vec<Piece> =
                (0..).zip(&places).map(|(at, place)| piece(at, *place)).collect();
            let (most, cells) = (1 + next(8), 1 + next(8) as u64);
            let free: Vec<u64> = (0..cells).map(|cell| 100 + cell).collect();
            let (at, steps) = run(&pieces, &free, 100, most);
            assert_eq!(at, places);
            assert!(steps <= 2 * count);
        }
    }

    #[test]
    fn who_is_only_in_the_way_goes_behind_all_places() {
        let pieces = [Piece { at: 1, place: None }, piece(5, 1)];
        assert_eq!(run(&pieces, &[9], 2, 4), (vec![9, 1], 2));
        // Without a free cell nothing moves.
        assert_eq!(run(&pieces, &[], 2, 4), (vec![1, 5], 0));
    }
}
