//! What bytes were and are to be, and which of that may be seen after a power loss.
//!
//! * Always: what a flush covered, or a request that was durable by its own answer, is seen, or something newer.

use std::ops::Range;
use std::sync::Arc;

/// Bytes of a whole disk.
pub(crate) type Disk = Arc<Vec<u8>>;

/// Sectors are compared whole before bytes are looked at.
pub(crate) const SECTOR: usize = 512;

/// All that the bytes were, in order.
#[derive(Default)]
pub(crate) struct Versions {
    all: Vec<Version>,
    /// From which moment on no version before which one can be seen.
    durable: Vec<(usize, usize)>,
    kept: Vec<Kept>,
}

struct Version {
    from: usize,
    disk: Disk,
    /// Whether this or another version is seen as a whole, never a mixture.
    is_whole: bool,
}

/// From a moment on no older version is seen of a part.
struct Kept {
    from: usize,
    part: Range<usize>,
    version: usize,
}

/// What may be seen at one moment.
#[derive(Clone)]
pub(crate) struct Seen<'a> {
    /// The newest is the first.
    disks: Vec<&'a Disk>,
    /// Parts of which only so many of them may be seen.
    newest: Vec<(&'a Range<usize>, usize)>,
    is_whole: bool,
    /// How many promises there are.
    pub(crate) promises: usize,
}

impl Versions {
    /// Begins anew with what is durable.
    pub(crate) fn restart(&mut self, disk: Vec<u8>) {
        *self = Self::default();
        self.see(0, disk, false);
        self.durable.push((0, 0));
    }

    /// The disk may look so from a moment on.
    pub(crate) fn see(&mut self, from: usize, disk: Vec<u8>, is_whole: bool) {
        if self.all.last().is_none_or(|last| *last.disk != disk) {
            self.all.push(Version { from, disk: Arc::new(disk), is_whole });
        }
    }

    /// From a moment on nothing older than the last version is seen.
    pub(crate) fn flushed(&mut self, moment: usize) {
        self.durable.push((moment, self.all.len() - 1));
    }

    /// The same of a part of it.
    pub(crate) fn kept(&mut self, moment: usize, part: Range<usize>) {
        self.kept.push(Kept { from: moment, part, version: self.all.len() - 1 });
    }

    pub(crate) fn at(&self, moment: usize) -> Seen<'_> {
        let durable = self.durable.iter().take_while(|(from, _)| *from <= moment);
        let (first, flushes) = durable.fold((0, 0), |(_, count), (_, at)| (*at, count + 1));
        let later = self.all[first + 1..].iter().take_while(|it| it.from <= moment);
        let end = first + 1 + later.count();
        let seen = &self.all[first..end];
        let kept = self.kept.iter().take_while(|kept| kept.from <= moment);
        let promises = flushes + kept.clone().count();
        let kept = kept.filter(|kept| kept.version > first);
        Seen {
            disks: seen.iter().rev().map(|version| &version.disk).collect(),
            newest: kept.map(|kept| (&kept.part, end - kept.version)).collect(),
            is_whole: seen[1..].iter().all(|version| version.is_whole),
            promises,
        }
    }
}

impl Seen<'_> {
    /// Returns how many bytes there are by the newest.
    pub(crate) fn len(&self) -> usize {
        self.disks[0].len()
    }

    /// Compares what is read with what may be.
    pub(crate) fn judge(&self, seen: &[u8]) -> Result<(), String> {
        let everywhere = self.among(&(0..seen.len()));
        if self.disks[..everywhere].iter().any(|disk| ***disk == seen) {
            return Ok(());
        }
        let sizes: Vec<usize> = self.disks.iter().map(|disk| disk.len()).collect();
        if !sizes.contains(&seen.len()) {
            return Err(format!("There are {:#x} bytes, not {sizes:x?}", seen.len()));
        }
        if self.is_whole {
            return Err("It is a mixture of what it was and what it was to be".into());
        }
        (0..seen.len()).step_by(SECTOR).try_for_each(|at| self.judge_sector(seen, at))
    }

    /// Returns how many of the newest may be seen wherever in a part.
    fn among(&self, part: &Range<usize>) -> usize {
        let touches = |kept: &Range<usize>| kept.start < part.end && part.start < kept.end;
        let counts = self.newest.iter().filter(|(kept, _)| touches(kept)).map(|(_, count)| *count);
        counts.min().unwrap_or(self.disks.len())
    }

    fn judge_sector(&self, seen: &[u8], at: usize) -> Result<(), String> {
        let sector = at..(at + SECTOR).min(seen.len());
        let allowed = &self.disks[..self.among(&sector)];
        if allowed.iter().any(|disk| disk.get(sector.clone()) == Some(&seen[sector.clone()])) {
            return Ok(());
        }
        sector.clone().try_for_each(|at| self.judge_byte(seen[at], at))
    }

    fn judge_byte(&self, seen: u8, at: usize) -> Result<(), String> {
        let allowed = &self.disks[..self.among(&(at..at + 1))];
        let right = || allowed.iter().map(|disk| disk.get(at).copied().unwrap_or(0));
        match right().any(|byte| byte == seen) {
            true => Ok(()),
            false => {
                let right: Vec<u8> = right().collect();
                Err(format!("Byte {at:#x} is {seen:#x}, allowed are {right:x?}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_kept_is_never_older_and_the_rest_may_be() {
        let mut versions = Versions::default();
        versions.restart(vec![1; 2048]);
        versions.see(1, vec![2; 2048], false);
        versions.kept(2, 100..600);
        versions.see(3, vec![3; 2048], false);
        let mut seen = vec![1; 2048];
        versions.at(1).judge(&seen).unwrap();
        versions.at(2).judge(&seen).unwrap_err();
        seen[100..600].fill(2);
        versions.at(2).judge(&seen).unwrap();
        versions.at(3).judge(&[3; 2048]).unwrap();
        seen[599] = 3;
        versions.at(2).judge(&seen).unwrap_err();
        versions.at(3).judge(&seen).unwrap();
        seen[100] = 1;
        versions.at(3).judge(&seen).unwrap_err();
        versions.flushed(4);
        versions.at(4).judge(&seen).unwrap_err();
    }
}
