//! `bitmap` beside the stock tool: same words, same exit codes, bitmaps that either goes on with.

mod common;

use common::{Sandbox, both};

#[test]
fn what_is_asked_for_is_done_or_refused_in_the_same_words() {
    both(
        "stock-img create -q -f qcow2 a 10M; stock-img create -q -f qcow2 b 20M; stock-img create -q -f raw r 1M
         qemu-img bitmap
         qemu-img bitmap a
         qemu-img bitmap a b0
         qemu-img bitmap --add a
         qemu-img bitmap --add a b0 c
         qemu-img bitmap --add a b0
         qemu-img bitmap --add a b0
         qemu-img bitmap --add -g 1000 a b1
         qemu-img bitmap --add -g 256 a b1
         qemu-img bitmap --add -g 4G a b1
         qemu-img bitmap --add -g x a b1
         qemu-img bitmap --add -g 2G a b1
         qemu-img bitmap --add --add a b2
         qemu-img bitmap -g 64k --remove a b1
         for what in remove clear enable disable; do qemu-img bitmap --$what a nope; done
         qemu-img bitmap --merge nope a b0
         qemu-img bitmap --add --merge nope a b3
         qemu-img bitmap --add b big
         qemu-img bitmap --merge big -b b a b0
         qemu-img bitmap --merge big -b b -F qcow2 a b0
         qemu-img bitmap --merge b0 -F qcow2 a b0
         qemu-img bitmap -b b --add a b5
         qemu-img bitmap --add a ''
         qemu-img bitmap --add nofile x
         qemu-img bitmap --bogus a b0
         qemu-img bitmap --disable a b0; qemu-img bitmap --disable a b0; qemu-img bitmap --enable a b0
         qemu-img bitmap --add --image-opts driver=qcow2,file.filename=a b10
         qemu-img bitmap --add --image-opts -f qcow2 driver=qcow2,file.filename=a b11
         qemu-img bitmap --remove --add --disable a b0
         stock-img info a | sed -n '/bitmaps:/,/refcount/p'; stock-img check a | head -1",
    );
    both(
        "stock-img create -q -f qcow2 -o compat=0.10 v2 1M; stock-img create -q -f raw r 1M
         qemu-img bitmap --add v2 x 2>&1 | sed 's/.*: //'; qemu-img bitmap --add -f raw r x >&- 2>&- || echo failed",
    );
}

