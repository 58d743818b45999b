//! Equal clusters of snapshots, of the disk and among those that are shared already: by where they lie,
//! not by who shows them.
//!
//! The story: a walk through all tables finds which clusters hold data; they are read in the order of the
//! file, and those with equal fingerprints are groups; another walk finds who shows these; the image
//! brings those together whose bytes are equal as well.
//!
//! * Where there are no snapshots, only what is shared already is read: the others were found as
//!   clusters of the disk.
//! * Where snapshots change meanwhile, the rest is left to another run.

use super::candidates::{Candidates, Groups, Passes};
use super::fingerprint::Fingerprinter;
use super::share::{DedupOptions, Deduped, FEWEST_MEMBERS, Sharing};
use crate::Result;
use crate::block::is_zero;
use crate::buffer::Buffer;
use crate::qcow2::{HostStep, HostWalk, Hosts, Image, Shown, Wanted, Worth};
use crate::storage::Storage;
use crate::units::{HostCluster, HostOffset};

/// So many bytes of neighbours are read at once.
const RUN_BYTES: u64 = 1 << 20;
/// Memory for a cluster that looks like another one, with a few entries that show it.
const MEMBER_BYTES: u64 = 300;

/// The work that is left.
pub(super) struct OfHosts<S: Storage> {
    image: Image<S>,
    options: DedupOptions,
    fingerprinter: Fingerprinter,
    state: State,
    pass: u64,
}

enum State {
    Begin,
    Walk(HostWalk, Hosts),
    Read(Reading),
    Trace(Tracing),
    Unite(Uniting),
    Over,
}

/// Clusters that are read.
struct Reading {
    hosts: Vec<HostCluster>,
    frozen: Hosts,
    passes: Passes,
    candidates: Candidates,
    next: usize,
}

/// What follows on a pass.
struct Rest {
    hosts: Vec<HostCluster>,
    frozen: Hosts,
    passes: Passes,
    groups: Groups,
}

/// Groups whose entries are looked for.
struct Tracing {
    rest: Rest,
    batch: Vec<Vec<u64>>,
    walk: HostWalk,
    wanted: Wanted,
}

/// Groups that are brought together.
struct Uniting {
    rest: Rest,
    batch: Vec<Vec<Shown>>,
    walk: HostWalk,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HostProgress {
    /// Bytes of clusters that lie behind, and of all, while they are read.
    pub(super) found: Option<(u64, u64)>,
    pub(super) read_bytes: u64,
    pub(super) is_over: bool,
}

impl<S: Storage> OfHosts<S> {
    pub(super) fn new(
        image: &Image<S>,
        options: DedupOptions,
        fingerprinter: Fingerprinter,
    ) -> Self {
        // However short steps are to be, each gets on.
        let options = DedupOptions { slice_bytes: options.slice_bytes.max(1), ..options };
        Self { image: image.clone(), options, fingerprinter, state: State::Begin, pass: 0 }
    }

