//! `bench` against qemu-img: the same requests, and the same words but for the time.

mod common;

use common::{Sandbox, both_in};

const PREPARE: &str = "
    stock-img create -q -f qcow2 a.qcow2 64M
    stock-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
    stock-img create -q r.raw 1M
    stock-io -f qcow2 -c 'write -P 5 0 192k' -c 'write -P 6 1M 64k' a.qcow2
    stock-io -f raw -c 'write -P 9 0 4k' r.raw
    mkdir dir";

#[test]
fn benchmarks_send_what_those_of_qemu_img_send() {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    stock.prepare(PREPARE);
    ours.prepare(PREPARE);
    both_in(
        &stock,
        &ours,
        "
        qemu-img bench a.qcow2
        qemu-img bench -c 10 a.qcow2
        qemu-img bench -c 10 -d 2 -s 64k -S 128k -o 4k a.qcow2
        qemu-img bench -c 10 -w a.qcow2; qemu-io -c 'read -P 0 0 40k' a.qcow2
        qemu-img bench -c 10 -w --pattern 5 a.qcow2; qemu-io -c 'read -P 5 0 40k' a.qcow2
        qemu-img bench -c 10 --pattern 5 a.qcow2
        qemu-img bench -c 10 -w --pattern 500 a.qcow2
        qemu-img bench -c 10 -w --pattern x a.qcow2
        qemu-img bench -c 10 -w --flush-interval 2 a.qcow2
        qemu-img bench -c 100 -d 4 -w --flush-interval 8 a.qcow2
        qemu-img bench -c 100 -d 4 -w --flush-interval 8 --no-drain a.qcow2
        qemu-img bench -c 101 -d 4 -w --flush-interval 8 --no-drain a.qcow2
        qemu-img bench -c 10 --flush-interval 2 a.qcow2
        qemu-img bench -c 10 --no-drain a.qcow2
        qemu-img bench -c x a.qcow2
        qemu-img bench -c 0 a.qcow2
        qemu-img bench -c -1 a.qcow2
        qemu-img bench -d x a.qcow2
        qemu-img bench -d 0 -c 1 a.qcow2
        qemu-img bench -s x a.qcow2
        qemu-img bench -s 0 -c 1 a.qcow2
        qemu-img bench -s 3G -c 1 a.qcow2
        qemu-img bench -S x a.qcow2
        qemu-img bench -S 0 -c 3 a.qcow2
        qemu-img bench -S 3G -c 3 a.qcow2
        qemu-img bench -o x a.qcow2
        qemu-img bench -o 63M -c 3000 a.qcow2
        qemu-img bench -o 64M -c 3 a.qcow2
        qemu-img bench -o 65M -c 3 a.qcow2
        qemu-img bench -t foo a.qcow2
        qemu-img bench -t none -c 3 a.qcow2
        qemu-img bench -i foo a.qcow2
        qemu-img bench -i native -c 3 a.qcow2
        qemu-img bench -n -c 3 a.qcow2
        qemu-img bench -n -t none -c 3 a.qcow2
        qemu-img bench -q -c 3 a.qcow2
        qemu-img bench
        qemu-img bench a.qcow2 b.qcow2
        qemu-img bench nope
        qemu-img bench -f foo a.qcow2
        qemu-img bench -f raw -c 3 r.raw
        qemu-img bench -f raw -c 3 -w r.raw
        qemu-img bench -c 3 r.raw
        qemu-img bench -f raw --image-opts r.raw
        qemu-img bench --image-opts -c 3 driver=raw,file.filename=r.raw
        qemu-img bench -Z
        qemu-img bench -c 3 -U a.qcow2
        qemu-img bench -c 3 -w -U a.qcow2
        qemu-img bench --flush-interval x -w a.qcow2
        qemu-img bench -c 1000 -s 65536 -S 65536 a.qcow2
        qemu-img bench -c 5 -s 512 -o 5 a.qcow2
        qemu-img bench -c 3 -s 1000 a.qcow2
        qemu-img bench -c 99999999999 a.qcow2
        qemu-img bench -s 128M -c 2 a.qcow2
        qemu-img bench -c 5 -t none -s 1000 -S 333 -w b.qcow2; stock-img check b.qcow2 | head -1
        ",
    );
}

#[test]
fn a_write_benchmark_leaves_a_sound_image() {
    let ours = Sandbox::ours();
    ours.prepare(PREPARE);
    ours.prepare("lacuna bench -w -c 500 -d 8 --pattern 7 --flush-interval 16 --no-drain b.qcow2");
    ours.prepare("stock-img check -q b.qcow2");
    ours.prepare("stock-io -f qcow2 -c 'read -P 7 0 2000k' b.qcow2 | grep -v failed");
}

#[test]
fn buffers_without_bound_are_refused() {
    let ours = Sandbox::ours();
    ours.prepare(PREPARE);
    let got = ours.run("lacuna bench -c 2147483647 -d 2147483647 -s 2147483647 a.qcow2");
    assert!(got.code == Some(1) && got.text.contains("GiB of buffers"), "{got:?}");
}
