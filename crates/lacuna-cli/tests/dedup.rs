//! `dedup`: its reports, for people and for programs.

mod common;

use common::Sandbox;

/// Equal clusters inside of one image, across two, and smaller ones that lie apart.
const IMAGES: &str = "
    stock-img create -q -f qcow2 a 16M
    stock-io -f qcow2 -c 'write -P 1 0 256k' -c 'write -P 2 1M 64k' -c 'write -P 0 2M 128k' a >&2
    stock-img create -q -f qcow2 -o cluster_size=32k b 16M
    stock-io -f qcow2 -c 'write -P 1 64k 64k' -c 'write -P 3 1M 32k' -c 'write -c -P 9 3M 32k' b >&2";

fn shown(sandbox: &Sandbox, line: &str) -> String {
    let got = sandbox.run(line);
    assert_eq!(got.code, Some(0), "{}", got.text);
    format!("\n{}", got.text)
}

#[test]
fn a_report_tells_what_would_be_saved_at_each_cluster_size() {
    let ours = Sandbox::ours();
    ours.prepare(IMAGES);
    assert_eq!(
        shown(&ours, "lacuna dedup --report a"),
        "
a: 448 KiB of data in clusters of 64 KiB

cluster         data     zeros     saved       copy  shared copy
4 KiB        320 KiB   128 KiB   312 KiB    340 KiB       28 KiB
8 KiB        320 KiB   128 KiB   304 KiB    360 KiB       56 KiB
16 KiB       320 KiB   128 KiB   288 KiB    400 KiB      112 KiB
32 KiB       320 KiB   128 KiB   256 KiB    480 KiB      224 KiB
64 KiB*      320 KiB   128 KiB   192 KiB    640 KiB      448 KiB
* the size that clusters have now

Sharing clusters in place would save about 192 KiB, but its pins take 192 KiB: `dedup` shares nothing.
`convert --dedup -O qcow2 -o cluster_size=4096` makes a new image that takes about 28 KiB.
Between independent disks, duplicates are rare in clusters of 64 KiB and more
frequent in small ones, which take larger tables.
"
    );
    assert_eq!(
        shown(&ours, "lacuna dedup --report -p a b"),
        "
dedup: count 0%
dedup: count 50%
dedup: count 60%
dedup: count 100%
a: 448 KiB of data in clusters of 64 KiB
b: 128 KiB of data in clusters of 32 KiB, 32 KiB of it compressed

cluster         data     zeros     saved    across       copy  shared copy
4 KiB        448 KiB   128 KiB   428 KiB     4 KiB    492 KiB       64 KiB
8 KiB        448 KiB   128 KiB   408 KiB     8 KiB    528 KiB      120 KiB
16 KiB       448 KiB   128 KiB   368 KiB    16 KiB    608 KiB      240 KiB
32 KiB*      448 KiB   128 KiB   288 KiB    32 KiB    768 KiB      480 KiB
64 KiB*      512 KiB   128 KiB   192 KiB    64 KiB   1.12 MiB      960 KiB
* the size that clusters have now

Sharing clusters in place would save about 224 KiB, but its pins take 288 KiB: `dedup` shares nothing.
`convert --dedup -O qcow2 -o cluster_size=4096` makes new images that take about 64 KiB.
Between independent disks, duplicates are rare in clusters of 64 KiB and more
frequent in small ones, which take larger tables.
"
    );
}

