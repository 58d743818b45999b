//! Dirty bitmaps over NBD, held against qemu-nbd's.

mod common;

use common::Sandbox;

/// A chain with bitmaps on both levels, one name on both; one is disabled, one has a fine grain.
const CHAIN: &str = "
    set -e
    stock-img create -q -f qcow2 base.qcow2 4M
    stock-img bitmap --add base.qcow2 b0
    stock-img bitmap --add -g 4k base.qcow2 only
    stock-io -f qcow2 -c 'write -P 5 0 1M' -c 'write 3M 5000' base.qcow2 >&2
    stock-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2 8M
    stock-img bitmap --add disk.qcow2 b0
    stock-img bitmap --add -g 512 disk.qcow2 'a name'
    stock-io -f qcow2 -c 'write -P 7 1M 64k' -c 'write -z 2M 1M' -c 'write 7M 700' disk.qcow2 >&2
    stock-img bitmap --disable disk.qcow2 'a name'
    stock-io -f qcow2 -c 'write 6M 1k' disk.qcow2 >&2";

/// Serves with `lacuna serve` or stock, and asks.
fn ours(sandbox: &Sandbox, options: &str, ask: &str) -> common::Outcome {
    sandbox.run(&format!("lacuna serve {options} --run '{ask}'"))
}

fn theirs(sandbox: &Sandbox, options: &str, ask: &str) -> common::Outcome {
    sandbox.run(&format!(
        "stock-nbd -t -k $PWD/s {options} & awaited s; \
         uri=nbd+unix:///?socket=s; {ask}; kill $!; wait $! 2>/dev/null; rm -f s"
    ))
}

fn chain() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(CHAIN);
    sandbox
}

#[test]
fn every_bitmap_of_a_chain_is_told_as_qemu_nbd_tells_it() {
    let sandbox = chain();
    for name in ["b0", "a name", "only"] {
        let ask = format!("nbdinfo --map=\"qemu:dirty-bitmap:{name}\" $uri");
        let options = format!("-r -f qcow2 -B '{name}' disk.qcow2");
        let expected = theirs(&sandbox, &options, &ask);
        assert!(expected.text.contains("dirty") && expected.text.contains("clean"));
        assert_eq!(ours(&sandbox, &options, &ask).text, expected.text, "{name}");
        // Without being asked for as well, and when it can be written.
        assert_eq!(ours(&sandbox, "-f qcow2 disk.qcow2", &ask).text, expected.text, "{name}");
    }
}

#[test]
fn qemu_img_reads_a_bitmap_as_a_map() {
    let sandbox = chain();
    let ask = "stock-img map --output=json --image-opts \
               driver=nbd,server.type=unix,server.path=${uri#*socket=},x-dirty-bitmap=qemu:dirty-bitmap:b0";
    let options = "-r -f qcow2 -B b0 disk.qcow2";
    let expected = theirs(&sandbox, options, ask);
    assert!(expected.text.contains("\"data\": false"), "{}", expected.text);
    assert_eq!(ours(&sandbox, options, ask).text, expected.text);
}

#[test]
fn all_are_offered_unless_some_are_named() {
    let sandbox = chain();
    let ask = "nbdinfo $uri | grep qemu:dirty";
    let listed = |options: &str| {
        let got = ours(&sandbox, options, ask).text;
        got.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>()
    };
    let full = |names: &[&str]| -> Vec<String> {
        names.iter().map(|name| format!("qemu:dirty-bitmap:{name}")).collect()
    };
    assert_eq!(listed("-r disk.qcow2"), full(&["b0", "a name", "only"]));
    assert_eq!(listed("-r -B only -B b0 -B only disk.qcow2"), full(&["only", "b0"]));
}

#[test]
fn of_very_many_the_first_are_offered_and_any_that_is_named() {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e; stock-img create -q -f qcow2 disk 1M
        for n in $(seq 66); do stock-img bitmap --add disk b$n; done",
    );
    let got = ours(&sandbox, "-r disk", "nbdinfo $uri | grep -c qemu:dirty");
    assert!(got.text.contains("disk: of 66 bitmaps the first 64 are offered"), "{}", got.text);
    assert!(got.text.ends_with("\n64\n"), "{}", got.text);
    let got = ours(&sandbox, "-r -B b66 disk", "nbdinfo $uri | grep qemu:dirty");
    assert_eq!(got.text.trim(), "qemu:dirty-bitmap:b66");
}

