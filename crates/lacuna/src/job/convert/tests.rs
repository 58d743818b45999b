//! Conversions between disks in memory; those with foreign tools are in `tests/convert.rs`.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use pollster::block_on;

use super::*;
use crate::ErrorKind;
use crate::block::{DiscardMode, Extent, KnownZeroes, WriteFlags, ZeroFlags};
use crate::buffer::Buffer;
use crate::job::{CompareOptions, compare};
use crate::raw::Raw;
use crate::storage::{MemoryStorage, Transfer};
use crate::units::{GuestOffset, GuestRange};

fn disk(size: u64, writes: &[(u64, &[u8])]) -> Raw<MemoryStorage> {
    let disk = block_on(Raw::create(MemoryStorage::new(), size)).unwrap();
    for (offset, bytes) in writes {
        let buffer = Buffer::from(*bytes);
        block_on(disk.write(GuestOffset(*offset), buffer, WriteFlags::empty())).0.unwrap();
    }
    disk
}

fn identical(left: &Raw<MemoryStorage>, right: &Raw<MemoryStorage>) -> bool {
    let found = block_on(compare(left, right, CompareOptions::default(), &mut |_, _| ())).unwrap();
    found.is_identical() && !found.sizes_differ
}

/// Zeros, data, and data of the sizes that straddle requests.
fn mixed() -> Raw<MemoryStorage> {
    let data: Vec<u8> = (0..5 << 20).map(|index: u32| (index >> 9) as u8 | 1).collect();
    disk(64 << 20, &[(1 << 20, &data), (20 << 20, &[0; 1 << 20]), (40_000_001, &data[..70_001])])
}

#[test]
fn every_kind_of_conversion_copies_every_byte() {
    let source = mixed();
    let garbage: Vec<u8> = vec![0xee; 64 << 20];
    for content in [TargetContent::Zero, TargetContent::Unknown] {
        for order in [WriteOrder::Guest, WriteOrder::Any] {
            for sparse_bytes in [0, 512, 4096, 65536, 12288] {
                let dirty = content == TargetContent::Unknown;
                let before = if dirty { &garbage[..] } else { &[] };
                let target = disk(64 << 20, &[(0, before)]);
                let options = ConvertOptions { content, order, sparse_bytes, ..Default::default() };
                let copied = block_on(convert(&source, &target, &options, &mut |_| ())).unwrap();
                assert_eq!(copied.total(), 64 << 20);
                assert!(identical(&source, &target), "{options:?}");
            }
        }
    }
}

#[test]
fn zeros_in_data_take_no_space_in_a_fresh_target() {
    let source = disk(4 << 20, &[(0, &[0; 1 << 20]), (65536, b"x")]);
    let target = disk(4 << 20, &[]);
    let options = ConvertOptions { content: TargetContent::Zero, ..Default::default() };
    let copied = block_on(convert(&source, &target, &options, &mut |_| ())).unwrap();
    assert_eq!(copied.written_bytes, 4096);
    assert_eq!(copied.zeroed_bytes, 0);
    let extents = block_on(target.extents(target.whole())).unwrap();
    let data: u64 = extents.iter().filter(|e| !e.status.reads_zero).map(|e| e.range.len).sum();
    assert_eq!(data, 4096);
}

#[test]
fn a_copy_may_move_between_threads() {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let (source, target, options) = (mixed(), disk(64 << 20, &[]), ConvertOptions::default());
    let mut report = |_| ();
    block_on(is_send(convert(&source, &target, &options, &mut report))).unwrap();
}

#[test]
fn progress_rises_and_ends_with_a_flush() {
    let (source, target) = (mixed(), disk(64 << 20, &[]));
    let mut seen = Vec::new();
    let options = ConvertOptions::default();
    block_on(convert(&source, &target, &options, &mut |progress| seen.push(progress))).unwrap();
    assert!(seen.iter().map(|progress| progress.done_bytes).is_sorted());
    let last = seen.last().unwrap();
    let written_bytes = last.written_bytes;
    assert!((5 << 20..6 << 20).contains(&written_bytes), "{written_bytes}");
    let (done_bytes, total_bytes) = (64 << 20, 64 << 20);
    assert_eq!(*last, Progress { phase: Phase::Flush, done_bytes, total_bytes, written_bytes });
}