#[test]
fn a_report_for_programs_has_every_figure() {
    let ours = Sandbox::ours();
    ours.prepare(IMAGES);
    let got = shown(&ours, "lacuna dedup --report --output=json a b");
    let found: serde_json::Value = serde_json::from_str(&got).unwrap();
    let size = |bytes: u64| {
        let sizes = found["sizes"].as_array().unwrap();
        sizes.iter().find(|size| size["cluster-size"] == bytes).unwrap().clone()
    };
    // Of 256 KiB all but one cluster; the zeros are no duplicates.
    assert_eq!(size(65536)["images"][0]["data-clusters"], 5);
    assert_eq!(size(65536)["images"][0]["zero-clusters"], 2);
    assert_eq!(size(65536)["images"][0]["distinct-clusters"], 2);
    // In clusters of 64 KiB, 32 KiB of data and zeros behind it are something else.
    assert_eq!(size(65536)["all"]["distinct-clusters"], 4);
    assert_eq!(size(32768)["all"]["distinct-clusters"], 4);
    assert_eq!(size(4096)["saved-inside"], (256 - 4 + 64 - 4 + 64 - 4 + 32 - 4 + 32 - 4) << 10);
    assert_eq!(size(4096)["saved-across"], 4096);
    assert_eq!(found["saved-in-place"], (3 * 64 + 32) << 10);
    assert_eq!(found["images"][1]["compressed"], 32 << 10);
}

#[test]
fn nothing_is_written() {
    let ours = Sandbox::ours();
    ours.prepare(IMAGES);
    let before = ours.bytes("a");
    shown(&ours, "chmod a-w a && lacuna dedup --report a");
    assert!(before == ours.bytes("a"));
}

#[test]
fn command_lines_that_make_no_sense_are_refused() {
    let ours = Sandbox::ours();
    ours.prepare(IMAGES);
    for (line, words) in [
        ("lacuna dedup --report", "Expecting one image file name or more"),
        ("lacuna dedup --report --memory 1k a", "Must be between 1048576"),
        ("lacuna dedup --report --memory x a", "Invalid memory bound specified: 'x'"),
        ("lacuna dedup --report --output=xml a", "--output expects 'human' or 'json'"),
        ("lacuna dedup --report nope", "No such file or directory"),
        ("qemu-img dedup --report a", "Command not found: dedup"),
    ] {
        let got = ours.run(line);
        assert_eq!(got.code, Some(1), "{line}");
        assert!(got.text.contains(words), "{line}: {}", got.text);
    }
}

/// Tables that lie are found as in any other verb, and never by a crash.
#[test]
fn hostile_images_are_refused_or_reported_in_bounded_time() {
    let ours = Sandbox::ours();
    ours.prepare(IMAGES);
    // The L1 table of `a` lies at 0x30000, its first L2 table at 0x40000.
    for patch in
        ["\\x80\\x00\\x7f\\xff\\xff\\xff\\x00\\x00", "\\x80\\x00\\x00\\x00\\x00\\x00\\x02\\x00"]
    {
        for place in [0x30000, 0x40000] {
            ours.prepare(&format!(
                "cp a bad && printf '{patch}' | dd of=bad bs=1 seek={place} conv=notrunc status=none"
            ));
            let got = ours.run("timeout 20 lacuna dedup --report bad");
            assert!(matches!(got.code, Some(0 | 1)), "{patch} at {place}: {got:?}");
        }
    }
}

/// What follows the verb is done to `a`; its content stays, and stock tools find nothing wrong.
fn assert_unharmed(sandbox: &Sandbox) {
    sandbox.prepare("stock-img check -q a && stock-img compare -q a before");
}

