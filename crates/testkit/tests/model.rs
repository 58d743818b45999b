//! The model against the simplest layer there is, and against layers that lie.

use lacuna::block::{DiscardMode, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::GuestRange;
use testkit::{AfterDiscard, Menu, ModelDisk, Operation, Operations, Rules, content, seeds};

const SIZE: u64 = 1 << 20;
const RULES: Rules = Rules {
    cluster_bytes: 4096,
    after_discard: AfterDiscard::Zeros,
    zero_is_kept: false,
    starts_unallocated: false,
};
const MENU: Menu = Menu {
    cluster_bytes: 4096,
    resize_up_to: None,
    compressed: false,
    reopen: false,
    full_discard: false,
};

async fn run(
    disk: &Raw<MemoryStorage>,
    model: &mut ModelDisk,
    operation: &Operation,
) -> Result<(), String> {
    match *operation {
        Operation::Read(range) => {
            let (result, seen) = disk.read(range.start, Buffer::new(range.len as usize)).await;
            result.unwrap();
            model.compare(range, &seen)?;
        }
        Operation::Write { range, seed, flags } => {
            let buffer = Buffer::from(&content(seed, range)[..]);
            disk.write(range.start, buffer, flags).await.0.unwrap();
        }
        Operation::WriteZeroes { range, flags } => disk.write_zeroes(range, flags).await.unwrap(),
        Operation::Discard { range, mode } => {
            disk.discard(range, mode).await.unwrap();
            let (result, seen) = disk.read(range.start, Buffer::new(range.len as usize)).await;
            result.unwrap();
            model.settle_discard(range, mode, &seen)?;
        }
        _ => {}
    }
    model.apply(operation);
    Ok(())
}

#[test]
fn raw_disk_agrees_with_model() {
    for seed in seeds(5) {
        pollster::block_on(async {
            let disk = Raw::create(MemoryStorage::new(), SIZE).await.unwrap();
            let mut model = ModelDisk::new(RULES, SIZE, None);
            let mut operations = Operations::new(seed, MENU);
            for step in 0..300 {
                let operation = operations.next(SIZE);
                let result = run(&disk, &mut model, &operation).await;
                result.unwrap_or_else(|e| panic!("seed {seed} step {step} {operation:?}: {e}"));
            }
            model.verify(&disk).await.unwrap();
        });
    }
}

#[test]
fn one_wrong_byte_is_found() {
    pollster::block_on(async {
        let disk = Raw::create(MemoryStorage::new(), SIZE).await.unwrap();
        let model = ModelDisk::new(RULES, SIZE, None);
        model.verify(&disk).await.unwrap();
        let place = lacuna::units::GuestOffset(777_777);
        disk.write(place, Buffer::from(&[1][..]), WriteFlags::empty()).await.0.unwrap();
        assert!(model.verify(&disk).await.unwrap_err().contains("0xbde31"));
    });
}

#[test]
fn forgotten_discard_and_resurrected_bytes_are_found() {
    let mut model = ModelDisk::new(RULES, SIZE, None);
    let range = GuestRange::new(lacuna::units::GuestOffset(4096), 4096);
    let write = Operation::Write { range, seed: 1, flags: WriteFlags::empty() };
    model.apply(&write);
    let old = model.bytes(range);
    assert!(model.settle_discard(range, DiscardMode::Guest, &old).is_err());
    let half = GuestRange::new(range.start, 2048);
    model.settle_discard(half, DiscardMode::Guest, &old[..2048]).unwrap();
    assert!(model.settle_discard(half, DiscardMode::Guest, &[0xee; 2048]).is_err());
}
