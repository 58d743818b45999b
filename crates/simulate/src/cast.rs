//! Everybody who acts in a phase, put on the executor.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use lacuna::qcow2::Image;
use lacuna_export::{Export, ExportOptions, Exports, Plain, ServerOptions, serve_stream};
use testkit::Executor;
use testkit::sim::SimStorage;

use crate::front::Disk;
use crate::guest::{Truth, by_library};
use crate::jobs::{self, Album};
use crate::nbd::by_nbd;
use crate::scenario::{Guest, NbdForm, Phase, Request, Way};
use crate::wire::wire;

/// What actors have in common.
pub(crate) struct Cast {
    disk: Disk,
    image: Image<SimStorage>,
    truth: Truth,
    album: Album,
    exports: Arc<Exports<Plain<Disk>>>,
    first_error: Rc<RefCell<Option<String>>>,
}

impl Cast {
    pub(crate) fn new(
        disk: &Disk,
        image: &Image<SimStorage>,
        truth: &Truth,
        album: &Album,
    ) -> Self {
        let exports = Arc::new(Exports::default());
        let export = Export::new("disk", Plain(disk.clone()), ExportOptions::default());
        let added = export.map(|export| exports.add(export));
        assert!(matches!(added, Ok(Ok(_))), "the only export has a name of its own");
        Self {
            disk: disk.clone(),
            image: image.clone(),
            truth: truth.clone(),
            album: Rc::clone(album),
            exports,
            first_error: Rc::default(),
        }
    }

    /// Returns what went wrong first.
    pub(crate) fn first_error(&self) -> Result<(), String> {
        self.first_error.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Starts all guests and jobs of a phase.
    pub(crate) fn enter(&self, executor: &mut Executor<'_>, phase: &Phase) {
        for (number, guest) in (0..).zip(phase.guests.iter().cloned()) {
            let Guest { way, bursts } = guest;
            match way {
                Way::Library => self.library(executor, bursts),
                Way::Nbd { form, cut_after } => {
                    self.nbd(executor, phase.order ^ number, (form, cut_after), bursts);
                }
            }
        }
        for job in phase.jobs.iter().copied() {
            let (image, truth) = (self.image.clone(), self.truth.clone());
            self.spawn(executor, jobs::work(job, image, truth, Rc::clone(&self.album)));
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

    fn nbd(
        &self,
        executor: &mut Executor<'_>,
        seed: u64,
        (form, cut_after): (NbdForm, Option<usize>),
        bursts: Vec<Vec<Request>>,
    ) {
        let (wire, near, far) = wire(seed);
        executor.attach(wire);
        let served = serve_stream(far, Arc::clone(&self.exports), ServerOptions::default());
        self.spawn(executor, async move {
            // Who cuts the wire in the middle of a request is told so; that is no fault of ours.
            drop(served.await);
            Ok(())
        });
        self.spawn(executor, by_nbd(near, form, cut_after, bursts, self.truth.clone()));
    }
}
