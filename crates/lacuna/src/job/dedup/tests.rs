//! Counts against brute force.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use pollster::block_on;
use testkit::Random;

use super::*;
use crate::block::{DynLayer, Layer, WriteFlags, is_zero};
use crate::buffer::Buffer;
use crate::qcow2::{Access, BackingName, CreateOptions, Image, OpenOptions, Parts, create};
use crate::raw::Raw;
use crate::storage::MemoryStorage;
use crate::units::GuestOffset;

/// Bytes of which few kinds exist, and where they lie.
fn content(random: &mut Random, disk_bytes: u64) -> Vec<(u64, Vec<u8>)> {
    let piece = |random: &mut Random| {
        let start = random.below(disk_bytes / 512) * 512;
        let len = (1 + random.below(200)) * 512;
        let kind = random.below(6) as u8;
        let step = if random.below(2) == 0 { 1 } else { 1 + start as usize % 7 };
        let bytes = (0..len.min(disk_bytes - start))
            .map(|at| kind * ((at as usize / 4096 % step) as u8 + 1));
        (start, bytes.collect())
    };
    (0..20).map(|_| piece(random)).collect()
}

async fn raw(pieces: &[(u64, Vec<u8>)], disk_bytes: u64) -> Raw<MemoryStorage> {
    let disk = Raw::create(MemoryStorage::new(), disk_bytes).await.unwrap();
    for (start, bytes) in pieces {
        let buffer = Buffer::from(&bytes[..]);
        disk.write(GuestOffset(*start), buffer, WriteFlags::empty()).await.0.unwrap();
    }
    disk
}

async fn all_of<L: Layer>(disk: &L) -> Vec<u8> {
    let (result, bytes) = disk.read(GuestOffset(0), Buffer::new(disk.size_bytes() as usize)).await;
    result.unwrap();
    bytes.to_vec()
}

/// Contents of clusters that are not zeros, the last one filled up.
fn clusters(bytes: &[u8], size: usize) -> Vec<Vec<u8>> {
    let filled = |part: &[u8]| {
        let mut part = part.to_vec();
        part.resize(size, 0);
        part
    };
    bytes.chunks(size).filter(|part| !is_zero(part)).map(filled).collect()
}

#[test]
fn counts_are_those_of_brute_force() {
    let sizes = vec![512, 4096, 65536];
    for seed in testkit::seeds(12) {
        let mut random = Random::new(seed);
        let disks: Vec<_> = [3 << 20, (1 << 20) + 512, 64 << 10]
            .map(|bytes| block_on(raw(&content(&mut random, bytes), bytes)))
            .into();
        let sources: Vec<_> =
            disks.iter().map(|layer| DuplicateSource { layer, cluster_bytes: None }).collect();
        let options = DuplicateOptions { cluster_sizes: sizes.clone(), ..Default::default() };
        let found = block_on(estimate_duplicates(&sources, &options, &mut |_, _| ())).unwrap();
        for (size, found) in sizes.iter().zip(found.sizes) {
            let mut all = HashSet::new();
            for (disk, counts) in disks.iter().zip(&found.sources) {
                let clusters = clusters(&block_on(all_of(disk)), *size as usize);
                let distinct: HashSet<_> = clusters.iter().cloned().collect();
                let expected = (clusters.len() as u64, distinct.len() as u64);
                assert_eq!((counts.data, counts.distinct), expected, "seed {seed}, size {size}");
                all.extend(distinct);
            }
            assert_eq!(found.total.distinct, all.len() as u64, "seed {seed}, size {size}");
            assert_eq!(found.one_in, 1);
        }
    }
}

#[test]
fn zeros_that_are_stored_are_counted_apart() {
    block_on(async {
        let disk = raw(&[(0, vec![0; 128 << 10]), (64 << 10, vec![7; 4096])], 1 << 20).await;
        let sources = [DuplicateSource { layer: &disk, cluster_bytes: None }];
        let options = DuplicateOptions { cluster_sizes: vec![4096, 65536], ..Default::default() };
        let found = estimate_duplicates(&sources, &options, &mut |_, _| ()).await.unwrap();
        let counts = |at: usize| (found.sizes[at].total.data, found.sizes[at].total.zero);
        assert_eq!(counts(1), (1, 1));
        assert_eq!(counts(0), (1, 31));
    });
}

