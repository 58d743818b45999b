//! Ctrl-C and termination during long work: what is half made goes, then the process.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use lacuna::ErrorKind;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::error::{CliError, CliResult};
use crate::output;
use crate::verbs::Form;

/// The file that an interruption removes.
static HALF_MADE: Mutex<Option<String>> = Mutex::new(None);
/// One thread waits for signals, however often somebody asks for it.
static WATCHING: Once = Once::new();

/// Removes a file when the process is interrupted while this lives.
pub(crate) struct RemoveOnSignal(());

impl RemoveOnSignal {
    /// Watches from now on. Where signals cannot be caught, work goes on without.
    pub(crate) fn new(file: &str) -> Self {
        set(Some(file.to_owned()));
        WATCHING.call_once(watch);
        Self(())
    }
}

impl Drop for RemoveOnSignal {
    fn drop(&mut self) {
        set(None);
    }
}

fn set(file: Option<String>) {
    *HALF_MADE.lock().unwrap_or_else(PoisonError::into_inner) = file;
}

fn watch() {
    on_signals(|signals| {
        if let Some(signal) = signals.next() {
            remove_and_exit(signal);
        }
    });
}

/// Hands signals that ask for an end to `work` in a thread of its own: nothing is done within a signal
/// handler.
fn on_signals(work: impl FnOnce(&mut dyn Iterator<Item = i32>) + Send + 'static) {
    match Signals::new([SIGHUP, SIGINT, SIGTERM]) {
        Ok(mut signals) => drop(std::thread::spawn(move || work(&mut signals.forever()))),
        Err(error) => output::warn(&format!("Interruptions cannot be caught: {error}")),
    }
}

fn remove_and_exit(signal: i32) {
    let file = HALF_MADE.lock().unwrap_or_else(PoisonError::into_inner).take();
    // What shells report for a process that a signal ended.
    let code = 128 + signal;
    if let Some(file) = file {
        let outcome = match remove_half(&file) {
            Ok(()) => format!("{file} was incomplete and is removed"),
            Err(error) => format!("{file} is incomplete and could not be removed: {error}"),
        };
        say(&format!("Interrupted; {outcome}"), &file, code);
    }
    std::process::exit(code);
}

fn say(text: &str, file: &str, code: i32) {
    output::complain(&match output::error_form() {
        Form::Human => format!("{text}\n"),
        Form::Json => {
            let error = "interrupted";
            let line = serde_json::json!({
                "error": error, "message": text, "hint": null, "verb": null, "exit_code": code,
                "file": file,
            });
            format!("{line}\n")
        }
    });
}

/// Whether somebody wants long work to end, for work that can end at many places.
pub(crate) struct Interrupted(Arc<AtomicBool>);

impl Interrupted {
    /// Takes note of signals from now on. [Another one](Requests) ends the process at once.
    pub(crate) fn watch() -> Self {
        let flag = Arc::new(AtomicBool::new(false));
        let raised = Arc::clone(&flag);
        on_signals(move |signals| end_by(signals, &raised));
        Self(flag)
    }

    /// Says whether there was one.
    pub(crate) fn is_so(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns what becomes true, for work that looks at it by itself.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }

    /// Runs `work`, or drops it half-way; nothing then. Noticed whenever the work goes a step on.
    pub(crate) async fn or<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        poll_fn(|context| match self.is_so() {
            true => Poll::Ready(None),
            false => work.as_mut().poll(context).map(Some),
        })
        .await
    }
}

/// The first request asks the work to end, the next one ends the process.
fn end_by(signals: impl Iterator<Item = i32>, flag: &AtomicBool) {
    let mut requests = Requests::default();
    for signal in signals.filter(|_| requests.is_new()) {
        if flag.swap(true, Ordering::Relaxed) {
            low_level::exit(128 + signal);
        }
    }
}

/// Tells signals that ask for an end from echoes of them: `timeout` sends each to its child and then
/// to the group of it, and wrappers pass on what the terminal has sent to all.
#[derive(Default)]
pub(crate) struct Requests {
    last: Option<Instant>,
}

impl Requests {
    /// What comes as fast as this was not asked for twice.
    const ECHO: Duration = Duration::from_millis(200);

    /// Says whether the signal that has come just now is another request.
    pub(crate) fn is_new(&mut self) -> bool {
        let now = Instant::now();
        let is_new = self.last.is_none_or(|last| now.duration_since(last) >= Self::ECHO);
        if is_new {
            self.last = Some(now);
        }
        is_new
    }
}

/// Exit code after Ctrl-C, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;

/// The error of work in place that was interrupted and left a valid image.
pub(crate) fn interrupted_in_place() -> CliError {
    CliError::new("Interrupted; what was done so far is kept, and the image is valid")
        .with_code(INTERRUPTED)
        .with_hint("run it again, and it goes on from here")
}

/// Makes `file` wholly, or removes it: where `make` fails, or the process is interrupted.
pub(crate) fn whole_or_gone<T>(file: &str, make: impl FnOnce() -> CliResult<T>) -> CliResult<T> {
    let watch = RemoveOnSignal::new(file);
    let result = make();
    drop(watch);
    // Between making and opening it somebody else may have taken it.
    let is_ours = |error: &CliError| error.class() != Some(ErrorKind::Busy);
    if result.as_ref().is_err_and(is_ours)
        && let Err(error) = remove_half(file)
    {
        output::warn(&format!("{file} is incomplete and could not be removed: {error}"));
    }
    result
}

/// Removes a regular file; a device keeps what it has.
pub(crate) fn remove_half(file: &str) -> std::io::Result<()> {
    match std::fs::symlink_metadata(file) {
        Ok(found) if found.is_file() => std::fs::remove_file(file),
        _ => Ok(()),
    }
}
