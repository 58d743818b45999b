//! Space is given back on images that are served, beside clients that write and verify.

mod common;

use common::{Outcome, Sandbox};
use serde_json::Value;

/// A disk with holes: every other megabyte of 48 was discarded. A second one whose megabytes are alike.
const IMAGES: &str = "
    set -e
    stock-img create -q -f qcow2 disk.qcow2 64M
    stock-io -f qcow2 -c 'write -P 7 0 48M' disk.qcow2 >&2
    for ((i = 0; i < 40; i += 1)); do echo \"discard ${i}M 960k\"; done > discards
    stock-io -f qcow2 disk.qcow2 < discards >&2
    head -c 1M /dev/urandom > one; for ((i = 0; i < 16; i++)); do cat one; done > alike.raw
    stock-img convert -f raw -O qcow2 alike.raw alike.qcow2
    stock-img convert -f qcow2 -O raw disk.qcow2 before.raw";

const EXPORTS: &str = "a=disk.qcow2 b=alike.qcow2";

fn prepared() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(IMAGES);
    sandbox
}

fn served(lines: &str) -> (Sandbox, Outcome) {
    let sandbox = prepared();
    let got = common::served(&sandbox, EXPORTS, lines);
    (sandbox, got)
}

fn clean(sandbox: &Sandbox, image: &str) {
    let got = sandbox.run(&format!("stock-img check {image}"));
    assert_eq!(got.code, Some(0), "{image}: {}", got.text);
}

fn same(sandbox: &Sandbox, image: &str, raw: &str) {
    let got = sandbox.run(&format!("stock-img compare -f qcow2 -F raw {image} {raw}"));
    assert_eq!(got.code, Some(0), "{image}: {}", got.text);
}

fn number(sandbox: &Sandbox, file: &str) -> u64 {
    String::from_utf8(sandbox.bytes(file)).unwrap().trim().parse().unwrap()
}

#[test]
fn a_served_image_gets_shorter_and_equal_clusters_share() {
    let (sandbox, got) = served(
        "stat -c %s disk.qcow2 > long; ctl compact a || exit 1; stat -c %s disk.qcow2 > short
         ctl dedup b --memory 1M || exit 1
         ctl jobs --output=json > jobs.json; ctl jobs",
    );
    assert!(got.text.contains("server ended with 0\n"), "{}", got.text);
    assert!(got.text.contains("The file is "), "{}", got.text);
    assert!(got.text.contains("256 clusters share a place now, 15 MiB are free\n"), "{}", got.text);
    let (long, short) = (number(&sandbox, "long"), number(&sandbox, "short"));
    // 8 MiB were kept whole, and a sixteenth of 40.
    assert!(long > 48 << 20 && short < 12 << 20, "{long} {short}");
    let jobs: Value = serde_json::from_slice(&sandbox.bytes("jobs.json")).unwrap();
    let of = |nth: usize, name: &str| jobs["jobs"][nth][name].clone();
    assert_eq!((of(0, "command"), of(0, "state")), ("compact".into(), "done".into()), "{jobs}");
    assert_eq!((of(1, "command"), of(1, "export")), ("dedup".into(), "b".into()), "{jobs}");
    assert_eq!(of(0, "result")["left_bytes"], 0, "{jobs}");
    clean(&sandbox, "disk.qcow2");
    clean(&sandbox, "alike.qcow2");
    same(&sandbox, "disk.qcow2", "before.raw");
    same(&sandbox, "alike.qcow2", "alike.raw");
}

#[test]
fn jobs_at_work_do_no_harm_to_what_fio_verifies() {
    let (sandbox, got) = served(
        "fio --name=v --ioengine=nbd --uri=\"$a\" --rw=randwrite --bs=16k --size=40M --iodepth=16 \
             --verify=crc32c --randseed=1 >fio.log 2>&1 & fio=$!
         while kill -0 $fio 2>/dev/null; do
             ctl compact a --now >/dev/null || exit 1
             ctl dedup a --now >/dev/null || exit 1
         done
         wait $fio; echo fio ended with $?
         nbdcopy \"$a\" after.raw; ctl compact a --now",
    );
    assert!(got.text.contains("fio ended with 0\n"), "{}", got.text);
    assert!(got.text.contains("server ended with 0\n"), "{}", got.text);
    clean(&sandbox, "disk.qcow2");
    same(&sandbox, "disk.qcow2", "after.raw");
}

/// A kill leaves leaks at worst, and every byte that was flushed; also where clusters are shared.
#[test]
fn a_server_killed_at_work_leaves_a_sound_image() {
    let serving = common::serving(EXPORTS);
    for (first, after) in [("", "0.02"), ("dedup", "0.1"), ("dedup", "0.3"), ("", "0.3")] {
        let sandbox = prepared();
        let first = if first.is_empty() { String::new() } else { format!("ctl {first} a --now") };
        let got = sandbox.run(&format!(
            "{serving}
             stock-io -f raw -c 'write -P 9 50M 4M' -c flush \"$a\" >&2
             {first}
             ctl compact a --now --background --bandwidth 20M || exit 1
             sleep {after}; kill -9 $server; wait $server
             rm -f nbd.sock ctl.sock
             stock-img check disk.qcow2; echo check ended with $?
             stock-img check -q -r leaks disk.qcow2; stock-img check -q disk.qcow2 || exit 1
             cp before.raw wanted.raw; stock-io -f raw -c 'write -P 9 50M 4M' wanted.raw >&2"
        ));
        // 0: nothing was found; 3: leaks.
        let is_sound = ["check ended with 0\n", "check ended with 3\n"];
        assert!(is_sound.iter().any(|it| got.text.contains(it)), "{after}: {}", got.text);
        assert_eq!(got.code, Some(0), "{after}: {}", got.text);
        same(&sandbox, "disk.qcow2", "wanted.raw");
    }
}

