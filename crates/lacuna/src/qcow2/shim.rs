//! Stands in for the codecs and the snapshot table until they land.
use crate::Result;
use crate::storage::Storage;
pub(super) async fn repair_dirty<S: Storage>(_: &S) -> Result<()> {
    Err(crate::Error::unsupported("Dirty images cannot be repaired yet"))
}
pub(super) mod snapshots {
    use super::super::{format::Header, overlap::Structures};
    use crate::{Result, storage::Storage};
    pub(in super::super) async fn add_structures<S: Storage>(
        _: &S,
        _: &Header,
        _: &mut Structures,
    ) -> Result<()> {
        Ok(())
    }
}
#[derive(Clone, Copy, Debug)]
pub(super) struct RefcountWidth(u32);
impl RefcountWidth {
    pub(super) const fn new(order: u32) -> Self {
        Self(order)
    }
    pub(super) fn read(self, b: &[u8], i: usize) -> u64 {
        match self.0 {
            0..=2 => {
                let bits = 1 << self.0;
                let bit = i * bits;
                u64::from(b[bit / 8] >> (bit % 8)) & ((1 << bits) - 1)
            }
            o => {
                let n = 1 << (o - 3);
                b[i * n..(i + 1) * n].iter().fold(0, |a, x| a << 8 | u64::from(*x))
            }
        }
    }
    pub(super) fn write(self, b: &mut [u8], i: usize, v: u64) {
        match self.0 {
            0..=2 => {
                let bits = 1 << self.0;
                let bit = i * bits;
                let m = ((1u16 << bits) - 1) as u8;
                b[bit / 8] = b[bit / 8] & !(m << (bit % 8)) | ((v as u8) & m) << (bit % 8);
            }
            o => {
                let n = 1 << (o - 3);
                b[i * n..(i + 1) * n].copy_from_slice(&v.to_be_bytes()[8 - n..]);
            }
        }
    }
}
