//! Bits and extensions of the header: kept, cleared and refused.

use super::{Field, READ, WRITE, changing, mixed, patched, section, write, zero};
use crate::Layout;
use crate::case::{Case, Fact, Step};
use crate::image::{ImageBuilder, SnapshotTables};
use crate::protocol::Need;

fn case(
    name: &str,
    proves: &str,
    section: &'static str,
    layout: Layout,
    steps: impl IntoIterator<Item = Step>,
) -> Case {
    Case::new(format!("header/{name}"), proves, section, layout, changing(steps))
}

fn refused(
    name: &str,
    proves: &str,
    mode: Step,
    change: impl FnOnce(ImageBuilder) -> ImageBuilder,
) -> Case {
    let layout = mixed(3, 16).with(change);
    Case::new(format!("header/{name}"), proves, section::HEADER, layout, [mode]).refuses()
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = kept();
    cases.extend(refusals());
    cases.extend(dirty());
    cases.extend(bitmaps());
    cases
}

fn kept() -> Vec<Case> {
    const UNKNOWN: u32 = 0x1234_5678;
    let somebody = b"somebody else's bytes".to_vec();
    let write_one = || [write(512, 512, 20), write(8 << 16, 1 << 16, 21)];
    vec![
        case(
            "autoclear-cleared",
            "whoever writes clears autoclear bits that it does not know",
            section::HEADER,
            mixed(3, 16).with(|image| image.features(0, 0, 1 << 40 | 1 << 17)),
            write_one(),
        )
        .fact(Fact::AutoclearGone(1 << 40 | 1 << 17)),
        case(
            "autoclear-cleared-on-zero",
            "zeroing is a change too",
            section::HEADER,
            mixed(3, 16).with(|image| image.features(0, 0, 1 << 40)),
            [zero(0, 1 << 16)],
        )
        .fact(Fact::AutoclearGone(1 << 40)),
        case(
            "compatible-kept",
            "compatible bits that it does not know stay",
            section::HEADER,
            mixed(3, 16).with(|image| image.features(0, 1 << 50, 0)),
            write_one(),
        )
        .fact(Fact::CompatibleKept(1 << 50)),
        case(
            "extension-kept",
            "header extensions that it does not know stay, byte for byte",
            section::EXTENSIONS,
            mixed(3, 16).with(|image| image.extension(UNKNOWN, b"somebody else's bytes")),
            write_one(),
        )
        .fact(Fact::ExtensionKept(UNKNOWN, somebody.clone())),
        case(
            "extension-kept-autoclear",
            "also where the header has to be written for autoclear bits",
            section::EXTENSIONS,
            mixed(3, 16).with(|image| {
                image.features(0, 0, 1 << 40).extension(UNKNOWN, b"somebody else's bytes")
            }),
            write_one(),
        )
        .fact(Fact::ExtensionKept(UNKNOWN, somebody.clone()))
        .fact(Fact::AutoclearGone(1 << 40)),
        case(
            "extension-kept-v2",
            "also in version 2",
            section::EXTENSIONS,
            mixed(2, 16).with(|image| image.extension(UNKNOWN, b"somebody else's bytes")),
            write_one(),
        )
        .fact(Fact::ExtensionKept(UNKNOWN, somebody)),
        case(
            "header-104",
            "a header without a compression type is written by",
            section::HEADER,
            mixed(3, 16).with(|image| image.header_bytes(104)),
            write_one(),
        ),
        case(
            "snapshots-with-autoclear",
            "clearing a bit leaves the snapshot table",
            section::SNAPSHOTS,
            mixed(3, 16)
                .with(|image| image.features(0, 0, 1 << 40))
                .snapshot("before", SnapshotTables::Shared),
            write_one(),
        )
        .fact(Fact::AutoclearGone(1 << 40)),
    ]
}

