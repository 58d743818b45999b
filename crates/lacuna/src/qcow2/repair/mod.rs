//! Repair of what a check found, in an order that survives a crash at every write.
//!
//! | step | writes | a crash before the next step leaves |
//! |---|---|---|
//! | 1 | feature words: unknown autoclear bits off; *flush* | the image as it was |
//! | – | entries that are wrong without regard to refcounts, then from the start; *flush* | leaks |
//! | 2 | new snapshot table in free clusters; *flush* | clusters that nothing refers to |
//! | 3 | refcounts that are too low, raised; or new refcount blocks and table in free clusters, *flush*, 12 bytes of the header; *flush* | the old refcounts or the new ones, both whole; refcounts that are too high at worst |
//! | 4 | snapshot table: 12 bytes of the header; *flush* | the old table or the new one |
//! | 5 | entries: copied flags and what else can be put right; *flush* | a mix of old and new entries; every new one is right with the refcounts of step 3 and those of step 6 |
//! | 6 | refcounts that are too high, lowered; *flush* | leaks |
//! | 7 | holes punched where clusters became free | space not given back |
//! | 8 | after another check: dirty and corrupt bits off; *flush* | a bit too many, for the next opener |
//!
//! * Always: a refcount is raised before a copied flag goes, and lowered after all entries are
//!   right. So no state in between lets a writer free a cluster that somebody refers to.
//! * Always: where not every reference is known (damaged pointers, unreadable tables), refcounts
//!   are only raised: what looks leaked may be what the damaged pointer meant.
//! * Never: anything is written where the header puts the active L1 table past the end of the file:
//!   what the disk is made of is not known then.
//! * Never: a snapshot or a bitmap is dropped to make the report clean (D.1-66). A table is never
//!   written where other metadata lies.

mod copied;
mod rebuild;
mod refcounts;
mod snapshots;

use std::ops::Range;

use self::copied::Scope;
use self::snapshots::NewTable;
use super::check::{CheckReport, FindingKind, Listener, Phase, Progress, Repair, Survey};
use super::header_change::write_features;
use super::patch::write_changes;
use crate::Result;
use crate::buffer::{Buffer, Hold};
use crate::qcow2::format::{AutoclearFeatures, IncompatibleFeatures, Version};
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};

/// A repair may uncover something else; more often than this it goes nowhere.
const ROUNDS: u64 = 4;

/// One round of a repair.
struct Round<'a, S> {
    storage: &'a S,
    survey: &'a mut Survey,
    /// What was repaired.
    report: &'a mut CheckReport,
    /// Whether anything was written.
    wrote: bool,
    freed: Vec<HostRange>,
    /// Clusters whose refcounts change for the repair's own sake: no findings.
    quiet: Vec<Range<u64>>,
    new_snapshots: Option<NewTable>,
}

/// Repairs what `wanted` allows, and checks again.
pub(crate) async fn repair<S: Storage>(
    storage: &S,
    mut survey: Survey,
    wanted: Repair,
    listener: Listener<'_>,
) -> Result<CheckReport> {
    let mut repaired = CheckReport::default();
    if !survey.io_failed {
        clear_bits_of_others(storage, &mut survey).await?;
        for kind in survey.report.take_wrong_claims() {
            repaired.record_repaired(kind, 1);
        }
    }
    for round in 0..ROUNDS {
        listener(Progress { phase: Phase::Repair, done: round, total: ROUNDS });
        if survey.report.is_clean() || survey.io_failed || !survey.l1_is_inside {
            break;
        }
        let mut round = Round {
            storage,
            survey: &mut survey,
            report: &mut repaired,
            wrote: false,
            freed: Vec::new(),
            quiet: Vec::new(),
            new_snapshots: None,
        };
        match wanted {
            Repair::All => round.all().await?,
            Repair::Leaks => round.leaks().await?,
            Repair::None => {}
        }
        if !round.wrote {
            break;
        }
        // Two of them would take twice the memory.
        drop(survey);
        survey = Survey::make(storage, listener).await?;
    }
    clear_bits(storage, &survey).await?;
    Ok(survey.report.after_repair(repaired))
}

