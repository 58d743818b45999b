//! Jobs can be dropped between their steps, also where storage never has them wait.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{ConvertOptions, RebaseOptions, convert, rebase, sweep};
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
use lacuna::raw::Raw;
use lacuna::storage::MemoryStorage;
use lacuna::units::GuestOffset;
use pollster::block_on;

const SIZE_BYTES: u64 = 16 << 20;

async fn filled(disk: &impl Layer, byte: u8) {
    let bytes = Buffer::from(&vec![byte; SIZE_BYTES as usize][..]);
    disk.write(GuestOffset(0), bytes, WriteFlags::empty()).await.0.unwrap();
}

async fn image(backing: Option<Raw<MemoryStorage>>) -> Image<Arc<MemoryStorage>> {
    let storage = Arc::new(MemoryStorage::new());
    let options = CreateOptions { size_bytes: SIZE_BYTES, ..CreateOptions::default() };
    create(&storage, &options).await.unwrap();
    let backing = backing.map(|disk| Arc::new(disk) as Arc<_>);
    let parts = Parts { storage, data: None, backing };
    Image::open(parts, OpenOptions::new(Access::ReadWrite)).await.unwrap()
}

async fn disk(byte: u8) -> Raw<MemoryStorage> {
    let disk = Raw::create(MemoryStorage::new(), SIZE_BYTES).await.unwrap();
    filled(&disk, byte).await;
    disk
}

/// Polls once: the job is not over then.
fn begin<T>(job: impl Future<Output = T>) {
    let mut context = Context::from_waker(Waker::noop());
    assert!(pin!(job).poll(&mut context).is_pending(), "it ran to its end in one go");
}

#[test]
fn a_sweep_yields() {
    let image = block_on(image(None));
    block_on(filled(&image, 0));
    begin(sweep(&image, &mut |_| {}));
    assert!(block_on(sweep(&image, &mut |_| {})).unwrap().clusters > 0, "the rest was left");
}

#[test]
fn a_rebase_yields() {
    let image = block_on(async { image(Some(disk(7).await)).await });
    let mut reached = 0;
    let mut report = |done, _| reached = done;
    begin(rebase(image, None, &RebaseOptions::default(), &mut report));
    assert!(reached < SIZE_BYTES, "{reached}");
}

#[test]
fn a_conversion_yields() {
    let (source, target) = block_on(async { (disk(7).await, image(None).await) });
    let mut reached = 0;
    let options = ConvertOptions { in_flight: 1, ..ConvertOptions::default() };
    begin(convert(&source, &target, &options, &mut |progress| reached = progress.done_bytes));
    assert!(reached < SIZE_BYTES, "{reached}");
}
