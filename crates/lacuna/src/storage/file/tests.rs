//! What needs a look inside: refusals, gates, lost flushes.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll, Waker};

use super::*;
use crate::buffer::Release;
use crate::storage::HostStatus;
use crate::storage::sys::{Attempt, Direction, OpenFile, Rider, Ring};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a scratch folder can be made")
}

fn open(path: &Path, cache: CacheMode, driver: DriverChoice) -> FileStorage {
    let options =
        FileOptions { cache, driver, create: Create::IfMissing, ..FileOptions::read_write() };
    FileStorage::open(path, &options).expect("the scratch file opens")
}

fn open_with(path: &Path, cache: CacheMode, makers: open::Makers) -> Result<FileStorage> {
    let options = FileOptions { cache, ..FileOptions::replace() };
    open::storage(open::open_file(path, &options)?, path.to_owned(), &options, makers)
}

fn refuse() -> io::Result<Arc<Ring>> {
    Err(rustix::io::Errno::PERM.into())
}

/// Tells the test when it is released.
struct Told(Sender<u64>);

impl Release for Told {
    fn release(&self, token: u64) {
        self.0.send(token).expect("the test listens");
    }
}

fn told() -> (Arc<Told>, Receiver<u64>) {
    let (sender, receiver) = channel();
    (Arc::new(Told(sender)), receiver)
}

fn poll_once<F: Future>(future: F) -> Poll<F::Output> {
    pin!(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// A pool whose only thread waits until the sender is used.
fn gated_pool() -> (Arc<Pool>, Sender<()>) {
    let (open_gate, gate) = channel();
    let pool = Pool::new(1, "test");
    drop(pool.run(None, move || gate.recv().expect("the test opens the gate")));
    (pool, open_gate)
}

fn range(start: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(start), len)
}

/// Containers refuse io_uring by such filters; old kernels have none.
#[test]
fn where_the_kernel_refuses_io_uring_auto_takes_threads_and_says_why() {
    use crate::storage::sys::seccomp::refuse_on_this_thread;
    for (call, code) in
        [(libc::SYS_io_uring_setup, libc::EPERM), (libc::SYS_io_uring_enter, libc::ENOSYS)]
    {
        let filtered = move || {
            refuse_on_this_thread(call, code).expect("a filter can be set");
            let folder = folder();
            // A ring of this thread's own: the process may have one from before.
            let makers = open::Makers { shared_ring: Ring::new, ..open::Makers::default() };
            let path = folder.path().join("f");
            let storage = open_with(&path, CacheMode::Buffered, makers).expect("opens");
            let Driver::Threads { refusal: Some(reason) } = storage.driver() else {
                panic!("not the threads after a refusal: {:?}", storage.driver());
            };
            assert_eq!(reason.raw_os_error(), Some(code));
        };
        std::thread::spawn(filtered).join().expect("the filtered thread is content");
    }
}

/// Old kernels have no such locks, and some file systems over a network have none.
#[test]
fn where_the_host_has_no_locks_auto_goes_on_and_on_does_not() {
    use crate::storage::Locking;
    use crate::storage::sys::seccomp::refuse_fcntl_on_this_thread;
    for code in [libc::EINVAL, libc::ENOLCK] {
        let filtered = move || {
            refuse_fcntl_on_this_thread(libc::F_OFD_SETLK, code).expect("a filter can be set");
            let file = tempfile::NamedTempFile::new().expect("a scratch file can be made");
            let open = |locking| {
                FileStorage::open(
                    file.path(),
                    &FileOptions { locking, ..FileOptions::read_write() },
                )
            };
            let storage = open(Locking::Auto).expect("opens without locks");
            assert_eq!(storage.claimed(), Claim::WRITING);
            storage.claim(Claim::READING).expect("nobody can be in the way");
            let error = open(Locking::On).expect_err("locks were asked for");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        };
        std::thread::spawn(filtered).join().expect("the filtered thread is content");
    }
}

#[test]
fn reading_what_the_page_cache_has_makes_no_ring() {
    static MADE: AtomicBool = AtomicBool::new(false);
    fn make() -> io::Result<Arc<Ring>> {
        MADE.store(true, Ordering::Relaxed);
        Ring::new()
    }
    let folder = folder();
    let makers = open::Makers { shared_ring: make, ..open::Makers::default() };
    let path = folder.path().join("f");
    let storage = open_with(&path, CacheMode::Buffered, makers).expect("opens");
    pollster::block_on(async {
        storage.write_at(HostOffset(0), Buffer::zeroed(8192)).await.0.expect("written");
        storage.read_at(HostOffset(0), Buffer::new(8192)).await.0.expect("read");
    });
    if !remembered(&storage.inner.refusals.nowait) {
        assert!(!MADE.load(Ordering::Relaxed), "a ring was made before there was need");
    }
}

#[test]
fn what_is_no_file_is_refused_by_its_kind() {
    let folder = folder();
    let pipe = folder.path().join("pipe");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0)
        .expect("a pipe can be made");
    for (path, word) in
        [(pipe.as_path(), "pipe"), (folder.path(), "directory"), (Path::new("/dev/null"), "device")]
    {
        let error = FileStorage::open(path, &FileOptions::read_only()).expect_err("no file");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(word), "{error}");
    }
    let missing = FileStorage::open(folder.path().join("nothing"), &FileOptions::read_only());
    assert_eq!(missing.expect_err("nothing there").kind(), ErrorKind::NotFound);
    let making = FileOptions { create: Create::Replace, ..FileOptions::read_only() };
    let error = FileStorage::open(&pipe, &making).expect_err("needs write access");
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
}