#[test]
fn equal_clusters_are_stored_once() {
    let ours = Sandbox::ours();
    ours.prepare(IMAGES);
    ours.prepare("cp a before");
    let got = shown(&ours, "lacuna dedup --dry-run a");
    assert_eq!(got, "\na: would free about 0 B\n");
    assert_eq!(
        shown(&ours, "lacuna dedup a"),
        "
a: 0 of 7 clusters share a place now and did not before; 0 B freed
Sharing would save 192 KiB, but the tables of its pins take 192 KiB: nothing more was shared
Clusters that hold nothing but zeros, and share nothing: 2
"
    );
    assert!(ours.bytes("a") == ours.bytes("before"));
    ours.prepare("stock-io -f qcow2 -c 'write -P 1 4M 256k' a >&2 && cp a before");
    let got = shown(&ours, "lacuna dedup --dry-run a");
    assert_eq!(got, "\na: would free about 448 KiB\n");
    assert!(ours.bytes("a") == ours.bytes("before"));
    assert_eq!(
        shown(&ours, "lacuna dedup a"),
        "
a: 8 of 11 clusters share a place now and did not before; 448 KiB freed
Clusters that hold nothing but zeros, and share nothing: 2
New shared places, pinned by 8 bytes each in a hidden snapshot: 1
Whoever writes to it must heed the COPIED flag, as with internal snapshots. QEMU does;
cloud-hypervisor, crosvm and qcow2-rs did not when looked at, and corrupt such images.
"
    );
    assert_unharmed(&ours);
    let got = shown(&ours, "lacuna dedup --output=json a");
    let found: serde_json::Value = serde_json::from_str(&got).unwrap();
    assert_eq!(
        (&found["finished"], &found["shared"], &found["freed"]),
        (&true.into(), &0.into(), &0.into())
    );
    let got = shown(&ours, "lacuna dedup --report --output=json a");
    let found: serde_json::Value = serde_json::from_str(&got).unwrap();
    assert_eq!(found["images"][0]["shared-already"], 448 << 10);
    assert_eq!(found["saved-in-place"], 0);
    assert_unharmed(&ours);
}

#[test]
fn reasons_not_to_share_are_told() {
    let ours = Sandbox::ours();
    ours.prepare(IMAGES);
    ours.prepare("stock-img create -q -f qcow2 -o refcount_bits=1 one 1M");
    ours.prepare(
        "stock-img create -q -f qcow2 -o data_file=d ext 1M; stock-img create -q -f raw r 1M",
    );
    for (line, words) in [
        ("lacuna dedup one", "amend the image to 16 bits"),
        ("lacuna dedup ext", "external file"),
        ("lacuna dedup -f raw r", "no clusters to share"),
        ("lacuna dedup a b", "--report takes several"),
        ("lacuna dedup --bandwidth 0 a", "Invalid bandwidth"),
        ("lacuna dedup --report --dry-run a", "mutually exclusive"),
    ] {
        let got = ours.run(line);
        assert_eq!(got.code, Some(1), "{line}: {}", got.text);
        assert!(got.text.contains(words), "{line}: {}", got.text);
    }
}

#[test]
fn an_interrupted_run_leaves_a_valid_image_and_the_next_goes_on() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 a 63M; stock-io -f qcow2 -c 'write -P 5 0 63M' a >&2",
    );
    ours.prepare("cp a before");
    // Looking takes a second, sharing as long.
    let got = ours.run("lacuna dedup --bandwidth 64M a & sleep 1.4; kill -INT $!; wait $!");
    assert_eq!(got.code, Some(130), "{}", got.text);
    assert!(got.text.contains("another run goes on from here"), "{}", got.text);
    assert_unharmed(&ours);
    let got = shown(&ours, "lacuna dedup -p a");
    assert!(got.contains("dedup: share 100%\na: "), "{got}");
    let report = shown(&ours, "lacuna dedup --report --output=json a");
    let found: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(found["images"][0]["shared-already"], 1007 << 16);
    assert_unharmed(&ours);
}

/// A disk of 8 MiB in which three quarters of the clusters are there twice or more.
const DISK: &str = "
    stock-img create -q -f raw disk 8M
    stock-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 3M 64k' -c 'write -P 3 4M 128k' disk >&2
    dd if=/dev/urandom of=random bs=64k count=10 status=none
    dd if=random of=disk bs=64k seek=80 conv=notrunc status=none
    dd if=random of=disk bs=64k seek=100 conv=notrunc status=none";

