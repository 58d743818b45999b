//! What an open file is, and what its host can do with it.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, SeekFrom, StatxFlags};

/// Objects that can hold an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file: it grows.
    Regular,
    /// A block device: it does not.
    BlockDevice,
    /// Anything else, by its name.
    Other(&'static str),
}

/// What O_DIRECT demands, in bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    /// Of offsets and lengths.
    pub(crate) offset: u32,
    /// Of addresses.
    pub(crate) memory: u32,
}

/// Used where the host does not say: no disk has larger sectors without saying so.
const CAUTIOUS: DirectAlignment = DirectAlignment { offset: 4096, memory: 4096 };

/// Returns what the file is.
pub(crate) fn kind(file: BorrowedFd<'_>) -> io::Result<Kind> {
    let status = rustix::fs::fstat(file)?;
    Ok(match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => Kind::Regular,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Directory => Kind::Other("a directory"),
        FileType::Fifo => Kind::Other("a pipe"),
        FileType::Socket => Kind::Other("a socket"),
        FileType::CharacterDevice => Kind::Other("a character device"),
        _ => Kind::Other("no file"),
    })
}

/// Returns the length in bytes of a file or block device.
pub(crate) fn file_len(file: BorrowedFd<'_>, kind: Kind) -> io::Result<u64> {
    Ok(match kind {
        // The position of the descriptor is used by nobody: all transfers name their offset.
        Kind::BlockDevice => rustix::fs::seek(file, SeekFrom::End(0))?,
        _ => u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0),
    })
}

/// Returns what O_DIRECT demands of this file, or nothing where it cannot be had.
pub(crate) fn direct_alignment(file: BorrowedFd<'_>, kind: Kind) -> Option<DirectAlignment> {
    if let Ok(status) = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && StatxFlags::from_bits_retain(status.stx_mask).contains(StatxFlags::DIOALIGN)
    {
        let (offset, memory) = (status.stx_dio_offset_align, status.stx_dio_mem_align);
        let usable = offset.is_power_of_two() && memory.is_power_of_two();
        return usable.then_some(DirectAlignment { offset, memory });
    }
    let sector = match kind {
        Kind::BlockDevice => rustix::fs::ioctl_blksszget(file).ok(),
        _ => None,
    };
    Some(sector.map_or(CAUTIOUS, |sector| DirectAlignment { offset: sector, memory: sector }))
}

/// Says whether the file is on one of the file systems that are known to punch holes.
///
/// Asking saves trying, and a trial would change the file's time of last change.
pub(crate) fn punches_holes_by_reputation(file: BorrowedFd<'_>) -> bool {
    const EXT4: u64 = 0xef53;
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683e;
    const TMPFS: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file)
        .is_ok_and(|status| [EXT4, XFS, BTRFS, TMPFS].contains(&(status.f_type as u64)))
}

/// Says whether a block device zeroes ranges by itself.
pub(crate) fn device_zeroes_natively(file: BorrowedFd<'_>) -> bool {
    let Ok(status) = rustix::fs::fstat(file) else { return false };
    let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    let device = format!("/sys/dev/block/{major}:{minor}");
    // A partition has its queue in the disk's folder.
    ["queue", "../queue"].iter().any(|queue| {
        std::fs::read_to_string(format!("{device}/{queue}/write_zeroes_max_bytes"))
            .is_ok_and(|text| text.trim() != "0")
    })
}
