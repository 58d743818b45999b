//! Programs that may not take more than they need.

use crate::common::{Outcome, Sandbox};

/// Seconds of CPU after which the kernel ends a run: a hundred times what any takes.
const CPU_SECONDS: u32 = 30;
/// Seconds after which a run counts as hanging.
const SECONDS: u32 = 120;
/// What a run may have resident at most, in KiB: the longest L1 table there may be (32 MiB), 16 MiB of
/// other tables, and the program. With a healthy image it takes a fifth of that.
pub(crate) const MOST_KIB: u64 = 80 << 10;

/// What is put before a command to have it measured: GNU time writes to `peak`.
fn measured(most_cpu_seconds: u32) -> String {
    format!(
        "env time --quiet -f %M -o peak prlimit --core=0 --cpu={most_cpu_seconds} timeout {SECONDS}"
    )
}

/// Runs our program with these words; it neither panics, nor is killed, nor takes much.
pub(crate) fn lacuna(sandbox: &Sandbox, words: &str) -> Outcome {
    bounded(sandbox, &format!("lacuna {words}"))
}

/// Runs one program (and what it starts) under the bounds.
pub(crate) fn bounded(sandbox: &Sandbox, line: &str) -> Outcome {
    let got = sandbox.run(&format!("{} {line}", measured(CPU_SECONDS)));
    let code = got.code.unwrap_or_else(|| panic!("{line} was killed: {got:?}"));
    assert_ne!(code, 127, "a tool is missing: apt-get install time util-linux: {}", got.text);
    assert!(code < 101, "{line} ended with {code}: {}", got.text);
    assert!(!got.text.contains("panicked"), "{line}: {}", got.text);
    let peak = peak_kib(sandbox);
    println!("{peak} KiB: {line}");
    assert!((1..=MOST_KIB).contains(&peak), "{line} took {peak} KiB, not up to {MOST_KIB}");
    got
}

/// What the last run had resident at most.
pub(crate) fn peak_kib(sandbox: &Sandbox) -> u64 {
    let text = String::from_utf8(sandbox.bytes("peak")).unwrap();
    text.trim().parse().unwrap_or_else(|_| panic!("time said {text:?}"))
}

#[test]
fn the_bounds_are_noticed() {
    let ours = Sandbox::ours();
    let got = ours.run(&format!("{} sh -c 'while :; do :; done'", measured(1)));
    assert!(got.code.is_none_or(|code| code > 100), "{got:?}");
    let large = "head -c 200M /dev/zero | tail -c 100M";
    ours.run(&format!("{} sh -c '{large} > /dev/null'", measured(CPU_SECONDS)));
    assert!(peak_kib(&ours) > MOST_KIB);
}
