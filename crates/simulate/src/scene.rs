//! An image that is open on a simulated host, with the executor that decides the order.

use std::path::Path;
use std::sync::Arc;

use lacuna::block::{Extent, Layer};
use lacuna::chain::{self, Format};
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{
    Access, DiscardPolicy, DiscardUnit, ExtentDetail, GuestDiscard, Image, OnDiscard, OpenOptions,
    Placement, SharedZeroCluster, ZeroUnmap,
};
use lacuna::units::GuestRange;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Executor, Random};

use crate::files::{self, Files, HostOpener, NAMES, TOP, whole};

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opening {
    /// Seed of the options.
    pub(crate) ways: u64,
}

pub(crate) struct Scene<'a> {
    pub(crate) host: SimHost,
    pub(crate) executor: Executor<'a>,
    pub(crate) image: Image<SimStorage>,
}

impl Opening {
    /// Returns the options for images of that version, or of a later one.
    pub(crate) fn options(self, version: Version) -> OpenOptions {
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
        if random.one_in(8) && version == Version::V3 {
            options = options.on_discard(OnDiscard::KeepMapping);
        }
        if random.one_in(6) {
            options = options.extent_detail(ExtentDetail::Host);
        }
        if random.one_in(6) {
            options = options.discard_unit(DiscardUnit::Cluster);
        }
        if random.one_in(3) {
            let guest = *random.pick(&[GuestDiscard::Ignore, GuestDiscard::Unmap]);
            let mut flag = || random.one_in(2);
            let (request, snapshot, other) = (flag(), flag(), flag());
            options = options.discard(DiscardPolicy { guest, request, snapshot, other });
        }
        if random.one_in(2) {
            options = options.shared_zero_cluster(SharedZeroCluster::On);
        }
        options
    }
}

impl Scene<'_> {
    /// Opens what files hold.
    ///
    /// # Errors
    /// Why they cannot be opened.
    pub(crate) fn open(opening: Opening, files: &Files, order: u64) -> Result<Self, String> {
        let version = files::header(files)?.geometry.version();
        let (host, mut executor) = stage(files, order);
        let options = opening.options(version);
        let options = files::chain_options(Format::Qcow2, options, Access::ReadWrite);
        let opener = HostOpener(host.clone());
        let chain = executor
            .block_on(async move { chain::open(&opener, Path::new(NAMES[TOP]), &options).await });
        let chain = chain.map_err(|error| format!("Opening: {error}"))?;
        let image = chain.disk().as_qcow2().cloned().ok_or("It is no qcow2 image")?;
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
        self.run("Reading all", |image| async move { whole(&image).await })
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

    pub(crate) fn remove_bitmap(&mut self, name: &str) -> Result<(), String> {
        let name = name.into();
        self.run("Removing a bitmap", |image| async move { image.remove_bitmap(&name).await })
    }

    /// Closes the image and returns the files.
    pub(crate) fn close(mut self) -> Result<Files, String> {
        self.run("Closing", Image::close)?;
        self.settle()?;
        Ok(files::contents(&self.host))
    }

    /// Runs until nothing moves.
    pub(crate) fn settle(&mut self) -> Result<(), String> {
        self.executor.settle().map_err(|stalled| stalled.to_string())
    }
}

/// Puts files on a host whose calls end when an executor says so.
pub(crate) fn stage<'a>(files: &Files, order: u64) -> (SimHost, Executor<'a>) {
    let host = SimHost::new(Pace::Executor, order);
    files::put(&host, files);
    let mut executor = Executor::new(order);
    executor.attach(Arc::new(host.clone()));
    (host, executor)
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
