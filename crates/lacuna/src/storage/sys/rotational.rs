//! Whether a file lies on a disk whose parts turn.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{FileType, fstat, major, minor};

/// Where the kernel lists block devices by their numbers.
const DEVICES: &str = "/sys/dev/block";

/// Says whether the device that a file is, or lies on, is known to turn.
///
/// A file system without a device of its own (overlayfs, btrfs, a network's) has a number that the
/// kernel does not list: nothing is known then. For what stands on several disks, as the device
/// mapper's, the kernel has worked it out.
pub(crate) fn is_rotational(file: BorrowedFd<'_>) -> bool {
    let Ok(status) = fstat(file) else { return false };
    let device = match FileType::from_raw_mode(status.st_mode) {
        FileType::BlockDevice => status.st_rdev,
        _ => status.st_dev,
    };
    turns(Path::new(DEVICES), major(device), minor(device))
}

/// A partition has its queue in the disk's folder.
fn turns(devices: &Path, major: u32, minor: u32) -> bool {
    let device = devices.join(format!("{major}:{minor}"));
    let answer = |queue| fs::read_to_string(device.join(queue).join("rotational")).ok();
    ["queue", "../queue"].iter().find_map(answer).is_some_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Lists a disk with a partition, as the kernel does.
    fn list(root: &Path, disk: &str, numbers: [&str; 2], rotational: &str) {
        let folder = root.join(disk);
        fs::create_dir_all(folder.join("queue")).unwrap();
        fs::create_dir_all(folder.join("part1")).unwrap();
        fs::write(folder.join("queue/rotational"), rotational).unwrap();
        fs::create_dir_all(root.join("dev")).unwrap();
        symlink(&folder, root.join("dev").join(numbers[0])).unwrap();
        symlink(folder.join("part1"), root.join("dev").join(numbers[1])).unwrap();
    }

    #[test]
    fn disks_and_their_partitions_turn_where_the_kernel_says_so() {
        let root = tempfile::tempdir().unwrap();
        list(root.path(), "sda", ["8:0", "8:1"], "1\n");
        list(root.path(), "nvme0n1", ["259:0", "259:1"], "0\n");
        let turns = |major, minor| turns(&root.path().join("dev"), major, minor);
        assert!(turns(8, 0) && turns(8, 1));
        assert!(!turns(259, 0) && !turns(259, 1));
    }

    #[test]
    fn what_the_kernel_does_not_list_is_not_said_to_turn() {
        let root = tempfile::tempdir().unwrap();
        assert!(!turns(root.path(), 0, 47));
    }
}
