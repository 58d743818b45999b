//! Work on an image that no guest uses: what it does, and what it may leave.

use std::path::Path;

use lacuna::block::{AllocationDepth, DynLayer};
use lacuna::chain::{self, Chain, Format};
use lacuna::job::{Onto, RebaseOptions, commit, empty_top, rebase};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{
    Access, BackingName, CompactOptions, Image, KeptMapping, Shrink, SnapshotChoice,
};
use lacuna::{Error, ErrorKind, Result};
use testkit::sim::{SimHost, SimStorage};

use crate::Lie;
use crate::files::{HostOpener, NAMES, TOP, chain_options, open_to_read, other_below};
use crate::scenario::{BelowSpec, ChoreKind};
use crate::scene::Opening;

/// How a chore ended that nothing cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Done,
    /// It is not for such an image, which was left alone.
    Declined,
}

/// What a chore works on.
#[derive(Clone)]
pub(crate) struct Workplace {
    pub(crate) host: SimHost,
    pub(crate) opening: Opening,
    /// The disks that the image stands on, from its backing file down.
    pub(crate) below: Vec<(usize, Format)>,
    /// Whether a rebase onto the base believes what is not so; see [`Lie`](crate::Lie).
    pub(crate) lie: Option<Lie>,
}

impl Workplace {
    /// Does it, from the opening of the image to its closing.
    pub(crate) async fn perform(self, what: ChoreKind) -> Result<Ending> {
        match what {
            ChoreKind::Amend(options) => {
                let image = self.image().await?;
                let done = image.clone().amend(&options, &mut |_, _| ()).await;
                unless_declined(image, done).await
            }
            ChoreKind::Commit if !self.below.is_empty() => self.commit(1).await,
            ChoreKind::CommitThrough => self.commit(2).await,
            ChoreKind::Commit => Ok(Ending::Declined),
            ChoreKind::Compact => {
                let image = self.image().await?;
                let kept_mapping = KeptMapping::Move;
                let options = CompactOptions { kept_mapping, ..CompactOptions::default() };
                let done = image.clone().compact(&options, &mut |_| ()).await;
                unless_declined(image, done.map(drop)).await
            }
            ChoreKind::Rebase(onto) => self.rebase(onto).await,
            ChoreKind::RebaseOntoBase => self.rebase_onto_base().await,
            ChoreKind::Resize(size_bytes) => {
                let image = self.image().await?;
                let done = image.resize(size_bytes, Shrink::Allow).await;
                let ending = unless_declined(image.clone(), done).await?;
                image.close().await?;
                Ok(ending)
            }
        }
    }

    fn chain_options(&self) -> chain::ChainOptions {
        // A disk below is opened in the same way, to be written, and may be of version 2.
        let image = self.opening.options(Version::V2);
        chain_options(Format::Qcow2, image, Access::ReadWrite)
    }

    async fn open(&self) -> Result<Chain<SimStorage>> {
        let opener = HostOpener(self.host.clone());
        chain::open(&opener, Path::new(NAMES[TOP]), &self.chain_options()).await
    }

    async fn image(&self) -> Result<Image<SimStorage>> {
        let chain = self.open().await?;
        chain.disk().as_qcow2().cloned().ok_or_else(|| Error::invalid("It is no qcow2 image"))
    }

    /// Brings what is above the image at that level into it.
    async fn commit(self, level: usize) -> Result<Ending> {
        let opener = HostOpener(self.host.clone());
        let options = self.chain_options();
        let chain = chain::open_split(&opener, Path::new(NAMES[TOP]), &options, level).await?;
        commit(&chain, &mut |_| ()).await?;
        // The image in between would show through an empty one.
        if level == 1 {
            empty_top(&chain).await?;
        }
        chain.above.into_disk().close().await?;
        Ok(Ending::Done)
    }

    async fn rebase(self, onto: Option<BelowSpec>) -> Result<Ending> {
        let image = self.image().await?;
        let Some(spec) = onto else {
            rebase(image, None, &RebaseOptions::default(), &mut |_, _| ()).await?;
            return Ok(Ending::Done);
        };
        if image.header().has_raw_external_data() {
            image.close().await?;
            return Ok(Ending::Declined);
        }
        let file = other_below(&self.below);
        let new = open_to_read(self.host.clone(), file, spec.own.format()).await?;
        let layer = new.disk() as &dyn DynLayer;
        let onto = Onto { layer, name: spec.named(NAMES[file]), shared_from: None };
        rebase(image, Some(onto), &RebaseOptions::default(), &mut |_, _| ()).await?;
        Ok(Ending::Done)
    }

    async fn rebase_onto_base(self) -> Result<Ending> {
        let image = self.image().await?;
        let Some((file, format)) = self.below.last().copied() else {
            return Err(Error::invalid("It stands on nothing"));
        };
        let new = open_to_read(self.host.clone(), file, format).await?;
        let layer = new.disk() as &dyn DynLayer;
        let name = BackingName { name: NAMES[file].into(), format: Some(format.to_string()) };
        // Counted from the image, which is the first: what the one in between holds must be copied.
        let shared = if self.lie == Some(Lie::Shared) { 2 } else { 3 };
        let onto = Onto { layer, name, shared_from: Some(AllocationDepth(shared)) };
        rebase(image, Some(onto), &RebaseOptions::default(), &mut |_, _| ()).await?;
        Ok(Ending::Done)
    }
}

/// Takes what was refused for done, and closes the image then.
async fn unless_declined(image: Image<SimStorage>, done: Result<()>) -> Result<Ending> {
    match done {
        Ok(()) => Ok(Ending::Done),
        Err(error) if is_refusal(&error) => {
            image.close().await?;
            Ok(Ending::Declined)
        }
        Err(error) => Err(error),
    }
}

fn is_refusal(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidRequest | ErrorKind::Unsupported)
}

/// Deletes all snapshots: what they read as may be in the disk below, which is about to change.
pub(crate) async fn delete_snapshots(image: Image<SimStorage>) -> Result<()> {
    for snapshot in image.snapshots().await? {
        if !snapshot.is_pin() {
            image.delete_snapshot(&SnapshotChoice::Name(snapshot.name.clone())).await?;
        }
    }
    Ok(())
}
