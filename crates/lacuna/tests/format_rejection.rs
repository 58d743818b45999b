//! The rejection table: one row per field of header, extensions and tables that went wrong.
//!
//! Each row changes an image that qemu-img made, and demands the error text, that opening for
//! writing gives it too, that the file is left as it was, and that no row makes the process large.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use lacuna::qcow2::format::{
    BitmapEntry, BitmapsExtension, EntryWidth, Geometry, Header, Snapshot, SnapshotTableDecoder,
    SnapshotTableLocation, Version,
};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::storage::MemoryStorage;
use lacuna::units::HostOffset;
use lacuna::{Error, ErrorKind};
use pollster::block_on;

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

/// An image of a disk of 1 MiB, made with these words behind `create -f qcow2`.
fn golden(words: &[&str], then: &[&[&str]]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let all = [&["create", "-q", "-f", "qcow2"], words, &["image", "1M"]].concat();
    qemu_img(folder.path(), &all);
    for words in then {
        qemu_img(folder.path(), words);
    }
    std::fs::read(folder.path().join("image")).unwrap()
}

/// Bytes to change: offset and new content.
type Change = (usize, Vec<u8>);

fn be32(at: usize, value: u32) -> Change {
    (at, value.to_be_bytes().to_vec())
}

fn be64(at: usize, value: u64) -> Change {
    (at, value.to_be_bytes().to_vec())
}

fn changed(golden: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut bytes = golden.to_vec();
    for (at, content) in changes {
        bytes[*at..*at + content.len()].copy_from_slice(content);
    }
    bytes
}

/// What opening for writing says; the file must be as before.
fn refusal(bytes: &[u8], what: &str) -> Error {
    let storage = Arc::new(MemoryStorage::from(bytes));
    let parts = Parts { storage: Arc::clone(&storage), data: None, backing: None };
    let opened = block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite)));
    let Err(error) = opened else { panic!("{what}: opens") };
    assert!(storage.to_vec() == bytes, "{what}: the file was changed");
    error
}

struct Row {
    what: &'static str,
    changes: Vec<Change>,
    kind: ErrorKind,
    text: &'static str,
}

fn corrupt(what: &'static str, changes: &[Change], text: &'static str) -> Row {
    Row { what, changes: changes.to_vec(), kind: ErrorKind::Corrupt, text }
}

fn unsupported(what: &'static str, changes: &[Change], text: &'static str) -> Row {
    Row { what, changes: changes.to_vec(), kind: ErrorKind::Unsupported, text }
}

#[track_caller]
fn assert_rejected(golden: &[u8], rows: &[Row]) {
    Header::decode(golden).expect("the unchanged image decodes");
    for row in rows {
        let bytes = changed(golden, &row.changes);
        let Err(error) = Header::decode(&bytes) else { panic!("{}: decodes", row.what) };
        assert_eq!(error.kind(), row.kind, "{}: {error}", row.what);
        assert!(error.to_string().contains(row.text), "{}: says: {error}", row.what);
        let opened = refusal(&bytes, row.what);
        assert_eq!(opened.to_string(), error.to_string(), "{}", row.what);
    }
}

