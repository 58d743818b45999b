//! Stock QEMU goes on with images whose clusters are shared: whatever it does, its check finds nothing,
//! and every byte is right.

use std::path::PathBuf;

use lacuna::block::Layer;
use lacuna::job::{DedupOptions, dedup};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts, Shrink};
use lacuna::storage::{FileOptions, FileStorage};
use lacuna::units::{GuestCluster, GuestOffset, GuestRange};
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, QEMU_IO, qemu_img_check, qemu_img_read};
use testkit::{Random, seeds};

use crate::drive::{perform, read};

/// A kind of image: options of `create`, bits of a cluster, and whether something lies below.
struct Sort {
    options: &'static str,
    cluster_bits: u32,
    backing: bool,
}

const SORTS: [Sort; 8] = [
    Sort { options: "compat=1.1", cluster_bits: 16, backing: false },
    Sort { options: "compat=0.10", cluster_bits: 12, backing: false },
    Sort { options: "compat=1.1", cluster_bits: 12, backing: true },
    Sort { options: "compat=1.1,extended_l2=on", cluster_bits: 14, backing: true },
    Sort { options: "compat=1.1,lazy_refcounts=on", cluster_bits: 9, backing: false },
    Sort { options: "compat=0.10", cluster_bits: 16, backing: true },
    Sort { options: "compat=1.1,refcount_bits=64", cluster_bits: 12, backing: false },
    Sort { options: "compat=1.1,refcount_bits=8", cluster_bits: 12, backing: false },
];

/// Clusters of the disk at first, and different contents that they have.
const CLUSTERS: u64 = 40;
const CONTENTS: u64 = 4;

/// An image in a folder, and what should be in it.
struct Stock {
    folder: tempfile::TempDir,
    random: Random,
    version: u32,
    cluster: u64,
    /// What lies below, if anything does.
    base: Option<&'static str>,
    guest: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    named: u64,
    log: Vec<String>,
}

