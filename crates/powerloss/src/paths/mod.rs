//! The ways in which an image is written, each with the images that it is tried on.
//!
//! * `guest.rs`: what guests ask
//! * `whole.rs`: what is done to the image as a whole
//! * `layers.rs`: layers and jobs that lie on it
//! * `copies.rs`: what other disks hold, copied onto it
//! * `below.rs`: what it stands on
//! * `create.rs`: new images
//! * `machine.rs`: the state of a virtual machine
//! * `recover.rs`: what comes after a loss or a damage
//! * `together.rs`: requests in flight together

mod below;
mod copies;
mod create;
mod guest;
mod layers;
mod machine;
mod recover;
mod together;
mod whole;

use testkit::Random;
use testkit::case::{Backing, Kind, Store};
use testkit::sim::Pace;

use crate::stage::Stage;

type Ran = Result<Stage, String>;
type Run<'a> = std::pin::Pin<Box<dyn Future<Output = Ran> + 'a>>;

/// A way in which an image is written.
///
/// ```
/// let path = powerloss::Path::named("write").unwrap();
/// assert_eq!(path.name(), "write");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Path {
    name: &'static str,
    can: fn(&Kind) -> bool,
    run: for<'a> fn(&'a Kind, u64) -> Run<'a>,
}

macro_rules! path {
    ($name:literal, $can:expr, $run:path) => {
        Path { name: $name, can: $can, run: |kind, seed| Box::pin($run(kind, seed)) }
    };
}

/// All of them.
pub const PATHS: [Path; 51] = [
    path!("write", any, guest::write),
    path!("overwrite", any, guest::overwrite),
    path!("write-partial", stands, guest::partial),
    path!("write-compressed", compresses, guest::compressed),
    path!("zero", any, guest::zero),
    path!("discard", any, guest::discard),
    path!("reuse", any, guest::reuse),
    path!("subclusters", |kind| kind.extended, guest::subclusters),
    path!("write-back", small, guest::write_back),
    path!("reopen", any, guest::reopen),
    path!("mixed", any, guest::mixed),
    path!("resize", any, guest::resize),
    path!("l1-growth", grows, guest::l1_growth),
    path!("refcount-growth", wide, guest::refcount_growth),
    path!("write-shared", snapshots, whole::write_shared),
    path!("snapshot-create", snapshots, whole::snapshot_create),
    path!("snapshot-apply", snapshots, whole::snapshot_apply),
    path!("snapshot-delete", snapshots, whole::snapshot_delete),
    path!("bitmap-write", bitmaps, whole::bitmap_write),
    path!("bitmap-edit", bitmaps, whole::bitmap_edit),
    path!("bitmap-freeze", bitmaps, whole::bitmap_freeze),
    path!("compact", own_data, whole::compact),
    path!("compact-live", own_data, whole::compact_live),
    path!("share", shares, whole::share),
    path!("unpin", shares, whole::unpin),
    path!("dedup-writes", shares, whole::dedup_writes),
    path!("sweep", any, whole::sweep_zeros),
    path!("amend-version", own_data, whole::amend_version),
    path!("amend-refcounts", three, whole::amend_refcounts),
    path!("rebase", rebases, whole::rebase_it),
    path!("commit", commits, whole::commit_it),
    path!("amend-features", three, whole::amend_features),
    path!("repin", shares, whole::repin),
    path!("point", any, layers::point),
    path!("detect-zeroes", any, layers::detect_zeroes),
    path!("make-zero", any, layers::make_zero),
    path!("convert", any, copies::convert_onto),
    path!("gather-common", any, copies::gather),
    path!("write-difference", any, copies::difference),
    path!("copy-bitmaps", bitmaps, copies::bitmaps_of_another),
    path!("dedup", shares, layers::dedup),
    path!("rename-backing", rebases, below::rename),
    path!("empty", stands, below::empty),
    path!("create", any, create::create_it),
    path!("vm-state", resizes, machine::vm_state),
    path!("vm-state-ends", resizes, machine::vm_state_ends),
    path!("after-loss", any, recover::after_loss),
    path!("repair-loss", any, recover::repair_loss),
    path!("repair-bitmaps", bitmaps, recover::repair_lost_bitmaps),
    path!("repair-damage", counts_16, recover::repair_damage),
    path!("in-flight", any, together::in_flight),
];

