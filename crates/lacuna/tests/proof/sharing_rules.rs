//! What is shared and what is not, what holds it, and how that is undone and made again.

use std::path::PathBuf;
use std::sync::Arc;

use lacuna::ErrorKind;
use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::format::{Header, L1Entry, Snapshot, Version};
use lacuna::qcow2::{
    Access, AmendOptions, CreateOptions, DataFileName, Image, OnDiscard, OpenOptions, Parts,
    PinFacts, Shared, Shrink, SnapshotChoice, create,
};
use lacuna::storage::{MemoryStorage, Storage};
use lacuna::units::{GuestCluster, GuestOffset, HostOffset};
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, QEMU_IO, qemu_img_check};

use crate::drive::read;

const CLUSTER: u64 = 4096;
/// What the pins are called.
const PIN: &str = "lacuna-pin: do not apply or delete";

/// An image in memory, of small clusters.
struct Disk(Arc<MemoryStorage>);

impl Disk {
    fn make(clusters: u64, change: impl FnOnce(&mut CreateOptions)) -> Self {
        let mut options = CreateOptions {
            size_bytes: clusters * CLUSTER,
            cluster_bytes: CLUSTER,
            ..CreateOptions::default()
        };
        change(&mut options);
        let storage = Arc::new(MemoryStorage::new());
        block_on(create(&storage, &options)).unwrap();
        Self(storage)
    }

    /// Every cluster holds `byte`.
    fn filled(clusters: u64, byte: u8) -> Self {
        let disk = Self::make(clusters, |_| ());
        disk.on(async |image| fill(&image, 0, clusters, byte).await);
        disk
    }

    fn options() -> OpenOptions {
        OpenOptions::new(Access::ReadWrite).on_discard(OnDiscard::Free)
    }

    fn open(&self) -> Image<Arc<MemoryStorage>> {
        block_on(Image::open(Parts::alone(Arc::clone(&self.0)), Self::options())).unwrap()
    }

    /// Opens the image, does something with it, and closes it.
    fn on<T>(&self, work: impl AsyncFnOnce(Image<Arc<MemoryStorage>>) -> lacuna::Result<T>) -> T {
        let image = self.open();
        block_on(async {
            let result = work(image.clone()).await?;
            image.close().await?;
            Ok::<_, lacuna::Error>(result)
        })
        .unwrap()
    }

    fn share(&self, groups: &[Vec<GuestCluster>]) -> Shared {
        self.on(async |image| image.share(groups).await)
    }

    fn facts(&self) -> Option<PinFacts> {
        let image = self.open();
        block_on(image.pin_facts()).unwrap()
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        block_on(self.open().snapshots()).unwrap()
    }

    fn content(&self) -> Vec<u8> {
        let image = self.open();
        block_on(read(&image, image.whole())).unwrap()
    }

