//! Everybody who acts in a phase, put on the executor.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use lacuna::block::Layer;
use lacuna::qcow2::Image;
use lacuna_export::{Export, ExportOptions, Exports, ServerOptions, serve_stream};
use testkit::sim::SimStorage;
use testkit::{Device, Executor};
use tokio::time::Instant;

use crate::Lie;
use crate::front::{Disk, Served};
use crate::guest::{Truth, by_library};
use crate::jobs::{self, Album};
use crate::nbd::{by_nbd, resize_by_nbd, silent};
use crate::points::point;
use crate::remote::{Harbour, Serving, by_remote};
use crate::scenario::{Guest, Job, NbdForm, Phase, Remote, Request, Way};
use crate::wire::{End, wire};

/// What actors have in common.
pub(crate) struct Cast {
    disk: Disk,
    image: Image<SimStorage>,
    truth: Truth,
    album: Album,
    exports: Arc<Exports<Served>>,
    lie: Option<Lie>,
    first_error: Rc<RefCell<Option<String>>>,
}

impl Cast {
    pub(crate) fn new(
        disk: &Disk,
        image: &Image<SimStorage>,
        truth: &Truth,
        album: &Album,
        lie: Option<Lie>,
    ) -> Self {
        let exports = Arc::new(Exports::default());
        let served = Served::new(disk.clone(), image.clone());
        let options = ExportOptions { resize: true, ..ExportOptions::default() };
        let export = Export::new("disk", served, options);
        let added = export.map(|export| exports.add(export));
        assert!(matches!(added, Ok(Ok(_))), "the only export has a name of its own");
        Self {
            disk: disk.clone(),
            image: image.clone(),
            truth: truth.clone(),
            album: Rc::clone(album),
            exports,
            lie,
            first_error: Rc::default(),
        }
    }

    /// Returns what went wrong first.
    pub(crate) fn first_error(&self) -> Result<(), String> {
        self.first_error.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Starts all guests and jobs of a phase.
    pub(crate) fn enter(&self, executor: &mut Executor<'_>, phase: &Phase) {
        let sizes = phase.jobs.iter().filter_map(Job::size_bytes);
        let size_bytes = sizes.fold(self.disk.size_bytes(), u64::min);
        for (number, guest) in (0..).zip(&phase.guests) {
            let (way, bursts) = (guest.way, within(guest, size_bytes));
            match way {
                Way::Library => self.library(executor, bursts),
                Way::Remote(plan) => {
                    let size_changes = phase.jobs.iter().any(|job| job.size_bytes().is_some());
                    self.remote(executor, plan, bursts, size_changes);
                }
                Way::Nbd { form, cut_after } => {
                    self.nbd(executor, phase.order ^ number, (form, cut_after), bursts);
                }
            }
        }
        phase.jobs.iter().for_each(|job| self.job(executor, phase.order, *job));
    }

    fn job(&self, executor: &mut Executor<'_>, seed: u64, job: Job) {
        let (image, truth) = (self.image.clone(), self.truth.clone());
        match job {
            Job::Resize { size_bytes, by: Some(form) } => {
                let end = self.connect(executor, seed ^ size_bytes);
                self.spawn(executor, resize_by_nbd(end, form, size_bytes, truth));
            }
            Job::Silent { words } => {
                let end = self.connect(executor, !seed);
                self.spawn(executor, silent(end, words));
            }
            Job::Point { options, reads } => {
                self.spawn(executor, point(self.disk.clone(), options, reads, truth));
            }
            job => {
                let (disk, album) = (self.disk.clone(), Rc::clone(&self.album));
                self.spawn(executor, jobs::work(job, disk, image, truth, album));
            }
        }
    }

    fn spawn(
        &self,
        executor: &mut Executor<'_>,
        work: impl Future<Output = Result<(), String>> + 'static,
    ) {
        let first_error = Rc::clone(&self.first_error);
        executor.spawn(async move {
            if let Err(error) = work.await {
                first_error.borrow_mut().get_or_insert(error);
            }
        });
    }

    fn library(&self, executor: &mut Executor<'_>, bursts: Vec<Vec<Request>>) {
        let (disk, image, truth) = (self.disk.clone(), self.image.clone(), self.truth.clone());
        self.spawn(executor, async move {
            for burst in bursts {
                let ask = |request| by_library(disk.clone(), image.clone(), request, truth.clone());
                let answers = futures_util::future::join_all(burst.into_iter().map(ask)).await;
                answers.into_iter().collect::<Result<Vec<()>, String>>()?;
            }
            Ok(())
        });
    }

    /// Lays a wire to the server; returns the end of a client, and when that was.
    fn connect(&self, executor: &mut Executor<'_>, seed: u64) -> (End, Instant) {
        let (wire, near, far) = wire(seed);
        executor.attach(wire);
        let served = serve_stream(far, Arc::clone(&self.exports), ServerOptions::default());
        self.spawn(executor, async move {
            // Who cuts the wire in the middle of a request is told so; that is no fault of ours.
            drop(served.await);
            Ok(())
        });
        (near, Instant::now())
    }

    fn remote(
        &self,
        executor: &mut Executor<'_>,
        plan: Remote,
        bursts: Vec<Vec<Request>>,
        size_changes: bool,
    ) {
        let (harbour, ends) = Harbour::new(plan, self.lie == Some(Lie::Wire));
        executor.attach(Arc::clone(&harbour) as Arc<dyn Device>);
        let serving = Serving::default();
        for end in ends {
            let (serving, exports) = (serving.clone(), Arc::clone(&self.exports));
            self.spawn(executor, async move {
                // Not all are needed.
                if let Ok(end) = end.await {
                    let _at_work = serving.begin(&end).await;
                    drop(serve_stream(end, exports, ServerOptions::default()).await);
                }
                Ok(())
            });
        }
        let truth = self.truth.clone();
        self.spawn(executor, by_remote(harbour, plan, bursts, truth, size_changes));
    }

    fn nbd(
        &self,
        executor: &mut Executor<'_>,
        seed: u64,
        (form, cut_after): (NbdForm, Option<usize>),
        bursts: Vec<Vec<Request>>,
    ) {
        let near = self.connect(executor, seed);
        self.spawn(executor, by_nbd(near, form, cut_after, bursts, self.truth.clone()));
    }
}

/// Returns what a guest asks, without what a disk of that size has no place for: it may be smaller
/// than it was to be.
fn within(guest: &Guest, size_bytes: u64) -> Vec<Vec<Request>> {
    let within = |burst: &Vec<Request>| {
        burst.iter().filter_map(|request| request.within(size_bytes)).collect()
    };
    guest.bursts.iter().map(within).collect()
}
