//! An image that is open on a simulated host, with the executor that decides the order.

use std::sync::Arc;

use lacuna::block::{DynLayer, Extent, Layer};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{Access, Image, OnDiscard, OpenOptions, Parts, Placement, ZeroUnmap};
use lacuna::units::GuestRange;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Executor, Random, SparseBytes};

use crate::jobs;

/// How an image is opened, and over what.
#[derive(Clone)]
pub(crate) struct Opening {
    /// Seed of the options.
    pub(crate) ways: u64,
    pub(crate) version: Version,
    pub(crate) below: Option<Arc<dyn DynLayer>>,
    /// What that holds.
    pub(crate) below_bytes: Option<Vec<u8>>,
}

pub(crate) struct Scene<'a> {
    pub(crate) host: SimHost,
    pub(crate) executor: Executor<'a>,
    pub(crate) image: Image<SimStorage>,
}

impl Opening {
    fn options(&self) -> OpenOptions {
        let random = &mut Random::new(self.ways);
        let mut options = OpenOptions::new(Access::ReadWrite);
        if random.one_in(2) {
            options = options.cache_bytes(1);
        }
        if random.one_in(2) {
            options = options.placement(Placement::QemuCompatible);
        }
        if random.one_in(4) {
            options = options.zero_unmap(ZeroUnmap::Unallocate);
        }
        if random.one_in(8) && self.version == Version::V3 {
            options = options.on_discard(OnDiscard::KeepMapping);
        }
        options
    }
}

impl Scene<'_> {
    /// Opens what a file holds.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub(crate) fn open(opening: &Opening, file: SparseBytes, order: u64) -> Result<Self, String> {
        let host = SimHost::new(Pace::Executor, order);
        let storage = host.add_file(file);
        let mut executor = Executor::new(order);
        executor.attach(Arc::new(host.clone()));
        let parts = Parts { storage, data: None, backing: opening.below.clone() };
        let image = executor.block_on(Image::open(parts, opening.options()));
        let image = image.map_err(|error| format!("Opening: {error}"))?;
        Ok(Self { host, executor, image })
    }

    /// Runs something on the image to its end.
    ///
    /// # Errors
    /// Its own, with what it was.
    pub(crate) fn run<T, F>(
        &mut self,
        what: &str,
        work: impl FnOnce(Image<SimStorage>) -> F,
    ) -> Result<T, String>
    where
        T: 'static,
        F: Future<Output = lacuna::Result<T>> + 'static,
    {
        let result = self.executor.block_on(work(self.image.clone()));
        result.map_err(|error| format!("{what}: {error}"))
    }

    pub(crate) fn content(&mut self) -> Result<Vec<u8>, String> {
        self.run("Reading all", |image| async move { jobs::whole(&image).await })
    }

    /// Returns what the whole disk's extents call zeros.
    pub(crate) fn zeros(&mut self) -> Result<Vec<GuestRange>, String> {
        let extents = self.run("Extents", |image| async move { extents(&image).await })?;
        let zeros = extents.into_iter().filter(|extent| extent.status.reads_zero);
        Ok(zeros.map(|extent| extent.range).collect())
    }

    /// Returns what a bitmap says has changed.
    pub(crate) fn dirty(&mut self, name: &str) -> Result<Vec<GuestRange>, String> {
        let owned = name.to_owned();
        self.run(&format!("Bitmap {name}"), |image| async move {
            let mut ranges = image.bitmap(&owned.as_str().into()).await?.ranges();
            let mut dirty = Vec::new();
            while let Some(range) = ranges.next().await? {
                dirty.push(range);
            }
            Ok(dirty)
        })
    }

    /// Closes the image and returns the file.
    pub(crate) fn close(mut self) -> Result<SparseBytes, String> {
        self.run("Closing", Image::close)?;
        self.settle()?;
        Ok(self.host.content(0))
    }

    /// Runs until nothing moves.
    pub(crate) fn settle(&mut self) -> Result<(), String> {
        self.executor.settle().map_err(|stalled| stalled.to_string())
    }
}

async fn extents(image: &Image<SimStorage>) -> lacuna::Result<Vec<Extent>> {
    let (mut all, mut rest) = (Vec::new(), image.whole());
    while !rest.is_empty() {
        let some = image.extents(rest).await?;
        let end = some.last().map_or_else(|| rest.end(), |last| last.range.end());
        rest = GuestRange::new(end, rest.end() - end);
        all.extend(some);
    }
    Ok(all)
}
