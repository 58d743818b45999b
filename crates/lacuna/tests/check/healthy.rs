//! Images without damage: every count is QEMU's.

use lacuna::qcow2::check::Repair;

use crate::images::{Image, assert_same};

/// Options of `create`, size, what is done to it.
const KINDS: &[(&str, &str, &[&str])] = &[
    ("", "1M", &[]),
    ("", "0", &[]),
    ("", "100M", &["write 0 1M", "write 50M 3M"]),
    ("compat=0.10", "64M", &["write 1M 5M"]),
    ("cluster_size=512", "1M", &["write 0 512K", "write 700K 3K"]),
    ("cluster_size=2M", "100M", &["write 3M 11M"]),
    ("refcount_bits=1", "64M", &["write 1M 5M"]),
    ("refcount_bits=2", "64M", &["write 1M 5M", "!snapshot -c s @", "write 2M 1M"]),
    ("refcount_bits=4", "64M", &["write 1M 5M", "!snapshot -c s @", "write 2M 1M"]),
    ("refcount_bits=8", "64M", &["write 1M 5M", "!snapshot -c s @", "write 2M 1M"]),
    ("refcount_bits=32", "64M", &["write 1M 5M", "!snapshot -c s @", "write 2M 1M"]),
    ("refcount_bits=64", "64M", &["write 1M 5M", "!snapshot -c s @", "write 2M 1M"]),
    ("refcount_bits=64,cluster_size=512", "8M", &["write 1M 5M"]),
    ("lazy_refcounts=on", "64M", &["write 1M 5M"]),
    ("extended_l2=on,cluster_size=16K", "64M", &["write 1M 5M", "write -z 2M 33K"]),
    ("extended_l2=on", "1G", &["write 1000M 5M", "write 3K 1K", "discard 1001M 1M"]),
    ("data_file", "64M", &["write 1M 5M", "write -z 0 64K"]),
    ("data_file,data_file_raw=on", "64M", &["write 1M 5M"]),
    ("preallocation=metadata", "64M", &["write 1M 5M", "write -z -u 2M 1M"]),
    ("", "64M", &["write 0 8M", "write -z 1M 1M", "discard 2M 1M", "write -z -u 3M 1M"]),
    ("", "64M", &["write -c -P 3 0 8M", "write 3M 128K", "write -c -P 5 20M 3M"]),
    ("compression_type=zstd", "64M", &["write -c -P 3 0 8M", "write 3M 128K"]),
    (
        "",
        "64M",
        &[
            "write 0 8M",
            "!snapshot -c one @",
            "write 1M 1M",
            "!snapshot -c two @",
            "write 30M 2M",
            "!snapshot -c three @",
        ],
    ),
    ("compat=0.10", "64M", &["write 0 8M", "!snapshot -c one @", "write 1M 1M"]),
    (
        "extended_l2=on",
        "64M",
        &["write 0 8M", "!snapshot -c one @", "write 1M 3K", "!snapshot -d one @"],
    ),
    ("", "64M", &["write 0 8M", "!bitmap --add @ one", "!bitmap --add -g 512 @ two"]),
    (
        "cluster_size=4K",
        "64M",
        &["write 0 8M", "!bitmap --add -g 512 @ one", "write 3M 10M", "!snapshot -c s @"],
    ),
    ("", "1T", &["write 0 1M", "write 900G 1M", "write 500G 64K"]),
];

#[test]
fn counts_of_healthy_images_are_those_of_qemu() {
    for (options, size, commands) in KINDS {
        let name = format!("{options} {size} {commands:?}");
        let image = Image::new(options, size, commands);
        let (ours, theirs) = (image.check(Repair::None), image.qemu_check());
        assert_same(&name, &ours, &theirs);
        assert!(ours.is_clean(), "{name}: {:?}", ours.findings);
        assert_eq!(theirs.status, 0, "{name}");
    }
}

#[test]
fn repair_of_a_healthy_image_writes_nothing() {
    for (options, size, commands) in KINDS {
        let image = Image::new(options, size, commands);
        let before = image.bytes();
        let report = image.check(Repair::All);
        assert!(report.is_clean());
        assert!(before == image.bytes(), "{options} {commands:?} was changed");
    }
}
