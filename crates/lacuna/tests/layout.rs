//! With QEMU's placement the engine chooses the offsets that qemu-io chooses, cluster by cluster.

use std::process::Command;

use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Access, DiscardUnit, Image, OpenOptions, Parts, Placement};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::Random;

fn run(program: &str, args: &[String]) -> String {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; apt-get install qemu-utils"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{program} {args:?}: {text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    text
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Says whether the cluster of a host byte has a refcount: what lies in free clusters is chance.
fn in_use(image: &[u8], at: usize) -> bool {
    let cluster_bytes = 1_usize << number(image, 20, 4);
    let order = if number(image, 4, 4) == 2 { 4 } else { number(image, 96, 4) };
    let per_block = (cluster_bytes * 8) >> order;
    let cluster = at / cluster_bytes;
    let block = number(image, number(image, 48, 8) as usize + cluster / per_block * 8, 8) as usize;
    let bit = (cluster % per_block) << order;
    match order {
        _ if block == 0 => false,
        0..=2 => image[block + bit / 8] >> (bit % 8) & ((1 << (1 << order)) - 1) != 0,
        _ => number(image, block + bit / 8, 1 << (order - 3)) != 0,
    }
}

enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
}

fn steps(seed: u64, size: u64, count: usize, zeroes: bool) -> Vec<Step> {
    let mut random = Random::new(seed * 2654435761 + 99);
    (0..count)
        .map(|_| {
            let len = 512 * (1 + random.below(200));
            let start = random.below((size - len) / 512) * 512;
            match random.below(4) {
                0 if zeroes => Step::Zero(start, len, random.below(2) == 0),
                _ => Step::Write(start, len, 1 + random.below(255) as u8),
            }
        })
        .collect()
}

fn same_layout(options: &str, size: u64, seed: u64, zeroes: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2").to_str().unwrap().to_owned();
    run(
        "qemu-img",
        &strings(&["create", "-q", "-f", "qcow2", "-o", options, &path, &size.to_string()]),
    );
    let empty = std::fs::read(&path).unwrap();
    let steps = steps(seed, size, 60, zeroes);
    let mut args = strings(&["-f", "qcow2", "-d", "unmap"]);
    for step in &steps {
        args.push("-c".to_owned());
        args.push(match step {
            Step::Write(start, len, byte) => format!("write -q -P {byte} {start} {len}"),
            Step::Zero(start, len, unmap) => {
                format!("write -q -z {} {start} {len}", if *unmap { "-u" } else { "" })
            }
        });
    }
    args.push(path.clone());
    run("qemu-io", &args);
    let theirs = std::fs::read(&path).unwrap();
    let storage = std::sync::Arc::new(MemoryStorage::from(&empty[..]));
    let image = block_on(Image::open(
        Parts::alone(storage.clone()),
        OpenOptions::new(Access::ReadWrite)
            .placement(Placement::QemuCompatible)
            .discard_unit(DiscardUnit::Cluster),
    ))
    .unwrap();
    block_on(apply(&image, &steps));
    block_on(image.close()).unwrap();
    let ours = storage.to_vec();
    if let Some(at) = first_difference(&ours, &theirs) {
        panic!(
            "{options} seed {seed}: first difference at {at:#x} (lengths {:#x}, {:#x})",
            ours.len(),
            theirs.len()
        );
    }
}

/// Compares what is in use, sector by sector; a missing tail is zeros.
fn first_difference(ours: &[u8], theirs: &[u8]) -> Option<usize> {
    let sector = |bytes: &[u8], at: usize| {
        let mut sector = [0; 512];
        let part = bytes.get(at..bytes.len().min(at + 512)).unwrap_or_default();
        sector[..part.len()].copy_from_slice(part);
        sector
    };
    (0..ours.len().max(theirs.len()))
        .step_by(512)
        .find(|at| sector(ours, *at) != sector(theirs, *at) && in_use(theirs, *at))
}

async fn apply(image: &Image<std::sync::Arc<MemoryStorage>>, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Write(start, len, byte) => {
                let bytes = Buffer::from(&vec![byte; len as usize][..]);
                image.write(GuestOffset(start), bytes, WriteFlags::empty()).await.0.unwrap();
            }
            Step::Zero(start, len, unmap) => {
                let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                image.write_zeroes(GuestRange::new(GuestOffset(start), len), flags).await.unwrap();
            }
        }
    }
}

#[test]
fn writes_go_where_qemu_puts_them() {
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=4096",
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=1024,refcount_bits=1",
        "extended_l2=on",
        "cluster_size=2M",
    ] {
        for seed in 1..4 {
            same_layout(options, 8 << 20, seed, false);
        }
    }
}

#[test]
fn zeroed_clusters_are_reused_where_qemu_reuses_them() {
    for options in
        ["compat=1.1", "compat=0.10", "cluster_size=4096", "cluster_size=512", "extended_l2=on"]
    {
        for seed in 1..4 {
            same_layout(options, 8 << 20, seed, true);
        }
    }
}
