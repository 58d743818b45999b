//! Mapping that nothing reorders (002-6, -9, -13): whatever a guest does, the tables stay as they
//! were but for what they say of each cluster.

use lacuna::block::{DiscardMode, Preallocation, WriteFlags, ZeroFlags};
use lacuna::qcow2::format::{EntryWidth, Header};
use lacuna::qcow2::{Access, BackingName, CreateOptions, OpenOptions, PreallocationLayout, create};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::{Menu, ModelDisk, Operation, Operations, Random, Rules, SparseBytes, seeds};

use crate::cancellation::drop_each;
use crate::case::{Backing, Case, Kind};
use crate::crash::Recorded;
use crate::drive::assert_qemu_agrees;
use crate::random_operations::step;

/// Changes in all; with `LACUNA_LONG` a million.
const CHANGES: usize = 8000;
/// Changes between two looks at the whole image.
const BETWEEN: usize = 500;

/// An image whose every cluster has its place in one run, and which remembers to keep it.
fn preallocated(kind: Kind, seed: u64) -> Case {
    let backing = kind.build_backing(&mut Random::new(seed ^ 0xba_c6));
    let options = CreateOptions {
        size_bytes: kind.size_bytes(),
        cluster_bytes: kind.cluster_bytes(),
        entry_width: if kind.extended { EntryWidth::Extended } else { EntryWidth::Standard },
        refcount_bits: 1 << kind.refcount_order,
        lazy_refcounts: kind.lazy,
        backing: backing.as_ref().map(|below| BackingName {
            name: below.name().to_owned(),
            format: Some(below.format.to_owned()),
        }),
        preallocation: Preallocation::Metadata,
        preallocation_layout: PreallocationLayout::Contiguous,
        keep_mapping: true,
        ..CreateOptions::default()
    };
    let storage = MemoryStorage::new();
    pollster::block_on(create(&storage, &options)).unwrap();
    let image = SparseBytes::from(&storage.to_vec()[..]);
    let options = OpenOptions::new(Access::ReadWrite);
    let options = if seed.is_multiple_of(2) { options.cache_bytes(1) } else { options };
    Case { kind, image, data: None, backing, options }
}

fn kinds() -> Vec<Kind> {
    let extended = Kind { extended: true, ..Kind::plain(14) };
    vec![
        Kind::plain(9),
        Kind { refcount_order: 0, ..Kind::plain(12) },
        Kind { lazy: true, ..Kind::plain(9) },
        extended,
        Kind { backing: Backing::RawLonger, ..extended },
        Kind { backing: Backing::Qcow2Shorter, lazy: true, ..extended },
    ]
}

/// Returns where each guest cluster lies.
pub(crate) fn places(image: &SparseBytes) -> Vec<Option<u64>> {
    Tables::of(image).places().collect()
}

/// The tables of an image whose every guest cluster has a place.
struct Tables {
    header: Header,
    image: SparseBytes,
}

impl Tables {
    fn of(image: &SparseBytes) -> Self {
        let header = Header::decode(&image.read_vec(0, 1 << 12)).unwrap();
        Self { header, image: image.clone() }
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.image.read_vec(at, 8).try_into().unwrap())
    }

    /// Returns where the entry of each guest cluster lies.
    fn entries(&self) -> impl Iterator<Item = u64> {
        let geometry = self.header.geometry;
        let clusters = geometry.clusters_for(self.header.size_bytes);
        (0..clusters).map(move |cluster| {
            let guest = GuestOffset(cluster * geometry.cluster_bytes());
            let l1 = self.header.l1.offset.0 + geometry.l1_index(guest) * 8;
            let table = self.word(l1) & 0x00ff_ffff_ffff_fe00;
            table + geometry.l2_index(guest) * geometry.entry_width().bytes()
        })
    }

    fn places(&self) -> impl Iterator<Item = Option<u64>> {
        let host = |at| self.word(at) & 0x00ff_ffff_ffff_fe00;
        self.entries().map(move |at| Some(host(at)).filter(|host| *host != 0))
    }

    /// Returns all bytes in front of the data, but for what entries say of their clusters: the
    /// zero flag, or the states of subclusters.
    fn skeleton(&self) -> Vec<u8> {
        let data = self.places().next().flatten().unwrap();
        let mut bytes = self.image.read_vec(0, data as usize);
        for at in self.entries().map(|at| at as usize) {
            bytes[at + 7] &= !1;
            if self.header.geometry.has_subclusters() {
                bytes[at + 8..at + 16].fill(0);
            }
        }
        bytes
    }
}

/// Zeroing of whole clusters is never refused for being slow.
fn fast_where_possible(kind: &Kind, operation: Operation) -> Operation {
    match operation {
        Operation::WriteZeroes { range, flags } if range == kind.cover(range) => {
            Operation::WriteZeroes { range, flags: flags | ZeroFlags::FAST }
        }
        other => other,
    }
}

