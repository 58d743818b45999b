//! Work on a disk that is served, beside its clients: each job on a thread of its own, step by step.
//!
//! * `work.rs`: what a job does, a step at a time
//! * `job.rs`: when it takes a step, and what is known of it
//! * `idle.rs`: whether clients leave an export alone
//!
//! * Always: one job for an export at a time, and none outlives the disk.
//! * Always: what came of a job is kept, of the last ones.

mod idle;
mod job;
mod work;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lacuna::ErrorKind;
use lacuna_export::Server;
use serde_json::Value;

pub(super) use self::job::{Asked, Job, When};
pub(super) use self::work::Kind;
use super::Exported;
use crate::error::{CliError, CliResult};
use crate::verbs::serve::Served;

/// Jobs that are remembered after their end.
const MOST_KEPT: usize = 64;

/// The jobs of a server, in the order in which they began.
#[derive(Default)]
pub(super) struct Jobs {
    all: Mutex<Vec<Arc<Job>>>,
}

impl Jobs {
    /// Starts a job.
    pub(super) fn start(
        &self,
        server: &Arc<Server<Served>>,
        export: &Exported,
        asked: &Asked,
    ) -> CliResult<Arc<Job>> {
        let mut all = self.all();
        if let Some(other) = all.iter().find(|job| job.is_on(export) && !job.is_over()) {
            let text = format!("Job {} is at work on export {}", other.number, export.name());
            return Err(CliError::new(text)
                .with_class(ErrorKind::Busy)
                .with_hint("`lacuna ctl cancel` ends it"));
        }
        let number = all.last().map_or(1, |last| last.number + 1);
        let job = Job::start(number, server, export, asked)?;
        all.push(Arc::clone(&job));
        let excess = all.len().saturating_sub(MOST_KEPT);
        let old: Vec<u64> = all.iter().filter(|it| it.is_over()).map(|it| it.number).collect();
        all.retain(|it| !old[..excess.min(old.len())].contains(&it.number));
        Ok(job)
    }

    /// Tells of all jobs, or of one.
    pub(super) fn list(&self, number: Option<u64>) -> CliResult<Vec<Value>> {
        let all = self.all();
        let asked = all.iter().filter(|job| number.is_none_or(|number| job.number == number));
        let told: Vec<Value> = asked.map(|job| job.value()).collect();
        match number.filter(|_| told.is_empty()) {
            None => Ok(told),
            Some(number) => Err(CliError::new(format!("There is no job {number}"))
                .with_class(ErrorKind::NotFound)
                .with_hint("`lacuna ctl jobs` lists them")),
        }
    }

    /// Returns what is at work on an export.
    pub(super) fn of(&self, export: &Exported) -> Option<Arc<Job>> {
        self.all().iter().find(|job| job.is_on(export) && !job.is_over()).map(Arc::clone)
    }

    /// Returns all that is at work.
    pub(super) fn at_work(&self) -> Vec<Arc<Job>> {
        self.all().iter().filter(|job| !job.is_over()).map(Arc::clone).collect()
    }

    /// Ends all jobs; none is at work any more when this returns.
    pub(super) fn end(&self) {
        let all = self.at_work();
        all.iter().for_each(|job| job.cancel());
        all.iter().for_each(|job| job.wait());
    }

    fn all(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