#[test]
fn a_conversion_stores_equal_clusters_once() {
    let ours = Sandbox::ours();
    ours.prepare(DISK);
    for options in
        ["", "-c", "-W", "-o cluster_size=4k", "-c -o cluster_size=4k,compression_type=zstd"]
    {
        let line = format!("lacuna convert --dedup {options} -f raw -O qcow2 disk copy");
        let got = shown(&ours, &line);
        assert!(got.contains(" clusters share a place with others\n"), "{line}: {got}");
        ours.prepare("stock-img check -q copy && stock-img compare -q -f raw -F qcow2 disk copy");
        ours.prepare(&format!("lacuna convert {options} -f raw -O qcow2 disk plain"));
        let report = shown(&ours, "lacuna dedup --report --output=json copy");
        let found: serde_json::Value = serde_json::from_str(&report).unwrap();
        // Compressed clusters are not counted by places.
        if !options.contains("-c ") && options != "-c" {
            assert_eq!(found["saved-in-place"], 0, "{line}: {report}");
        }
        let allocated = |name| {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(ours.path(name)).unwrap().blocks() * 512
        };
        let saved = allocated("plain") as i64 - allocated("copy") as i64;
        assert!(saved > 500 << 10, "{line}: {saved} bytes");
        // Stock QEMU goes on with it.
        ours.prepare("stock-io -f qcow2 -c 'write -P 9 64k 4k' -c 'write -P 8 0 64k' copy >&2");
        ours.prepare("stock-img check -q copy; rm copy plain");
    }
}

#[test]
fn a_conversion_that_cannot_share_is_refused() {
    let ours = Sandbox::ours();
    ours.prepare(DISK);
    for (options, words) in [
        ("--dedup", "-O qcow2 makes a qcow2 image"),
        ("--dedup -C -O qcow2", "copy offloading"),
        ("--dedup-memory 1M -O qcow2", "requires --dedup"),
        ("--dedup --dedup-memory 1 -O qcow2", "Invalid memory bound"),
        ("--dedup -O qcow2 -o refcount_bits=1", "amend the image to 16 bits"),
        ("--dedup -O qcow2 -o data_file=ext", "external file"),
    ] {
        let got = ours.run(&format!("lacuna convert -f raw {options} disk copy"));
        assert_eq!(got.code, Some(1), "{options}: {}", got.text);
        assert!(got.text.contains(words), "{options}: {}", got.text);
        assert!(!ours.path("copy").exists(), "{options}");
    }
}

#[test]
fn what_clients_write_to_a_server_is_stored_once() {
    let ours = Sandbox::ours();
    ours.prepare(DISK);
    ours.prepare("stock-img create -q -f qcow2 a 8M");
    let copy = "stock-img convert -n -f raw -O raw disk $uri && stock-io -f raw -c \"write -P 7 6M 64k\" $uri >out";
    let got = ours.run(&format!("lacuna serve --dedup=online -f qcow2 a --run '{copy}'"));
    assert_eq!(got.code, Some(0), "{}", got.text);
    ours.prepare("stock-io -f raw -c 'write -P 7 6M 64k' disk >&2");
    ours.prepare("stock-img check -q a && stock-img compare -q -f raw -F qcow2 disk a");
    let report = shown(&ours, "lacuna dedup --report --output=json a");
    let found: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(found["saved-in-place"], 0, "{report}");
    assert!(found["images"][0]["shared-already"].as_u64() > Some(1 << 20), "{report}");
    // Whatever options put on top of the image.
    for opts in [
        "driver=qcow2,file.driver=file,file.filename=b",
        "driver=qcow2,file.driver=file,file.filename=b,cache.direct=off,detect-zeroes=on",
        "driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename=b",
    ] {
        ours.prepare("rm -f b; stock-img create -q -f qcow2 b 8M");
        let serve = format!("lacuna serve --dedup=online --image-opts {opts}");
        let got = ours.run(&format!("{serve} --run '{copy}'"));
        assert_eq!(got.code, Some(0), "{opts}: {}", got.text);
        ours.prepare("stock-img check -q b && stock-img compare -q -f raw -F qcow2 disk b");
        let report = shown(&ours, "lacuna dedup --report --output=json b");
        let found: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(found["saved-in-place"], 0, "{opts}: {report}");
        assert!(found["images"][0]["shared-already"].as_u64() > Some(1 << 20), "{report}");
    }
    for (options, words) in [
        (
            "--dedup=online --image-opts driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename=a",
            "driver compress",
        ),
        ("--dedup=online -r a", "read-only"),
        ("--dedup=online -f raw disk", "Only the clusters of a qcow2 image"),
        ("--dedup=soon a", "expects 'off' or 'online'"),
        ("--dedup-memory 1M a", "requires --dedup=online"),
    ] {
        let got = ours.run(&format!("lacuna serve {options} --run true"));
        assert_eq!(got.code, Some(1), "{options}: {}", got.text);
        assert!(got.text.contains(words), "{options}: {}", got.text);
    }
}

