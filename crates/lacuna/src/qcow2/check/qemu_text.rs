//! The line that QEMU's check prints for a finding, for those who read its output by program.

use super::finding::{Finding, FindingKind};
use crate::units::HostOffset;

const OVERFLOW_ADVICE: &str = "Use qemu-img amend to increase the refcount entry width or \
    qemu-img convert to create a clean copy if the image cannot be opened for writing";

const EXTRA_ADVICE: &str = "You can force-remove this extra metadata with qemu-img check -r all";

impl Finding {
    /// Returns the text that `qemu-img check` prints for this finding; more than one line with
    /// overflows. Where QEMU has no such finding, our text behind `ERROR`.
    #[must_use]
    pub fn qemu_text(&self) -> String {
        let verb = if self.repaired { "Repairing" } else { "ERROR" };
        if let FindingKind::RefcountMismatch { cluster, refcount, references } = &self.kind {
            let verb = if !self.repaired && refcount > references { "Leaked" } else { verb };
            let cluster = cluster.0;
            return format!("{verb} cluster {cluster} refcount={refcount} reference={references}");
        }
        entry_text(&self.kind, verb)
            .or_else(|| table_text(&self.kind, verb))
            .or_else(|| structure_text(&self.kind, verb))
            .unwrap_or_else(|| format!("ERROR {}", self.kind))
    }
}

fn entry_text(kind: &FindingKind, verb: &str) -> Option<String> {
    Some(match kind {
        FindingKind::CompressedCopied { offset: HostOffset(offset), .. } => format!(
            "ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed clusters"
        ),
        FindingKind::CompressedInDataFile { index, entry, .. } => {
            format!("ERROR compressed cluster {index} with data file, entry=0x{entry:x}")
        }
        FindingKind::CompressedWithSubclusters { index, entry, .. } => format!(
            "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, \
             entry=0x{entry:x}"
        ),
        FindingKind::CopiedData { entry, refcount, .. } => {
            format!("{verb} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
        }
        FindingKind::DataUnaligned { offset: HostOffset(offset), .. } => format!(
            "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
        ),
        FindingKind::L2Reserved { entry, .. } => {
            format!("ERROR found l2 entry with reserved bits set: {entry:x}")
        }
        FindingKind::PreallocatedUnaligned { offset: HostOffset(offset), .. } => format!(
            "{verb} offset={offset:x}: Preallocated cluster is not properly aligned; \
             L2 entry corrupted."
        ),
        FindingKind::SubclustersInvalid { offset: HostOffset(offset), .. } => format!(
            "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
        ),
        FindingKind::UnallocatedWithSubclusters { .. } => {
            "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned()
        }
        _ => return None,
    })
}

fn table_text(kind: &FindingKind, verb: &str) -> Option<String> {
    Some(match kind {
        FindingKind::CopiedTable { index, entry, refcount } => format!(
            "{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} \
             refcount={refcount}"
        ),
        FindingKind::L1Reserved { entry, .. } => {
            format!("ERROR found L1 entry with reserved bits set: {entry:x}")
        }
        FindingKind::L1Unaligned { offset: HostOffset(offset), .. } => {
            format!("ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
        }
        FindingKind::ReferencePastEnd { start: HostOffset(start), len } => format!(
            "ERROR: counting reference for region exceeding the end of the file by one cluster \
             or more: offset 0x{start:x} size 0x{len:x}"
        ),
        FindingKind::TableUnreadable { level, .. } => {
            format!("ERROR: I/O error in check_refcounts_l{level}")
        }
        _ => return None,
    })
}

fn structure_text(kind: &FindingKind, verb: &str) -> Option<String> {
    Some(match kind {
        FindingKind::RefcountBlockOutside { index, .. } => {
            format!("{verb} refcount block {index} is outside image")
        }
        FindingKind::RefcountBlockShared { index, references, .. } => {
            format!("ERROR refcount block {index} refcount={references}")
        }
        FindingKind::RefcountBlockUnaligned { index, .. } => format!(
            "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
        ),
        FindingKind::RefcountOverflow { offset: HostOffset(offset) } => {
            format!("ERROR: overflow cluster offset=0x{offset:x}\n{OVERFLOW_ADVICE}")
        }
        FindingKind::RefcountTableReserved { index, .. } => {
            format!("ERROR refcount table entry {index} has reserved bits set")
        }
        FindingKind::RefcountUnreadable { cluster, .. } => {
            format!("Can't get refcount for cluster {}: Input/output error", cluster.0)
        }
        FindingKind::SnapshotExtraTooLarge { index, bytes } if verb == "Repairing" => format!(
            "Discarding too much extra metadata in snapshot table entry {index} ({bytes} > 1024)"
        ),
        FindingKind::SnapshotExtraTooLarge { index, .. } => format!(
            "qemu-img: ERROR failed to read the snapshot table: Too much extra metadata in \
             snapshot table entry {index}\n{EXTRA_ADVICE}"
        ),
        FindingKind::SnapshotIncomplete { index } => {
            format!("{verb} snapshot table entry {index} is incomplete")
        }
        FindingKind::SnapshotL1TooLarge { id, name, entries } => format!(
            "ERROR snapshot {id} ({name}) l1_size={entries:#x}: L1 table is too large; \
             snapshot table entry corrupted"
        ),
        FindingKind::SnapshotL1Unaligned { id, name, offset: HostOffset(offset) } => format!(
            "ERROR snapshot {id} ({name}) l1_offset={offset:#x}: L1 table is not cluster aligned; \
             snapshot table entry corrupted"
        ),
        FindingKind::SnapshotsWithDataFile { count } => {
            format!("ERROR {count} snapshots in image with data file")
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::HostCluster;

    fn text(kind: FindingKind, repaired: bool) -> String {
        Finding { kind, occurrences: 1, repaired }.qemu_text()
    }

    #[test]
    fn refcount_lines_name_leaks_errors_and_repairs() {
        let mismatch = |refcount, references| FindingKind::RefcountMismatch {
            cluster: HostCluster(3),
            refcount,
            references,
        };
        assert_eq!(text(mismatch(1, 0), false), "Leaked cluster 3 refcount=1 reference=0");
        assert_eq!(text(mismatch(0, 1), false), "ERROR cluster 3 refcount=0 reference=1");
        assert_eq!(text(mismatch(1, 0), true), "Repairing cluster 3 refcount=1 reference=0");
    }

    #[test]
    fn copied_lines_show_the_entry() {
        let kind = FindingKind::CopiedData {
            table: HostOffset(0x40000),
            index: 0,
            entry: 0x8000_0000_0005_0000,
            refcount: 2,
        };
        assert_eq!(
            text(kind, false),
            "ERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=2"
        );
    }
}