impl<S: Storage> Round<'_, S> {
    async fn all(&mut self) -> Result<()> {
        if self.survey.repairable_entries > 0 {
            // What such entries refer to does not count afterwards: look again first.
            self.repair_entries(Scope::NoFlags).await?;
            if self.wrote {
                return Ok(());
            }
        }
        self.prepare_snapshots().await?;
        if self.survey.needs_rebuild {
            if !self.rebuild().await? {
                return Ok(());
            }
        } else {
            self.raise().await?;
        }
        self.switch_snapshots().await?;
        self.repair_entries(Scope::All).await?;
        self.lower().await?;
        self.punch().await;
        Ok(())
    }

    /// Leaks first; copied flags once they are all that is wrong, as the refcounts that they are
    /// judged by are right then.
    async fn leaks(&mut self) -> Result<()> {
        let report = &self.survey.report;
        if report.leaks > 0 && self.survey.is_complete {
            self.lower().await?;
            self.punch().await;
        } else if report.check_errors == 0 && report.corruptions == self.survey.wrong_flags {
            self.repair_entries(Scope::All).await?;
        }
        Ok(())
    }

    async fn write(&mut self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        self.wrote = true;
        write(self.storage, at, bytes).await
    }

    /// Writes the sectors in which `new` differs from `old`.
    async fn write_changes(&mut self, at: HostOffset, old: &[u8], new: &[u8]) -> Result<()> {
        self.wrote |= write_changes(self.storage, at, old, new).await? > 0;
        Ok(())
    }

    /// Makes what was written so far durable.
    async fn flush(&self) -> Result<()> {
        if self.wrote { self.storage.flush().await } else { Ok(()) }
    }

    /// Gives the space of clusters back that are free now, durably so.
    async fn punch(&mut self) {
        for range in std::mem::take(&mut self.freed) {
            // Space that is not given back is no harm, and not every host can (D.1-6).
            if self.storage.punch_hole_at(range, Hold::none()).await.is_err() {
                return;
            }
        }
    }

    fn give_up(&mut self, text: &str) {
        let kind = FindingKind::RepairImpossible { text: text.to_owned() };
        self.survey.report.record(kind, 1);
    }
}

async fn write<S: Storage>(storage: &S, at: HostOffset, bytes: &[u8]) -> Result<()> {
    storage.write_at(at, Buffer::from(bytes)).await.0
}

/// Clears the autoclear bits that are not known here: who opens an image for writing does so before
/// anything else (B.12), whether anything is written later or not. The claims about the whole disk
/// and its places go too: a repair may change both (A.1.2). Intents of bitmaps stay: who opens the
/// image next finds by them what a crash kept from being stored.
async fn clear_bits_of_others<S: Storage>(storage: &S, survey: &mut Survey) -> Result<()> {
    let mut kept = AutoclearFeatures::BITMAPS | AutoclearFeatures::RAW_EXTERNAL_DATA;
    kept.set(AutoclearFeatures::BITMAP_INTENTS, survey.header.keeps_bitmap_intents());
    let features = &mut survey.header.features;
    if kept.contains(features.autoclear) {
        return Ok(());
    }
    features.autoclear &= kept;
    write_features(storage, features).await.map(drop)
}

/// Clears the dirty and the corrupt bit where the last check found neither error nor corruption.
async fn clear_bits<S: Storage>(storage: &S, survey: &Survey) -> Result<()> {
    let mut features = survey.header.features;
    let bits = IncompatibleFeatures::DIRTY | IncompatibleFeatures::CORRUPT;
    let report = &survey.report;
    let is_sound = report.check_errors == 0 && report.corruptions == 0;
    let is_marked = features.incompatible.intersects(bits);
    if !is_sound || !is_marked || survey.geometry.version() == Version::V2 {
        return Ok(());
    }
    features.incompatible -= bits;
    write_features(storage, &features).await.map(drop)
}
