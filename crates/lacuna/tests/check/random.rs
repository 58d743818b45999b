//! Random bits of metadata flipped: the check counts what QEMU counts, and a repair never makes
//! anything worse.
//!
//! `LACUNA_SEED=17` replays one run, `LACUNA_SEEDS=5000` runs that many.

use std::ops::Range;

use lacuna::block::Layer;
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, CheckReport, FindingKind, Repair, check};
use lacuna::qcow2::{Access, Image as Qcow2, OpenOptions, Parts};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, HostOffset};
use testkit::{Random, seeds};

use crate::crash::harm;
use crate::images::{Image, counts};

const KINDS: &[(&str, &[&str])] = &[
    ("", &["write -P 1 0 256K", "write -P 2 600M 128K"]),
    ("refcount_bits=1", &["write -P 1 0 256K", "write -P 2 600M 128K"]),
    ("refcount_bits=64", &["write -P 1 0 256K", "write -P 2 600M 128K"]),
    ("extended_l2=on", &["write -P 1 0 256K", "write -z 5K 9K", "write -P 2 601M 3K"]),
    ("compat=0.10", &["write -P 1 0 256K", "!snapshot -c one @", "write -P 2 64K 128K"]),
    ("", &["write -c -P 1 0 256K", "write -c -P 3 600M 192K", "write -P 2 64K 64K"]),
    (
        "cluster_size=4K",
        &["write -P 1 0 40K", "!snapshot -c one @", "write -P 2 8K 8K", "!snapshot -c two @"],
    ),
    ("", &["write -P 1 0 256K", "!bitmap --add -g 512 @ one", "!bitmap --add @ two"]),
];

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Where the metadata is that gets damaged: the parts that say something.
fn metadata(image: &Image) -> Vec<Range<u64>> {
    let bytes = image.bytes();
    let word = |at: u64| {
        let at = at as usize;
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    };
    let half = |at: u64| (word(at) >> 32) & 0xffff_ffff;
    let mut ranges = Vec::new();
    let mut l1 = |at: u64, entries: u64| {
        for index in 0..entries {
            let table = word(at + index * 8) & OFFSET;
            if table != 0 {
                ranges.push(at + index * 8..at + index * 8 + 8);
                ranges.push(table..table + 96);
            }
        }
    };
    l1(word(40), half(36));
    let snapshots = half(60);
    if snapshots > 0 {
        l1(word(word(64)), half(word(64) + 8));
        ranges.push(word(64)..word(64) + 12);
    }
    ranges.push(word(48)..word(48) + 16);
    ranges.push(word(word(48))..word(word(48)) + 64);
    let has_bitmaps = half(4) == 3 && word(88) & 1 == 1;
    if has_bitmaps {
        let directory = image.bitmap_directory();
        ranges.push(directory..directory + 64);
        ranges.push(word(directory)..word(directory) + 8);
    }
    ranges
}

fn flip(image: &Image, random: &mut Random) -> Vec<(u64, u32)> {
    let ranges = metadata(image);
    let mut flips = Vec::new();
    let mut bytes = image.bytes();
    for _ in 0..1 + random.below(3) {
        let range = random.pick(&ranges);
        let at = range.start + random.below(range.end - range.start);
        let bit = random.below(8) as u32;
        bytes[at as usize] ^= 1 << bit;
        flips.push((at, bit));
    }
    image.set_bytes(&bytes);
    flips
}

/// What QEMU does not count, or cannot go on after (docs/design/check.md).
fn is_ours_alone(kind: &FindingKind) -> bool {
    // QEMU takes such an offset for a negative one, which lies before the end of the file.
    let is_negative = |at: HostOffset| at.0 > i64::MAX as u64;
    matches!(kind, FindingKind::RefcountBlockOutside { offset, .. } if is_negative(*offset))
        || matches!(
            kind,
            FindingKind::BitmapEntryInvalid { .. }
            | FindingKind::BitmapUnusable { .. }
            | FindingKind::L1Headless { .. }
            // QEMU's own counts stop there, and so do its views of shared refcount blocks.
            | FindingKind::RefcountOverflow { .. }
            // QEMU stops looking at flags there.
            | FindingKind::RefcountUnreadable { .. }
            | FindingKind::SnapshotTableUnusable { .. }
            | FindingKind::TooManyTables { .. }
            | FindingKind::ZeroFlagReserved { .. }
        )
}

/// What the guest reads around what was written, cluster by cluster; nothing where that fails.
fn guest(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    pollster::block_on(async {
        let storage = MemoryStorage::from(bytes);
        let parts = Parts { storage, data: None, backing: None };
        let Ok(image) = Qcow2::open(parts, OpenOptions::new(Access::ReadOnly)).await else {
            return Vec::new();
        };
        let mut read = Vec::new();
        for start in [0, 600 << 20, 601 << 20] {
            for index in 0..128 {
                let at = GuestOffset(start + index * 4096);
                let (result, buffer) = image.read(at, Buffer::new(4096)).await;
                read.push(result.is_ok().then(|| buffer.to_vec()));
            }
        }
        read
    })
}

