//! Writing guest bytes.

use super::encode::{Encoder, Stream};
use super::format::{CompressedRun, L2Entry};
use super::image::Image;
use super::in_flight::Touch;
use super::mapping::{DataPlace, Mapping};
use super::meta::Meta;
use super::need::{Need, Planned};
use super::options::OnDiscard;
use super::plan_write::{NewData, WritePiece, link_data, plan_write};
use super::quarantine::FreedBy;
use super::vm_state::Region;
use crate::block::WriteFlags;
use crate::buffer::{Buffer, Hold, OuterHold};
use crate::storage::{Event, Storage, Transfer, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset, HostRange};
use crate::{Error, Result};

/// Zeros up to this many bytes are written as bytes, more as a zero range.
const SMALL_ZERO_BYTES: u64 = 64 << 10;

impl<S: Storage> Image<S> {
    pub(super) async fn write_guest(
        &self,
        offset: GuestOffset,
        buffer: Buffer,
        flags: WriteFlags,
    ) -> Transfer {
        let range = GuestRange::new(offset, buffer.len() as u64);
        if let Err(error) = self.0.meta.lock().check_bounds(range) {
            return (Err(error), buffer);
        }
        let (result, buffer) = self.write_pieces(Region::Disk, offset, buffer).await;
        if result.is_ok() && flags.contains(WriteFlags::FUA) {
            return (Box::pin(self.flush_all()).await, buffer);
        }
        (result, buffer)
    }

    /// Writes to a region that the range lies in. What the buffer holds rides with every part of it.
    pub(super) async fn write_pieces(
        &self,
        region: Region,
        offset: GuestOffset,
        buffer: Buffer,
    ) -> Transfer {
        let (mut done, mut rest, mut at) = (None, buffer, offset);
        let outer = OuterHold::of(&mut rest);
        let mut behind = None;
        while !rest.is_empty() {
            let range = GuestRange::new(at, rest.len() as u64);
            let piece = match self.plan(|meta| plan_write(meta, region, range, behind)).await {
                Ok(piece) => piece,
                Err(error) => return (Err(error), Buffer::joined(done, rest)),
            };
            let len = piece.len();
            behind = Some(piece.host_end());
            let later = rest.split_off(len as usize);
            let (result, part) = self.write_piece_of_guest(piece, rest, &outer).await;
            done = Some(Buffer::joined(done, part));
            rest = later;
            at = at + len;
            if let Err(error) = result {
                return (Err(error), Buffer::joined(done, rest));
            }
        }
        (Ok(()), Buffer::joined(done, rest))
    }

    async fn write_piece_of_guest(
        &self,
        piece: WritePiece,
        mut bytes: Buffer,
        outer: &OuterHold,
    ) -> Transfer {
        match piece {
            WritePiece::InPlace { token, host, .. } => {
                bytes.set_hold(outer.with(self.hold(token)));
                self.0.storage.event(Event::WriteAio).await;
                let (result, mut bytes) = self.data_storage().write_at(host, bytes).await;
                drop(bytes.take_hold());
                (result, bytes)
            }
            // Boxed: it would make the future of every write in place larger.
            WritePiece::Link(new) => {
                let hold = outer.with(self.hold(new.token));
                Box::pin(self.fill_and_link(new, bytes, hold)).await
            }
        }
    }

    async fn fill_and_link(&self, new: NewData, bytes: Buffer, hold: Hold) -> Transfer {
        match self.fill_head_and_tail(&new, hold).await {
            Ok(hold) => self.write_and_link(&new, bytes, hold).await,
            Err(error) => (Err(error), bytes),
        }
    }

    async fn write_and_link(&self, new: &NewData, mut bytes: Buffer, hold: Hold) -> Transfer {
        bytes.set_hold(hold);
        self.0.storage.event(Event::WriteAio).await;
        let (mut result, mut bytes) = self.data_storage().write_at(new.host, bytes).await;
        let hold = bytes.take_hold();
        if result.is_ok() {
            result = self.plan(|meta| link_data(meta, new)).await;
        }
        drop(hold);
        (result, bytes)
    }

