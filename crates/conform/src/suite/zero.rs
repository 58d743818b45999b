//! Zeroing and discarding.

use super::{changing, discard, mixed, mixed_extended, section, write, zero, zero_unmap};
use crate::Layout;
use crate::case::{Case, Fact, Step};

const BYTES: u64 = 1 << 16;

fn case(
    name: impl Into<String>,
    proves: &str,
    layout: Layout,
    steps: impl IntoIterator<Item = Step>,
) -> Case {
    Case::new(name, proves, section::STANDARD, layout, changing(steps))
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for version in [2, 3] {
        for (word, step) in [("zero", zero as fn(u64, u64) -> Step), ("zero-unmap", zero_unmap)] {
            let proves =
                format!("zeroed ranges of version {version} are zeros, whatever was there");
            let whole = format!("{word}/v{version}-whole-clusters");
            cases.push(case(whole, &proves, mixed(version, 16), [step(0, 9 * BYTES)]));
            let proves = format!("parts of clusters of version {version} are zeroed, and not more");
            let parts = format!("{word}/v{version}-parts");
            cases.push(case(parts, &proves, mixed(version, 16), edges(step)));
            let proves = format!("what is written after version {version} was zeroed is read");
            let steps = [step(0, 8 * BYTES), write(512, 512, 40), write(4 * BYTES - 512, 1024, 41)];
            let again = format!("{word}/v{version}-and-written");
            cases.push(case(again, &proves, mixed(version, 16), steps));
        }
        let proves = format!("what was discarded in version {version} reads as before or as zeros");
        let name = format!("discard/v{version}-whole-clusters");
        cases.push(case(name, &proves, mixed(version, 16), [discard(0, 9 * BYTES)]));
        let proves = format!("a discard in version {version} leaves what is beside it");
        let name = format!("discard/v{version}-parts");
        cases.push(case(name, &proves, mixed(version, 16), edges(discard)));
        let proves = format!("what is written after a discard in version {version} is read");
        let steps = [discard(0, 8 * BYTES), write(512, 512, 40), write(4 * BYTES - 512, 1024, 41)];
        let name = format!("discard/v{version}-and-written");
        cases.push(case(name, &proves, mixed(version, 16), steps));
    }
    cases.extend(forms());
    cases.extend(extended());
    cases
}

/// Ranges that begin and end inside of clusters of each kind.
fn edges(step: fn(u64, u64) -> Step) -> Vec<Step> {
    vec![
        step(512, 1024),
        step(BYTES - 512, 512 + BYTES + 512),
        step(3 * BYTES + 4096, 4096),
        step(4 * BYTES + 512, BYTES),
        step(6 * BYTES + 512, BYTES - 512),
        step(9 * BYTES, 512),
    ]
}

fn forms() -> Vec<Case> {
    let end = || Layout::new(3, 16, 3 * BYTES + 1024).data(2, 1).data(3, 2);
    vec![
        case(
            "zero/last-part",
            "the part of a cluster at the end of the disk is zeroed",
            end(),
            [zero_unmap(3 * BYTES, 1024)],
        ),
        case(
            "discard/last-part",
            "the part of a cluster at the end of the disk is discarded",
            end(),
            [discard(2 * BYTES, BYTES + 1024)],
        ),
        case(
            "zero/small-clusters",
            "many clusters of 512 bytes are zeroed at once",
            mixed(3, 9),
            [zero_unmap(0, 140 * 512), zero(145 * 512, 3 * 512)],
        ),
        case(
            "discard/small-clusters",
            "many clusters of 512 bytes are discarded at once",
            mixed(3, 9),
            [discard(0, 140 * 512)],
        ),
        case(
            "zero/compressed-neighbours",
            "zeroing a compressed cluster leaves the streams beside it",
            (0..6).fold(Layout::new(3, 16, 6 * BYTES), |layout, cluster| {
                layout.compressed(cluster, cluster)
            }),
            [zero_unmap(BYTES, BYTES), zero(4 * BYTES, BYTES), discard(2 * BYTES, BYTES)],
        ),
        case(
            "zero/unwritten",
            "zeroing and discarding what was never written leaves it zero",
            Layout::new(3, 16, 8 * BYTES),
            [zero(0, BYTES), zero_unmap(BYTES, 2 * BYTES), discard(4 * BYTES, BYTES)],
        ),
        data_file("zero/data-file", zero_unmap),
        data_file("discard/data-file", discard),
        raw_data_file("zero/data-file-raw", zero_unmap),
        raw_data_file("discard/data-file-raw", discard),
    ]
}

fn data_file(name: &str, step: fn(u64, u64) -> Step) -> Case {
    let layout = Layout::new(3, 16, 6 * BYTES).data_file().data(0, 1).data(1, 2).data(3, 3);
    let steps = [step(BYTES, BYTES), step(512, 512), write(BYTES + 512, 512, 9)];
    let proves = "ranges in an external data file are zeroed and discarded";
    Case { section: section::DATA_FILE, ..case(name, proves, layout, steps) }
}

fn raw_data_file(name: &str, step: fn(u64, u64) -> Step) -> Case {
    let steps = [step(BYTES, BYTES), step(512, 512)];
    let proves = "a raw data file is zero where the disk is, or is no longer called raw";
    let layout = super::read::raw_data_file();
    let case = case(name, proves, layout, steps).fact(Fact::RawDataFile);
    Case { section: section::DATA_FILE, ..case }
}

fn extended() -> Vec<Case> {
    let mut cases = Vec::new();
    for (word, step) in
        [("zero", zero as fn(u64, u64) -> Step), ("zero-unmap", zero_unmap), ("discard", discard)]
    {
        let unit = BYTES / 32;
        let steps = [
            step(unit, 3 * unit),
            step(2 * BYTES + 4 * unit, 8 * unit),
            step(5 * BYTES, unit),
            step(7 * BYTES + unit / 2, unit),
            step(8 * BYTES, BYTES),
            write(8 * BYTES + 5 * unit, 512, 50),
        ];
        let proves = "subclusters are zeroed and discarded, and their neighbours left";
        let case = case(format!("{word}/extended-l2"), proves, mixed_extended(16), steps);
        cases.push(Case { section: section::EXTENDED, ..case });
    }
    cases
}