/// Random changes of all kinds, flags and sizes. Returns how many there were.
async fn change_at_random(case: &Case, seed: u64, changes: usize) -> Result<usize, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let files = case.in_memory();
    let before = Tables::of(&case.image);
    let (skeleton, len) = (before.skeleton(), case.image.len());
    let menu = Menu { resize_up_to: None, full_discard: false, ..case.kind.menu() };
    let mut operations = Operations::new(seed, menu);
    let rules = Rules { starts_unallocated: false, ..case.kind.rules() };
    let below = case.backing.as_ref().map(|below| below.guest.clone());
    let mut model = ModelDisk::new(rules, case.kind.size_bytes(), below);
    let mut image = files.open().await.map_err(fail)?;
    let mut done = 0;
    while done < changes {
        let operation = fast_where_possible(&case.kind, operations.next(model.size_bytes()));
        let result = step(image, &files, &mut model, operation).await;
        image = result.map_err(|error| format!("change {done} {operation:x?}: {error}"))?;
        if !operation.changes_bytes() {
            continue;
        }
        done += 1;
        if done % BETWEEN == 0 {
            model.verify(&image).await?;
            image.close().await.map_err(fail)?;
            let now = &files.content()[0];
            if Tables::of(now).skeleton() != skeleton {
                return Err(format!("The tables changed before change {done}"));
            }
            if now.len().abs_diff(len) >= case.kind.cluster_bytes() {
                return Err(format!("The file has {:#x} bytes, not {len:#x}", now.len()));
            }
            image = files.open().await.map_err(fail)?;
        }
    }
    image.close().await.map_err(fail)?;
    assert_qemu_agrees(&case.with_content(files.content()), &model, &format!("seed {seed}"));
    Ok(done)
}

#[test]
fn the_mapping_is_what_it_was_after_random_discards_zeroes_and_writes() {
    let long = std::env::var_os("LACUNA_LONG").is_some();
    let (kinds, changes) = (kinds(), if long { 1_000_000 } else { CHANGES });
    for seed in seeds(1) {
        let mut done = 0;
        for (number, kind) in (0..).zip(&kinds) {
            let seed = seed * 1000 + number;
            let case = preallocated(*kind, seed);
            let run = change_at_random(&case, seed, changes.div_ceil(kinds.len()));
            done += pollster::block_on(run).unwrap_or_else(|e| panic!("{seed}, {kind:?}: {e}"));
        }
        println!("{done} changes");
        assert!(done >= changes);
    }
}

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len)
}

/// One of each way to change guest bytes: of clusters, of parts of them, of many.
fn operations(kind: &Kind) -> Vec<Operation> {
    let cluster = kind.cluster_bytes();
    let mut operations = vec![
        Operation::WriteCompressed { range: range(3 * cluster, cluster), seed: 5 },
        Operation::WriteCompressed { range: range(14 * cluster, cluster), seed: 6 },
    ];
    for (start, len) in [(cluster, 2 * cluster), (cluster / 2, cluster), (9 * cluster + 9, 600)] {
        let range = range(start, len);
        operations.push(Operation::Write { range, seed: 1, flags: WriteFlags::empty() });
        operations.push(Operation::Discard { range, mode: DiscardMode::Guest });
        for flags in [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP, ZeroFlags::FUA] {
            operations.push(Operation::WriteZeroes { range, flags });
        }
    }
    operations
}

#[test]
fn operations_dropped_at_any_await_move_nothing() {
    for kind in [kinds()[0], kinds()[4]] {
        let case = preallocated(kind, 1);
        let skeleton = Tables::of(&case.image).skeleton();
        let dropped = drop_each(&case, &operations(&kind), 1, |left| {
            match Tables::of(&left.image).skeleton() == skeleton {
                true => Ok(()),
                false => Err("The tables changed".to_owned()),
            }
        });
        assert!(dropped > 30, "{kind:?}: only {dropped} awaits were reached");
    }
}

#[test]
fn power_cuts_move_nothing_and_show_old_bytes_or_new() {
    for (number, kind) in (0..).zip([kinds()[0], kinds()[2], kinds()[3], kinds()[4]]) {
        let case = preallocated(kind, number);
        let cluster = kind.cluster_bytes();
        let prepare =
            [Operation::Write { range: range(0, 12 * cluster), seed: 7, flags: WriteFlags::FUA }];
        let mut script = operations(&kind);
        (1..=script.len() / 3).for_each(|at| script.insert(at * 4 - 1, Operation::Flush));
        let run = async {
            let recorded = Recorded::of(&case, &prepare, &script).await?.with_places_kept();
            recorded.crash_everywhere(number).await
        };
        let count = pollster::block_on(run).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        assert!(count > 50, "{kind:?}: only {count} states");
    }
}
