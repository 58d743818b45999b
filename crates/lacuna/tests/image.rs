//! An image that qemu-img made, changed by the engine, judged by qemu-img.

use std::process::Command;

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, Image, OpenOptions, Parts, Placement};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;

struct Random(u64);
impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }
}

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
    let mut random = Random(seed * 7919 + 13);
    for _session in 0..3 {
        let image = block_on(Image::open(
            Parts::alone(storage.clone()),
            OpenOptions::new(Access::ReadWrite).placement(placement),
        ))
        .unwrap();
        for step in 0..120 {
            let len = match random.next(4) {
                0 => 1 + random.next(600),
                1 => 512 * (1 + random.next(64)),
                _ => 1 + random.next(200_000),
            }
            .min(size);
            let start = match random.next(2) {
                0 => random.next(size - len + 1),
                _ => random.next(size - len + 1) / 4096 * 4096,
            };
            let range = GuestRange::new(GuestOffset(start), len);
            let (a, b) = (start as usize, (start + len) as usize);
            match random.next(7) {
                0..=2 => {
                    let byte = random.next(256) as u8;
                    let buffer = Buffer::from(&vec![byte; len as usize][..]);
                    block_on(image.write(range.start, buffer, WriteFlags::empty())).0.unwrap();
                    model[a..b].fill(byte);
                }
                3 => {
                    let flags =
                        if random.next(2) == 0 { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
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
