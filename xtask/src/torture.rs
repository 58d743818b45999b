//! `kill -9` at random moments while an image is changed: `reclaim --dedup`, `dedup`, `dedup --across`.
//!
//! After each kill `qemu-img check` finds leaks at most, and `qemu-img compare` the disk as it was; run
//! again, the command completes. The images hold an ext4 of our own sources, twice, whose free space
//! was wiped. The moments come from a seed, which is printed; how far a program is at a moment is the
//! machine's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::looks::same;
use crate::random::Random;
use crate::run::{built, command, output, workspace};
use crate::scratch::Scratch;
use crate::{Outcome, setup};

/// Rounds of each command where nobody says.
const ROUNDS: u64 = 20;
/// Kills of one image before its command may complete.
const KILLS: u64 = 3;
/// What copies of two images of 256 MiB may take.
const NEEDED_BYTES: u64 = 2 << 30;
/// What `qemu-img check` ends with where it found nothing but leaks.
const LEAKS: i32 = 3;

/// Kills by count and seed: `--rounds N`, `--seed N`.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    let (rounds, seed) = read(arguments)?;
    setup::peers()?;
    let scratch = Scratch::new("torture")?;
    scratch.require(NEEDED_BYTES)?;
    let mut rack = Rack { ours: built("release")?, scratch, random: Random::new(seed) };
    rack.prepare()?;
    println!("seed {seed}, {rounds} rounds of each");
    for verb in [&["reclaim", "-q", "--dedup"][..], &["dedup", "-q"]] {
        let told = rack.in_place(verb, rounds)?;
        println!("{}: {told}", verb.join(" "));
    }
    println!("dedup --across: {}", rack.across(rounds)?);
    Ok(())
}

fn read(arguments: &[String]) -> Outcome<(u64, u64)> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let (mut rounds, mut seed) = (ROUNDS, clock.map_or(1, |clock| clock.as_secs()));
    for pair in arguments.chunks(2) {
        let number = pair.get(1).and_then(|text| text.parse::<u64>().ok());
        match (pair[0].as_str(), number) {
            ("--rounds", Some(number)) => rounds = number,
            ("--seed", Some(number)) => seed = number,
            _ => return Err("torture takes --rounds N and --seed N".into()),
        }
    }
    Ok((rounds, seed))
}

/// What came of the kills.
#[derive(Debug, Default)]
struct Told {
    kills: u64,
    /// The program had ended by itself.
    too_late: u64,
    leaks: u64,
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kills, too_late, leaks } = self;
        write!(f, "{kills} killed, {too_late} were done before; {leaks} left leaks, none more")
    }
}

struct Rack {
    ours: PathBuf,
    scratch: Scratch,
    random: Random,
}

impl Rack {
    /// Makes two images of one file system, which differ in some files.
    fn prepare(&self) -> Outcome {
        let (tree, raw) = (self.scratch.file("tree"), self.scratch.file("raw"));
        let fill = "mkdir -p \"$0/one\" && cp -a crates docs xtask \"$0/one\" && cp -a \"$0/one\" \"$0/two\"";
        output(in_workspace("bash", &["-c", fill, &tree]))?;
        let make = ["-q", "-F", "-t", "ext4", "-b", "4096", "-d", &tree, &raw, "256M"];
        output(command("mke2fs", &make))?;
        self.stored(&raw, "first")?;
        output(command("debugfs", &["-w", "-R", "rm one/docs/status.md", &raw]))?;
        let own = workspace().join("Cargo.lock");
        let write = format!("write {} added", own.display());
        output(command("debugfs", &["-w", "-R", &write, &raw]))?;
        self.stored(&raw, "second")?;
        output(command("rm", &["-rf", &tree, &raw])).map(drop)
    }