#[test]
fn header_fields_of_both_versions() {
    let rows = || {
        vec![
            corrupt("magic", &[(0, b"QFI\xfa".to_vec())], "Not a qcow2 image: starts with"),
            unsupported("version 1", &[be32(4, 1)], "version 1 of the format; 2 and 3 are"),
            unsupported("version 4", &[be32(4, 4)], "version 4 of the format"),
            corrupt(
                "backing name offset past the cluster",
                &[be64(8, 65537), be32(16, 1)],
                "Backing file name lies at 0x10001; between the header and the end",
            ),
            corrupt(
                "backing name offset in the header",
                &[be64(8, 8), be32(16, 1)],
                "Backing file name lies at 0x8; between the header",
            ),
            corrupt(
                "backing name offset is huge",
                &[be64(8, u64::MAX), be32(16, 1)],
                "Backing file name lies at 0xffffffffffffffff",
            ),
            corrupt(
                "backing name too long",
                &[be64(8, 0x1000), be32(16, 1024)],
                "Backing file name has 1024 bytes; at most 1023 are allowed",
            ),
            corrupt(
                "backing name past the cluster",
                &[be64(8, 65536 - 8), be32(16, 9)],
                "Backing file name has 9 bytes; at most 8 are allowed",
            ),
            corrupt("cluster bits 8", &[be32(20, 8)], "Cluster size is 2^8 bytes; 2^9 to 2^21"),
            corrupt("cluster bits 22", &[be32(20, 22)], "Cluster size is 2^22 bytes"),
            corrupt("cluster bits huge", &[be32(20, u32::MAX)], "Cluster size is 2^4294967295"),
            corrupt(
                "disk larger than the L1 table",
                &[be64(24, (512 << 20) + 1)],
                "Active L1 table has 1 entries; a disk of 536870913 bytes needs 2",
            ),
            corrupt(
                "disk of 2^64-1 bytes",
                &[be64(24, u64::MAX)],
                "a disk of 18446744073709551615 bytes needs",
            ),
            unsupported("encryption 3", &[be32(32, 3)], "Encryption method 3 is not known"),
            corrupt("L1 table too small", &[be32(36, 0)], "Active L1 table has 0 entries"),
            corrupt(
                "L1 table too large",
                &[be32(36, (4 << 20) + 1)],
                "Active L1 table has 33554440 bytes; at most 33554432 are allowed",
            ),
            corrupt("L1 table huge", &[be32(36, u32::MAX)], "Active L1 table has 34359738360"),
            corrupt(
                "L1 offset",
                &[be64(40, 0x30200)],
                "Active L1 table offset 0x30200 is not a multiple of the cluster size 0x10000",
            ),
            corrupt("L1 offset 0", &[be64(40, 0)], "Active L1 table offset is 0"),
            corrupt(
                "L1 offset past 2^63",
                &[be64(40, 1 << 63)],
                "Active L1 table offset 0x8000000000000000 is not",
            ),
            corrupt(
                "refcount table offset",
                &[be64(48, 0x10008)],
                "Refcount table offset 0x10008 is not a multiple",
            ),
            corrupt(
                "refcount table offset 0",
                &[be64(48, 0)],
                "Refcount table has 1 clusters at offset 0x0; at least 1 past the header",
            ),
            corrupt("no refcount table", &[be32(56, 0)], "Refcount table has 0 clusters"),
            corrupt(
                "refcount table too large",
                &[be32(56, 129)],
                "Refcount table has 8454144 bytes; at most 8388608 are allowed",
            ),
            corrupt("refcount table huge", &[be32(56, u32::MAX)], "Refcount table has 2814749"),
            corrupt(
                "too many snapshots",
                &[be32(60, 65537)],
                "Snapshot table has 65537 entries; at most 65536 are allowed",
            ),
            corrupt(
                "snapshot table offset",
                &[be64(64, 0x4_0100)],
                "Snapshot table offset 0x40100 is not a multiple",
            ),
        ]
    };
    assert_rejected(&golden(&["-o", "compat=1.1"], &[]), &rows());
    assert_rejected(&golden(&["-o", "compat=0.10"], &[]), &rows());
}

#[test]
fn header_fields_of_version_3() {
    let long = |bytes| format!("Header length is {bytes}; a multiple of 8 from 104 to");
    let texts: Vec<&'static str> =
        [71, 72, 96, 108, 65544].map(|bytes| &*long(bytes).leak()).into();
    let mut rows = vec![
        unsupported(
            "incompatible bit without a name",
            &[be64(72, 1 << 40)],
            "Image needs features that are not known here: incompatible bit 40",
        ),
        unsupported(
            "two incompatible bits, one with a name",
            // The last row of the feature name table becomes the name of bit 5.
            &[be64(72, 1 << 63 | 1 << 5), (120 + 7 * 48, b"\x00\x05shape\nshifting\0".to_vec())],
            "incompatible bit 5 (shape\\nshifting), incompatible bit 63",
        ),
        corrupt(
            "extended L2 entries in small clusters",
            &[be64(72, 16), be32(20, 13)],
            "Cluster size is 2^13 bytes; 2^14 to 2^21 are allowed",
        ),
        corrupt("refcount order", &[be32(96, 7)], "Refcount order is 7; 0 to 6 are allowed"),
        corrupt("refcount order huge", &[be32(96, u32::MAX)], "Refcount order is 4294967295"),
        corrupt(
            "compression without its bit",
            &[(104, vec![1])],
            "Compression type 1 with incompatible bit 3 clear; the bit must be set",
        ),
        corrupt(
            "compression bit without a type",
            &[be64(72, 8)],
            "Compression type 0 with incompatible bit 3 set",
        ),
        corrupt(
            "compression bit in a header without the field",
            &[be64(72, 8), be32(100, 104)],
            "Compression type 0 with incompatible bit 3 set",
        ),
        unsupported(
            "unknown compression",
            &[be64(72, 8), (104, vec![2])],
            "Compression type 2 is not known",
        ),
    ];
    for (text, bytes) in texts.iter().zip([71, 72, 96, 108, 65544]) {
        rows.push(corrupt("header length", &[be32(100, bytes)], text));
    }
    assert_rejected(&golden(&["-o", "compat=1.1"], &[]), &rows);
}

