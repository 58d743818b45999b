//! Images made by `create` are those of `qemu-img create`, byte by byte.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use lacuna::ErrorKind;
use lacuna::block::Preallocation;
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::format::{CompressionType, EntryWidth, Version};
use lacuna::qcow2::{BackingName, CreateOptions, DataFileName, create};
use lacuna::storage::{
    Capabilities, Capability, HostExtent, MemoryStorage, Storage, Transfer, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use pollster::block_on;

/// Runs qemu-img in `folder`; a missing tool is a failure.
fn qemu_img(folder: &Path, arguments: &[&str]) -> Output {
    Command::new("qemu-img")
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("qemu-img is missing: apt-get install qemu-utils")
}

/// The options as qemu-img spells them.
fn spelled(options: &CreateOptions) -> String {
    let compat = if options.version == Version::V2 { "0.10" } else { "1.1" };
    let mut text = format!("compat={compat},cluster_size={}", options.cluster_bytes);
    if options.version >= Version::V3 {
        let zstd = options.compression == CompressionType::Zstd;
        let extended = options.entry_width == EntryWidth::Extended;
        write!(
            text,
            ",refcount_bits={},lazy_refcounts={},compression_type={},extended_l2={}",
            options.refcount_bits,
            if options.lazy_refcounts { "on" } else { "off" },
            if zstd { "zstd" } else { "zlib" },
            if extended { "on" } else { "off" }
        )
        .unwrap();
    }
    if let Some(backing) = &options.backing {
        write!(text, ",backing_file={}", backing.name).unwrap();
        if let Some(format) = &backing.format {
            write!(text, ",backing_fmt={format}").unwrap();
        }
    }
    if let Some(data) = &options.data_file {
        let raw = if data.raw { "on" } else { "off" };
        write!(text, ",data_file={},data_file_raw={raw}", data.name).unwrap();
    }
    if options.preallocation != Preallocation::Off {
        write!(text, ",preallocation={:?}", options.preallocation).unwrap();
    }
    text.replace("=Metadata", "=metadata").replace("=Falloc", "=falloc").replace("=Full", "=full")
}

/// The image that qemu-img makes, or its complaint.
fn made_by_qemu(options: &CreateOptions) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().unwrap();
    let size = options.size_bytes.to_string();
    let arguments = ["create", "-q", "-u", "-f", "qcow2", "-o", &spelled(options), "image", &size];
    let output = qemu_img(folder.path(), &arguments);
    if output.status.success() {
        Ok(std::fs::read(folder.path().join("image")).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn made_here(options: &CreateOptions) -> lacuna::Result<Vec<u8>> {
    let storage = MemoryStorage::new();
    block_on(create(&storage, options))?;
    Ok(storage.to_vec())
}

/// Compares the images, or that both refuse.
#[track_caller]
fn assert_same(options: &CreateOptions) {
    let what = format!("{} bytes, {}", options.size_bytes, spelled(options));
    match (made_by_qemu(options), made_here(options)) {
        (Err(_), Err(_)) => {}
        (Ok(theirs), Ok(ours)) => {
            assert_eq!(theirs.len(), ours.len(), "length of the file: {what}");
            let first = theirs.iter().zip(&ours).position(|(theirs, ours)| theirs != ours);
            assert_eq!(first, None, "offset of the first difference: {what}");
        }
        (Err(theirs), Ok(_)) => panic!("only qemu-img refuses {what}: {theirs}"),
        (Ok(_), Err(ours)) => panic!("only lacuna refuses {what}: {ours}"),
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

fn options(size_bytes: u64, cluster_bytes: u64) -> CreateOptions {
    CreateOptions { size_bytes, cluster_bytes, ..CreateOptions::default() }
}

#[test]
fn every_cluster_size_and_many_disk_sizes() {
    for bits in 9..=21 {
        for size in [0, 1, 512, 1000, 64 * KIB, MIB + 512, 100 * MIB, 3 * GIB, 40 * GIB] {
            assert_same(&options(size, 1 << bits));
        }
    }
    for bits in 12..=21 {
        assert_same(&options(8 * TIB, 1 << bits));
    }
}

#[test]
fn every_refcount_width() {
    for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
        for cluster_bytes in [512, 4096, 65536] {
            for size_bytes in [0, MIB, 10 * GIB] {
                assert_same(&CreateOptions { refcount_bits, ..options(size_bytes, cluster_bytes) });
            }
        }
    }
}

#[test]
fn l1_tables_that_need_many_refcount_blocks_or_a_larger_refcount_table() {
    // Around the size whose L1 table fills what the first refcount block counts.
    for size_mib in [490, 506, 508, 1100] {
        assert_same(&options(size_mib * MIB, 512));
        assert_same(&CreateOptions { refcount_bits: 64, ..options(size_mib * MIB, 512) });
    }
    // Around the size whose L1 table fills what the first refcount table counts.
    for size_mib in [32_000, 32_256, 32_760] {
        assert_same(&options(size_mib * MIB, 512));
    }
    for (size_gib, cluster_bytes, refcount_bits) in
        [(8, 512, 64), (9, 512, 64), (64, 512, 16), (128, 512, 1), (40, 1024, 64)]
    {
        let options = options(size_gib * GIB, cluster_bytes);
        assert_same(&CreateOptions { refcount_bits, ..options });
    }
}

#[test]
fn every_combination_of_features() {
    let backings = [
        None,
        Some(BackingName { name: "base".into(), format: Some("raw".into()) }),
        Some(BackingName {
            name: "sub/a longer name of a base".into(),
            format: Some("qcow2".into()),
        }),
    ];
    let widths = [EntryWidth::Standard, EntryWidth::Extended];
    let compressions = [CompressionType::Deflate, CompressionType::Zstd];
    for version in [Version::V2, Version::V3] {
        for cluster_bytes in [512, 4096, 16384, 65536, 2 * MIB] {
            for (entry_width, compression) in
                widths.into_iter().flat_map(|width| compressions.map(|kind| (width, kind)))
            {
                for backing in &backings {
                    let options = CreateOptions {
                        version,
                        entry_width,
                        compression,
                        lazy_refcounts: version == Version::V3,
                        backing: backing.clone(),
                        ..options(5 * MIB, cluster_bytes)
                    };
                    if version == Version::V2
                        && (compression == CompressionType::Zstd
                            || entry_width == EntryWidth::Extended)
                    {
                        // Not spelled out for qemu-img; see the test of refusals.
                        assert!(made_here(&options).is_err());
                    } else {
                        assert_same(&options);
                    }
                }
            }
        }
    }
}

#[test]
fn names_as_long_as_fit() {
    for (cluster_bytes, len) in [
        (512, 300),
        (512, 376),
        (512, 377),
        (1024, 888),
        (2048, 1023),
        (65536, 1023),
        (65536, 1024),
    ] {
        let backing = Some(BackingName { name: "b".repeat(len), format: Some("raw".into()) });
        assert_same(&CreateOptions { backing, ..options(MIB, cluster_bytes) });
    }
}

#[test]
fn external_data_files() {
    let data = |raw| Some(DataFileName { name: "data".into(), raw });
    for cluster_bytes in [512, 4096, 65536, 2 * MIB] {
        for size_bytes in [0, 512, 1000 * KIB, 9 * MIB] {
            for raw in [false, true] {
                assert_same(&CreateOptions {
                    data_file: data(raw),
                    ..options(size_bytes, cluster_bytes)
                });
            }
        }
    }
    assert_same(&CreateOptions {
        data_file: data(true),
        entry_width: EntryWidth::Extended,
        ..options(100 * MIB, 16384)
    });
    // The refcount table moves while L2 tables are placed, and they fill its old place.
    assert_same(&CreateOptions {
        data_file: data(true),
        refcount_bits: 64,
        ..options(140 * MIB, 512)
    });
}

const MODES: [Preallocation; 3] =
    [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];

#[test]
fn preallocated_images_of_every_cluster_size() {
    for bits in 9..=21 {
        for size in [0, (1 << bits) + 512, 4 * MIB] {
            for preallocation in MODES {
                let extended = bits >= 14 && size % 1024 == 512;
                let entry_width =
                    if extended { EntryWidth::Extended } else { EntryWidth::Standard };
                let options = options(size, 1 << bits);
                assert_same(&CreateOptions { preallocation, entry_width, ..options });
            }
        }
    }
}

#[test]
fn preallocated_images_whose_refcounts_need_blocks_and_tables_of_their_own() {
    for refcount_bits in [1, 16, 64] {
        for size in [MIB + 512, 21 * MIB] {
            for preallocation in MODES {
                let options = options(size, 512);
                assert_same(&CreateOptions { preallocation, refcount_bits, ..options });
            }
        }
    }
    // More than one request of QEMU: 2 GiB, mapped only.
    let preallocation = Preallocation::Metadata;
    assert_same(&CreateOptions { preallocation, ..options(40 * MIB, 4096) });
    assert_same(&CreateOptions { preallocation, refcount_bits: 64, ..options(90 * MIB, 1024) });
}

#[test]
fn preallocation_of_random_images() {
    for seed in testkit::seeds(20) {
        println!("seed {seed}");
        let mut random = testkit::Random::new(seed);
        let cluster_bytes = 512 << random.below(9);
        let version = if random.one_in(4) { Version::V2 } else { Version::V3 };
        let extended = version == Version::V3 && cluster_bytes >= 16384 && random.one_in(2);
        let entry_width = if extended { EntryWidth::Extended } else { EntryWidth::Standard };
        let bits = if version == Version::V2 { 16 } else { 1 << random.below(7) };
        let size = random.below(12 * MIB.min(cluster_bytes * 4096));
        let data = version == Version::V3 && random.one_in(5);
        assert_same(&CreateOptions {
            version,
            entry_width,
            refcount_bits: bits,
            data_file: data.then(|| DataFileName { name: "data".into(), raw: random.one_in(2) }),
            preallocation: *random.pick(&MODES),
            ..options(size, cluster_bytes)
        });
    }
}

#[test]
fn preallocation_over_a_backing_file_needs_extended_entries() {
    let backing = Some(BackingName { name: "base".into(), format: Some("raw".into()) });
    for preallocation in MODES {
        let options =
            CreateOptions { preallocation, backing: backing.clone(), ..options(MIB, 65536) };
        assert_same(&options);
        assert_same(&CreateOptions { entry_width: EntryWidth::Extended, ..options });
    }
}

#[test]
fn excluded_wishes_are_refused_before_anything_is_written() {
    let base = || options(MIB, 65536);
    let raw = Some(DataFileName { name: "d".into(), raw: true });
    let backing = Some(BackingName { name: "b".into(), format: None });
    let old = || CreateOptions { version: Version::V2, ..base() };
    let rows = [
        (options(MIB, 256), "Cluster size is 256 bytes"),
        (options(MIB, 4 * MIB), "Cluster size is 4194304 bytes"),
        (options(MIB, 65535), "Cluster size is 65535 bytes"),
        (options(MIB, 0), "Cluster size is 0 bytes"),
        (
            CreateOptions { entry_width: EntryWidth::Extended, ..options(MIB, 8192) },
            "a power of two from 16384 to 2 MiB",
        ),
        (CreateOptions { refcount_bits: 0, ..base() }, "Refcount width is 0 bits"),
        (CreateOptions { refcount_bits: 24, ..base() }, "Refcount width is 24 bits"),
        (CreateOptions { refcount_bits: 128, ..base() }, "Refcount width is 128 bits"),
        (CreateOptions { refcount_bits: 8, ..old() }, "cannot have refcounts of another width"),
        (CreateOptions { entry_width: EntryWidth::Extended, ..old() }, "cannot have extended L2"),
        (CreateOptions { compression: CompressionType::Zstd, ..old() }, "cannot have zstd"),
        (CreateOptions { lazy_refcounts: true, ..old() }, "cannot have lazy refcounts"),
        (CreateOptions { data_file: raw.clone(), ..old() }, "cannot have an external data file"),
        (CreateOptions { data_file: raw, backing, ..base() }, "exclude each other"),
        (options(u64::MAX, 65536), "is too large; clusters of 65536 bytes allow"),
        (options(u64::MAX, 2 * MIB), "is too large; clusters of 2097152 bytes allow"),
        (options(128 * GIB + 512, 512), "allow 137438953472, larger ones more"),
        (
            CreateOptions {
                backing: Some(BackingName { name: String::new(), format: None }),
                ..base()
            },
            "Backing file name has 0 bytes",
        ),
        (
            CreateOptions {
                backing: Some(BackingName { name: "b".into(), format: Some("f".repeat(16)) }),
                ..base()
            },
            "Name of the backing format has 16 bytes",
        ),
    ];
    for (options, text) in rows {
        let storage = MemoryStorage::new();
        let error = block_on(create(&storage, &options)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{error}");
        assert!(error.to_string().contains(text), "{error}: {text}");
        assert_eq!(block_on(storage.len()).unwrap(), 0, "{error}");
    }
}

#[test]
fn what_was_in_the_storage_before_is_gone() {
    let storage = MemoryStorage::from(&vec![0xff; 1 << 20][..]);
    block_on(create(&storage, &options(MIB, 65536))).unwrap();
    assert!(storage.to_vec() == made_by_qemu(&options(MIB, 65536)).unwrap());
}

/// Memory of a fixed length, as a block device is.
struct Device(MemoryStorage);

impl Storage for Device {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.0.read_at(offset, buffer).await
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.0.write_at(offset, buffer).await
    }

    async fn write_zeroes_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> lacuna::Result<()> {
        self.0.write_zeroes_at(range, mode, hold).await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> lacuna::Result<()> {
        self.0.punch_hole_at(range, hold).await
    }

    async fn allocate_at(&self, range: HostRange) -> lacuna::Result<()> {
        self.0.allocate_at(range).await
    }

    async fn flush(&self) -> lacuna::Result<()> {
        self.0.flush().await
    }

    async fn len(&self) -> lacuna::Result<u64> {
        self.0.len().await
    }

    async fn set_len(&self, _: u64, _: Hold) -> lacuna::Result<()> {
        Err(lacuna::Error::unsupported("A device has one length"))
    }

    async fn status_at(&self, range: HostRange) -> lacuna::Result<HostExtent> {
        self.0.status_at(range).await
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { set_len: Capability::Unsupported, ..self.0.capabilities() }
    }
}

#[test]
fn on_a_device_the_image_is_the_same_and_the_rest_is_left_alone() {
    let device = Device(MemoryStorage::from(&vec![0xff; 1 << 20][..]));
    block_on(create(&device, &options(MIB, 65536))).unwrap();
    let bytes = device.0.to_vec();
    let mut expected = made_by_qemu(&options(MIB, 65536)).unwrap();
    // The L1 table's cluster is zeroed to its end: what was there must not look like entries.
    expected.resize(4 << 16, 0);
    assert!(bytes[..4 << 16] == expected);
    assert!(bytes[4 << 16..].iter().all(|byte| *byte == 0xff));
}
