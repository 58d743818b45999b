//! What guests ask.

use lacuna::block::ZeroFlags;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::Random;

use super::ImageSpec;
use crate::history::Fill;

/// Somebody with a part of the disk that nobody else writes to.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) way: Way,
    /// Requests of one burst are in flight together.
    pub(crate) bursts: Vec<Vec<Request>>,
}

/// How a guest reaches the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Library,
    /// Over NBD, in one of its forms; some cut the wire after so many requests.
    Nbd {
        form: NbdForm,
        cut_after: Option<usize>,
    },
    /// Over NBD, by a client that makes lost connections again.
    Remote(Remote),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    /// Connections at the same time, at most.
    pub(crate) connections: usize,
    /// How many connections are cut.
    pub(crate) cuts: usize,
    /// Decides when.
    pub(crate) seed: u64,
}

impl Remote {
    pub(super) fn new(random: &mut Random) -> Self {
        let (connections, cuts) = (1 + random.index(3), random.index(5));
        Self { connections, cuts, seed: random.next() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NbdForm {
    Simple,
    Structured,
    Extended,
}

/// A request of a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) what: What,
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// By the library, it may be dropped after so many polls.
    pub(crate) dropped_after: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write {
        fill: Fill,
        fua: bool,
    },
    /// Compressed where that is possible: one cluster.
    Compress {
        fill: Fill,
    },
    Zero {
        flags: ZeroFlags,
    },
    Discard,
    Flush,
    /// Which parts are zeros.
    Extents,
}

impl Request {
    pub(crate) const fn range(&self) -> GuestRange {
        GuestRange::new(GuestOffset(self.start), self.len)
    }

    /// Returns what of it lies within a disk of that size, if anything does.
    pub(crate) fn within(self, size_bytes: u64) -> Option<Self> {
        let len = size_bytes.checked_sub(self.start)?.min(self.len);
        (len > 0).then_some(Self { len, ..self })
    }
}

impl What {
    pub(crate) const fn changes(self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Compress { .. } | Self::Zero { .. } | Self::Discard
        )
    }
}

const PATTERNS: u64 = 6;

/// The disk in chunks that belong to the guests in turn; their ends do not fall on those of clusters.
pub(super) struct Areas {
    chunk_bytes: u64,
    pub(super) count: u64,
    size_bytes: u64,
}

impl Areas {
    pub(super) fn new(image: &ImageSpec, size_bytes: u64, count: u64, random: &mut Random) -> Self {
        let cluster = image.cluster_bytes();
        let chunk = *random.pick(&[cluster / 2, cluster, cluster * 3 / 2, cluster * 13 / 4]);
        let all = size_bytes.div_ceil(count);
        Self { chunk_bytes: chunk.clamp(1, all), count, size_bytes }
    }

    /// Chooses a range that belongs to a guest; nothing where it has none.
    fn range(&self, own: u64, image: &ImageSpec, random: &mut Random) -> Option<(u64, u64)> {
        let chunks = self.size_bytes.div_ceil(self.chunk_bytes);
        let mine = chunks.saturating_sub(own).div_ceil(self.count);
        let chunk = own + self.count * random.below(Some(mine).filter(|it| *it > 0)?);
        let first = chunk * self.chunk_bytes;
        let end = (first + self.chunk_bytes).min(self.size_bytes);
        let (start, len) = within(first, end, image, random);
        Some((start, len))
    }
}

/// Chooses a range within another: whole sectors or clusters, or any bytes.
fn within(first: u64, end: u64, image: &ImageSpec, random: &mut Random) -> (u64, u64) {
    if random.one_in(3) {
        return (first, end - first);
    }
    let unit = *random.pick(&[1, 512, 512, image.cluster_bytes()]);
    let start = (first + random.below(end - first)) / unit * unit;
    let start = start.max(first);
    let most = (end - start).min(2 * image.cluster_bytes());
    let len = (1 + random.below(most)).next_multiple_of(unit).min(end - start);
    (start, len)
}

impl Guest {
    pub(super) fn new(image: &ImageSpec, areas: &Areas, own: u64, random: &mut Random) -> Self {
        let way = match random.below(3) {
            0 => Way::Library,
            _ => Way::Nbd {
                form: *random.pick(&[NbdForm::Simple, NbdForm::Structured, NbdForm::Extended]),
                cut_after: random.one_in(5).then(|| random.index(20)),
            },
        };
        let count = 1 + random.below(8);
        let bursts = (0..count).map(|_| burst(image, areas, own, random)).collect();
        Self { way, bursts }
    }
}

/// Requests that are in flight together: what they change does not overlap.
fn burst(image: &ImageSpec, areas: &Areas, own: u64, random: &mut Random) -> Vec<Request> {
    let mut burst: Vec<Request> = Vec::new();
    for _ in 0..1 + random.below(5) {
        let Some(request) = request(image, areas, own, random) else { continue };
        let overlaps = |other: &Request| {
            other.what.changes()
                && other.start < request.start + request.len
                && request.start < other.start + other.len
        };
        if !request.what.changes() || !burst.iter().any(overlaps) {
            burst.push(request);
        }
    }
    burst
}

fn request(image: &ImageSpec, areas: &Areas, own: u64, random: &mut Random) -> Option<Request> {
    let (mut start, mut len) = areas.range(own, image, random)?;
    let cluster_bytes = image.cluster_bytes();
    let fill = match random.one_in(10) {
        true => Fill::Zeros,
        false => Fill::Pattern { seed: random.below(PATTERNS), cluster_bytes },
    };
    let fua = random.one_in(12);
    let what = match random.below(100) {
        0..18 => What::Read,
        18..58 => What::Write { fill, fua },
        58..63 => What::Compress { fill },
        63..75 => What::Zero { flags: zero_flags(random) },
        75..86 => What::Discard,
        86..93 => What::Flush,
        _ => What::Extents,
    };
    if matches!(what, What::Read | What::Extents) && random.one_in(2) {
        // What others write may be looked at.
        (start, len) = within(0, areas.size_bytes, image, random);
    }
    let dropped_after = random.one_in(15).then(|| 1 + random.index(8));
    Some(Request { what, start, len, dropped_after })
}

fn zero_flags(random: &mut Random) -> ZeroFlags {
    let mut flags = ZeroFlags::empty();
    flags.set(ZeroFlags::MAY_UNMAP, random.one_in(2));
    flags.set(ZeroFlags::FUA, random.one_in(12));
    flags.set(ZeroFlags::FAST, random.one_in(8));
    flags.set(ZeroFlags::THOROUGH, random.one_in(8));
    flags
}
