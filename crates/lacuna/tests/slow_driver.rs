//! Calls that stay with the driver while the engine goes on, or after their caller has gone.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::{
    Access, CreateOptions, DataFileName, DiscardPolicy, GuestDiscard, Image, OpenOptions, Parts,
    Shrink, create,
};
use lacuna::storage::{Capabilities, HostExtent, MemoryStorage, Storage, Transfer, ZeroMode};
use lacuna::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use lacuna::{Error, ErrorKind, Result};
use pollster::block_on;

const CLUSTER: u64 = 65536;

/// Memory whose driver takes its time: calls of a kind that is held stay with it until
/// [`finish`](Slow::finish), whether or not their caller still waits.
#[derive(Default)]
struct Slow {
    memory: MemoryStorage,
    holds_writes: AtomicBool,
    holds_zeroes: AtomicBool,
    holds_punches: AtomicBool,
    holds_cuts: AtomicBool,
    fails_set_len: AtomicBool,
    held: Mutex<Vec<Held>>,
}

type Answer = Arc<Mutex<Option<(Option<Buffer>, Hold)>>>;

enum Call {
    Write(HostOffset, Buffer),
    Zero(HostRange, Hold),
    Cut(u64, Hold),
}

struct Held(Call, Answer);

impl Slow {
    fn hold(&self, call: Call) -> Answer {
        let answer = Answer::default();
        self.held.lock().unwrap().push(Held(call, Arc::clone(&answer)));
        answer
    }

    /// Does all that is held, and holds nothing any more.
    fn finish(&self) {
        for flag in [&self.holds_writes, &self.holds_zeroes, &self.holds_punches, &self.holds_cuts]
        {
            flag.store(false, Ordering::SeqCst);
        }
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        for Held(call, answer) in held {
            *answer.lock().unwrap() = Some(match call {
                Call::Write(offset, buffer) => {
                    let (result, buffer) = block_on(self.memory.write_at(offset, buffer));
                    result.unwrap();
                    (Some(buffer), Hold::none())
                }
                Call::Zero(range, hold) => {
                    let mode = ZeroMode::MayUnmap;
                    block_on(self.memory.write_zeroes_at(range, mode, Hold::none())).unwrap();
                    (None, hold)
                }
                Call::Cut(len, hold) => {
                    block_on(self.memory.set_len(len, Hold::none())).unwrap();
                    (None, hold)
                }
            });
        }
    }
}

async fn answered(answer: Answer) -> Option<Buffer> {
    std::future::poll_fn(|context| match answer.lock().unwrap().take() {
        Some((buffer, _hold)) => Poll::Ready(buffer),
        None => {
            // Whoever polls asks again: nobody else knows when the answer comes.
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

impl Storage for Slow {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.memory.read_at(offset, buffer).await
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        if !self.holds_writes.load(Ordering::SeqCst) {
            return self.memory.write_at(offset, buffer).await;
        }
        let answer = self.hold(Call::Write(offset, buffer));
        (Ok(()), answered(answer).await.unwrap())
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        if !self.holds_zeroes.load(Ordering::SeqCst) {
            return self.memory.write_zeroes_at(range, mode, hold).await;
        }
        let answer = self.hold(Call::Zero(range, hold));
        answered(answer).await;
        Ok(())
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        if !self.holds_punches.load(Ordering::SeqCst) {
            return self.memory.punch_hole_at(range, hold).await;
        }
        let answer = self.hold(Call::Zero(range, hold));
        answered(answer).await;
        Ok(())
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.memory.allocate_at(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.memory.flush().await
    }

    async fn len(&self) -> Result<u64> {
        self.memory.len().await
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        if self.fails_set_len.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Io, "No cut today"));
        }
        if !self.holds_cuts.load(Ordering::SeqCst) {
            return self.memory.set_len(len, hold).await;
        }
        let answer = self.hold(Call::Cut(len, hold));
        answered(answer).await;
        Ok(())
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        self.memory.status_at(range).await
    }

    fn capabilities(&self) -> Capabilities {
        self.memory.capabilities()
    }
}

type Disk = Image<Arc<Slow>>;

fn disk(options: &CreateOptions, policy: DiscardPolicy) -> (Disk, Arc<Slow>) {
    let storage = Arc::new(Slow::default());
    block_on(create(&storage, options)).unwrap();
    let open = OpenOptions::new(Access::ReadWrite).discard(policy);
    let image = block_on(Image::open(Parts::alone(Arc::clone(&storage)), open)).unwrap();
    (image, storage)
}

const KEEPS_SPACE: DiscardPolicy =
    DiscardPolicy { guest: GuestDiscard::Unmap, request: false, snapshot: false, other: false };

fn poll<T>(future: &mut Pin<Box<dyn Future<Output = T> + '_>>) -> Option<T> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn finish<T>(mut future: Pin<Box<dyn Future<Output = T> + '_>>) -> T {
    (0..1000).find_map(|_| poll(&mut future)).expect("nothing is in the way any more")
}

/// Lets the held calls end, where the future waits for them, and then it as well.
fn end_with<T>(storage: &Slow, mut future: Pin<Box<dyn Future<Output = T> + '_>>) -> T {
    match poll(&mut future) {
        Some(value) => value,
        None => {
            storage.finish();
            finish(future)
        }
    }
}

fn write(image: &Disk, offset: u64, byte: u8, len: u64) -> Result<()> {
    let bytes = Buffer::from(&vec![byte; len as usize][..]);
    block_on(image.write(GuestOffset(offset), bytes, WriteFlags::empty())).0
}

#[track_caller]
fn assert_reads(image: &Disk, offset: u64, byte: u8, len: u64) {
    let (result, bytes) = block_on(image.read(GuestOffset(offset), Buffer::new(len as usize)));
    result.unwrap();
    assert_eq!(bytes.iter().position(|it| *it != byte), None, "other bytes than {byte} there");
}

fn discard(image: &Disk, offset: u64, len: u64) {
    let range = GuestRange::new(GuestOffset(offset), len);
    block_on(image.discard(range, DiscardMode::Guest)).unwrap();
}

fn later_write<'a>(
    image: &'a Disk,
    offset: u64,
    byte: u8,
    len: u64,
) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>> {
    let bytes = Buffer::from(&vec![byte; len as usize][..]);
    Box::pin(async move { image.write(GuestOffset(offset), bytes, WriteFlags::empty()).await.0 })
}