/// Says whether these guest bytes are metadata that the repair has changed. Where a damaged entry
/// points to a table, the table is guest data too.
fn is_metadata(guest: &[u8], damaged: &[u8], repaired: &[u8]) -> bool {
    let pages = damaged.chunks(4096).zip(repaired.chunks(4096));
    pages.into_iter().any(|(before, after)| before != after && before == guest)
}

/// The first findings, one line each.
fn brief(report: &CheckReport) -> String {
    let lines: Vec<_> =
        report.findings.iter().take(40).map(|finding| format!("{finding:?}")).collect();
    format!("{:?}\n{}\n", counts(report), lines.join("\n"))
}

#[test]
fn random_damage_is_counted_as_qemu_counts_it_and_repair_makes_nothing_worse() {
    let images: Vec<_> = KINDS
        .iter()
        .map(|(options, commands)| Image::new(options, "700M", commands))
        .map(|image| (image.bytes(), image))
        .collect();
    for seed in seeds(64) {
        let mut random = Random::new(seed);
        let kind = random.index(KINDS.len());
        let (options, commands) = KINDS[kind];
        let (healthy, image) = &images[kind];
        image.set_bytes(healthy);
        let flips = flip(image, &mut random);
        let story = format!("seed {seed}: {options} {commands:?} flipped {flips:x?}");
        println!("{story}");
        let (ours, theirs) = (image.check(Repair::None), image.qemu_check());
        // QEMU does not open images with bitmaps it does not like; a cut list may hide what is ours.
        let comparable = theirs.has_checked()
            && ours.findings_omitted == 0
            && !ours.findings.iter().any(|finding| is_ours_alone(&finding.kind));
        if comparable {
            assert_eq!(
                counts(&ours),
                theirs.counts(),
                "{story}: {} {}",
                brief(&ours),
                theirs.brief()
            );
        }
        let damaged = image.bytes();
        let before = guest(&damaged);
        let repaired = image.check(Repair::All);
        let again = image.check(Repair::None);
        // What the repair could not do is an error of the repair, not of the next check.
        assert_eq!(
            counts(&repaired)[1..],
            counts(&again)[1..],
            "{story}: the report is not what is left"
        );
        assert!(
            again.corruptions <= ours.corruptions && again.check_errors <= ours.check_errors,
            "{story}: worse: {} {}",
            brief(&ours),
            brief(&again)
        );
        let bits = healthy[23].into();
        let worse: Vec<_> = harm(&again, bits).difference(&harm(&ours, bits)).cloned().collect();
        assert!(worse.is_empty(), "{story}: new harm {worse:#?} in {}", brief(&ours));
        let theirs = image.qemu_check();
        if comparable {
            assert_eq!(
                counts(&again),
                theirs.counts(),
                "{story}: {} {}",
                brief(&again),
                theirs.brief()
            );
        }
        let repaired = image.bytes();
        for (index, (before, after)) in before.iter().zip(&guest(&repaired)).enumerate() {
            let may_change = |before: &Vec<u8>| is_metadata(before, &damaged, &repaired);
            let is_same = before
                .as_ref()
                .is_none_or(|before| after.as_ref() == Some(before) || may_change(before));
            assert!(is_same, "{story}: guest data {index} changed");
        }
        let second = image.check(Repair::All);
        let (second, expected) = (counts(&second)[1..].to_vec(), counts(&again)[1..].to_vec());
        assert_eq!(second, expected, "{story}: a second repair found more to do");
    }
}

/// Anything may be in the file; there is an answer.
#[test]
fn any_bytes_get_an_answer() {
    let images: Vec<_> = KINDS
        .iter()
        .map(|(options, commands)| Image::new(options, "64M", &commands[..1]))
        .collect();
    for seed in seeds(200) {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut bytes = random.pick(&images).bytes();
        let ranges = [24..112, 0..0x400, 0x10000..0x10010, 0x20000..0x20040, 0x30000..0x50000];
        for _ in 0..1 + random.below(12) {
            let range = random.pick(&ranges).clone();
            let at = (range.start + random.index(range.len())).min(bytes.len() - 1);
            bytes[at] = random.next() as u8;
        }
        for repair in [Repair::None, Repair::Leaks, Repair::All] {
            let storage = MemoryStorage::from(bytes.as_slice());
            let result = pollster::block_on(check(&storage, &CheckOptions { repair }, &mut |_| {}));
            let is_known = |report: &CheckReport| report.image_end_offset.0 > 0;
            assert!(result.as_ref().map_or(true, is_known), "seed {seed}: {result:?}");
        }
    }
}
