//! What an image knows of guest bytes without reading them.
//!
//! * A long walk over an image that is not written here, or over a snapshot, takes whole stretches
//!   of tables from storage, past the cached slices: it would push out what requests need, and pay
//!   for each slice.
//! * What the image claims of the whole disk (000-6) is believed as it stood when the question came:
//!   whoever writes meanwhile may or may not show.
//! * What storage says of data clusters is asked only with [`ExtentDetail::Host`].

use std::sync::Arc;

use super::format::AutoclearFeatures;
use super::host_status::HostStatuses;
use super::image::Image;
use super::mapping::{Decoder, Mapping, Run};
use super::options::ExtentDetail;
use super::view::View;
use crate::Result;
use crate::block::{AllocationDepth, DynLayer, Extent, ExtentBuilder, ExtentStatus};
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::{GuestRange, HostOffset, HostRange};

/// With so many extents an answer ends, so that its memory stays bounded. A stretch is told to its
/// end all the same, or it would be read again for the next answer: that is up to 131072 more.
const EXTENTS_AT_ONCE: usize = 4096;
/// How much of a table is read at once.
const STRETCH_BYTES: u64 = 64 << 10;

/// Entries of one table, read past the cache.
struct Stretch {
    covers: GuestRange,
    entries: Buffer,
}

/// Knows which facts are an image's own.
struct Teller {
    decoder: Decoder,
    has_backing: bool,
    detail: ExtentDetail,
    claims: AutoclearFeatures,
}

/// What one answer is made of, so far.
struct Walk<'a> {
    view: View<'a>,
    builder: ExtentBuilder,
    stretch: Option<Stretch>,
    host: HostStatuses,
}

impl<'a> Walk<'a> {
    fn by(view: View<'a>) -> Self {
        let (builder, host) = (ExtentBuilder::default(), HostStatuses::default());
        Self { view, builder, stretch: None, host }
    }
}

impl<S: Storage> Image<S> {
    pub(super) async fn extents_of(
        &self,
        view: View<'_>,
        range: GuestRange,
    ) -> Result<Vec<Extent>> {
        let token = self.begin_read(view, range)?;
        let _hold = self.hold(token);
        let teller = self.teller(view);
        let mut walk = Walk::by(view);
        let mut at = range.start;
        while at < range.end() && walk.builder.len() < EXTENTS_AT_ONCE {
            let rest = GuestRange::new(at, range.end() - at);
            if let Some((found, mapping)) = self.tell(&teller, rest, &mut walk).await? {
                self.push_run(&teller, found, mapping, &mut walk).await?;
            }
            at = walk.builder.end().unwrap_or_else(|| range.end());
        }
        Ok(walk.builder.finish())
    }

    /// Adds what the image knows by itself; returns the first run about which others must be asked.
    async fn tell(
        &self,
        teller: &Teller,
        rest: GuestRange,
        walk: &mut Walk<'_>,
    ) -> Result<Option<(GuestRange, Mapping)>> {
        if teller.claims.contains(AutoclearFeatures::ALL_UNALLOCATED) {
            return Ok(Some((rest, Mapping::Unallocated { reserved: None })));
        }
        if !walk.stretch.as_ref().is_some_and(|stretch| stretch.covers.contains(rest.start)) {
            walk.stretch = self.read_stretch(walk.view, rest).await?;
        }
        match &walk.stretch {
            Some(stretch) => match teller.tell(stretch, rest, &mut walk.host, &mut walk.builder) {
                Ok(open) => Ok(open),
                Err(error) => self.contradiction(walk.view, error).await,
            },
            None => {
                let run = self.plan(|meta| meta.run_in(walk.view, rest)).await?;
                Ok(Some((GuestRange::new(rest.start, run.len), run.mapping)))
            }
        }
    }

    fn teller(&self, view: View<'_>) -> Teller {
        let meta = self.0.meta.lock();
        Teller {
            decoder: meta.decoder,
            has_backing: self.0.backing.is_some(),
            detail: self.0.detail,
            claims: view.claims(&meta),
        }
    }

