//! A driver that is a program.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

use super::{Running, Streams};

/// How much of standard error is kept: its end.
const KEPT_BYTES: usize = 1024;

/// Starts a program in a group of its own, so that what it starts ends with it.
pub(super) fn start(program: &Path, arguments: &[impl AsRef<OsStr>]) -> io::Result<Streams> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let missing = || io::Error::other("a stream is missing");
    let input = Box::new(child.stdin.take().ok_or_else(missing)?);
    let output = Box::new(child.stdout.take().ok_or_else(missing)?);
    let errors = child.stderr.take().ok_or_else(missing)?;
    let said = Arc::new(Mutex::new(VecDeque::new()));
    let kept = Arc::clone(&said);
    let reader = Some(std::thread::spawn(move || keep_the_end(errors, &kept)));
    Ok(Streams {
        input,
        output,
        running: Box::new(Program { child, said, reader, is_killed: false }),
    })
}

struct Program {
    child: Child,
    said: Arc<Mutex<VecDeque<u8>>>,
    reader: Option<JoinHandle<()>>,
    is_killed: bool,
}

impl Running for Program {
    fn kill(&mut self) {
        // Once it was waited for, its number may be somebody else's.
        if std::mem::replace(&mut self.is_killed, true) {
            return;
        }
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            // It may have ended by itself; what matters is that it is gone.
            kill_process_group(group, Signal::KILL).unwrap_or_default();
        }
        self.child.wait().map(drop).unwrap_or_default();
        if let Some(group) = group {
            wait_for(|| test_kill_process_group(group).is_err() || !has_living(group));
        }
    }

    fn said(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            // What was started outside of the group may hold the stream: then its end is not waited for.
            wait_for(|| reader.is_finished());
        }
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(said.make_contiguous()).trim().replace('\n', "; ");
        let status = self.child.try_wait().ok().flatten().filter(|_| self.is_killed);
        match status {
            Some(status) if text.is_empty() => status.to_string(),
            Some(status) => format!("{status}; {text}"),
            None => text,
        }
    }
}

/// Says whether a group has more than processes that have ended and that nobody has waited for: in a
/// container the first process may never do so.
fn has_living(group: Pid) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return true };
    let stats = processes.flatten().map(|one| std::fs::read_to_string(one.path().join("stat")));
    stats.flatten().any(|stat| {
        // Behind the name, which may hold anything: state, parent, group.
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let mut words = rest.split(' ');
        let (state, of) = (words.next(), words.nth(1));
        state != Some("Z")
            && of.and_then(|of| of.parse().ok()) == Some(group.as_raw_nonzero().get())
    })
}

/// Waits for what happens soon, but not for ever.
fn wait_for(mut is_so: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(5);
    while !is_so() && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn keep_the_end(mut errors: ChildStderr, kept: &Mutex<VecDeque<u8>>) {
    let mut piece = [0; 4096];
    while let Ok(len @ 1..) = errors.read(&mut piece) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&piece[..len]);
        let surplus = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..surplus);
    }
}