    /// Brings the bytes around the write to the new place, so that nothing else shows there.
    pub(super) async fn fill_head_and_tail(&self, new: &NewData, hold: Hold) -> Result<Hold> {
        let hold = self.copy_old(new, new.head, hold).await?;
        self.copy_old(new, new.tail, hold).await
    }

    async fn copy_old(&self, new: &NewData, range: GuestRange, hold: Hold) -> Result<Hold> {
        if range.is_empty() {
            return Ok(hold);
        }
        let host = new.host_of(range.start);
        if self.reads_zero_in(new.region, range).await? {
            return match new.reads_zero {
                true => Ok(hold),
                false => self.write_zero_bytes(HostRange::new(host, range.len), hold).await,
            };
        }
        let (result, mut bytes) =
            self.read_mapped(new.region.view(), range.start, Buffer::new(range.len as usize)).await;
        result?;
        bytes.set_hold(hold);
        self.0.storage.event(Event::CowWrite).await;
        let (result, mut bytes) = self.data_storage().write_at(host, bytes).await;
        result.map(|()| bytes.take_hold())
    }

    pub(super) async fn write_zero_bytes(&self, host: HostRange, hold: Hold) -> Result<Hold> {
        if host.len > SMALL_ZERO_BYTES {
            let (hold, with_driver) = hold.shared();
            self.data_storage().write_zeroes_at(host, ZeroMode::MayUnmap, with_driver).await?;
            return Ok(hold);
        }
        let mut zeros = Buffer::zeroed(host.len as usize);
        zeros.set_hold(hold);
        let (result, mut zeros) = self.data_storage().write_at(host.start, zeros).await;
        result.map(|()| zeros.take_hold())
    }

    /// Says whether all of a range of the disk is known to read as zeros, here or below.
    pub(super) async fn reads_zero(&self, range: GuestRange) -> Result<bool> {
        self.reads_zero_in(Region::Disk, range).await
    }

    async fn reads_zero_in(&self, region: Region, range: GuestRange) -> Result<bool> {
        let mut at = range.start;
        while at < range.end() {
            let rest = GuestRange::new(at, range.end() - at);
            let run = self.plan(|meta| meta.run(rest)).await?;
            let is_zero = match run.mapping {
                Mapping::Compressed(_) | Mapping::Data { .. } => false,
                Mapping::Unallocated { .. } if region == Region::Disk => {
                    self.is_zero_below(GuestRange::new(at, run.len)).await?
                }
                Mapping::Unallocated { .. } | Mapping::Zero { .. } => true,
            };
            if !is_zero {
                return Ok(false);
            }
            at = at + run.len;
        }
        Ok(true)
    }

    // ---- compressed clusters ---------------------------------------------------------------

    /// Writes one whole cluster compressed; the disk's last part may be shorter than a cluster.
    ///
    /// What does not get smaller is written as it is, and so is what has a place of its own that is
    /// to be kept. Whatever the cluster held before is replaced. Durable after the next flush.
    ///
    /// # Errors
    /// `InvalidRequest` where the range is not one cluster; `Unsupported` with an external data
    /// file; else as for writes.
    pub async fn write_compressed(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        let range = GuestRange::new(offset, buffer.len() as u64);
        if let Err(error) = self.check_compressible(range) {
            return (Err(error), buffer);
        }
        match self.encoder().encode(&buffer) {
            Ok(stream) => self.write_encoded(offset, buffer, stream).await,
            Err(error) => (Err(error), buffer),
        }
    }

    /// Returns what compresses clusters for this image, on whatever thread.
    #[must_use]
    pub fn encoder(&self) -> Encoder {
        Encoder::new(self.0.header.lock().compression, self.geometry().cluster_bytes())
    }

    /// Writes one whole cluster whose compressed form the image's [`encoder`](Self::encoder) made;
    /// without one, as it is. As [`write_compressed`](Self::write_compressed) otherwise.
    ///
    /// # Errors
    /// As for [`write_compressed`](Self::write_compressed); `InvalidRequest` for the stream of
    /// another image's encoder.
    pub async fn write_encoded(
        &self,
        offset: GuestOffset,
        mut buffer: Buffer,
        stream: Option<Stream>,
    ) -> Transfer {
        self.give_way().await;
        let range = GuestRange::new(offset, buffer.len() as u64);
        let stream = stream.map(|stream| stream.for_encoder(&self.encoder())).transpose();
        match self.check_compressible(range).and(stream) {
            Ok(Some(stream)) => match self.write_stream(range, stream, &mut buffer).await {
                Ok(Streamed::Written) => (Ok(()), buffer),
                Ok(Streamed::PlaceIsKept) => {
                    self.write_guest(offset, buffer, WriteFlags::empty()).await
                }
                Err(error) => (Err(error), buffer),
            },
            Ok(None) => self.write_guest(offset, buffer, WriteFlags::empty()).await,
            Err(error) => (Err(error), buffer),
        }
    }

