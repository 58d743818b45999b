//! What a check found: counts, and a bounded list of findings.

use super::finding::{Finding, FindingClass, FindingKind};
use crate::units::HostOffset;

/// How many findings a report lists at most; the counts go on.
pub const MAX_FINDINGS: usize = 4096;

/// Places in the list that only errors may take.
const KEPT_FOR_ERRORS: usize = 64;

/// The result of [`check`](super::check): counts with QEMU's meaning, and the findings.
///
/// With a repair the counts describe the state after it; what was repaired stays listed, marked
/// [`repaired`](Finding::repaired).
///
/// ```
/// let report = lacuna::qcow2::check::CheckReport::default();
/// assert!(report.is_clean());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Places that could not be looked at; the other counts are incomplete then.
    pub check_errors: u64,
    /// Violations of the format.
    pub corruptions: u64,
    /// Clusters with more refcount than references: wasted, not dangerous.
    pub leaks: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Guest clusters that have a host cluster or are compressed, active tables only.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Compressed clusters among the allocated ones.
    pub compressed_clusters: u64,
    /// The end of the last host cluster in use.
    pub image_end_offset: HostOffset,
    /// The findings in the order in which they were made; at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    /// How many findings are not listed.
    pub findings_omitted: u64,
}

impl CheckReport {
    /// Says whether nothing is wrong (any more).
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.check_errors == 0 && self.corruptions == 0 && self.leaks == 0
    }

    /// Counts and lists a finding of something that is still so.
    pub(crate) fn record(&mut self, kind: FindingKind, occurrences: u64) {
        let finding = Finding { kind, occurrences, repaired: false };
        let count = match finding.class() {
            FindingClass::Corruption => &mut self.corruptions,
            FindingClass::Error => &mut self.check_errors,
            FindingClass::Leak => &mut self.leaks,
        };
        *count = count.saturating_add(occurrences);
        self.list(finding);
    }

    /// Counts and lists something that was repaired.
    pub(crate) fn record_repaired(&mut self, kind: FindingKind, occurrences: u64) {
        let finding = Finding { kind, occurrences, repaired: true };
        match finding.class() {
            FindingClass::Leak => self.leaks_fixed += occurrences,
            _ => self.corruptions_fixed += occurrences,
        }
        self.list(finding);
    }

    /// Takes the findings about claims out: no such claim is made any more.
    pub(crate) fn take_wrong_claims(&mut self) -> Vec<FindingKind> {
        let is_claim =
            |finding: &mut Finding| matches!(finding.kind, FindingKind::ClaimWrong { .. });
        let taken: Vec<_> = self.findings.extract_if(.., is_claim).map(|it| it.kind).collect();
        self.corruptions -= taken.len() as u64;
        taken
    }

    /// Lists, without counting, something that was repaired.
    pub(crate) fn list_repaired(&mut self, finding: Finding) {
        self.list(Finding { repaired: true, ..finding });
    }

    fn list(&mut self, finding: Finding) {
        // Errors say why a report is not the whole truth: there is room for some even at the end.
        let reserved = if finding.class() == FindingClass::Error { 0 } else { KEPT_FOR_ERRORS };
        if self.findings.len() + reserved < MAX_FINDINGS {
            self.findings.push(finding);
        } else {
            self.findings_omitted += 1;
        }
    }

    /// Puts what a repair did in front of what a later check found.
    pub(crate) fn after_repair(mut self, repair: Self) -> Self {
        self.corruptions_fixed = repair.corruptions_fixed;
        self.leaks_fixed = repair.leaks_fixed;
        let found = std::mem::replace(&mut self.findings, repair.findings);
        self.findings_omitted += repair.findings_omitted;
        for finding in found {
            self.list(finding);
        }
        self
    }
}
