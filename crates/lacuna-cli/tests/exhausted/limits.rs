//! Limits that a shell or an administrator sets, and files that go away underneath.

use crate::common::Sandbox;

/// A file that may not be longer is an error, not the end by a signal, and half of a copy is removed.
#[test]
fn a_limit_of_file_length_is_told_and_leaves_what_was_there() {
    let ours = Sandbox::ours();
    ours.prepare(
        "head -c 4M /dev/urandom > big; stock-img create -q -f qcow2 image 64M
         stock-io -f qcow2 -c 'write -q -P 1 0 512k' image; cp image before",
    );
    for (verb, copy) in [
        ("convert -f raw -O qcow2 big copy", true),
        ("convert -f raw -O raw big copy", true),
        ("create -q -f raw copy 8M", true),
        ("create -q -f qcow2 -o preallocation=full copy 8M", true),
        ("resize -q --preallocation=full -f qcow2 image 72M", false),
        ("io -f qcow2 -c 'write -q -P 2 8M 2M' -c flush image", false),
    ] {
        let got = ours.run(&format!("ulimit -f 1024; lacuna {verb}"));
        assert_eq!(got.code, Some(1), "{verb}: {got:?}");
        assert!(got.text.contains("File too large"), "{verb}: {got:?}");
        let has_hint = got.text.contains("hint: `ulimit -f` and the file system say how long");
        assert!(has_hint || verb.starts_with("io"), "{verb}: {got:?}");
        assert!(!copy || !ours.path("copy").exists(), "{verb} leaves half of a file");
        ours.prepare(
            "stock-img check -q image; [ $? = 0 -o $? = 3 ]
             stock-io -r -f qcow2 -c 'read -P 1 0 512k' image | grep -c fail | grep -qx 0",
        );
        ours.prepare("cp before image");
    }
}

/// More clients than files may be open: some are turned away, nobody ends the server, and who comes
/// when there is room is served.
#[test]
fn a_server_without_file_descriptors_goes_on() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 image 64M; stock-io -f qcow2 -c 'write -q -P 1 0 1M' image",
    );
    let got = ours.run(
        "ulimit -Hn 24
         lacuna serve -f qcow2 image --shared 0 --run '
             for client in $(seq 40); do
                 timeout 20 lacuna io -r -f raw -c \"sleep 300\" -c \"read -q -P 1 0 64k\" $uri \\
                     > out.$client 2>&1 &
             done
             wait
             lacuna io -f raw -c \"write -q -P 2 1M 64k\" -c flush -c \"read -P 1 0 64k\" $uri
             echo afterwards $?'
         echo served $?",
    );
    assert!(got.text.contains("afterwards 0") && got.text.contains("served 0"), "{got:?}");
    assert!(!got.text.contains("Pattern verification failed"), "{got:?}");
    ours.prepare("stock-img check -q image && stock-io -r -f qcow2 -c 'read -P 2 1M 64k' image");
}

/// On a file system that is read-only what only reads succeeds, and what writes says so and changes
/// nothing.
#[test]
fn a_read_only_file_system_is_told() {
    let ours = Sandbox::ours();
    let reads = "info image; lacuna map image; lacuna check image; lacuna compare image base; \
                 lacuna convert -O qcow2 image ../copy; lacuna measure -O qcow2 image";
    let writes = [
        "io -f qcow2 -c 'write 0 64k' image",
        "check -r all image",
        "resize -q image 65M",
        "resize -q --shrink image 32M",
        "snapshot -c one image",
        "amend -o refcount_bits=64 image",
        "bitmap --add image one",
        "rebase -u -b base -F qcow2 image",
        "reclaim image",
        "dedup image",
        "commit top",
        "serve -f qcow2 image --run true",
        "create -q -f qcow2 new 1M",
        "convert -O qcow2 image new",
    ];
    let lines: String = writes
        .iter()
        .map(|verb| format!("echo BEGIN; lacuna {verb}; echo CODE $? {}\n", &verb[..5]))
        .collect();
    let script = format!(
        "set -e; mkdir -p full; mount -t tmpfs -o size=12m none full; cd full
         stock-img create -q -f qcow2 base 64M; stock-io -f qcow2 -c 'write -q 0 1M' base
         cp base image; stock-img create -q -f qcow2 -b base -F qcow2 top; mount -o remount,ro none .
         for verb in look; do (set -e; lacuna {reads}) > ../reads 2>&1; echo READS $?; done
         set +e; {lines}cmp base image; echo SAME $?"
    );
    std::fs::write(ours.path("script"), script).unwrap();
    let got = ours.run("unshare --map-root-user --mount bash script");
    assert!(got.text.contains("READS 0"), "root, or namespaces for users, are needed: {got:?}");
    assert!(got.text.contains("SAME 0"), "{got:?}");
    let runs: Vec<&str> = got.text.split("BEGIN\n").skip(1).collect();
    assert_eq!(runs.len(), writes.len());
    for (verb, run) in writes.iter().zip(runs) {
        assert!(run.contains("CODE 1 "), "{verb}: {run}");
        assert!(run.contains("Read-only file system"), "{verb}: {run}");
    }
}

/// A raw backing file is cut while clients read: what is gone reads as zeros, as with QEMU, what is
/// there stays readable, and all is well when it is there again.
#[test]
fn a_backing_file_that_is_cut_underneath_ends_nobody() {
    let ours = Sandbox::ours();
    ours.prepare(
        "head -c 2M /dev/zero | tr '\\0' '\\7' > base; cp base whole
         stock-img create -q -f qcow2 -b base -F raw image",
    );
    let got = ours.run(
        "lacuna serve -f qcow2 image --run '
             lacuna io -f raw -c \"read -P 7 0 2M\" $uri; echo before $?
             truncate -s 512k base
             lacuna io -f raw -c \"read -P 7 0 512k\" -c \"read -P 0 1M 64k\" $uri; echo cut $?
             cat whole > base
             lacuna io -f raw -c \"read -P 7 0 2M\" $uri; echo again $?'
         echo served $?",
    );
    for expected in ["before 0", "cut 0", "again 0", "served 0"] {
        assert!(got.text.contains(expected), "{expected}: {got:?}");
    }
}

#[test]
fn a_backing_file_that_is_gone_is_named_with_what_helps() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 base 1M; stock-io -f qcow2 -c 'write -q -P 7 0 64k' base
         stock-img create -q -f qcow2 -b base -F qcow2 image; mv base elsewhere",
    );
    for verb in
        ["map image", "convert -O raw image out", "io -c 'read 0 512' image", "commit image"]
    {
        let got = ours.run(&format!("lacuna {verb}"));
        assert_eq!(got.code, Some(1), "{verb}: {got:?}");
        for part in ["Could not open backing file", "base", "No such file", "hint: `lacuna info"] {
            assert!(got.text.contains(part), "{verb} does not say {part:?}: {got:?}");
        }
    }
    // What needs no guest data needs no backing file, and with it in its place all is as before.
    for verb in ["info image", "check image"] {
        assert_eq!(ours.run(&format!("lacuna {verb}")).code, Some(0), "{verb}");
    }
    ours.prepare("mv elsewhere base && lacuna io -r -c 'read -P 7 0 64k' image");
}
