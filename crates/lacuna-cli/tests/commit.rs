//! `commit` against the stock tool: same words, same exit codes, the same disks afterwards.

mod common;

use common::{Sandbox, both, both_in};

#[test]
fn what_is_asked_for_wrongly_is_refused_in_the_same_words() {
    both(
        "stock-img create -q -f qcow2 alone 1M; stock-img create -q -f raw base 1M; truncate -s 1M r
         stock-img create -q -f qcow2 -b base -F raw mid; stock-img create -q -f qcow2 -b mid -F qcow2 top
         stock-img create -q -u -f qcow2 -b away -F raw astray 1M
         qemu-img commit
         qemu-img commit top mid
         qemu-img commit -b
         qemu-img commit --bogus top
         qemu-img commit -U top
         qemu-img commit alone
         qemu-img commit -f raw r
         qemu-img commit -f raw mid
         qemu-img commit nope
         qemu-img commit astray
         qemu-img commit -f foo top
         qemu-img commit -t foo top
         qemu-img commit -r foo top
         qemu-img commit -r -1 top
         qemu-img commit -b nope top
         qemu-img commit -b top top
         qemu-img commit -b '' top
         qemu-img commit -b file:base top
         qemu-img commit -f qcow2 --image-opts driver=qcow2,file.filename=top
         qemu-img commit --image-opts driver=qcow2,file.filename=top
         qemu-img commit -q top
         qemu-img commit -r 0 -t none top
         qemu-img commit -b ./base top
         qemu-img commit -b $PWD/base -r 10M top",
    );
}

#[test]
fn a_name_of_the_base_is_seen_from_the_image_above_it() {
    both(
        "mkdir sub; cd sub; stock-img create -q -f raw base 1M
         cd sub; stock-img create -q -f qcow2 -b base -F raw mid; stock-img create -q -f qcow2 -b mid -F qcow2 top
         qemu-img commit -b mid sub/top
         qemu-img commit -b sub/mid sub/top
         qemu-img commit -b base sub/top
         ln -s mid sub/link; qemu-img commit -b link sub/top",
    );
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; mkdir sub; stock-img create -q -f raw sub/base 1M
         stock-img create -q -f qcow2 -b base -F raw sub/top; lacuna commit -b sub/base sub/top",
    );
}

/// An overlay with data, zeros and holes over a base that has something everywhere.
const CHAIN: &str = "set -e
    stock-img create -q -f qcow2 $V base 3M; stock-io -c 'write -P 3 0 3M' base >&2
    stock-img create -q -f qcow2 $V -b base -F qcow2 mid 3M
    stock-io -c 'write -P 4 64k 300k' -c 'write -z 512k 128k' mid >&2
    stock-img create -q -f qcow2 $V -b mid -F qcow2 top 3M
    stock-io -c 'write -P 5 128k 100k' -c 'write -z 1M 192k' -c 'write -P 6 2M 1k' top >&2";

#[test]
fn the_base_reads_as_the_overlay_did_and_the_overlay_is_empty() {
    for version in
        ["", "-o compat=0.10", "-o cluster_size=4k,extended_l2=off", "-o refcount_bits=1"]
    {
        let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
        let chain = CHAIN.replace("$V", version);
        for sandbox in [&stock, &ours] {
            sandbox.prepare(&format!(
                "{chain}; stock-img convert -O raw top before.raw; cp top top2; cp mid mid2"
            ));
        }
        both_in(
            &stock,
            &ours,
            "qemu-img commit top; stock-img check top | head -1; stock-img check -q mid; stock-img check -q base
             stock-img map --output=json top | grep -c depth..:.0
             stock-img compare before.raw top; stock-img compare before.raw mid
             stock-img info --output=json top | grep -c 'virtual-size.: 3145728'
             cp mid2 mid; cp top2 top; qemu-img commit -d top; cmp top top2; stock-img compare before.raw mid
             cp mid2 mid; qemu-img commit -b base top; cmp top top2; cmp mid mid2
             stock-img compare before.raw base; stock-img check -q base; stock-img check -q top",
        );
        // Nothing but the header, refcounts and the L1 table is left.
        let size = |sandbox: &Sandbox, name: &str| sandbox.bytes(name).len();
        for sandbox in [&stock, &ours] {
            sandbox.prepare("cp mid2 mid; cp top2 top; qemu-img commit -q top");
        }
        assert!(size(&ours, "top") <= size(&stock, "top"), "{version}");
    }
}

