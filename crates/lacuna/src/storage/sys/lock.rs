//! Locks that belong to an open file (OFD locks), and a file that gives them up when it goes.
//!
//! * Never waits: a lock is had at once or not at all.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a byte is locked or let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Together with others.
    Shared,
    None,
}

/// The bytes of a file that are ever locked, by QEMU's protocol.
const LOCK_BYTES: Range<u16> = 100..204;

/// An open file, to be kept until nobody and no request needs it any more.
#[derive(Debug)]
pub(crate) struct OpenFile {
    fd: OwnedFd,
    may_be_locked: AtomicBool,
}

impl OpenFile {
    pub(crate) const fn new(fd: OwnedFd) -> Self {
        Self { fd, may_be_locked: AtomicBool::new(false) }
    }

    /// Sets the lock of the byte at `offset`.
    ///
    /// # Errors
    /// `EAGAIN` or `EACCES` where somebody has the byte for himself; what the file system says
    /// where it has no such locks.
    pub(crate) fn lock(&self, offset: u16, lock: Lock) -> io::Result<()> {
        self.may_be_locked.store(true, Ordering::Relaxed);
        set_lock(self.as_fd(), offset, 1, lock)
    }

    /// Says whether somebody else has a lock on the byte at `offset`.
    pub(crate) fn is_locked_elsewhere(&self, offset: u16) -> io::Result<bool> {
        let mut wanted = describe(libc::F_WRLCK, offset, 1);
        call(self.as_fd(), libc::F_OFD_GETLK, &mut wanted)?;
        Ok(i32::from(wanted.l_type) != libc::F_UNLCK)
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for OpenFile {
    /// A ring may keep the file for a moment after its last completion, and the locks with it.
    fn drop(&mut self) {
        if self.may_be_locked.load(Ordering::Relaxed) {
            let Range { start, end } = LOCK_BYTES;
            // A failure leaves it to the closing.
            drop(set_lock(self.as_fd(), start, end - start, Lock::None));
        }
    }
}

fn set_lock(file: BorrowedFd<'_>, offset: u16, len: u16, lock: Lock) -> io::Result<()> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::None => libc::F_UNLCK,
    };
    call(file, libc::F_OFD_SETLK, &mut describe(kind, offset, len))
}

fn describe(kind: i32, offset: u16, len: u16) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: libc::off_t::from(offset),
        l_len: libc::off_t::from(len),
        // Must be zero for locks of this kind.
        l_pid: 0,
    }
}

fn call(file: BorrowedFd<'_>, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // The kernel takes these commands with 64-bit offsets only.
    const { assert!(size_of::<libc::off_t>() == 8) };
    loop {
        // SAFETY: the descriptor is open as long as it is borrowed; the commands take a pointer to
        // a `flock`, which lives until the call returns and is kept by nobody.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
        if result != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
