//! Runs scenarios: `simulate --seeds N [--from N] [--threads N] [--failures N]`, or one of them:
//! `--seed N [--parts A,B]`. The failure of the lowest seed is made small.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use simulate::{Failure, Looks, Tally, shrink, simulate, simulate_parts};

/// How often it is said how far the work is.
const EVERY: Duration = Duration::from_secs(10);
const USAGE: &str = "\
usage: simulate --seeds N [--from N] [--threads N] [--failures N] [--states N] [--qemu-every N]
       simulate --seed N [--parts N,N,...]

  --seeds N       scenarios, from seed 1 or --from on; each is an image, guests, jobs, crashes
  --states N      states of the medium that are looked at after each crash (1)
  --qemu-every N  one in so many of those is checked and read by qemu-img, too
  --failures N    how many failures end the work (1); that of the lowest seed is made small
  --parts N,...   only these requests, jobs and faults of the scenario";

/// What to run.
struct Asked {
    first: u64,
    count: u64,
    threads: usize,
    /// How many failures end it.
    failures: usize,
    parts: Option<Vec<usize>>,
    looks: Looks,
}

fn main() -> ExitCode {
    let asked = match asked(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(asked) => asked,
        Err(error) => {
            eprintln!("simulate: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // Panics are failures of a run, and told as such.
    std::panic::set_hook(Box::new(|_| {}));
    match go(&asked) {
        Ok(tally) => {
            let Tally { runs, requests, crashes, states, by_qemu, .. } = tally;
            println!(
                "{runs} runs, {requests} requests answered, {crashes} crashes, {states} states after \
                 them, {by_qemu} of those seen by qemu-img: nothing found"
            );
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn asked(words: &[String]) -> Result<Asked, String> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut asked =
        Asked { first: 1, count: 0, threads, failures: 1, parts: None, looks: Looks::default() };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("'{value}' is not a number"));
        match word.as_str() {
            "--seeds" => asked.count = number()?,
            "--from" => asked.first = number()?,
            "--seed" => (asked.first, asked.count) = (number()?, 1),
            "--threads" => asked.threads = number()?.clamp(1, 1024) as usize,
            "--states" => asked.looks.states = number()?.clamp(1, 1 << 20) as usize,
            "--qemu-every" => asked.looks.qemu_every = Some(number()?.max(1)),
            "--failures" => asked.failures = number()?.clamp(1, 1 << 20) as usize,
            "--parts" => {
                let parts = value.split(',').map(str::parse).collect::<Result<_, _>>();
                asked.parts = Some(parts.map_err(|_| format!("'{value}' is no list of numbers"))?);
            }
            _ => return Err(format!("there is no option {word}")),
        }
    }
    if asked.count == 0 { Err("how many seeds?".into()) } else { Ok(asked) }
}

fn go(asked: &Asked) -> Result<Tally, Failure> {
    if let Some(parts) = &asked.parts {
        return simulate_parts(asked.first, parts, &asked.looks)
            .map(|()| Tally { runs: 1, ..Tally::default() });
    }
    let work = Work {
        next: AtomicU64::new(asked.first),
        sum: Mutex::default(),
        failures: Mutex::default(),
        begun: Instant::now(),
    };
    thread::scope(|scope| {
        for number in 0..asked.threads {
            let work = &work;
            scope.spawn(move || work.run(asked, number == 0));
        }
    });
    let mut failures = work.failures.into_inner().expect("no thread panics");
    failures.sort_unstable_by_key(|failure| failure.seed);
    for other in failures.iter().skip(1) {
        println!("{other}");
    }
    match failures.into_iter().next() {
        Some(first) => Err(shrink(first, &asked.looks)),
        None => Ok(work.sum.into_inner().expect("no thread panics")),
    }
}

/// What threads share.
struct Work {
    next: AtomicU64,
    sum: Mutex<Tally>,
    failures: Mutex<Vec<Failure>>,
    begun: Instant,
}

impl Work {
    /// Runs seeds until there are none left, or enough has failed.
    fn run(&self, asked: &Asked, tells: bool) {
        let mut told = Instant::now();
        loop {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            if seed >= asked.first + asked.count || self.failed() >= asked.failures {
                return;
            }
            match simulate(seed, &asked.looks) {
                Ok(tally) => *self.sum.lock().expect("no thread panics") += tally,
                Err(found) => self.failures.lock().expect("no thread panics").push(found),
            }
            if tells && told.elapsed() >= EVERY {
                told = Instant::now();
                let (done, seconds) = (seed - asked.first + 1, self.begun.elapsed().as_secs());
                eprintln!("{done} of {} runs, {} failed, {seconds} s", asked.count, self.failed());
            }
        }
    }

    fn failed(&self) -> usize {
        self.failures.lock().expect("no thread panics").len()
    }
}
