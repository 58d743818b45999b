//! Headers made by qemu-img decode to what was asked for and encode to the same bytes.

use std::path::Path;
use std::process::Command;

use lacuna::qcow2::format::{
    AutoclearFeatures, BitmapsExtension, CompatibleFeatures, CompressionType, Encryption,
    EncryptionHeader, EntryWidth, Extensions, FeatureName, FeatureWord, Features, Geometry, Header,
    IncompatibleFeatures, L1Location, RefcountTableLocation, SnapshotTableLocation, StoredName,
    UnknownExtension, Version, ZeroClusterHint,
};
use lacuna::units::{GuestCluster, HostOffset};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// Runs qemu-img in `folder`; a missing tool is a failure.
fn qemu_img(folder: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("qemu-img is missing: apt-get install qemu-utils");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {errors}");
}

/// The first cluster of an image that qemu-img makes with these options.
fn first_cluster(options: &str, size: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), &["create", "-q", "-f", "raw", "base.raw", "64k"]);
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "-o", options, "image", size]);
    let mut bytes = std::fs::read(folder.path().join("image")).unwrap();
    bytes.truncate(usize::try_from(Header::peek_cluster_bytes(&bytes).unwrap()).unwrap());
    bytes
}

#[test]
fn qemu_headers_survive_decoding_and_encoding_byte_by_byte() {
    let all = [
        "compat=1.1",
        "compat=0.10",
        "compat=0.10,backing_file=base.raw,backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw",
        "cluster_size=512",
        "cluster_size=512,backing_file=base.raw,backing_fmt=raw",
        "cluster_size=4096,backing_file=base.raw,backing_fmt=raw",
        "cluster_size=8192,backing_file=base.raw,backing_fmt=raw",
        "cluster_size=2M",
        "extended_l2=on,lazy_refcounts=on,compression_type=zstd,refcount_bits=1",
        "data_file=data.raw,data_file_raw=on",
        "data_file=data.raw,cluster_size=16384",
    ];
    for options in all {
        let cluster = first_cluster(options, "1M");
        let header = Header::decode(&cluster).unwrap_or_else(|error| panic!("{options}: {error}"));
        let mut encoded = header.encode().unwrap();
        encoded.resize(cluster.len(), 0);
        assert!(encoded == cluster, "{options}: encoding differs");
    }
}

#[test]
fn options_of_creation_show_in_the_decoded_header() {
    let options = "extended_l2=on,lazy_refcounts=on,compression_type=zstd,refcount_bits=1";
    let header = Header::decode(&first_cluster(options, "3M")).unwrap();
    assert_eq!(header.size_bytes, 3 << 20);
    assert_eq!(header.geometry.version(), Version::V3);
    assert_eq!(header.geometry.entry_width(), EntryWidth::Extended);
    assert_eq!(header.geometry.refcount_bits(), 1);
    assert_eq!(header.compression, CompressionType::Zstd);
    assert_eq!(header.features.compatible, CompatibleFeatures::LAZY_REFCOUNTS);

    let header = Header::decode(&first_cluster("data_file=d,data_file_raw=on", "1M")).unwrap();
    assert_eq!(header.features.incompatible, IncompatibleFeatures::EXTERNAL_DATA_FILE);
    assert_eq!(header.features.autoclear, AutoclearFeatures::RAW_EXTERNAL_DATA);
    assert_eq!(header.extensions.data_file_name.unwrap().as_str(), Some("d"));

    let options = "compat=0.10,backing_file=base.raw,backing_fmt=raw";
    let header = Header::decode(&first_cluster(options, "1M")).unwrap();
    assert_eq!(header.geometry.version(), Version::V2);
    assert_eq!(header.backing_name.unwrap().as_bytes(), b"base.raw");
    assert_eq!(header.extensions.backing_format.unwrap().as_bytes(), b"raw");
}

#[test]
fn unknown_fields_extensions_and_bits_survive() {
    let mut header = Header::decode(&first_cluster("compat=1.1", "1M")).unwrap();
    header.unknown_fields = vec![7; 16];
    header.features.autoclear |= AutoclearFeatures::from_bits_retain(1 << 40);
    header.features.compatible |= CompatibleFeatures::from_bits_retain(1 << 63);
    header.extensions.unknown = vec![
        UnknownExtension { magic: 0x1111_1111, data: vec![1, 2, 3] },
        UnknownExtension { magic: 0x2222_2222, data: vec![] },
    ];
    let again = Header::decode(&header.encode().unwrap()).unwrap();
    assert_eq!(again, header);
}

#[test]
fn updates_of_single_fields_are_the_bytes_of_the_whole_header() {
    let before = Header::decode(&first_cluster("lazy_refcounts=on", "1M")).unwrap();
    let mut after = before.clone();
    after.size_bytes = 3 << 29;
    after.l1 = L1Location { offset: HostOffset(0x123_0000), entries: 77 };
    after.refcount_table = RefcountTableLocation { offset: HostOffset(0x456_0000), clusters: 9 };
    after.snapshots = SnapshotTableLocation { offset: HostOffset(0x789_0000), count: 5 };
    after.features.incompatible |= IncompatibleFeatures::DIRTY;
    after.features.autoclear |= AutoclearFeatures::from_bits_retain(4);
    let mut bytes = before.encode().unwrap();
    let mut patch = |(at, part): (HostOffset, &[u8])| {
        let at = usize::try_from(at.0).unwrap();
        bytes[at..at + part.len()].copy_from_slice(part);
    };
    let (at, part) = Header::size_update(after.size_bytes);
    patch((at, &part));
    for (at, part) in [
        after.l1.header_update(),
        after.refcount_table.header_update(),
        after.snapshots.header_update(),
    ] {
        patch((at, &part));
    }
    let (at, part) = after.features.header_update();
    patch((at, &part));
    assert!(bytes == after.encode().unwrap());
}

