//! `measure` against the stock tool: exactly its figures.

mod common;

use common::both;
use testkit::Random;

/// Images to measure: data, zeros, compressed clusters, a chain, bitmaps, preallocation.
const IMAGES: &str = "
    stock-img create -q -f qcow2 a 10M; stock-io -c 'write 1M 1M' -c 'write -z 4M 1M' a >/dev/null
    stock-img create -q -f raw r 10M; stock-io -f raw -c 'write 3M 70k' r >/dev/null
    stock-img create -q -f qcow2 -b a -F qcow2 o 20M
    stock-io -c 'write 15M 1M' -c 'write -z 1M 64k' -c 'write -c 3M 64k' o >/dev/null
    stock-img create -q -f qcow2 -o extended_l2=on e 10M; stock-io -c 'write 5000k 6k' e >/dev/null
    stock-img create -q -f qcow2 -o compat=0.10 v2 5M
    stock-img create -q -f qcow2 -o preallocation=metadata p 100M
    stock-io -c 'write 5M 5M' p >/dev/null
    stock-img create -q -f qcow2 -o preallocation=falloc f 50M
    stock-img create -q -f raw -o preallocation=falloc rf 50M
    stock-img create -q -f qcow2 b 3G; stock-io -c 'write 1G 1M' b >/dev/null
    stock-img bitmap --add b one; stock-img bitmap --add -g 512 --disable b another";

#[test]
fn every_wish_is_answered_in_the_words_and_figures_of_the_stock_tool() {
    let mut script = IMAGES.to_owned();
    script += "
        qemu-img measure
        qemu-img measure a
        qemu-img measure -O raw o
        qemu-img measure -O qcow2 --output=json a
        qemu-img measure --output=json -O raw r
        qemu-img measure --size 5M
        qemu-img measure -O raw --size 1000
        qemu-img measure -O raw --size 7E
        qemu-img measure -O raw --size -1
        qemu-img measure -O qcow2 --size 0
        qemu-img measure -O qcow2 --size x
        qemu-img measure -O qcow2 --size 8E
        qemu-img measure -O qcow2 --size 7E
        qemu-img measure --size 1 --size 2M -O raw
        qemu-img measure -O qcow2 --size 5M a
        qemu-img measure -O qcow2 a b
        qemu-img measure -O foo --size 5
        qemu-img measure -O vmdk a
        qemu-img measure -O qcow2 -o cluster_size=3 --size 5M
        qemu-img measure -O qcow2 -o cluster_size=x --size 5M
        qemu-img measure -O qcow2 -o foo=3 --size 5M
        qemu-img measure -O qcow2 -o help
        qemu-img measure --output=foo a
        qemu-img measure -O qcow2 -o size=5M
        qemu-img measure -O qcow2 -o size=5M a
        qemu-img measure -O qcow2 -o size=50M --size 5M
        qemu-img measure -O qcow2 -o backing_file=x,backing_fmt=qcow2 a
        qemu-img measure -O qcow2 -o backing_file=x,backing_fmt=qcow2 --size 5M
        qemu-img measure -O qcow2 -o preallocation=foo a
        qemu-img measure -O qcow2 -o preallocation=falloc --size 70M
        qemu-img measure -O qcow2 -o compat=0.10,refcount_bits=8 a
        qemu-img measure -O qcow2 -o compat=0.10,extended_l2=on a
        qemu-img measure -O qcow2 -o compat=9 a
        qemu-img measure -O qcow2 -o refcount_bits=3 a
        qemu-img measure -O qcow2 -o extended_l2=on,cluster_size=4k a
        qemu-img measure -O qcow2 -o data_file_raw=on a
        qemu-img measure -O qcow2 -l snap --size 1M
        qemu-img measure nope
        qemu-img measure -f raw a
        qemu-img measure -f raw --size 5M
        qemu-img measure -f qcow2 r
        qemu-img measure --image-opts driver=qcow2,file.filename=a
        qemu-img measure -f qcow2 --image-opts driver=qcow2,file.filename=a
        qemu-img measure -O qcow2 --image-opts --size 5M
        qemu-img measure -O qcow2 -U a";
    for image in ["a", "r", "o", "e", "v2", "p", "f", "rf", "b"] {
        for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on"] {
            script += &format!("\nqemu-img measure -O qcow2 -o {options} {image}");
        }
    }
    both(&script);
}

#[test]
fn random_disks_and_options_have_the_figures_of_the_stock_tool() {
    for seed in testkit::seeds(12) {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let size = 512 * random.below(40_000);
        let mut script = format!(
            "stock-img create -q -f qcow2 -o cluster_size={} q {size}\n\
             stock-img create -q -f raw r {size}\n",
            512 << random.below(12)
        );
        let mut writes = String::new();
        for _ in 0..random.below(12) {
            let start = random.below(size + 1);
            let len = random.below(200_000).min(size - start);
            let kind = *random.pick(&["write", "write", "write -z", "discard"]);
            writes += &format!(" -c '{kind} {start} {len}'");
        }
        script += &format!("stock-io -f raw{writes} r >/dev/null; stock-io{writes} q >/dev/null\n");
        for _ in 0..4 {
            let options = random_options(&mut random);
            for source in ["q", "r", &format!("--size {}", random.below(1 << 40))] {
                script += &format!("qemu-img measure -O qcow2 -o {options} {source}\n");
            }
        }
        both(&script);
    }
}

fn random_options(random: &mut Random) -> String {
    let cluster_bytes = 16384 << random.below(8);
    let extended = *random.pick(&["on", "off"]);
    let (compat, refcount_bits) = match random.one_in(4) {
        true => ("0.10", 16),
        false => ("1.1", 1 << random.below(7)),
    };
    let mode = *random.pick(&["off", "off", "metadata", "full"]);
    format!(
        "cluster_size={cluster_bytes},extended_l2={extended},compat={compat},\
         refcount_bits={refcount_bits},preallocation={mode}"
    )
}
