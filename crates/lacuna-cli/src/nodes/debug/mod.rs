//! A storage for tests: its requests fail or wait by rules ([`rules`]), as QEMU's `blkdebug` has
//! it, and are written in whole blocks where it has any ([`blocks`], [`turns`]).

mod blocks;
mod rules;
mod turns;

use std::sync::Arc;

use lacuna::Result;
use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{Capabilities, Event, HostExtent, Storage, Transfer, ZeroMode};
use lacuna::units::{HostOffset, HostRange};

pub(crate) use rules::{Found, Rules, is_by_rule};

use self::blocks::{Blocks, write_part};
use self::turns::{Share, Turn, Turns};
use super::any::AnyStorage;
use crate::verbs::spec::debug::Limits;

pub(super) struct Debug {
    below: AnyStorage,
    rules: Arc<Rules>,
    limits: Limits,
    turns: Turns,
}

impl Debug {
    pub(super) fn new(below: AnyStorage, rules: Arc<Rules>, limits: Limits) -> Self {
        Self { below, rules, limits, turns: Turns::default() }
    }

    fn blocks(&self, offset: HostOffset, len: u64) -> Blocks {
        Blocks::around(offset.0, len, self.limits.align())
    }

    /// Waits until nobody changes part of a block in a range; without blocks nobody does.
    async fn enter(&self, blocks: &Blocks, share: Share) -> Option<Turn<'_>> {
        match self.limits.align() {
            1 => None,
            _ => Some(self.turns.enter(blocks.around.clone(), share).await),
        }
    }
}

impl Storage for Debug {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        let blocks = self.blocks(offset, buffer.len() as u64);
        let _turn = self.enter(&blocks, Share::Whole).await;
        match self.rules.check("read", offset.0, buffer.len() as u64) {
            Ok(()) => self.below.read_at(offset, buffer).await,
            Err(error) => (Err(error), buffer),
        }
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        let blocks = self.blocks(offset, buffer.len() as u64);
        let _turn = self.enter(&blocks, blocks.share()).await;
        if blocks.share() == Share::Part {
            return write_part(&self.below, &self.rules, &blocks, buffer).await;
        }
        match self.rules.check("write", offset.0, buffer.len() as u64) {
            Ok(()) => self.below.write_at(offset, buffer).await,
            Err(error) => (Err(error), buffer),
        }
    }

    async fn write_durably_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        let blocks = self.blocks(offset, buffer.len() as u64);
        if self.below.is_export() && blocks.share() == Share::Whole {
            let _turn = self.enter(&blocks, Share::Whole).await;
            return match self.rules.check("write", offset.0, buffer.len() as u64) {
                Ok(()) => self.below.write_durably_at(offset, buffer).await,
                Err(error) => (Err(error), buffer),
            };
        }
        // A flush of its own, to which rules apply.
        match self.write_at(offset, buffer).await {
            (Ok(()), buffer) => (self.flush().await, buffer),
            failed => failed,
        }
    }

    async fn write_zeroes_durably_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> Result<()> {
        if self.below.is_export() {
            self.rules.check("write-zeroes", range.start.0, range.len)?;
            return self.below.write_zeroes_durably_at(range, mode, hold).await;
        }
        self.write_zeroes_at(range, mode, hold).await?;
        self.flush().await
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        let blocks = self.blocks(range.start, range.len);
        let _turn = self.enter(&blocks, blocks.share()).await;
        self.rules.check("write-zeroes", range.start.0, range.len)?;
        self.below.write_zeroes_at(range, mode, hold).await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        let blocks = self.blocks(range.start, range.len);
        let _turn = self.enter(&blocks, blocks.share()).await;
        self.rules.check("discard", range.start.0, range.len)?;
        self.below.punch_hole_at(range, hold).await
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.below.allocate_at(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.rules.check("flush", 0, 0)?;
        self.below.flush().await
    }

    async fn len(&self) -> Result<u64> {
        self.below.len().await
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        self.below.set_len(len, hold).await
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        self.rules.check("block-status", range.start.0, range.len)?;
        self.below.status_at(range).await
    }

    async fn event(&self, event: Event) {
        self.rules.event(event.name()).await;
    }

    fn capabilities(&self) -> Capabilities {
        let below = self.below.capabilities();
        let align = u32::try_from(self.limits.align()).unwrap_or(u32::MAX);
        let preferred_alignment_bytes = below.preferred_alignment_bytes.max(align);
        Capabilities { preferred_alignment_bytes, ..below }
    }
}
