//! The kit finds faults: engines that are lacuna but for one thing each, and the cases that tell it.
//!
//! * Always: what a fault has nothing to do with passes as before.

mod faulty;
mod file;

use lacuna_conform::Case;
use lacuna_conform::driver::Driver;
use lacuna_conform::report::Report;
use lacuna_conform::run::{Options, Verdict, run};
use lacuna_conform::suite;

use faulty::{Fault, Faulty};

/// Cases that no fault of the table has to do with.
const BYSTANDERS: [&str; 4] =
    ["read/v3-cluster-65536", "read/zstd", "read/data-file", "hostile/l1-size-huge"];

/// A fault, and each case that must fail, with words of what is said of it.
const ROWS: [(Fault, &[(&str, &str)]); 17] = [
    (Fault::None, &[]),
    (
        Fault::InPlace,
        &[
            ("sharing/snapshot-clusters", "snapshot 'before'"),
            ("sharing/snapshot-tables", "snapshot 'before'"),
            ("sharing/snapshot-clusters-v2", "snapshot 'before'"),
            ("sharing/two-entries", "read: 512 bytes differ"),
            ("sharing/many-entries", "bytes differ"),
            ("random/shared-clusters", "bytes differ"),
        ],
    ),
    (
        Fault::TablesInPlace,
        &[
            ("sharing/snapshot-tables", "snapshot 'before'"),
            ("sharing/snapshot-tables-v2", "snapshot 'before'"),
        ],
    ),
    (
        Fault::KeepsAutoclear,
        &[
            ("header/autoclear-cleared", "autoclear bits 0x10000020000 are still set"),
            ("header/autoclear-cleared-on-zero", "are still set"),
        ],
    ),
    (
        Fault::DropsExtensions,
        &[
            ("header/extension-kept", "header extension 0x12345678 is gone"),
            ("header/extension-kept-autoclear", "header extension 0x12345678 is gone"),
        ],
    ),
    (
        Fault::Leaks,
        &[
            ("write/v3-cluster-65536", "check: 1 clusters are leaked"),
            ("sharing/two-entries", "check: 1 clusters are leaked"),
        ],
    ),
    (
        Fault::ZeroShowsBacking,
        &[("backing/zero-v3", "read: "), ("backing/zero-unmap-v3", "read: ")],
    ),
    (Fault::DiscardShowsBacking, &[("backing/discard-v3", "after a discard: ")]),
    (
        Fault::BackingWithoutEnd,
        &[("backing/raw-shorter", "read: "), ("backing/raw-v2", "0xee instead of 0x00")],
    ),
    (
        Fault::ZeroFlagIgnored,
        &[
            ("read/all-reserved-zeros", "read: 262144 bytes differ"),
            ("read/v3-cluster-4096", "read: "),
        ],
    ),
    (Fault::ForgetsFlush, &[("durable/flush", "read: "), ("durable/extended-l2", "read: ")]),
    (
        Fault::CallsAllZero,
        &[
            ("read/v3-cluster-512", "extents: zero is said of 0"),
            ("backing/raw-longer", "extents: zero is said of 0"),
        ],
    ),
    (
        Fault::OpensUnknown,
        &[
            ("header/incompatible-bit-10-ro", "it was opened, and must be refused"),
            ("header/incompatible-bit-63-rw", "it was opened, and must be refused"),
        ],
    ),
    (Fault::OpensCorrupt, &[("header/corrupt-bit", "it was opened, and must be refused")]),
    (Fault::DirtyBelieved, &[("header/dirty-refcounts-anew", "bytes differ")]),
    (Fault::BitmapBelieved, &[("header/bitmap-enabled", "misses a write")]),
    (
        Fault::WritesWhenReading,
        &[
            ("read/unknown-autoclear", "the file disk.qcow2 was changed"),
            ("read/empty", "the file disk.qcow2 was changed"),
        ],
    ),
];

fn verdict(fault: Fault, case: &Case) -> Verdict {
    let folder = tempfile::tempdir().unwrap();
    let driver = Driver::thread(move || Box::new(Faulty(fault)));
    run(&driver, case, &Options::new(folder.path())).unwrap().verdict
}

fn case<'a>(cases: &'a [Case], name: &str) -> &'a Case {
    cases.iter().find(|case| case.name == name).unwrap_or_else(|| panic!("no case {name}"))
}

#[test]
fn every_fault_is_told_by_the_cases_that_are_about_it() {
    let cases = suite::all(1);
    let mut wrong = String::new();
    for (fault, told) in ROWS {
        for (name, words) in told {
            let verdict = verdict(fault, case(&cases, name));
            let is_told = matches!(&verdict, Verdict::Failed(faults) if faults.iter().any(|it| it.contains(words)));
            if !is_told {
                wrong += &format!(
                    "{fault:?} is not told: {}",
                    Report::lines(case(&cases, name), &verdict)
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn what_a_fault_has_nothing_to_do_with_passes() {
    let cases = suite::all(1);
    let mut wrong = String::new();
    for (fault, told) in ROWS {
        // Two faults show wherever anything is read.
        if matches!(fault, Fault::CallsAllZero | Fault::WritesWhenReading | Fault::ZeroFlagIgnored)
        {
            continue;
        }
        let others = BYSTANDERS.into_iter().filter(|name| told.iter().all(|(it, _)| it != name));
        for name in others {
            let verdict = verdict(fault, case(&cases, name));
            if verdict != Verdict::Passed {
                wrong += &format!("{fault:?}: {}", Report::lines(case(&cases, name), &verdict));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
