//! `--run`: a command of the shell, for which disks are served.
//!
//! * Always: the server outlives the command, so that what it wrote is written.
//! * A signal that asks the server to end is passed on to the command.

use std::fs::File;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::thread;

use rustix::process::{Pid, PidfdFlags, Signal, getpgrp, pidfd_open, pidfd_send_signal};
use rustix::termios::tcgetpgrp;
use signal_hook::consts::SIGINT;

use crate::error::CliResult;

/// Runs a command with `uri` in its environment; its exit code is ours.
///
/// `ended` says that the server should end; what goes into `end` comes out there.
pub(super) fn run(
    command: &str,
    uri: &str,
    end: mpsc::Sender<()>,
    ended: &mpsc::Receiver<()>,
) -> CliResult<u8> {
    let child = Command::new("sh").args(["-c", command]).env("uri", uri).spawn();
    let child = child.map_err(|error| lacuna::Error::io(error, "Running a shell"))?;
    // Means this very process, also when its number belongs to another one.
    let shell = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    let waiting = thread::spawn(move || wait(child, &end));
    let _signal_or_end_of_command = ended.recv();
    if let Ok(shell) = shell {
        // One that is over hears nothing.
        let _it_is_over = pidfd_send_signal(shell, Signal::TERM);
    }
    let status = waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let status = status.map_err(|error| lacuna::Error::io(error, "Waiting for the shell"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn wait(mut child: Child, end: &mpsc::Sender<()>) -> std::io::Result<ExitStatus> {
    let status = child.wait();
    // Nobody waits where a signal came before.
    let _nobody_waits = end.send(());
    status
}

/// Says whether a signal reaches the command without us, as an interrupt of the terminal does: the
/// command decides what becomes of that.
pub(super) fn hears_by_itself(signal: i32) -> bool {
    let is_in_foreground = |terminal| tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp());
    signal == SIGINT && File::open("/dev/tty").is_ok_and(is_in_foreground)
}
