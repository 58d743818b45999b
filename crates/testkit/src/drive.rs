//! Operations done to an image, and what may be seen after them.

use crate::foreign::{QEMU_IMG, QemuCheck, qemu_img_check};
use crate::sim::{Pace, SimHost};
use crate::{ModelDisk, Operation, SparseBytes, content};
use lacuna::block::{DiscardMode, Layer, Preallocation};
use lacuna::buffer::Buffer;
use lacuna::job::{Dedup, DedupOptions};
use lacuna::qcow2::check::{CheckOptions, CheckReport, check};
use lacuna::qcow2::{Image, LiveCompactOptions, LiveCompaction, Shrink};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange};

use crate::case::Case;

/// Bytes compared at once.
const STEP: u64 = 1 << 20;

/// Reads a range.
pub async fn read<L: Layer>(image: &L, range: GuestRange) -> lacuna::Result<Vec<u8>> {
    let (result, bytes) = image.read(range.start, Buffer::new(range.len as usize)).await;
    result.map(|()| bytes.to_vec())
}

/// Does one operation; what a read saw is returned.
pub async fn perform<S: Storage>(
    image: &Image<S>,
    operation: Operation,
) -> lacuna::Result<Vec<u8>> {
    match operation {
        Operation::Read(range) => return read(image, range).await,
        Operation::Write { range, seed, flags } => {
            let buffer = Buffer::from(&content(seed, range)[..]);
            image.write(range.start, buffer, flags).await.0?;
        }
        Operation::WriteCompressed { range, seed } => {
            let buffer = Buffer::from(&content(seed, range)[..]);
            image.write_compressed(range.start, buffer).await.0?;
        }
        Operation::WriteZeroes { range, flags } => image.write_zeroes(range, flags).await?,
        Operation::Discard { range, mode } => image.discard(range, mode).await?,
        Operation::Flush => image.flush().await?,
        Operation::Resize { size_bytes } => resize(image, size_bytes).await?,
        Operation::Reopen => {}
    }
    Ok(Vec::new())
}

/// Grows by one of the kinds of preallocation, which one the size says.
async fn resize<S: Storage>(image: &Image<S>, size_bytes: u64) -> lacuna::Result<()> {
    const MODES: [Preallocation; 4] =
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    let mode = MODES[(size_bytes / 512 % 4) as usize];
    match size_bytes > image.size_bytes() && mode != Preallocation::Off {
        true => image.grow(size_bytes, mode).await,
        false => image.resize(size_bytes, Shrink::Allow).await,
    }
}

/// Tells the model of an operation that is over.
pub async fn settle<S: Storage>(
    image: &Image<S>,
    model: &mut ModelDisk,
    operation: &Operation,
) -> Result<(), String> {
    if let Operation::Discard { range, mode } = *operation {
        let seen = read(image, range).await.map_err(|error| error.to_string())?;
        model.settle_discard(range, mode, &seen)?;
    }
    model.apply(operation);
    Ok(())
}

/// Compacts an image that is open, in steps of a few clusters and in little memory.
pub async fn compact_in_use<S: Storage>(image: &Image<S>) -> lacuna::Result<()> {
    let slice_bytes = 5 * image.geometry().cluster_bytes();
    let options = LiveCompactOptions { slice_bytes, memory_bytes: 20_000 };
    let mut compaction = LiveCompaction::new(image, options)?;
    while compaction.step().await?.is_some() {}
    Ok(())
}

/// Has equal clusters share one, in the same steps for the same seed of fingerprints.
pub async fn dedup<S: Storage>(image: &Image<S>, seed: u64) -> lacuna::Result<()> {
    let options = DedupOptions { seed: Some(seed), ..DedupOptions::default() };
    let mut dedup = Dedup::new(image, options)?;
    while dedup.step().await?.is_some() {}
    Ok(())
}

/// All guest bytes of an image.
pub async fn whole_content<L: Layer>(image: &L) -> lacuna::Result<SparseBytes> {
    let mut seen = SparseBytes::default();
    let (mut at, end) = (0, image.size_bytes());
    while at < end {
        let range = GuestRange::new(GuestOffset(at), (end - at).min(STEP));
        seen.write(at, &read(image, range).await?);
        at += range.len;
    }
    Ok(seen)
}

/// What each byte may be: as in one of several states of the disk.
///
/// ```
/// use testkit::drive::Candidates;
/// let states = [&b"old"[..], &b"new"[..]].map(Into::into);
/// assert!(Candidates(states.to_vec()).judge(&b"oew"[..].into()).is_ok());
/// ```
#[derive(Clone, Default)]
pub struct Candidates(pub Vec<SparseBytes>);

impl Candidates {
    /// Returns what may be seen from the moment on at which `operation` begins on the disk of `model`.
    #[must_use]
    pub fn foresee(model: &ModelDisk, operation: &Operation, case: &Case) -> Self {
        let mut states = Self(vec![model.content().clone()]);
        if let Operation::Discard { range, mode } = *operation {
            states.add_discard(range, mode, case);
        }
        if let Operation::Resize { size_bytes } = *operation {
            states.add_shrink(size_bytes, case);
        }
        let mut after = model.clone();
        after.apply(operation);
        states.add(&after);
        states
    }

