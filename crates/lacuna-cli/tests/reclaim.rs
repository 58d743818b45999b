//! `reclaim`: space given back in place, for people and for programs; what it refuses, and what an
//! interruption leaves.

mod common;

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::Sandbox;
use serde_json::Value;

/// Data, zeros stored as data, clusters that are equal, and a hole where something was discarded.
const BLOATED: &str = "
    stock-img create -q -f qcow2 a 32M
    stock-io -f qcow2 -d unmap -c 'write -P 1 0 4M' -c 'write -P 0 4M 4M' -c 'write -P 2 8M 4M' \
        -c 'write -P 3 12M 64k' -c 'write -P 7 13M 1M' -c 'discard 1M 2M' a >&2
    cp a before";

fn json(sandbox: &Sandbox, line: &str) -> Value {
    let got = sandbox.run(line);
    assert_eq!(got.code, Some(0), "{}", got.text);
    serde_json::from_str(&got.text).unwrap_or_else(|error| panic!("{error}: {}", got.text))
}

fn step<'a>(report: &'a Value, name: &str) -> &'a Value {
    let steps = report["steps"].as_array().unwrap();
    steps.iter().find(|step| step["step"] == name).unwrap_or_else(|| panic!("no {name}"))
}

/// The stock tools find the same disk in a sound image.
fn assert_same(sandbox: &Sandbox) {
    sandbox.prepare("stock-img check -q a && stock-img compare -q a before");
}

#[test]
fn the_file_becomes_as_short_as_what_is_left_and_the_disk_stays() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    let before = ours.path("a").metadata().unwrap().len();
    let estimate = json(&ours, "lacuna reclaim --dry-run --report=json a");
    assert_eq!(ours.bytes("a"), ours.bytes("before"), "a dry run changes nothing");
    let report = json(&ours, "lacuna reclaim --report=json a");
    assert_same(&ours);
    let after = ours.path("a").metadata().unwrap().len();
    assert_eq!(report["before"]["file-bytes"], before);
    assert_eq!(report["after"]["file-bytes"], after);
    assert_eq!(step(&report, "zeros")["zeroed-bytes"], 4 << 20);
    // 7 MiB and 64 KiB of data, and what describes it.
    let live = (7 << 20) + (64 << 10);
    assert!((live..live + (512 << 10)).contains(&after), "{after} of {live} live");
    assert_eq!(estimate["after"]["file-bytes"], after);
    let again = json(&ours, "lacuna reclaim --report=json a");
    assert_eq!(again["after"]["file-bytes"], after);
    assert_eq!(step(&again, "compact")["written-bytes"], 0);
}

#[test]
fn images_of_every_kind_become_short_and_stay_sound() {
    for options in [
        "compat=0.10",
        "cluster_size=2M",
        "cluster_size=4k,compression_type=zstd",
        "cluster_size=128k,extended_l2=on",
        "refcount_bits=1",
        "refcount_bits=64",
    ] {
        for dedup in ["", "--dedup"] {
            if options == "refcount_bits=1" && dedup == "--dedup" {
                continue;
            }
            let ours = Sandbox::ours();
            ours.prepare(&BLOATED.replace("-f qcow2 a", &format!("-f qcow2 -o {options} a")));
            let before = ours.path("a").metadata().unwrap().len();
            json(&ours, &format!("lacuna reclaim {dedup} --report=json a"));
            assert_same(&ours);
            assert_eq!(ours.run("lacuna check -q a").code, Some(0), "{options} {dedup}");
            let after = ours.path("a").metadata().unwrap().len();
            assert!(after < before, "{options} {dedup}: {before} {after}");
            // Stock goes on with it.
            ours.prepare(
                "stock-io -f qcow2 -d unmap -c 'write -P 3 1M 3M' -c 'discard 3M 2M' \
                     -c 'write -z 8M 4M' a >&2
                 stock-img check -q a",
            );
        }
    }
}

