//! `--fork`: the command returns when clients can come, and a process of its own serves on.
//!
//! * The program starts itself anew rather than forking: a fork that goes on in Rust may find locks
//!   taken by threads that are not there.
//! * Always: nothing is opened before, so that what fails does so in the child, which says it
//!   itself; its exit code is ours.
//! * The child's standard output is a pipe to us. What it says there is passed on; a zero byte at
//!   its end says that clients can come.

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Child, Command, ExitStatus, Stdio};

use rustix::process::{getppid, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdout};

use crate::args::Flag;
use crate::error::{CliError, CliResult};
use crate::output;

pub(super) const FORK: Flag =
    Flag::switch('\0', "fork", "return when clients can come, and serve on in the background")
        .long_only();

/// Holds the process id of whoever starts the child, so that nobody below it takes it for theirs.
const MARK: &str = "LACUNA_SERVES_FOR";
/// The sign that clients can come.
const READY: char = '\0';
/// Most that a child says before, in bytes.
const MAX_SAID_BYTES: u64 = 1 << 20;

/// Which of the two this process is.
pub(crate) enum Role {
    /// The one that serves.
    Child(Ready),
    /// The one that was called; its exit code.
    Caller(u8),
}

/// To be told when clients can come.
pub(crate) struct Ready(());

/// Says whether this process was started by [`role`].
pub(crate) fn is_child() -> bool {
    let caller = getppid().map(|pid| pid.as_raw_nonzero().to_string());
    caller.is_some_and(|caller| env::var(MARK).is_ok_and(|mark| mark == caller))
}

/// Starts the child, or finds that this is it. Comes first of all, before anything is opened.
pub(crate) fn role() -> CliResult<Role> {
    if is_child() {
        // A session of its own: no terminal ends it. It fails only for who has one already.
        let _it_has_one = setsid();
        return Ok(Role::Child(Ready(())));
    }
    let mut child = start().map_err(|error| lacuna::Error::io(error, "Starting the server"))?;
    let said = listen_to(&mut child)
        .map_err(|error| lacuna::Error::io(error, "Waiting for the server"))?;
    match said.strip_suffix(READY) {
        Some(said) => output::print(said).map(|()| Role::Caller(0)),
        None => {
            output::print(&said)?;
            let status = child.wait();
            let status =
                status.map_err(|error| lacuna::Error::io(error, "Waiting for the server"))?;
            code_of(status).map(Role::Caller)
        }
    }
}

/// The same program with the same words.
fn start() -> io::Result<Child> {
    let mut words = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    // Sockets that were opened for us are for the child, whose number nobody could know.
    if env::var("LISTEN_PID").is_ok_and(|pid| pid == process::id().to_string()) {
        command.env_remove("LISTEN_PID");
    }
    let mark = process::id().to_string();
    command.args(words).env(MARK, mark).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()
}

fn listen_to(child: &mut Child) -> io::Result<String> {
    let mut said = String::new();
    if let Some(pipe) = child.stdout.take() {
        pipe.take(MAX_SAID_BYTES).read_to_string(&mut said)?;
    }
    Ok(said)
}

fn code_of(status: ExitStatus) -> CliResult<u8> {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(u8::try_from(code).unwrap_or(1)),
        (None, signal) => {
            let signal = signal.unwrap_or_default();
            Err(CliError::new(format!("The server was ended by signal {signal} before it served")))
        }
    }
}

impl Ready {
    /// Tells the caller that clients can come, and lets go of its terminal and pipes.
    pub(super) fn tell(&self) -> CliResult<()> {
        let told = || {
            let nowhere = File::options().read(true).write(true).open("/dev/null")?;
            let mut stdout = io::stdout().lock();
            write!(stdout, "{READY}").and_then(|()| stdout.flush())?;
            dup2_stderr(&nowhere)?;
            Ok(dup2_stdout(&nowhere)?)
        };
        told()
            .map_err(|error: io::Error| lacuna::Error::io(error, "Going to the background").into())
    }
}
