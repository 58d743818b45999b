//! `kill -9` at random moments: the disk stays, `qemu-img check` finds leaks at most, and run again the
//! command completes. A sample of `cargo xtask torture`; which moments those are is the machine's.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::Sandbox;

/// Images on which each command is killed, and how often in a row.
const ROUNDS: u64 = 2;
const KILLS: u64 = 2;
/// What `qemu-img check` ends with where it found nothing but leaks.
const LEAKS: i32 = 3;

/// Real files twice, with zeros stored around them, and a disk that has much in common with it.
const IMAGES: &str = "
    mkdir -p tree/one && cp -L /usr/bin/{bash,ls,sort,tar} tree/one && cp -a tree/one tree/two
    mke2fs -q -F -t ext4 -b 4096 -d tree raw 32M && cp raw raw2
    debugfs -w -R 'rm one/tar' raw2 2> /dev/null
    stock-img convert -S 0 -f raw -O qcow2 raw first
    stock-img convert -S 0 -f raw -O qcow2 raw2 second";

/// The same moments for the same seed (xorshift).
struct Moments(u64);

impl Moments {
    fn part_of(&mut self, whole: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        whole.mul_f64((self.0 >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

fn killed(sandbox: &Sandbox, words: &str, moment: Duration) {
    let mut child = Command::new(sandbox.program("lacuna"))
        .args(words.split(' '))
        .current_dir(sandbox.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(moment);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Stock tools find the disk of `original` in `image`, and no damage.
fn assert_whole(sandbox: &Sandbox, image: &str, original: &str) {
    let got = sandbox.run(&format!("stock-img check {image}"));
    assert!([Some(0), Some(LEAKS)].contains(&got.code), "{image}: {}", got.text);
    let got = sandbox.run(&format!("stock-img compare {image} {original}"));
    assert_eq!(got.code, Some(0), "{image}: {}", got.text);
}

/// Kills `words` now and then, and lets them complete; `fresh` lays the images anew.
fn torture(seed: u64, words: &str, fresh: &str, after_kill: &str, images: &[(&str, &str)]) {
    let sandbox = Sandbox::ours();
    sandbox.prepare(IMAGES);
    sandbox.prepare(fresh);
    let start = Instant::now();
    sandbox.prepare(&format!("lacuna {words}"));
    let whole = start.elapsed();
    let mut moments = Moments(seed);
    for _ in 0..ROUNDS {
        sandbox.prepare(fresh);
        for _ in 0..KILLS {
            killed(&sandbox, words, moments.part_of(whole));
            for (image, original) in images {
                assert_whole(&sandbox, image, original);
            }
            sandbox.prepare(after_kill);
        }
        sandbox.prepare(&format!("lacuna {words}"));
        for (image, original) in images {
            assert_whole(&sandbox, image, original);
        }
    }
}

#[test]
fn reclaim_killed_anywhere_completes_when_run_again() {
    torture(41, "reclaim -q --dedup a", "cp first a", "", &[("a", "first")]);
}

#[test]
fn dedup_killed_anywhere_completes_when_run_again() {
    torture(42, "dedup -q a", "cp first a", "", &[("a", "first")]);
}

#[test]
fn dedup_across_killed_anywhere_completes_when_run_again() {
    let images = [("a", "first"), ("b", "second")];
    // What is not read-only is no complete base.
    let after_kill = "case $(stat -c %A base 2> /dev/null) in *w*) rm base ;; esac";
    let fresh = "rm -f base; cp first a; cp second b";
    torture(43, "dedup -q --across a b --base base", fresh, after_kill, &images);
}
