//! An image that qemu-img made, changed by the engine, judged by qemu-img.

use std::process::Command;

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, Image, OpenOptions, Parts, Placement, Shrink};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::Random;

fn qemu_img(args: &[&str]) -> (i32, String) {
    let out = Command::new("qemu-img").args(args).output().expect("apt-get install qemu-utils");
    let text =
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.code().unwrap_or(-1), text)
}

fn run(options: &str, size: u64, seed: u64, placement: Placement) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let path = path.to_str().unwrap();
    let (code, text) =
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, &size.to_string()]);
    assert_eq!(code, 0, "{text}");
    let storage = std::sync::Arc::new(MemoryStorage::from(&std::fs::read(path).unwrap()[..]));
    let mut model = vec![0u8; size as usize];
    let mut random = Random::new(seed * 7919 + 13);
    for _session in 0..3 {
        let image = block_on(Image::open(
            Parts::alone(storage.clone()),
            OpenOptions::new(Access::ReadWrite).placement(placement),
        ))
        .unwrap();
        for step in 0..120 {
            let len = match random.below(4) {
                0 => 1 + random.below(600),
                1 => 512 * (1 + random.below(64)),
                _ => 1 + random.below(200_000),
            }
            .min(size);
            let start = match random.below(2) {
                0 => random.below(size - len + 1),
                _ => random.below(size - len + 1) / 4096 * 4096,
            };
            let range = GuestRange::new(GuestOffset(start), len);
            let (a, b) = (start as usize, (start + len) as usize);
            match random.below(7) {
                0..=2 => {
                    let byte = random.below(256) as u8;
                    let buffer = Buffer::from(&vec![byte; len as usize][..]);
                    block_on(image.write(range.start, buffer, WriteFlags::empty())).0.unwrap();
                    model[a..b].fill(byte);
                }
                3 => {
                    let flags = if random.below(2) == 0 {
                        ZeroFlags::MAY_UNMAP
                    } else {
                        ZeroFlags::empty()
                    };
                    block_on(image.write_zeroes(range, flags)).unwrap();
                    model[a..b].fill(0);
                }
                4 => {
                    block_on(image.discard(range, DiscardMode::Guest)).unwrap();
                    let (result, bytes) =
                        block_on(image.read(range.start, Buffer::new(len as usize)));
                    result.unwrap();
                    for (index, byte) in bytes.iter().enumerate() {
                        assert!(*byte == 0 || *byte == model[a + index]);
                    }
                    model[a..b].copy_from_slice(&bytes);
                }
                5 => block_on(image.flush()).unwrap(),
                _ => {
                    let (result, bytes) =
                        block_on(image.read(range.start, Buffer::new(len as usize)));
                    result.unwrap();
                    assert!(
                        bytes[..] == model[a..b],
                        "{options} seed {seed} step {step} {range:?}"
                    );
                }
            }
        }
        block_on(image.close()).unwrap();
        std::fs::write(path, storage.to_vec()).unwrap();
        let (code, text) = qemu_img(&["check", path]);
        assert_eq!(code, 0, "{options} seed {seed}: {text}");
        let raw = dir.path().join("a.raw");
        std::fs::write(&raw, &model).unwrap();
        let (code, text) = qemu_img(&["compare", path, raw.to_str().unwrap()]);
        assert_eq!(code, 0, "{options} seed {seed}: {text}");
    }
}

#[test]
fn random_changes_leave_an_image_that_qemu_img_finds_clean_and_equal() {
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=512",
        "lazy_refcounts=on",
    ] {
        for seed in 1..4 {
            run(options, 4 << 20, seed, Placement::TwoCursors);
            run(options, (4 << 20) + 512, seed, Placement::QemuCompatible);
        }
    }
}

fn create(options: &str, size: &str, path: &str) {
    let (code, text) = qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, size]);
    assert_eq!(code, 0, "{text}");
}

fn qemu_io(path: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path);
    let out = Command::new("qemu-io").args(&args).output().expect("apt-get install qemu-utils");
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

type Memory = std::sync::Arc<MemoryStorage>;

fn load(path: &str) -> Memory {
    std::sync::Arc::new(MemoryStorage::from(&std::fs::read(path).unwrap()[..]))
}

fn open(storage: &Memory) -> Image<Memory> {
    block_on(Image::open(Parts::alone(storage.clone()), OpenOptions::new(Access::ReadWrite)))
        .unwrap()
}

fn write(image: &Image<Memory>, start: u64, len: usize, byte: u8) {
    let bytes = Buffer::from(&vec![byte; len][..]);
    block_on(image.write(GuestOffset(start), bytes, WriteFlags::empty())).0.unwrap();
}

fn assert_clean(path: &str) {
    let (code, text) = qemu_img(&["check", path]);
    assert_eq!(code, 0, "{text}");
}

