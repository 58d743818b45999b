//! Jobs that give space back, on images with damage and without.
//!
//! * Always: where a check finds nothing but leaks, the disk and its snapshots read the same afterwards,
//!   and the image is sound.
//! * Always: whatever else a check finds, the file stays within bounds.

use lacuna::Result;
use lacuna::job::sweep;
use lacuna::qcow2::check::Repair;
use lacuna::qcow2::{Access, CompactOptions, CompactOrder, Image};
use pollster::block_on;

use super::choices::Choices;
use super::images::{Memory, assert_length, guest, memory, open, report};
use super::recipe::Recipe;
use crate::drive;

/// Jobs done at most.
const JOBS: u64 = 4;
const FINGERPRINT_SEED: u64 = 7;

#[derive(Clone, Copy, Debug)]
enum Job {
    Compact(CompactOrder),
    CompactInUse,
    Dedup,
    Sweep,
    Unpin,
}

const KINDS: [Job; 6] = [
    Job::Compact(CompactOrder::Any),
    Job::Compact(CompactOrder::Guest),
    Job::CompactInUse,
    Job::Dedup,
    Job::Sweep,
    Job::Unpin,
];

impl Job {
    /// Does it, and closes the image.
    async fn run(self, image: Image<Memory>) -> Result<()> {
        match self {
            Self::Compact(order) => {
                let options = CompactOptions { order, ..CompactOptions::default() };
                return image.compact(&options, &mut |_| ()).await.map(drop);
            }
            Self::CompactInUse => drive::compact_in_use(&image).await?,
            Self::Dedup => drive::dedup(&image, FINGERPRINT_SEED).await?,
            Self::Sweep => drop(sweep(&image, &mut |_| ()).await?),
            Self::Unpin => return image.unpin().await,
        }
        image.close().await
    }
}

/// Takes choices of an image, of damage, and of jobs.
///
/// # Panics
/// If a job changes what is read of an image without damage, leaves one that is not sound, or lets the file
/// grow without a reason.
pub fn damaged_jobs(data: &[u8]) {
    let mut choices = Choices::new(data);
    let recipe = Recipe::choose(&mut choices);
    let mut file = recipe.file.clone();
    if !choices.one_in(4) {
        recipe.damage(&mut file, &mut choices);
    }
    let storage = memory(&file);
    for _ in 0..=choices.below(JOBS) {
        let job = *choices.pick(&KINDS);
        let harm =
            |storage| report(storage, Repair::None).map(|it| it.corruptions + it.check_errors);
        let is_sound = harm(&storage).is_ok_and(|harm| harm == 0);
        let readable = if is_sound { guest(&storage, &recipe) } else { Vec::new() };
        let Ok(image) = open(&storage, Access::ReadWrite) else { return };
        let done = block_on(job.run(image));
        assert_length(&storage, file.len() as u64 + JOBS * recipe.growth());
        if is_sound {
            assert_eq!(harm(&storage).ok(), Some(0), "{job:?} ({done:?}) does harm");
            assert!(guest(&storage, &recipe) == readable, "{job:?} ({done:?}) loses data");
        }
    }
}
