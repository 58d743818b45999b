//! What a repair keeps, clears and leaves alone.

use lacuna::buffer::Hold;
use lacuna::qcow2::check::{CheckOptions, CheckReport, FindingKind, Phase, Repair, check};
use lacuna::storage::{MemoryStorage, Storage};
use lacuna::{ErrorKind, Result};
use testkit::SparseBytes;
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage};

use crate::images::{Image, run};

const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;

fn incompatible(image: &Image) -> u8 {
    image.bytes()[79]
}

fn set_incompatible(image: &Image, bits: u8) {
    image.poke(79, &[incompatible(image) | bits]);
}

/// What `qemu-img snapshot -l` lists: identifiers and names.
fn snapshots(image: &Image) -> Vec<String> {
    let path = image.path();
    let output = run("qemu-img", &["snapshot", "-l", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    let words = |line: &str| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    text.lines().filter(|line| line.starts_with(char::is_numeric)).map(words).collect()
}

#[test]
fn dirty_image_with_stale_refcounts_becomes_clean() {
    let image = Image::new("lazy_refcounts=on", "64M", &["write -P 1 0 1M"]);
    set_incompatible(&image, DIRTY);
    image.poke(image.refcount_block() + 2 * 5, &[0; 32]);
    let report = image.check(Repair::All);
    assert!(report.is_clean(), "{:?}", report.findings);
    assert_eq!(report.corruptions_fixed, 16);
    assert_eq!(incompatible(&image), 0);
    assert_eq!(image.qemu_check().status, 0);
    assert_eq!(&image.guest()[..1 << 20], &vec![1; 1 << 20]);
}

#[test]
fn marks_go_only_when_nothing_is_wrong_any_more() {
    let image = Image::new("", "64M", &["write -P 1 0 1M"]);
    set_incompatible(&image, DIRTY | CORRUPT);
    assert!(image.check(Repair::None).is_clean());
    assert_eq!(incompatible(&image), DIRTY | CORRUPT, "a check writes nothing");
    let at = image.l2(0);
    let healthy = image.word(at);
    image.poke_word(at, healthy + 0x200);
    assert_eq!(image.check(Repair::All).corruptions, 1);
    assert_eq!(incompatible(&image), DIRTY | CORRUPT);
    image.poke_word(at, healthy);
    assert!(image.check(Repair::All).is_clean());
    assert_eq!(incompatible(&image), 0);
}

#[test]
fn repair_clears_autoclear_bits_it_does_not_know() {
    for repair in [Repair::Leaks, Repair::All] {
        let image = Image::new("", "64M", &["write -P 1 0 1M"]);
        image.poke_word(88, 0b11_0000);
        assert!(image.check(Repair::None).is_clean());
        assert_eq!(image.word(88), 0b11_0000);
        assert!(image.check(repair).is_clean());
        assert_eq!(image.word(88), 0);
    }
}

#[test]
fn snapshots_and_bitmaps_survive_a_rebuild() {
    let image = Image::new(
        "",
        "64M",
        &[
            "write -P 1 0 1M",
            "!snapshot -c one @",
            "!bitmap --add @ kept",
            "write -P 2 0 512K",
            "!snapshot -c two @",
        ],
    );
    let listed = snapshots(&image);
    assert_eq!(listed.len(), 2);
    image.poke_word(image.word(48), 0);
    assert!(image.check(Repair::All).is_clean());
    assert_eq!(image.qemu_check().status, 0);
    assert_eq!(snapshots(&image), listed);
    let path = image.path();
    let info = run("qemu-img", &["info", "--output=json", path.to_str().unwrap()]);
    assert!(String::from_utf8(info.stdout).unwrap().contains("\"kept\""));
    assert_eq!(&image.guest()[..2 << 19], &[vec![2; 1 << 19], vec![1; 1 << 19]].concat());
    let raw = image.file("one.raw");
    let paths = [path.to_str().unwrap(), raw.to_str().unwrap()];
    run("qemu-img", &["convert", "-l", "one", "-O", "raw", paths[0], paths[1]]);
    assert_eq!(&std::fs::read(raw).unwrap()[..1 << 20], &vec![1; 1 << 20]);
}

/// What `qemu-img info` says of the bitmaps.
fn bitmaps(image: &Image) -> String {
    let path = image.path();
    let output = run("qemu-img", &["info", "--output=json", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    let from = text.find("\"bitmaps\"").unwrap();
    text[from..text[from..].find(']').unwrap() + from].to_owned()
}

#[test]
fn bitmap_in_use_stays_listed_and_in_use() {
    let image = Image::new("", "64M", &["write -P 1 0 1M", "!bitmap --add @ kept"]);
    image.poke(image.bitmap_directory() + 12, &[0, 0, 0, 1]);
    image.poke_word(image.l2(0), 0);
    let listed = bitmaps(&image);
    assert!(listed.contains("in-use"), "{listed}");
    assert!(image.check(Repair::All).is_clean());
    assert_eq!(bitmaps(&image), listed);
}

#[test]
fn encrypted_images_are_checked_without_a_key() {
    for (method, more) in [("luks", ",encrypt.iter-time=10"), ("aes", "")] {
        let image = Image::new("", "64M", &[]);
        let options = format!("encrypt.format={method},encrypt.key-secret=s{more}");
        let path = image.path();
        let path = path.to_str().unwrap();
        let secret = "secret,id=s,data=lacuna";
        let arguments =
            ["create", "-q", "--object", secret, "-f", "qcow2", "-o", &options, path, "64M"];
        let output = run("qemu-img", &arguments);
        assert!(output.status.success(), "{output:?}");
        let report = image.check(Repair::All);
        assert!(report.is_clean(), "{method}: {:?}", report.findings);
        image.poke_word(image.word(48), 0);
        assert!(image.check(Repair::All).is_clean());
        let file = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
        let output = run("qemu-img", &["check", "--object", secret, "--image-opts", &file]);
        assert!(output.status.success(), "{method}: {output:?}");
    }
}

/// Takes the extra data out of both entries of the snapshot table.
pub(crate) fn shorten_entries(image: &Image) {
    let table = image.word(64) as usize;
    let bytes = image.bytes();
    let (mut at, mut short) = (table, Vec::new());
    for _ in 0..2 {
        let half = |at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap());
        let names = usize::from(half(at + 12) + half(at + 14));
        let extra = u32::from_be_bytes(bytes[at + 36..at + 40].try_into().unwrap()) as usize;
        short.extend_from_slice(&bytes[at..at + 36]);
        short.extend_from_slice(&[0; 4]);
        short.extend_from_slice(&bytes[at + 40 + extra..at + 40 + extra + names]);
        short.resize(short.len().next_multiple_of(8), 0);
        at += (40 + extra + names).next_multiple_of(8);
    }
    // The last entry is not padded where it ends the file.
    short.resize(at.min(bytes.len()) - table, 0);
    image.poke(table as u64, &short);
}

#[test]
fn incomplete_snapshot_entries_are_completed_and_none_is_lost() {
    let commands =
        ["write -P 1 0 1M", "!snapshot -c one @", "write -P 2 0 1M", "!snapshot -c two @"];
    let image = Image::new("", "64M", &commands);
    let listed = snapshots(&image);
    shorten_entries(&image);
    let report = image.check(Repair::None);
    assert_eq!(report.corruptions, 2);
    assert_eq!(report.corruptions, image.qemu_check().number("corruptions"));
    assert_eq!(report.findings[0].kind, FindingKind::SnapshotIncomplete { index: 0 });
    let report = image.check(Repair::All);
    assert!(report.is_clean(), "{:?}", report.findings);
    assert_eq!((report.corruptions_fixed, report.leaks_fixed), (2, 0));
    assert_eq!(image.qemu_check().status, 0);
    assert_eq!(snapshots(&image), listed);
    image.io(&["!snapshot -a one @"]);
    assert_eq!(&image.guest()[..1 << 20], &vec![1; 1 << 20]);
    assert_eq!(image.qemu_check().status, 0);
}

/// Gives the first entry of the snapshot table 2000 bytes of extra data.
pub(crate) fn lengthen_entry(image: &Image) {
    let bytes = image.bytes();
    let table = image.word(64) as usize;
    let mut long = bytes[table..].to_vec();
    let extra = u32::from_be_bytes(long[36..40].try_into().unwrap()) as usize;
    long[36..40].copy_from_slice(&2000_u32.to_be_bytes());
    long.splice(40 + extra..40 + extra, vec![7; 2000 - extra]);
    image.set_bytes(&[&bytes[..table], &long].concat());
}

#[test]
fn too_much_extra_data_is_cut_and_no_snapshot_is_lost() {
    let commands =
        ["write -P 1 0 1M", "!snapshot -c one @", "write -P 2 0 1M", "!snapshot -c two @"];
    let image = Image::new("", "64M", &commands);
    let listed = snapshots(&image);
    lengthen_entry(&image);
    let report = image.check(Repair::None);
    assert_eq!(report.check_errors, 1, "{:?}", report.findings);
    let qemu = image.qemu_check();
    assert_eq!(qemu.status, 1);
    let text = report.findings[0].qemu_text();
    assert_eq!(text.lines().collect::<Vec<_>>(), qemu.lines[..2], "{qemu:?}");
    let report = image.check(Repair::All);
    assert!(report.is_clean(), "{:?}", report.findings);
    assert_eq!(report.corruptions_fixed, 1);
    assert_eq!(image.qemu_check().status, 0);
    assert_eq!(snapshots(&image), listed);
    image.io(&["!snapshot -a one @"]);
    assert_eq!(&image.guest()[..1 << 20], &vec![1; 1 << 20]);
    assert_eq!(image.qemu_check().status, 0);
}

/// A leak, a refcount of zero and a wrong flag, on storage that fails.
fn failing(fault: Fault) -> (SimHost, SimStorage, Vec<u8>) {
    let image = Image::new("", "1G", &["write -P 1 0 1M", "write -P 2 600M 1M"]);
    image.poke(image.refcount_block() + 2 * 5, &[0, 7, 0, 0]);
    let at = image.l2(2);
    image.poke_word(at, image.word(at) & !(1 << 63));
    let host = SimHost::new(Pace::AtOnce, 1);
    let storage = host.add_file(SparseBytes::from(image.bytes().as_slice()));
    host.order(fault);
    (host, storage, image.bytes())
}

fn repair<S: Storage>(storage: &S) -> Result<CheckReport> {
    let options = CheckOptions { repair: Repair::All };
    pollster::block_on(check(storage, &options, &mut |_| {}))
}

#[test]
fn unreadable_metadata_is_an_error_and_stops_any_repair() {
    let (host, storage, _) = failing(Fault::io(OperationKind::Read, usize::MAX));
    pollster::block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    let reads = host.calls().len();
    assert!(reads > 5, "only {reads} reads");
    for after in 0..reads {
        let (host, storage, before) = failing(Fault::io(OperationKind::Read, after).forever());
        match repair(&storage) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Io, "after {after} reads"),
            Ok(report) => assert!(report.check_errors > 0, "after {after} reads: {report:?}"),
        }
        assert!(host.content(0).to_vec() == before, "written after {after} reads");
    }
}

#[test]
fn failed_write_or_flush_of_a_repair_is_an_error_and_harms_nothing() {
    for after in 0.. {
        let (host, storage, _) = failing(Fault::any(after));
        let result = repair(&storage);
        host.heal();
        let again = repair(&storage).unwrap();
        assert!(again.is_clean(), "after {after} calls: {:?}", again.findings);
        if result.is_ok() {
            assert!(after > 5, "only {after} writes and flushes");
            return;
        }
    }
}

fn check_bytes(storage: &MemoryStorage) -> Result<u64> {
    pollster::block_on(check(storage, &CheckOptions::default(), &mut |_| {}))
        .map(|report| report.corruptions)
}

#[test]
fn file_of_too_many_clusters_is_refused_before_anything_is_counted() {
    let image = Image::new("cluster_size=512", "1M", &[]);
    let storage = MemoryStorage::from(image.bytes().as_slice());
    pollster::block_on(storage.set_len((1 << 31) * 512, Hold::none())).unwrap();
    assert_eq!(check_bytes(&storage).unwrap_err().kind(), ErrorKind::Unsupported);
    pollster::block_on(storage.set_len(((1 << 31) - 1) * 512, Hold::none())).unwrap();
    assert_eq!(check_bytes(&storage).unwrap(), 0);
}

#[test]
fn progress_tells_of_every_phase_and_ends_at_its_total() {
    let image = Image::new("", "1G", &["write -P 1 0 1M", "write -P 2 600M 1M"]);
    let storage = MemoryStorage::from(image.bytes().as_slice());
    let mut heard = Vec::new();
    let mut listen = |progress: lacuna::qcow2::check::Progress| heard.push(progress);
    pollster::block_on(check(&storage, &CheckOptions::default(), &mut listen)).unwrap();
    for phase in [Phase::Walk, Phase::Compare] {
        let last = heard.iter().rfind(|progress| progress.phase == phase).unwrap();
        assert_eq!(last.done, last.total, "{phase:?}");
    }
}