#[test]
fn what_no_overlay_holds_is_left_alone_and_zeros_are_not_written_over_zeros() {
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; stock-img create -q -f qcow2 base 64M; stock-io -c 'write -P 1 1M 1M' base >&2; cp base old
         stock-img create -q -f qcow2 -b base -F qcow2 top
         stock-io -c 'write -z 8M 16M' -c 'write -P 0 40M 1M' -c 'write -P 2 32M 64k' top >&2
         lacuna commit top; stock-img compare base top",
    );
    let map = ours.run("lacuna map --output=json base");
    assert!(ours.bytes("base").len() < 3 << 20, "{}", map.text);
    // Zeros that the overlay had as bytes are known as such now, and take no space.
    assert!(!map.text.contains("41943040"), "{}", map.text);
}

#[test]
fn disks_of_other_sizes_become_as_qemu_makes_them() {
    for (base, top) in [("1M", "2M"), ("2M", "1M"), ("1000448", "3M")] {
        for format in ["raw", "qcow2"] {
            let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
            for sandbox in [&stock, &ours] {
                sandbox.prepare(&format!(
                    "set -e; stock-img create -q -f {format} base {base}; stock-io -f {format} -c 'write -P 1 0 900k' base >&2
                     stock-img create -q -f qcow2 -b base -F {format} top {top}
                     stock-io -c 'write -P 2 700k 64k' top >&2
                     stock-img convert -O raw top before.raw"
                ));
            }
            both_in(
                &stock,
                &ours,
                &format!(
                    "qemu-img commit top; stock-img info -f {format} base | grep virtual
                     stock-img compare -f {format} base before.raw | head -1
                     stock-img compare top before.raw
                     stock-img convert -f {format} -O raw base base.raw; sha256sum base.raw"
                ),
            );
        }
    }
}

#[test]
fn a_shorter_image_in_between_hides_what_the_base_has_there() {
    both(
        "stock-img create -q -f qcow2 base 4M; stock-io -c 'write -P 3 0 4M' base >/dev/null
         stock-img create -q -f qcow2 -b base -F qcow2 mid 1M
         stock-img create -q -f qcow2 -b mid -F qcow2 top 3M; stock-io -c 'write -P 4 2M 64k' top >/dev/null
         stock-img convert -O raw top before.raw
         qemu-img commit -b base top; stock-img convert -O raw base after.raw
         cmp -n 3145728 before.raw after.raw
         sha256sum after.raw",
    );
}

#[test]
fn snapshots_and_bitmaps_of_the_overlay_stay_and_bitmaps_of_the_base_are_marked() {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    for sandbox in [&stock, &ours] {
        sandbox.prepare(
            "set -e; stock-img create -q -f qcow2 base 2M; stock-img bitmap --add -g 64k base b0
             stock-img create -q -f qcow2 -b base -F qcow2 top
             stock-io -c 'write -P 1 0 256k' top >&2; stock-img snapshot -c s top
             stock-io -c 'write -P 2 128k 256k' top >&2
             stock-img bitmap --add top b1; stock-io -c 'write -P 3 1M 64k' top >&2
             stock-img convert -O raw top before.raw; stock-img convert -l s -O raw top old.raw",
        );
    }
    both_in(
        &stock,
        &ours,
        "qemu-img commit top; stock-img compare top before.raw; stock-img compare base before.raw
         stock-img check -q top; stock-img check -q base; stock-img map --output=json top | grep -c depth..:.0
         stock-img convert -l s -O raw top now.raw; cmp now.raw old.raw",
    );
    let marked = |sandbox: &Sandbox, name: &str, bitmap: &str| {
        sandbox.run(&format!(
            "stock-nbd -r -f qcow2 -B {bitmap} -k $PWD/sock -x '' {name} & awaited sock
             stock-img map --output=json --image-opts driver=nbd,server.type=unix,server.path=$PWD/sock,x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
        ))
    };
    for (name, bitmap) in [("base", "b0"), ("top", "b1")] {
        assert_eq!(marked(&stock, name, bitmap), marked(&ours, name, bitmap), "{name}");
    }
}