#[test]
fn opening_for_writing_leaves_the_time_of_the_last_change() {
    let folder = folder();
    let path = folder.path().join("f");
    std::fs::write(&path, b"lacuna").expect("the file can be written");
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    let file = std::fs::File::options().write(true).open(&path).expect("opens");
    file.set_modified(long_ago).expect("the time can be set");
    drop(open(&path, CacheMode::Buffered, DriverChoice::Auto));
    let modified = std::fs::metadata(&path).and_then(|data| data.modified());
    assert_eq!(modified.expect("has a time"), long_ago);
}

#[test]
fn io_uring_asked_for_and_refused_is_an_error() {
    let folder = folder();
    for driver in [DriverChoice::IoUring, DriverChoice::External] {
        let makers =
            open::Makers { shared_ring: refuse, own_ring: refuse, ..open::Makers::default() };
        let path = folder.path().join("f");
        let options = FileOptions { driver, ..FileOptions::replace() };
        let file = open::open_file(&path, &options).expect("opens");
        let error = open::storage(file, path, &options, makers).expect_err("refused");
        assert!(error.to_string().contains("io_uring"), "{error}");
    }
}

#[test]
fn a_dropped_read_leaves_buffer_and_hold_with_the_thread() {
    let folder = folder();
    let (pool, open_gate) = gated_pool();
    let makers = open::Makers { shared_ring: refuse, pool, ..open::Makers::default() };
    let storage = open_with(&folder.path().join("f"), CacheMode::Direct, makers).expect("opens");
    let (owner, released) = told();
    for (token, len) in [(1, 4096), (2, 100)] {
        let mut buffer = Buffer::new(len);
        buffer.set_hold(Hold::new(owner.clone(), token));
        assert!(poll_once(storage.read_at(HostOffset(0), buffer)).is_pending());
    }
    assert!(released.try_recv().is_err(), "released while the request was in flight");
    open_gate.send(()).expect("the gate is there");
    assert_eq!((released.recv(), released.recv()), (Ok(1), Ok(2)));
}

#[test]
fn a_dropped_change_leaves_its_hold_and_its_lock_with_the_thread() {
    let folder = folder();
    let (pool, open_gate) = gated_pool();
    let makers = open::Makers { shared_ring: refuse, pool, ..open::Makers::default() };
    let storage = open_with(&folder.path().join("f"), CacheMode::Direct, makers).expect("opens");
    let (owner, released) = told();
    let hold = |token| Hold::new(owner.clone(), token);
    let mut buffer = Buffer::from(&[7; 4096][..]);
    buffer.set_hold(hold(1));
    assert!(poll_once(storage.write_at(HostOffset(0), buffer)).is_pending());
    let mut buffer = Buffer::from(&[8; 100][..]);
    buffer.set_hold(hold(2));
    assert!(poll_once(storage.write_at(HostOffset(8192), buffer)).is_pending());
    // The tail is locked: this one never gets to a thread, and goes at once.
    let zeroes = storage.write_zeroes_at(range(8192, 512), ZeroMode::MayUnmap, hold(3));
    assert!(poll_once(zeroes).is_pending());
    assert_eq!(released.try_recv(), Ok(3));
    assert!(released.try_recv().is_err(), "released while the request was in flight");
    open_gate.send(()).expect("the gate is there");
    assert_eq!((released.recv(), released.recv()), (Ok(1), Ok(2)));
    assert_eq!(pollster::block_on(storage.len()).expect("has a length"), 8292);
}

#[test]
fn a_dropped_request_leaves_its_things_with_the_ring() {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe can be made");
    let ring = Ring::new().expect("this kernel has io_uring");
    let (owner, released) = told();
    let mut buffer = Buffer::new(4096);
    buffer.set_hold(Hold::new(owner, 1));
    let attempt = Attempt {
        file: Arc::new(OpenFile::new(reader)),
        direction: Direction::Read,
        offset: u64::MAX,
        buffer,
        start: 0,
        rider: Rider::default(),
    };
    assert!(poll_once(ring.submit(attempt)).is_pending());
    ring.reap();
    assert!(released.try_recv().is_err(), "released while the kernel was reading");
    rustix::io::write(&writer, b"x").expect("the pipe takes a byte");
    // Waits for the kernel.
    drop(ring);
    assert_eq!(released.try_recv(), Ok(1));
}