#[test]
fn with_dedup_equal_clusters_are_stored_once() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    let report = json(&ours, "lacuna reclaim --dedup --report=json a");
    assert_same(&ours);
    // Of 113 clusters with data there are four different ones.
    assert_eq!(step(&report, "dedup")["shared-clusters"], 112);
    let after = ours.path("a").metadata().unwrap().len();
    assert!(after < 2 << 20, "{after}");
    ours.prepare("stock-io -f qcow2 -c 'write -P 9 64k 64k' -c 'read -P 1 0 64k' a >&2");
    ours.prepare("stock-img check -q a");
}

/// A disk whose clusters were written in an order of their own, with a snapshot and an overlay of it.
const SHUFFLED: &str = "
    stock-img create -q -f qcow2 -o cluster_size=4k a 8M
    for i in 0 700 3 650 1 4 200 8 2 900 6 5 300 7 1000 9; do
        stock-io -f qcow2 -c \"write -P $((i % 250 + 1)) $((i * 8))k 8k\" a >&2
    done
    stock-img snapshot -c one a
    stock-io -f qcow2 -d unmap -c 'write -P 9 1M 64k' -c 'write -P 8 20k 12k' -c 'discard 1600k 32k' a >&2
    cp a before";

#[test]
fn data_is_put_in_the_order_of_the_disk_on_request() {
    let ours = Sandbox::ours();
    ours.prepare(SHUFFLED);
    let estimate = json(&ours, "lacuna reclaim --dry-run --defragment --report=json a");
    assert_eq!(ours.bytes("a"), ours.bytes("before"), "a dry run changes nothing");
    let report = json(&ours, "lacuna reclaim --defragment --report=json a");
    assert_same(&ours);
    let (extents, told) = (&report["extents"], &estimate["extents"]);
    assert_eq!(extents, told);
    let count = |when: &str| extents[when].as_u64().unwrap();
    assert!(count("after") * 2 < count("before"), "{extents}");
    // By the stock tool's map: offsets in the file rise with those of the disk.
    let map = ours.run("stock-img map --output=json -f qcow2 a");
    let map: Value = serde_json::from_str(&map.text).unwrap();
    let of = |it: &Value| it["offset"].as_u64();
    let offsets: Vec<u64> = map.as_array().unwrap().iter().filter_map(of).collect();
    assert!(offsets.is_sorted() && offsets.len() > 4, "{offsets:?}");
    ours.prepare("for i in a before; do stock-img convert -l one -O raw $i $i.raw; done; cmp a.raw before.raw");
    let again = json(&ours, "lacuna reclaim --defragment --report=json a");
    assert_eq!(step(&again, "compact")["written-bytes"], 0);
    let people = ours.run("lacuna reclaim --defragment a").text;
    assert!(people.contains("Extents of data in the file: "), "{people}");
}

#[test]
fn people_are_told_by_step_and_by_size() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    let got = ours.run("lacuna reclaim a");
    assert_eq!(got.code, Some(0), "{}", got.text);
    let names: Vec<_> =
        got.text.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(names, ["step", "leaks", "zeros", "compact", "a"], "{}", got.text);
    assert!(got.text.contains("a was 13.4 MiB ("), "{}", got.text);
    assert_eq!(ours.run("lacuna reclaim -q a").text, "");
}

#[test]
fn snapshots_overlays_and_leaks_are_no_obstacle() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    ours.prepare(
        "stock-img snapshot -c s a
         stock-io -f qcow2 -d unmap -c 'write -P 5 8M 2M' -c 'write -P 0 0 512k' a >&2
         cp a before
         stock-img convert -l s -O raw a snapshot.raw",
    );
    json(&ours, "lacuna reclaim --report=json a");
    assert_same(&ours);
    ours.prepare(
        "stock-img convert -l s -O raw a again.raw && cmp snapshot.raw again.raw
         mv a base && stock-img create -q -f qcow2 -b base -F qcow2 a
         stock-io -f qcow2 -c 'write -P 0 8M 1M' -c 'write -P 6 0 64k' a >&2
         cp a before",
    );
    let report = json(&ours, "lacuna reclaim --report=json a");
    assert_eq!(step(&report, "zeros")["zeroed-bytes"], 1 << 20);
    assert_same(&ours);
}