#[test]
fn a_new_table_on_its_way_to_storage_is_not_read_from_there() {
    let options = CreateOptions { size_bytes: 2 << 30, ..CreateOptions::default() };
    let (image, storage) = disk(&options, KEEPS_SPACE);
    write(&image, 0, 0x40, CLUSTER).unwrap();
    discard(&image, 0, CLUSTER);
    block_on(image.flush()).unwrap();
    block_on(image.flush()).unwrap();
    // The table goes where these bytes were.
    write(&image, 512 << 20, 7, CLUSTER).unwrap();
    storage.holds_writes.store(true, Ordering::SeqCst);
    let mut flush: Pin<Box<dyn Future<Output = _>>> = Box::pin(image.flush());
    assert!(poll(&mut flush).is_none());
    assert_reads(&image, (512 << 20) + (64 << 20), 0, CLUSTER);
    storage.finish();
    finish(flush).unwrap();
    assert_reads(&image, (512 << 20) + (64 << 20), 0, CLUSTER);
}

#[test]
fn a_punch_left_by_a_dropped_flush_does_not_hit_the_next_owner() {
    let options = CreateOptions { size_bytes: 1 << 30, ..CreateOptions::default() };
    let (image, storage) = disk(&options, DiscardPolicy::default());
    write(&image, 0, 1, CLUSTER).unwrap();
    block_on(image.flush()).unwrap();
    discard(&image, 0, CLUSTER);
    storage.holds_punches.store(true, Ordering::SeqCst);
    let mut flush: Pin<Box<dyn Future<Output = _>>> = Box::pin(image.flush());
    assert!(poll(&mut flush).is_none());
    drop(flush);
    storage.holds_punches.store(false, Ordering::SeqCst);
    end_with(&storage, Box::pin(image.flush())).unwrap();
    write(&image, 5 * CLUSTER, 2, CLUSTER).unwrap();
    storage.finish();
    assert_reads(&image, 5 * CLUSTER, 2, CLUSTER);
}

#[test]
fn zeroing_left_by_a_dropped_write_does_not_hit_the_next_owner() {
    let large = 4 * CLUSTER;
    let options =
        CreateOptions { size_bytes: 1 << 30, cluster_bytes: large, ..CreateOptions::default() };
    let (image, storage) = disk(&options, KEEPS_SPACE);
    write(&image, 0, 1, large).unwrap();
    discard(&image, 0, large);
    block_on(image.flush()).unwrap();
    block_on(image.flush()).unwrap();
    storage.holds_zeroes.store(true, Ordering::SeqCst);
    let mut dropped = later_write(&image, large, 2, 512);
    assert!(poll(&mut dropped).is_none());
    drop(dropped);
    storage.holds_zeroes.store(false, Ordering::SeqCst);
    block_on(image.flush()).unwrap();
    block_on(image.flush()).unwrap();
    write(&image, 2 * large, 3, large).unwrap();
    storage.finish();
    assert_reads(&image, 2 * large, 3, large);
}