#[test]
fn writes_after_an_internal_snapshot_leave_it_as_it_was() {
    for options in
        ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=512", "cluster_size=2M"]
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.qcow2").to_str().unwrap().to_owned();
        create(options, "8M", &path);
        qemu_io(&path, &["write -P 1 0 3M"]);
        assert_eq!(qemu_img(&["snapshot", "-c", "before", &path]).0, 0);
        let storage = load(&path);
        let image = open(&storage);
        write(&image, 1000, 100_000, 2);
        block_on(
            image
                .write_zeroes(GuestRange::new(GuestOffset(1 << 20), 1 << 19), ZeroFlags::MAY_UNMAP),
        )
        .unwrap();
        block_on(image.discard(GuestRange::new(GuestOffset(2 << 20), 1 << 19), DiscardMode::Guest))
            .unwrap();
        write(&image, 2 << 20, 4096, 3);
        write(&image, 5 << 20, 70_000, 4);
        block_on(image.close()).unwrap();
        std::fs::write(&path, storage.to_vec()).unwrap();
        assert_clean(&path);
        let now = qemu_io(
            &path,
            &[
                "read -P 1 0 1000",
                "read -P 2 1000 100000",
                "read -P 1 101000 900000",
                "read -P 0 1M 512k",
                "read -P 3 2M 4k",
                "read -P 4 5M 70000",
            ],
        );
        assert!(!now.contains("failed"), "{options}: {now}");
        assert_eq!(qemu_img(&["snapshot", "-a", "before", &path]).0, 0);
        let before = qemu_io(&path, &["read -P 1 0 3M", "read -P 0 3M 5M"]);
        assert!(!before.contains("failed"), "{options}: {before}");
        assert_eq!(qemu_img(&["snapshot", "-d", "before", &path]).0, 0);
        assert_clean(&path);
    }
}

#[test]
fn enabled_bitmaps_name_every_change_and_disabled_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.qcow2").to_str().unwrap().to_owned();
    create("compat=1.1", "64M", &path);
    for args in
        [&["bitmap", "--add", &path, "on"][..], &["bitmap", "--add", "--disable", &path, "off"]]
    {
        assert_eq!(qemu_img(args).0, 0);
    }
    qemu_io(&path, &["write -P 1 32M 64k"]);
    let storage = load(&path);
    let image = open(&storage);
    write(&image, 70_000, 10, 2);
    block_on(image.write_zeroes(GuestRange::new(GuestOffset(4 << 20), 65536), ZeroFlags::empty()))
        .unwrap();
    std::fs::write(&path, storage.to_vec()).unwrap();
    assert!(qemu_img(&["info", &path]).1.contains("in-use"), "marked before the first change");
    block_on(image.close()).unwrap();
    std::fs::write(&path, storage.to_vec()).unwrap();
    assert_clean(&path);
    let info = qemu_img(&["info", &path]).1;
    assert!(!info.contains("in-use"), "{info}");
    let merged = dir.path().join("m.qcow2").to_str().unwrap().to_owned();
    create("compat=1.1", "64M", &merged);
    for (name, expected) in [("on", 3), ("off", 0)] {
        let dirty = dirty_regions(&path, name);
        assert_eq!(dirty.len(), expected, "{name}: {dirty:?}");
    }
}

/// The dirty regions that stock qemu-nbd shows.
fn dirty_regions(path: &str, name: &str) -> Vec<String> {
    let socket = format!("{path}.{name}.sock");
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-B", name, "-k", &socket, "-t", path])
        .spawn()
        .expect("apt-get install qemu-utils");
    while !std::path::Path::new(&socket).exists() {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd ended early");
        std::thread::yield_now();
    }
    let source = format!(
        "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    );
    let (code, text) = qemu_img(&["map", "--output=json", "--image-opts", &source]);
    server.kill().unwrap();
    server.wait().unwrap();
    assert_eq!(code, 0, "{text}");
    text.lines().filter(|line| line.contains("\"data\": false")).map(str::to_owned).collect()
}

#[test]
fn resizing_keeps_what_is_inside_and_adds_zeros() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.qcow2").to_str().unwrap().to_owned();
        create(options, "1M", &path);
        let storage = load(&path);
        let image = open(&storage);
        write(&image, 0, 1 << 20, 7);
        block_on(image.resize(700 << 10, Shrink::Allow)).unwrap();
        block_on(image.resize(40 << 20, Shrink::Refuse)).unwrap();
        write(&image, 39 << 20, 4096, 8);
        block_on(image.close()).unwrap();
        std::fs::write(&path, storage.to_vec()).unwrap();
        assert_clean(&path);
        let text = qemu_io(
            &path,
            &["read -P 7 0 700k", "read -P 0 700k 20M", "read -P 8 39M 4k", "length"],
        );
        assert!(!text.contains("failed") && text.contains("40 MiB"), "{options}: {text}");
    }
}

#[test]
fn compressed_clusters_are_read_by_qemu_and_qemus_are_read_and_replaced() {
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "cluster_size=4096",
        "extended_l2=on",
        "compat=0.10",
        "refcount_bits=1",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.qcow2").to_str().unwrap().to_owned();
        create(options, "1500k", &path);
        if options != "refcount_bits=1" {
            qemu_io(&path, &["write -c -P 5 1M 64k"]);
        }
        let storage = load(&path);
        let image = open(&storage);
        let cluster = image.geometry().cluster_bytes();
        for index in 0..4_u64 {
            let bytes = Buffer::from(&vec![index as u8 + 1; cluster as usize][..]);
            block_on(image.write_compressed(GuestOffset(index * cluster), bytes)).0.unwrap();
        }
        write(&image, cluster + 512, 512, 9);
        if options != "refcount_bits=1" {
            let (result, bytes) = block_on(image.read(GuestOffset(1 << 20), Buffer::new(65536)));
            result.unwrap();
            assert!(bytes.iter().all(|byte| *byte == 5), "{options}");
            write(&image, (1 << 20) + 100, 100, 6);
        }
        block_on(image.close()).unwrap();
        std::fs::write(&path, storage.to_vec()).unwrap();
        assert_clean(&path);
        let text = qemu_io(
            &path,
            &[
                &format!("read -P 1 0 {cluster}"),
                &format!("read -P 2 {cluster} 512"),
                &format!("read -P 9 {} 512", cluster + 512),
                &format!("read -P 2 {} {}", cluster + 1024, cluster - 1024),
                &format!("read -P 4 {} {cluster}", 3 * cluster),
            ],
        );
        assert!(!text.contains("failed"), "{options}: {text}");
    }
}
