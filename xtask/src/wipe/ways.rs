//! How a wipe reaches an image: requests of 1 MiB, flushed every 16 MiB, past the page cache.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::disk::{Disk, SIZE_MIB};
use super::trace::{self, Calls};
use crate::Outcome;
use crate::run::{awaited, command};

/// Requests between two flushes.
const FLUSH_EVERY: u64 = 16;

/// A way to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// `qemu-io` opens it.
    Shell,
    /// `qemu-nbd` serves it to stock `qemu-io`; only the server counts.
    Server,
}

impl Way {
    pub(super) const ALL: [Self; 2] = [Self::Shell, Self::Server];

    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Shell => "qemu-io",
            Self::Server => "qemu-nbd",
        }
    }
}

/// Seconds of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spent {
    pub(super) cpu: f64,
    pub(super) wall: f64,
}

/// A program that wipes.
pub(super) struct Wiper {
    way: Way,
    program: PathBuf,
    /// Words in front of all others.
    leading: &'static [&'static str],
    detection: &'static str,
}

impl Wiper {
    pub(super) fn stock(way: Way, detection: &'static str) -> Self {
        Self { way, program: way.words().into(), leading: &[], detection }
    }

    pub(super) fn ours(way: Way, detection: &'static str, program: &Path) -> Self {
        let leading: &[&str] = match way {
            Way::Shell => &["io"],
            Way::Server => &["serve"],
        };
        Self { way, program: program.into(), leading, detection }
    }

    /// Wipes an image and says what that took.
    pub(super) fn wipe(&self, image: &Path) -> Outcome<Spent> {
        let timed = ["-c", "TIMEFORMAT='%U %S %R'; time \"$@\"", "wipe"].map(str::to_owned);
        let said = self.wipe_under("bash", &timed, image)?;
        let numbers: Vec<f64> = said
            .lines()
            .next_back()
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        match numbers[..] {
            [user, system, wall] => Ok(Spent { cpu: user + system, wall }),
            _ => Err(format!("bash gave no times: {said}")),
        }
    }

    /// Wipes an image while somebody counts the system calls.
    pub(super) fn traced(&self, image: &Path, disk: &Disk) -> Outcome<Calls> {
        let log = image.with_extension("trace");
        let mut words = trace::OPTIONS.map(str::to_owned).to_vec();
        words.extend(["-o".to_owned(), log.display().to_string()]);
        self.wipe_under("strace", &words, image)?;
        let text = std::fs::read_to_string(&log).map_err(|error| format!("no trace: {error}"))?;
        trace::count(&text, |at| disk.is_data(at))
    }

    /// Has `observer` start the program that is measured; returns what both said.
    fn wipe_under(&self, observer: &str, words: &[String], image: &Path) -> Outcome<String> {
        let mut observed = command(observer, &[]);
        observed.args(words).arg(&self.program).args(self.leading);
        match self.way {
            Way::Shell => {
                let options = format!(
                    "driver=qcow2,file.driver=file,file.filename={},detect-zeroes={}",
                    image.display(),
                    self.detection
                );
                observed.args(commands()).args(["-t", "none", "-d", "unmap", "--image-opts"]);
                finished(started(observed.arg(options))?)
            }
            Way::Server => {
                let socket = image.with_extension("socket");
                let detection = format!("--detect-zeroes={}", self.detection);
                observed.args(["--cache=none", "--discard=unmap", &detection, "-f", "qcow2"]);
                observed.arg("-k").arg(&socket).arg(image);
                let server = started(&mut observed)?;
                client(&socket)?;
                // It ends when its only client goes.
                finished(server)
            }
        }
    }
}

/// Commands of qemu-io, each behind its `-c`.
fn commands() -> Vec<String> {
    let mut words = Vec::new();
    for at in 0..SIZE_MIB {
        words.extend(["-c".to_owned(), format!("write -q -P 0 {at}M 1M")]);
        if (at + 1) % FLUSH_EVERY == 0 {
            words.extend(["-c", "flush"].map(str::to_owned));
        }
    }
    words
}

fn client(socket: &Path) -> Outcome {
    awaited(socket)?;
    // Unasked it would have every write flushed.
    let mut client = command("qemu-io", &["-t", "writeback", "-f", "raw"]);
    client.args(commands()).arg(format!("nbd+unix:///?socket={}", socket.display()));
    let ended = client.stdin(Stdio::null()).output();
    match ended.map_err(|error| format!("cannot start qemu-io: {error}"))? {
        output if output.status.success() => Ok(()),
        output => Err(format!("the client failed: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

fn started(command: &mut Command) -> Outcome<Child> {
    let piped = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    piped.spawn().map_err(|error| format!("cannot start a wipe: {error}"))
}

fn finished(child: Child) -> Outcome<String> {
    let output = child.wait_with_output().map_err(|error| format!("lost a wipe: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(said) } else { Err(format!("a wipe failed: {said}")) }
}
