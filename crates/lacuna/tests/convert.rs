//! Conversions held against `qemu-img`: the same bytes, and the same files byte for byte where the
//! layout is QEMU's.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lacuna::block::Layer;
use lacuna::chain::{self, Allow, Chain, ChainOptions, FileOpener, Format};
use lacuna::job::{
    self, CompareOptions, ConvertOptions, Copied, Encoding, Target, TargetContent, Threads,
    WriteOrder,
};
use lacuna::qcow2::format::{CompressionType, EntryWidth, Version};
use lacuna::qcow2::{Access, BackingName, CreateOptions, OpenOptions, Placement, create};
use lacuna::raw::Raw;
use lacuna::storage::{FileOptions, FileStorage};
use pollster::block_on;
use tempfile::TempDir;
use testkit::foreign::{E2FSCK, MKE2FS, QEMU_IMG, QEMU_IO, assert_same_guest, qemu_img_check};

const MIB: u64 = 1 << 20;

/// A scratch directory.
struct Scratch(TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn qemu_img<A: AsRef<OsStr>>(words: &[A]) {
    QEMU_IMG.succeed(words.iter().map(AsRef::as_ref));
}

fn qemu_io(format: &str, path: &Path, commands: &[&str]) {
    let mut words: Vec<&OsStr> = vec!["-f".as_ref(), format.as_ref()];
    for command in commands {
        words.extend([OsStr::new("-c"), command.as_ref()]);
    }
    words.push(path.as_os_str());
    QEMU_IO.succeed(words);
}

fn options(format: Format, access: Access) -> ChainOptions {
    ChainOptions {
        backing: Allow::Named,
        image: OpenOptions::new(access).placement(Placement::QemuCompatible),
        ..ChainOptions::new(format, access)
    }
}

fn open(path: &Path, format: Format, access: Access) -> Chain<FileStorage> {
    block_on(chain::open(&FileOpener::default(), path, &options(format, access))).unwrap()
}

fn new_image(path: &Path, created: &CreateOptions) -> Chain<FileStorage> {
    let storage = FileStorage::open(path, &FileOptions::replace()).unwrap();
    block_on(create(&storage, created)).unwrap();
    drop(storage);
    open(path, Format::Qcow2, Access::ReadWrite)
}

fn fresh() -> ConvertOptions {
    ConvertOptions { content: TargetContent::Zero, ..Default::default() }
}

fn compressed() -> ConvertOptions {
    ConvertOptions { encoding: Encoding::Compressed, ..fresh() }
}

fn copy(source: &impl Layer, target: &impl Target, options: &ConvertOptions) -> Copied {
    block_on(job::convert(source, target, options, &mut |_| ())).unwrap()
}

/// Converts into a new qcow2 image and closes it.
fn to_qcow2(
    source: &Chain<FileStorage>,
    path: &Path,
    created: CreateOptions,
    options: &ConvertOptions,
) -> Copied {
    let size_bytes = source.disk().size_bytes();
    let target = new_image(path, &CreateOptions { size_bytes, ..created });
    let copied = copy(source.disk(), target.disk(), options);
    block_on(target.into_disk().close()).unwrap();
    copied
}

/// Converts into a new raw file.
fn to_raw(source: &Chain<FileStorage>, path: &Path) -> Copied {
    let storage = FileStorage::open(path, &FileOptions::replace()).unwrap();
    let target = block_on(Raw::create(storage, source.disk().size_bytes())).unwrap();
    copy(source.disk(), &target, &fresh())
}

fn assert_clean(path: &Path) {
    let check = qemu_img_check(path);
    assert!(check.is_clean(), "{}", check.text);
}

fn assert_same_file(ours: &Path, theirs: &Path, what: &str) {
    let (ours, theirs) = (std::fs::read(ours).unwrap(), std::fs::read(theirs).unwrap());
    let differs = ours.iter().zip(&theirs).position(|(left, right)| left != right);
    assert_eq!(differs, None, "{what}: first difference");
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
}

/// Data that compresses, data that does not, zeros of every size in between, and bytes that
/// straddle clusters and requests.
fn raw_disk(path: &Path, size: u64) {
    let mut bytes = vec![0; size as usize];
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    for (index, sector) in bytes.chunks_mut(512).enumerate() {
        let kind = index / 61 % 7 + index / 4099 % 3;
        for byte in sector.iter_mut() {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            *byte = match kind {
                0 | 5 => noise as u8,
                1 => b'a' + (noise % 4) as u8,
                2 if noise.is_multiple_of(1000) => 1,
                3 => index as u8,
                _ => 0,
            };
        }
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_plain_conversion_makes_the_file_that_qemu_img_makes() {
    let scratch = Scratch::new();
    let (source, ours, theirs) =
        (scratch.path("source"), scratch.path("ours"), scratch.path("theirs"));
    let sizes = [(512, 10 * MIB), (4096, 10 * MIB), (65536, 14 * MIB), (2 << 20, 14 * MIB)];
    for (cluster_bytes, size) in sizes {
        raw_disk(&source, size + 1536);
        let opened = open(&source, Format::Raw, Access::ReadOnly);
        for (version, compat) in [(Version::V2, "0.10"), (Version::V3, "1.1")] {
            let layout = format!("compat={compat},cluster_size={cluster_bytes}");
            let words = ["convert", "-f", "raw", "-O", "qcow2", "-o", &layout].map(OsStr::new);
            qemu_img(&[&words[..], &[source.as_os_str(), theirs.as_os_str()]].concat());
            let created = CreateOptions { cluster_bytes, version, ..Default::default() };
            to_qcow2(&opened, &ours, created, &fresh());
            assert_same_file(&ours, &theirs, &layout);
            assert_clean(&ours);
        }
    }
}

#[test]
fn a_conversion_with_subclusters_makes_the_file_that_qemu_img_makes() {
    let scratch = Scratch::new();
    let (source, ours, theirs) =
        (scratch.path("source"), scratch.path("ours"), scratch.path("theirs"));
    raw_disk(&source, 8 * MIB);
    let opened = open(&source, Format::Raw, Access::ReadOnly);
    for cluster_bytes in [16384, 65536, 131_072] {
        let layout = format!("extended_l2=on,cluster_size={cluster_bytes}");
        let words = ["convert", "-f", "raw", "-O", "qcow2", "-o", &layout].map(OsStr::new);
        qemu_img(&[&words[..], &[source.as_os_str(), theirs.as_os_str()]].concat());
        let entry_width = EntryWidth::Extended;
        let created = CreateOptions { cluster_bytes, entry_width, ..Default::default() };
        to_qcow2(&opened, &ours, created, &fresh());
        assert_same_guest(("raw", &source), ("qcow2", &ours));
        assert_clean(&ours);
        assert_same_file(&ours, &theirs, &layout);
    }
}

#[test]
fn compressed_clusters_are_read_by_qemu_and_are_as_small() {
    let scratch = Scratch::new();
    let (source, ours, theirs) =
        (scratch.path("source"), scratch.path("ours"), scratch.path("theirs"));
    raw_disk(&source, 8 * MIB + 512);
    let opened = open(&source, Format::Raw, Access::ReadOnly);
    let kinds = [(CompressionType::Deflate, "zlib"), (CompressionType::Zstd, "zstd")];
    for (compression, name) in kinds {
        for cluster_bytes in [4096, 65536, 1 << 20] {
            let layout = format!("compression_type={name},cluster_size={cluster_bytes}");
            let words = ["convert", "-c", "-m", "1", "-f", "raw", "-O", "qcow2", "-o", &layout];
            let paths = [source.as_os_str(), theirs.as_os_str()];
            qemu_img(&[&words.map(OsStr::new)[..], &paths].concat());
            let created = CreateOptions { cluster_bytes, compression, ..Default::default() };
            to_qcow2(&opened, &ours, created, &compressed());
            assert_same_guest(("raw", &source), ("qcow2", &ours));
            assert_clean(&ours);
            let sizes = [&ours, &theirs].map(|path| std::fs::metadata(path).unwrap().len());
            assert!(sizes[0] <= sizes[1] + sizes[1] / 20, "{layout}: {sizes:?}");
        }
    }
}

#[test]
fn compressed_images_of_qemu_read_the_same_here() {
    let scratch = Scratch::new();
    let (source, image, back) =
        (scratch.path("source"), scratch.path("image"), scratch.path("back"));
    raw_disk(&source, 8 * MIB + 512);
    for name in ["zlib", "zstd"] {
        let layout = format!("compression_type={name}");
        let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &layout].map(OsStr::new);
        qemu_img(&[&words[..], &[source.as_os_str(), image.as_os_str()]].concat());
        to_raw(&open(&image, Format::Qcow2, Access::ReadOnly), &back);
        assert_same_file(&back, &source, name);
    }
}

#[test]
fn compression_gives_one_file_however_many_threads_and_requests() {
    let scratch = Scratch::new();
    let (source, first, other) = (scratch.path("source"), scratch.path("0"), scratch.path("1"));
    raw_disk(&source, 24 * MIB + 512);
    let opened = open(&source, Format::Raw, Access::ReadOnly);
    for compression in [CompressionType::Deflate, CompressionType::Zstd] {
        let created = || CreateOptions { compression, ..CreateOptions::default() };
        let one = ConvertOptions { in_flight: 1, threads: Threads::Caller, ..compressed() };
        to_qcow2(&opened, &first, created(), &one);
        for in_flight in [1, 3, 16] {
            let options = ConvertOptions { in_flight, ..compressed() };
            to_qcow2(&opened, &other, created(), &options);
            assert_same_file(&other, &first, "threads");
        }
        let any = ConvertOptions { order: WriteOrder::Any, ..compressed() };
        to_qcow2(&opened, &other, created(), &any);
        assert_clean(&other);
        assert_same_guest(("raw", &source), ("qcow2", &other));
    }
}

#[test]
fn zeros_onto_what_reads_as_zeros_leave_the_target_as_it_is() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.path("source"), scratch.path("target"));
    for path in [&source, &target] {
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "8T"]);
    }
    qemu_io("qcow2", &source, &["write -z 3T 1G", "write -P 0 4T 64k"]);
    let before = std::fs::read(&target).unwrap();
    let disk = open(&target, Format::Qcow2, Access::ReadWrite);
    let source = open(&source, Format::Qcow2, Access::ReadOnly);
    let copied = copy(source.disk(), disk.disk(), &ConvertOptions::default());
    block_on(disk.into_disk().close()).unwrap();
    assert_eq!(copied.skipped_bytes, 8 << 40, "{copied:?}");
    assert!(std::fs::read(&target).unwrap() == before);
}

