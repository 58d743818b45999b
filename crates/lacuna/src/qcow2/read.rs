//! Reading guest bytes.

use super::codec;
use super::format::CompressedRun;
use super::image::Image;
use super::in_flight::{Token, Touch};
use super::mapping::{Mapping, Run};
use super::meta::Meta;
use super::view::View;
use crate::buffer::Buffer;
use crate::storage::{Event, Storage, Transfer};
use crate::units::{GuestOffset, GuestRange};
use crate::{Error, Result};

impl<S: Storage> Image<S> {
    /// Enters a read that lies within the disk.
    pub(super) fn begin_read(&self, view: View<'_>, range: GuestRange) -> Result<Token> {
        begin(&mut self.0.meta.lock(), view, range)
    }

    pub(super) async fn read_guest(
        &self,
        view: View<'_>,
        offset: GuestOffset,
        buffer: Buffer,
    ) -> Transfer {
        let range = GuestRange::new(offset, buffer.len() as u64);
        // Under one lock, since most reads need no more than this.
        let begun = {
            let mut meta = self.0.meta.lock();
            begin(&mut meta, view, range).map(|token| (token, first_run(&mut meta, view, range)))
        };
        match begun {
            Ok((token, first)) => {
                let _hold = self.hold(token);
                self.read_runs(view, offset, buffer, first).await
            }
            Err(error) => (Err(error), buffer),
        }
    }

    /// Fills the buffer by a map; the caller keeps the mapped clusters from being reused.
    pub(super) async fn read_mapped(
        &self,
        view: View<'_>,
        offset: GuestOffset,
        buffer: Buffer,
    ) -> Transfer {
        self.read_runs(view, offset, buffer, None).await
    }

    /// As [`read_mapped`](Self::read_mapped), where the first run may be known already.
    async fn read_runs(
        &self,
        view: View<'_>,
        offset: GuestOffset,
        buffer: Buffer,
        mut first: Option<Run>,
    ) -> Transfer {
        let mut rest = buffer;
        let mut done: Option<Buffer> = None;
        let mut at = offset;
        loop {
            let range = GuestRange::new(at, rest.len() as u64);
            if range.is_empty() {
                return (Ok(()), Buffer::joined(done, rest));
            }
            let run = match first.take() {
                Some(run) => run,
                None => match self.plan(|meta| meta.run_in(view, range)).await {
                    Ok(run) => run,
                    Err(error) => return (Err(error), Buffer::joined(done, rest)),
                },
            };
            if run.len == range.len {
                let (result, last) = self.fill(view, run, at, rest).await;
                return (result, Buffer::joined(done, last));
            }
            let behind = rest.split_off(run.len as usize);
            let (result, part) = self.fill(view, run, at, rest).await;
            done = Some(Buffer::joined(done, part));
            rest = behind;
            at = at + run.len;
            if let Err(error) = result {
                return (Err(error), Buffer::joined(done, rest));
            }
        }
    }

    async fn fill(
        &self,
        view: View<'_>,
        run: Run,
        at: GuestOffset,
        mut buffer: Buffer,
    ) -> Transfer {
        match run.mapping {
            Mapping::Data { host, .. } => {
                self.0.storage.event(Event::ReadAio).await;
                self.data_storage().read_at(host, buffer).await
            }
            Mapping::Unallocated { .. } if !matches!(view, View::VmState) => {
                self.read_below(at, buffer).await
            }
            Mapping::Unallocated { .. } | Mapping::Zero { .. } => {
                buffer.fill(0);
                (Ok(()), buffer)
            }
            // Boxed, as all that is rare: it would make every read's future larger.
            Mapping::Compressed(run) => match Box::pin(self.decompress(run)).await {
                Ok(cluster) => {
                    let from = self.geometry().within_cluster(at.0) as usize;
                    let len = buffer.len();
                    buffer.copy_from_slice(&cluster[from..from + len]);
                    (Ok(()), buffer)
                }
                Err(error) => (Err(error), buffer),
            },
        }
    }

    /// Reads from the backing layer; where that ends (or is not), bytes are zero.
    async fn read_below(&self, at: GuestOffset, mut buffer: Buffer) -> Transfer {
        let Some(backing) = &self.0.backing else {
            buffer.fill(0);
            return (Ok(()), buffer);
        };
        let there = backing.size().saturating_sub(at.0).min(buffer.len() as u64) as usize;
        let mut beyond = buffer.split_off(there);
        beyond.fill(0);
        if there == 0 {
            buffer.unsplit(beyond);
            return (Ok(()), buffer);
        }
        let (result, mut buffer) = backing.read_boxed(at, buffer).await;
        buffer.unsplit(beyond);
        (result, buffer)
    }

    pub(super) async fn decompress(&self, run: CompressedRun) -> Result<Buffer> {
        let range = run.range();
        self.0.storage.event(Event::ReadCompressed).await;
        let input = self.load(range.start, range.len, "compressed cluster").await?;
        let mut cluster = Buffer::new(self.geometry().cluster_bytes() as usize);
        let kind = self.0.header.lock().compression;
        codec::decompress(kind, &input, &mut cluster).map_err(|error| {
            let cluster = format!("Compressed cluster at host offset {}", range.start);
            error.context(cluster).at(range.start)
        })?;
        Ok(cluster)
    }
}

fn begin(meta: &mut Meta, view: View<'_>, range: GuestRange) -> Result<Token> {
    meta.check_bounds_in(view, range)?;
    meta.in_flight
        .begin(Touch::Read, range)
        .map_err(|_| Error::invalid("A read had to wait, which no read ever has to"))
}

/// Looks up what a range begins with; nothing where that takes more than a look at cached tables.
fn first_run(meta: &mut Meta, view: View<'_>, range: GuestRange) -> Option<Run> {
    if range.is_empty() { None } else { meta.run_in(view, range).ok() }
}