    /// Reads the entries for the start of a range that is worth it, where there are any.
    async fn read_stretch(&self, view: View<'_>, rest: GuestRange) -> Result<Option<Stretch>> {
        let (table, geometry) = {
            let meta = self.0.meta.lock();
            let is_short = rest.end() <= meta.slice_end(rest.start);
            match meta.table_in(view, rest.start) {
                Ok(Some(table)) if view.is_settled(&meta) && !is_short => (table, *meta.geometry()),
                _ => return Ok(None),
            }
        };
        let (width, first) = (geometry.entry_width().bytes(), geometry.l2_index(rest.start));
        let wanted = geometry.cover_clusters(rest).len >> geometry.cluster_bits();
        let count = (geometry.l2_entries() - first).min(STRETCH_BYTES / width).min(wanted);
        let entries = self.load(table + first * width, count * width, "L2 table").await?;
        let start = geometry.cover_clusters(GuestRange::new(rest.start, 1)).start;
        let covers = GuestRange::new(start, count << geometry.cluster_bits());
        Ok(Some(Stretch { covers, entries }))
    }

    /// Adds a run, or as much of it as the layers below say at once.
    async fn push_run(
        &self,
        teller: &Teller,
        range: GuestRange,
        mapping: Mapping,
        walk: &mut Walk<'_>,
    ) -> Result<()> {
        match (teller.by_map(mapping), mapping) {
            (Some(status), Mapping::Data { host, .. }) if teller.asks_host(status) => {
                self.push_data(range, status, host, walk).await
            }
            (Some(status), _) => {
                walk.builder.push(Extent { range, status });
                Ok(())
            }
            (None, _) => self.extents_below(range, mapping, &mut walk.builder).await,
        }
    }

    /// Adds data clusters; what storage knows to be zeros reads as zeros.
    async fn push_data(
        &self,
        range: GuestRange,
        status: ExtentStatus,
        host: HostOffset,
        walk: &mut Walk<'_>,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end() {
            let done = at - range.start;
            let rest = HostRange::new(host + done, range.len - done);
            let found = walk.host.first(self.data_storage(), rest).await?;
            let reads_zero = found.status.reads_zero();
            let status = ExtentStatus { reads_zero, ..status.advanced(done) };
            walk.builder.push(Extent { range: GuestRange::new(at, found.len), status });
            at = at + found.len;
        }
        Ok(())
    }

    /// Adds what the backing layer knows of an unallocated range, or as much as it says at once.
    async fn extents_below(
        &self,
        range: GuestRange,
        mapping: Mapping,
        builder: &mut ExtentBuilder,
    ) -> Result<()> {
        let nothing = nothing(mapping);
        let there = match &self.0.backing {
            Some(backing) => backing.size().saturating_sub(range.start.0).min(range.len),
            None => 0,
        };
        if let (Some(backing), true) = (&self.0.backing, there > 0) {
            let below = GuestRange::new(range.start, there);
            for extent in backing.extents_boxed(below).await? {
                let status = ExtentStatus { depth: extent.status.depth.below(), ..extent.status };
                builder.push(Extent { status, ..extent });
            }
            if builder.end() < Some(below.end()) {
                return Ok(());
            }
        }
        let beyond = GuestRange::new(range.start + there, range.len - there);
        builder.push(Extent { range: beyond, status: nothing.advanced(there) });
        Ok(())
    }

    /// Returns how many leading bytes of a range are known to be zeros below this image; from the
    /// first answer of the backing layer only.
    pub(super) async fn zero_prefix_below(&self, range: GuestRange) -> Result<u64> {
        let Some(backing) = &self.0.backing else { return Ok(range.len) };
        let there = backing.size().saturating_sub(range.start.0).min(range.len);
        if there == 0 {
            return Ok(range.len);
        }
        let extents = backing.extents_boxed(GuestRange::new(range.start, there)).await?;
        let zeros = extents.iter().take_while(|extent| extent.status.reads_zero);
        let prefix = zeros.map(|extent| extent.range.len).sum::<u64>();
        Ok(if prefix == there { range.len } else { prefix })
    }

    /// Says whether all of a range is known to be zeros below this image.
    pub(super) async fn is_zero_below(&self, range: GuestRange) -> Result<bool> {
        let Some(backing) = &self.0.backing else { return Ok(true) };
        let there = backing.size().saturating_sub(range.start.0).min(range.len);
        is_known_zero(backing, GuestRange::new(range.start, there)).await
    }
}

