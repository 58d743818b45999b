//! What a guest does to its disk over the years, as steps that any disk can be taken through.
//!
//! * Always: after the last step the disk holds exactly the file system, free space zeroed.
//! * Deterministic: temporary files come from a fixed seed.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher as _};
use std::io;
use std::os::unix::fs::FileExt;

use lacuna::block::is_zero;

/// A guest writes in requests of this size.
pub(super) const BLOCK: u64 = 64 << 10;
/// Of the free space, this part sees temporary files.
const BUSY_PER_CENT: u64 = 60;

/// A time in the life of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The files are written for the first time.
    Install,
    /// A folder is copied.
    Copy,
    /// Temporary files fill a part of the free space.
    Work,
    /// They are deleted: the guest notes it in its own tables only.
    Delete,
    /// A tool fills the free space with zeros, meaning well.
    Wipe,
    /// Files are replaced: a new copy elsewhere, the old place rewritten, the copy wiped.
    Rewrite,
}

/// All of them in order.
pub(super) const STEPS: [Step; 6] =
    [Step::Install, Step::Copy, Step::Work, Step::Delete, Step::Wipe, Step::Rewrite];

impl Step {
    /// Tells the story.
    pub(super) const fn story(self) -> &'static str {
        match self {
            Self::Install => "installs the files",
            Self::Copy => "copies their folder",
            Self::Work => "writes temporary files",
            Self::Delete => "deletes them again",
            Self::Wipe => "wipes the free space with zeros",
            Self::Rewrite => "rewrites a part of its files",
        }
    }
}

/// A request of the guest: where, and what is to be there.
#[derive(Debug)]
pub(super) struct GuestWrite<'a> {
    pub(super) offset: u64,
    pub(super) bytes: &'a [u8],
}

/// The content that the disk ends up with, and which blocks of it the files live in.
#[derive(Debug)]
pub(super) struct Content {
    file: File,
    /// Blocks with anything in them, in order.
    live: Vec<u64>,
    /// Of those, blocks that hold what one before them holds.
    copies: HashSet<u64>,
    free: Vec<u64>,
}

impl Content {
    /// Looks at a file system image, whose length is a multiple of [`BLOCK`].
    pub(super) fn new(file: File) -> io::Result<Self> {
        let mut block = vec![0; BLOCK as usize];
        let (mut live, mut free) = (Vec::new(), Vec::new());
        let (mut copies, mut seen) = (HashSet::new(), HashSet::new());
        for offset in (0..file.metadata()?.len()).step_by(BLOCK as usize) {
            file.read_exact_at(&mut block, offset)?;
            if is_zero(&block) {
                free.push(offset);
                continue;
            }
            live.push(offset);
            // Two that are taken for equal wrongly are written a step later, that is all.
            if !seen.insert(fingerprint(&block)) {
                copies.insert(offset);
            }
        }
        Ok(Self { file, live, copies, free })
    }

    /// Returns how many bytes lie in blocks that are not all zeros.
    pub(super) const fn live_bytes(&self) -> u64 {
        self.live.len() as u64 * BLOCK
    }

    /// Takes the disk behind `write` through one step.
    pub(super) fn play<E: From<io::Error>>(
        &self,
        step: Step,
        write: &mut dyn FnMut(GuestWrite<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        match step {
            Step::Install => self.write_files(self.files(false), write),
            Step::Copy => self.write_files(self.files(true), write),
            Step::Work => scribble(self.busy(), 1, write),
            Step::Delete => Ok(()),
            Step::Wipe => wipe(self.free.iter(), write),
            Step::Rewrite => {
                let replaced = || self.live.iter().step_by(4);
                let copies = || self.free.iter().rev().take(replaced().count());
                scribble(copies(), 2, write)?;
                scribble(replaced(), 3, write)?;
                self.write_files(replaced(), write)?;
                wipe(copies(), write)
            }
        }
    }

    /// The blocks with files, or with copies of files.
    fn files(&self, are_copies: bool) -> impl Iterator<Item = &u64> {
        self.live.iter().filter(move |offset| self.copies.contains(offset) == are_copies)
    }

    /// The free blocks that temporary files come to lie in: in groups, as files are.
    fn busy(&self) -> impl Iterator<Item = &u64> {
        self.free.iter().filter(|&&offset| offset / (BLOCK * 16) * 37 % 100 < BUSY_PER_CENT)
    }

    fn write_files<'a, E: From<io::Error>>(
        &self,
        offsets: impl Iterator<Item = &'a u64>,
        write: &mut dyn FnMut(GuestWrite<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut block = vec![0; BLOCK as usize];
        for &offset in offsets {
            self.file.read_exact_at(&mut block, offset)?;
            write(GuestWrite { offset, bytes: &block })?;
        }
        Ok(())
    }
}

/// Returns a number that is the same for equal blocks, and hardly ever for others.
pub(super) fn fingerprint(block: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(block);
    hasher.finish()
}

fn scribble<'a, E>(
    offsets: impl Iterator<Item = &'a u64>,
    seed: u64,
    write: &mut dyn FnMut(GuestWrite<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut block = vec![0; BLOCK as usize];
    for &offset in offsets {
        fill(&mut block, seed ^ offset);
        write(GuestWrite { offset, bytes: &block })?;
    }
    Ok(())
}

fn wipe<'a, E>(
    offsets: impl Iterator<Item = &'a u64>,
    write: &mut dyn FnMut(GuestWrite<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let zeros = vec![0; BLOCK as usize];
    for &offset in offsets {
        write(GuestWrite { offset, bytes: &zeros })?;
    }
    Ok(())
}

/// Fills a block with bytes that no codec makes smaller (xorshift).
fn fill(block: &mut [u8], seed: u64) {
    let mut state = seed | 1;
    for word in block.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> (Vec<u8>, Content) {
        let mut bytes = vec![0; (64 * BLOCK) as usize];
        for block in [0, 1, 7, 30, 63] {
            bytes[(block * BLOCK) as usize + 9] = 1 + block as u8;
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        (bytes, Content::new(file).unwrap())
    }

    #[test]
    fn after_all_steps_the_disk_holds_the_file_system() {
        let (expected, content) = content();
        let mut disk = vec![0xee; expected.len()];
        for step in STEPS {
            let mut write = |request: GuestWrite<'_>| {
                let start = request.offset as usize;
                disk[start..start + request.bytes.len()].copy_from_slice(request.bytes);
                Ok::<_, io::Error>(())
            };
            content.play(step, &mut write).unwrap();
        }
        assert!(disk == expected);
    }

    #[test]
    fn live_blocks_are_those_with_anything_in_them() {
        let (_, content) = content();
        assert_eq!(content.live_bytes(), 5 * BLOCK);
        assert_eq!(content.free.len(), 59);
    }

    #[test]
    fn a_block_that_was_there_before_is_a_copy() {
        let file = tempfile::tempfile().unwrap();
        for (block, byte) in [(0, 1), (2, 2), (3, 1), (5, 3), (6, 2)] {
            file.write_all_at(&vec![byte; BLOCK as usize], block * BLOCK).unwrap();
        }
        let content = Content::new(file).unwrap();
        let blocks =
            |are_copies| content.files(are_copies).map(|offset| offset / BLOCK).collect::<Vec<_>>();
        assert_eq!((blocks(false), blocks(true)), (vec![0, 2, 5], vec![3, 6]));
    }

    #[test]
    fn work_leaves_a_part_of_the_free_space_alone() {
        let (_, content) = content();
        let busy = content.busy().count();
        assert!(busy > 0 && busy < content.free.len(), "{busy}");
    }
}