#[test]
fn a_job_waits_for_quiet_is_listed_and_can_be_cancelled() {
    let (_, got) = served(
        "nbdsh -u \"$b\" -c 'import time
end = time.time() + 60
while time.time() < end and not __import__(\"os\").path.exists(\"quiet\"):
  h.pread(512, 0); open(\"begun\", \"w\").close()' & guest=$!
         for ((i = 0; i < 2000; i++)); do [ -e begun ] && break; sleep 0.01; done
         ctl compact b --background
         waits() { ctl jobs | grep -q waiting; }
         for ((i = 0; i < 2000; i++)); do waits && break; sleep 0.01; done
         waits && echo it waits
         ctl compact b --background; echo another ended with $?
         ctl cancel b; ctl jobs | grep -c cancelled
         ctl compact b --background >/dev/null; touch quiet; wait $guest
         finished() { ctl jobs | grep -q done; }
         for ((i = 0; i < 2000; i++)); do finished && break; sleep 0.01; done
         finished && echo it went on
         ctl cancel; echo cancel ended with $?",
    );
    for line in
        ["it waits\n", "another ended with 1\n", "it went on\n", "cancel ended with 1\n", "\n1\n"]
    {
        assert!(got.text.contains(line), "{line}: {}", got.text);
    }
}

#[test]
fn the_end_of_an_export_or_of_the_server_is_the_end_of_its_job() {
    let (sandbox, got) = served(
        "ctl compact a --now --bandwidth 1k --background
         ctl dedup b --now --bandwidth 1k --background
         ctl remove a; ctl jobs | grep -c cancelled",
    );
    assert!(got.text.contains("\n1\n"), "{}", got.text);
    assert!(got.text.contains("server ended with 0\n"), "{}", got.text);
    clean(&sandbox, "disk.qcow2");
    clean(&sandbox, "alike.qcow2");
    let (sandbox, serving) = (prepared(), common::serving(EXPORTS));
    let got = sandbox.run(&format!(
        "{serving}ctl compact a --now --bandwidth 1k & client=$!
         for ((i = 0; i < 2000; i++)); do ctl jobs | grep -q running && break; sleep 0.01; done
         kill $server; wait $server; echo server ended with $?; wait $client; echo client $?"
    ));
    let told = "The server has gone, and job 1 with it; what is done stays done";
    for line in ["server ended with 0\n", told, "client 1\n"] {
        assert!(got.text.contains(line), "{line}: {}", got.text);
    }
    clean(&sandbox, "disk.qcow2");
    same(&sandbox, "disk.qcow2", "before.raw");
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    let sandbox = prepared();
    let got = sandbox.run(
        "ctl() { lacuna ctl --control ctl.sock \"$@\" 2>&1; echo $?; }
         lacuna serve -t -r -k nbd.sock --control ctl.sock a=disk.qcow2 > where & server=$!
         while ! [ -s where ]; do sleep 0.01; done
         ctl compact a; ctl dedup a; ctl add raw alike.raw -f raw >/dev/null; ctl compact raw
         ctl compact a --memory 1M; ctl dedup raw --memory 1k; ctl compact raw --bandwidth 0
         ctl stop; wait $server",
    );
    for line in [
        "Export 'a' is read-only",
        "Export 'raw' is no qcow2 image",
        "--memory is no option of `ctl compact [EXPORT]`",
    ] {
        assert!(got.text.contains(line), "{line}: {}", got.text);
    }
}

#[test]
fn an_export_that_shares_as_it_is_written_has_jobs_too() {
    let sandbox = prepared();
    let got = sandbox.run(
        "ctl() { lacuna ctl --control ctl.sock \"$@\"; }
         lacuna serve -t -k nbd.sock --control ctl.sock -f qcow2 --dedup=online disk.qcow2 > where & server=$!
         while ! [ -s where ]; do sleep 0.01; done
         a=nbd+unix:///?socket=$PWD/nbd.sock
         fio --name=v --ioengine=nbd --uri=\"$a\" --rw=randwrite --bs=64k --size=20M --iodepth=8 \
             --verify=crc32c --randseed=2 --dedupe_percentage=50 >fio.log 2>&1 & fio=$!
         while kill -0 $fio 2>/dev/null; do
             ctl compact --now >/dev/null || exit 1
             ctl dedup --now >/dev/null || exit 1
         done
         wait $fio; echo fio ended with $?
         nbdcopy \"$a\" after.raw; ctl stop; wait $server; echo server ended with $?",
    );
    assert!(got.text.contains("fio ended with 0\nserver ended with 0\n"), "{}", got.text);
    clean(&sandbox, "disk.qcow2");
    same(&sandbox, "disk.qcow2", "after.raw");
}
