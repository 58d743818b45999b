//! Brings host clusters with equal bytes together that nobody writes in place: those of snapshots, and
//! those that are shared already.
//!
//! | step | what | a crash in it leaves |
//! |---|---|---|
//! | 1 | one cluster of each group is the keeper: it gets a reference for each entry that is to show it, and a pin; what the disk shows and is given up is pinned as well | leaks |
//! | 2 | a write-back: refcounts, a sync, pins, a sync | leaks |
//! | 3 | all entries of a cluster show the keeper instead | some entries show one, some the other, as they hold the same; both are pinned and counted high enough |
//! | 4 | a write-back: the entries, a sync; then the old clusters are free, but for pins of those that nobody needs | leaks |
//!
//! * Always: all entries that show a cluster are known, and are as many as its refcount says; none of the
//!   disk has COPIED. So its bytes cannot change.
//! * Always: bytes are compared while nothing that is freed can be reused for something else.

use super::hosts::Shown;
use super::keeper::{Keeper, most_references};
use crate::Result;
use crate::block::is_zero;
use crate::buffer::Buffer;
use crate::qcow2::format::{L2Entry, OFFSET_MASK};
use crate::qcow2::image::Image;
use crate::qcow2::in_flight::Touch;
use crate::qcow2::meta::Meta;
use crate::qcow2::need::Planned;
use crate::qcow2::pointers::{MOST_POINTERS, Owner, Pointer, redirected, weight};
use crate::qcow2::sharing::Shared;
use crate::qcow2::write_back::Refcounting;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset};

const NOTHING: GuestRange = GuestRange::new(GuestOffset(0), 0);
/// How often a group is cut into those that are like its first member and those that are not.
const MOST_KINDS: usize = 8;

/// What became of groups of host clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct United {
    /// What guest clusters that others could not write to did: as with [`Image::share`].
    pub(crate) shared: Shared,
    /// Clusters that were given up for another one that holds the same.
    pub(crate) united: u64,
}

/// What a cluster of a group may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Nobody writes to it, and all its entries are known: others may show it, or it may be given up.
    Frozen,
    /// One guest cluster shows it and may write to it: it may show another one.
    Single(GuestOffset),
}

/// A keeper, and who is to show it.
struct Plan<'a, S: Storage> {
    keeper: Keeper<'a, S>,
    host: HostOffset,
    given_up: Vec<Shown>,
}

impl<S: Storage> Image<S> {
    /// Has clusters of each group that hold the same bytes be one, if they are what they were when a walk
    /// found them. Nothing where tables of snapshots have changed since. Durable on return.
    ///
    /// # Errors
    /// As [`share`](Self::share).
    pub(crate) async fn unite(
        &self,
        groups: &[Vec<Shown>],
        walk: &super::HostWalk,
    ) -> Result<Option<United>> {
        let pins_stay = self.begin_pinning().await?;
        if self.0.meta.lock().histories != walk.moment() {
            return Ok(None);
        }
        // From here on nothing that is freed is reused.
        let held = self.enter(Touch::Read, NOTHING).await?;
        let (mut done, mut plans) = (United::default(), Vec::new());
        for group in groups {
            self.plan_group(group, &mut plans, &mut done.shared).await?;
        }
        if !plans.is_empty() {
            self.write_back(Refcounting::Written).await?;
        }
        for plan in &mut plans {
            let freed = self.attach_members(&mut plan.keeper, &mut done.shared).await?;
            done.shared.freed_bytes += freed * self.geometry().cluster_bytes();
            for shown in &plan.given_up {
                let keeper = &mut plan.keeper;
                if self.plan(|meta| meta.give_up(shown, plan.host, keeper)).await? {
                    done.united += 1;
                    done.shared.freed_bytes += self.geometry().cluster_bytes();
                }
            }
        }
        let is_any = !plans.is_empty();
        drop((plans, held, pins_stay));
        if is_any {
            self.write_back(Refcounting::Written).await?;
        }
        Ok(Some(done))
    }

    /// Cuts a group into those with equal bytes, and finds a keeper for each part.
    async fn plan_group<'a>(
        &'a self,
        group: &[Shown],
        plans: &mut Vec<Plan<'a, S>>,
        shared: &mut Shared,
    ) -> Result<()> {
        let mut rest = Vec::new();
        for shown in group {
            let role = self.plan(|meta| meta.role(shown)).await?;
            rest.extend(role.map(|role| (role, shown.clone())));
        }
        // Those that are pinned first, then those that most show.
        let order = |meta: &Meta, (role, shown): &(Role, Shown)| {
            let is_pinned = meta.pins.holds(meta.geometry().host_cluster(shown.host));
            (*role != Role::Frozen, !is_pinned, std::cmp::Reverse(shown.pointers.len()))
        };
        rest.sort_by_key(|member| order(&self.0.meta.lock(), member));
        for _ in 0..MOST_KINDS {
            if rest.len() < 2 || rest[0].0 != Role::Frozen {
                return Ok(());
            }
            let bytes = self.read_host(rest[0].1.host).await?;
            let (mut same, mut other) = (Vec::new(), Vec::new());
            for member in rest {
                let is_same = self.read_host(member.1.host).await?[..] == bytes[..];
                if is_same { &mut same } else { &mut other }.push(member);
            }
            shared.differed += u64::from(same.len() == 1);
            if same.len() > 1 && !is_zero(&bytes) {
                self.plan_same(same, plans).await?;
            }
            rest = other;
        }
        Ok(())
    }

    async fn read_host(&self, host: HostOffset) -> Result<Buffer> {
        self.load(host, self.geometry().cluster_bytes(), "a cluster of data").await
    }

    /// Makes keepers of the first of some equal clusters, and of the next where there is no more room.
    async fn plan_same<'a>(
        &'a self,
        mut same: Vec<(Role, Shown)>,
        plans: &mut Vec<Plan<'a, S>>,
    ) -> Result<()> {
        while same.len() > 1 && same[0].0 == Role::Frozen {
            let (_, leader) = same.remove(0);
            let mut plan =
                Plan { keeper: Keeper::new(self), host: leader.host, given_up: Vec::new() };
            let left = self.plan(|meta| plan.take(meta, &leader, &same)).await?;
            // What was not taken may be a keeper for the next ones.
            same = left;
            if !plan.keeper.is_idle() {
                self.plan(|meta| meta.pin_once(leader.host)).await?;
                for shown in &plan.given_up {
                    if shown.pointers.iter().any(|it| matches!(it.table.owner, Owner::Active(_))) {
                        self.plan(|meta| meta.pin_once(shown.host)).await?;
                    }
                }
                plans.push(plan);
            }
        }
        Ok(())
    }
}

