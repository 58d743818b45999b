//! Who has a file locked.
//!
//! A lock that belongs to an open file carries no process id. The kernel lists such locks with the
//! descriptors of each process (`lock:` lines in /proc/PID/fdinfo), so all processes are asked.
//!
//! * Never looks at the files behind the descriptors: that could hang on a dead file system.
//! * Never more than [`MOST_DESCRIPTORS`] are read. What goes away meanwhile is passed over.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use super::lock::claim_of;
use crate::storage::Claim;
use crate::storage::sys::OpenFile;

/// How many descriptors are looked at in all.
const MOST_DESCRIPTORS: usize = 1 << 18;
/// How much of one file in /proc is read.
const MOST_BYTES: u64 = 1 << 14;
/// How much of a command's name is kept.
const MOST_CHARACTERS: usize = 64;

/// The processes that have a file locked, as far as they can be seen.
///
/// See [`LockConflict`](super::LockConflict) for an example.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Those found, by process id.
    pub found: Vec<Holder>,
    /// How many processes could not be looked into: mostly those of other users.
    pub unseen: usize,
}

/// A process that has a file locked.
///
/// ```
/// use lacuna::storage::{Claim, Holder};
/// let holder = Holder { pid: 4711, command: "qemu-nbd".into(), claim: Claim::WRITING };
/// assert_eq!(holder.to_string(), "qemu-nbd (pid 4711)");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// The last part of the name it was started by; control characters are replaced.
    pub command: String,
    /// What it holds and lets others do.
    pub claim: Claim,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

/// What the kernel calls a file where it lists locks: `fe:00:4711`.
///
/// Taken from our own lock: on some file systems the device is not the one that `stat` gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileName(String);

impl FileName {
    /// Looks at a lock on the file that this process has, or else at the file.
    pub(super) fn of(file: &OpenFile) -> Self {
        let path = format!("/proc/self/fdinfo/{}", file.as_fd().as_raw_fd());
        let own = read(Path::new(&path)).ok();
        let own = own.and_then(|text| text.lines().find_map(Line::parse).map(|line| line.name));
        Self(own.unwrap_or_else(|| by_inode(file)))
    }
}

fn by_inode(file: &OpenFile) -> String {
    rustix::fs::fstat(file).map_or_else(
        |_| String::new(),
        |facts| {
            let (major, minor) = (rustix::fs::major(facts.st_dev), rustix::fs::minor(facts.st_dev));
            format!("{major:02x}:{minor:02x}:{}", facts.st_ino)
        },
    )
}

/// A line of locked bytes.
struct Line {
    name: String,
    first: u64,
    last: u64,
}

impl Line {
    /// Reads `lock:  1: OFDLCK ADVISORY  READ -1 fe:00:4711 100 101`.
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.strip_prefix("lock:")?.split_ascii_whitespace().skip(5);
        let name = words.next()?.to_owned();
        let first = words.next()?.parse().ok()?;
        let last = match words.next()? {
            "EOF" => u64::MAX,
            last => last.parse().ok()?,
        };
        Some(Self { name, first, last })
    }

    fn has(&self, byte: u16) -> bool {
        (self.first..=self.last).contains(&u64::from(byte))
    }
}

/// Finds the processes that have `byte` of the file locked.
pub(super) fn look_for(name: &FileName, byte: u16) -> Holders {
    let (mut holders, mut left) = (Holders::default(), MOST_DESCRIPTORS);
    let Ok(processes) = fs::read_dir("/proc") else { return holders };
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match lines_of(&entry.path(), name, &mut left) {
            Some(lines) if lines.iter().any(|line| line.has(byte)) => {
                let claim = claim_of(|byte| lines.iter().any(|line| line.has(byte)));
                let command = command_of(&entry.path());
                holders.found.push(Holder { pid, command, claim });
            }
            Some(_) => {}
            None => holders.unseen += 1,
        }
    }
    holders.found.sort_by_key(|holder| holder.pid);
    holders
}

/// Reads what a process has locked of the file; nothing where it may not be looked into.
fn lines_of(process: &Path, name: &FileName, left: &mut usize) -> Option<Vec<Line>> {
    let entries = match fs::read_dir(process.join("fdinfo")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return None,
        // It has ended.
        Err(_) => return Some(Vec::new()),
    };
    let mut lines = Vec::new();
    for entry in entries.flatten().take(*left) {
        *left -= 1;
        match read(&entry.path()) {
            Ok(text) => {
                let found = text.lines().filter_map(Line::parse);
                lines.extend(found.filter(|line| line.name == name.0));
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return None,
            Err(_) => {}
        }
    }
    Some(lines)
}

/// Returns what a process was started as; for one that hides it, the kernel's short name.
fn command_of(process: &Path) -> String {
    let line = read(&process.join("cmdline")).unwrap_or_default();
    let program = line.split('\0').next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    match name.is_empty() {
        false => printable(name),
        true => printable(read(&process.join("comm")).unwrap_or_default().trim_end()),
    }
}

fn printable(name: &str) -> String {
    let plain = |character: char| if character.is_control() { '?' } else { character };
    name.chars().map(plain).take(MOST_CHARACTERS).collect()
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_of_the_kernel_are_read() {
        let line =
            Line::parse("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10011110 100 101").unwrap();
        assert_eq!((line.name.as_str(), line.first, line.last), ("fe:00:10011110", 100, 101));
        let whole = Line::parse("lock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF").unwrap();
        assert!(whole.has(203));
        for other in ["pos:\t0", "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1 100", "lock:"] {
            assert!(Line::parse(other).is_none(), "{other}");
        }
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a?[2Jb?");
        assert_eq!(printable(&"x".repeat(100)).len(), MOST_CHARACTERS);
    }
}