fn names(max: usize) -> impl Strategy<Value = StoredName> {
    vec(any::<u8>(), 1..max).prop_map(StoredName::new)
}

prop_compose! {
    fn geometries()(v2: bool, bits in 12_u32..=21, order in 0_u32..=6, extended: bool) -> Geometry {
        let (width, bits) = match extended && !v2 {
            true => (EntryWidth::Extended, bits.max(14)),
            false => (EntryWidth::Standard, bits),
        };
        let (version, order) = if v2 { (Version::V2, 4) } else { (Version::V3, order) };
        Geometry::new(version, bits, order, width).unwrap()
    }
}

prop_compose! {
    fn features()(incompatible in 0_u64..8, compatible: u64, autoclear: u64) -> Features {
        Features {
            incompatible: IncompatibleFeatures::from_bits_retain(incompatible),
            compatible: CompatibleFeatures::from_bits_retain(compatible),
            autoclear: AutoclearFeatures::from_bits_retain(autoclear),
        }
    }
}

prop_compose! {
    fn unknown_extensions()(
        magics in vec(1_u32..0x2000_0000, 0..3),
        data in vec(any::<u8>(), 0..20),
    ) -> Vec<UnknownExtension> {
        let unknown = magics.into_iter().filter(|magic| ![0x2385_2875, 0x0537_be77].contains(magic));
        unknown.map(|magic| UnknownExtension { magic, data: data.clone() }).collect()
    }
}

prop_compose! {
    fn headers()(
        geometry in geometries(),
        features in features(),
        (size_clusters, l1_extra, clusters) in (0_u64..1000, 1_u32..9, 1_u32..4),
        (backing_name, backing_format) in (option::of(names(1023)), option::of(names(15))),
        (data_file_name, luks, zstd) in (option::of(names(40)), any::<bool>(), any::<bool>()),
        bitmaps in option::of((1_u32..65536, 0_u64..1000, 1_u64..1000)),
        (snapshots, unknown_fields) in (0_u32..=65536, vec(any::<u8>(), 0..5)),
        (unknown, private_bit, hint) in
            (unknown_extensions(), option::of(2_u8..64), option::of(any::<u64>())),
    ) -> Header {
        let v3 = geometry.version() == Version::V3;
        let cluster = geometry.cluster_bytes();
        let mut header = Header::new(geometry, size_clusters * cluster + 512);
        header.l1.offset = HostOffset(3 * cluster);
        header.l1.entries =
            u32::try_from(geometry.l1_entries_for(header.size_bytes)).unwrap() + l1_extra;
        header.refcount_table = RefcountTableLocation { offset: HostOffset(cluster), clusters };
        header.snapshots =
            SnapshotTableLocation { offset: HostOffset(9 * cluster), count: snapshots };
        header.backing_name = backing_name;
        if v3 {
            header.features = features;
            header.features.incompatible.set(
                IncompatibleFeatures::EXTENDED_L2,
                geometry.has_subclusters(),
            );
            header.features.incompatible.set(IncompatibleFeatures::COMPRESSION_TYPE, zstd);
            header.compression =
                if zstd { CompressionType::Zstd } else { CompressionType::Deflate };
            header.unknown_fields = unknown_fields.iter().flat_map(|byte| [*byte; 8]).collect();
        }
        let encryption_header =
            luks.then_some(EncryptionHeader { offset: HostOffset(cluster), len_bytes: 5 });
        header.encryption = luks.then_some(Encryption::Luks);
        header.extensions = Extensions {
            backing_format,
            data_file_name,
            encryption_header,
            feature_names: private_bit
                .map(|bit| FeatureName {
                    word: FeatureWord::AUTOCLEAR, bit, name: "private".into(),
                })
                .into_iter()
                .collect(),
            bitmaps: bitmaps.map(|(count, directory_bytes, at)| BitmapsExtension {
                count,
                directory_bytes,
                directory_offset: HostOffset(at * cluster),
            }),
            zero_cluster: hint.map(|cluster| ZeroClusterHint { cluster: GuestCluster(cluster) }),
            unknown,
        };
        header
    }
}

proptest! {
    #[test]
    fn headers_survive_encoding(header in headers()) {
        let bytes = header.encode().unwrap();
        let mut again = Header::decode(&bytes).unwrap();
        // The table says more than was asked for, or is left out as a whole.
        let names = std::mem::take(&mut again.extensions.feature_names);
        if !names.is_empty() {
            // Small clusters have room for ours only.
            let usual = names.len().checked_sub(header.extensions.feature_names.len());
            prop_assert!(matches!(usual, Some(0 | 8)), "{usual:?} names of QEMU's");
            prop_assert!(names.ends_with(&header.extensions.feature_names));
        }
        again.extensions.feature_names.clone_from(&header.extensions.feature_names);
        prop_assert_eq!(&again, &header);
        prop_assert_eq!(again.encode().unwrap(), bytes);
    }
}
