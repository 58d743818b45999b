//! A job: a thread that takes one step after the other, when it may, until it is over.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lacuna_export::Server;
use serde_json::{Value, json};

use super::Exported;
use super::idle::Idle;
use super::work::{Kind, Step, Work};
use crate::error::{CliError, CliResult};
use crate::verbs::pace::due;
use crate::verbs::serve::Served;

/// How often a job that waits looks whether the export is idle.
const LOOK: Duration = Duration::from_millis(20);

/// When a job takes steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum When {
    /// Whatever clients do.
    Now,
    /// While clients leave the export alone.
    Idle,
}

/// What a job is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Asked {
    pub(in super::super) kind: Kind,
    pub(in super::super) when: When,
    pub(in super::super) bytes_per_second: Option<u64>,
}

/// A job, at work or over.
pub(in super::super) struct Job {
    pub(in super::super) number: u64,
    kind: Kind,
    export: Exported,
    /// Of its export: that may be gone.
    start: Instant,
    state: Mutex<State>,
    /// Somebody asked for an end, or it came.
    changed: Condvar,
}

struct State {
    phase: &'static str,
    done: u64,
    total: u64,
    bytes: u64,
    so_far: Value,
    stage: Stage,
    is_cancelled: bool,
    seconds: Option<f64>,
}

/// How a job stands.
enum Stage {
    Cancelled,
    Done,
    Failed(CliError),
    Running,
    /// For the export to be idle.
    Waiting,
}

impl Stage {
    const fn name(&self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::Done => "done",
            Self::Failed(_) => "failed",
            Self::Running => "running",
            Self::Waiting => "waiting",
        }
    }
}

impl Job {
    pub(super) fn start(
        number: u64,
        server: &Arc<Server<Served>>,
        export: &Exported,
        asked: &Asked,
    ) -> CliResult<Arc<Self>> {
        let most = asked.bytes_per_second.map(|bound| (bound / 4).max(1));
        let work = Work::new(asked.kind, export, most)?;
        let state = State {
            phase: "start",
            done: 0,
            total: 0,
            bytes: 0,
            so_far: work.so_far(),
            stage: Stage::Running,
            is_cancelled: false,
            seconds: None,
        };
        let job = Arc::new(Self {
            number,
            kind: asked.kind,
            export: Arc::clone(export),
            start: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let (own, asked, idle) = (Arc::clone(&job), *asked, Idle::new(server, export));
        thread::Builder::new()
            .name("job".into())
            .spawn(move || own.run(work, &asked, idle))
            .map_err(|error| lacuna::Error::io(error, "Starting a thread for the job"))?;
        Ok(job)
    }

    pub(super) fn is_on(&self, export: &Exported) -> bool {
        Arc::ptr_eq(&self.export, export)
    }

    pub(super) fn is_over(&self) -> bool {
        self.state().is_over()
    }

    /// Asks for an end after the step that is under way.
    pub(in super::super) fn cancel(&self) {
        self.state().is_cancelled = true;
        self.changed.notify_all();
    }

    /// Waits until it is over.
    pub(in super::super) fn wait(&self) {
        let mut state = self.state();
        while !state.is_over() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells of it.
    pub(in super::super) fn value(&self) -> Value {
        let state = self.state();
        let seconds = state.seconds.unwrap_or_else(|| self.start.elapsed().as_secs_f64());
        let error = match &state.stage {
            Stage::Failed(error) => error.value(),
            _ => Value::Null,
        };
        json!({
            "job": self.number,
            "command": self.kind.name(),
            "export": self.export.name().as_str(),
            "state": state.stage.name(),
            "phase": state.phase,
            "done": state.done,
            "total": state.total,
            "read_bytes": state.bytes,
            "seconds": (seconds * 1000.0).round() / 1000.0,
            "result": state.so_far,
            "error": error,
        })
    }

    fn run(&self, mut work: Work, asked: &Asked, mut idle: Idle) {
        let stage = loop {
            if asked.when == When::Idle && !self.await_idle(&mut idle) || self.is_cancelled() {
                break Stage::Cancelled;
            }
            let begun = Instant::now();
            match work.step() {
                Ok(Some(step)) => {
                    let bytes = step.bytes;
                    self.note(step, work.so_far());
                    self.hold_back(asked, bytes, begun);
                }
                Ok(None) => break Stage::Done,
                Err(error) => break Stage::Failed(error.into()),
            }
        };
        let so_far = work.so_far();
        // The image is nobody's business any more once this is told.
        drop(work);
        let mut state = self.state();
        state.so_far = so_far;
        state.seconds = Some(self.start.elapsed().as_secs_f64());
        state.stage = stage;
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until clients leave the export alone. False where somebody asked for an end first.
    fn await_idle(&self, idle: &mut Idle) -> bool {
        while !idle.is_so() {
            let mut state = self.state();
            state.stage = Stage::Waiting;
            if self.rest(state, LOOK) {
                return false;
            }
        }
        self.state().stage = Stage::Running;
        true
    }

    fn note(&self, step: Step, so_far: Value) {
        let mut state = self.state();
        (state.phase, state.done, state.total) = (step.phase, step.done, step.total);
        state.bytes += step.bytes;
        state.so_far = so_far;
    }

    /// Waits until what a step read fits the bound.
    fn hold_back(&self, asked: &Asked, bytes: u64, begun: Instant) {
        let Some(bound) = asked.bytes_per_second else { return };
        while let Some(rest) = due(bytes, bound).checked_sub(begun.elapsed())
            && !rest.is_zero()
        {
            if self.rest(self.state(), rest) {
                return;
            }
        }
    }

    /// Waits so long, or until somebody asks for an end; says whether somebody has.
    fn rest(&self, state: MutexGuard<'_, State>, long: Duration) -> bool {
        if state.is_cancelled {
            return true;
        }
        let waited = self.changed.wait_timeout(state, long);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_cancelled
    }

    fn is_cancelled(&self) -> bool {
        self.state().is_cancelled
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    const fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Cancelled | Stage::Done | Stage::Failed(_))
    }
}
