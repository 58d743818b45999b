//! What changed, as an NBD server tells it: a dirty bitmap, or who in its chain holds what.

use lacuna::Result;
use lacuna::qcow2::DirtyExtent;
use lacuna::units::{GuestRange, HostOffset, HostRange};
use lacuna_backup::Changes;
use lacuna_nbd::context::{DIRTY, LAYERS, LayersStatus, QEMU_DIRTY_BITMAP};
use lacuna_remote::{NbdOptions, NbdStorage};

use super::super::spec::nbd::NbdSpec;

/// What to ask a server for.
#[derive(Clone, Debug)]
pub(super) enum Question {
    /// What this dirty bitmap names.
    Dirty(String),
    /// What the highest levels of the chain hold.
    Levels(u32),
}

impl Question {
    fn context(&self) -> String {
        match self {
            Self::Dirty(bitmap) => format!("{QEMU_DIRTY_BITMAP}{bitmap}"),
            Self::Levels(_) => LAYERS.to_owned(),
        }
    }

    fn has_changed(&self, status: u64) -> bool {
        match self {
            Self::Dirty(_) => status & DIRTY != 0,
            Self::Levels(count) => {
                (0..*count).any(|level| LayersStatus(status).is_allocated(level))
            }
        }
    }
}

/// A connection on which one thing is asked.
pub(super) struct ExportChanges {
    export: NbdStorage,
    question: Question,
}

impl ExportChanges {
    /// Connects.
    pub(super) async fn open(spec: &NbdSpec, question: Question) -> Result<Self> {
        let options = NbdOptions {
            status_context: Some(question.context()),
            connections: 1,
            ..spec.options(false)?
        };
        let export = NbdStorage::open(&spec.uri, &options).await?;
        Ok(Self { export, question })
    }
}

impl Changes for ExportChanges {
    async fn changes(&self, range: GuestRange) -> Result<Vec<DirtyExtent>> {
        let asked = HostRange::new(HostOffset(range.start.0), range.len);
        let (mut found, mut at) = (Vec::new(), range.start);
        for run in self.export.statuses(asked).await? {
            let range = GuestRange::new(at, run.len);
            found.push(DirtyExtent { range, is_dirty: self.question.has_changed(run.status) });
            at = range.end();
        }
        Ok(found)
    }
}