/// Three disks with much in common at the same places, zeros over it, sizes of their own.
const FAMILY: &str = "
    dd if=/dev/urandom of=random bs=1M count=4 status=none
    for i in a b c; do
        stock-img convert -f raw -O qcow2 -o cluster_size=4k random $i; stock-img resize -q $i 8M
    done
    stock-io -f qcow2 -c 'write -P 1 1M 64k' -c 'write -z 2M 64k' a >&2
    stock-io -f qcow2 -c 'write -P 2 1M 64k' -c 'write -P 5 6M 12k' b >&2
    stock-io -f qcow2 -c 'write -P 2 1M 64k' -c 'write -c -P 6 5M 4k' c >&2
    stock-img resize -q c 12M
    for i in a b c; do cp $i $i.before; done";

#[test]
fn what_images_have_in_common_becomes_their_base() {
    let ours = Sandbox::ours();
    ours.prepare(FAMILY);
    // Who is not root has no other owner to give it to.
    ours.prepare("[ $(id -u) != 0 ] || chown 12:34 a; chmod 2640 a; stat -c '%u:%g %a' a > owner");
    let got = shown(&ours, "lacuna dedup --across a b c --base base.qcow2");
    assert!(got.contains("\nbase.qcow2: 4 MiB in common, read-only."), "{got}");
    for image in ["a", "b", "c"] {
        ours.prepare(&format!(
            "stock-img check -q {image} && stock-img compare -q {image}.before {image}"
        ));
        let info = shown(&ours, &format!("stock-img info {image}"));
        assert!(info.contains("backing file: base.qcow2"), "{info}");
        assert!(info.contains("cluster_size: 4096"), "{info}");
    }
    ours.prepare(
        "stock-img check -q base.qcow2; [ ! -e a.lacuna-overlay ] && stat -c '%u:%g %a' a | cmp - owner",
    );
    // What differs is all that an overlay holds; the compressed cluster stays one.
    let info = shown(&ours, "lacuna info --output=json b");
    assert!(info.contains("\"data\": 12288,"), "{info}");
    let info = shown(&ours, "lacuna info --output=json c");
    assert!(info.contains("\"compressed\": 4096"), "{info}");
}

#[test]
fn a_run_that_ended_half_way_is_gone_on_with() {
    let ours = Sandbox::ours();
    ours.prepare(FAMILY);
    // The third image comes later, beside what a killed run would have left of its overlay.
    ours.prepare("lacuna dedup -q --across a b --base base.qcow2; echo rubbish > c.lacuna-overlay");
    let got = shown(&ours, "lacuna dedup --across a b c --base base.qcow2");
    assert!(got.contains("\nbase.qcow2: was there, read-only."), "{got}");
    assert!(!got.contains("\na: ") && got.contains("\nc: "), "{got}");
    for image in ["a", "b", "c"] {
        ours.prepare(&format!(
            "stock-img check -q {image} && stock-img compare -q {image}.before {image} &&
             [ ! -e {image}.lacuna-overlay ]"
        ));
    }
    let info = shown(&ours, "stock-img info c");
    assert!(info.contains("backing file: base.qcow2"), "{info}");
    assert_eq!(ours.run("lacuna dedup -q --across a b c --base base.qcow2").code, Some(0));
    let got = ours.run("lacuna dedup --across a base.qcow2 --base base.qcow2");
    assert_eq!(got.code, Some(1), "{}", got.text);
    assert!(got.text.contains("is the base itself"), "{}", got.text);
    // An overlay that somebody writes is not stale.
    ours.prepare("stock-img create -q -f qcow2 -o cluster_size=4k d 8M; cp d d.lacuna-overlay");
    let got = ours.run(
        "held -f qcow2 d.lacuna-overlay
         lacuna dedup --across a d --base base.qcow2; code=$?; exec 3>&-; wait; exit $code",
    );
    assert_eq!(got.code, Some(1), "{}", got.text);
    ours.prepare("[ -e d.lacuna-overlay ]");
}

