//! What every storage must do: one check per sentence of the contract.
//!
//! Always: a check works on a fresh object and leaves nothing behind.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use lacuna::ErrorKind;
use lacuna::buffer::{Buffer, Hold, Release};
use lacuna::storage::{Capability, HostStatus, Storage, ZeroMode};
use lacuna::units::{HostOffset, HostRange};
use pollster::block_on;

use crate::{Random, seeds};

/// Runs every check; `make` returns a new, empty, writable object each time.
///
/// ```
/// testkit::storage_conformance(lacuna::storage::MemoryStorage::new);
/// ```
///
/// # Panics
/// If the storage breaks its contract.
pub fn storage_conformance<S: Storage>(make: impl Fn() -> S) {
    let checks: [fn(&S); 17] = [
        a_fresh_object_is_empty,
        a_read_past_the_end_gives_zeros,
        a_write_extends_and_the_gap_reads_as_zeros,
        a_buffer_at_any_address_and_offset_will_do,
        the_buffer_comes_back_with_its_hold,
        zeroing_zeroes_and_extends,
        changes_let_go_of_their_hold,
        punching_zeroes_and_keeps_the_length,
        reserving_changes_no_byte,
        setting_the_length_cuts_and_adds_zeros,
        flushing_works,
        many_calls_on_one_thread_all_come_back,
        past_the_end_everything_is_a_hole,
        data_not_yet_flushed_is_never_called_zero,
        overlapping_writes_leave_whole_sectors,
        neighbours_in_a_sector_keep_each_others_bytes,
        dropped_calls_let_go_in_the_end_and_harm_nothing_else,
    ];
    for check in checks {
        check(&make());
    }
    for seed in seeds(8) {
        random_calls_agree_with_a_model(&make(), seed);
    }
}

fn at(start: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(start), len)
}

fn write(storage: &impl Storage, offset: u64, bytes: &[u8]) {
    let (result, buffer) = block_on(storage.write_at(HostOffset(offset), Buffer::from(bytes)));
    result.expect("the object can be written");
    assert_eq!(&*buffer, bytes, "a write changed its buffer");
}

fn read(storage: &impl Storage, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = Buffer::new(len);
    buffer.fill(0xee);
    let (result, buffer) = block_on(storage.read_at(HostOffset(offset), buffer));
    result.expect("the object can be read");
    assert_eq!(buffer.len(), len, "a read changed the length of its buffer");
    buffer.to_vec()
}

fn zero(storage: &impl Storage, range: HostRange, mode: ZeroMode) {
    block_on(storage.write_zeroes_at(range, mode, Hold::none())).expect("a range can be zeroed");
}

fn len(storage: &impl Storage) -> u64 {
    block_on(storage.len()).expect("the object has a length")
}

/// Punches, where the storage can; says whether it did.
fn punch(storage: &impl Storage, range: HostRange) -> bool {
    let result = block_on(storage.punch_hole_at(range, Hold::none()));
    match storage.capabilities().punch_hole {
        Capability::Unsupported => {
            let error = result.expect_err("what cannot punch must say so");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            false
        }
        _ => {
            result.expect("the object can be punched");
            true
        }
    }
}

