//! What a disk must hold: bytes, and what may be said of them.
//!
//! * Always: the model is told an operation only after (or as) the engine has done it.
//! * Never: the model knows tables; the size of a cluster is all it has of the format.

use std::collections::BTreeSet;

use lacuna::block::{AllocationDepth, DiscardMode, Extent, Layer, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::units::{GuestOffset, GuestRange};

use crate::SparseBytes;
use crate::operations::{Operation, content};

/// What a discard of whole clusters leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterDiscard {
    /// Zeros.
    Zeros,
    /// The old content: the format has no way to say zero over a backing layer (version 2).
    Unchanged,
}

/// What is known of the disk beside its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Size of a cluster in bytes.
    pub cluster_bytes: u64,
    /// What a guest's discard of whole clusters leaves.
    pub after_discard: AfterDiscard,
    /// Whether write_zeroes of whole clusters leaves a range that is known to be zero.
    pub zero_is_kept: bool,
    /// Whether clusters that nobody touched are unallocated (not so with a raw data file).
    pub starts_unallocated: bool,
}

/// A disk as it should be.
///
/// ```
/// use lacuna::units::{GuestOffset, GuestRange};
/// use testkit::{AfterDiscard, ModelDisk, Rules};
/// let rules = Rules { cluster_bytes: 512, after_discard: AfterDiscard::Zeros, zero_is_kept: true,
///     starts_unallocated: true };
/// let model = ModelDisk::new(rules, 1024, None);
/// assert_eq!(model.bytes(GuestRange::new(GuestOffset(0), 2)), [0, 0]);
/// ```
#[derive(Clone, Debug)]
pub struct ModelDisk {
    rules: Rules,
    size_bytes: u64,
    bytes: SparseBytes,
    backing: Option<SparseBytes>,
    /// Clusters that some change touched; all others may only be unallocated.
    touched: BTreeSet<u64>,
    /// Clusters that must be reported as zeros.
    known_zero: BTreeSet<u64>,
}

impl ModelDisk {
    /// Makes the model of a new disk of `size_bytes` over `backing`.
    #[must_use]
    pub fn new(rules: Rules, size_bytes: u64, backing: Option<SparseBytes>) -> Self {
        let mut bytes = backing.clone().unwrap_or_default();
        bytes.set_len(size_bytes);
        let (touched, known_zero) = (BTreeSet::new(), BTreeSet::new());
        Self { rules, size_bytes, bytes, backing, touched, known_zero }
    }

    /// Returns the size of the disk.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Returns the bytes that a read of `range` must give.
    #[must_use]
    pub fn bytes(&self, range: GuestRange) -> Vec<u8> {
        self.bytes.read_vec(range.start.0, range.len as usize)
    }

    /// Returns the whole content, to be saved as a raw file.
    #[must_use]
    pub const fn content(&self) -> &SparseBytes {
        &self.bytes
    }