#[test]
fn a_shorter_target_and_a_raw_target_for_compression_are_refused() {
    let (source, target) = (disk(8192, &[]), disk(4096, &[]));
    let options = ConvertOptions::default();
    let error = block_on(convert(&source, &target, &options, &mut |_| ())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    let options = ConvertOptions { encoding: Encoding::Compressed, ..options };
    let error = block_on(convert(&target, &source, &options, &mut |_| ())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
}

/// A source that yields once in each read, counts reads, and fails one of them.
struct Slow {
    below: Raw<MemoryStorage>,
    running: AtomicUsize,
    most: AtomicUsize,
    reads: AtomicUsize,
    fail_at: Option<usize>,
}

impl Slow {
    fn new(below: Raw<MemoryStorage>, fail_at: Option<usize>) -> Self {
        Self {
            below,
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
            fail_at,
        }
    }
}

async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        context.waker().wake_by_ref();
        if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

impl Layer for Slow {
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }

    fn zero_unit_bytes(&self) -> u64 {
        512
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        Ok(KnownZeroes::NOTHING)
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let number = self.reads.fetch_add(1, Ordering::Relaxed);
        let running = self.running.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(running, Ordering::Relaxed);
        yield_once().await;
        self.running.fetch_sub(1, Ordering::Relaxed);
        match self.fail_at == Some(number) {
            true => (Err(Error::new(ErrorKind::Io, "Read failed as told")), buffer),
            false => self.below.read(offset, buffer).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        unreachable!("a source is not flushed")
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.below.extents(range).await
    }
}

#[test]
fn reads_run_ahead_up_to_the_bound() {
    for in_flight in [0, 1, 4] {
        let source = Slow::new(disk(64 << 20, &[(0, &[1; 32 << 20])]), None);
        let target = disk(64 << 20, &[]);
        let options = ConvertOptions { in_flight, ..Default::default() };
        block_on(convert(&source, &target, &options, &mut |_| ())).unwrap();
        assert_eq!(source.most.into_inner(), in_flight.max(1));
        assert!(identical(&source.below, &target));
    }
}

#[test]
fn known_zeros_are_never_read() {
    let source = Slow::new(disk(1 << 40, &[(1 << 30, &[1; 4096])]), None);
    let target = disk(1 << 40, &[]);
    let options = ConvertOptions { content: TargetContent::Zero, ..Default::default() };
    block_on(convert(&source, &target, &options, &mut |_| ())).unwrap();
    assert_eq!(source.reads.into_inner(), 1);
}

/// A disk that knows to be all zeros, and may be asked for nothing else.
struct AllZero(u64);

impl Layer for AllZero {
    fn size_bytes(&self) -> u64 {
        self.0
    }

    fn zero_unit_bytes(&self) -> u64 {
        512
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        Ok(KnownZeroes { create: true, truncate: true, open: true })
    }

    fn is_read_only(&self) -> bool {
        false
    }

    async fn read(&self, _: GuestOffset, _: Buffer) -> Transfer {
        unreachable!("known zeros are not read")
    }

    async fn write(&self, _: GuestOffset, _: Buffer, _: WriteFlags) -> Transfer {
        unreachable!("zeros are not written over zeros")
    }

    async fn write_zeroes(&self, _: GuestRange, _: ZeroFlags) -> Result<()> {
        unreachable!("zeros are not made of zeros")
    }

    async fn discard(&self, _: GuestRange, _: DiscardMode) -> Result<()> {
        unreachable!("a copy discards nothing")
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn extents(&self, _: GuestRange) -> Result<Vec<Extent>> {
        unreachable!("known zeros are not looked for")
    }
}

impl Target for AllZero {
    fn encoder(&self) -> Option<crate::qcow2::Encoder> {
        None
    }

    async fn write_encoded(
        &self,
        _: GuestOffset,
        _: Buffer,
        _: Option<crate::qcow2::Stream>,
    ) -> Transfer {
        unreachable!("zeros are not written over zeros")
    }
}

/// 000-15: from zeros to zeros, however large.
#[test]
fn a_copy_between_disks_known_to_be_zero_asks_neither_for_an_extent() {
    let (source, target) = (AllZero(1 << 50), AllZero(1 << 50));
    let copied = block_on(convert(&source, &target, &ConvertOptions::default(), &mut |_| ()));
    assert_eq!(copied.unwrap().skipped_bytes, 1 << 50);
}

#[test]
fn a_source_known_to_be_zero_makes_zeros_of_the_target() {
    let target = disk(64 << 20, &[(5 << 20, &[1; 4096])]);
    let options = ConvertOptions::default();
    let copied = block_on(convert(&AllZero(64 << 20), &target, &options, &mut |_| ())).unwrap();
    assert!(copied.zeroed_bytes > 0 && copied.written_bytes == 0, "{copied:?}");
    assert!(identical(&target, &disk(64 << 20, &[])));
}

#[test]
fn a_failed_read_ends_the_copy_with_its_error() {
    for order in [WriteOrder::Guest, WriteOrder::Any] {
        let source = Slow::new(mixed(), Some(2));
        let target = disk(64 << 20, &[]);
        let options = ConvertOptions { order, ..Default::default() };
        let error = block_on(convert(&source, &target, &options, &mut |_| ())).unwrap_err();
        assert!(error.message().ends_with(": Read failed as told"), "{error}");
        let failure = CopyFailure::of(&error).unwrap();
        assert_eq!(failure.step, CopyStep::Read);
    }
}

#[test]
fn a_copy_dropped_at_any_await_can_be_done_again() {
    let source = Slow::new(mixed(), None);
    let target = disk(64 << 20, &[]);
    let options = ConvertOptions::default();
    for polls in 0.. {
        let mut report = |_| ();
        let mut copy = pin!(convert(&source, &target, &options, &mut report));
        let mut context = Context::from_waker(Waker::noop());
        if (0..polls).any(|_| copy.as_mut().poll(&mut context).is_ready()) {
            break;
        }
    }
    assert!(identical(&source.below, &target));
}