#[test]
fn a_way_there_and_back_keeps_every_byte_and_every_hole() {
    let scratch = Scratch::new();
    let (source, image, back) =
        (scratch.path("source"), scratch.path("image"), scratch.path("back"));
    qemu_img(&["create", "-q", "-f", "raw", source.to_str().unwrap(), "1G"]);
    qemu_io("raw", &source, &["write -P 7 100M 3M", "write -P 8 1000001k 65k", "write -P 0 5M 2M"]);
    for order in [WriteOrder::Guest, WriteOrder::Any] {
        let options = ConvertOptions { order, ..fresh() };
        let opened = open(&source, Format::Raw, Access::ReadOnly);
        let copied = to_qcow2(&opened, &image, CreateOptions::default(), &options);
        assert!(copied.written_bytes < 4 * MIB && copied.zeroed_bytes == 0, "{copied:?}");
        assert_clean(&image);
        assert_same_guest(("raw", &source), ("qcow2", &image));
        to_raw(&open(&image, Format::Qcow2, Access::ReadOnly), &back);
        assert_same_guest(("raw", &source), ("raw", &back));
        let space = std::fs::metadata(&back).unwrap().blocks() * 512;
        assert!(space < 4 * MIB, "{space} bytes for 3 MiB of data");
    }
}

