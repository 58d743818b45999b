//! How often tables are read: the reason why `map` and `check` are fast, counted instead of timed.

use std::path::Path;
use std::sync::Arc;

use lacuna::Result;
use lacuna::block::Layer;
use lacuna::blocking::Disk;
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::check::{CheckOptions, check};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts, read_header};
use lacuna::storage::{
    Capabilities, FileOptions, FileStorage, HostExtent, Storage, Transfer, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use parking_lot::Mutex;
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, QEMU_IO};

/// A file that remembers what was read of it.
struct Watched {
    file: FileStorage,
    reads: Arc<Mutex<Vec<HostRange>>>,
}

impl Watched {
    fn open(path: &Path) -> (Self, Arc<Mutex<Vec<HostRange>>>) {
        let file = FileStorage::open(path, &FileOptions::read_only()).unwrap();
        let reads = Arc::default();
        (Self { file, reads: Arc::clone(&reads) }, reads)
    }
}

impl Storage for Watched {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.reads.lock().push(HostRange::new(offset, buffer.len() as u64));
        self.file.read_at(offset, buffer).await
    }

    async fn write_at(&self, _: HostOffset, _: Buffer) -> Transfer {
        unreachable!("the image is only read")
    }

    async fn write_zeroes_at(&self, _: HostRange, _: ZeroMode, _: Hold) -> Result<()> {
        unreachable!("the image is only read")
    }

    async fn punch_hole_at(&self, _: HostRange, _: Hold) -> Result<()> {
        unreachable!("the image is only read")
    }

    async fn allocate_at(&self, _: HostRange) -> Result<()> {
        unreachable!("the image is only read")
    }

    async fn flush(&self) -> Result<()> {
        unreachable!("the image is only read")
    }

    async fn len(&self) -> Result<u64> {
        self.file.len().await
    }

    async fn set_len(&self, _: u64, _: Hold) -> Result<()> {
        unreachable!("the image is only read")
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        self.file.status_at(range).await
    }

    fn capabilities(&self) -> Capabilities {
        self.file.capabilities()
    }
}

/// The L2 tables of the active L1 table.
fn tables(path: &Path) -> Vec<HostRange> {
    let file = FileStorage::open(path, &FileOptions::read_only()).unwrap();
    let header = block_on(read_header(&file)).unwrap();
    let l1 = Buffer::new(header.l1.entries as usize * 8);
    let (result, l1) = block_on(file.read_at(header.l1.offset, l1));
    result.unwrap();
    let entries = l1.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry));
    let offsets = entries.map(|entry| entry & 0x00ff_ffff_ffff_fe00).filter(|offset| *offset != 0);
    let cluster_bytes = header.geometry.cluster_bytes();
    offsets.map(|offset| HostRange::new(HostOffset(offset), cluster_bytes)).collect()
}

/// How many of the reads touched each table.
fn touched(tables: &[HostRange], reads: &[HostRange]) -> Vec<usize> {
    let touches = |table: &HostRange| reads.iter().filter(|read| read.overlaps(table)).count();
    tables.iter().map(touches).collect()
}

#[test]
fn a_walk_over_a_large_disk_reads_each_table_once_in_large_pieces() {
    let folder = tempfile::tempdir().unwrap();
    for (options, pieces) in [("cluster_size=512k", 8), ("cluster_size=64k,extended_l2=on", 1)] {
        let path = folder.path().join("image");
        let text = path.to_str().unwrap();
        let size = if pieces == 1 { "64G" } else { "1T" };
        let options = format!("preallocation=metadata,{options}");
        QEMU_IMG.succeed(["create", "-q", "-f", "qcow2", "-o", &options, text, size]);
        // Every other cluster another mapping: an answer ends within a table.
        let discards: Vec<String> =
            (0..300).map(|at| format!("write -z -u {}k 512k", at * 1024)).collect();
        let mut words = vec!["-f", "qcow2"];
        words.extend(discards.iter().flat_map(|discard| ["-c", discard]));
        words.push(text);
        QEMU_IO.succeed(words);

        let (storage, reads) = Watched::open(&path);
        let parts = Parts::alone(storage);
        let image = block_on(Image::open(parts, OpenOptions::new(Access::ReadOnly))).unwrap();
        let disk = Disk::new(image);
        reads.lock().clear();
        let runs: Vec<_> = disk.extents(disk.layer().whole()).collect::<Result<_>>().unwrap();
        assert!(runs.len() > 600, "{}", runs.len());
        let tables = tables(&path);
        let reads = reads.lock();
        assert_eq!(touched(&tables, &reads), vec![pieces; tables.len()], "{options}");
        assert_eq!(reads.len(), tables.len() * pieces, "{options}");
    }
}

#[test]
fn a_check_reads_a_table_that_many_snapshots_share_once() {
    const SNAPSHOTS: usize = 30;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let text = path.to_str().unwrap();
    QEMU_IMG.succeed(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text, "64M"]);
    QEMU_IO.succeed(["-f", "qcow2", "-c", "write -P 1 0 20M", text]);
    for index in 0..SNAPSHOTS {
        QEMU_IMG.succeed(["snapshot", "-c", &index.to_string(), text]);
    }
    // One table of the active disk is its own again.
    QEMU_IO.succeed(["-f", "qcow2", "-c", "write -P 2 1M 4k", text]);

    let (storage, reads) = Watched::open(&path);
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).unwrap();
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
    let tables = tables(&path);
    assert!(tables.len() >= 10);
    let reads = reads.lock();
    assert_eq!(touched(&tables, &reads), vec![1; tables.len()]);
    // Beside tables: headers, the snapshot table, an L1 table for each snapshot, refcounts.
    assert!(reads.len() < SNAPSHOTS + 40, "{} reads", reads.len());
}