/// Reserves, where the storage can; the length may grow to the end of the range, no further.
fn reserve(storage: &impl Storage, range: HostRange) {
    let before = len(storage);
    if let Err(error) = block_on(storage.allocate_at(range)) {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    let after = len(storage);
    assert!(after == before || after == before.max(range.end().0), "{before} became {after}");
}

/// Tells the check when it is released.
struct Told(Sender<u64>);

impl Release for Told {
    fn release(&self, token: u64) {
        // A check that has failed no longer listens.
        self.0.send(token).ok();
    }
}

fn told() -> (Arc<Told>, Receiver<u64>) {
    let (sender, receiver) = channel();
    (Arc::new(Told(sender)), receiver)
}

fn a_fresh_object_is_empty<S: Storage>(storage: &S) {
    assert_eq!(len(storage), 0);
    assert!(block_on(storage.is_empty()).expect("it knows"));
    let capabilities = storage.capabilities();
    assert!(capabilities.writable);
    assert!(capabilities.preferred_alignment_bytes.is_power_of_two());
    write(storage, 0, b"x");
    assert!(!block_on(storage.is_empty()).expect("it knows"));
}

fn a_read_past_the_end_gives_zeros<S: Storage>(storage: &S) {
    assert_eq!(read(storage, 0, 10), [0; 10]);
    write(storage, 0, b"abc");
    assert_eq!(read(storage, 1, 4), *b"bc\0\0");
    assert_eq!(read(storage, 3, 5000), [0; 5000]);
    assert_eq!(read(storage, 1 << 40, 4096), [0; 4096]);
    assert_eq!(len(storage), 3, "a read changed the length");
}

fn a_write_extends_and_the_gap_reads_as_zeros<S: Storage>(storage: &S) {
    write(storage, 10_000, b"abc");
    assert_eq!(len(storage), 10_003);
    assert_eq!(read(storage, 0, 10_000), [0; 10_000]);
    assert_eq!(read(storage, 10_000, 3), *b"abc");
    write(storage, 5000, b"d");
    assert_eq!(len(storage), 10_003, "a write inside changed the length");
    write(storage, 12_288, &[7; 4096]);
    assert_eq!(len(storage), 16_384);
    assert_eq!(read(storage, 10_003, 2285), [0; 2285]);
}

fn a_buffer_at_any_address_and_offset_will_do<S: Storage>(storage: &S) {
    for (offset, skew, size) in
        [(0, 1, 4096), (512, 3, 512), (4096, 512, 8192), (777, 0, 4096), (1, 1, 3 << 20)]
    {
        let bytes: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
        let mut buffer = Buffer::new(skew + size).split_off(skew);
        buffer.copy_from_slice(&bytes);
        let (result, mut buffer) = block_on(storage.write_at(HostOffset(offset), buffer));
        result.expect("the object can be written");
        buffer.fill(0);
        let (result, buffer) = block_on(storage.read_at(HostOffset(offset), buffer));
        result.expect("the object can be read");
        assert!(*buffer == *bytes, "{size} bytes at {offset}, skewed by {skew}");
    }
}

fn the_buffer_comes_back_with_its_hold<S: Storage>(storage: &S) {
    let (owner, released) = told();
    for (token, size) in [(1, 4096), (2, 100)] {
        let mut buffer = Buffer::zeroed(size);
        buffer.set_hold(Hold::new(owner.clone(), token));
        let (result, buffer) = block_on(storage.write_at(HostOffset(0), buffer));
        result.expect("the object can be written");
        let (result, mut buffer) = block_on(storage.read_at(HostOffset(50), buffer));
        result.expect("the object can be read");
        assert!(released.try_recv().is_err(), "the hold got lost on the way");
        drop(buffer.take_hold());
        assert_eq!(released.try_recv(), Ok(token));
    }
}

fn zeroing_zeroes_and_extends<S: Storage>(storage: &S) {
    for mode in [ZeroMode::Allocate, ZeroMode::MayUnmap] {
        block_on(storage.set_len(0, Hold::none())).expect("the length can be set");
        write(storage, 0, &[7; 20_000]);
        zero(storage, at(100, 12_300), mode);
        assert_eq!(read(storage, 0, 100), [7; 100]);
        assert_eq!(read(storage, 100, 12_300), [0; 12_300]);
        assert_eq!(read(storage, 12_400, 7600), [7; 7600]);
        assert_eq!(len(storage), 20_000, "zeroing inside changed the length");
        zero(storage, at(19_000, 3000), mode);
        assert_eq!(len(storage), 22_000);
        zero(storage, at(30_000, 100), mode);
        assert_eq!(len(storage), 30_100);
        assert_eq!(read(storage, 19_000, 11_100), [0; 11_100]);
        assert_eq!(read(storage, 18_999, 1), [7]);
    }
}

fn changes_let_go_of_their_hold<S: Storage>(storage: &S) {
    let (owner, released) = told();
    write(storage, 0, &[7; 8192]);
    let hold = Hold::new(owner.clone(), 1);
    block_on(storage.write_zeroes_at(at(10, 5000), ZeroMode::MayUnmap, hold)).expect("zeroes");
    assert_eq!(released.try_recv(), Ok(1));
    let hold = Hold::new(owner.clone(), 2);
    // Whether it can or not.
    block_on(storage.punch_hole_at(at(0, 4096), hold)).ok();
    assert_eq!(released.try_recv(), Ok(2));
    block_on(storage.set_len(5000, Hold::new(owner, 3))).expect("the length can be set");
    assert_eq!(released.try_recv(), Ok(3));
}

fn punching_zeroes_and_keeps_the_length<S: Storage>(storage: &S) {
    write(storage, 0, &[7; 20_000]);
    if !punch(storage, at(4000, 9000)) {
        return;
    }
    assert_eq!(read(storage, 0, 4000), [7; 4000]);
    assert_eq!(read(storage, 4000, 9000), [0; 9000]);
    assert_eq!(read(storage, 13_000, 7000), [7; 7000]);
    punch(storage, at(19_000, 50_000));
    punch(storage, at(100_000, 4096));
    assert_eq!(len(storage), 20_000);
    assert_eq!(read(storage, 19_000, 1000), [0; 1000]);
}

fn reserving_changes_no_byte<S: Storage>(storage: &S) {
    write(storage, 5000, &[7; 1000]);
    reserve(storage, at(0, 100_000));
    reserve(storage, at(5100, 10));
    assert_eq!(read(storage, 0, 5000), [0; 5000]);
    assert_eq!(read(storage, 5000, 1000), [7; 1000]);
    assert_eq!(read(storage, 6000, 94_000), [0; 94_000]);
}

fn setting_the_length_cuts_and_adds_zeros<S: Storage>(storage: &S) {
    write(storage, 0, &[7; 10_000]);
    block_on(storage.set_len(5001, Hold::none())).expect("the length can be set");
    assert_eq!(len(storage), 5001);
    assert_eq!(read(storage, 5000, 10), [7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    block_on(storage.set_len(10_000, Hold::none())).expect("the length can be set");
    assert_eq!(len(storage), 10_000);
    assert_eq!(read(storage, 5001, 4999), [0; 4999], "what was cut came back");
    assert_eq!(read(storage, 0, 5001), [7; 5001]);
}

fn flushing_works<S: Storage>(storage: &S) {
    block_on(storage.flush()).expect("an empty object can be flushed");
    write(storage, 0, &[7; 10_000]);
    block_on(storage.flush()).expect("a full one too");
    assert_eq!(read(storage, 0, 10_000), [7; 10_000]);
}

fn many_calls_on_one_thread_all_come_back<S: Storage>(storage: &S) {
    const CALLS: u64 = 300;
    let writes = (0..CALLS).map(|n| {
        let bytes = Buffer::from(&[n as u8; 1000][..]);
        storage.write_at(HostOffset(n * 1000), bytes)
    });
    for (result, _) in all(writes) {
        result.expect("the object can be written");
    }
    let reads = (0..CALLS).map(|n| storage.read_at(HostOffset(n * 1000), Buffer::new(1000)));
    for (n, (result, buffer)) in all(reads).into_iter().enumerate() {
        result.expect("the object can be read");
        assert!(buffer.iter().all(|byte| *byte == n as u8), "call {n} has other bytes");
    }
}

/// Has all futures under way at once, and returns what they return.
fn all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(|future| Some(Box::pin(future))).collect();
    let mut outputs: Vec<_> = waiting.iter().map(|_| None).collect();
    block_on(poll_fn(|context| {
        for (future, output) in waiting.iter_mut().zip(&mut outputs) {
            let polled = future.as_mut().map(|future| future.as_mut().poll(context));
            if let Some(Poll::Ready(value)) = polled {
                (*future, *output) = (None, Some(value));
            }
        }
        if waiting.iter().all(Option::is_none) { Poll::Ready(()) } else { Poll::Pending }
    }));
    outputs.into_iter().map(|output| output.expect("all are ready")).collect()
}

fn past_the_end_everything_is_a_hole<S: Storage>(storage: &S) {
    let hole = |range| {
        let extent = block_on(storage.status_at(range)).expect("it has a status");
        assert_eq!(extent.status, HostStatus::Hole, "at {range:?}");
        assert!((1..=range.len).contains(&extent.len));
    };
    hole(at(0, 4096));
    write(storage, 0, &[7; 4097]);
    hole(at(8192, 1 << 40));
    hole(at(1 << 40, 1));
    let data = block_on(storage.status_at(at(4096, 1))).expect("it has a status");
    assert_eq!(data.status, HostStatus::Data);
    assert_eq!(data.len, 1);
}

fn data_not_yet_flushed_is_never_called_zero<S: Storage>(storage: &S) {
    let piece: usize = 4096;
    reserve(storage, at(0, 64 * 4096));
    for page in [3, 4, 9, 40, 63] {
        write(storage, page * 4096, &vec![7; piece]);
    }
    // A read brings pages of the reserved range into a cache, where there is one.
    read(storage, 0, 64 * piece);
    write(storage, 20 * 4096 + 100, b"x");
    check_status(storage, 0, 64 * 4096);
    block_on(storage.flush()).expect("it can be flushed");
    check_status(storage, 0, 64 * 4096);
}

/// Walks over the extents of a range and reads what they call zero.
fn check_status(storage: &impl Storage, start: u64, len: u64) {
    let (mut offset, end) = (start, start + len);
    while offset < end {
        let range = at(offset, end - offset);
        let extent = block_on(storage.status_at(range)).expect("it has a status");
        assert!((1..=range.len).contains(&extent.len), "{extent:?} for {range:?}");
        if extent.status.reads_zero() {
            let bytes = read(storage, offset, extent.len as usize);
            assert!(bytes.iter().all(|byte| *byte == 0), "{extent:?} at {offset} has data");
        }
        offset += extent.len;
    }
}

fn overlapping_writes_leave_whole_sectors<S: Storage>(storage: &S) {
    const SECTOR: usize = 512;
    write(storage, 0, &[0; 64 * SECTOR]);
    std::thread::scope(|scope| {
        for writer in 1..=4u8 {
            scope.spawn(move || {
                let mut random = Random::new(writer.into());
                for _ in 0..25 {
                    let (first, count) = (random.below(32), 1 + random.index(32));
                    write(storage, first * SECTOR as u64, &vec![writer; count * SECTOR]);
                }
            });
        }
    });
    for (index, sector) in read(storage, 0, 64 * SECTOR).chunks(SECTOR).enumerate() {
        assert!(sector.iter().all(|byte| *byte == sector[0]), "sector {index} is torn");
    }
}

fn neighbours_in_a_sector_keep_each_others_bytes<S: Storage>(storage: &S) {
    const SLICE: u64 = 100;
    const WRITERS: u64 = 6;
    const ROUNDS: u64 = 20;
    // Where the farthest write that began ends. Half of a write in flight may show (tmpfs moves
    // the end page by page), but nothing beyond it.
    let farthest = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let slice = round * WRITERS + writer;
                    farthest.fetch_max((slice + 1) * SLICE, Ordering::SeqCst);
                    write(storage, slice * SLICE, &[slice as u8 + 1; SLICE as usize]);
                    let end = len(storage);
                    let farthest = farthest.load(Ordering::SeqCst);
                    assert!(end <= farthest, "a padded tail shows: {end} bytes of {farthest}");
                }
            });
        }
    });
    assert_eq!(len(storage), ROUNDS * WRITERS * SLICE);
    let bytes = read(storage, 0, (ROUNDS * WRITERS * SLICE) as usize);
    for (slice, bytes) in bytes.chunks(SLICE as usize).enumerate() {
        assert!(bytes.iter().all(|byte| *byte == slice as u8 + 1), "slice {slice} got lost");
    }
}

