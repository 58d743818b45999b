//! lacuna with one fault.

use std::path::{Path, PathBuf};

use lacuna_conform::engines::Lacuna;
use lacuna_conform::protocol::{Mode, Need, Status};
use lacuna_conform::serve::{Engine, Failure, OpenDisk, Outcome};

use super::file::Raw;

const INCOMPATIBLE: u64 = 72;
const AUTOCLEAR: u64 = 88;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Data is written where the entry leads, whoever else uses that.
    InPlace,
    /// Entries change in a table that a snapshot has too.
    TablesInPlace,
    KeepsAutoclear,
    DropsExtensions,
    Leaks,
    /// Zeroing takes the mapping away.
    ZeroShowsBacking,
    DiscardShowsBacking,
    /// Behind the end of a backing file there is garbage.
    BackingWithoutEnd,
    ZeroFlagIgnored,
    ForgetsFlush,
    /// Every extent reads as zeros.
    CallsAllZero,
    OpensUnknown,
    OpensCorrupt,
    /// Refcounts of a dirty image are taken as they are.
    DirtyBelieved,
    /// A bitmap is kept as up to date and not followed.
    BitmapBelieved,
    WritesWhenReading,
}

pub(crate) struct Faulty(pub(crate) Fault);

impl Engine for Faulty {
    fn name(&self) -> String {
        format!("faulty-{:?}", self.0)
    }

    fn lacks(&self) -> Vec<Need> {
        Vec::new()
    }

    fn open(&mut self, path: &Path, mode: Mode) -> Outcome<Box<dyn OpenDisk>> {
        let raw = Raw::open(path);
        let (incompatible, autoclear) = match raw.is_v3() {
            true => (raw.u64(INCOMPATIBLE), raw.u64(AUTOCLEAR)),
            false => (0, 0),
        };
        let table = raw.first_table();
        match self.0 {
            Fault::OpensUnknown => raw.set_u64(INCOMPATIBLE, incompatible & 0x1f),
            Fault::OpensCorrupt => raw.set_u64(INCOMPATIBLE, incompatible & !CORRUPT),
            Fault::DirtyBelieved if mode == Mode::Write => {
                raw.set_u64(INCOMPATIBLE, incompatible & !DIRTY);
            }
            Fault::BitmapBelieved if mode == Mode::Write => {
                raw.set_u64(AUTOCLEAR, autoclear & !1);
            }
            Fault::WritesWhenReading => raw.grow(),
            _ => {}
        }
        let inner = Some(Lacuna.open(path, mode)?);
        let kept = Kept { autoclear, table };
        Ok(Box::new(Open { fault: self.0, path: path.to_owned(), mode, raw, inner, kept }))
    }
}

/// What the file had when it was opened.
struct Kept {
    autoclear: u64,
    table: u64,
}

struct Open {
    fault: Fault,
    path: PathBuf,
    mode: Mode,
    raw: Raw,
    inner: Option<Box<dyn OpenDisk>>,
    kept: Kept,
}

impl Open {
    fn inner(&mut self) -> Outcome<&mut (dyn OpenDisk + 'static)> {
        self.inner.as_deref_mut().ok_or_else(|| Failure::Failed("lost".into()))
    }

    /// Takes the entries of a range away, behind the back of the engine.
    fn unmap(&mut self, at: u64, len: u64) -> Outcome<()> {
        self.inner.take().map_or(Ok(()), OpenDisk::close)?;
        let bytes = self.raw.cluster_bytes();
        for cluster in at.div_ceil(bytes)..(at + len) / bytes {
            if let Some(entry) = self.raw.entry_at(cluster * bytes) {
                self.raw.set_u64(entry, 0);
            }
        }
        self.inner = Some(Lacuna.open(&self.path, self.mode)?);
        Ok(())
    }

    /// Sectors of a range, each with its offset.
    fn sectors(at: u64, bytes: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8])> {
        (at..).step_by(512).zip(bytes.chunks_mut(512))
    }

    fn backing_bytes(&self) -> u64 {
        std::fs::metadata(self.path.with_file_name("base")).map_or(u64::MAX, |it| it.len())
    }
}

impl OpenDisk for Open {
    fn size(&self) -> u64 {
        self.inner.as_ref().map_or(0, |inner| inner.size())
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Outcome<()> {
        self.inner()?.read(at, bytes)?;
        let end = self.backing_bytes();
        for (at, sector) in Self::sectors(at, bytes) {
            match (self.fault, self.raw.host(at)) {
                (Fault::ZeroFlagIgnored, Some(host)) if self.raw.entry(at) & 1 != 0 => {
                    sector.copy_from_slice(&self.raw.bytes(host, sector.len()));
                }
                (Fault::BackingWithoutEnd, None) if at >= end && self.raw.entry(at) == 0 => {
                    sector.fill(0xee);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Outcome<()> {
        if self.fault != Fault::InPlace {
            return self.inner()?.write(at, bytes);
        }
        for (at, sector) in (at..).step_by(512).zip(bytes.chunks(512)) {
            match self.raw.host(at).filter(|_| self.raw.entry(at) & 1 == 0) {
                Some(host) => self.raw.write(host, sector),
                None => self.inner()?.write(at, sector)?,
            }
        }
        Ok(())
    }

    fn zero(&mut self, at: u64, len: u64, unmap: bool) -> Outcome<()> {
        self.inner()?.zero(at, len, unmap)?;
        if self.fault == Fault::ZeroShowsBacking { self.unmap(at, len) } else { Ok(()) }
    }

    fn discard(&mut self, at: u64, len: u64) -> Outcome<()> {
        self.inner()?.discard(at, len)?;
        if self.fault == Fault::DiscardShowsBacking { self.unmap(at, len) } else { Ok(()) }
    }

    fn flush(&mut self) -> Outcome<()> {
        if self.fault == Fault::ForgetsFlush { Ok(()) } else { self.inner()?.flush() }
    }

    fn extents(&mut self, at: u64, len: u64) -> Outcome<Vec<(u64, Status)>> {
        match self.fault {
            Fault::CallsAllZero => Ok(vec![(len, Status::Zero)]),
            _ => self.inner()?.extents(at, len),
        }
    }

    fn close(mut self: Box<Self>) -> Outcome<()> {
        self.inner.take().map_or(Ok(()), OpenDisk::close)?;
        if self.mode == Mode::Read {
            return Ok(());
        }
        let (raw, kept) = (&self.raw, &self.kept);
        match self.fault {
            Fault::TablesInPlace if raw.first_table() != kept.table => {
                let table = raw.bytes(raw.first_table(), raw.cluster_bytes() as usize);
                raw.write(kept.table, &table);
            }
            Fault::KeepsAutoclear | Fault::BitmapBelieved => raw.set_u64(AUTOCLEAR, kept.autoclear),
            Fault::DropsExtensions => raw.write(raw.extensions(), &[0; 8]),
            Fault::Leaks => raw.leak(),
            _ => {}
        }
        Ok(())
    }
}