#[test]
fn images_that_somebody_uses_are_refused_in_the_same_words() {
    for (holder, line) in [
        ("-r -f qcow2 base", "qemu-img commit top"),
        ("-f qcow2 base", "qemu-img commit top"),
        ("-r -f qcow2 top", "qemu-img commit top"),
        ("-r -f qcow2 top", "qemu-img commit -d other"),
        ("-f qcow2 top", "qemu-img commit top"),
        ("-r -f raw big.raw", "qemu-img commit grows"),
    ] {
        let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
        for sandbox in [&stock, &ours] {
            sandbox.prepare(
                "set -e; stock-img create -q -f qcow2 base 1M; truncate -s 1M big.raw
                 for f in top other; do stock-img create -q -f qcow2 -b base -F qcow2 $f; done
                 stock-img create -q -f qcow2 -b big.raw -F raw grows 2M",
            );
        }
        let line = format!("held {holder}; {line}; code=$?; exec 3>&-; wait; exit $code");
        assert_eq!(stock.run(&line), ours.run(&line), "{holder}: {line}");
    }
}

#[test]
fn an_interrupted_commit_leaves_a_chain_that_can_be_committed() {
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; stock-img create -q -f qcow2 base 64M; stock-io -c 'write -P 1 0 8M' base >&2
         stock-img create -q -f qcow2 -b base -F qcow2 top; stock-io -c 'write -P 2 4M 32M' top >&2
         stock-img convert -O raw top before.raw",
    );
    // Twice within a moment, as `timeout` sends it: that is one request.
    let got = ours.run(
        "lacuna commit --progress=json -r 4M top >log 2>&1 & commit=$!
         until grep -q '\"done\":[1-9]' log; do sleep 0.01; done
         kill -INT $commit; sleep 0.01; kill -INT $commit 2>/dev/null; wait $commit; echo ended with $?; cat log",
    );
    assert!(got.text.starts_with("ended with 130\n"), "{}", got.text);
    assert!(got.text.contains("Interrupted; what was done so far is kept"), "{}", got.text);
    assert!(
        got.text.contains(r#""state":"failed","phase":"copy""#),
        "not to its end: {}",
        got.text
    );
    assert_eq!(
        ours.run(
            "stock-img compare before.raw top; stock-img check -q base; stock-img check -q top"
        )
        .text,
        "Images are identical.\n"
    );
    let got = ours.run("lacuna commit --progress=json top 2>log; tail -1 log");
    assert!(got.text.contains("\"job\":\"commit\",\"state\":\"done\""), "{}", got.text);
    ours.prepare(
        "stock-img compare before.raw base; stock-img compare before.raw top; stock-img check top",
    );
}

#[test]
fn under_our_own_name_errors_say_what_helps() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 base 1M; stock-img create -q -f qcow2 -b base -F qcow2 top",
    );
    let got = ours.run("lacuna commit -b nope top");
    assert_eq!(
        (got.text.as_str(), got.code),
        (
            "lacuna: Did not find 'nope' in the backing chain of 'top'\nhint: `lacuna info \
             --backing-chain top` lists it\n",
            Some(1)
        )
    );
}