/// Polls a future once and drops it.
fn start_and_drop(future: impl Future) {
    let mut context = Context::from_waker(Waker::noop());
    // Whether it is done already does not matter here.
    if let Poll::Ready(output) = pin!(future).poll(&mut context) {
        drop(output);
    }
}

fn dropped_calls_let_go_in_the_end_and_harm_nothing_else<S: Storage>(storage: &S) {
    write(storage, 0, &[7; 60_000]);
    let (owner, released) = told();
    let hold = |token| Hold::new(owner.clone(), token);
    let buffer = |token, size| {
        let mut buffer = Buffer::new(size);
        buffer.fill(8);
        buffer.set_hold(hold(token));
        buffer
    };
    start_and_drop(storage.read_at(HostOffset(0), buffer(1, 8192)));
    start_and_drop(storage.read_at(HostOffset(1), buffer(2, 5000)));
    start_and_drop(storage.write_at(HostOffset(4096), buffer(3, 4096)));
    start_and_drop(storage.write_at(HostOffset(10_000), buffer(4, 3000)));
    let zeroes = storage.write_zeroes_at(at(20_000, 5000), ZeroMode::Allocate, hold(5));
    start_and_drop(zeroes);
    start_and_drop(storage.punch_hole_at(at(30_000, 5000), hold(6)));
    start_and_drop(storage.set_len(60_000, hold(7)));
    start_and_drop(storage.flush());
    start_and_drop(storage.status_at(at(0, 60_000)));
    for _ in 0..7 {
        // Bounds a failing check, and nothing else.
        released.recv_timeout(Duration::from_secs(60)).expect("every hold is released");
    }
    let bytes = read(storage, 0, 60_000);
    let kept = |range: std::ops::Range<usize>, other: u8| {
        assert!(bytes[range].iter().all(|byte| *byte == 7 || *byte == other));
    };
    kept(0..4096, 7);
    kept(4096..8192, 8);
    kept(8192..10_000, 7);
    kept(10_000..13_000, 8);
    kept(13_000..20_000, 7);
    kept(20_000..25_000, 0);
    kept(25_000..30_000, 7);
    kept(30_000..35_000, 0);
    kept(35_000..60_000, 7);
    assert_eq!(len(storage), 60_000);
}