#[test]
fn bitmaps_keep_up_with_what_clients_write() {
    let sandbox = chain();
    let ask = "stock-io -f raw -c \"write 5M 10k\" -c \"discard 1M 64k\" $uri >/dev/null
               nbdinfo --map=qemu:dirty-bitmap:b0 $uri > map
               nbdinfo --map=\"qemu:dirty-bitmap:a name\" $uri >> map";
    let got = ours(&sandbox, "-f qcow2 disk.qcow2", ask);
    assert_eq!(got.code, Some(0), "{}", got.text);
    let now = sandbox.run("cat map").text;
    assert!(now.contains("   5242880       65536    1  dirty\n"), "{now}");
    // Stock sees the same in the image that was left behind.
    let ask = "nbdinfo --map=qemu:dirty-bitmap:b0 $uri
               nbdinfo --map=\"qemu:dirty-bitmap:a name\" $uri";
    let later = theirs(&sandbox, "-r -f qcow2 -B b0 -B 'a name' disk.qcow2", ask);
    assert_eq!(now, later.text);
    assert_eq!(sandbox.run("stock-img check disk.qcow2").code, Some(0));
}

#[test]
fn what_cannot_be_offered_is_refused_where_it_is_named() {
    let sandbox = chain();
    sandbox.run("cp disk.qcow2 used.qcow2; stock-io -c 'write 0 1k' -c abort used.qcow2");
    for (line, expected) in [
        ("-B nope disk.qcow2", "Bitmap 'nope' is not found"),
        ("-r -B b0 used.qcow2", "Bitmap 'b0' is marked in use"),
        // The highest one of a name counts, though the one below could be read.
        ("-B b0 a=used.qcow2 b=base.qcow2", "Bitmap 'b0' is marked in use"),
        ("-f raw -B b0 disk.qcow2", "Bitmap 'b0' is not found"),
        ("--layers-bitmap nope disk.qcow2", "Bitmap 'nope' is not found"),
        ("--layers-bitmap 0=only disk.qcow2", "Level 0: Bitmap 'only' is not found"),
    ] {
        let got = ours(&sandbox, line, "true");
        assert_eq!(got.code, Some(1), "{line}: {}", got.text);
        assert!(got.text.contains(expected), "{line}: {}", got.text);
    }
    let got = ours(&sandbox, "-r used.qcow2", "nbdinfo $uri | grep -o dirty.*");
    assert!(got.text.ends_with("dirty-bitmap:only\n"), "{}", got.text);
    assert!(got.text.contains("not offered: Bitmap 'b0' is marked in use"), "{}", got.text);
}

#[test]
fn each_export_has_the_bitmaps_and_the_depth_of_its_own_chain() {
    let sandbox = chain();
    let map = |export: &str, context: &str| {
        format!("nbdinfo --map={context} \"${{uri/:\\/\\/\\//:///{export}}}\"; ")
    };
    let asks = [
        ("top", "qemu:dirty-bitmap:b0"),
        ("base", "qemu:dirty-bitmap:b0"),
        ("top", "qemu:allocation-depth"),
        ("base", "qemu:allocation-depth"),
    ];
    let ask: String = asks.iter().map(|(export, context)| map(export, context)).collect();
    let line = "-r -B b0 top=disk.qcow2 base=base.qcow2";
    let got =
        sandbox.run(&format!("cat > ask <<'E'\n{ask}\nE\nlacuna serve {line} --run 'bash ask'"));
    let expected: String = asks
        .iter()
        .map(|(export, context)| {
            let file = if *export == "top" { "disk.qcow2" } else { "base.qcow2" };
            let options = format!("-r -A -f qcow2 -B b0 -x {export} {file}");
            let ask = format!("nbdinfo --map={context} nbd+unix:///{export}?socket=s");
            theirs(&sandbox, &options, &ask).text
        })
        .collect();
    assert!(expected.contains("dirty") && expected.contains("backing"), "{expected}");
    assert_eq!(got.text, expected);
}

#[test]
fn depth_is_that_of_qemu_nbd_in_long_chains_of_uneven_lengths() {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e
        stock-img create -q -f raw a 3M; stock-io -f raw -c 'write 0 64k' a >&2
        stock-img create -q -f qcow2 -b a -F raw b 5M; stock-io -f qcow2 -c 'write 4M 64k' b >&2
        stock-img create -q -f qcow2 -b b -F qcow2 c 4M; stock-io -f qcow2 -c 'write 1M 64k' c >&2
        stock-img create -q -f qcow2 -b c -F qcow2 -o extended_l2=on d 9M
        stock-io -f qcow2 -c 'write 2M 2k' -c 'write -z 3M 64k' d >&2
        stock-img create -q -f qcow2 -b d -F qcow2 e 8M; stock-io -f qcow2 -c 'discard 0 64k' e >&2",
    );
    for image in ["e", "d", "c", "b"] {
        let ask = "nbdinfo --map=qemu:allocation-depth $uri";
        let expected = theirs(&sandbox, &format!("-r -A -f qcow2 {image}"), ask).text;
        let got = ours(&sandbox, &format!("-r -f qcow2 {image}"), ask).text;
        assert_eq!(got, expected, "{image}");
    }
}