#[test]
fn header_extensions() {
    // The feature name table starts at 112: magic, length at 116, 384 bytes, end marker at 504.
    let name = |magic: u32, len: u32| vec![be32(504, magic), be32(508, len)];
    let twice = |magic: u32| {
        let second = [be32(520, magic), be32(524, 4)];
        [name(magic, 4), second.to_vec()].concat()
    };
    let rows = [
        corrupt(
            "longer than the cluster",
            &[be32(116, 65417)],
            "Header extension 0x6803f857 claims 65417 bytes; only 65416 are left",
        ),
        corrupt("huge", &[be32(116, u32::MAX)], "claims 4294967295 bytes"),
        corrupt(
            "unknown and longer than the cluster",
            &name(0x1234_5678, 65025),
            "Header extension 0x12345678 claims 65025 bytes; only 65024 are left",
        ),
        corrupt(
            "no room for an end marker",
            &[be64(8, 0x204), be32(16, 4), be32(504, 7), be32(508, 0)],
            "Header extensions end with 4 stray bytes",
        ),
        corrupt(
            "longer than the room before the backing name",
            &[be64(8, 0x400), be32(16, 4), be32(504, 7), be32(508, 513)],
            "Header extension 0x00000007 claims 513 bytes; only 512 are left",
        ),
        corrupt(
            "backing format too long",
            &name(0xe279_2aca, 16),
            "Name of the backing format has 16 bytes; at most 15 are allowed",
        ),
        corrupt("two backing formats", &twice(0xe279_2aca), "Header has two backing format"),
        corrupt("two data file names", &twice(0x4441_5441), "Header has two data file name"),
        corrupt(
            "encryption header without encryption",
            &name(0x0537_be77, 16),
            "Encryption header extension in an image that is not encrypted with LUKS",
        ),
        corrupt(
            "encryption header with AES",
            &[name(0x0537_be77, 16), vec![be32(32, 1)]].concat(),
            "not encrypted with LUKS",
        ),
        corrupt(
            "encryption header of another size",
            &[name(0x0537_be77, 24), vec![be32(32, 2)]].concat(),
            "Encryption header extension has 24 bytes; 16 would be right",
        ),
        corrupt(
            "encryption header offset",
            &[name(0x0537_be77, 16), vec![be32(32, 2), be64(512, 0x10001)]].concat(),
            "Encryption header offset 0x10001 is not a multiple",
        ),
        corrupt(
            "bitmaps of another size",
            &name(0x2385_2875, 32),
            "Bitmaps extension has 32 bytes; 24 would be right",
        ),
    ];
    assert_rejected(&golden(&["-o", "compat=1.1"], &[]), &rows);
}

#[test]
fn bitmaps_extension() {
    let with_bitmap = golden(&[], &[&["bitmap", "--add", "image", "b"]]);
    let at = (112..65536)
        .step_by(8)
        .find(|at| with_bitmap[*at..*at + 4] == 0x2385_2875_u32.to_be_bytes())
        .expect("qemu-img wrote a bitmaps extension")
        + 8;
    let rows = [
        corrupt("no bitmaps", &[be32(at, 0)], "claims 0 bitmaps; 1 to 65535 are allowed"),
        corrupt("too many bitmaps", &[be32(at, 65536)], "claims 65536 bitmaps"),
        corrupt("reserved", &[be32(at + 4, 1)], "Reserved field of the bitmaps extension is"),
        corrupt(
            "directory size",
            &[be64(at + 8, 1024 * 65535 + 1)],
            "Bitmap directory has 67107841 bytes; at most 67107840 are allowed",
        ),
        corrupt(
            "directory offset",
            &[be64(at + 16, 0x5_0001)],
            "Bitmap directory offset 0x50001 is not a multiple",
        ),
        corrupt("directory offset 0", &[be64(at + 16, 0)], "Bitmap directory offset 0x0 is not"),
        corrupt(
            "two of them",
            &[
                be32(at + 24, 0x2385_2875),
                be32(at + 28, 24),
                be32(at + 32, 1),
                be64(at + 48, 0x50000),
            ],
            "Header has two bitmaps extensions",
        ),
    ];
    assert_rejected(&with_bitmap, &rows);
    // Without its autoclear bit the extension is stale: nothing in it is believed or refused.
    let stale = [be64(88, 0), be32(at, 0), be32(at + 4, 1), be64(at + 16, 3)];
    let header = Header::decode(&changed(&with_bitmap, &stale)).unwrap();
    assert_eq!(header.valid_bitmaps(), None);
}

