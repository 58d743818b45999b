//! What a flush covered is there after the driver was killed.

use super::{READ, WRITE, discard, mixed, mixed_extended, mixed_into, section, write, zero_unmap};
use crate::Layout;
use crate::case::{Case, Fact, Step};
use crate::image::SnapshotTables;

fn case(name: &str, proves: &str, layout: Layout, changes: impl IntoIterator<Item = Step>) -> Case {
    let mut steps = vec![WRITE];
    steps.extend(changes);
    steps.extend([Step::Kill, READ, Step::Verify, Step::Close]);
    // An image that was left so is also written again.
    steps.extend([WRITE, write(1024, 512, 90), Step::Verify, Step::Close]);
    Case::new(format!("durable/{name}"), proves, section::REFCOUNTS, layout, steps)
        .fact(Fact::MayLeak)
}

pub(super) fn cases() -> Vec<Case> {
    let bytes = 1 << 16;
    let new = || Layout::new(3, 16, 10 << 16);
    vec![
        case(
            "flush",
            "what was flushed is there after the engine was killed",
            new(),
            [write(0, 512, 1), write(3 * bytes, bytes, 2), Step::Flush],
        ),
        case(
            "flush-v2",
            "so it is in version 2",
            mixed(2, 16),
            [write(0, 512, 21), write(2 * bytes, bytes, 22), Step::Flush],
        ),
        case(
            "flush-then-more",
            "what came after the flush does not harm what it covered",
            mixed(3, 16),
            [
                write(2 * bytes, bytes, 21),
                Step::Flush,
                write(8 * bytes, bytes, 22),
                write(4 * bytes, bytes, 23),
                zero_unmap(0, bytes),
            ],
        ),
        case(
            "no-flush",
            "an image whose engine was killed without a flush is sound",
            mixed(3, 16),
            [write(2 * bytes, bytes, 21), zero_unmap(4 * bytes, bytes), write(8 * bytes, 512, 22)],
        ),
        case(
            "zero-flush",
            "zeros that were flushed are zeros",
            mixed(3, 16),
            [zero_unmap(0, 8 * bytes), Step::Flush, write(512, 512, 21)],
        ),
        case(
            "discard-flush",
            "a place that a discard gave back is not reused while the file still names it",
            mixed(3, 16),
            [discard(0, bytes), Step::Flush, write(8 * bytes, bytes, 21), Step::Flush],
        ),
        case(
            "small-clusters",
            "so it is with many tables",
            Layout::new(3, 9, 4096 << 9),
            [write(0, 1 << 18, 1), Step::Flush, write(1 << 20, 1 << 18, 2)],
        ),
        case(
            "lazy-refcounts",
            "with lazy refcounts the dirty bit says that they are late",
            mixed_into(new()).with(|image| image.features(0, 1, 0)),
            [write(2 * bytes, bytes, 21), write(8 * bytes, bytes, 22), Step::Flush],
        ),
        case(
            "extended-l2",
            "so it is with extended L2 entries",
            mixed_extended(16),
            [write(2 * bytes + 40960, 2048, 21), write(8 * bytes, 512, 22), Step::Flush],
        ),
        case(
            "data-file",
            "so it is with an external data file",
            Layout::new(3, 16, 8 << 16).data_file().data(0, 1),
            [write(0, 512, 21), write(3 * bytes, bytes, 22), Step::Flush],
        ),
        case(
            "snapshot",
            "so it is where tables had to be copied for a snapshot",
            mixed_into(new()).snapshot("before", SnapshotTables::Shared),
            [
                write(0, 512, 21),
                write(8 * bytes, bytes, 22),
                Step::Flush,
                write(4 * bytes, 512, 23),
            ],
        ),
    ]
}