    /// Has a stock tool work on the image, which takes over what it left.
    #[track_caller]
    fn stock(&self, work: impl FnOnce(&PathBuf)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, self.0.to_vec()).unwrap();
        work(&path);
        let bytes = std::fs::read(&path).unwrap();
        block_on(async {
            self.0.set_len(bytes.len() as u64, Hold::none()).await?;
            self.0.write_at(HostOffset(0), Buffer::from(&bytes[..])).await.0
        })
        .unwrap();
    }

    #[track_caller]
    fn assert_clean(&self) {
        self.stock(|path| {
            let found = qemu_img_check(path);
            assert!(found.is_clean(), "{}", found.text);
        });
        let report = block_on(check(&self.0, &CheckOptions::default(), &mut |_| {})).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

async fn fill(
    image: &Image<Arc<MemoryStorage>>,
    from: u64,
    to: u64,
    byte: u8,
) -> lacuna::Result<()> {
    let bytes = vec![byte; ((to - from) * CLUSTER) as usize];
    let buffer = Buffer::from(&bytes[..]);
    image.write(GuestOffset(from * CLUSTER), buffer, WriteFlags::empty()).await.0
}

fn group(clusters: impl IntoIterator<Item = u64>) -> Vec<GuestCluster> {
    clusters.into_iter().map(GuestCluster).collect()
}

fn stock_snapshot(path: &PathBuf, verb: &str, name: &str) -> i32 {
    let words = ["snapshot", verb, name].map(std::ffi::OsString::from);
    QEMU_IMG.run(words.into_iter().chain([path.into()])).code
}

#[test]
fn a_keeper_takes_no_more_sharers_than_fifty_snapshots_leave_room_for() {
    let disk = Disk::filled(1100, 7);
    let shared = disk.share(&[group(0..1100)]);
    // 1023 share one, the others the next.
    assert_eq!((shared.shared, shared.keepers, shared.differed), (1100, 2, 0));
    assert_eq!(shared.freed_bytes, 1098 * CLUSTER);
    let facts = disk.facts().unwrap();
    assert_eq!((facts.keepers, facts.references, facts.without_sharers), (2, 1100, 0));
    disk.stock(|path| {
        for index in 0..50 {
            assert_eq!(stock_snapshot(path, "-c", &format!("s{index}")), 0);
        }
    });
    disk.assert_clean();
    assert_eq!(disk.facts().unwrap().references, 51 * 1100);
    assert!(disk.content().iter().all(|byte| *byte == 7));
}

#[test]
fn narrow_refcounts_share_less_or_nothing_and_say_so() {
    for bits in [1, 2, 4, 8, 64] {
        let disk = Disk::make(8, |options| options.refcount_bits = bits);
        disk.on(async |image| fill(&image, 0, 8, 3).await);
        let image = disk.open();
        let refused = image.why_not_share().map(|error| error.kind());
        assert_eq!(refused, (bits < 8).then_some(ErrorKind::Unsupported), "{bits}");
        let result = block_on(image.share(&[group(0..8)]));
        assert_eq!(result.is_err(), bits < 8, "{bits}");
        if let Ok(shared) = result {
            // Three sharers for each keeper with 8 bits.
            let keepers = if bits == 8 { 3 } else { 1 };
            assert_eq!((shared.shared, shared.keepers), (8, keepers), "{bits}");
            block_on(image.close()).unwrap();
            disk.assert_clean();
        }
    }
}

#[test]
fn what_differs_is_zero_or_is_not_whole_is_left_out() {
    let disk = Disk::make(10, |options| options.size_bytes += 512);
    disk.on(async |image| {
        fill(&image, 0, 10, 3).await?;
        fill(&image, 4, 5, 9).await?;
        fill(&image, 5, 8, 0).await?;
        let tail = Buffer::from(&[3; 512][..]);
        image.write(GuestOffset(10 * CLUSTER), tail, WriteFlags::empty()).await.0
    });
    // Also what lies beyond the disk, and the same cluster twice.
    let shared = disk.share(&[group([0, 0, 1, 2, 3, 4, 10, 11, 1 << 40]), group(5..8)]);
    assert_eq!((shared.shared, shared.keepers, shared.differed), (4, 1, 1));
    disk.assert_clean();
    let again = disk.share(&[group(0..4)]);
    assert_eq!(again, Shared::default(), "all of it is shared already");
}

#[test]
fn kinds_of_content_within_one_group_are_told_apart() {
    let disk = Disk::make(12, |_| ());
    disk.on(async |image| {
        for index in 0..12 {
            fill(&image, index, index + 1, 1 + (index % 3) as u8).await?;
        }
        Ok(())
    });
    let before = disk.content();
    let shared = disk.share(&[group(0..12)]);
    assert_eq!((shared.shared, shared.keepers, shared.differed), (12, 3, 0));
    assert!(before == disk.content());
    disk.assert_clean();
}

#[test]
fn one_that_comes_later_joins_what_is_shared() {
    let disk = Disk::filled(6, 7);
    assert_eq!(disk.share(&[group(0..4)]).keepers, 1);
    let shared = disk.share(&[group(0..6)]);
    assert_eq!((shared.shared, shared.keepers, shared.freed_bytes), (2, 0, 2 * CLUSTER));
    assert_eq!(disk.facts().unwrap().references, 6);
    disk.assert_clean();
}

#[test]
fn clusters_that_a_snapshot_shares_are_joined_and_not_remapped() {
    let disk = Disk::filled(4, 7);
    disk.stock(|path| assert_eq!(stock_snapshot(path, "-c", "one"), 0));
    // All four are the snapshot's too: nothing would be gained.
    assert_eq!(disk.share(&[group(0..4)]), Shared::default());
    disk.on(async |image| fill(&image, 2, 4, 7).await);
    let shared = disk.share(&[group(0..4)]);
    assert_eq!((shared.shared, shared.keepers, shared.freed_bytes), (2, 0, 2 * CLUSTER));
    disk.assert_clean();
    for verb in ["-a", "-d"] {
        disk.stock(|path| assert_eq!(stock_snapshot(path, verb, "one"), 0));
        disk.assert_clean();
    }
    assert!(disk.content().iter().all(|byte| *byte == 7));
}

#[test]
fn compressed_clusters_with_equal_bytes_share_a_stream() {
    let disk = Disk::make(6, |_| ());
    disk.on(async |image| {
        for index in 0..6 {
            let mut bytes = vec![5; CLUSTER as usize];
            // Streams of more than half a cluster, so that each has one of its own.
            let mut random = testkit::Random::new(9);
            bytes[..3000].fill_with(|| random.next() as u8);
            let buffer = Buffer::from(&bytes[..]);
            image.write_compressed(GuestOffset(index * CLUSTER), buffer).await.0?;
        }
        Ok(())
    });
    let before = disk.content();
    let shared = disk.share(&[group(0..6)]);
    assert_eq!((shared.shared, shared.keepers), (5, 0));
    assert!(shared.freed_bytes >= 3 * CLUSTER, "{shared:?}");
    assert!(disk.facts().is_none(), "streams need no pin");
    disk.assert_clean();
    disk.stock(|path| {
        let words = ["-f", "qcow2", "-c", "write -P 1 0 4096", "-c", "discard 4096 4096"];
        let words = words.map(std::ffi::OsString::from);
        QEMU_IO.succeed(words.into_iter().chain([path.into()]));
    });
    disk.assert_clean();
    assert!(before[2 * CLUSTER as usize..] == disk.content()[2 * CLUSTER as usize..]);
}

#[test]
fn pins_without_sharers_are_dropped_and_their_places_used_again() {
    let disk = Disk::filled(9, 7);
    disk.share(&[group(0..3)]);
    disk.on(async |image| fill(&image, 0, 3, 1).await);
    let facts = disk.facts().unwrap();
    assert_eq!((facts.keepers, facts.without_sharers), (1, 1));
    assert_eq!(disk.on(async |image| image.drop_unused_pins().await), 1);
    assert_eq!(disk.facts().unwrap().keepers, 0);
    disk.share(&[group(3..9)]);
    assert_eq!(disk.facts().unwrap().keepers, 1);
    disk.assert_clean();
}

#[test]
fn more_pins_than_one_table_holds_find_room() {
    // 512-byte clusters: a table of pins has 64 entries, an L1 table of a cluster 64 tables.
    let pairs = 64 * 64 + 70;
    let disk = Disk::make(0, |options| {
        options.cluster_bytes = 512;
        options.size_bytes = pairs * 2 * 512;
    });
    let mut bytes = Vec::new();
    for index in 0..pairs * 2 {
        bytes.extend_from_slice(&((index % pairs) + 1).to_be_bytes().repeat(64));
    }
    let groups: Vec<_> = (0..pairs).map(|index| group([index, index + pairs])).collect();
    disk.on(async |image| {
        let buffer = Buffer::from(&bytes[..]);
        image.write(GuestOffset(0), buffer, WriteFlags::empty()).await.0
    });
    for groups in groups.chunks(1500) {
        assert_eq!(disk.share(groups).shared, groups.len() as u64 * 2);
    }
    let facts = disk.facts().unwrap();
    assert_eq!((facts.keepers, facts.references), (pairs, 2 * pairs));
    assert_eq!(disk.snapshots()[0].l1.entries, 128);
    assert!(bytes == disk.content());
    disk.assert_clean();
}

#[test]
fn stock_qemu_lists_the_pins_and_does_not_apply_them() {
    for version in [2, 3] {
        let disk = Disk::make(8, |options| {
            if version == 2 {
                options.version = Version::V2;
            }
        });
        disk.on(async |image| fill(&image, 0, 8, 7).await);
        disk.share(&[group(0..8)]);
        let before = disk.0.to_vec();
        disk.stock(|path| {
            let words = ["snapshot", "-l"].map(std::ffi::OsString::from);
            let listed = QEMU_IMG.succeed(words.into_iter().chain([path.into()]));
            assert!(listed.contains(PIN), "{listed}");
            for name in ["lacuna-pin", PIN] {
                let words = ["snapshot", "-a", name].map(std::ffi::OsString::from);
                let refused = QEMU_IMG.run(words.into_iter().chain([path.into()]));
                assert!(refused.stderr.contains("must be a multiple of 512"), "{refused:?}");
                assert_eq!(refused.code, 1);
            }
        });
        assert!(before == disk.0.to_vec(), "something was changed");
        let choice = SnapshotChoice::Id("lacuna-pin".into());
        let refused = block_on(disk.open().snapshot(&choice)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn pins_that_qemu_deleted_are_made_again() {
    let disk = Disk::filled(8, 7);
    disk.share(&[group(0..8)]);
    disk.stock(|path| {
        assert_eq!(stock_snapshot(path, "-d", PIN), 0);
        // All but one go, which QEMU's check then calls an error.
        let words = ["-f", "qcow2", "-c", "write -P 1 0 28672"].map(std::ffi::OsString::from);
        QEMU_IO.succeed(words.into_iter().chain([path.into()]));
        assert_eq!(qemu_img_check(path).code, 2);
    });
    assert_eq!(block_on(disk.open().repin()).unwrap(), 0);
    disk.assert_clean();
    disk.on(async |image| fill(&image, 0, 8, 7).await);
    disk.share(&[group(0..8)]);
    disk.stock(|path| {
        let add = ["bitmap", "--add"].map(std::ffi::OsString::from);
        QEMU_IMG.succeed(add.into_iter().chain([path.into(), "dirty".into()]));
        // With a persistent bitmap this drops all snapshots.
        let repair = ["check", "-q", "-r", "all"].map(std::ffi::OsString::from);
        QEMU_IMG.run(repair.into_iter().chain([path.into()]));
    });
    assert!(disk.snapshots().is_empty());
    assert_eq!(block_on(disk.open().repin()).unwrap(), 1);
    assert_eq!(disk.facts().unwrap().references, 8);
    disk.assert_clean();
}

#[test]
fn unpinned_images_are_clean_and_hold_nothing_back() {
    let disk = Disk::filled(8, 7);
    let before = disk.0.to_vec().len();
    disk.share(&[group(0..4), group(4..8)]);
    // One of each group is left: its cluster has one reference without the pin.
    disk.on(async |image| {
        fill(&image, 0, 3, 1).await?;
        fill(&image, 4, 7, 2).await
    });
    block_on(disk.open().unpin()).unwrap();
    assert!(disk.snapshots().is_empty() && disk.facts().is_none());
    disk.assert_clean();
    let content = disk.content();
    assert!(content[3 * CLUSTER as usize..4 * CLUSTER as usize].iter().all(|byte| *byte == 7));
    block_on(disk.open().unpin()).unwrap();
    assert!(disk.0.to_vec().len() <= before + 8 * CLUSTER as usize);
}

#[test]
fn our_repair_keeps_pins() {
    let disk = Disk::filled(8, 7);
    disk.share(&[group(0..8)]);
    let options = CheckOptions { repair: Repair::All };
    let report = block_on(check(&disk.0, &options, &mut |_| {})).unwrap();
    assert!(report.is_clean());
    assert_eq!(disk.facts().unwrap().references, 8);
}

#[test]
fn bitmaps_are_told_of_no_change() {
    let disk = Disk::filled(8, 7);
    disk.stock(|path| {
        let add = ["bitmap", "--add"].map(std::ffi::OsString::from);
        QEMU_IMG.succeed(add.into_iter().chain([path.into(), "dirty".into()]));
    });
    assert_eq!(disk.share(&[group(0..8)]).shared, 8);
    disk.assert_clean();
    let image = disk.open();
    let bitmap = block_on(image.bitmap(&"dirty".into())).unwrap();
    let extents = block_on(bitmap.extents(image.whole(), usize::MAX)).unwrap();
    assert!(extents.iter().all(|extent| !extent.is_dirty), "{extents:?}");
}

#[test]
fn images_that_keep_places_or_have_a_data_file_are_refused() {
    let disk = Disk::make(8, |options| options.keep_mapping = true);
    let parts = || Parts::alone(Arc::clone(&disk.0));
    let kept = block_on(Image::open(parts(), OpenOptions::new(Access::ReadWrite))).unwrap();
    assert_eq!(kept.why_not_share().unwrap().kind(), ErrorKind::Unsupported);
    block_on(kept.close()).unwrap();
    // Opened with discards that free, it is no longer one that keeps places.
    assert!(disk.open().why_not_share().is_none());

    let options = CreateOptions {
        size_bytes: 8 * CLUSTER,
        data_file: Some(DataFileName { name: "data".into(), raw: false }),
        ..CreateOptions::default()
    };
    let storage = Arc::new(MemoryStorage::new());
    block_on(create(&storage, &options)).unwrap();
    let data = Some(Arc::new(MemoryStorage::new()));
    let parts = Parts { storage, data, backing: None };
    let image = block_on(Image::open(parts, Disk::options())).unwrap();
    let error = block_on(image.share(&[group(0..2)])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn our_amend_takes_an_image_with_pins_to_version_2_and_back_and_resizes_it() {
    let disk = Disk::filled(8, 7);
    disk.share(&[group(0..8)]);
    for version in [Version::V2, Version::V3] {
        let options = AmendOptions { version: Some(version), ..AmendOptions::default() };
        block_on(disk.open().amend(&options, &mut |_, _| ())).unwrap();
        disk.assert_clean();
        for size in [20, 6, 8] {
            disk.on(async |image| image.resize(size * CLUSTER, Shrink::Allow).await);
            disk.assert_clean();
        }
        disk.on(async |image| fill(&image, 6, 8, 7).await);
        assert_eq!(disk.share(&[group(0..8)]).shared, 2);
        assert_eq!(disk.facts().unwrap().references, 8);
    }
    let options = AmendOptions { refcount_bits: Some(8), ..AmendOptions::default() };
    block_on(disk.open().amend(&options, &mut |_, _| ())).unwrap();
    disk.assert_clean();
    disk.on(async |image| {
        fill(&image, 0, 2, 7).await?;
        let shared = image.share(&[group(0..8)]).await?;
        // There is no room for more at the keeper with six.
        assert_eq!((shared.shared, shared.keepers), (2, 1));
        Ok(())
    });
    disk.assert_clean();
}

/// Where the L1 table of the pins lies, and their first table.
fn pin_tables(disk: &Disk) -> (u64, u64) {
    let l1 = disk.snapshots()[0].l1.offset.0;
    let bytes = disk.0.to_vec();
    let word = bytes[l1 as usize..l1 as usize + 8].try_into().unwrap();
    (l1, L1Entry(u64::from_be_bytes(word)).table().unwrap().0)
}

#[test]
fn damaged_pins_are_refused_before_anything_changes() {
    let active = |disk: &Disk| Header::decode(&disk.0.to_vec()).unwrap().l1.offset.0;
    type Row<'a> = (&'a str, &'a dyn Fn(&Disk) -> (u64, u64));
    let rows: [Row<'_>; 7] = [
        ("a table in the header", &|disk| (pin_tables(disk).0 + 8, 0x200)),
        ("a table of the disk", &|disk| (pin_tables(disk).0, active(disk))),
        ("a table beyond the end", &|disk| (pin_tables(disk).0, 1 << 40)),
        ("the same table twice", &|disk| (pin_tables(disk).0 + 8, pin_tables(disk).1)),
        ("a cluster within another", &|disk| (pin_tables(disk).1, 0x3200)),
        ("a compressed cluster", &|disk| (pin_tables(disk).1, 1 << 62 | 0x3200)),
        ("a table in a cluster that is free", &|disk| {
            let end = disk.0.to_vec().len() as u64;
            block_on(disk.0.set_len(end + CLUSTER, Hold::none())).unwrap();
            (pin_tables(disk).0, end)
        }),
    ];
    for (what, change) in rows {
        let disk = Disk::filled(8, 7);
        disk.share(&[group(0..4)]);
        let (at, word) = change(&disk);
        block_on(async {
            let bytes = Buffer::from(&word.to_be_bytes()[..]);
            disk.0.write_at(HostOffset(at), bytes).await.0
        })
        .unwrap();
        let before = disk.0.to_vec();
        let image = disk.open();
        let error = block_on(image.share(&[group(4..8)])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert!(image.failure().is_none(), "{what}: the disk is none the worse for it");
        drop(image);
        assert!(before == disk.0.to_vec(), "{what}: something was changed");
    }
}