/// Different content in every sector of 64 MiB, twice: more than 1 MiB of fingerprints.
#[test]
fn a_sample_tells_nearly_what_all_would_tell_within_its_memory() {
    let bytes: u64 = 64 << 20;
    block_on(async {
        let disk = Raw::create(MemoryStorage::new(), bytes).await.unwrap();
        let mut half = vec![7; bytes as usize / 2];
        for (index, sector) in half.chunks_mut(512).enumerate() {
            sector[..8].copy_from_slice(&index.to_le_bytes());
        }
        for at in [0, bytes / 2] {
            let buffer = Buffer::from(&half[..]);
            disk.write(GuestOffset(at), buffer, WriteFlags::empty()).await.0.unwrap();
        }
        let sources = [DuplicateSource { layer: &disk, cluster_bytes: None }];
        let cluster_sizes = vec![512, 1024, 2048, 4096, 8192];
        let options = DuplicateOptions { cluster_sizes, memory_bytes: 1 << 20 };
        let found = estimate_duplicates(&sources, &options, &mut |_, _| ()).await.unwrap();
        let rates: Vec<u64> = found.sizes.iter().map(|size| size.one_in).collect();
        assert!(rates[0] >= 2 && rates[4] == 1, "{rates:?}");
        let kept: u64 = found.sizes.iter().map(|size| size.kept).sum();
        assert!(kept * 8 <= 1 << 20);
        for size in &found.sizes {
            let expected = (bytes / 2 / size.cluster_bytes) as f64;
            let error = (size.total.distinct as f64 / expected - 1.0).abs();
            let most = if size.one_in == 1 { 0.0 } else { 5.0 / (size.kept as f64).sqrt() };
            assert!(error <= most, "{} of {}: {error}", size.total.distinct, size.cluster_bytes);
        }
    });
}

#[test]
fn compressed_clusters_and_those_in_one_place_are_told_apart() {
    block_on(async {
        let storage = MemoryStorage::new();
        let options = CreateOptions { size_bytes: 1 << 20, ..Default::default() };
        create(&storage, &options).await.unwrap();
        let image = Image::open(Parts::alone(storage), OpenOptions::new(Access::ReadWrite));
        let image = image.await.unwrap();
        let compressed = image.write_compressed(GuestOffset(0), Buffer::from(&[7; 65536][..]));
        compressed.await.0.unwrap();
        let plain = Buffer::from(&[7; 2 * 65536][..]);
        image.write(GuestOffset(65536), plain, WriteFlags::empty()).await.0.unwrap();
        let sources = [DuplicateSource { layer: &image, cluster_bytes: Some(65536) }];
        let options = DuplicateOptions::default();
        let found = estimate_duplicates(&sources, &options, &mut |_, _| ()).await.unwrap();
        let facts = SourceFacts { data_bytes: 3 << 16, compressed_bytes: 1 << 16, shared_bytes: 0 };
        assert_eq!(found.sources, [facts]);
        assert_eq!(found.sizes[4].inside_bytes(), 2 << 16);
    });
}

#[test]
fn what_makes_no_sense_is_refused() {
    let disk = block_on(raw(&[], 1 << 20));
    let ask = |cluster_sizes: Vec<u64>, memory_bytes, sources| {
        let source = || DuplicateSource { layer: &disk, cluster_bytes: None };
        let sources: Vec<_> = (0..sources).map(|_| source()).collect();
        let options = DuplicateOptions { cluster_sizes, memory_bytes };
        block_on(estimate_duplicates(&sources, &options, &mut |_, _| ())).map(|_| ())
    };
    assert!(ask(vec![4096], 1 << 20, 1023).is_ok());
    for wrong in [0, 1, 256, 4097, 4 << 20, u64::MAX] {
        assert!(ask(vec![4096, wrong], 1 << 20, 1).is_err(), "{wrong}");
    }
    assert!(ask(vec![], 1 << 20, 1).is_err());
    assert!(ask(vec![4096], (1 << 20) - 1, 1).is_err());
    assert!(ask(vec![4096], 1 << 20, 1024).is_err());
}

