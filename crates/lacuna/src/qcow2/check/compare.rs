//! The refcounts on disk held against the references in memory.
//!
//! Most of an image agrees, so each block is first compared as a whole, in a loop without
//! branches; only where that sees a difference is it looked at cluster by cluster.

use futures_util::StreamExt;
use futures_util::stream;

use super::finding::FindingKind;
use super::read::read_bytes;
use super::refcounts::Block;
use super::references::{COUNT_MASK, Mark, PAGE, Page};
use super::survey::Survey;
use super::walk::READS_IN_FLIGHT;
use super::{Listener, Phase};
use crate::Result;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::HostCluster;

/// A page without references.
static UNREFERENCED: Page = [0; PAGE];

/// What a quick look at some clusters saw.
#[derive(Default)]
struct Glance {
    /// Some refcount is not the number of references.
    differs: bool,
    /// Some copied flag contradicts the refcount.
    wrong_flag: bool,
    /// Some cluster is in use.
    any: bool,
}

impl Survey {
    pub(super) async fn compare<S: Storage>(&mut self, storage: &S, listener: Listener<'_>) {
        let per_block = self.geometry.refcount_block_entries();
        let cluster_bytes = self.geometry.cluster_bytes() as usize;
        let blocks = self.clusters.div_ceil(per_block);
        let refcounts = self.refcounts.clone();
        let mut reads = stream::iter(0..blocks)
            .map(|index| read_block(storage, index, refcounts.block(index), cluster_bytes))
            .buffered(READS_IN_FLIGHT);
        let mut end = 0;
        while let Some((index, block)) = reads.next().await {
            let last = match block {
                Ok(block) => self.compare_block(index, block.as_deref()),
                Err(error) => self.note_block(index, &error),
            };
            end = last.map_or(end, |last| last + 1);
            Self::tell(listener, Phase::Compare, index + 1, blocks);
        }
        // An image has a header, so something is in use; QEMU counts that cluster in any case.
        self.report.image_end_offset = self.host(end.max(1));
    }

    fn note_block(&mut self, index: u64, error: &crate::Error) -> Option<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let first = index * per_block;
        let clusters = per_block.min(self.clusters - first);
        let cluster = HostCluster(first);
        let kind = FindingKind::RefcountUnreadable { cluster, text: error.to_string() };
        self.report.record(kind, clusters);
        self.io_failed |= error.kind() != crate::ErrorKind::Corrupt;
        let most = self.geometry.refcount_max();
        let used = self.references.iter_from(first);
        let over: Vec<_> = used
            .take_while(|(cluster, _)| *cluster < first + clusters)
            .filter(|(_, count)| *count > most)
            .collect();
        for (cluster, count) in over {
            let offset = self.host(cluster);
            self.report.record(FindingKind::RefcountOverflow { offset }, count - most);
        }
        None
    }

    /// Compares the clusters of a block. Returns the last one in use.
    fn compare_block(&mut self, index: u64, block: Option<&[u8]>) -> Option<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let first = index * per_block;
        let end = (first + per_block).min(self.clusters);
        let (mut at, mut last) = (first, None);
        while at < end {
            let len = (PAGE as u64 - at % PAGE as u64).min(end - at);
            last = self.compare_part(at, len, first, block).or(last);
            at += len;
        }
        last
    }

    /// Compares clusters of one page and one block.
    fn compare_part(&mut self, at: u64, len: u64, first: u64, block: Option<&[u8]>) -> Option<u64> {
        let page = self.references.page((at / PAGE as u64) as usize);
        if page.is_none() && block.is_none() {
            return None;
        }
        let (words, has_high) = page.unwrap_or((&UNREFERENCED, false));
        let start = (at % PAGE as u64) as usize;
        let words = &words[start..start + len as usize];
        let within = (at - first) as usize;
        if self.geometry.refcount_order() == 4 && !has_high {
            let bytes = block.map(|block| &block[within * 2..(within + len as usize) * 2]);
            let glance = bytes.map_or_else(|| glance_absent(words), |bytes| glance(words, bytes));
            self.flags_suspect |= glance.wrong_flag;
            if !glance.any {
                return None;
            }
            if !glance.differs {
                let used = words.iter().rposition(|word| word & COUNT_MASK != 0);
                return used.map(|index| at + index as u64);
            }
        }
        self.compare_slowly(at, len, within, block)
    }

    fn compare_slowly(
        &mut self,
        at: u64,
        len: u64,
        within: usize,
        block: Option<&[u8]>,
    ) -> Option<u64> {
        let width = self.refcounts.width;
        let most = self.geometry.refcount_max();
        let mut last = None;
        for index in 0..len {
            let cluster = at + index;
            let refcount = block.map_or(0, |block| width.read(block, within + index as usize));
            let counted = self.references.count(cluster);
            let references = counted.min(most);
            if refcount > 0 || references > 0 {
                last = Some(cluster);
            }
            self.judge_flag(cluster, refcount);
            if counted > most {
                let offset = self.host(cluster);
                self.report.record(FindingKind::RefcountOverflow { offset }, counted - most);
            }
            let cluster = HostCluster(cluster);
            if refcount != references {
                self.needs_rebuild |= references > 0 && block.is_none();
                let kind = FindingKind::RefcountMismatch { cluster, refcount, references };
                self.record_refcount(kind);
            }
        }
        last
    }

    fn judge_flag(&mut self, cluster: u64, refcount: u64) {
        let Some((words, _)) = self.references.page((cluster / PAGE as u64) as usize) else {
            return;
        };
        let word = words[(cluster % PAGE as u64) as usize];
        let wrong = if refcount == 1 { Mark::NOT_COPIED } else { Mark::COPIED };
        self.flags_suspect |= word & wrong != 0;
    }
}

async fn read_block<S: Storage>(
    storage: &S,
    index: u64,
    block: Block,
    cluster_bytes: usize,
) -> (u64, Result<Option<Buffer>>) {
    let read = match block {
        Block::Absent | Block::Outside(_) => Ok(None),
        Block::At(offset) => read_bytes(storage, offset, cluster_bytes).await.map(Some),
        Block::Unusable(offset) => {
            let text = format!("its refcount block cannot lie at {offset}");
            Err(crate::Error::corrupt(text))
        }
    };
    (index, read)
}

/// Compares 16-bit refcounts with counts that have no high bits.
fn glance(words: &[u16], bytes: &[u8]) -> Glance {
    let (mut differs, mut wrong, mut any) = (0, 0, 0);
    for (word, bytes) in words.iter().zip(bytes.as_chunks::<2>().0) {
        let refcount = u16::from_be_bytes(*bytes);
        let is_one = u16::from(refcount == 1).wrapping_neg();
        differs |= (word & COUNT_MASK) ^ refcount;
        wrong |= word & ((is_one & Mark::NOT_COPIED) | (!is_one & Mark::COPIED));
        any |= refcount | (word & COUNT_MASK);
    }
    Glance { differs: differs != 0, wrong_flag: wrong != 0, any: any != 0 }
}

/// Compares counts that have no high bits with refcounts of zero.
fn glance_absent(words: &[u16]) -> Glance {
    let all = words.iter().fold(0, |all, word| all | word);
    let any = all & COUNT_MASK != 0;
    Glance { differs: any, wrong_flag: all & Mark::COPIED != 0, any }
}