/// A chain of three with layers shorter and longer than those above, and data that straddles.
fn tower(scratch: &Scratch) -> PathBuf {
    let path = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "raw", &path("base"), "12M"]);
    qemu_io("raw", &scratch.path("base"), &["write -P 1 0 3M", "write -P 2 8000k 4200k"]);
    let over = |below: &str, format: &str, name: &str, layout: &str, size: &str| {
        let below = path(below);
        let words = ["create", "-q", "-f", "qcow2", "-b", &below, "-F", format, "-o", layout];
        qemu_img(&[&words[..], &[&path(name), size]].concat());
    };
    over("base", "raw", "middle", "cluster_size=4k", "10M");
    let middle =
        ["write -P 3 1000k 10k", "write -z 2M 100k", "write -P 4 10230k 10k", "discard 0 64k"];
    qemu_io("qcow2", &scratch.path("middle"), &middle);
    over("middle", "qcow2", "top", "extended_l2=on", "15M");
    let top =
        ["write -P 5 1003k 1k", "write -z 9M 2k", "write -P 6 10239k 5k", "write -P 7 14M 3k"];
    qemu_io("qcow2", &scratch.path("top"), &top);
    scratch.path("top")
}

#[test]
fn a_chain_reads_like_in_qemu_and_flattens_both_ways() {
    let scratch = Scratch::new();
    let top = tower(&scratch);
    let (expected, ours, flat) =
        (scratch.path("expected"), scratch.path("ours"), scratch.path("flat"));
    let words = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
    qemu_img(&[&words[..], &[top.as_os_str(), expected.as_os_str()]].concat());
    let chain = open(&top, Format::Qcow2, Access::ReadOnly);
    assert_eq!(chain.levels().len(), 3);
    to_raw(&chain, &ours);
    assert_same_file(&ours, &expected, "raw");
    to_qcow2(&chain, &flat, CreateOptions::default(), &fresh());
    assert_clean(&flat);
    assert_same_guest(("qcow2", &top), ("qcow2", &flat));
    let same = block_on(job::compare(
        chain.disk(),
        open(&flat, Format::Qcow2, Access::ReadOnly).disk(),
        CompareOptions::default(),
        &mut |_, _| (),
    ))
    .unwrap();
    assert!(same.is_identical() && !same.sizes_differ, "{same:?}");
}

