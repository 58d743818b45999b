//! Has guest clusters with equal bytes share one host cluster.
//!
//! | step | what | a crash in it leaves |
//! |---|---|---|
//! | 1 | keepers: fresh clusters with the bytes of a group, or clusters that are shared already; their refcounts as they are to be, and pins | leaks |
//! | 2 | a write-back: data and refcounts, a sync, pins, a sync | leaks: references that nobody has yet |
//! | 3 | each member is compared with its keeper while nobody can write to it, and shows it from then on | the old entries |
//! | 4 | a write-back: the entries, a sync; then the old clusters are free | leaks |
//!
//! So there are two write-backs a call, however many groups. Memory: two clusters of bytes, and about
//! 100 bytes a group and 8 a member.

use std::collections::HashSet;

use super::keeper::{Keeper, Standing, most_references};
use super::load::CHANGING;
use crate::block::is_zero;
use crate::buffer::Buffer;
use crate::qcow2::image::Image;
use crate::qcow2::in_flight::Touch;
use crate::qcow2::meta::Meta;
use crate::qcow2::need::Need;
use crate::qcow2::view::View;
use crate::qcow2::write_back::Refcounting;
use crate::storage::Storage;
use crate::units::{GuestCluster, GuestOffset, GuestRange, HostOffset};
use crate::{ErrorKind, Result};

/// How often a group is cut into those that are like its first member and those that are not.
const MOST_KINDS: usize = 8;

/// What became of groups of guest clusters.
///
/// ```
/// assert_eq!(lacuna::qcow2::Shared::default().freed_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Guest clusters that show a shared cluster, or a shared stream, and did not before.
    pub shared: u64,
    /// Bytes of the image file that nothing uses any more, less those of new keepers. The tables of
    /// the pins are not counted.
    pub freed_bytes: u64,
    /// Guest clusters with other bytes than the rest of their group.
    pub differed: u64,
    /// Host clusters that were made to be shared.
    pub keepers: u64,
}

/// A guest cluster of a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) guest: GuestOffset,
    pub(super) standing: Standing,
}

impl<S: Storage> Image<S> {
    /// Has guest clusters with equal bytes share one host cluster. Each group holds clusters that are
    /// believed to be equal. Bytes are compared here, while nobody can write to them; what differs is
    /// left out, as are zeros, a last cluster that is not whole, and what a snapshot shares.
    ///
    /// What guests read does not change, and they may write meanwhile. Durable on return. Dropped or
    /// failed half-way, it leaves what it did so far. Of compressed clusters, those share a stream whose
    /// bytes are equal once decompressed.
    ///
    /// # Errors
    /// What [`why_not_share`](Self::why_not_share) says; `Corrupt` where pins are damaged; `NoSpace`
    /// where no more fit; else as for reads and writes.
    ///
    /// ```
    /// use lacuna::block::{Layer, WriteFlags};
    /// use lacuna::buffer::Buffer;
    /// use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
    /// use lacuna::storage::MemoryStorage;
    /// use lacuna::units::{GuestCluster, GuestOffset};
    ///
    /// pollster::block_on(async {
    ///     let storage = MemoryStorage::new();
    ///     create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
    ///     let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite)).await?;
    ///     let same = Buffer::from(&[7; 3 << 16][..]);
    ///     image.write(GuestOffset(0), same, WriteFlags::empty()).await.0?;
    ///     let shared = image.share(&[[0, 1, 2].map(GuestCluster).to_vec()]).await?;
    ///     assert_eq!((shared.shared, shared.freed_bytes), (3, 2 << 16));
    ///     image.close().await
    /// }).unwrap();
    /// ```
    pub async fn share(&self, groups: &[Vec<GuestCluster>]) -> Result<Shared> {
        if let Some(error) = self.why_not_share() {
            return Err(error);
        }
        let hold = self.begin_pinning().await?;
        let mut shared = Shared::default();
        let mut keepers = Vec::new();
        for group in groups {
            self.find_keepers(group, &mut keepers, &mut shared).await?;
        }
        self.write_back(Refcounting::Written).await?;
        let mut freed = 0;
        for keeper in &mut keepers {
            freed += self.attach_members(keeper, &mut shared).await?;
        }
        shared.freed_bytes = freed.saturating_sub(shared.keepers) << self.geometry().cluster_bits();
        drop(keepers);
        drop(hold);
        self.write_back(Refcounting::Written).await?;
        Ok(shared)
    }

