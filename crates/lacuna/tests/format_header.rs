//! Headers made by qemu-img decode to what was asked for and encode to the same bytes.

use std::path::Path;
use std::process::Command;

use lacuna::qcow2::format::{
    AutoclearFeatures, CompatibleFeatures, CompressionType, EntryWidth, Header,
    IncompatibleFeatures, UnknownExtension, Version,
};

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