#[test]
fn bitmaps_go_on_whoever_made_them() {
    let ours = Sandbox::ours();
    let got = ours.run(
        "stock-img create -q -f qcow2 a 10M
         lacuna bitmap --add a ours; stock-img bitmap --add -g 32k a stock
         stock-io -c 'write -q 1M 64k' a; lacuna io -c 'write -q 2M 100k' a
         lacuna bitmap --dump a ours; lacuna bitmap --dump a stock
         lacuna bitmap --add -g 1M --disable --merge ours a sum; stock-img bitmap --merge stock a sum
         stock-io -c 'write -q 8M 1' a 2>&1 | head -1; lacuna bitmap --dump --output=json a sum
         stock-img bitmap --clear a ours; lacuna bitmap --dump a ours
         lacuna bitmap --remove a stock; lacuna bitmap --dump a stock 2>&1
         stock-img check a | head -1",
    );
    let lines = "\
Offset          Length
0x100000        0x10000
0x200000        0x20000
Offset          Length
0x100000        0x10000
0x200000        0x20000
[
{\"start\":1048576,\"length\":2097152}]
Offset          Length
";
    assert!(got.text.starts_with(lines), "{}", got.text);
    let rest = &got.text[lines.len()..];
    assert!(rest.contains("no bitmap 'stock'"), "{rest}");
    assert!(rest.ends_with("No errors were found on the image.\n"), "{rest}");
}

#[test]
fn what_a_crash_of_qemu_left_is_repaired_and_names_everything() {
    let ours = Sandbox::ours();
    let got = ours.run(
        "stock-img create -q -f qcow2 a 10M; stock-img bitmap --add a b0; stock-img bitmap --add a b1
         stock-io -c 'write -q 1M 64k' a; stock-io -c 'write -q 3M 64k' -c abort a >&- 2>&-
         lacuna bitmap --dump a b0; lacuna bitmap --clear a b0; lacuna bitmap --repair a; lacuna bitmap --dump a b0
         stock-img bitmap --clear a b0; lacuna bitmap --repair --output=json a; stock-img check a | head -1",
    );
    assert_eq!(got.text.matches("marked in use").count(), 2, "{}", got.text);
    assert_eq!(got.text.matches("hint: `lacuna bitmap --repair").count(), 2, "{}", got.text);
    assert!(got.text.contains("Bitmap 'b1' had been left in use: it names the whole disk now."));
    assert!(got.text.contains("\n0x0             0xa00000\n"), "{}", got.text);
    assert!(got.text.contains("\"all-dirty\": [\n    ]"), "{}", got.text);
    assert!(got.text.ends_with("No errors were found on the image.\n"), "{}", got.text);
}

#[test]
fn a_directory_that_cannot_be_read_is_cut_off_there() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 a 10M; for b in b0 b1 b2; do stock-img bitmap --add a $b; done",
    );
    // The name of the second entry reaches far behind the directory.
    let file = ours.path("a");
    let mut bytes = std::fs::read(&file).unwrap();
    let second = bytes.windows(2).rposition(|name| name == b"b1").unwrap() - 24;
    bytes[second + 18..second + 20].copy_from_slice(&[0xff, 0xff]);
    std::fs::write(&file, &bytes).unwrap();
    let got = ours.run(
        "lacuna bitmap --clear a b0; lacuna bitmap --repair a; lacuna bitmap --add a b3
         stock-img info a | grep name:; stock-img check a | head -1",
    );
    assert!(got.text.contains("reaches past"), "{}", got.text);
    assert!(got.text.contains("2 bitmaps could not be read, and are gone."), "{}", got.text);
    assert!(got.text.contains("name: b0\n            name: b3\n"), "{}", got.text);
    assert!(got.text.ends_with("No errors were found on the image.\n"), "{}", got.text);
}

#[test]
fn a_copy_gets_the_bitmaps_of_its_source() {
    both(
        "stock-img create -q -f qcow2 a 10M; stock-img bitmap --add a b0; stock-img bitmap --add -g 128k --disable a b1
         stock-io -c 'write -q 1M 100k' a; stock-img bitmap --merge b0 a b1
         qemu-img convert --bitmaps -O qcow2 a c; stock-img info c | sed -n '/bitmaps:/,/refcount/p'
         for b in b0 b1; do stock-img bitmap --add --merge $b -b c -F qcow2 c m$b; done; stock-img check c | head -1
         stock-img create -q -f qcow2 -o compat=0.10 v 10M; qemu-img convert --bitmaps -n -O qcow2 c v
         stock-img create -q -f qcow2 w 10M; stock-img bitmap --add w b0; qemu-img convert --bitmaps -n -O qcow2 a w
         stock-img create -q -f qcow2 x 20M; qemu-img convert --bitmaps -n -O qcow2 a x >&- 2>&- || echo refused
         (stock-io -c 'write -q 3M 64k' -c abort a; true) >&- 2>&-
         qemu-img convert --bitmaps -O qcow2 a d; ls d 2>&1
         qemu-img convert --bitmaps --skip-broken-bitmaps -O qcow2 a d; stock-img info d | grep -c bitmaps",
    );
    let ours = Sandbox::ours();
    let got = ours.run(
        "stock-img create -q -f qcow2 a 10M; stock-img bitmap --add a b0; stock-io -c 'write -q 1M 100k' a
         lacuna convert --bitmaps -O qcow2 a c; lacuna bitmap --dump c b0",
    );
    assert!(got.text.ends_with("0x100000        0x20000\n"), "{}", got.text);
}
