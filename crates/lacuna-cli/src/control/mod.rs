//! The control socket of a running server, and how `lacuna ctl` talks to it: docs/control.md.
//!
//! * `socket.rs`: the socket file, and a thread for each of a few clients
//! * `session.rs`, `lines.rs`: one client; lines of a bounded length in bounded time
//! * `arguments.rs`: what a request says
//! * `commands/`: a file for each command: what it asks, does and tells; a new one is a file there
//!   and a line in [`commands::ALL`]
//! * `jobs/`: work on disks that goes on beside their clients
//! * `points.rs`: disks as they were at one moment
//! * `ask.rs`: the side of `lacuna ctl`
//!
//! Never touches the way of requests for data: it has threads of its own, and looks at what
//! connections count.

mod arguments;
mod ask;
pub(crate) mod commands;
mod jobs;
mod lines;
mod points;
mod session;
mod socket;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};

use lacuna::ErrorKind;
use lacuna_export::{Export, Server, Statistics};
use pollster::block_on;

use self::jobs::Jobs;
use self::points::Points;
use crate::error::{CliError, CliResult};
use crate::persona::Tool;
use crate::verbs::serve::Served;

pub(crate) use ask::Conversation;
pub(crate) use session::parse_hostile;
pub(crate) use socket::Socket;

/// The version of the protocol: it changes where old clients would be wrong.
const VERSION: u64 = 1;

type Exported = Arc<Export<Served>>;

/// What commands act on.
pub(crate) struct Control {
    /// Itself, for threads that outlive a command.
    own: Weak<Self>,
    tool: Tool,
    server: Arc<Server<Served>>,
    /// Ends the server; nothing where something else decides.
    end: Option<mpsc::Sender<()>>,
    is_stop_asked: AtomicBool,
    /// Whether the server is ending. Held for reading by what uses disks.
    is_over: RwLock<bool>,
    removed: Mutex<Removed>,
    jobs: Jobs,
    points: Points,
}

/// Exports that no client gets any more.
#[derive(Default)]
struct Removed {
    /// Some clients still have these.
    leaving: Vec<Exported>,
    /// What was done through those that are closed.
    statistics: Vec<Statistics>,
}

impl Control {
    pub(crate) fn new(
        tool: &Tool,
        server: Arc<Server<Served>>,
        end: Option<mpsc::Sender<()>>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: own.clone(),
            tool: tool.clone(),
            server,
            end,
            is_stop_asked: AtomicBool::new(false),
            is_over: RwLock::new(false),
            removed: Mutex::default(),
            jobs: Jobs::default(),
            points: Points::default(),
        })
    }

    /// Keeps guests waiting for no point any more. The server is about to stop.
    pub(crate) fn release_points(&self) {
        self.points.release();
    }

    /// Waits for commands that use disks, lets no other begin, ends jobs, and closes what was removed.
    /// The server has stopped.
    pub(crate) fn shut_down(&self) -> CliResult<()> {
        // A command may wait for a job.
        self.jobs.at_work().iter().for_each(|job| job.cancel());
        *self.is_over.write().unwrap_or_else(PoisonError::into_inner) = true;
        self.jobs.end();
        let mut result = self.points.end(&self.server);
        for export in std::mem::take(&mut self.removed().leaving) {
            let closed = close(&export);
            result = result.and(closed);
        }
        result
    }

    /// Keeps disks open as long as the guard lives.
    fn begin(&self) -> CliResult<RwLockReadGuard<'_, bool>> {
        let is_over = self.is_over.read().unwrap_or_else(PoisonError::into_inner);
        match *is_over {
            true => Err(CliError::new("The server is ending").with_class(ErrorKind::Busy)),
            false => Ok(is_over),
        }
    }

    fn removed(&self) -> MutexGuard<'_, Removed> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds an export by its name; without one, the only export.
    fn export(&self, name: Option<&str>) -> CliResult<Exported> {
        let all = self.server.exports().all();
        if let Some(name) = name {
            let found = all.iter().find(|export| export.name().as_str() == name);
            return found.map(Arc::clone).ok_or_else(|| no_export(name));
        }
        let own: Vec<&Exported> = all.iter().filter(|it| !it.options().is_companion).collect();
        match own[..] {
            [only] => Ok(Arc::clone(only)),
            _ => Err(CliError::new(format!(
                "There are {} exports; the command needs the name of one",
                own.len()
            ))
            .with_class(ErrorKind::InvalidRequest)),
        }
    }

    fn ask_to_stop(&self) -> CliResult<()> {
        if self.end.is_none() {
            let text = "The server ends with the command of --run, not before";
            return Err(CliError::new(text).with_class(ErrorKind::Unsupported));
        }
        self.is_stop_asked.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Stops if a command asked for it; its answer is out.
    fn stop_if_asked(&self) {
        if self.is_stop_asked.load(Ordering::SeqCst)
            && let Some(end) = &self.end
        {
            // Where nobody waits the server ends already.
            let _nobody_waits = end.send(());
        }
    }
}

fn no_export(name: &str) -> CliError {
    CliError::new(format!("There is no export '{name}'"))
        .with_class(ErrorKind::NotFound)
        .with_hint("`lacuna ctl list` lists them")
}

/// Writes what is in memory and closes a disk.
fn close(export: &Exported) -> CliResult<()> {
    Ok(block_on(export.disk().close())?)
}