impl Path {
    /// Returns the one of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        PATHS.into_iter().find(|path| path.name == name)
    }

    /// Returns its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Chooses an image by the seed, writes it in this way, and says what that may leave.
    pub(crate) fn record(&self, seed: u64) -> Result<(Kind, Stage), String> {
        let mut random = Random::new(seed ^ 0x6b1d);
        let kind = loop {
            let kind = random_kind(&mut random);
            if (self.can)(&kind) {
                break kind;
            }
        };
        let stage = pollster::block_on((self.run)(&kind, seed));
        stage.map(|stage| (kind, stage)).map_err(|error| format!("{kind:?}: {error}"))
    }
}

/// Small clusters mostly, whose states are quick to look at, and with many tables.
fn random_kind(random: &mut Random) -> Kind {
    let cluster_bits = *random.pick(&[9, 9, 9, 9, 9, 9, 12, 12, 14, 14]);
    let backings = [
        Backing::None,
        Backing::None,
        Backing::None,
        Backing::RawShorter,
        Backing::RawLonger,
        Backing::Qcow2Shorter,
        Backing::Qcow2Longer,
    ];
    let plain = Kind { backing: *random.pick(&backings), ..Kind::plain(cluster_bits) };
    if random.one_in(4) {
        let shared_zero = plain.backing != Backing::None && random.one_in(2);
        return Kind { version: 2, shared_zero, ..plain };
    }
    let stores = [Store::Deflate, Store::Deflate, Store::Zstd, Store::DataFile, Store::RawDataFile];
    let store = match *random.pick(&stores) {
        Store::RawDataFile if plain.backing != Backing::None => Store::DataFile,
        store => store,
    };
    Kind {
        store,
        extended: cluster_bits == 14 && random.one_in(2),
        refcount_order: *random.pick(&[4, 4, 4, 4, 6, 5, 3, 2, 1, 0]),
        lazy: random.one_in(4),
        ..plain
    }
}

fn any(_: &Kind) -> bool {
    true
}

fn three(kind: &Kind) -> bool {
    kind.version == 3
}

fn small(kind: &Kind) -> bool {
    kind.cluster_bits == 9
}

fn stands(kind: &Kind) -> bool {
    kind.backing != Backing::None
}

fn compresses(kind: &Kind) -> bool {
    kind.allows_compression()
}

fn own_data(kind: &Kind) -> bool {
    !kind.has_data_file()
}

/// Images whose first table cluster is soon full.
fn grows(kind: &Kind) -> bool {
    small(kind) && kind.backing == Backing::None
}

fn wide(kind: &Kind) -> bool {
    grows(kind) && kind.refcount_order == 6 && own_data(kind)
}

/// Images of which another size, and the state of a machine, are known to be possible whatever they hold.
fn resizes(kind: &Kind) -> bool {
    own_data(kind) && !kind.shared_zero
}

fn snapshots(kind: &Kind) -> bool {
    own_data(kind) && kind.refcount_order > 2
}

fn bitmaps(kind: &Kind) -> bool {
    kind.version == 3 && own_data(kind)
}

fn shares(kind: &Kind) -> bool {
    own_data(kind) && kind.refcount_order > 2
}

fn counts_16(kind: &Kind) -> bool {
    kind.refcount_order == 4
}

fn rebases(kind: &Kind) -> bool {
    kind.store != Store::RawDataFile
}

fn commits(kind: &Kind) -> bool {
    own_data(kind) && kind.backing == Backing::None && !kind.shared_zero
}

/// Begins a run whose calls take effect at once.
fn stage(kind: &Kind, seed: u64) -> Stage {
    Stage::new(kind, seed, Pace::AtOnce)
}

/// Says what failed.
fn told(what: &str) -> impl Fn(lacuna::Error) -> String {
    move |error| format!("{what}: {error}")
}
