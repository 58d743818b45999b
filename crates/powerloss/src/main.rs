//! Explores what a power loss may leave of many runs, on all cores.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use powerloss::{Failure, Ignored, Looks, PATHS, Path, Recording, Tally, explore, record};

/// How often progress is told.
const EVERY: Duration = Duration::from_secs(30);

const USAGE: &str = "\
usage: cargo xtask crash-explore [--seeds N] [--from N] [--path NAME] [--qemu-every N]
       [--exhaustive N] [--sampled N] [--threads N] [--failures N] [--seconds N]
       [--ignore flushes|fua]
       cargo xtask crash-explore --path NAME --seed N";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "record") {
        return served(&words[1..]);
    }
    let asked = match Asked::read(&words) {
        Ok(asked) => asked,
        Err(reason) => {
            eprintln!("{reason}\n\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    let work = Work::new(&asked);
    thread::scope(|scope| {
        for _ in 1..asked.threads {
            scope.spawn(|| work.run(&asked, false));
        }
        work.run(&asked, true);
    });
    work.tell(&asked)
}

/// Serves a recorded disk to a guest: `record SIZE SEED STATES SOCKET FOLDER [lie]`.
fn served(words: &[String]) -> ExitCode {
    let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok());
    let (Some(size_bytes), Some(seed), Some(states)) = (number(0), number(1), number(2)) else {
        eprintln!("record SIZE SEED STATES SOCKET FOLDER [lie]");
        return ExitCode::FAILURE;
    };
    let place = |at: usize| words.get(at).map(Into::into).unwrap_or_default();
    let asked = Recording {
        size_bytes,
        seed,
        states: states as usize,
        socket: place(3),
        into: place(4),
        without_flushes: words.get(5).is_some_and(|word| word == "lie"),
    };
    match record(&asked, std::io::stdin().lock(), &mut |line| println!("{line}")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

/// What the command line asks for.
struct Asked {
    paths: Vec<Path>,
    first: u64,
    count: u64,
    threads: u64,
    failures: usize,
    /// No seed is begun later.
    most: Duration,
    looks: Looks,
}

impl Asked {
    fn read(words: &[String]) -> Result<Self, String> {
        let threads = thread::available_parallelism().map_or(1, |count| count.get() as u64);
        let mut asked = Self {
            paths: PATHS.to_vec(),
            first: 1,
            count: 20,
            threads,
            failures: 1,
            most: Duration::MAX,
            looks: Looks::default(),
        };
        for pair in words.chunks(2) {
            let [flag, value] = pair else { return Err(format!("{} needs a value", pair[0])) };
            asked.take(flag, value)?;
        }
        Ok(asked)
    }

    fn take(&mut self, flag: &str, value: &str) -> Result<(), String> {
        if flag == "--path" {
            let path = Path::named(value).ok_or_else(|| format!("no path {value}: {}", names()))?;
            self.paths = vec![path];
            return Ok(());
        }
        if flag == "--ignore" {
            self.looks.ignored = match value {
                "flushes" => Ignored::All,
                "fua" => Ignored::OfFua,
                _ => return Err(format!("{flag} takes flushes or fua, not {value}")),
            };
            return Ok(());
        }
        let number: u64 = value.parse().map_err(|_| format!("{flag} takes a number"))?;
        match flag {
            "--seeds" => self.count = number,
            "--from" => self.first = number,
            "--seed" => (self.first, self.count) = (number, 1),
            "--qemu-every" => self.looks.qemu_every = Some(number),
            "--exhaustive" => self.looks.bounds.exhaustive = (number as usize).min(20),
            "--sampled" => self.looks.bounds.sampled = number as usize,
            "--threads" => self.threads = number.max(1),
            "--seconds" => self.most = Duration::from_secs(number),
            "--failures" => self.failures = number as usize,
            _ => return Err(format!("no option {flag}")),
        }
        Ok(())
    }
}

fn names() -> String {
    PATHS.map(|path| path.name()).join(", ")
}

/// What threads share.
struct Work {
    next: AtomicU64,
    /// The number at which it ends.
    end: AtomicU64,
    sums: Mutex<Vec<Tally>>,
    failures: Mutex<Vec<Failure>>,
    begun: Instant,
}

impl Work {
    fn new(asked: &Asked) -> Self {
        Self {
            next: AtomicU64::new(0),
            end: AtomicU64::new(asked.count * asked.paths.len() as u64),
            sums: Mutex::new(vec![Tally::default(); asked.paths.len()]),
            failures: Mutex::default(),
            begun: Instant::now(),
        }
    }

    /// Takes seeds until there are none left, or enough has failed: each path in turn.
    fn run(&self, asked: &Asked, tells: bool) {
        let paths = asked.paths.len() as u64;
        let mut told = Instant::now();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number.is_multiple_of(paths) && self.begun.elapsed() > asked.most {
                self.end.fetch_min(number, Ordering::Relaxed);
            }
            if number >= self.end.load(Ordering::Relaxed) || self.failed() >= asked.failures {
                return;
            }
            let (path, seed) = ((number % paths) as usize, asked.first + number / paths);
            match explore(&asked.paths[path], seed, &asked.looks) {
                Ok(tally) => self.sums.lock().expect("no thread panics")[path] += tally,
                Err(found) => {
                    println!("{found}\n");
                    self.failures.lock().expect("no thread panics").push(found);
                }
            }
            if tells && told.elapsed() >= EVERY {
                told = Instant::now();
                let (all, seconds) = (self.sum(), self.begun.elapsed().as_secs());
                eprintln!("seed {seed}: {} states opened, {seconds} s", all.opened);
            }
        }
    }

    fn failed(&self) -> usize {
        self.failures.lock().expect("no thread panics").len()
    }

    fn sum(&self) -> Tally {
        let mut all = Tally::default();
        self.sums.lock().expect("no thread panics").iter().for_each(|tally| all += *tally);
        all
    }

    /// Prints a row for each path, and all of them together.
    fn tell(&self, asked: &Asked) -> ExitCode {
        let count = self.end.load(Ordering::Relaxed) / asked.paths.len() as u64;
        let last = asked.first + count.max(1) - 1;
        println!("| path | runs | moments | all subsets at | states | opened | by QEMU |");
        println!("|---|---|---|---|---|---|---|");
        let sums = self.sums.lock().expect("no thread panics").clone();
        for (path, tally) in asked.paths.iter().zip(&sums) {
            println!("{}", row(path.name(), tally));
        }
        let (all, seconds) = (self.sum(), self.begun.elapsed().as_secs_f64());
        println!("{}", row("all", &all));
        let rate = all.opened as f64 / seconds;
        println!("seeds {} to {last}, {seconds:.0} s, {rate:.0} states a second", asked.first);
        match self.failed() {
            0 => ExitCode::SUCCESS,
            failed => {
                println!("{failed} runs failed");
                ExitCode::FAILURE
            }
        }
    }
}

fn row(name: &str, tally: &Tally) -> String {
    let Tally { runs, moments, exhausted, states, opened, by_qemu } = tally;
    format!("| {name} | {runs} | {moments} | {exhausted} | {states} | {opened} | {by_qemu} |")
}