#[test]
fn a_dropped_write_does_not_come_after_a_later_one() {
    let options = CreateOptions { size_bytes: 1 << 30, ..CreateOptions::default() };
    let (image, storage) = disk(&options, DiscardPolicy::default());
    write(&image, 0, 1, CLUSTER).unwrap();
    storage.holds_writes.store(true, Ordering::SeqCst);
    let mut dropped = later_write(&image, 0, 2, 512);
    assert!(poll(&mut dropped).is_none());
    drop(dropped);
    storage.holds_writes.store(false, Ordering::SeqCst);
    end_with(&storage, later_write(&image, 0, 3, 4096)).unwrap();
    storage.finish();
    assert_reads(&image, 0, 3, 4096);
}

#[test]
fn dropped_zeroing_of_a_raw_data_file_does_not_come_after_a_later_write() {
    let storage = Arc::new(Slow::default());
    let data = Arc::new(Slow::default());
    let options = CreateOptions {
        size_bytes: 1 << 30,
        data_file: Some(DataFileName { name: "data".to_owned(), raw: true }),
        ..CreateOptions::default()
    };
    block_on(create(&storage, &options)).unwrap();
    let parts = Parts { storage, data: Some(Arc::clone(&data)), backing: None };
    let image = block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap();
    data.holds_zeroes.store(true, Ordering::SeqCst);
    let range = GuestRange::new(GuestOffset(0), CLUSTER);
    let mut dropped: Pin<Box<dyn Future<Output = _>>> =
        Box::pin(image.write_zeroes(range, ZeroFlags::MAY_UNMAP));
    assert!(poll(&mut dropped).is_none());
    drop(dropped);
    data.holds_zeroes.store(false, Ordering::SeqCst);
    end_with(&data, later_write(&image, 0, 3, CLUSTER)).unwrap();
    data.finish();
    assert_reads(&image, 0, 3, CLUSTER);
}

#[test]
fn bytes_that_a_failed_cut_left_in_the_file_do_not_show() {
    let options = CreateOptions { size_bytes: 8 * CLUSTER, ..CreateOptions::default() };
    let (image, storage) = disk(&options, KEEPS_SPACE);
    write(&image, 0, 1, 8 * CLUSTER).unwrap();
    block_on(image.flush()).unwrap();
    storage.fails_set_len.store(true, Ordering::SeqCst);
    block_on(image.resize(CLUSTER, Shrink::Allow)).unwrap_err();
    block_on(image.resize(8 * CLUSTER, Shrink::Refuse)).unwrap();
    write(&image, 4 * CLUSTER, 2, 512).unwrap();
    assert_reads(&image, 4 * CLUSTER, 2, 512);
    assert_reads(&image, 4 * CLUSTER + 512, 0, CLUSTER - 512);
}

#[test]
fn a_dropped_cut_of_the_file_does_not_take_what_is_written_later() {
    let options = CreateOptions { size_bytes: 8 * CLUSTER, ..CreateOptions::default() };
    let (image, storage) = disk(&options, DiscardPolicy::default());
    write(&image, 0, 1, 8 * CLUSTER).unwrap();
    shrink_and_drop(&image, &storage);
    let grow: Pin<Box<dyn Future<Output = _>>> =
        Box::pin(image.resize(8 * CLUSTER, Shrink::Refuse));
    end_with(&storage, grow).unwrap();
    end_with(&storage, later_write(&image, CLUSTER, 2, 7 * CLUSTER)).unwrap();
    storage.finish();
    assert_reads(&image, 0, 1, CLUSTER);
    assert_reads(&image, CLUSTER, 2, 7 * CLUSTER);
    // Nor does the pause outlast the cut.
    block_on(image.flush()).unwrap();
    block_on(image.resize(CLUSTER, Shrink::Allow)).unwrap();
}

#[test]
fn a_dropped_cut_of_the_data_file_does_not_take_what_is_written_later() {
    let (storage, data) = (Arc::new(Slow::default()), Arc::new(Slow::default()));
    let options = CreateOptions {
        size_bytes: 8 * CLUSTER,
        data_file: Some(DataFileName { name: "data".to_owned(), raw: false }),
        ..CreateOptions::default()
    };
    block_on(create(&storage, &options)).unwrap();
    let parts = Parts { storage, data: Some(Arc::clone(&data)), backing: None };
    let image = block_on(Image::open(parts, OpenOptions::new(Access::ReadWrite))).unwrap();
    write(&image, 0, 1, 8 * CLUSTER).unwrap();
    shrink_and_drop(&image, &data);
    let grow: Pin<Box<dyn Future<Output = _>>> =
        Box::pin(image.resize(8 * CLUSTER, Shrink::Refuse));
    end_with(&data, grow).unwrap();
    end_with(&data, later_write(&image, CLUSTER, 2, 7 * CLUSTER)).unwrap();
    data.finish();
    assert_reads(&image, 0, 1, CLUSTER);
    assert_reads(&image, CLUSTER, 2, 7 * CLUSTER);
}

