//! Sequences from a seed, over layouts of each kind.

use super::{
    READ, WRITE, discard, mixed, mixed_extended, mixed_into, section, write, zero, zero_unmap,
};
use crate::case::{Case, Fact, Step};
use crate::image::SnapshotTables;
use crate::{Layout, Random};

/// Changes of a sequence.
const STEPS: u64 = 60;

pub(super) fn cases(seed: u64) -> Vec<Case> {
    let mut random = Random::new(seed);
    let layouts = layouts();
    let case = |(name, layout): (&str, Layout)| {
        let steps = sequence(&mut random.split(), &layout);
        let proves = format!("{STEPS} changes at random places give the disk that they should");
        let name = format!("random/{name}");
        Case::new(name, proves, section::MAPPING, layout, steps).fact(Fact::MayLeak)
    };
    layouts.into_iter().map(case).collect()
}

fn layouts() -> Vec<(&'static str, Layout)> {
    let bytes = 1 << 16;
    vec![
        ("v2", mixed(2, 16)),
        ("v3", mixed(3, 16)),
        ("small-clusters", mixed(3, 9)),
        ("small-clusters-v2", mixed(2, 9)),
        ("clusters-4096", mixed(3, 12)),
        ("refcount-bits-64", mixed(3, 12).with(|image| image.refcount_order(6))),
        ("refcount-bits-2", mixed(3, 12).with(|image| image.refcount_order(1))),
        ("extended-l2", mixed_extended(16)),
        ("extended-l2-16384", mixed_extended(14)),
        ("backing-raw", mixed_over(Layout::new(3, 16, 8 * bytes).over_raw(3 * bytes + 1536, 60))),
        (
            "backing-raw-v2",
            mixed_over(Layout::new(2, 16, 8 * bytes).over_raw(3 * bytes + 1536, 60)),
        ),
        (
            "backing-image",
            Layout::new(3, 12, 64 << 12).over_image(&mixed(3, 9)).data(3, 1).zero(4).data(40, 2),
        ),
        (
            "backing-extended-l2",
            Layout::new(3, 14, 20 << 14)
                .extended()
                .over_raw(5 << 14 | 512, 60)
                .subclusters(0, 1, 0x0f, 0xf0)
                .data(7, 2),
        ),
        ("snapshot-tables", mixed(3, 16).snapshot("before", SnapshotTables::Shared)),
        ("snapshot-clusters", mixed(3, 12).snapshot("before", SnapshotTables::Own)),
        ("snapshot-small-clusters", mixed(3, 9).snapshot("before", SnapshotTables::Shared)),
        ("snapshot-extended-l2", mixed_extended(14).snapshot("before", SnapshotTables::Shared)),
        ("shared-clusters", shared()),
        ("zstd", mixed_into(Layout::new(3, 16, 8 * bytes).zstd())),
        ("lazy-refcounts", mixed(3, 12).with(|image| image.features(0, 1, 0))),
        ("data-file", Layout::new(3, 12, 40 << 12).data_file().data(0, 1).zero(1).reserved_zero(2)),
    ]
}

fn mixed_over(layout: Layout) -> Layout {
    let layout = layout.data(1, 1).compressed(5, 2);
    if layout.version() == 2 { layout } else { layout.zero(2).reserved_zero(4) }
}

fn shared() -> Layout {
    let layout = Layout::new(3, 12, 40 << 12).data(0, 1).data(1, 2);
    (2..20).fold(layout, |layout, cluster| layout.shared(cluster, cluster % 2))
}

/// Changes with reads between, closed and opened again now and then, killed after a flush once.
fn sequence(random: &mut Random, layout: &Layout) -> Vec<Step> {
    let mut steps = vec![WRITE];
    for number in 1..=STEPS {
        let (at, len) = range(random, layout);
        let seed = 1000 + number;
        match random.below(12) {
            0..5 => steps.push(write(at, len, seed)),
            5 => steps.push(zero(at, len)),
            6 => steps.push(zero_unmap(at, len)),
            7 => steps.push(discard(at, len)),
            8 => steps.push(Step::Read { at, len }),
            9 => steps.push(Step::Flush),
            10 => steps.push(Step::Extents),
            _ => steps.extend([Step::Close, WRITE]),
        }
        if number == STEPS / 2 {
            steps.extend([Step::Flush, Step::Kill, WRITE, Step::Verify]);
        }
    }
    steps.extend([Step::Verify, Step::Extents, Step::Close, READ, Step::Verify, Step::Close]);
    steps
}

/// Whole clusters as often as sectors of one or several.
fn range(random: &mut Random, layout: &Layout) -> (u64, u64) {
    let (bytes, size) = (layout.cluster_bytes(), layout.content().len());
    let unit = if random.one_in(2) { bytes } else { 512 };
    let at = random.below(size / unit) * unit;
    let most = (3 * bytes / unit).max(1);
    let len = (1 + random.below(most)) * unit;
    (at, len.min(size - at))
}
