//! A program under watch: what it took and wrote, and how much more its folder held meanwhile.
//!
//! The kernel's own counts are read between the program's end and its burial, so that nothing slows
//! it down. They hold its threads and the programs that it waited for.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::looks::allocated_below;

/// How often a run is looked at.
const PERIOD: Duration = Duration::from_millis(5);
/// What a second has of the kernel's unit of CPU time.
const TICKS: f64 = 100.0;

/// What a run took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cost {
    /// Seconds of the program and of those it waited for, in steps of 10 ms.
    pub(crate) cpu: f64,
    pub(crate) wall: f64,
    /// What was handed to calls that write, or what got dirty in the page cache: the larger.
    pub(crate) written_bytes: u64,
    /// By how much its folder exceeded what it held before.
    pub(crate) extra_bytes: u64,
    /// The most memory of the program itself, resident.
    pub(crate) memory_bytes: u64,
}

/// Runs a command that is to succeed; returns what it took and what it printed.
pub(crate) fn watch(command: &mut Command, folder: &Path) -> Outcome<(Cost, String)> {
    let before = allocated_below(folder);
    let start = Instant::now();
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    let (said, complained) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let cost = observe(child.id(), folder, before, start);
    // Its end is awaited in any case, so that it does not stay around.
    let status = child.wait().map_err(|error| format!("lost {command:?}: {error}"))?;
    let [said, complained] = [said, complained].map(|text| text.join().unwrap_or_default());
    match status.success() {
        true => Ok((cost?, said)),
        false => Err(format!("{command:?} ended with {status}: {}", complained.trim_end())),
    }
}

/// Reads all that a program says, so that it never waits for us.
fn reader<R: Read + Send + 'static>(pipe: Option<R>) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe
            && pipe.read_to_end(&mut bytes).is_err()
        {
            bytes.extend_from_slice(b"(the rest was lost)");
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Looks at a running program until it has ended, and then at the kernel's counts.
fn observe(id: u32, folder: &Path, before: u64, start: Instant) -> Outcome<Cost> {
    let (mut most, mut memory_bytes) = (0, 0);
    loop {
        let facts = proc_file(id, "stat")?;
        let wall = start.elapsed().as_secs_f64();
        most = most.max(allocated_below(folder));
        let fields = Fields::of(&facts)?;
        if fields.is_over {
            let written_bytes = written(&proc_file(id, "io")?)?;
            let extra_bytes = most.saturating_sub(before);
            return Ok(Cost { cpu: fields.cpu, wall, written_bytes, extra_bytes, memory_bytes });
        }
        memory_bytes = memory_bytes.max(peak_memory(&proc_file(id, "status")?));
        thread::sleep(PERIOD);
    }
}

fn proc_file(id: u32, name: &str) -> Outcome<String> {
    let path = format!("/proc/{id}/{name}");
    fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))
}

/// What counts of a line of `/proc/PID/stat`.
#[derive(Debug, PartialEq)]
struct Fields {
    is_over: bool,
    cpu: f64,
}

impl Fields {
    fn of(line: &str) -> Outcome<Self> {
        // The name before may have anything in it, also brackets.
        let words: Vec<&str> =
            line.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        // Its own time and its children's, in user mode and in the kernel.
        let times = words.get(11..15).ok_or_else(|| format!("no line of stat: {line}"))?;
        let ticks: f64 = times.iter().filter_map(|word| word.parse::<f64>().ok()).sum();
        Ok(Self { is_over: ["Z", "X"].contains(&words[0]), cpu: ticks / TICKS })
    }
}

/// Reads `/proc/PID/io`. Calls of io_uring are missing among the characters, pages that were dirty
/// already among the bytes.
fn written(facts: &str) -> Outcome<u64> {
    let field = |name: &str| {
        let line = facts.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.strip_prefix(": ")?.trim().parse::<u64>().ok())
    };
    match (field("wchar"), field("write_bytes")) {
        (Some(handed), Some(dirtied)) => Ok(handed.max(dirtied)),
        _ => Err(format!("the kernel counts no writes: {facts}")),
    }
}

/// Reads the peak from `/proc/PID/status`; a program that is ending has none any more.
fn peak_memory(facts: &str) -> u64 {
    let line = facts.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or_default() << 10
}

/// Returns the middle of figures.
pub(crate) fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.into_iter().collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// Returns the medians of the times, and the most of the bytes.
pub(crate) fn summary(runs: &[Cost]) -> Cost {
    let most = |of: fn(&Cost) -> u64| runs.iter().map(of).max().unwrap_or_default();
    Cost {
        cpu: median(runs.iter().map(|run| run.cpu)),
        wall: median(runs.iter().map(|run| run.wall)),
        written_bytes: most(|run| run.written_bytes),
        extra_bytes: most(|run| run.extra_bytes),
        memory_bytes: most(|run| run.memory_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::command;
    use crate::scratch::Scratch;

    #[test]
    fn a_program_is_counted_with_those_it_waits_for() {
        let scratch = Scratch::new("test-of-watched").unwrap();
        let line = "head -c 3000000 /dev/urandom > x; sleep 0.1; echo done; rm x";
        let mut shell = command("bash", &["-c", line]);
        let (cost, said) = watch(shell.current_dir(scratch.path()), scratch.path()).unwrap();
        assert_eq!(said, "done\n");
        assert!(cost.written_bytes >= 3_000_000, "{cost:?}");
        assert!(cost.wall >= 0.1, "{cost:?}");
    }

    #[test]
    fn a_program_that_fails_is_told_with_its_words() {
        let scratch = Scratch::new("test-of-failing").unwrap();
        let mut shell = command("bash", &["-c", "echo because >&2; exit 3"]);
        let reason = watch(&mut shell, scratch.path()).unwrap_err();
        assert!(reason.contains("because"), "{reason}");
    }

    #[test]
    fn the_kernels_lines_are_read_from_behind_the_name() {
        let line = "7 (a) Z b) Z 1 7 7 0 -1 4 1 0 0 0 100 50 25 25 20 0 1 0";
        assert_eq!(Fields::of(line), Ok(Fields { is_over: true, cpu: 2.0 }));
        assert!(Fields::of("nothing").is_err());
        assert_eq!(written("rchar: 1\nwchar: 5\nwrite_bytes: 4096\n"), Ok(4096));
        assert!(written("rchar: 1").is_err());
        assert_eq!(peak_memory("VmPeak:\t 9 kB\nVmHWM:\t    12 kB\n"), 12 << 10);
        assert_eq!(peak_memory("Name:\tx"), 0);
    }

    #[test]
    fn times_are_medians_and_bytes_the_most() {
        let run = |cpu, bytes| Cost { cpu, written_bytes: bytes, ..Cost::default() };
        let found = summary(&[run(3.0, 5), run(1.0, 9), run(2.0, 7)]);
        assert_eq!((found.cpu, found.written_bytes), (2.0, 9));
    }
}
