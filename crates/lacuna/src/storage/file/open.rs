//! From a path to an open storage: what it is, what it can do, who drives it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode as Permissions, OFlags, fcntl_getfl, fcntl_setfl};

use super::conductor::{Conductor, Runner, refused};
use super::lock::FileLock;
use super::options::{CacheMode, Create, Driver, DriverChoice, FileAccess, FileOptions};
use super::{FileStorage, Inner, PastCache, RangeLock, Refusals, is_refusal};
use crate::buffer::ALIGNMENT;
use crate::storage::sys::{
    Bell, DirectAlignment, Kind, OpenFile, Pool, Ring, device_zeroes_natively, direct_alignment,
    file_len, punch_hole, uninterrupted,
};
use crate::storage::{Capabilities, Capability, sys};
use crate::{Error, Result};

/// Where rings and threads come from; tests bring their own.
pub(super) struct Makers {
    pub(super) shared_ring: fn() -> io::Result<Arc<Ring>>,
    pub(super) own_ring: fn() -> io::Result<Arc<Ring>>,
    pub(super) pool: Arc<Pool>,
}

impl Default for Makers {
    fn default() -> Self {
        Self { shared_ring: Ring::shared, own_ring: Ring::new, pool: Pool::shared() }
    }
}

/// Opens the file itself, by the options' access and creation.
pub(super) fn open_file(path: &Path, options: &FileOptions) -> Result<OwnedFd> {
    if options.create != Create::Never && options.access == FileAccess::ReadOnly {
        return Err(Error::invalid("Making a file needs write access"));
    }
    let access = match options.access {
        FileAccess::ReadOnly => OFlags::RDONLY,
        FileAccess::ReadWrite => OFlags::RDWR,
    };
    let create = match options.create {
        Create::Never => OFlags::empty(),
        Create::IfMissing => OFlags::CREATE,
        Create::Exclusive => OFlags::CREATE | OFlags::EXCL,
        // Emptied later, when nobody else can be harmed by it any more.
        Create::Replace => OFlags::CREATE,
    };
    // Without waiting, or a named pipe in the place of an image would hang us.
    let flags = access | create | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    uninterrupted(|| rustix::fs::open(path, flags, Permissions::from_raw_mode(0o666)))
        .map_err(|error| Error::io(error, format!("Opening {}", path.display())))
}

/// Makes an open file a storage.
pub(super) fn storage(
    file: OwnedFd,
    path: PathBuf,
    options: &FileOptions,
    makers: Makers,
) -> Result<FileStorage> {
    let inspect = |error| Error::io(error, format!("Inspecting {}", path.display()));
    let kind = sys::kind(file.as_fd()).map_err(inspect)?;
    if let Kind::Other(what) = kind {
        return Err(Error::unsupported(format!(
            "{} is {what}; an image is a file or a block device",
            path.display()
        )));
    }
    let (file, lock) = (OpenFile::new(file), FileLock::new(options.locking));
    lock.change(&file, &path, options.effective_claim())?;
    if options.create == Create::Replace && kind == Kind::Regular {
        empty(&file, &path)?;
    }
    set_flags(file.as_fd(), options.cache).map_err(|error| match options.cache {
        CacheMode::Direct => no_direct(&path, Some(error)),
        CacheMode::Buffered | CacheMode::LargeWritesDirect => inspect(error),
    })?;
    let past_cache = match options.cache {
        CacheMode::LargeWritesDirect => open_past_cache(file.as_fd(), kind),
        CacheMode::Buffered | CacheMode::Direct => None,
    };
    let direct = match options.cache {
        CacheMode::Buffered | CacheMode::LargeWritesDirect => None,
        CacheMode::Direct => Some(usable_alignment(file.as_fd(), kind, &path)?),
    };
    let (conductor, bell) = choose_driver(options.driver, &makers)?;
    let capabilities = capabilities(file.as_fd(), kind, options.access, direct);
    let inner = Inner {
        file: Arc::new(file),
        lock,
        path,
        kind,
        access: options.access,
        direct,
        past_cache,
        conductor,
        pool: makers.pool,
        bell,
        capabilities,
        locks: Arc::new(RangeLock::default()),
        refusals: Refusals::default(),
        lost: std::sync::OnceLock::new(),
    };
    Ok(FileStorage { inner: Arc::new(inner) })
}

