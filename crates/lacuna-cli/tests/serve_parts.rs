//! Snapshots, temporary overlays and parts of disks over NBD.

mod client;
mod common;

use client::Served;
use common::Sandbox;

fn with_snapshots() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e
        stock-img create -q -f qcow2 base.qcow2 4M; stock-io -c 'write -P 9 2M 1M' base.qcow2 >&2
        stock-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2
        stock-io -c 'write -P 1 0 100k' disk.qcow2 >&2; stock-img snapshot -c one disk.qcow2
        stock-io -c 'write -P 2 64k 1M' disk.qcow2 >&2; stock-img snapshot -c 1 disk.qcow2
        stock-io -c 'write -P 3 0 3M' disk.qcow2 >&2",
    );
    sandbox
}

#[test]
fn every_way_to_name_a_snapshot_gives_what_qemu_img_converts() {
    let sandbox = with_snapshots();
    for choice in
        ["one", "1", "2", "snapshot.id=2", "snapshot.name=1", "snapshot.id=1,snapshot.name=one"]
    {
        let got = sandbox.run(&format!(
            "stock-img convert -l {choice} -O raw disk.qcow2 expected &&
             lacuna serve -l {choice} disk.qcow2 --run 'rm -f got; nbdcopy \"$uri\" got &&
               stock-img compare -f raw -F raw got expected &&
               ! stock-io -f raw -c \"write 0 512\" $uri'"
        ));
        assert_eq!(got.code, Some(0), "{choice}: {}", got.text);
        assert!(got.text.contains("Images are identical."), "{choice}: {}", got.text);
        assert!(got.text.contains("Permission denied"), "{choice}: {}", got.text);
    }
}

#[test]
fn snapshots_of_many_images_are_served_at_once_while_others_read() {
    let sandbox = with_snapshots();
    let got = sandbox.run(
        "cp disk.qcow2 other.qcow2; stock-img convert -l one -O raw disk.qcow2 expected
         lacuna serve -l one a=disk.qcow2 b=other.qcow2 --run '
            for name in a b; do stock-img compare -f raw -F raw expected \
              nbd+unix:///$name?socket=${uri#*socket=}; done
            stock-io -r -c \"read -P 3 0 3M\" disk.qcow2'",
    );
    assert_eq!(got.text.matches("Images are identical.").count(), 2, "{}", got.text);
    assert!(!got.text.contains("failed"), "{}", got.text);
}

#[test]
fn what_is_written_to_an_overlay_is_seen_and_never_reaches_the_base() {
    let sandbox = with_snapshots();
    let before = (sandbox.bytes("base.qcow2"), sandbox.bytes("disk.qcow2"));
    sandbox.prepare("chmod a-w base.qcow2 disk.qcow2; mkdir scratch");
    let got = sandbox.run(
        "TMPDIR=$PWD/scratch lacuna serve -s disk.qcow2 --run '
            find scratch -type f | wc -l
            stock-io -f raw -c \"write -P 8 1M 2M\" -c \"discard 0 64k\" -c flush $uri >&2
            stock-io -r -f raw -c \"read -P 8 1M 2M\" -c \"read -P 3 64k 960k\" \
              -c \"read -P 0 0 64k\" $uri >&2
            nbdinfo --map=qemu:allocation-depth $uri; stock-io -r -c \"read -P 3 1M 2M\" disk.qcow2'
         ls -A scratch | wc -l",
    );
    assert!(!got.text.contains("failed"), "{}", got.text);
    assert!(got.text.starts_with("0\n") && got.text.ends_with("\n0\n"), "{}", got.text);
    for line in ["         0       65536    1  local", "     65536      983040    2  backing"] {
        assert!(got.text.contains(line), "{}", got.text);
    }
    assert!(before == (sandbox.bytes("base.qcow2"), sandbox.bytes("disk.qcow2")));
}

#[test]
fn overlays_of_one_base_do_not_meet_and_none_outlives_a_kill() {
    let sandbox = with_snapshots();
    sandbox.prepare("mkdir scratch");
    for signal in ["-TERM", "-KILL"] {
        // The socket of one that was killed stays, as any program's.
        sandbox.prepare("rm -f s");
        let words = "-s --discard=ignore a=disk.qcow2 b=disk.qcow2";
        let served = Served::start_in(&sandbox, words, &sandbox.path("scratch"));
        let uri = |name: &str| format!("nbd+unix:///{name}?socket=s");
        let got = sandbox.run(&format!(
            "stock-io -f raw -c 'write -P 8 0 1M' {0}; stock-io -f raw -c 'write -P 7 0 1M' {1}
             stock-io -r -f raw -c 'read -P 8 0 1M' {0}; stock-io -r -f raw -c 'read -P 7 0 1M' {1}",
            uri("a"),
            uri("b")
        ));
        assert!(!got.text.contains("failed"), "{}", got.text);
        served.signal(signal);
        assert_eq!(sandbox.run("ls -A scratch").text, "", "{signal}");
        assert!(!sandbox.run("stock-io -r -c 'read -P 3 0 3M' disk.qcow2").text.contains("failed"));
    }
}

