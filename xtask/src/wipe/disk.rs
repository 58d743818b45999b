//! The image that is wiped, and what is left of it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::looks::{allocated, clean, same};
use crate::run::{command, output};
use crate::scratch::Scratch;

/// The size of the disk, in MiB.
pub(super) const SIZE_MIB: u64 = 1024;
/// The size of a cluster: what both make unasked.
const CLUSTER_BYTES: u64 = 64 << 10;

/// A disk full of data, in an image of stock tools.
pub(super) struct Disk {
    folder: PathBuf,
    /// Where its data lies in the file: start and end.
    data: Vec<(u64, u64)>,
}

impl Disk {
    pub(super) fn make(scratch: &Scratch) -> Outcome<Self> {
        let folder = scratch.path().to_owned();
        let size = format!("{SIZE_MIB}M");
        let path = |name: &str| folder.join(name).display().to_string();
        for name in ["full", "empty"] {
            stock("qemu-img", &["create", "-q", "-f", "qcow2", &path(name), &size])?;
        }
        let write = format!("write -q -P 1 0 {size}");
        stock("qemu-io", &["-f", "qcow2", "-c", &write, &path("full")])?;
        let map = stock("qemu-img", &["map", "-f", "qcow2", &path("full")])?;
        let data = map.lines().skip(1).map(place).collect::<Outcome<_>>()?;
        Ok(Self { folder, data })
    }

    /// Returns how many clusters there are to wipe.
    pub(super) fn clusters(&self) -> u64 {
        (SIZE_MIB << 20) / CLUSTER_BYTES
    }

    /// Says whether a byte of the file was guest data before the wipe.
    pub(super) fn is_data(&self, at: u64) -> bool {
        self.data.iter().any(|(start, end)| (*start..*end).contains(&at))
    }

    /// Makes a copy that is on the disk, so that nobody pays for that later.
    pub(super) fn fresh(&self) -> Outcome<PathBuf> {
        let copy = self.folder.join("image");
        fs::copy(self.folder.join("full"), &copy)
            .and_then(|_| fs::File::open(&copy)?.sync_all())
            .map_err(|error| format!("cannot copy the image: {error}"))?;
        Ok(copy)
    }

    /// Refuses an image that is not clean or not all zeros; returns what it takes on the host.
    pub(super) fn judge(&self, image: &Path) -> Outcome<u64> {
        let image = image.display().to_string();
        clean(&image)?;
        same("qcow2", &self.folder.join("empty").display().to_string(), &image)?;
        allocated(Path::new(&image))
    }
}

fn stock(program: &str, words: &[&str]) -> Outcome<String> {
    output(command(program, words))
}

/// Reads a line of `qemu-img map`: offset, length, where in the file.
fn place(line: &str) -> Outcome<(u64, u64)> {
    let number = |word: &str| match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    };
    let mut words = line.split_whitespace().skip(1).map_while(number);
    match (words.next(), words.next()) {
        (Some(len), Some(start)) => Ok((start, start + len)),
        _ => Err(format!("qemu-img map says what nobody knows: {line}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_from_a_map() {
        let line = "0               0x20000000      0x50000         full";
        assert_eq!(place(line), Ok((0x50000, 0x2005_0000)));
        assert!(place("Offset Length").is_err());
    }
}