impl Stock {
    fn make(sort: &Sort, seed: u64) -> Self {
        let cluster = 1 << sort.cluster_bits;
        let mut stock = Self {
            folder: tempfile::tempdir().unwrap(),
            random: Random::new(seed),
            version: if sort.options.contains("0.10") { 2 } else { 3 },
            cluster,
            base: sort.backing.then_some("base"),
            guest: vec![0; (CLUSTERS * cluster + cluster / 1024 * 512) as usize],
            snapshots: Vec::new(),
            named: 0,
            log: Vec::new(),
        };
        let (size, options) = (stock.guest.len(), sort.options);
        let options = format!("{options},cluster_size={cluster}");
        let mut words = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if sort.backing {
            std::fs::write(stock.folder.path().join("base"), vec![77; size / 2]).unwrap();
            std::fs::write(stock.folder.path().join("other"), vec![78; size / 4]).unwrap();
            stock.guest[..size / 2].fill(77);
            words.extend(["-b", "base", "-F", "raw"]);
        }
        let size = size.to_string();
        words.extend(["disk", &size]);
        QEMU_IMG.succeed_in(stock.folder.path(), words);
        for index in 0..CLUSTERS {
            stock.write(index * cluster, cluster, index % CONTENTS + 1);
        }
        stock
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn img(&mut self, words: &[&str]) {
        self.log.push(words.join(" "));
        QEMU_IMG.succeed_in(self.folder.path(), words);
    }

    fn io(&mut self, command: String) {
        let discard = if self.random.one_in(2) { "unmap" } else { "ignore" };
        self.log.push(format!("-d {discard} {command}"));
        let words = ["-f", "qcow2", "-d", discard, "-c", &command, "disk"];
        QEMU_IO.succeed_in(self.folder.path(), words);
    }

    fn write(&mut self, start: u64, len: u64, byte: u64) {
        // QEMU compresses only where nothing was.
        let is_new = self.log.len() < CLUSTERS as usize;
        let compressed = if is_new && self.random.one_in(4) { "-c " } else { "" };
        self.io(format!("write {compressed}-P {byte} {start} {len}"));
        self.guest[start as usize..(start + len) as usize].fill(byte as u8);
    }

    /// A range of clusters, or of less.
    fn range(&mut self) -> (u64, u64) {
        let size = self.guest.len() as u64;
        let unit = if self.random.one_in(3) { 512 } else { self.cluster };
        let start = self.random.below(size / unit) * unit;
        let len = (1 + self.random.below(4)) * unit;
        (start, len.min(size - start))
    }

    async fn open(&self, access: Access) -> lacuna::Result<Image<FileStorage>> {
        let options = match access {
            Access::ReadOnly => FileOptions::read_only(),
            Access::ReadWrite => FileOptions::read_write(),
        };
        let mut parts = Parts::alone(FileStorage::open(self.path(), &options)?);
        if let Some(name) = self.base {
            let file = FileStorage::open(self.folder.path().join(name), &FileOptions::read_only())?;
            parts.backing = Some(std::sync::Arc::new(lacuna::raw::Raw::open(file).await?));
        }
        Image::open(parts, OpenOptions::new(access)).await
    }

    /// The engine shares what is alike.
    fn share(&mut self) -> u64 {
        self.log.push("share".into());
        let groups: Vec<Vec<GuestCluster>> = (1..=CONTENTS as u8)
            .map(|byte| {
                let clusters = (0..).zip(self.guest.chunks(self.cluster as usize));
                let alike = clusters.filter(|(_, bytes)| bytes[0] == byte);
                alike.map(|(index, _)| GuestCluster(index)).collect()
            })
            .collect();
        let of_all = self.random.one_in(2);
        block_on(async {
            let image = self.open(Access::ReadWrite).await?;
            let shared = match of_all {
                // With what snapshots have.
                true => dedup(&image, DedupOptions::default(), &mut |_| ()).await?.shared,
                false => {
                    image.drop_unused_pins().await?;
                    image.share(&groups).await?.shared
                }
            };
            image.close().await?;
            Ok::<_, lacuna::Error>(shared)
        })
        .unwrap()
    }

    fn by_engine(&mut self) {
        let (start, len) = self.range();
        let range = GuestRange::new(GuestOffset(start), len);
        let seed = self.random.next();
        let flags = lacuna::block::WriteFlags::empty();
        let write = testkit::Operation::Write { range, seed, flags };
        self.log.push(format!("engine writes {len} at {start}"));
        let bytes = testkit::content(seed, range);
        self.guest[start as usize..(start + len) as usize].copy_from_slice(&bytes);
        block_on(async {
            let image = self.open(Access::ReadWrite).await?;
            perform(&image, write).await?;
            image.close().await
        })
        .unwrap();
    }

    fn resize(&mut self) {
        // Whole clusters: what QEMU cuts off within one comes back when it grows.
        let size = (1 + self.random.below(CLUSTERS * 3 / 2)) * self.cluster;
        let old = self.guest.len() as u64;
        let real = !self.snapshots.is_empty();
        match self.version {
            2 if real => return,
            2 => self.resize_by_engine(size),
            _ if self.random.one_in(3) => self.resize_by_engine(size),
            _ => self.img(&["resize", "-q", "--shrink", "-f", "qcow2", "disk", &size.to_string()]),
        }
        let keep = size.min(old);
        self.guest.truncate(keep as usize);
        self.guest.resize(size as usize, 0);
    }

    fn resize_by_engine(&mut self, size: u64) {
        self.log.push(format!("engine resizes to {size}"));
        block_on(async {
            let image = self.open(Access::ReadWrite).await?;
            image.resize(size, Shrink::Allow).await?;
            image.close().await
        })
        .unwrap();
    }

    fn snapshot(&mut self) {
        let at = self.random.below(self.snapshots.len() as u64 + 1) as usize;
        match self.snapshots.get(at).cloned() {
            Some((name, content)) if self.random.one_in(2) => {
                if self.version == 2 && content.len() != self.guest.len() {
                    return;
                }
                self.img(&["snapshot", "-a", &name, "disk"]);
                self.guest = content;
            }
            Some((name, _)) => {
                self.img(&["snapshot", "-d", &name, "disk"]);
                self.snapshots.remove(at);
            }
            None if self.snapshots.len() < 4 => {
                self.named += 1;
                let name = format!("s{}", self.named);
                self.img(&["snapshot", "-c", &name, "disk"]);
                self.snapshots.push((name, self.guest.clone()));
            }
            None => {}
        }
    }

    /// What a discard leaves is old bytes or zeros.
    fn discard(&mut self) {
        let (start, len) = self.range();
        self.io(format!("discard {start} {len}"));
        let seen = self.seen();
        let range = start as usize..(start + len) as usize;
        for (old, new) in self.guest[range.clone()].iter_mut().zip(&seen[range]) {
            assert!([0, *old].contains(new), "{:?}: {old} became {new}", self.log);
            *old = *new;
        }
    }

    fn chain(&mut self) {
        match self.random.below(3) {
            _ if self.base.is_none() => {}
            // A snapshot shows what is below, where it has nothing of its own.
            _ if !self.snapshots.is_empty() => {}
            0 => self.img(&["commit", "-q", "-f", "qcow2", "disk"]),
            _ => {
                let next = if self.base == Some("base") { "other" } else { "base" };
                self.img(&["rebase", "-q", "-f", "qcow2", "-F", "raw", "-b", next, "disk"]);
                self.base = Some(next);
            }
        }
    }

    fn step(&mut self) {
        match self.random.below(16) {
            0..4 => {
                let (start, len) = self.range();
                let byte = self.random.below(CONTENTS + 1);
                self.write(start, len, byte.max(1));
            }
            4..6 => {
                let cluster = self.random.below(self.guest.len() as u64 / self.cluster);
                let byte = 1 + self.random.below(CONTENTS);
                self.write(cluster * self.cluster, self.cluster, byte);
            }
            6 | 7 => self.discard(),
            8 => {
                let (start, len) = self.range();
                let unmap = if self.random.one_in(2) { "-u " } else { "" };
                self.io(format!("write -z {unmap}{start} {len}"));
                self.guest[start as usize..(start + len) as usize].fill(0);
            }
            9..12 => self.snapshot(),
            12 => self.resize(),
            13 => self.chain(),
            14 => self.by_engine(),
            _ => {
                self.share();
            }
        }
        self.judge();
    }

    fn seen(&self) -> Vec<u8> {
        block_on(async {
            let image = self.open(Access::ReadOnly).await?;
            read(&image, image.whole()).await
        })
        .unwrap()
    }

    fn judge(&mut self) {
        let found = qemu_img_check(&self.path());
        assert!(found.is_clean(), "{:#?}\n{}", self.log, found.text);
        let same = self.seen() == self.guest;
        assert!(same, "{:#?}: the content is wrong", self.log);
        if self.random.one_in(8) {
            let raw = qemu_img_read(&self.path()).to_vec();
            assert!(raw == self.guest, "{:#?}: QEMU reads something else", self.log);
        }
    }
}

/// Steps with each sort of image: thousands in all, or about a hundred.
fn steps() -> usize {
    if std::env::var_os("LACUNA_LONG").is_some() { 400 } else { 12 }
}

#[test]
fn stock_qemu_goes_on_with_shared_clusters_and_finds_nothing_wrong() {
    for seed in seeds(1) {
        for (number, sort) in (0..).zip(SORTS) {
            let mut stock = Stock::make(&sort, seed * 100 + number);
            assert!(stock.share() > CLUSTERS / 2);
            stock.judge();
            for _ in 0..steps() {
                stock.step();
            }
        }
    }
}
