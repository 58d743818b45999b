//! `--run`: a command of the shell, for which disks are served.
//!
//! * Always: the server outlives the command, so that what it wrote is written.
//! * A signal that asks the server to end is passed on to the command. One that does not end by
//!   that is killed after [`PATIENCE`], or with the next signal.
//! * The command has a process group of its own, which gets those signals; but not in the foreground
//!   of a terminal, which could not be read by it then and interrupts it by itself.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, getpgrp, kill_process_group, pidfd_open, pidfd_send_signal,
};
use rustix::termios::tcgetpgrp;
use signal_hook::consts::SIGINT;

use crate::error::CliResult;
use crate::output;

/// How long a command may go on after it was asked to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a command with `uri` in its environment; its exit code is ours.
///
/// `ended` says that the server should end; what goes into `end` comes out there.
pub(super) fn run(
    command: &str,
    uri: &str,
    end: mpsc::Sender<()>,
    ended: &mpsc::Receiver<()>,
) -> CliResult<u8> {
    let shell = Shell::start(command, uri)?;
    let (done, finished) = mpsc::channel();
    let (target, child) = (shell.target, shell.child);
    thread::spawn(move || wait(child, &done, &end));
    let _signal_or_end_of_command = ended.recv();
    let status = match finished.try_recv() {
        Ok(status) => status,
        Err(_) => {
            target.send(Signal::TERM);
            let _signal_or_end_of_command = ended.recv_timeout(PATIENCE);
            finished.try_recv().unwrap_or_else(|_| {
                output::warn("The command of --run goes on after SIGTERM: it is killed");
                target.send(Signal::KILL);
                finished.recv().unwrap_or_else(|lost| Err(io::Error::other(lost)))
            })
        }
    };
    let status = status.map_err(|error| lacuna::Error::io(error, "Waiting for the shell"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// A shell that runs.
struct Shell {
    child: Child,
    target: Target,
}

/// Who gets signals.
enum Target {
    /// The shell and all that it started.
    Group(Pid),
    /// The shell alone: this very process, also when its number belongs to another one.
    Process(rustix::io::Result<std::os::fd::OwnedFd>),
}

impl Shell {
    fn start(line: &str, uri: &str) -> CliResult<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", line]).env("uri", uri);
        let has_group = !is_in_foreground();
        if has_group {
            command.process_group(0);
        }
        let child = command.spawn();
        let child = child.map_err(|error| lacuna::Error::io(error, "Running a shell"))?;
        let pid = Pid::from_child(&child);
        let target = match has_group {
            true => Target::Group(pid),
            false => Target::Process(pidfd_open(pid, PidfdFlags::empty())),
        };
        Ok(Self { child, target })
    }
}

impl Target {
    /// Sends a signal; what is over hears nothing. Only while the shell was not waited for, or was
    /// so a moment ago.
    fn send(&self, signal: Signal) {
        let _it_is_over = match self {
            Self::Group(group) => kill_process_group(*group, signal),
            Self::Process(Ok(shell)) => pidfd_send_signal(shell, signal),
            Self::Process(Err(_)) => Ok(()),
        };
    }
}

fn wait(mut child: Child, done: &mpsc::Sender<io::Result<ExitStatus>>, end: &mpsc::Sender<()>) {
    // Nobody waits where the server ends anyway.
    let _nobody_waits = done.send(child.wait());
    let _nobody_waits = end.send(());
}

/// Says whether a signal reaches the command without us, as an interrupt of the terminal does: the
/// command decides what becomes of that.
pub(super) fn hears_by_itself(signal: i32) -> bool {
    signal == SIGINT && is_in_foreground()
}

fn is_in_foreground() -> bool {
    let is_ours = |terminal| tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp());
    File::open("/dev/tty").is_ok_and(is_ours)
}