    /// Adds what `operation` makes of the last state, begun or finished.
    pub fn add(&mut self, model: &ModelDisk) {
        self.0.push(model.content().clone());
    }

    /// Adds what a discard may leave: zeros, or the backing layer where the mapping goes.
    pub fn add_discard(&mut self, range: GuestRange, mode: DiscardMode, case: &Case) {
        let Some(last) = self.0.last() else { return };
        let mut zeros = last.clone();
        zeros.punch(range.start.0, range.end().0);
        if let (DiscardMode::Full, Some(below)) = (mode, &case.backing) {
            let mut shown = last.clone();
            let bytes = below.guest.read_vec(range.start.0, range.len as usize);
            shown.write(range.start.0, &bytes);
            self.0.push(shown);
        }
        self.0.push(zeros);
    }

    /// Adds what shrinking may leave half-way: what is cut off is gone, the size not yet changed.
    pub fn add_shrink(&mut self, size_bytes: u64, case: &Case) {
        let Some(last) = self.0.last() else { return };
        let old_len = last.len();
        if size_bytes >= old_len {
            return;
        }
        let mut shown = last.clone();
        let from = size_bytes.next_multiple_of(case.kind.cluster_bytes()).min(old_len);
        shown.punch(from, old_len);
        self.0.push(shown.clone());
        if let Some(below) = &case.backing {
            let bytes = below.guest.read_vec(from, (old_len - from) as usize);
            shown.write(from, &bytes);
            self.0.push(shown);
        }
    }

    /// Says which byte is as in none of the states.
    pub fn judge(&self, seen: &SparseBytes) -> Result<(), String> {
        if !self.0.iter().any(|state| state.len() == seen.len()) {
            let sizes: Vec<u64> = self.0.iter().map(SparseBytes::len).collect();
            return Err(format!(
                "The disk has {:#x} bytes, expected one of {sizes:x?}",
                seen.len()
            ));
        }
        let mut at = 0;
        while at < seen.len() {
            let len = (seen.len() - at).min(4096) as usize;
            let bytes = seen.read_vec(at, len);
            let mut states = Vec::with_capacity(self.0.len());
            let is_whole = self.0.iter().any(|state| {
                states.push(state.read_vec(at, len));
                states.last() == Some(&bytes)
            });
            let good = |index: &usize| states.iter().any(|state| state[*index] == bytes[*index]);
            if let Some(index) = (0..len).filter(|_| !is_whole).find(|index| !good(index)) {
                let allowed: Vec<u8> = states.iter().map(|state| state[index]).collect();
                return Err(format!(
                    "Byte {:#x} is {:#x}, allowed are {allowed:x?}",
                    at + index as u64,
                    bytes[index]
                ));
            }
            at += len as u64;
        }
        Ok(())
    }
}

/// What our own check says of the image file of `case`.
pub async fn own_check(case: &Case) -> CheckReport {
    let storage = SimHost::without_record(Pace::AtOnce, 0).add_file(case.image.clone());
    check(&storage, &CheckOptions::default(), &mut |_| {}).await.unwrap()
}

/// Leaks at worst, by our own check and, where `ask_qemu`, by QEMU's.
pub async fn assert_safe(case: &Case, ask_qemu: bool) -> Result<(), String> {
    let report = own_check(case).await;
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(format!("check: {report:x?}"));
    }
    if ask_qemu {
        let found = qemu_check(case);
        if !found.is_safe() || found.leaks != report.leaks {
            return Err(format!("check: {report:x?}\nqemu-img check: {}", found.text));
        }
    }
    Ok(())
}

/// Says whether refcounts are not to be believed before a repair.
pub fn is_dirty(case: &Case) -> bool {
    case.kind.version == 3 && case.image.read_vec(79, 1)[0] & 1 == 1
}

/// What qemu-img says of the files of `case`.
pub fn qemu_check(case: &Case) -> QemuCheck {
    let folder = tempfile::tempdir().unwrap();
    qemu_img_check(&case.save(folder.path()))
}

/// Asserts that QEMU shows a guest the bytes of the model, and finds nothing to complain of.
pub fn assert_qemu_agrees(case: &Case, model: &ModelDisk, story: &str) {
    let folder = tempfile::tempdir().unwrap();
    let image = case.save(folder.path());
    let report = pollster::block_on(own_check(case));
    assert!(report.is_clean(), "{story}: {report:x?}");
    let found = qemu_img_check(&image);
    assert!(found.is_clean(), "{story}: {}", found.text);
    let raw = folder.path().join("model.raw");
    model.content().save(&raw);
    let words = ["compare", "-f", "qcow2", "-F", "raw"].map(std::ffi::OsStr::new);
    let words = words.into_iter().chain([image.as_os_str(), raw.as_os_str()]);
    let finished = QEMU_IMG.run_in(folder.path(), words);
    assert!(
        finished.code == 0,
        "{story}: qemu-img compare: {}{}",
        finished.stdout,
        finished.stderr
    );
}