    /// Does `operation` to the model. A discard changes nothing here that is not certain: call
    /// [`settle_discard`](Self::settle_discard) with what the layer shows afterwards.
    pub fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Write { range, seed, .. } | Operation::WriteCompressed { range, seed } => {
                self.touch(*range);
                self.bytes.write(range.start.0, &content(*seed, *range));
            }
            Operation::WriteZeroes { range, flags } => self.zero(*range, *flags),
            Operation::Discard { range, .. } => self.touch(*range),
            Operation::Resize { size_bytes } => self.resize(*size_bytes),
            Operation::Read(_) | Operation::Flush | Operation::Reopen => {}
        }
    }

    fn touch(&mut self, range: GuestRange) {
        for cluster in self.clusters(range) {
            self.touched.insert(cluster);
            self.known_zero.remove(&cluster);
        }
    }

    fn zero(&mut self, range: GuestRange, _: ZeroFlags) {
        let still_zero = self.zero_clusters(range);
        self.touch(range);
        self.known_zero.extend(still_zero);
        self.bytes.punch(range.start.0, range.end().0);
        if self.rules.zero_is_kept {
            self.known_zero.extend(self.whole_clusters(range));
        }
    }

    /// Clusters of `range` that are known as zeros already: zeroing a part changes nothing.
    fn zero_clusters(&self, range: GuestRange) -> Vec<u64> {
        self.clusters(range).filter(|cluster| self.known_zero.contains(cluster)).collect()
    }

    fn resize(&mut self, size_bytes: u64) {
        // Neither end of the change may be judged by what was known of its cluster before.
        let (low, high) = (self.size_bytes.min(size_bytes), self.size_bytes.max(size_bytes));
        let start = low.saturating_sub(1);
        self.touch(GuestRange::new(GuestOffset(start), high - start));
        self.size_bytes = size_bytes;
        self.bytes.set_len(size_bytes);
    }

    /// Takes over what an unfinished change left in `range`; nothing is known of it but its bytes.
    pub fn adopt(&mut self, range: GuestRange, bytes: &[u8]) {
        self.touch(range);
        self.bytes.write(range.start.0, bytes);
    }

    /// Judges what a discard left in `range`, and takes it over: whole clusters as promised,
    /// others byte for byte as before or zero.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn settle_discard(
        &mut self,
        range: GuestRange,
        mode: DiscardMode,
        seen: &[u8],
    ) -> Result<(), String> {
        let whole = self.whole_clusters(range);
        for cluster in self.clusters(range) {
            let start = GuestOffset(cluster * self.rules.cluster_bytes);
            let part = GuestRange::new(start, self.rules.cluster_bytes);
            let Some(part) = part.intersection(&range) else { continue };
            let at = (part.start - range.start) as usize;
            let seen = &seen[at..at + part.len as usize];
            self.judge_discard(part, mode, whole.contains(&cluster), seen)?;
        }
        self.bytes.write(range.start.0, seen);
        Ok(())
    }

    fn judge_discard(
        &self,
        part: GuestRange,
        mode: DiscardMode,
        whole: bool,
        seen: &[u8],
    ) -> Result<(), String> {
        let old = self.bytes(part);
        let good = match whole {
            true => seen == self.promise(part, mode),
            false => seen.iter().zip(&old).all(|(seen, old)| seen == old || *seen == 0),
        };
        if good {
            return Ok(());
        }
        let head = |bytes: &[u8]| format!("{:x?}", &bytes[..bytes.len().min(8)]);
        Err(format!(
            "{mode:?} discard of {:#x}..{:#x} (whole cluster: {whole}) left {}…, it was {}…",
            part.start,
            part.end(),
            head(seen),
            head(&old)
        ))
    }

    fn promise(&self, part: GuestRange, mode: DiscardMode) -> Vec<u8> {
        match (mode, self.rules.after_discard, &self.backing) {
            (DiscardMode::Full, _, Some(backing)) => {
                backing.read_vec(part.start.0, part.len as usize)
            }
            (DiscardMode::Guest, AfterDiscard::Unchanged, _) => self.bytes(part),
            _ => vec![0; part.len as usize],
        }
    }

    fn clusters(&self, range: GuestRange) -> std::ops::Range<u64> {
        let bytes = self.rules.cluster_bytes;
        match range.len {
            0 => 0..0,
            _ => range.start.0 / bytes..range.end().0.div_ceil(bytes),
        }
    }

    /// The clusters that `range` covers; the disk's last part counts as whole.
    fn whole_clusters(&self, range: GuestRange) -> std::ops::Range<u64> {
        let bytes = self.rules.cluster_bytes;
        let end = match range.end().0 >= self.size_bytes {
            true => self.size_bytes.div_ceil(bytes),
            false => range.end().0 / bytes,
        };
        let start = range.start.0.div_ceil(bytes);
        start..end.max(start)
    }

    /// Compares what a read gave.
    ///
    /// # Errors
    /// The first byte that differs, in words.
    pub fn compare(&self, range: GuestRange, seen: &[u8]) -> Result<(), String> {
        if seen.len() as u64 == range.len && self.bytes.holds(range.start.0, seen) {
            return Ok(());
        }
        let expected = self.bytes(range);
        match seen.iter().zip(&expected).position(|(seen, expected)| seen != expected) {
            None => Ok(()),
            Some(index) => {
                let end = (index + 8).min(seen.len());
                Err(format!(
                    "Byte {:#x} (cluster {:#x}, {} bytes from {:#x} were read) differs: \
                     {:x?}…, expected {:x?}…",
                    range.start.0 + index as u64,
                    (range.start.0 + index as u64) / self.rules.cluster_bytes,
                    range.len,
                    range.start,
                    &seen[index..end],
                    &expected[index..end]
                ))
            }
        }
    }

    /// Compares all of `layer` with the model: size, bytes, extents.
    ///
    /// # Errors
    /// The first difference, in words.
    pub async fn verify(&self, layer: &impl Layer) -> Result<(), String> {
        if layer.size_bytes() != self.size_bytes {
            let size_bytes = layer.size_bytes();
            return Err(format!("Size is {size_bytes:#x}, expected {:#x}", self.size_bytes));
        }
        let mut at = 0;
        while at < self.size_bytes {
            let len = (self.size_bytes - at).min(1 << 20);
            let (result, seen) = layer.read(GuestOffset(at), Buffer::new(len as usize)).await;
            result.map_err(|error| format!("Reading {len} bytes at {at:#x}: {error}"))?;
            self.compare(GuestRange::new(GuestOffset(at), len), &seen)?;
            at += len;
        }
        self.verify_extents(layer).await
    }

    /// Checks the extents of the whole disk.
    ///
    /// # Errors
    /// The first that lies, in words.
    pub async fn verify_extents(&self, layer: &impl Layer) -> Result<(), String> {
        let mut rest = GuestRange::new(GuestOffset(0), self.size_bytes);
        while !rest.is_empty() {
            let extents = layer.extents(rest).await;
            let extents = extents.map_err(|error| format!("Extents of {rest:x?}: {error}"))?;
            let (Some(first), Some(last)) = (extents.first(), extents.last()) else {
                return Err(format!("No extent for {rest:x?}"));
            };
            if first.range.start != rest.start || last.range.end() > rest.end() {
                return Err(format!("Extents {first:?} to {last:?} do not fit {rest:x?}"));
            }
            for pair in extents.windows(2) {
                if pair[0].range.end() != pair[1].range.start || pair[0].is_continued_by(&pair[1]) {
                    return Err(format!("{:?} and {:?} are not two neighbours", pair[0], pair[1]));
                }
            }
            extents.iter().try_for_each(|extent| self.judge(extent))?;
            rest = GuestRange::new(last.range.end(), rest.end() - last.range.end());
        }
        Ok(())
    }

    fn judge(&self, extent: &Extent) -> Result<(), String> {
        let (range, status) = (extent.range, extent.status);
        let lie = |what: &str| Err(format!("{what}: {extent:x?}"));
        if range.is_empty() {
            return lie("An extent is empty");
        }
        if status.reads_zero && !self.bytes.reads_zero(range.start.0, range.end().0) {
            return lie("An extent claims zeros over other bytes");
        }
        if status.depth == AllocationDepth::NOWHERE && !status.reads_zero {
            return lie("What is allocated nowhere must be zeros");
        }
        let mut clusters = self.clusters(range);
        if !status.reads_zero && clusters.any(|cluster| self.known_zero.contains(&cluster)) {
            return lie("Zeroes were forgotten");
        }
        let mut clusters = self.clusters(range);
        if self.rules.starts_unallocated
            && status.depth == AllocationDepth::TOP
            && clusters.any(|cluster| !self.touched.contains(&cluster))
        {
            return lie("A cluster is allocated that nobody touched");
        }
        Ok(())
    }
}
