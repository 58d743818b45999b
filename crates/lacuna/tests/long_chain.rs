//! Chains of a thousand images: read right, by tables that share one bound.

use std::path::Path;
use std::sync::Arc;

use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, Chain, ChainOptions, Format, Instead, MemoryOpener, StandIn};
use lacuna::qcow2::{Access, BackingName, CreateOptions, create};
use lacuna::storage::MemoryStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::{Random, SparseBytes, content};

const CLUSTER: u64 = 4096;
/// As many windows of one L2 table as each image has tables.
const TABLES: u64 = 8;
const TABLE_COVERS: u64 = CLUSTER / 8 * CLUSTER;
const SIZE: u64 = TABLES * TABLE_COVERS;
/// The least that an image of a chain may cache.
const LEAST: u64 = 4 * 4096;

type Memory = Arc<MemoryStorage>;

/// Makes images that each hold a cluster of data or zeros in every table; returns what the top reads.
fn build(levels: usize) -> (MemoryOpener, SparseBytes) {
    let (mut opener, mut guest) = (MemoryOpener::default(), SparseBytes::default());
    let mut random = Random::new(levels as u64);
    guest.set_len(SIZE);
    for level in 0..levels {
        let backing = level
            .checked_sub(1)
            .map(|below| BackingName { name: below.to_string(), format: Some("qcow2".to_owned()) });
        let storage = Memory::default();
        let options = CreateOptions {
            size_bytes: SIZE,
            cluster_bytes: CLUSTER,
            backing,
            ..CreateOptions::default()
        };
        block_on(create(&storage, &options)).unwrap();
        opener = opener.with(level.to_string(), storage);
        block_on(fill(&opener, level, &mut random, &mut guest));
    }
    (opener, guest)
}

/// Writes whole clusters, for which nothing below is needed.
async fn fill(opener: &MemoryOpener, level: usize, random: &mut Random, guest: &mut SparseBytes) {
    let mut options = ChainOptions::new(Format::Qcow2, Access::ReadWrite);
    options.instead = vec![Instead { backing: StandIn::Nothing, format: None }];
    let name = level.to_string();
    let image = chain::open(opener, Path::new(&name), &options).await.unwrap().into_disk();
    for table in 0..TABLES {
        // Near each other, so that images hide what others have.
        let cluster = random.below(64);
        let range = GuestRange::new(GuestOffset(table * TABLE_COVERS + cluster * CLUSTER), CLUSTER);
        if random.one_in(4) {
            image.write_zeroes(range, ZeroFlags::MAY_UNMAP).await.unwrap();
            guest.punch(range.start.0, range.end().0);
        } else {
            let bytes = content(random.next(), range);
            guest.write(range.start.0, &bytes);
            let buffer = Buffer::from(&bytes[..]);
            image.write(range.start, buffer, WriteFlags::empty()).await.0.unwrap();
        }
    }
    image.close().await.unwrap();
}

fn open(opener: &MemoryOpener, levels: usize, cache_bytes: u64) -> Chain<Memory> {
    let mut options = ChainOptions::new(Format::Qcow2, Access::ReadOnly);
    options.backing = Allow::Named;
    options.image = options.image.cache_bytes(cache_bytes);
    let top = (levels - 1).to_string();
    block_on(chain::open(opener, Path::new(&top), &options)).unwrap()
}

fn cached_bytes(chain: &Chain<Memory>) -> u64 {
    let disks = (0..chain.levels().len()).filter_map(|level| chain.level_disk(level));
    disks.filter_map(|disk| disk.as_qcow2()).map(|image| image.counts().cached_table_bytes).sum()
}

fn assert_reads(chain: &Chain<Memory>, guest: &SparseBytes, step: u64) {
    for table in 0..TABLES {
        let mut at = table * TABLE_COVERS;
        // Where the data is, and a piece beyond.
        while at < table * TABLE_COVERS + 80 * CLUSTER {
            let (result, bytes) =
                block_on(chain.disk().read(GuestOffset(at), Buffer::new(step as usize)));
            result.unwrap();
            assert!(bytes.to_vec() == guest.read_vec(at, step as usize), "at {at}");
            at += step;
        }
    }
}

#[test]
fn a_thousand_overlays_read_right_within_one_bound_of_tables() {
    let (opener, guest) = build(1001);
    let cache_bytes = 1 << 20;
    let chain = open(&opener, 1001, cache_bytes);
    assert_reads(&chain, &guest, CLUSTER);
    let cached = cached_bytes(&chain);
    // Without a bound of the whole it were a slice for each table: 32 MiB.
    assert!(cached <= 2 * cache_bytes + 1000 * LEAST, "{cached}");
    assert!(cached >= 1000 * LEAST / 2, "{cached}: the bound was not reached");
    assert_reads(&chain, &guest, 3 * 512);
}

#[test]
fn block_status_tells_the_level_that_decides_also_in_short_ranges() {
    let (opener, guest) = build(40);
    let chain = open(&opener, 40, 1 << 20);
    let mut seen = 0;
    for cluster in 0..64 {
        let range = GuestRange::new(GuestOffset(cluster * CLUSTER), CLUSTER);
        let short = block_on(chain.disk().extents(range)).unwrap();
        let long = block_on(chain.disk().extents(chain.disk().whole())).unwrap();
        let whole = long.iter().find(|extent| extent.range.contains(range.start)).unwrap();
        assert_eq!(short[0].status.depth, whole.status.depth);
        assert_eq!(short[0].status.reads_zero, whole.status.reads_zero);
        let bytes = guest.read_vec(range.start.0, CLUSTER as usize);
        assert!(!short[0].status.reads_zero || bytes.iter().all(|byte| *byte == 0));
        seen += u32::from(short[0].status.depth.0 > 1);
    }
    assert!(seen > 10, "{seen}");
}