impl Teller {
    /// Adds the runs at the start of `range`, at most to the end of the stretch: all in one go, since
    /// there may be millions. Stops at a run about which others must be asked and returns it.
    fn tell(
        &self,
        stretch: &Stretch,
        range: GuestRange,
        host: &mut HostStatuses,
        builder: &mut ExtentBuilder,
    ) -> Result<Option<(GuestRange, Mapping)>> {
        let (mut at, end) = (range.start, range.end().min(stretch.covers.end()));
        while at < end {
            let run = self.run(stretch, GuestRange::new(at, end - at))?;
            let found = GuestRange::new(at, run.len);
            let Some(status) = self.status(run, host) else {
                return Ok(Some((found, run.mapping)));
            };
            builder.push(Extent { range: found, status });
            at = found.end();
        }
        Ok(None)
    }

    fn run(&self, stretch: &Stretch, rest: GuestRange) -> Result<Run> {
        let geometry = &self.decoder.geometry;
        let skipped = (rest.start - stretch.covers.start) >> geometry.cluster_bits();
        let entries = &stretch.entries[(skipped * geometry.entry_width().bytes()) as usize..];
        self.decoder.run(entries, rest)
    }

    fn status(&self, run: Run, host: &mut HostStatuses) -> Option<ExtentStatus> {
        match (self.by_map(run.mapping), run.mapping) {
            (Some(data), Mapping::Data { host: at, .. }) if self.asks_host(data) => {
                let found = host.known(HostRange::new(at, run.len))?;
                let reads_zero = found.status.reads_zero();
                (found.len == run.len).then_some(ExtentStatus { reads_zero, ..data })
            }
            (None, mapping) if !self.has_backing => Some(nothing(mapping)),
            (known, _) => known,
        }
    }

    /// Returns the facts that the image knows by itself; nothing where the backing layer decides.
    fn by_map(&self, mapping: Mapping) -> Option<ExtentStatus> {
        let known = status(mapping)?;
        let reads_zero = known.reads_zero || self.claims.contains(AutoclearFeatures::ALL_ZERO);
        Some(ExtentStatus { reads_zero, ..known })
    }

    /// Says whether storage may know more of a data cluster.
    fn asks_host(&self, known: ExtentStatus) -> bool {
        self.detail == ExtentDetail::Host && !known.reads_zero
    }
}

async fn is_known_zero(layer: &Arc<dyn DynLayer>, range: GuestRange) -> Result<bool> {
    let mut at = range.start;
    while at < range.end() {
        let rest = GuestRange::new(at, range.end() - at);
        for extent in layer.extents_boxed(rest).await? {
            if !extent.status.reads_zero {
                return Ok(false);
            }
            at = extent.range.end();
        }
    }
    Ok(true)
}

/// Returns the facts of a run that no layer allocates.
fn nothing(mapping: Mapping) -> ExtentStatus {
    let is_hole = mapping.host().is_none();
    ExtentStatus { is_hole, host: mapping.host(), ..ExtentStatus::UNALLOCATED }
}

/// Returns the facts of a mapping; nothing where the backing layer has to be asked.
fn status(mapping: Mapping) -> Option<ExtentStatus> {
    let here = ExtentStatus {
        depth: AllocationDepth::TOP,
        reads_zero: false,
        is_hole: false,
        is_compressed: false,
        host: mapping.host(),
    };
    match mapping {
        Mapping::Compressed(_) => Some(ExtentStatus { is_compressed: true, ..here }),
        Mapping::Data { .. } => Some(here),
        Mapping::Unallocated { .. } => None,
        Mapping::Zero { reserved } => {
            Some(ExtentStatus { reads_zero: true, is_hole: reserved.is_none(), ..here })
        }
    }
}