    /// Cuts a group into those with equal bytes, and finds keepers for each part.
    async fn find_keepers<'a>(
        &'a self,
        group: &[GuestCluster],
        keepers: &mut Vec<Keeper<'a, S>>,
        shared: &mut Shared,
    ) -> Result<()> {
        let mut rest = self.members(group).await?;
        if !can_gain(&rest) {
            return Ok(());
        }
        for _ in 0..MOST_KINDS {
            if !can_gain(&rest) {
                break;
            }
            // The disk has shrunk meanwhile.
            let Some(bytes) = self.read_cluster(rest[0].guest).await? else { break };
            let (same, other) = self.part(rest, &bytes).await?;
            shared.differed += u64::from(same.len() == 1);
            if can_gain(&same) && !is_zero(&bytes) {
                self.keep_streams(&same, keepers).await?;
                let single = self.join_shared(&same, keepers).await?;
                self.keep_fresh(single, bytes, keepers, shared).await?;
            }
            rest = other;
        }
        shared.differed += rest.len() as u64;
        Ok(())
    }

    /// Looks up what can share at all; one of those that share a cluster already stands for all.
    pub(super) async fn members(&self, group: &[GuestCluster]) -> Result<Vec<Member>> {
        let mut group = group.to_vec();
        group.sort_unstable();
        group.dedup();
        let (bits, size) = (self.geometry().cluster_bits(), self.size());
        let mut hosts = HashSet::new();
        let mut members = Vec::new();
        for cluster in group.into_iter().filter(|cluster| cluster.0 < size >> bits) {
            let guest = self.geometry().guest_offset(cluster);
            let standing = self.plan(|meta| meta.standing(guest)).await?;
            let is_new = match standing {
                Standing::Other => false,
                Standing::Shared(host) => hosts.insert(host),
                Standing::Compressed(_) | Standing::Single => true,
            };
            members.extend(is_new.then_some(Member { guest, standing }));
        }
        Ok(members)
    }

    /// Reads a guest cluster, if it is still there.
    async fn read_cluster(&self, guest: GuestOffset) -> Result<Option<Buffer>> {
        let buffer = Buffer::new(self.geometry().cluster_bytes() as usize);
        match self.read_guest(View::Active, guest, buffer).await {
            (Ok(()), bytes) => Ok(Some(bytes)),
            (Err(error), _) if error.kind() == ErrorKind::OutOfBounds => Ok(None),
            (Err(error), _) => Err(error),
        }
    }

    /// Parts the members that hold `bytes`, the first of them, from the others.
    async fn part(&self, members: Vec<Member>, bytes: &[u8]) -> Result<(Vec<Member>, Vec<Member>)> {
        let (mut same, mut other) = (Vec::new(), Vec::new());
        for (index, member) in members.into_iter().enumerate() {
            let is_same = index == 0
                || self.read_cluster(member.guest).await?.is_some_and(|seen| seen[..] == *bytes);
            let part = if is_same { &mut same } else { &mut other };
            part.push(member);
        }
        Ok((same, other))
    }

    /// Has compressed members share the stream of the first, of the next where there is no more room.
    async fn keep_streams<'a>(
        &'a self,
        members: &[Member],
        keepers: &mut Vec<Keeper<'a, S>>,
    ) -> Result<()> {
        let is_compressed = |it: &&Member| matches!(it.standing, Standing::Compressed(_));
        let mut rest: Vec<Member> = members.iter().filter(is_compressed).copied().collect();
        while let Some((leader, others)) = rest.split_first() {
            let others = others.iter().filter(|it| it.standing != leader.standing).copied();
            let others: Vec<Member> = others.collect();
            let left = self.join(*leader, guests(&others), keepers).await?;
            rest = others.into_iter().filter(|it| left.contains(&it.guest)).collect();
        }
        Ok(())
    }

    /// Has members with clusters of their own share what others share already. Returns for whom there
    /// was no room.
    async fn join_shared<'a>(
        &'a self,
        members: &[Member],
        keepers: &mut Vec<Keeper<'a, S>>,
    ) -> Result<Vec<GuestOffset>> {
        let is_single = |it: &&Member| it.standing == Standing::Single;
        let mut single: Vec<GuestOffset> =
            members.iter().filter(is_single).map(|it| it.guest).collect();
        let is_shared = |it: &&Member| matches!(it.standing, Standing::Shared(_));
        for leader in members.iter().filter(is_shared) {
            single = self.join(*leader, single, keepers).await?;
        }
        Ok(single)
    }

    /// Makes a keeper of what a member shows. Returns the members for whom there was no room.
    async fn join<'a>(
        &'a self,
        leader: Member,
        members: Vec<GuestOffset>,
        keepers: &mut Vec<Keeper<'a, S>>,
    ) -> Result<Vec<GuestOffset>> {
        if members.is_empty() {
            return Ok(members);
        }
        let mut keeper = Keeper::new(self);
        keeper.members = members;
        let left = self
            .plan(|meta| match meta.standing(leader.guest)? == leader.standing {
                true => {
                    let entry = meta.entry_to_change(leader.guest)?;
                    keeper.take(meta, entry)
                }
                // Somebody wrote to it meanwhile.
                false => Ok(std::mem::take(&mut keeper.members)),
            })
            .await?;
        if !keeper.members.is_empty() {
            self.plan(|meta| keeper.pin(meta)).await?;
            keepers.push(keeper);
        }
        Ok(left)
    }

    /// Makes a fresh cluster of `bytes` for as many members as may share it, and the next.
    async fn keep_fresh<'a>(
        &'a self,
        members: Vec<GuestOffset>,
        mut bytes: Buffer,
        keepers: &mut Vec<Keeper<'a, S>>,
        shared: &mut Shared,
    ) -> Result<()> {
        let most = most_references(&self.0.meta.lock()) - 1;
        for members in members.chunks(most as usize).filter(|members| members.len() > 1) {
            let mut keeper = Keeper::new(self);
            keeper.members = members.to_vec();
            let host = self.plan(|meta| keeper.allocate(meta)).await?;
            bytes = self.write_keeper(host, bytes).await?;
            self.plan(|meta| keeper.pin(meta)).await?;
            keepers.push(keeper);
            shared.keepers += 1;
        }
        Ok(())
    }

    /// While the bytes are with the driver, the cluster is not reused, whatever becomes of the call.
    async fn write_keeper(&self, host: HostOffset, mut bytes: Buffer) -> Result<Buffer> {
        let begin = |meta: &mut Meta| {
            Ok(meta.in_flight.begin(Touch::Read, CHANGING).map_err(Need::Turn)?)
        };
        let token = self.plan(begin).await?;
        bytes.set_hold(self.hold(token));
        let (result, mut bytes) = self.data_storage().write_at(host, bytes).await;
        drop(bytes.take_hold());
        result.map(|()| bytes)
    }

    /// Compares each member with its keeper, and has it show that. Returns how many clusters of the
    /// image file nothing uses any more.
    pub(super) async fn attach_members(
        &self,
        keeper: &mut Keeper<'_, S>,
        shared: &mut Shared,
    ) -> Result<u64> {
        let bytes = self.read_keeper(keeper).await?;
        let mut freed = 0;
        for guest in std::mem::take(&mut keeper.members) {
            let range = GuestRange::new(guest, self.geometry().cluster_bytes());
            let hold = self.exclude_others(range).await?;
            if !self.still_holds(range, &bytes).await? {
                shared.differed += 1;
                continue;
            }
            if let Some(unused) = self.plan(|meta| keeper.attach(meta, guest)).await? {
                shared.shared += 1;
                freed += unused;
            }
            drop(hold);
        }
        Ok(freed)
    }

    /// Compares a range that nobody else changes; the disk may end in it, or before, by now.
    async fn still_holds(&self, range: GuestRange, bytes: &[u8]) -> Result<bool> {
        match self.look(range).await {
            Err(error) if error.kind() == ErrorKind::OutOfBounds => Ok(false),
            found => Ok(found?[..] == *bytes),
        }
    }

    pub(super) async fn read_keeper(&self, keeper: &Keeper<'_, S>) -> Result<Buffer> {
        match (keeper.stream(), keeper.entry.host()) {
            (Some(stream), _) => self.decompress(stream).await,
            (None, host) => {
                let len = self.geometry().cluster_bytes();
                self.load(host.unwrap_or_default(), len, "shared cluster").await
            }
        }
    }
}

/// Says whether something could be shared that is not: two clusters, one of which is not shared.
fn can_gain(members: &[Member]) -> bool {
    let is_single = |it: &Member| !matches!(it.standing, Standing::Shared(_));
    members.len() > 1 && members.iter().any(is_single)
}

fn guests(members: &[Member]) -> Vec<GuestOffset> {
    members.iter().map(|member| member.guest).collect()
}
