//! One storage, many owners.

use std::future::Future;
use std::sync::Arc;

use super::{Capabilities, Event, HostExtent, HostSource, Storage, Transfer, ZeroMode};
use crate::Result;
use crate::buffer::{Buffer, Hold};
use crate::units::{HostOffset, HostRange};

impl<S: Storage> Storage for Arc<S> {
    fn read_at(&self, offset: HostOffset, buffer: Buffer) -> impl Future<Output = Transfer> + Send {
        S::read_at(self, offset, buffer)
    }

    fn write_at(
        &self,
        offset: HostOffset,
        buffer: Buffer,
    ) -> impl Future<Output = Transfer> + Send {
        S::write_at(self, offset, buffer)
    }

    fn write_durably_at(
        &self,
        offset: HostOffset,
        buffer: Buffer,
    ) -> impl Future<Output = Transfer> + Send {
        S::write_durably_at(self, offset, buffer)
    }

    fn write_zeroes_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> impl Future<Output = Result<()>> + Send {
        S::write_zeroes_at(self, range, mode, hold)
    }

    fn write_zeroes_durably_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> impl Future<Output = Result<()>> + Send {
        S::write_zeroes_durably_at(self, range, mode, hold)
    }

    fn punch_hole_at(
        &self,
        range: HostRange,
        hold: Hold,
    ) -> impl Future<Output = Result<()>> + Send {
        S::punch_hole_at(self, range, hold)
    }

    fn allocate_at(&self, range: HostRange) -> impl Future<Output = Result<()>> + Send {
        S::allocate_at(self, range)
    }

    fn flush(&self) -> impl Future<Output = Result<()>> + Send {
        S::flush(self)
    }

    fn len(&self) -> impl Future<Output = Result<u64>> + Send {
        S::len(self)
    }

    fn is_empty(&self) -> impl Future<Output = Result<bool>> + Send {
        S::is_empty(self)
    }

    fn set_len(&self, len: u64, hold: Hold) -> impl Future<Output = Result<()>> + Send {
        S::set_len(self, len, hold)
    }

    fn discard_at(&self, range: HostRange, hold: Hold) -> impl Future<Output = Result<()>> + Send {
        S::discard_at(self, range, hold)
    }

    fn extents_at(&self, range: HostRange) -> impl Future<Output = Result<Vec<HostExtent>>> + Send {
        S::extents_at(self, range)
    }

    fn host_source(&self, range: HostRange) -> Option<HostSource> {
        S::host_source(self, range)
    }

    fn copy_at(
        &self,
        source: HostSource,
        to: HostOffset,
        hold: Hold,
    ) -> impl Future<Output = Result<()>> + Send {
        S::copy_at(self, source, to, hold)
    }

    fn status_at(&self, range: HostRange) -> impl Future<Output = Result<HostExtent>> + Send {
        S::status_at(self, range)
    }

    fn event(&self, event: Event) -> impl Future<Output = ()> + Send {
        S::event(self, event)
    }

    fn capabilities(&self) -> Capabilities {
        S::capabilities(self)
    }
}
