//! `reopen` and the ways to open: what may change on an open image, and what may not.

mod common;

use common::{Sandbox, both_in};

const PREPARE: &str = "
    stock-img create -q -f qcow2 a.qcow2 64M
    stock-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
    stock-img create -q r.raw 1M
    stock-io -f qcow2 -c 'write -P 5 0 192k' -c 'write -P 6 1M 64k' a.qcow2
    stock-io -f raw -c 'write -P 9 0 4k' r.raw";

fn prepared() -> (Sandbox, Sandbox) {
    let folders = (Sandbox::stock(), Sandbox::ours());
    folders.0.prepare(PREPARE);
    folders.1.prepare(PREPARE);
    folders
}

#[test]
fn options_of_an_open_image_change_as_with_qemu_io() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        r#"
        qemu-io -c 'reopen -o foo=bar' -c info a.qcow2
        qemu-io -c 'reopen -o file.foo=bar' a.qcow2
        qemu-io -c 'reopen -o backing.foo=bar' b.qcow2
        qemu-io -c 'reopen -o file.filename=a.qcow2' a.qcow2
        qemu-io -c 'reopen -o file.filename=b.qcow2' a.qcow2
        qemu-io -c 'reopen -o file=x' a.qcow2
        qemu-io -c 'reopen -o backing=x' b.qcow2
        qemu-io -c 'reopen -o backing=' b.qcow2
        qemu-io -c 'reopen -r' -c 'write 0 512' a.qcow2
        qemu-io -r -c 'write 0 512' -c 'reopen -w' -c 'write 0 512' a.qcow2
        qemu-io -r -c 'reopen -o read-only=off' -c 'write 0 512' a.qcow2
        qemu-io -c 'reopen -r -w' a.qcow2
        qemu-io -c 'reopen x' a.qcow2
        qemu-io -c 'reopen -c foo' a.qcow2
        qemu-io -c 'reopen -c none' -c 'read 0 512' a.qcow2
        qemu-io -c 'reopen -c none -c writeback' -c 'read 0 512' a.qcow2
        qemu-io -c 'reopen -r -o read-only=on' b.qcow2
        qemu-io -c 'reopen -w -o read-only=on' b.qcow2
        qemu-io -c 'reopen -c none -o cache.direct=on' b.qcow2
        qemu-io -c 'reopen -c writeback -o cache.no-flush=on' b.qcow2
        qemu-io -c 'reopen -o cache.direct=on' -c 'read 0 512' b.qcow2
        qemu-io -c 'reopen -o read-only=foo' b.qcow2
        qemu-io -c 'reopen -o cache.no-flush=bar' b.qcow2
        qemu-io -c 'reopen -o cache.direct=baz' b.qcow2
        qemu-io -c 'reopen -o auto-read-only=qux' b.qcow2
        qemu-io -c 'reopen -o node-name=foo' b.qcow2
        qemu-io -c 'reopen -o file.node-name=foo' b.qcow2
        qemu-io -c 'reopen -o backing.node-name=foo' b.qcow2
        qemu-io -c 'open -o node-name=foo b.qcow2' -c 'reopen -o node-name=foo' -c 'reopen'
        qemu-io -c 'open -o file.node-name=foo b.qcow2' -c 'reopen -o file.node-name=foo' -c reopen
        qemu-io -c 'open -o backing.node-name=foo b.qcow2' -c 'reopen -o backing.node-name=foo' -c reopen
        qemu-io -c 'reopen -o driver=raw' b.qcow2
        qemu-io -c 'reopen -o file.driver=qcow2' b.qcow2
        qemu-io -c 'reopen -o backing.driver=file' b.qcow2
        qemu-io -c 'reopen -o driver=qcow2' b.qcow2
        qemu-io -c 'reopen -o file.driver=file' b.qcow2
        qemu-io -c 'reopen -o backing.driver=qcow2' b.qcow2
        qemu-io -f null-co -c reopen -c info "json:{'driver': 'null-co', 'size': 65536}"
        qemu-io -c 'reopen -o lazy-refcounts=on,pass-discard-request=on' -c 'reopen -o overlap-check=all' -c 'reopen -o overlap-check.main-header=on,cache-clean-interval=5' -c 'write -P 55 0 1M' -c 'read -P 55 0 1M' a.qcow2
        qemu-io -c "reopen -o lazy-refcounts=42" -c "reopen -o cache-size=1M,l2-cache-size=64k,refcount-cache-size=64k" -c "reopen -o cache-size=1M,l2-cache-size=2M" -c "reopen -o cache-size=1M,refcount-cache-size=2M" -c "reopen -o l2-cache-entry-size=33k" -c "reopen -o l2-cache-entry-size=128k" -c "reopen -o refcount-cache-size=256T" -c "reopen -o overlap-check=constant,overlap-check.template=all" -c "reopen -o overlap-check=blubb" -c "reopen -o overlap-check.template=blubb" -c "reopen -o cache-clean-interval=-1" a.qcow2
        qemu-io -f raw -c 'reopen -o offset=512' -c length r.raw
        qemu-io -f raw -c 'reopen -o offset=512,size=1k' -c length r.raw
        qemu-io -c 'reopen -o discard=foo' a.qcow2
        qemu-io -c 'reopen -o discard=ignore' -c 'discard 0 64k' -c 'read -P 5 0 64k' a.qcow2
        qemu-io -d ignore -c 'discard 0 64k' -c 'read -P 5 0 64k' a.qcow2
        qemu-io -d unmap -c 'discard 0 64k' -c 'read -P 0 0 64k' a.qcow2
        qemu-io -d foo -c 'discard 0 64k' a.qcow2
        qemu-io -t foo a.qcow2
        qemu-io -i foo a.qcow2
        qemu-io -i native -c length a.qcow2
        qemu-io -k -c length a.qcow2
        "#,
    );
}