#[test]
fn an_overlay_is_cached_also_over_an_image_that_is_not() {
    let sandbox = with_snapshots();
    let got = sandbox.run(
        "TMPDIR=/dev/shm lacuna serve -s -T none disk.qcow2 --run '
            stock-io -f raw -c \"write -P 8 1000 1M\" -c \"read -P 8 1000 1M\" \
              -c \"read -P 3 0 1000\" $uri'",
    );
    assert!(got.code == Some(0) && !got.text.contains("failed"), "{}", got.text);
}

#[test]
fn an_overlay_on_an_image_whose_folder_is_missing_says_what_to_do() {
    let sandbox = with_snapshots();
    let got = sandbox.run("TMPDIR=$PWD/none lacuna serve -s disk.qcow2 --run true");
    assert_eq!(got.code, Some(1), "{}", got.text);
    assert!(got.text.contains("TMPDIR names another folder"), "{}", got.text);
}

#[test]
fn a_part_of_a_disk_is_what_qemu_nbd_serves_behind_the_same_offset() {
    let sandbox = with_snapshots();
    sandbox.prepare("stock-img convert -O raw disk.qcow2 disk.raw");
    for (format, offset) in [("raw", 65536), ("qcow2", 65536), ("raw", 512), ("qcow2", 2 << 20)] {
        let got = sandbox.run(&format!(
            "stock-nbd -t -r -k $PWD/s -f {format} -o {offset} disk.{format} &
             awaited s
             rm -f expected got; nbdcopy nbd+unix:///?socket=s expected
             lacuna serve -r -f {format} -o {offset} disk.{format} --run 'nbdcopy $uri got'
             kill $!; wait $! 2>/dev/null; rm -f s; cmp expected got && echo equal"
        ));
        assert!(got.text.ends_with("equal\n"), "{format} {offset}: {}", got.text);
    }
}

#[test]
fn a_window_keeps_to_itself() {
    let sandbox = Sandbox::ours();
    sandbox.prepare("head -c 3M /dev/zero | tr '\\0' x > disk.raw");
    let got = sandbox.run(
        "lacuna serve -f raw -o 1M --size 64k disk.raw --run '
            nbdinfo --size $uri; stock-io -f raw -c \"write -P 1 0 64k\" $uri; stock-io -f raw \
              -c \"write 60k 8k\" $uri'",
    );
    assert!(got.text.starts_with("65536\n"), "{}", got.text);
    let bytes = sandbox.bytes("disk.raw");
    assert_eq!(bytes.len(), 3 << 20);
    assert!(bytes[..1 << 20].iter().all(|byte| *byte == b'x'));
    assert!(bytes[1 << 20..][..64 << 10].iter().all(|byte| *byte == 1));
    assert!(bytes[(1 << 20) + (64 << 10)..].iter().all(|byte| *byte == b'x'));
}

#[test]
fn contradictions_about_parts_are_refused() {
    let sandbox = with_snapshots();
    for (words, expected) in [
        ("-l nope", "Failed to load snapshot: The image has no snapshot"),
        ("-l snapshot.x=1", "Invalid parameter 'snapshot.x'"),
        ("-l one -s", "--load-snapshot and --snapshot are mutually exclusive"),
        ("-l one -o 512", "--load-snapshot and --offset are mutually exclusive"),
        ("-l one -B b", "--load-snapshot and --bitmap are mutually exclusive"),
        ("-o x", "Invalid offset 'x'"),
        ("-o -1", "Invalid offset '-1'"),
        ("-o 1G", "1073741824"),
        ("--size 8M", "8388608"),
        ("--size 0x", "Invalid size '0x'"),
    ] {
        let got = sandbox.run(&format!("lacuna serve {words} disk.qcow2 --run true"));
        assert_eq!(got.code, Some(1), "{words}: {}", got.text);
        assert!(got.text.contains(expected), "{words}: {}", got.text);
    }
}
