//! `stream`: an image comes to hold what part of its chain held.

mod common;

use common::Sandbox;

/// Four images; each has something of its own.
const CHAIN: &str = "set -e
    stock-img create -q -f raw base.raw 3M; stock-io -f raw -c 'write -P 1 0 2M' base.raw >&2
    stock-img create -q -f qcow2 -b base.raw -F raw a 4M; stock-io -c 'write -P 2 1M 512k' a >&2
    stock-img create -q -f qcow2 -b a -F qcow2 b; stock-io -c 'write -P 3 256k 64k' -c 'write -z 512k 256k' b >&2
    stock-img create -q -f qcow2 -b b -F qcow2 c; stock-io -c 'write -P 4 0 64k' -c 'write -P 5 3M 1k' c >&2
    stock-img create -q -f qcow2 -b c -F qcow2 top; stock-io -c 'write -P 6 128k 64k' top >&2
    stock-img convert -O raw top before.raw";

fn backing(ours: &Sandbox) -> String {
    ours.run("stock-img info top | grep '^backing file' | sed 's/ (actual.*//'").text
}

#[test]
fn what_is_between_comes_into_the_image_and_no_more() {
    for (base, stands_on, holds) in [
        ("-b c", "backing file: c\nbacking file format: qcow2\n", 1),
        ("-b b", "backing file: b\nbacking file format: qcow2\n", 3),
        ("--base a", "backing file: a\nbacking file format: qcow2\n", 8),
        ("-b base.raw", "backing file: base.raw\nbacking file format: raw\n", 16),
        ("", "", 42),
    ] {
        let ours = Sandbox::ours();
        ours.prepare(CHAIN);
        let got = ours.run(&format!("lacuna stream {base} top"));
        assert_eq!((got.text.as_str(), got.code), ("", Some(0)), "{base}");
        assert_eq!(backing(&ours), stands_on, "{base}");
        let got = ours.run("stock-img compare before.raw top; stock-img check -q top");
        assert_eq!((got.text.as_str(), got.code), ("Images are identical.\n", Some(0)), "{base}");
        // Clusters of data, over four of metadata and one table.
        assert!(
            ours.bytes("top").len() <= (holds + 6) << 16,
            "{base}: {}",
            ours.bytes("top").len()
        );
        ours.prepare(&format!("cp top once; lacuna stream {base} top; cmp once top"));
    }
}

#[test]
fn the_stored_name_leads_to_the_base_from_wherever_the_image_is() {
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; mkdir x y; stock-img create -q -f raw x/base 1M
         (cd x; stock-img create -q -f qcow2 -b base -F raw mid)
         (cd y; stock-img create -q -f qcow2 -b ../x/mid -F qcow2 top)
         stock-io -f raw -c 'write -P 7 0 1M' x/base >&2
         lacuna stream -b x/base y/top; cd y; stock-io -r -c 'read -P 7 0 1M' top >&2
         stock-img info top | grep -q x/base",
    );
}

#[test]
fn an_interrupted_stream_can_be_run_again() {
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; stock-img create -q -f qcow2 base 256M; stock-io -c 'write -P 1 0 128M' base >&2
         stock-img create -q -f qcow2 -b base -F qcow2 top; stock-img convert -O raw top before.raw",
    );
    // A signal may come late; what matters is what is left.
    ours.run("timeout -s INT 0.15 lacuna stream top");
    ours.prepare("stock-img check -q top; stock-img compare before.raw top");
    ours.prepare("lacuna stream top; stock-img check -q top; stock-img compare before.raw top; rm base; stock-img compare before.raw top");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    for (line, expected) in [
        (
            "lacuna stream -b nope top",
            "lacuna: Did not find 'nope' in the backing chain of 'top'\nhint: `lacuna info \
             --backing-chain top` lists it\n",
        ),
        (
            "lacuna stream -f raw base.raw",
            "lacuna: Image does not have a backing file\nhint: only qcow2 images stand on others\n",
        ),
    ] {
        let got = ours.run(line);
        assert_eq!((got.text.as_str(), got.code), (expected, Some(1)), "{line}");
    }
    assert_eq!(ours.run("qemu-img stream top").code, Some(1));
}
