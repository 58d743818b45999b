//! An image file, looked at and changed behind an engine's back.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The bits of an entry that say where it leads.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A qcow2 file, byte by byte.
pub(crate) struct Raw(File);

impl Raw {
    pub(crate) fn open(path: &Path) -> Self {
        Self(OpenOptions::new().read(true).write(true).open(path).unwrap())
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        // Behind the end of the file there are zeros.
        while let Ok(count @ 1..) = self.0.read_at(&mut bytes[done..], at + done as u64) {
            done += count;
        }
        bytes
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    pub(crate) fn grow(&self) {
        self.write(self.0.metadata().unwrap().len(), &[0; 512]);
    }

    pub(crate) fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes(at, 8).try_into().unwrap())
    }

    pub(crate) fn set_u64(&self, at: u64, value: u64) {
        self.write(at, &value.to_be_bytes());
    }

    fn u32(&self, at: u64) -> u64 {
        self.u64(at) >> 32
    }

    pub(crate) fn is_v3(&self) -> bool {
        self.u32(4) >= 3
    }

    pub(crate) fn cluster_bytes(&self) -> u64 {
        1 << self.u32(20)
    }

    /// Offset of the first header extension.
    pub(crate) fn extensions(&self) -> u64 {
        if self.is_v3() { self.u32(100) } else { 72 }
    }

    /// Offset of the first L2 table.
    pub(crate) fn first_table(&self) -> u64 {
        self.u64(self.u64(40)) & OFFSET
    }

    /// Offset of the standard L2 entry for a guest offset, where there is a table.
    pub(crate) fn entry_at(&self, guest: u64) -> Option<u64> {
        let cluster = guest / self.cluster_bytes();
        let per_table = self.cluster_bytes() / 8;
        let table = self.u64(self.u64(40) + cluster / per_table * 8) & OFFSET;
        (table != 0).then_some(table + cluster % per_table * 8)
    }

    /// The standard L2 entry for a guest offset, 0 where there is no table.
    pub(crate) fn entry(&self, guest: u64) -> u64 {
        self.entry_at(guest).map_or(0, |at| self.u64(at))
    }

    /// Where an entry leads, where that is data.
    pub(crate) fn host(&self, guest: u64) -> Option<u64> {
        let entry = self.entry(guest);
        let is_standard = entry >> 62 & 1 == 0;
        (is_standard && entry & OFFSET != 0)
            .then_some((entry & OFFSET) + guest % self.cluster_bytes())
    }

    /// Counts a cluster that nobody uses, with refcounts of 16 bits.
    pub(crate) fn leak(&self) {
        let block = self.u64(self.u64(48));
        let unused = (0..).find(|index| self.bytes(block + index * 2, 2) == [0, 0]).unwrap();
        self.write(block + unused * 2, &[0, 1]);
        self.write((unused + 1) * self.cluster_bytes() - 512, &[0; 512]);
    }
}