/// Long runs without data cost one window; data at both ends of a huge disk is found.
#[test]
fn a_sparse_disk_is_walked_by_its_data() {
    block_on(async {
        let disk = Raw::create(MemoryStorage::new(), 1 << 40).await.unwrap();
        for at in [0, (1 << 39) + 4096, (1 << 40) - 512] {
            let buffer = Buffer::from(&[1; 512][..]);
            disk.write(GuestOffset(at), buffer, WriteFlags::empty()).await.0.unwrap();
        }
        let sources = [DuplicateSource { layer: &disk, cluster_bytes: None }];
        let mut calls = HashMap::new();
        let options = DuplicateOptions { cluster_sizes: vec![512, 4096], ..Default::default() };
        let mut progress = |done, total| *calls.entry((done, total)).or_insert(0) += 1;
        let found = estimate_duplicates(&sources, &options, &mut progress).await.unwrap();
        assert_eq!((found.sizes[0].total.data, found.sizes[0].total.distinct), (3, 1));
        assert!(calls.len() < 10 && calls.contains_key(&(1 << 40, 1 << 40)), "{calls:?}");
        // Two clusters begin with the bytes, the last one ends with them.
        assert_eq!(found.sizes[1].total.distinct, 2);
    });
}

/// The bytes of a cluster of a disk, filled up; nothing where it has none, or only zeros.
fn cluster_of(bytes: &[u8], index: usize, size: usize) -> Option<Vec<u8>> {
    let part = bytes.get(index * size..)?;
    let mut part = part[..part.len().min(size)].to_vec();
    part.resize(size, 0);
    (!is_zero(&part)).then_some(part)
}

/// Disks of several lengths, changed copies of one.
async fn family(random: &mut Random) -> Vec<Raw<MemoryStorage>> {
    let common = content(random, 1 << 20);
    let mut disks = Vec::new();
    for bytes in [3 << 20, (1 << 20) + 512, 1 << 20] {
        let mut pieces = common.clone();
        pieces.extend(content(random, bytes).into_iter().take(6));
        disks.push(raw(&pieces, bytes).await);
    }
    disks
}

#[test]
fn a_base_holds_what_most_disks_hold_and_overlays_on_it_read_as_the_disks_do() {
    const SIZE: usize = 4096;
    for seed in testkit::seeds(3) {
        let mut random = Random::new(seed);
        block_on(async {
            let disks = family(&mut random).await;
            let base = Raw::create(MemoryStorage::new(), 3 << 20).await.unwrap();
            let sources: Vec<_> = disks.iter().collect();
            gather_common(&sources, &base, SIZE as u64, &mut |_, _| ()).await.unwrap();
            let held = all_of(&base).await;
            let mut contents = Vec::new();
            for disk in &disks {
                contents.push(all_of(disk).await);
            }
            for index in 0..held.len() / SIZE {
                let parts = contents.iter().filter_map(|bytes| cluster_of(bytes, index, SIZE));
                let mut counts = HashMap::<Vec<u8>, usize>::new();
                parts.for_each(|part| *counts.entry(part).or_default() += 1);
                let most = counts.values().copied().max().unwrap_or(0);
                match cluster_of(&held, index, SIZE) {
                    Some(found) => assert!(most > 1 && counts.get(&found) == Some(&most), "{seed}"),
                    None => assert!(most < 2, "seed {seed}, cluster {index}: {most} alike"),
                }
            }
            let base = Arc::new(base);
            for (disk, bytes) in disks.iter().zip(&contents) {
                let storage = MemoryStorage::new();
                let backing = Some(BackingName { name: "base".into(), format: None });
                let size_bytes = disk.size_bytes();
                let options = CreateOptions {
                    size_bytes,
                    cluster_bytes: 4096,
                    backing,
                    ..Default::default()
                };
                create(&storage, &options).await.unwrap();
                let below: Arc<dyn DynLayer> = Arc::clone(&base) as _;
                let parts = Parts { backing: Some(below), ..Parts::alone(storage) };
                let overlay =
                    Image::open(parts, OpenOptions::new(Access::ReadWrite)).await.unwrap();
                write_difference(disk, &*base, &overlay, SIZE as u64, &mut |_, _| ())
                    .await
                    .unwrap();
                assert!(all_of(&overlay).await == *bytes, "seed {seed}");
            }
        });
    }
}