/// Opens a regular file once more, past the page cache; nothing where the host cannot.
///
/// By what is open, not by its path: that may lead elsewhere by now. Locks stay with the first.
fn open_past_cache(file: BorrowedFd<'_>, kind: Kind) -> Option<PastCache> {
    if kind != Kind::Regular {
        return None;
    }
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = uninterrupted(|| rustix::fs::open(&*again, flags, Permissions::empty())).ok()?;
    let alignment = direct_alignment(file.as_fd(), kind)
        .filter(|alignment| alignment.memory as usize <= ALIGNMENT)?;
    Some(PastCache { file: Arc::new(OpenFile::new(file)), alignment })
}

fn empty(file: &OpenFile, path: &Path) -> Result<()> {
    uninterrupted(|| rustix::fs::ftruncate(file, 0))
        .map_err(|error| Error::io(error, format!("Emptying {}", path.display())))
}

/// Takes the mark off that was to keep the opening from waiting (a ring would heed it), and puts
/// O_DIRECT on or off.
fn set_flags(file: BorrowedFd<'_>, cache: CacheMode) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)? - OFlags::NONBLOCK;
    flags.set(OFlags::DIRECT, cache == CacheMode::Direct);
    Ok(fcntl_setfl(file, flags)?)
}

fn usable_alignment(file: BorrowedFd<'_>, kind: Kind, path: &Path) -> Result<DirectAlignment> {
    match direct_alignment(file, kind) {
        Some(alignment) if alignment.memory as usize <= ALIGNMENT => Ok(alignment),
        _ => Err(no_direct(path, None)),
    }
}

fn no_direct(path: &Path, source: Option<io::Error>) -> Error {
    let reason = source.map_or(String::new(), |error| format!(": {error}"));
    Error::unsupported(format!("{} cannot be opened past the page cache{reason}", path.display()))
}

fn choose_driver(choice: DriverChoice, makers: &Makers) -> Result<(Conductor, Option<Bell>)> {
    match choice {
        DriverChoice::Auto => Ok((Conductor::undecided(makers.shared_ring), None)),
        DriverChoice::IoUring => {
            let ring = (makers.shared_ring)().map_err(refused)?;
            Ok((Conductor::decided(Driver::IoUring, Runner::Ring(ring)), None))
        }
        DriverChoice::Threads => {
            Ok((Conductor::decided(Driver::Threads { refusal: None }, Runner::Threads), None))
        }
        DriverChoice::External => {
            let ring = (makers.own_ring)().map_err(refused)?;
            let bell = make_bell(&ring).map_err(refused)?;
            Ok((Conductor::decided(Driver::External, Runner::Ring(ring)), Some(bell)))
        }
    }
}

fn make_bell(ring: &Ring) -> io::Result<Bell> {
    let bell = Bell(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?));
    ring.register(bell.0.as_fd())?;
    Ok(bell)
}

fn capabilities(
    file: BorrowedFd<'_>,
    kind: Kind,
    access: FileAccess,
    direct: Option<DirectAlignment>,
) -> Capabilities {
    let writable = access == FileAccess::ReadWrite;
    let native = writable
        && match kind {
            Kind::BlockDevice => device_zeroes_natively(file),
            _ => punches_holes(file, kind),
        };
    let choose = |yes, otherwise| if yes { Capability::Native } else { otherwise };
    Capabilities {
        write_zeroes: choose(native, Capability::Emulated),
        punch_hole: choose(native, Capability::Unsupported),
        set_len: choose(writable && kind == Kind::Regular, Capability::Unsupported),
        writable,
        preferred_alignment_bytes: direct.map_or(1, |alignment| alignment.offset),
    }
}

/// Says whether the file can have holes made.
fn punches_holes(file: BorrowedFd<'_>, kind: Kind) -> bool {
    const PIECE: u64 = 1 << 20;
    if sys::punches_holes_by_reputation(file) {
        return true;
    }
    // Asks for a hole past the end, where there is nothing to lose. The file's time changes.
    let Ok(len) = file_len(file, kind) else { return false };
    let Some(past) = len.checked_next_multiple_of(PIECE) else { return false };
    match punch_hole(file, past, PIECE) {
        Ok(()) => true,
        // A failure of another kind says nothing against it.
        Err(error) => !is_refusal(&error),
    }
}