#[test]
fn images_that_cannot_stand_on_a_base_stay_as_they_are() {
    let ours = Sandbox::ours();
    ours.prepare(FAMILY);
    ours.prepare(
        "cp a snap; stock-img snapshot -c s snap; cp a bits; stock-img bitmap --add bits x
         stock-img create -q -f qcow2 -b a -F qcow2 top; stock-img create -q -f qcow2 other 1M
         stock-img create -q -f qcow2 -o cluster_size=4k none 1M; cp none none2; : > there
         ln -s a link",
    );
    for (line, words) in [
        ("a b", "--across needs --base"),
        ("a --base x", "at least two"),
        ("a b --base there", "exists, and is not written over"),
        ("a snap --base x", "internal snapshots"),
        ("a bits --base x", "bitmaps"),
        ("b top --base x", "stands on a backing file already"),
        ("a other --base x", "clusters of another size"),
        ("a link --base x", "is named twice"),
        ("none none2 --base x", "nothing in common"),
        ("a random --base x", "is no qcow2 image"),
        ("--report a b --base x", "mutually exclusive"),
    ] {
        let got = ours.run(&format!("lacuna dedup --across {line}"));
        assert_eq!(got.code, Some(1), "{line}: {}", got.text);
        assert!(got.text.contains(words), "{line}: {}", got.text);
        ours.prepare("[ ! -e x ] && cmp a a.before && cmp b b.before");
    }
}

/// An image with a persistent bitmap, in which clusters share places.
const SHARED: &str = "
    stock-img create -q -f qcow2 a 8M
    stock-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 1M 1M' a >&2
    stock-img bitmap --add a b0
    lacuna dedup -q a
    cp a before";

#[test]
fn pins_that_stock_qemu_dropped_are_noticed_and_made_again() {
    let ours = Sandbox::ours();
    ours.prepare(SHARED);
    assert!(ours.run("lacuna info a").text.contains("pins of shared clusters: 2 clusters"));
    // Something to repair, so that all is repaired: a leak behind the end.
    ours.prepare("stock-img check -q -r all a; stock-img snapshot -l a >&2");
    let info = ours.run("lacuna info a").text;
    assert!(info.contains("`lacuna dedup --repin` before stock QEMU writes"), "{info}");
    assert_eq!(
        ours.run("lacuna dedup --repin a").text,
        "a: 2 shared clusters are pinned now and were not before\n"
    );
    // All sharers but one are overwritten, and the check goes on finding nothing.
    ours.prepare(
        "stock-img check -q a && stock-img compare -q a before
         stock-io -f qcow2 -c 'write -P 3 64k 960k' -c 'read -P 1 0 64k' a >&2
         stock-img check -q a",
    );
    assert_eq!(ours.run("lacuna dedup --repin a").text, "a: no shared cluster lacked a pin\n");
}

#[test]
fn pins_are_taken_off_on_request() {
    let ours = Sandbox::ours();
    ours.prepare(SHARED);
    let got = ours.run("lacuna dedup --unpin a");
    assert_eq!(got.code, Some(0), "{}", got.text);
    assert!(!ours.run("lacuna snapshot -l a").text.contains("lacuna-pin"));
    ours.prepare("stock-img check -q a && stock-img compare -q a before");
    for (line, reason) in [
        ("--repin --unpin a", "mutually exclusive"),
        ("--repin --dry-run a", "does not go with"),
        ("--unpin", "one image"),
    ] {
        let got = ours.run(&format!("lacuna dedup {line}"));
        assert_eq!(got.code, Some(1), "{}", got.text);
        assert!(got.text.contains(reason), "{}", got.text);
    }
}
