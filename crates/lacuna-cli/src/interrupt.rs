//! Ctrl-C and termination during long work: what is half made goes, then the process.

use std::sync::Mutex;

use crate::output;

/// The file that an interruption removes.
static HALF_MADE: Mutex<Option<String>> = Mutex::new(None);

/// What shells report for a process that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// Removes a file when the process is interrupted while this lives.
pub(crate) struct RemoveOnSignal(());

impl RemoveOnSignal {
    /// Watches from now on. Where signals cannot be caught, work goes on without.
    pub(crate) fn new(file: &str) -> Self {
        set(Some(file.to_owned()));
        if let Err(error) = ctrlc::try_set_handler(remove_and_exit) {
            output::complain(&format!("Interruptions cannot be caught: {error}\n"));
        }
        Self(())
    }
}

impl Drop for RemoveOnSignal {
    fn drop(&mut self) {
        set(None);
    }
}

fn set(file: Option<String>) {
    *HALF_MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = file;
}

/// Runs in a thread of its own, not in the signal handler.
fn remove_and_exit() {
    let file = HALF_MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    if let Some(file) = file {
        let outcome = match remove_half(&file) {
            Ok(()) => format!("{file} was incomplete and is removed"),
            Err(error) => format!("{file} is incomplete: {error}"),
        };
        output::complain(&format!("Interrupted; {outcome}\n"));
    }
    std::process::exit(INTERRUPTED);
}

/// Removes a regular file; a device keeps what it has.
pub(crate) fn remove_half(file: &str) -> std::io::Result<()> {
    match std::fs::symlink_metadata(file) {
        Ok(found) if found.is_file() => std::fs::remove_file(file),
        _ => Ok(()),
    }
}
