//! What a job does, a step at a time.

use lacuna::ErrorKind;
use lacuna::job::{Dedup, DedupOptions, DedupPhase, Sharing};
use lacuna::qcow2::{Image, LiveCompactOptions, LiveCompactPhase, LiveCompaction};
use pollster::block_on;
use serde_json::{Value, json};

use super::Exported;
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::verbs::serve::ChainDisk;

/// Bytes of a step: what a client may come to wait for.
const STEP_BYTES: u64 = 8 << 20;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Kind {
    Compact,
    Dedup { memory_bytes: u64 },
}

impl Kind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Compact => "compact",
            Self::Dedup { .. } => "dedup",
        }
    }
}

/// What one step did.
pub(super) struct Step {
    pub(super) phase: &'static str,
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) bytes: u64,
}

/// Work under way.
pub(super) enum Work {
    Compact(LiveCompaction<AnyStorage>),
    Dedup(Box<Dedup<AnyStorage>>),
}

impl Work {
    /// Prepares work on an export that takes steps of `most` bytes at most.
    pub(super) fn new(kind: Kind, export: &Exported, most: Option<u64>) -> CliResult<Self> {
        let image = image_of(export)?;
        let slice_bytes = most.map_or(STEP_BYTES, |most| STEP_BYTES.min(most));
        match kind {
            Kind::Compact => {
                let options = LiveCompactOptions { slice_bytes, ..LiveCompactOptions::default() };
                Ok(Self::Compact(LiveCompaction::new(image, options)?))
            }
            Kind::Dedup { memory_bytes } => {
                let sharing = Sharing::WhereItPays;
                let options =
                    DedupOptions { memory_bytes, slice_bytes, sharing, ..Default::default() };
                Ok(Self::Dedup(Box::new(Dedup::new(image, options)?)))
            }
        }
    }

    /// Takes a step; nothing where all is done.
    pub(super) fn step(&mut self) -> lacuna::Result<Option<Step>> {
        match self {
            Self::Compact(compaction) => Ok(block_on(compaction.step())?.map(|progress| Step {
                phase: match progress.phase {
                    LiveCompactPhase::Count => "count",
                    LiveCompactPhase::Move => "move",
                    LiveCompactPhase::Cut => "cut",
                },
                done: progress.done_bytes,
                total: progress.total_bytes,
                bytes: progress.step_bytes,
            })),
            Self::Dedup(dedup) => Ok(block_on(dedup.step())?.map(|progress| Step {
                phase: match progress.phase {
                    DedupPhase::Find => "find",
                    DedupPhase::Share => "share",
                },
                done: progress.done_bytes,
                total: progress.total_bytes,
                bytes: progress.read_bytes,
            })),
        }
    }

    /// Tells what was done so far.
    pub(super) fn so_far(&self) -> Value {
        match self {
            Self::Compact(compaction) => {
                let done = compaction.so_far();
                json!({
                    "freed_bytes": done.shortened_bytes,
                    "moved_bytes": done.moved_bytes,
                    "left_bytes": done.left_bytes,
                })
            }
            Self::Dedup(dedup) => {
                let done = dedup.so_far();
                json!({
                    "freed_bytes": done.freed_bytes,
                    "shared_clusters": done.shared,
                    "looked_at_clusters": done.clusters,
                })
            }
        }
    }
}

/// Returns the image that an export writes to.
fn image_of(export: &Exported) -> CliResult<&Image<AnyStorage>> {
    let refused = |text: String, class| Err(CliError::new(text).with_class(class));
    let name = export.name();
    if export.is_read_only() {
        return refused(format!("Export {name} is read-only"), ErrorKind::ReadOnly);
    }
    match export.disk().as_chain().and_then(ChainDisk::image) {
        Some(image) => Ok(image),
        None => refused(format!("Export {name} is no qcow2 image"), ErrorKind::Unsupported),
    }
}