    /// Makes an image that stores zeros as data, as a wiped disk does.
    fn stored(&self, raw: &str, name: &str) -> Outcome {
        let image = self.scratch.file(name);
        let words = ["convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, &image];
        output(command("qemu-img", &words)).map(drop)
    }

    fn fresh(&self, original: &str, name: &str) -> Outcome {
        let (from, to) = (self.scratch.file(original), self.scratch.file(name));
        output(command("cp", &["--sparse=always", &from, &to])).map(drop)
    }

    fn lacuna(&self, words: &[&str]) -> Command {
        let mut program = command(&self.ours.to_string_lossy(), words);
        program.current_dir(self.scratch.path()).stdin(Stdio::null()).stdout(Stdio::null());
        program
    }

    /// Runs to the end; returns how long that took.
    fn whole(&self, words: &[&str]) -> Outcome<Duration> {
        let start = Instant::now();
        output(self.lacuna(words))?;
        Ok(start.elapsed())
    }

    /// Starts a program and kills it at a moment; says whether it still ran.
    fn killed(&mut self, words: &[&str], whole: Duration, told: &mut Told) -> Outcome {
        let started = self.lacuna(words).stderr(Stdio::null()).spawn();
        let child = started.map_err(|error| format!("cannot start {words:?}: {error}"))?;
        thread::sleep(self.random.part_of(whole));
        match end(child)? {
            true => told.kills += 1,
            false => told.too_late += 1,
        }
        Ok(())
    }

    /// Has stock tools look at what a kill left.
    fn judge(&self, name: &str, original: &str, told: &mut Told) -> Outcome {
        let (image, original) = (self.scratch.file(name), self.scratch.file(original));
        let found = command("qemu-img", &["check", "-f", "qcow2", &image]).output();
        let found = found.map_err(|error| format!("cannot start qemu-img: {error}"))?;
        match found.status.code() {
            Some(0) => {}
            Some(LEAKS) => told.leaks += 1,
            _ => {
                let said =
                    String::from_utf8_lossy(&[found.stdout, found.stderr].concat()).into_owned();
                return Err(format!("{name} is damaged: {said}"));
            }
        }
        same("qcow2", &original, &image)
    }

    fn in_place(&mut self, verb: &[&str], rounds: u64) -> Outcome<Told> {
        let words = [verb, &["image"]].concat();
        self.fresh("first", "image")?;
        let whole = self.whole(&words)?;
        let mut told = Told::default();
        for _ in 0..rounds {
            self.fresh("first", "image")?;
            for _ in 0..KILLS {
                self.killed(&words, whole, &mut told)?;
                self.judge("image", "first", &mut told)?;
            }
            self.whole(&words)?;
            self.judge("image", "first", &mut Told::default())?;
        }
        Ok(told)
    }

    fn across(&mut self, rounds: u64) -> Outcome<Told> {
        let words = ["dedup", "-q", "--across", "one", "two", "--base", "base"];
        self.pair()?;
        let whole = self.whole(&words)?;
        let mut told = Told::default();
        for _ in 0..rounds {
            self.pair()?;
            for _ in 0..KILLS {
                self.killed(&words, whole, &mut told)?;
                self.judge_pair(&mut told)?;
                self.drop_unfinished_base()?;
            }
            self.whole(&words)?;
            self.judge_pair(&mut Told::default())?;
        }
        Ok(told)
    }

    fn pair(&self) -> Outcome {
        output(command("rm", &["-f", &self.scratch.file("base")]))?;
        self.fresh("first", "one")?;
        self.fresh("second", "two")
    }

    fn judge_pair(&self, told: &mut Told) -> Outcome {
        self.judge("one", "first", told)?;
        self.judge("two", "second", told)
    }

    /// Does what the command says of a base that is not read-only: it is not complete.
    fn drop_unfinished_base(&self) -> Outcome {
        let base = self.scratch.file("base");
        match fs::metadata(&base) {
            Ok(found) if !found.permissions().readonly() => {
                fs::remove_file(&base).map_err(|error| format!("{base} stays: {error}"))
            }
            _ => Ok(()),
        }
    }
}

/// Kills a program; says whether it still ran.
fn end(mut child: Child) -> Outcome<bool> {
    let lost = |error| format!("lost a program: {error}");
    child.kill().map_err(lost)?;
    Ok(child.wait().map_err(lost)?.code().is_none())
}

fn in_workspace(program: &str, words: &[&str]) -> Command {
    let mut command = command(program, words);
    command.current_dir(Path::new(&workspace()));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_and_seed_are_read_or_refused() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(read(&words("--rounds 3 --seed 8")), Ok((3, 8)));
        assert!(read(&words("--rounds")).is_err());
        assert!(read(&words("--rounds x")).is_err());
    }

    #[test]
    fn who_has_ended_was_not_killed() {
        let mut quick = command("true", &[]).spawn().unwrap();
        quick.wait().unwrap();
        assert_eq!(end(quick), Ok(false));
        assert_eq!(end(command("sleep", &["60"]).spawn().unwrap()), Ok(true));
    }
}