    /// Does one step, and adds to what was done.
    pub(super) async fn step(&mut self, done: &mut Deduped) -> Result<HostProgress> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Begin => self.begin().await,
            State::Walk(walk, hosts) => self.walk(walk, hosts).await,
            State::Read(reading) => self.read(reading, done).await,
            State::Trace(tracing) => self.trace(tracing).await,
            State::Unite(uniting) => self.unite(uniting, done).await,
            State::Over => Ok(HostProgress { is_over: true, ..HostProgress::default() }),
        }
    }

    async fn begin(&mut self) -> Result<HostProgress> {
        if self.image.header().snapshots.count > 0 {
            self.state = State::Walk(self.image.walk_hosts().await?, Hosts::default());
        }
        Ok(HostProgress::default())
    }

    async fn walk(&mut self, mut walk: HostWalk, mut hosts: Hosts) -> Result<HostProgress> {
        let slice_bytes = self.options.slice_bytes;
        let read_bytes = match self.image.find_hosts(&mut walk, &mut hosts, slice_bytes).await? {
            HostStep::Changed => 0,
            HostStep::Read(bytes) => {
                self.state = State::Walk(walk, hosts);
                bytes
            }
            HostStep::Over => {
                let with_written = self.image.has_real_snapshots().await?;
                let all = hosts.in_order(with_written);
                if all.iter().any(|host| hosts.is_frozen(*host)) && all.len() > 1 {
                    self.begin_pass(all, hosts);
                }
                0
            }
        };
        Ok(HostProgress { read_bytes, ..HostProgress::default() })
    }

    fn begin_pass(&mut self, hosts: Vec<HostCluster>, frozen: Hosts) {
        let end = hosts.last().map_or(0, |last| last.0 + 1);
        let passes = Passes::new(end, hosts.len() as u64, self.options.memory_bytes);
        let candidates = passes.begin(self.pass);
        self.state = State::Read(Reading { hosts, frozen, passes, candidates, next: 0 });
    }

    async fn read(&mut self, mut reading: Reading, done: &mut Deduped) -> Result<HostProgress> {
        let cluster_bytes = self.image.geometry().cluster_bytes();
        let mut read_bytes = 0;
        while read_bytes < self.options.slice_bytes && reading.next < reading.hosts.len() {
            read_bytes += self.read_run(&mut reading).await?;
        }
        let bytes = |count: usize| count as u64 * cluster_bytes;
        let found = Some((bytes(reading.next), bytes(reading.hosts.len())));
        if reading.next < reading.hosts.len() {
            self.state = State::Read(reading);
        } else {
            let Reading { hosts, frozen, passes, candidates, .. } = reading;
            let groups = candidates.into_groups();
            let rest = Rest { hosts, frozen, passes, groups };
            match self.pays(&rest).await? {
                Some(worth) => {
                    done.declined = worth;
                    self.next_pass(rest);
                }
                None => self.next_batch(rest).await?,
            }
        }
        Ok(HostProgress { found, read_bytes, is_over: false })
    }

    /// Reads neighbours, and notes what they hold.
    async fn read_run(&self, reading: &mut Reading) -> Result<u64> {
        let (bits, size) = (self.image.geometry().cluster_bits(), self.cluster_bytes());
        let hosts = &reading.hosts[reading.next..];
        let most = (RUN_BYTES / size).max(1);
        let first = hosts[0];
        let run = (first.0..).zip(hosts).take_while(|(at, host)| *at == host.0).take(most as usize);
        let count = run.count();
        let at = HostOffset(first.0 << bits);
        let buffer = Buffer::new(count * size as usize);
        let (result, bytes) = self.image.storage().read_at(at, buffer).await;
        result?;
        for (host, content) in hosts.iter().zip(bytes.chunks(size as usize)) {
            if !is_zero(content) {
                let found = self.fingerprinter.of(content);
                reading.candidates.note(found, host.0);
            }
        }
        reading.next += count;
        Ok(bytes.len() as u64)
    }

    /// Returns what would be saved and taken, where that is asked for and does not pay.
    async fn pays(&self, rest: &Rest) -> Result<Option<Worth>> {
        if self.options.sharing == Sharing::Always {
            return Ok(None);
        }
        let groups = rest.groups.all().filter(|group| is_of_use(&rest.frozen, group));
        let hosts = groups.map(|group| group.iter().map(|it| HostCluster(*it)).collect());
        let worth = self.image.weigh_hosts(hosts).await?;
        Ok((worth.saved_bytes > 0 && !worth.pays()).then_some(worth))
    }

    async fn next_batch(&mut self, mut rest: Rest) -> Result<()> {
        let most = (self.options.memory_bytes / MEMBER_BYTES).max(FEWEST_MEMBERS);
        loop {
            let batch = rest.groups.next_batch(most as usize);
            if batch.is_empty() {
                self.next_pass(rest);
                return Ok(());
            }
            let batch: Vec<_> =
                batch.into_iter().filter(|group| is_of_use(&rest.frozen, group)).collect();
            if batch.is_empty() {
                continue;
            }
            let hosts = batch.iter().flatten().map(|it| HostCluster(*it));
            let wanted = Wanted::new(hosts, self.options.memory_bytes);
            let walk = self.image.walk_hosts().await?;
            self.state = State::Trace(Tracing { rest, batch, walk, wanted });
            return Ok(());
        }
    }

    fn next_pass(&mut self, rest: Rest) {
        self.pass += 1;
        if self.pass < rest.passes.count() {
            self.begin_pass(rest.hosts, rest.frozen);
        }
    }

    async fn trace(&mut self, mut tracing: Tracing) -> Result<HostProgress> {
        let Tracing { walk, wanted, .. } = &mut tracing;
        let slice_bytes = self.options.slice_bytes;
        let read_bytes = match self.image.find_entries(walk, wanted, slice_bytes).await? {
            HostStep::Changed => 0,
            HostStep::Read(bytes) => {
                self.state = State::Trace(tracing);
                bytes
            }
            HostStep::Over => {
                let Tracing { rest, batch, walk, mut wanted } = tracing;
                let bits = self.image.geometry().cluster_bits();
                let shown = |group: Vec<u64>| {
                    group.iter().filter_map(|it| wanted.take(HostCluster(*it), bits)).collect()
                };
                let mut batch: Vec<Vec<Shown>> = batch.into_iter().map(shown).collect();
                batch.reverse();
                self.state = State::Unite(Uniting { rest, batch, walk });
                0
            }
        };
        Ok(HostProgress { read_bytes, ..HostProgress::default() })
    }

    async fn unite(&mut self, mut uniting: Uniting, done: &mut Deduped) -> Result<HostProgress> {
        let size = self.cluster_bytes();
        let most = (self.options.slice_bytes / size).max(FEWEST_MEMBERS) as usize;
        let (mut groups, mut count) = (Vec::new(), 0);
        while count < most
            && let Some(group) = uniting.batch.pop()
        {
            count += group.len();
            groups.push(group);
        }
        let Some(united) = self.image.unite(&groups, &uniting.walk).await? else {
            return Ok(HostProgress::default());
        };
        done.united += united.united;
        done.shared += united.shared.shared;
        done.differed += united.shared.differed;
        done.freed_bytes += united.shared.freed_bytes;
        match uniting.batch.is_empty() {
            // What was given up may be held by a pin alone, which was counted as freed.
            true => {
                self.image.drop_unused_pins().await?;
                self.next_batch(uniting.rest).await?;
            }
            false => self.state = State::Unite(uniting),
        }
        Ok(HostProgress { read_bytes: count as u64 * size, ..HostProgress::default() })
    }

    fn cluster_bytes(&self) -> u64 {
        self.image.geometry().cluster_bytes()
    }
}

/// Says whether a group has a cluster that others may show.
fn is_of_use(frozen: &Hosts, group: &[u64]) -> bool {
    group.iter().any(|it| frozen.is_frozen(HostCluster(*it)))
}