const MODEL_BYTES: u64 = 200_000;

fn random_calls_agree_with_a_model<S: Storage>(storage: &S, seed: u64) {
    let mut random = Random::new(seed);
    let mut model: Vec<u8> = Vec::new();
    for step in 0..150 {
        random_call(storage, &mut model, &mut random);
        assert_eq!(len(storage), model.len() as u64, "seed {seed}, step {step}");
        if random.one_in(4) {
            let bytes = read(storage, 0, MODEL_BYTES as usize);
            let (inside, past) = bytes.split_at(model.len().min(bytes.len()));
            assert!(inside == model, "seed {seed}, step {step}: other bytes than the model");
            assert!(past.iter().all(|byte| *byte == 0), "seed {seed}, step {step}: past the end");
            check_status(storage, 0, MODEL_BYTES);
        }
    }
}

/// An offset and length inside the model's space, aligned to something.
fn random_range(random: &mut Random) -> HostRange {
    let unit = *random.pick(&[1, 512, 4096, 4096, 65_536]);
    let start = random.below(MODEL_BYTES / unit) * unit;
    let most = (MODEL_BYTES - start).min(40_000).div_ceil(unit);
    let len = ((1 + random.below(most)) * unit).min(MODEL_BYTES - start);
    at(start, len)
}

fn random_call<S: Storage>(storage: &S, model: &mut Vec<u8>, random: &mut Random) {
    let range = random_range(random);
    let fill = |model: &mut Vec<u8>, byte: u8| {
        let (start, end) = (range.start.0 as usize, range.end().0 as usize);
        model.resize(model.len().max(end), 0);
        model[start..end].fill(byte);
    };
    match random.below(10) {
        0..5 => {
            let byte = random.next() as u8;
            write(storage, range.start.0, &vec![byte; range.len as usize]);
            fill(model, byte);
        }
        5 | 6 => {
            let mode = *random.pick(&[ZeroMode::Allocate, ZeroMode::MayUnmap]);
            zero(storage, range, mode);
            fill(model, 0);
        }
        7 => {
            if punch(storage, range) {
                let len = model.len();
                fill(model, 0);
                model.truncate(len);
            }
        }
        8 => {
            reserve(storage, range);
            model.resize(len(storage) as usize, 0);
        }
        _ => {
            block_on(storage.set_len(range.end().0, Hold::none())).expect("the length can be set");
            model.resize(range.end().0 as usize, 0);
        }
    }
}