fn refusals() -> Vec<Case> {
    let mut cases = Vec::new();
    for (word, mode) in [("ro", READ), ("rw", WRITE)] {
        for bit in [10, 63] {
            cases.push(refused(
                &format!("incompatible-bit-{bit}-{word}"),
                "an image with an incompatible bit that is not known is not opened",
                mode,
                move |image| image.features(1 << bit, 0, 0),
            ));
        }
    }
    let rows: [(&str, &str, &[Field]); 7] = [
        ("version-4", "a version that is not known is refused", &[(4, 4, 4)]),
        ("version-1", "so is one that is none of qcow2", &[(4, 1, 4)]),
        ("cluster-bits-8", "clusters have 512 bytes at least", &[(20, 8, 4)]),
        ("refcount-order-7", "refcounts have 64 bits at most", &[(96, 7, 4)]),
        ("encrypted-aes", "an encrypted image is not opened without its key", &[(32, 1, 4)]),
        ("magic", "what does not begin with the magic is no qcow2", &[(0, 0x5146_4900, 4)]),
        (
            "compression-type",
            "a compression that is not known is refused",
            &[(72, 1 << 3, 8), (104, 9, 1)],
        ),
    ];
    for (name, proves, fields) in rows {
        cases.push(refused(name, proves, READ, |image| patched(image, fields)));
    }
    cases.push(refused(
        "corrupt-bit",
        "an image that is marked as corrupt is not opened for writing",
        WRITE,
        |image| image.features(2, 0, 0),
    ));
    cases
}

/// Refcounts of an image that was left dirty are not to be trusted: here those of all data are zero.
fn dirty() -> Vec<Case> {
    let layout = || {
        let layout = Layout::new(3, 16, 10 << 16).needing(Need::Dirty);
        let layout = layout.with(|image| image.features(1, 1, 0));
        let layout = layout.data(0, 1).data(1, 2).data(4, 3);
        let built = layout.image.build();
        let hosts: Vec<u64> = built.data.values().map(|host| host >> 16).collect();
        layout.with(|image| hosts.iter().fold(image, |image, host| image.refcount(*host, 0)))
    };
    vec![
        case(
            "dirty-refcounts-anew",
            "in a dirty image refcounts are counted anew before a cluster is taken for free",
            section::HEADER,
            layout(),
            [write(2 << 16, 4 << 16, 20)],
        )
        .fact(Fact::DirtySettled),
        case(
            "dirty-zero",
            "also where clusters are given back",
            section::HEADER,
            layout(),
            [zero(0, 1 << 16), write(5 << 16, 3 << 16, 20)],
        )
        .fact(Fact::DirtySettled),
    ]
}

/// A bitmap that was not followed is no longer said to be up to date.
fn bitmaps() -> Vec<Case> {
    let at = 512;
    let layout = |flags| mixed(3, 16).with(|image| image.bitmap("nightly", flags, 16));
    let mut cases = Vec::new();
    for (name, proves, flags) in [
        ("bitmap-enabled", "an enabled bitmap marks a write, or is no longer believed", 2),
        ("bitmap-in-use", "a bitmap that was left in use stays so", 3),
    ] {
        let case = case(name, proves, section::BITMAPS, layout(flags), [write(at, 512, 20)]);
        // Whoever does not know bitmaps clears their bit, and cannot know that their clusters are free.
        cases.push(case.fact(Fact::BitmapTrue { at }).fact(Fact::MayLeak));
    }
    cases.push(
        case(
            "bitmap-disabled",
            "a disabled bitmap and its clusters are left alone",
            section::BITMAPS,
            layout(0),
            [write(at, 512, 20), write(8 << 16, 1 << 16, 21)],
        )
        .fact(Fact::MayLeak),
    );
    let missing = mixed(3, 16).needing(Need::DataFile).with(|image| image.features(1 << 2, 0, 0));
    let steps = [READ, Step::Read { at: 0, len: 512 }, Step::Close];
    let proves = "an external data file that is named nowhere is refused, or reads fail";
    cases.push(
        Case::new("header/data-file-unnamed", proves, section::DATA_FILE, missing, steps)
            .survives(&[])
            .fact(Fact::Unchanged),
    );
    cases
}
