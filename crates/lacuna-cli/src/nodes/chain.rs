//! An opened disk with what is known of the images it stands on.

use lacuna::chain::{Chain, Disk, LevelFacts, Map, SplitChain};
use lacuna::job::DedupWritesOptions;
use lacuna::qcow2::{Image, SnapshotChoice};
use lacuna::units::GuestRange;

use super::any::AnyStorage;
use super::disk::ToolDisk;

/// A walk through a chain.
pub(crate) type FileMap<'a> = Map<'a, AnyStorage>;

/// A disk and its backing chain.
pub(crate) struct FileChain {
    chain: Chain<AnyStorage>,
    disk: ToolDisk,
}

impl FileChain {
    pub(super) const fn new(chain: Chain<AnyStorage>, disk: ToolDisk) -> Self {
        Self { chain, disk }
    }

    /// Returns the disk as the guest sees it.
    pub(crate) const fn disk(&self) -> &ToolDisk {
        &self.disk
    }

    /// Returns the chain with its disk as it was when a snapshot was made.
    pub(crate) async fn at_snapshot(self, choice: &SnapshotChoice) -> lacuna::Result<Self> {
        let chain = self.chain.at_snapshot(choice).await?;
        let disk = self.disk.at_snapshot(chain.disk().clone())?;
        Ok(Self { chain, disk })
    }

    /// Returns the chain with a disk that stores equal clusters once as they are written.
    pub(crate) fn sharing(self, options: DedupWritesOptions) -> lacuna::Result<Self> {
        Ok(Self { disk: self.disk.sharing(options)?, ..self })
    }

    /// Gives up what is known of the levels.
    pub(crate) fn into_disk(self) -> ToolDisk {
        self.disk
    }

    /// Returns the storage of what the top level stores of the guest's bytes.
    pub(crate) fn content_storage(&self) -> &AnyStorage {
        let disk = self.chain.disk();
        disk.as_qcow2().map_or_else(|| disk.storage(), Image::data_storage)
    }

    /// Returns the levels, top first.
    pub(crate) fn levels(&self) -> &[LevelFacts] {
        self.chain.levels()
    }

    /// Goes through `range` from its start.
    pub(crate) fn map(&self, range: GuestRange) -> FileMap<'_> {
        self.chain.map(range)
    }

    /// Returns the disk of a level, without what options put on top.
    pub(crate) fn level_disk(&self, level: usize) -> Option<&Disk<AnyStorage>> {
        self.chain.level_disk(level)
    }

    /// Returns what the host allocated for the image file of a level, where that is known.
    pub(crate) fn level_allocated_bytes(&self, level: usize) -> Option<u64> {
        self.chain.level_disk(level)?.storage().allocated_bytes()
    }

    /// Returns the image of a level, where it is one of qcow2.
    pub(crate) fn level_image(&self, level: usize) -> Option<&Image<AnyStorage>> {
        self.chain.level_disk(level)?.as_qcow2()
    }
}

/// A chain in two parts, both to be written, without what options put on top.
pub(crate) struct FileChainParts {
    chain: SplitChain<AnyStorage>,
    /// Disks that play storages somewhere below, innermost last.
    nested: Vec<Disk<AnyStorage>>,
}

impl FileChainParts {
    pub(super) const fn new(chain: SplitChain<AnyStorage>, nested: Vec<Disk<AnyStorage>>) -> Self {
        Self { chain, nested }
    }

    /// Returns both parts.
    pub(crate) const fn chain(&self) -> &SplitChain<AnyStorage> {
        &self.chain
    }

    /// Leaves all images as they should be left, those whose turn came already too. The first error
    /// is the one that is told.
    pub(crate) async fn close(self) -> lacuna::Result<()> {
        let base = self.chain.base.into_disk().close().await;
        let mut closed = base.and(self.chain.above.into_disk().close().await);
        for disk in self.nested.into_iter().rev() {
            closed = closed.and(disk.close().await);
        }
        closed
    }
}
