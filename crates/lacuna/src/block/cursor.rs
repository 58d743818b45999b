//! Walking along the extents of a layer, one answer serving many steps.

use std::collections::VecDeque;

use super::{DynLayer, Extent};
use crate::units::GuestRange;
use crate::{Error, ErrorKind, Result};

/// Remembers the last answer of a layer. Only for layers that nobody changes meanwhile, or whose
/// changes the walk need not see.
#[derive(Default)]
pub(crate) struct ExtentCursor {
    known: VecDeque<Extent>,
}

impl ExtentCursor {
    /// Returns the run that starts where `rest` starts, at most as long as `rest`.
    pub(crate) async fn at<L: DynLayer + ?Sized>(
        &mut self,
        layer: &L,
        rest: GuestRange,
    ) -> Result<Extent> {
        while self.known.front().is_some_and(|extent| extent.range.end() <= rest.start) {
            self.known.pop_front();
        }
        if !self.known.front().is_some_and(|extent| extent.range.contains(rest.start)) {
            self.known = layer.extents_boxed(rest).await?.into();
        }
        let known = self.known.front().and_then(|extent| {
            let range = extent.range.intersection(&rest)?;
            let status = extent.status.advanced(range.start - extent.range.start);
            (range.start == rest.start).then_some(Extent { range, status })
        });
        known.ok_or_else(|| no_status(rest))
    }
}

/// A layer broke its promise to give at least one extent: better said than looped over.
pub(crate) fn no_status(rest: GuestRange) -> Error {
    let text = format!("The layer gave no block status for offset {}", rest.start);
    Error::new(ErrorKind::Io, text)
}
