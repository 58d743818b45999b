//! Images with one thing wrong: the counts are QEMU's, and the repair does what can be done.

use lacuna::qcow2::check::{CheckReport, Repair};

use crate::images::{Image, counts};
use crate::repair::{lengthen_entry, shorten_entries};

const COPIED: u64 = 1 << 63;

/// What a repair of everything leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Left {
    Corruption,
    Nothing,
}

/// How QEMU's check compares with ours.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Qemu {
    /// Same counts; same lines, in any order.
    Same,
    /// Misses or cannot do something, as `docs/design/check.md` says.
    Differs,
}

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) options: &'static str,
    pub(crate) commands: &'static [&'static str],
    pub(crate) damage: fn(&Image),
    qemu: Qemu,
    left: Left,
}

const WRITES: &[&str] = &["write -P 1 0 256K", "write -P 2 600M 128K"];

fn plain(name: &'static str, left: Left, damage: fn(&Image)) -> Case {
    Case { name, options: "", commands: WRITES, damage, qemu: Qemu::Same, left }
}

pub(crate) fn cases() -> Vec<Case> {
    use Left::{Corruption, Nothing};
    vec![
        plain("L2 offset unaligned", Corruption, |image| {
            let at = image.l2(1);
            image.poke_word(at, image.word(at) + 0x200);
        }),
        plain("L2 offset past the end", Corruption, |image| {
            image.poke_word(image.l2(1), COPIED | 0x1_0000_0000);
        }),
        plain("copied flag missing", Nothing, |image| {
            let at = image.l2(2);
            image.poke_word(at, image.word(at) & !COPIED);
        }),
        plain("copied flag missing in L1", Nothing, |image| {
            let at = image.l1(1);
            image.poke_word(at, image.word(at) & !COPIED);
        }),
        plain("two L2 entries share a cluster", Nothing, |image| {
            image.poke_word(image.l2(1), image.word(image.l2(0)));
        }),
        plain("two L1 entries share a table", Nothing, |image| {
            image.poke_word(image.l1(1), image.word(image.l1(0)));
        }),
        plain("reserved bit 1", Corruption, |image| {
            let at = image.l2(1);
            image.poke_word(at, image.word(at) | 2);
        }),
        plain("reserved bit 56", Corruption, |image| {
            let at = image.l2(1);
            image.poke_word(at, image.word(at) | 1 << 56);
        }),
        plain("L2 entry to its own table", Nothing, |image| {
            image.poke_word(image.l2(1), image.word(image.l1(0)));
        }),
        plain("L1 offset unaligned", Corruption, |image| {
            let at = image.l1(0);
            image.poke_word(at, image.word(at) + 0x200);
        }),
        plain("L1 offset past the end", Corruption, |image| {
            image.poke_word(image.l1(0), COPIED | 0x1_0000_0000);
        }),
        plain("L1 reserved bit", Corruption, |image| {
            let at = image.l1(0);
            image.poke_word(at, image.word(at) | 1);
        }),
        Case {
            qemu: Qemu::Differs,
            ..plain("L1 entry without an offset", Nothing, |image| {
                image.poke_word(image.l1(0), COPIED);
            })
        },
        Case {
            qemu: Qemu::Differs,
            ..plain("refcount table entry unaligned", Nothing, |image| {
                let at = image.word(48);
                image.poke_word(at, image.word(at) + 0x200);
            })
        },
        plain("refcount table entry with reserved bits", Nothing, |image| {
            let at = image.word(48);
            image.poke_word(at, image.word(at) | 4);
        }),
        plain("refcount block missing", Nothing, |image| {
            image.poke_word(image.word(48), 0);
        }),
        plain("refcount block past the end", Nothing, |image| {
            image.poke_word(image.word(48) + 8, 0x1_0000_0000);
        }),
        plain("refcount block used twice", Nothing, |image| {
            image.poke_word(image.word(48) + 8, image.refcount_block());
        }),
        plain("refcount zero of a used cluster", Nothing, |image| {
            image.poke(image.refcount_block() + 2 * 6, &[0, 0]);
        }),
        plain("refcount too high", Nothing, |image| {
            image.poke(image.refcount_block() + 2 * 6, &[0, 2]);
        }),
        plain("leaked cluster", Nothing, |image| {
            image.poke_word(image.l2(3), 0);
        }),
        plain("leaks past the end of the file", Nothing, |image| {
            let mut bytes = image.bytes();
            bytes.resize(bytes.len() + 0x50000, 0);
            image.set_bytes(&bytes);
            image.poke(image.refcount_block() + 2 * 14, &[0, 1]);
        }),
        plain("L2 entry to the header's neighbour", Nothing, |image| {
            image.poke_word(image.l2(1), COPIED | 0x10000);
        }),
        plain("L2 entry to the refcount block", Nothing, |image| {
            image.poke_word(image.l2(1), COPIED | image.refcount_block());
        }),
        Case {
            options: "refcount_bits=1",
            ..plain("too many references for the width", Corruption, |image| {
                image.poke_word(image.l2(1), image.word(image.l2(0)));
            })
        },
        Case {
            options: "extended_l2=on",
            ..plain("subcluster both data and zero", Corruption, |image| {
                image.poke_word(image.l2_table(0) + 8, 0x1_ffff_ffff);
            })
        },
        Case {
            options: "extended_l2=on",
            ..plain("subclusters without a cluster", Corruption, |image| {
                image.poke_word(image.l2_table(0), 0);
            })
        },
        Case {
            options: "extended_l2=on",
            qemu: Qemu::Differs,
            ..plain("zero flag in an extended entry", Corruption, |image| {
                let at = image.l2_table(0);
                image.poke_word(at, image.word(at) | 1);
            })
        },
        Case {
            options: "compat=0.10",
            qemu: Qemu::Differs,
            ..plain("zero flag in version 2", Corruption, |image| {
                let at = image.l2(1);
                image.poke_word(at, image.word(at) | 1);
            })
        },
        Case {
            commands: &["write -P 1 0 256K", "write -z 64K 64K"],
            ..plain("preallocated cluster unaligned", Nothing, |image| {
                let at = image.l2(1);
                image.poke_word(at, image.word(at) + 0x200);
            })
        },
        Case {
            commands: &["write -c -P 1 0 64K", "write -c -P 2 64K 64K"],
            qemu: Qemu::Differs,
            ..plain("compressed with copied flag", Nothing, |image| {
                let at = image.l2(1);
                image.poke_word(at, image.word(at) | COPIED);
            })
        },
        Case {
            commands: &["write -c -P 1 0 64K", "write -c -P 2 64K 64K"],
            ..plain("compressed past the end", Corruption, |image| {
                let at = image.l2(1);
                image.poke_word(at, image.word(at) + 0x1000_0000);
            })
        },
        Case {
            options: "data_file",
            ..plain("copied flag missing with a data file", Nothing, |image| {
                let at = image.l2(1);
                image.poke_word(at, image.word(at) & !COPIED);
            })
        },
        Case {
            options: "data_file",
            ..plain("compressed with a data file", Corruption, |image| {
                image.poke_word(image.l2(1), 0x4000_0000_0005_0000);
            })
        },
    ]
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

/// The lines as QEMU would print them.
fn lines(report: &CheckReport) -> Vec<String> {
    let texts = report.findings.iter().map(|finding| (finding.qemu_text(), finding.occurrences));
    let texts = texts.flat_map(|(text, times)| vec![text; times as usize]);
    sorted(texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect())
}

#[test]
fn damage_is_found_as_qemu_finds_it() {
    let mut wrong = Vec::new();
    for case in cases().into_iter().chain(snapshot_cases()) {
        let image = Image::new(case.options, "700M", case.commands);
        (case.damage)(&image);
        let (ours, theirs) = (image.check(Repair::None), image.qemu_check());
        assert!(!ours.is_clean(), "{}", case.name);
        if case.qemu == Qemu::Differs {
            continue;
        }
        let ours = (counts(&ours), lines(&ours));
        let theirs = (theirs.counts(), sorted(theirs.lines));
        if ours != theirs {
            wrong.push(format!("{}: {ours:?}\n{theirs:?}", case.name));
        }
    }
    assert!(wrong.is_empty(), "ours, then QEMU's:\n{}", wrong.join("\n"));
}

const SNAPSHOTS: &[&str] =
    &["write -P 1 0 256K", "!snapshot -c one @", "write -P 2 64K 64K", "!snapshot -c two @"];
const BITMAPS: &[&str] = &[
    "write -P 1 0 256K",
    "!bitmap --add -g 512 @ one",
    "!bitmap --add @ two",
    "write -P 2 64K 64K",
];

fn with_snapshots(name: &'static str, left: Left, damage: fn(&Image)) -> Case {
    Case { commands: SNAPSHOTS, ..plain(name, left, damage) }
}

fn with_bitmaps(name: &'static str, left: Left, damage: fn(&Image)) -> Case {
    Case { commands: BITMAPS, ..plain(name, left, damage) }
}

pub(crate) fn snapshot_cases() -> Vec<Case> {
    use Left::{Corruption, Nothing};
    vec![
        with_snapshots("leak beside snapshots", Nothing, |image| {
            image.poke_word(image.l2(0), 0);
        }),
        with_snapshots("shared cluster with copied flag", Nothing, |image| {
            let at = image.l2(0);
            image.poke_word(at, image.word(at) | COPIED);
        }),
        with_snapshots("refcount of a shared cluster too low", Nothing, |image| {
            image.poke(image.refcount_block() + 2 * 5, &[0, 1]);
        }),
        with_snapshots("refcount of a shared cluster too high", Nothing, |image| {
            image.poke(image.refcount_block() + 2 * 5, &[0, 9]);
        }),
        with_snapshots("L2 offset of a shared table past the end", Corruption, |image| {
            let table = image.word(image.word(image.word(64))) & 0x00ff_ffff_ffff_fe00;
            image.poke_word(table + 8, 0x1_0000_0000);
        }),
        with_snapshots("L1 table of a snapshot unaligned", Corruption, |image| {
            let at = image.word(64);
            image.poke_word(at, image.word(at) + 0x200);
        }),
        with_snapshots("L1 table of a snapshot too large", Corruption, |image| {
            image.poke(image.word(64) + 8, &[0x7f, 0, 0, 0]);
        }),
        with_snapshots("L1 table of a snapshot past the end", Corruption, |image| {
            image.poke_word(image.word(64), 0x1_0000_0000);
        }),
        with_snapshots("snapshots and no refcounts", Nothing, |image| {
            image.poke_word(image.word(48), 0);
        }),
        with_snapshots("snapshot entries incomplete", Nothing, shorten_entries),
        Case {
            qemu: Qemu::Differs,
            ..with_snapshots("snapshot with too much extra data", Nothing, lengthen_entry)
        },
        Case {
            options: "refcount_bits=1",
            commands: WRITES,
            ..with_snapshots("narrow refcounts missing", Nothing, |image| {
                image.poke_word(image.word(48), 0);
            })
        },
        Case {
            options: "refcount_bits=64,cluster_size=512",
            ..with_snapshots("wide refcounts missing", Nothing, |image| {
                image.poke_word(image.word(48) + 8, 0);
            })
        },
        Case {
            qemu: Qemu::Differs,
            ..with_bitmaps("bitmap directory broken", Corruption, |image| {
                image.poke(image.bitmap_directory() + 12, &[0xff; 4]);
                image.poke(image.bitmap_directory() + 18, &[0xff; 2]);
            })
        },
        Case {
            qemu: Qemu::Differs,
            ..with_bitmaps("bitmap table entry with reserved bits", Corruption, |image| {
                let table = image.word(image.bitmap_directory());
                image.poke_word(table, image.word(table) | 2);
            })
        },
        with_bitmaps("bitmap table entry past the end", Corruption, |image| {
            let table = image.word(image.bitmap_directory());
            image.poke_word(table, 0x1_0000_0000);
        }),
        with_bitmaps("bitmap table entry to guest data", Nothing, |image| {
            let table = image.word(image.bitmap_directory());
            image.poke_word(table, image.word(image.l2(0)) & !COPIED);
        }),
        with_bitmaps("bitmaps of a writer that knew none", Nothing, |image| {
            image.poke_word(88, 0);
        }),
        with_bitmaps("leak beside bitmaps", Nothing, |image| {
            image.poke_word(image.l2(0), 0);
        }),
        with_bitmaps("refcounts missing beside bitmaps", Nothing, |image| {
            image.poke_word(image.word(48), 0);
        }),
    ]
}

/// Where QEMU repairs nothing, or counts the end of the file that it moved.
const OTHER_REPAIR: [&str; 2] =
    ["refcount table entry with reserved bits", "refcount block past the end"];

#[test]
fn repair_leaves_what_qemu_leaves_or_less() {
    let mut wrong = Vec::new();
    for case in cases().into_iter().chain(snapshot_cases()) {
        let image = Image::new(case.options, "700M", case.commands);
        (case.damage)(&image);
        let damaged = image.bytes();
        image.keep_copy();
        let ours = image.check(Repair::All);
        let again = image.check(Repair::None);
        let theirs = image.qemu_check();
        let left = if again.is_clean() { Left::Nothing } else { Left::Corruption };
        let mut complain = |what: &str| {
            wrong.push(format!("{}: {what}: {ours:?}\n{again:?}\n{theirs:?}", case.name));
        };
        if left != case.left {
            complain("leaves something else");
        }
        if counts(&ours) != counts(&again) {
            complain("the repair did not say what it left");
        }
        if case.qemu == Qemu::Same && counts(&again) != theirs.counts() {
            complain("QEMU sees something else");
        }
        if case.left == Left::Nothing && theirs.status != 0 {
            complain("QEMU does not find it clean");
        }
        // A table that is guest data as well cannot be changed without changing both.
        if case.name != "L2 entry to its own table" && !image.reads_as_before() {
            complain("the guest reads something else");
        }
        image.set_bytes(&damaged);
        let qemu = image.qemu_repair("all");
        let fixed = [qemu.number("corruptions-fixed"), qemu.number("leaks-fixed")];
        if case.qemu == Qemu::Same
            && case.left == Left::Nothing
            && !OTHER_REPAIR.contains(&case.name)
            && fixed != [ours.corruptions_fixed, ours.leaks_fixed]
        {
            wrong.push(format!("{}: fixed {fixed:?}: {ours:?}\n{qemu:?}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn repair_of_leaks_frees_leaks_and_nothing_else() {
    let image = Image::new("", "700M", WRITES);
    image.poke_word(image.l2(3), 0);
    let report = image.check(Repair::Leaks);
    assert!(report.is_clean());
    assert_eq!((report.corruptions_fixed, report.leaks_fixed), (0, 1));
    assert_eq!(image.qemu_check().status, 0);
}

#[test]
fn leaks_stay_where_a_damaged_pointer_may_mean_them() {
    let image = Image::new("", "700M", WRITES);
    let at = image.l2(1);
    let lost = image.word(at);
    image.poke_word(at, lost + 0x200);
    let report = image.check(Repair::All);
    assert_eq!(report.leaks, image.qemu_check().number("leaks"));
    // Whoever knows better puts the pointer back, and nothing is lost.
    image.poke_word(at, lost);
    assert!(image.check(Repair::All).is_clean());
    assert_eq!(&image.guest()[0x10000..0x20000], &[1; 0x10000]);
}