    fn check_compressible(&self, range: GuestRange) -> Result<()> {
        let meta = self.0.meta.lock();
        meta.check_bounds(range)?;
        let cluster_bytes = meta.geometry().cluster_bytes();
        let is_last = range.end().0 == meta.size_bytes && range.len < cluster_bytes;
        if range.is_empty()
            || !meta.geometry().is_aligned(range.start.0)
            || (range.len != cluster_bytes && !is_last)
        {
            return Err(Error::invalid(format!(
                "A compressed write takes one whole cluster of {cluster_bytes} bytes, not {} bytes at {}",
                range.len, range.start
            )));
        }
        match self.place() {
            DataPlace::External => Err(Error::unsupported(
                "An image with an external data file cannot have compressed clusters",
            )),
            DataPlace::ImageFile => Ok(()),
        }
    }

    /// Writes a stream and has the map show it; what the buffer of its content holds rides with it.
    async fn write_stream(
        &self,
        range: GuestRange,
        mut stream: Buffer,
        content: &mut Buffer,
    ) -> Result<Streamed> {
        let len = stream.len() as u64;
        let Some((token, host)) = self.plan(|meta| plan_stream(meta, range, len)).await? else {
            return Ok(Streamed::PlaceIsKept);
        };
        stream.set_hold(OuterHold::of(content).with(self.hold(token)));
        self.0.storage.event(Event::WriteCompressed).await;
        let (result, mut stream) = self.0.storage.write_at(host, stream).await;
        result?;
        let hold = stream.take_hold();
        let run = CompressedRun::new(host, len);
        self.plan(|meta| {
            link_stream(meta, range.start, run)?;
            meta.in_flight.linked(token, u64::MAX);
            Ok(())
        })
        .await?;
        drop(hold);
        Ok(Streamed::Written)
    }
}

/// What became of a compressed cluster.
enum Streamed {
    /// The cluster has a place of its own, which a stream somewhere else would take from it.
    PlaceIsKept,
    Written,
}

/// Chooses a place for a stream, unless the cluster has one that it is to keep.
fn plan_stream(
    meta: &mut Meta,
    range: GuestRange,
    len: u64,
) -> Planned<Option<(super::in_flight::Token, HostOffset)>> {
    meta.check_bounds(range)?;
    meta.before_change(range)?;
    meta.before_data()?;
    if keeps_place(meta, range.start)? {
        return Ok(None);
    }
    meta.own_table(range.start)?;
    let clusters = meta.geometry().cover_clusters(range);
    if meta.in_flight.conflicts(Touch::Exclusive, clusters) {
        return Err(Need::Turn(meta.in_flight.wait()).into());
    }
    let host = meta.allocate_bytes(len)?;
    let token = meta.in_flight.begin(Touch::Exclusive, clusters).map_err(Need::Turn)?;
    meta.in_flight.reserve(token, HostRange::new(host, len));
    Ok(Some((token, host)))
}

fn keeps_place(meta: &mut Meta, guest: GuestOffset) -> Planned<bool> {
    let keeps = meta.on_discard == OnDiscard::KeepMapping;
    Ok(keeps && meta.entry_to_change(guest)?.host().is_some())
}

fn link_stream(meta: &mut Meta, guest: GuestOffset, run: CompressedRun) -> Planned<()> {
    let old = meta.entry_to_change(guest)?;
    meta.prepare_free(old)?;
    let entry = L2Entry::compressed(run, meta.geometry());
    meta.set_entry(guest, entry)?;
    meta.free_entry(old, FreedBy::CopyOnWrite)?;
    meta.needs_data_sync = true;
    Ok(())
}