#[test]
fn leaks_are_freed_first_and_an_estimate_looks_past_them() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    // The refcount of a cluster behind everything: a block of 16 bits a count at 0x20000.
    let clusters = ours.path("a").metadata().unwrap().len() / 65536;
    ours.prepare(&format!(
        "truncate -s +64k a && cp a before
         printf '\\000\\001' | dd of=a bs=1 seek={} conv=notrunc status=none",
        0x20000 + 2 * clusters
    ));
    assert_eq!(ours.run("stock-img check -q a").code, Some(3), "a leak");
    let estimate = json(&ours, "lacuna reclaim --dry-run --report=json a");
    let report = json(&ours, "lacuna reclaim --report=json a");
    assert_eq!(step(&estimate, "leaks")["freed-bytes"], 65536);
    assert_eq!(step(&report, "leaks")["freed-bytes"], 65536);
    assert_eq!(estimate["after"]["file-bytes"], report["after"]["file-bytes"]);
    assert_same(&ours);
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f raw r 1M
         stock-img create -q -f qcow2 -o data_file=d e 1M
         stock-img create -q -f qcow2 dirty 1M
         printf '\\001' | dd of=dirty bs=1 seek=79 conv=notrunc status=none",
    );
    for (name, reason) in [
        ("r", "Only qcow2 images"),
        ("e", "external data file"),
        ("--dry-run dirty", "not closed cleanly"),
        ("missing", "No such file"),
    ] {
        let got = ours.run(&format!("lacuna reclaim {name}"));
        assert_eq!(got.code, Some(1), "{name}: {}", got.text);
        assert!(got.text.contains(reason), "{name}: {}", got.text);
    }
}

/// As a compaction may leave it that a power cut ended.
#[test]
fn one_that_was_not_closed_cleanly_is_repaired_first() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    ours.prepare("printf '\\001' | dd of=a bs=1 seek=79 conv=notrunc status=none");
    json(&ours, "lacuna reclaim --report=json a");
    let got = ours.run("stock-img info a");
    assert!(!got.text.contains("dirty"), "{}", got.text);
    assert_same(&ours);
}

#[test]
fn an_image_that_somebody_writes_is_left_alone() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    let got = ours.run("held -f qcow2 a; lacuna reclaim a; code=$?; exec 3>&-; wait; exit $code");
    assert_eq!(got.code, Some(1), "{}", got.text);
    assert!(got.text.contains("lock") || got.text.contains("writes"), "{}", got.text);
    assert_same(&ours);
}

#[test]
fn interrupted_anywhere_it_leaves_a_sound_image_and_goes_on() {
    let ours = Sandbox::ours();
    ours.prepare(BLOATED);
    for (wait, rate) in [(150, "4M"), (300, "8M"), (600, "16M")] {
        let mut child = Command::new(ours.program("lacuna"))
            .args(["reclaim", "--progress=json", "--bandwidth", rate])
            .arg(ours.path("a"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It has begun where it says how far it is.
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(said.next().is_some());
        let rest = std::thread::spawn(move || said.map_while(Result::ok).last());
        std::thread::sleep(Duration::from_millis(wait));
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        let code = child.wait().unwrap().code();
        let last = rest.join().unwrap();
        assert!([Some(0), Some(130)].contains(&code), "{code:?}: {last:?}");
        assert_same(&ours);
    }
    json(&ours, "lacuna reclaim --report=json a");
    assert!(ours.path("a").metadata().unwrap().len() < 8 << 20);
}

#[test]
fn a_file_system_with_deleted_files_is_noticed() {
    let ours = Sandbox::ours();
    // A disk that was written in full, and whose file system says that nearly all is free.
    ours.prepare(
        "truncate -s 64M r && mke2fs -q -F -t ext4 r
         stock-img create -q -f qcow2 a 64M
         stock-io -f qcow2 -c 'write -P 7 0 64M' a >&2
         stock-img dd -f raw -O raw if=r of=head bs=1M count=1
         stock-io -f qcow2 -c 'write -s head 0 1M' a >&2",
    );
    let report = json(&ours, "lacuna reclaim --dry-run --report=json a");
    let guest = &report["guest"][0];
    assert_eq!(guest["file-system"], "ext4");
    assert!(guest["stale-bytes"].as_u64().unwrap() > 32 << 20, "{guest}");
    assert!(guest["advice"].as_str().unwrap().contains("fstrim"), "{guest}");
}