/// Shrinks to one cluster, up to the moment in which `cut` is cut.
fn shrink_and_drop(image: &Image<Arc<Slow>>, cut: &Slow) {
    cut.holds_cuts.store(true, Ordering::SeqCst);
    let mut shrink: Pin<Box<dyn Future<Output = _>>> =
        Box::pin(image.resize(CLUSTER, Shrink::Allow));
    // It steps aside between the parts of a table.
    let held = || cut.held.lock().unwrap().len();
    for _ in 0..100 {
        assert!(poll(&mut shrink).is_none());
        if held() > 0 {
            break;
        }
    }
    assert_eq!(held(), 1);
    drop(shrink);
    cut.holds_cuts.store(false, Ordering::SeqCst);
}

#[test]
fn a_write_that_waited_for_a_shrink_does_not_land_beyond_the_end() {
    let options = CreateOptions { size_bytes: 8 * CLUSTER, ..CreateOptions::default() };
    let (image, storage) = disk(&options, DiscardPolicy::default());
    write(&image, 0, 1, CLUSTER).unwrap();
    storage.holds_writes.store(true, Ordering::SeqCst);
    let mut first = later_write(&image, 6 * CLUSTER, 2, 512);
    assert!(poll(&mut first).is_none());
    let mut shrink: Pin<Box<dyn Future<Output = _>>> =
        Box::pin(image.resize(CLUSTER, Shrink::Allow));
    assert!(poll(&mut shrink).is_none());
    let mut late = later_write(&image, 6 * CLUSTER, 3, 512);
    assert!(poll(&mut late).is_none());
    storage.finish();
    finish(first).unwrap();
    finish(shrink).unwrap();
    assert_eq!(finish(late).unwrap_err().kind(), ErrorKind::OutOfBounds);
    block_on(image.resize(8 * CLUSTER, Shrink::Refuse)).unwrap();
    assert_reads(&image, CLUSTER, 0, 7 * CLUSTER);
}

#[test]
fn a_clone_of_a_closed_image_cannot_change_it() {
    let options =
        CreateOptions { size_bytes: 1 << 30, lazy_refcounts: true, ..CreateOptions::default() };
    let (image, storage) = disk(&options, DiscardPolicy::default());
    write(&image, 0, 1, CLUSTER).unwrap();
    block_on(image.clone().close()).unwrap();
    let late = write(&image, 9 * CLUSTER, 2, CLUSTER);
    drop(block_on(image.flush()));
    let options = CheckOptions { repair: Repair::None };
    let report = block_on(check(&storage, &options, &mut |_| {})).unwrap();
    let dirty = block_on(lacuna::qcow2::read_header(&storage)).unwrap().features.incompatible;
    assert!(report.corruptions == 0 || !dirty.is_empty(), "{report:?}");
    late.unwrap_err();
    assert_reads(&image, 0, 1, CLUSTER);
}

#[test]
fn the_raw_data_file_of_an_image_opened_read_only_stays_as_it_is() {
    let (storage, data) = (Arc::new(Slow::default()), Arc::new(Slow::default()));
    let options = CreateOptions {
        size_bytes: 8 * CLUSTER,
        data_file: Some(DataFileName { name: "data".to_owned(), raw: true }),
        ..CreateOptions::default()
    };
    block_on(create(&storage, &options)).unwrap();
    let open = |access| {
        let parts =
            Parts { storage: Arc::clone(&storage), data: Some(Arc::clone(&data)), backing: None };
        block_on(Image::open(parts, OpenOptions::new(access))).unwrap()
    };
    let image = open(Access::ReadWrite);
    write(&image, 0, 1, 8 * CLUSTER).unwrap();
    block_on(image.close()).unwrap();
    let image = open(Access::ReadOnly);
    let range = GuestRange::new(GuestOffset(0), CLUSTER);
    block_on(image.write_zeroes(range, ZeroFlags::MAY_UNMAP)).unwrap_err();
    block_on(image.resize(16 * CLUSTER, Shrink::Refuse)).unwrap_err();
    assert_reads(&image, 0, 1, 8 * CLUSTER);
    assert_eq!(block_on(data.len()).unwrap(), 8 * CLUSTER);
}
