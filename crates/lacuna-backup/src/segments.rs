//! A point in segments: kept one after the other, each whole before the next begins.

use lacuna::buffer::Buffer;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{ErrorKind, Result};
use std::path::PathBuf;

use crate::checksum::Checksum;
use crate::copy::{CopyOptions, Keeper};
use crate::durable::{self, part};
use crate::folder::Folder;
use crate::name::PointName;
use crate::place::{OpenAs, Place};
use crate::point::{Content, SegmentFacts, Totals};
use crate::segment::{Frame, Kind, Segment, SegmentWriter};

/// Keeps frames in segments.
pub(crate) struct SegmentKeeper<P: Place> {
    files: Files<P>,
    known: GuestOffset,
    seal: Checksum,
    segments: Vec<SegmentFacts>,
    open: Option<SegmentWriter<P::Storage>>,
    totals: Totals,
}

/// Where the segments of a point lie.
struct Files<P> {
    place: P,
    folder: PathBuf,
    point: PointName,
}

impl<P> Files<P> {
    fn segment(&self, number: usize) -> PathBuf {
        self.folder.join(format!("{}.{number:06}.seg", self.point))
    }
}

impl<P: Place> SegmentKeeper<P> {
    /// Finds the segments that were ended before a cut; those of another try are none of ours, and
    /// are replaced.
    pub(crate) async fn open(
        folder: &Folder<P>,
        point: &PointName,
        known: GuestOffset,
        seal: Checksum,
    ) -> Result<Self> {
        let place = folder.place().clone();
        let files = Files { place, folder: folder.path().to_owned(), point: point.clone() };
        let (segments, open, totals) = (Vec::new(), None, Totals::default());
        let mut keeper = Self { files, known, seal, segments, open, totals };
        while let Some(segment) = keeper.next_there().await? {
            keeper.take(&segment);
        }
        Ok(keeper)
    }

    /// Opens the next segment where it is there, and a part of this try.
    async fn next_there(&self) -> Result<Option<Segment<P::Storage>>> {
        let path = self.files.segment(self.segments.len());
        let storage = match self.files.place.open(&path, OpenAs::Unchanging) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            storage => storage?,
        };
        let segment = match Segment::open(storage).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(None),
            segment => segment?,
        };
        let is_ours =
            segment.header.begun == self.seal && segment.index.covers.start == self.position();
        Ok(is_ours.then_some(segment))
    }

    fn take(&mut self, segment: &Segment<P::Storage>) {
        for entry in &segment.index.entries {
            self.count(entry.range, entry.kind == Kind::Zero);
        }
        let covers = segment.index.covers;
        self.push(SegmentFacts {
            start: covers.start.0,
            end: covers.end().0,
            bytes: segment.file_bytes,
            checksum: segment.index.checksum,
        });
    }

    fn push(&mut self, facts: SegmentFacts) {
        self.totals.stored_bytes += facts.bytes;
        self.segments.push(facts);
    }

    fn count(&mut self, range: GuestRange, is_zero: bool) {
        match is_zero {
            true => self.totals.zero_bytes += range.len,
            false => self.totals.data_bytes += range.len,
        }
    }

    /// Returns up to where segments that are whole tell of the disk.
    pub(crate) fn position(&self) -> GuestOffset {
        GuestOffset(self.segments.last().map_or(0, |segment| segment.end))
    }

    async fn writer(&mut self) -> Result<&mut SegmentWriter<P::Storage>> {
        if self.open.is_none() {
            let part = part(&self.files.segment(self.segments.len()));
            let storage = self.files.place.open(&part, OpenAs::New)?;
            let writer = SegmentWriter::begin(storage, self.seal, self.position()).await?;
            self.open = Some(writer);
        }
        Ok(self.open.as_mut().expect("it was just opened"))
    }

    /// Ends the open segment, if there is one, and gives it its name.
    async fn end(&mut self, to: GuestOffset) -> Result<()> {
        let Some(writer) = self.open.take() else { return Ok(()) };
        let facts = writer.finish(to).await?;
        let path = self.files.segment(self.segments.len());
        durable::rename(&self.files.place, &part(&path), &path)?;
        self.push(facts);
        Ok(())
    }

    /// Ends the last segment; returns what the manifest says.
    pub(crate) async fn finish(mut self, end: GuestOffset) -> Result<(Totals, Content)> {
        self.end(end).await?;
        Ok((self.totals, Content::Segments { segments: self.segments }))
    }
}

impl<P: Place> Keeper for SegmentKeeper<P> {
    type Packed = Frame;

    fn pack(start: GuestOffset, bytes: Buffer, options: CopyOptions) -> Result<Frame> {
        Frame::pack(start, bytes, options.level)
    }

    fn zeros(range: GuestRange) -> Frame {
        Frame::zeros(range)
    }

    async fn keep(&mut self, frame: Frame, options: CopyOptions) -> Result<GuestOffset> {
        let (range, is_zero) = (frame.range(), frame.is_zero());
        // Behind the end of the disk below everything reads as zeros as it is.
        if is_zero && range.start >= self.known {
            return Ok(range.end());
        }
        self.count(range, is_zero);
        let writer = self.writer().await?;
        writer.add(frame).await?;
        if writer.is_full(options.durable_every_bytes) {
            self.end(range.end()).await?;
        }
        Ok(range.end())
    }
}