impl<S: Storage> Plan<'_, S> {
    /// Takes references for as many others as there is room for; returns the rest.
    fn take(
        &mut self,
        meta: &mut Meta,
        leader: &Shown,
        others: &[(Role, Shown)],
    ) -> Planned<Vec<(Role, Shown)>> {
        meta.before_metadata_change()?;
        if meta.role(leader)? != Some(Role::Frozen) {
            return Ok(others.to_vec());
        }
        let cluster = meta.geometry().host_cluster(leader.host);
        let pin = u64::from(!meta.pins.holds(cluster));
        let mut room = most_references(meta).saturating_sub(meta.refcounts.read(cluster)? + pin);
        let (mut left, mut members, mut given_up, mut count) = (Vec::new(), vec![], vec![], 0);
        for (role, shown) in others {
            let wanted = match role {
                Role::Frozen => weight(&but_for_pins(&shown.pointers)),
                Role::Single(_) => 1,
            };
            if wanted > room {
                left.push((*role, shown.clone()));
                continue;
            }
            (room, count) = (room - wanted, count + wanted);
            match role {
                Role::Frozen => given_up.push(shown.clone()),
                Role::Single(guest) => members.push(*guest),
            }
        }
        self.keeper.take_of(meta, leader.host, count)?;
        (self.keeper.members, self.given_up) = (members, given_up);
        Ok(left)
    }
}

fn but_for_pins(pointers: &[Pointer]) -> Vec<Pointer> {
    let is_pin = |it: &&Pointer| matches!(it.table.owner, Owner::Pins(_));
    pointers.iter().filter(|it| !is_pin(it)).copied().collect()
}

impl Meta {
    /// Returns what a cluster may do; nothing where it is not as it was found.
    fn role(&mut self, shown: &Shown) -> Planned<Option<Role>> {
        if self.is_frozen(shown)? {
            return Ok(Some(Role::Frozen));
        }
        let [pointer] = &shown.pointers[..] else { return Ok(None) };
        let Owner::Active(index) = pointer.table.owner else { return Ok(None) };
        let start = u64::from(index) * self.geometry().l2_coverage_bytes();
        let guest = start + (u64::from(pointer.index) << self.geometry().cluster_bits());
        // Its standing is asked for when it changes.
        Ok((pointer.table.times == 1).then_some(Role::Single(GuestOffset(guest))))
    }

    /// Says whether nobody writes to a cluster where it lies, and the entries that were found are all,
    /// beside its pin.
    fn is_frozen(&mut self, shown: &Shown) -> Planned<bool> {
        let others = but_for_pins(&shown.pointers);
        let cluster = self.geometry().host_cluster(shown.host);
        let pin = u64::from(self.pins.holds(cluster));
        if others.is_empty() || others.len() > MOST_POINTERS || !self.may_move(shown.host) {
            return Ok(false);
        }
        if self.settled_refcount(cluster)? != Some(weight(&others) + pin) {
            return Ok(false);
        }
        let host = shown.host;
        self.all_show(&others, |owner, entry: L2Entry| {
            let is_written = matches!(owner, Owner::Active(_)) && entry.is_copied();
            entry.host() == Some(host) && !is_written
        })
    }

    /// Pins a cluster that lacks a pin.
    fn pin_once(&mut self, host: HostOffset) -> Planned<()> {
        let cluster = self.geometry().host_cluster(host);
        if self.pins.holds(cluster) {
            return Ok(());
        }
        self.before_metadata_change()?;
        self.refcounts.read(cluster)?;
        let at = self.free_pin()?;
        self.refcounts.increase(cluster, 1)?;
        self.set_pin(at, host)
    }

    /// Has all that show a cluster show the keeper, by references that this has taken. Says whether it
    /// was still as it was found.
    fn give_up<S: Storage>(
        &mut self,
        shown: &Shown,
        to: HostOffset,
        keeper: &mut Keeper<'_, S>,
    ) -> Planned<bool> {
        self.before_metadata_change()?;
        let others = but_for_pins(&shown.pointers);
        if !self.is_frozen(shown)? {
            return Ok(false);
        }
        self.refcounts.read(self.geometry().host_cluster(shown.host))?;
        // All is at hand: from here on nothing stops half-way.
        self.point(&others, |word| redirected(without_copied(word), to))?;
        let count = weight(&others);
        keeper.use_some(count);
        self.free_times(self.geometry().host_cluster(shown.host), count)?;
        Ok(true)
    }
}

/// Whatever a snapshot's entry said of itself, there is more than one now.
fn without_copied(word: u64) -> u64 {
    debug_assert!(word & OFFSET_MASK != 0, "an entry that shows a cluster names it");
    L2Entry { word, ..L2Entry::default() }.with_copied(false).word
}