#[test]
fn an_image_that_cannot_be_reopened_stays_open_as_it_was() {
    let (_, ours) = prepared();
    let got = ours.run("lacuna io -c 'reopen -o lazy-refcounts=x' -c 'write 0 512' a.qcow2");
    assert!(got.code == Some(1) && got.text.contains("wrote 512/512"), "{got:?}");
    ours.prepare("stock-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1M");
    let got = ours.run("lacuna io -c 'reopen -o lazy-refcounts=on' -c 'write 0 512' v2.qcow2");
    assert!(got.code == Some(1) && got.text.contains("wrote 512/512"), "{got:?}");
}

#[test]
fn contradictions_in_an_image_are_told_in_the_words_of_qemu() {
    let (stock, ours) = prepared();
    let wreck = "printf '\\0\\0\\0\\0\\0\\0\\0\\0' | dd of=e.qcow2 bs=1 seek=131072 conv=notrunc status=none";
    for folder in [&stock, &ours] {
        folder.prepare("stock-img create -q -f qcow2 e.qcow2 64M");
        folder.prepare(wreck);
    }
    both_in(&stock, &ours, "qemu-io -c 'write 64k 64k' e.qcow2");
}

#[test]
fn lengths_change_and_overlays_go_as_with_qemu_io() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        "
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate 1M' -c length t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate 128M' -c length t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate 1000' -c length t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate -m foo 1M' t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate -m falloc 128M' -c length t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate -m metadata 128M' -c length -c map t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate -m full 65M' -c length -c map t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate -m metadata 1M' -c length t.qcow2
        cp a.qcow2 t.qcow2; qemu-io -c 'truncate -m metadata 64M' -c length t.qcow2
        qemu-io -f raw -c 'truncate -m falloc 2M' -c length r.raw
        qemu-io -f raw -c 'truncate -m full 2M' -c length r.raw
        qemu-io -f raw -c 'truncate -m metadata 2M' -c length r.raw
        qemu-io -f raw -c 'truncate -m falloc 512k' -c length r.raw
        qemu-io -f raw -c 'truncate 1000' -c length r.raw; stat -c %s r.raw
        qemu-io -f raw -c 'truncate 0' -c length r.raw; stat -c %s r.raw
        qemu-io -r -s -c 'write -P 1 0 64k' a.qcow2
        qemu-io -s -c 'write -P 1 0 64k' -c 'read -P 1 0 64k' a.qcow2; qemu-io -c 'read -P 5 0 64k' a.qcow2
        qemu-io -C -s -c 'read -P 5 0 64k' -c map b.qcow2
        qemu-io -d ignore -s -c 'write -P 7 0 64k' -c 'discard 0 64k' -c 'read -P 7 0 64k' b.qcow2
        ",
    );
}