#[test]
fn a_chain_maps_like_in_qemu() {
    let scratch = Scratch::new();
    let top = tower(&scratch);
    let words = ["map", "-f", "qcow2", "--output=json"].map(OsStr::new);
    let theirs = QEMU_IMG.succeed([&words[..], &[top.as_os_str()]].concat());
    let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
    let chain = open(&top, Format::Qcow2, Access::ReadOnly);
    let mut map = chain.map(chain.disk().whole());
    let mut ours = Vec::new();
    while let Some(run) = block_on(map.next()).unwrap() {
        let mut entry = serde_json::json!({
            "start": run.range.start.0,
            "length": run.range.len,
            "depth": run.level,
            "present": run.is_present(),
            "zero": run.status.reads_zero,
            "data": !run.status.reads_zero,
            "compressed": run.status.is_compressed,
        });
        if let Some(host) = run.status.host {
            entry["offset"] = host.0.into();
        }
        ours.push(entry);
    }
    assert_eq!(serde_json::Value::from(ours), theirs);
}

#[test]
fn what_both_backing_layers_have_is_left_to_them() {
    let scratch = Scratch::new();
    let top = tower(&scratch);
    let (ours, theirs) = (scratch.path("ours"), scratch.path("theirs"));
    let middle = scratch.path("middle").to_str().unwrap().to_owned();
    let words = ["convert", "-f", "qcow2", "-O", "qcow2", "-B", &middle, "-F", "qcow2"];
    qemu_img(&[&words.map(OsStr::new)[..], &[top.as_os_str(), theirs.as_os_str()]].concat());
    let chain = open(&top, Format::Qcow2, Access::ReadOnly);
    let backing = BackingName { name: middle, format: Some("qcow2".to_owned()) };
    let created = CreateOptions { backing: Some(backing), ..Default::default() };
    let content = TargetContent::Backing { source_bytes: 10 * MIB, target_bytes: 10 * MIB };
    let copied =
        to_qcow2(&chain, &ours, created, &ConvertOptions { content, ..Default::default() });
    assert!(copied.written_bytes < MIB, "{copied:?}");
    assert_clean(&ours);
    assert_same_guest(("qcow2", &top), ("qcow2", &ours));
    let sizes = [&ours, &theirs].map(|path| std::fs::metadata(path).unwrap().len());
    assert!(sizes[0] <= sizes[1], "{sizes:?}");
}

#[test]
fn a_dirty_target_reads_like_the_source_afterwards() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.path("source"), scratch.path("target"));
    raw_disk(&source, 8 * MIB);
    qemu_img(&["create", "-q", "-f", "qcow2", target.to_str().unwrap(), "8M"]);
    qemu_io("qcow2", &target, &["write -P 0xee 0 8M"]);
    let opened = open(&source, Format::Raw, Access::ReadOnly);
    let written = open(&target, Format::Qcow2, Access::ReadWrite);
    copy(opened.disk(), written.disk(), &ConvertOptions::default());
    block_on(written.into_disk().close()).unwrap();
    assert_clean(&target);
    assert_same_guest(("raw", &source), ("qcow2", &target));
}

#[test]
fn a_real_file_system_survives_every_conversion() {
    let scratch = Scratch::new();
    let (raw, image, small, back) =
        (scratch.path("raw"), scratch.path("image"), scratch.path("small"), scratch.path("back"));
    let files = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    MKE2FS.succeed(["-q", "-t", "ext4", "-d", files, raw.to_str().unwrap(), "64M"]);
    let fsck = |path: &Path| E2FSCK.succeed([OsStr::new("-fn"), path.as_os_str()]);
    to_qcow2(
        &open(&raw, Format::Raw, Access::ReadOnly),
        &image,
        CreateOptions::default(),
        &fresh(),
    );
    to_qcow2(
        &open(&image, Format::Qcow2, Access::ReadOnly),
        &small,
        CreateOptions { compression: CompressionType::Zstd, ..Default::default() },
        &compressed(),
    );
    to_raw(&open(&small, Format::Qcow2, Access::ReadOnly), &back);
    fsck(&back);
    for path in [&image, &small] {
        assert_clean(path);
        assert_same_guest(("raw", &raw), ("qcow2", path));
    }
    assert_same_guest(("raw", &raw), ("raw", &back));
    let sizes = [&image, &small].map(|path| std::fs::metadata(path).unwrap().len());
    assert!(sizes[1] < sizes[0], "{sizes:?}");
}