/// The kernel cancels what a thread that ends has under way; the next poll starts it anew.
#[test]
fn a_request_outlives_the_thread_that_submitted_it() {
    let folder = folder();
    let storage = open(&folder.path().join("f"), CacheMode::Direct, DriverChoice::IoUring);
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe can be made");
    let attempt = Attempt {
        file: Arc::new(OpenFile::new(reader)),
        direction: Direction::Read,
        offset: u64::MAX,
        buffer: Buffer::zeroed(1),
        start: 0,
        rider: Rider::default(),
    };
    let inner = Arc::clone(&storage.inner);
    let mut request = Box::pin(async move { inner.drive(attempt).await });
    let first_thread = std::thread::spawn(move || {
        let polled = request.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
        request
    });
    let mut request = first_thread.join().expect("the first thread is content");
    assert!(request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    rustix::io::write(&writer, b"x").expect("the pipe takes a byte");
    let (result, attempt) = pollster::block_on(request);
    assert_eq!(result.expect("the byte is read"), 1);
    assert_eq!(&*attempt.buffer, b"x");
}

#[test]
fn after_a_failed_flush_every_later_one_fails_alike() {
    let folder = folder();
    let storage = open(&folder.path().join("f"), CacheMode::Buffered, DriverChoice::Auto);
    pollster::block_on(storage.flush()).expect("nothing is wrong yet");
    let failed = storage.inner.settle_flush(Err(rustix::io::Errno::IO.into()));
    assert_eq!(failed.expect_err("it failed").raw_os_error(), Some(5));
    let again = pollster::block_on(storage.flush()).expect_err("stays failed");
    assert_eq!(again.raw_os_error(), Some(5));
}

#[test]
fn an_eventfd_and_complete_are_all_a_foreign_loop_needs() {
    use rustix::event::{PollFd, PollFlags, poll};
    let folder = folder();
    let storage = open(&folder.path().join("f"), CacheMode::Direct, DriverChoice::External);
    let event_fd = storage.event_fd().expect("the driver is External");
    let mut future = pin!(async {
        storage.write_at(HostOffset(0), Buffer::from(&[9; 8192][..])).await.0?;
        storage.write_at(HostOffset(100), Buffer::from(&[1; 1000][..])).await.0?;
        storage.flush().await?;
        let (result, bytes) = storage.read_at(HostOffset(0), Buffer::new(8192)).await;
        result.map(|()| bytes)
    });
    let mut context = Context::from_waker(Waker::noop());
    let bytes = loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            break result.expect("all of it works");
        }
        let mut waits = [PollFd::new(&event_fd, PollFlags::IN)];
        assert_eq!(poll(&mut waits, None).expect("poll works"), 1);
        storage.complete().expect("the eventfd can be read");
    };
    assert!(bytes[..100].iter().chain(&bytes[1100..]).all(|byte| *byte == 9));
    assert!(bytes[100..1100].iter().all(|byte| *byte == 1));
}

#[test]
fn refused_zeroing_is_remembered_and_done_by_writing() {
    let folder = folder();
    let storage = open(&folder.path().join("f"), CacheMode::Buffered, DriverChoice::Auto);
    remember(&storage.inner.refusals.punch_hole);
    remember(&storage.inner.refusals.zero_range);
    pollster::block_on(async {
        storage.write_at(HostOffset(0), Buffer::from(&[7; 3000][..])).await.0.expect("writes");
        let (owner, released) = told();
        let hold = Hold::new(owner, 1);
        storage.write_zeroes_at(range(1000, 5000), ZeroMode::MayUnmap, hold).await.expect("zeroes");
        assert_eq!(released.try_recv(), Ok(1));
        assert_eq!(storage.len().await.expect("has a length"), 6000);
        let (result, bytes) = storage.read_at(HostOffset(0), Buffer::new(6000)).await;
        result.expect("reads");
        assert!(bytes[..1000].iter().all(|b| *b == 7) && bytes[1000..].iter().all(|b| *b == 0));
        let error = storage.punch_hole_at(range(0, 1000), Hold::none()).await;
        assert_eq!(error.expect_err("refused").kind(), ErrorKind::Unsupported);
    });
}

#[test]
fn where_no_extent_map_is_to_be_had_seek_data_decides() {
    let folder = folder();
    let storage = open(&folder.path().join("f"), CacheMode::Buffered, DriverChoice::Auto);
    remember(&storage.inner.refusals.extent_map);
    pollster::block_on(async {
        storage.allocate_at(range(0, 1 << 20)).await.expect("reserves");
        storage.write_at(HostOffset(0), Buffer::from(&[7; 4096][..])).await.0.expect("writes");
        let data = storage.status_at(range(0, 1 << 20)).await.expect("has a status");
        assert_eq!(data, HostExtent { len: 4096, status: HostStatus::Data });
        let rest = storage.status_at(range(4096, 1 << 19)).await.expect("has a status");
        assert_eq!(rest, HostExtent { len: 1 << 19, status: HostStatus::Hole });
    });
}
