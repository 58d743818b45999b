//! `dd` against qemu-img: the same bytes and layout, and the same words for what is wrong.

mod common;

use common::{Sandbox, both_in};

const PREPARE: &str = "
    stock-img create -q -f qcow2 a.qcow2 64M
    stock-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
    stock-img create -q r.raw 1M
    stock-io -f qcow2 -c 'write -P 5 0 192k' -c 'write -P 6 1M 64k' a.qcow2
    stock-io -f raw -c 'write -P 9 0 4k' r.raw
    mkdir dir";

/// The images of `PREPARE` in a folder of each make.
fn prepared() -> (Sandbox, Sandbox) {
    let folders = (Sandbox::stock(), Sandbox::ours());
    folders.0.prepare(PREPARE);
    folders.1.prepare(PREPARE);
    folders
}

#[test]
fn parts_of_disks_are_copied_as_qemu_img_copies_them() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        "
        qemu-img dd if=a.qcow2 of=o; cmp o <(qemu-img convert -O raw a.qcow2 o2; cat o2)
        qemu-img dd if=a.qcow2 of=o bs=1M count=1; md5sum o
        qemu-img dd -O qcow2 if=a.qcow2 of=o bs=5 count=3; qemu-img info o | head -3; qemu-img map --output=json o
        qemu-img dd -O qcow2 if=a.qcow2 of=o bs=1M count=2; qemu-img map --output=json o; md5sum o
        qemu-img dd -O qcow2 if=b.qcow2 of=o bs=64k skip=2 count=20; qemu-img map --output=json o; md5sum o
        qemu-img dd -f raw if=r.raw of=o bs=1000 skip=1; md5sum o
        qemu-img dd -f raw if=r.raw of=o bs=1000 skip=5000; stat -c %s o
        qemu-img dd -f raw if=r.raw of=o bs=1024 skip=2 count=1; stat -c %s o
        qemu-img dd -f raw if=r.raw of=o bs=1024 skip=1 count=3; md5sum o
        qemu-img dd -f raw if=r.raw of=o bs=0
        qemu-img dd -f raw if=r.raw of=o bs=x
        qemu-img dd -f raw if=r.raw of=o bs=3G
        qemu-img dd -f raw if=r.raw of=o count=x
        qemu-img dd -f raw if=r.raw of=o count=0; stat -c %s o
        qemu-img dd -f raw if=r.raw of=o count=-1
        qemu-img dd -f raw if=r.raw of=o skip=x
        qemu-img dd -f raw if=r.raw of=o skip=1k
        qemu-img dd -f raw if=r.raw of=o count=1.0
        qemu-img dd -f raw if=r.raw of=o skip=0x2; stat -c %s o
        qemu-img dd -f raw if=r.raw of=o foo=x
        qemu-img dd -f raw if=r.raw of=o foo
        qemu-img dd -f raw if=r.raw
        qemu-img dd -f raw of=o
        qemu-img dd
        qemu-img dd if=nope of=o
        qemu-img dd -f foo if=a.qcow2 of=o
        qemu-img dd -O foo if=a.qcow2 of=o
        qemu-img dd -O foo if=nope of=o
        qemu-img dd -f raw --image-opts if=a.qcow2 of=o
        qemu-img dd --image-opts if=driver=qcow2,file.filename=a.qcow2 of=o bs=1M
        qemu-img dd --image-opts if=foo=bar of=o bs=1M
        qemu-img dd if=a.qcow2 of=o isize=5
        qemu-img dd if=a.qcow2 of=o bs=1M count=99999
        qemu-img dd if=a.qcow2 if=b.qcow2 of=o bs=1M
        qemu-img dd if=a.qcow2 of=dir bs=1M
        qemu-img dd if=a.qcow2 of=/nonexist/x bs=1M
        qemu-img dd -Z if=a.qcow2 of=o
        qemu-img dd if= of=o
        qemu-img dd bs= if=a.qcow2 of=o
        qemu-img dd if=a.qcow2 of=o bs=1M osize=5
        qemu-img dd -U if=a.qcow2 of=o bs=1M
        echo existing > o;  qemu-img dd -O raw -f raw if=r.raw of=o bs=64k count=1; md5sum o
        qemu-img dd -O qcow2 -f raw if=r.raw of=o2 bs=1000 count=3; qemu-img info o2 | head -3
        qemu-img dd -O qcow2 -f raw if=r.raw of=o2 bs=1000 count=9000000000000000000; qemu-img info o2 | head -3
        ",
    );
}

#[test]
fn under_our_own_name_zeros_take_no_space() {
    let ours = Sandbox::ours();
    ours.prepare(PREPARE);
    ours.prepare("lacuna dd if=a.qcow2 of=o.raw bs=64k skip=1 2>&1");
    ours.prepare("qemu-img dd if=a.qcow2 of=full.raw bs=64k skip=1");
    ours.prepare("cmp o.raw full.raw");
    let blocks = ours.run("stat -c %b o.raw").text;
    assert!(blocks.trim().parse::<u64>().unwrap() < 1000, "{blocks}");
}

#[test]
fn a_source_is_never_its_own_target() {
    let ours = Sandbox::ours();
    ours.prepare(PREPARE);
    let before = ours.bytes("a.qcow2");
    for line in ["lacuna dd if=b.qcow2 of=a.qcow2", "qemu-img dd if=a.qcow2 of=a.qcow2"] {
        assert_eq!(ours.run(line).code, Some(1), "{line}");
    }
    assert!(ours.bytes("a.qcow2") == before);
}

#[test]
fn half_a_copy_is_removed_under_our_own_name_only() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q disk 4M; stock-io -f raw -c 'write -P 7 0 4M' disk");
    for (tool, remains) in [("lacuna", false), ("qemu-img", true)] {
        let line = format!(
            "trap '' XFSZ; ulimit -f 1000; {tool} dd -f raw -O qcow2 bs=1M if=disk of={tool}.out"
        );
        let refused = ours.run(&line);
        assert_eq!(refused.code, Some(1), "{}", refused.text);
        assert_eq!(ours.path(&format!("{tool}.out")).exists(), remains, "{}", refused.text);
    }
}