#[test]
fn snapshot_table() {
    let image = golden(&[], &[&["snapshot", "-c", "s", "image"]]);
    let header = Header::decode(&image).unwrap();
    let table = usize::try_from(header.snapshots.offset.0).unwrap();
    let rows = [
        ("L1 offset", be64(table, 0x200), "offset 0x200 is not a multiple"),
        ("L1 entries", be32(table + 8, (4 << 20) + 1), "33554440 bytes; at most 33554432"),
        ("extra data", be32(table + 36, 1025), "1025 bytes of extra data; at most 1024"),
        ("extra data huge", be32(table + 36, u32::MAX), "4294967295 bytes of extra data"),
    ];
    for (what, change, text) in rows {
        let error = refusal(&changed(&image, &[change]), what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert!(error.to_string().contains(text), "{what}: {error}");
    }
}

#[test]
fn snapshot_table_that_ends_early_or_never() {
    let entry = |name_bytes: u16| {
        let mut bytes = vec![0; 40];
        bytes[14..16].copy_from_slice(&name_bytes.to_be_bytes());
        bytes
    };
    for cut in [0, 39] {
        let error = Snapshot::decode_table(&entry(0)[..cut], 1).unwrap_err();
        assert_eq!(error.to_string(), "Snapshot table ends within entry 0 of 1");
    }
    let error = Snapshot::decode_table(&entry(1), 1).unwrap_err();
    assert_eq!(error.to_string(), "Snapshot table ends within entry 0 of 1");

    // 65536 entries with names of 64 KiB would be 4 GiB; the limit stops it at 64 MiB.
    let place = SnapshotTableLocation { offset: HostOffset(0x10000), count: 65536 };
    let mut decoder = SnapshotTableDecoder::new(place);
    let endless = [entry(65496), vec![b'n'; 65496]].concat();
    let error = loop {
        assert!(decoder.wanted().is_some() && decoder.table_bytes() <= 64 << 20);
        if let Err(error) = decoder.feed(&endless) {
            break error;
        }
    };
    let text = "Snapshot table has more than 67108864 bytes, which is the limit";
    assert_eq!(error.to_string(), text);
}

#[test]
fn bitmap_directory_and_its_entries() {
    let image = golden(&[], &[&["bitmap", "--add", "image", "name"]]);
    let header = Header::decode(&image).unwrap();
    let extension = header.valid_bitmaps().unwrap();
    let start = usize::try_from(extension.directory_offset.0).unwrap();
    let directory = &image[start..start + usize::try_from(extension.directory_bytes).unwrap()];

    let structure: [(&str, Change, &str); 3] = [
        ("name too long", (18, vec![0, 9]), "entry 0 reaches past the 32 bytes"),
        ("extra data huge", be32(20, u32::MAX), "entry 0 reaches past the 32 bytes"),
        ("name too short for the padding", (18, vec![0xff, 0xff]), "entry 0 reaches past"),
    ];
    for (what, change, text) in structure {
        let error = BitmapEntry::decode_directory(&changed(directory, &[change]), &extension);
        let error = error.unwrap_err();
        assert!(error.to_string().contains(text), "{what}: {error}");
    }
    let two = BitmapsExtension { count: 2, ..extension };
    let error = BitmapEntry::decode_directory(directory, &two).unwrap_err();
    assert_eq!(error.to_string(), "Bitmap directory has 1 entries; the header says 2");
    let error = BitmapEntry::decode_directory(&directory[..24], &extension).unwrap_err();
    assert_eq!(error.to_string(), "Bitmap directory ends after 24 of 32 bytes");

    let fields: [(&str, Change, &str); 12] = [
        ("table offset", be64(0, 0x10001), "Bitmap table offset 0x10001 is not a multiple"),
        ("table offset 0", be64(0, 0), "Bitmap table offset 0x0 is not a multiple"),
        ("table size 0", be32(8, 0), "Bitmap table has 0 entries; 1 to 134217728 are allowed"),
        ("table size", be32(8, u32::MAX), "Bitmap table has 4294967295 entries"),
        ("data size", be32(8, 8193), "Bitmap has 536936448 bytes; at most 536870912"),
        ("unknown flag", be32(12, 8), "Flags 0x8 are not known"),
        ("type", (16, vec![2]), "Type 2 is not known; 1 (dirty tracking) is"),
        ("granularity too fine", (17, vec![8]), "Granularity is 2^8 bytes; 2^9 to 2^31"),
        ("granularity too coarse", (17, vec![32]), "Granularity is 2^32 bytes"),
        ("granularity absurd", (17, vec![255]), "Granularity is 2^255 bytes"),
        ("no name", (18, vec![0, 0]), "Name has 0 bytes; 1 to 1023 are allowed"),
        ("extra data", (18, vec![0, 2, 0, 0, 0, 2]), "Its 2 bytes of extra data are not known"),
    ];
    for (what, change, text) in fields {
        let mut bytes = changed(directory, &[change]);
        let mut extension = extension;
        if what == "no name" {
            bytes.truncate(24);
            extension.directory_bytes = 24;
        }
        let entries = BitmapEntry::decode_directory(&bytes, &extension)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let error = entries[0].check(&header.geometry, header.size_bytes).unwrap_err();
        assert!(error.to_string().contains(text), "{what}: {error}");
    }
    let entry = &BitmapEntry::decode_directory(directory, &extension).unwrap()[0];
    let small = Geometry::new(Version::V3, 9, 4, EntryWidth::Standard).unwrap();
    let error = entry.check(&small, 512 << 20).unwrap_err().to_string();
    assert!(error.contains("512 bytes does not cover a disk of 536870912 bytes"), "{error}");
}

#[test]
fn encrypted_images_are_described_and_not_opened() {
    let secret = "secret,id=s,data=abc";
    let luks = golden(
        &[
            "--object",
            secret,
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ],
        &[],
    );
    let header = Header::decode(&luks).unwrap();
    assert_eq!(header.encryption(), Some(lacuna::qcow2::format::Encryption::Luks));
    let place = header.extensions.encryption_header.unwrap();
    assert_eq!(place.offset.0 % 65536, 0);
    assert!(place.len_bytes > 0);
    let mut encoded = header.encode().unwrap();
    encoded.resize(65536, 0);
    assert!(encoded == luks[..65536]);
    assert_eq!(refusal(&luks, "LUKS").kind(), ErrorKind::Unsupported);
    let aes = changed(&golden(&[], &[]), &[be32(32, 1)]);
    assert!(Header::decode(&aes).is_ok());
    assert_eq!(refusal(&aes, "AES").kind(), ErrorKind::Unsupported);
}

#[test]
fn short_files_are_no_images() {
    let image = golden(&[], &[]);
    for len in 0..104 {
        assert!(Header::decode(&image[..len]).is_err(), "{len} bytes");
        refusal(&image[..len], "short file");
    }
    // What is missing of the first cluster reads as zeros.
    assert!(Header::decode(&image[..512]).is_ok());
}

/// Largest resident size of this process so far, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn the_largest_claims_do_not_make_the_process_large() {
    let image = golden(&[], &[]);
    let claims = [
        vec![be32(60, 65536), be64(64, 0x1000_0000)],
        vec![be32(36, 4 << 20), be64(40, 1 << 40)],
        vec![be32(56, 128), be64(48, 1 << 50)],
        vec![be32(60, 65536), be64(64, 0x1_0000), be32(56, 128)],
    ];
    for changes in claims {
        let storage = MemoryStorage::from(&changed(&image, &changes)[..]);
        let parts = Parts { storage, data: None, backing: None };
        // Some of these are legal as far as the header goes; none may cost much.
        drop(block_on(Image::open(parts, OpenOptions::new(Access::ReadOnly))));
    }
    let peak = peak_kib();
    assert!(peak < 256 << 10, "{peak} KiB");
}
