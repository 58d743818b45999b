//! `create` against the stock tool: same output, same bytes.

mod common;

use std::os::unix::fs::MetadataExt;

use common::{Sandbox, both, same_files};

#[test]
fn images_are_laid_out_byte_by_byte_like_the_stock_ones() {
    let (stock, ours) = both(
        "qemu-img create -f qcow2 plain 64M
         qemu-img create -f qcow2 half 1.5G
         qemu-img create -f qcow2 hex 0x100000
         qemu-img create -q -f qcow2 odd 1000
         qemu-img create -f qcow2 -o compat=v2,cluster_size=512 old 100M
         qemu-img create -f qcow2 -o compression_type=zstd zstd 1M
         qemu-img create -f qcow2 -o lazy_refcounts,refcount_bits=64 lazy 1M
         qemu-img create -f qcow2 -o cluster_size=2M,extended_l2=on,refcount_bits=1 wide 100G
         qemu-img create -f qcow2 -o data_file=data.raw data 1M
         qemu-img create -f qcow2 -o data_file=data2.raw,data_file_raw=on rawdata 1M
         qemu-img create -fqcow2 -o 'data_file=a,,b' comma 1M
         qemu-img create -f qcow2 -b plain -F qcow2 overlay
         qemu-img create -f qcow2 -o backing_file=plain,backing_fmt=qcow2 longer 2G
         qemu-img create -u -f qcow2 -b missing -F qcow2 blind 1M
         qemu-img create --q -f qcow2 --opt cluster_size=4k short 1M
         qemu-img create raw 1000
         qemu-img create -f raw -o size=3M raw3
         qemu-img create -f raw -o preallocation=full full 1M
         qemu-img create -f raw -o preallocation=falloc falloc 1M",
    );
    let names = [
        "plain",
        "half",
        "hex",
        "odd",
        "old",
        "zstd",
        "lazy",
        "wide",
        "data",
        "data.raw",
        "rawdata",
        "data2.raw",
        "comma",
        "a,b",
        "overlay",
        "longer",
        "blind",
        "short",
        "raw",
        "raw3",
        "full",
        "falloc",
    ];
    same_files(&stock, &ours, &names);
}

#[test]
fn what_cannot_be_made_is_refused_in_the_same_words() {
    both(
        "qemu-img create
         qemu-img create -f qcow2
         qemu-img create -f qcow2 a
         qemu-img create -f qcow2 a 1k extra
         qemu-img create -f qcow2 a 1kilobyte
         qemu-img create -f qcow2 a -- -1
         qemu-img create -f qcow2 a -1
         qemu-img create -f qcow2 a 16E
         qemu-img create -f qcow2 a 7E
         qemu-img create a 7E
         qemu-img create --bogus
         qemu-img create -Z
         qemu-img create -f
         qemu-img create --b x
         qemu-img create -f foo a 1M
         qemu-img create -f qcow2 -o foo=bar a 1M
         qemu-img create -f qcow2 -o , a 1M
         qemu-img create -f qcow2 -o '' a 1M
         qemu-img create -f qcow2 -o size=1M, a
         qemu-img create -f qcow2 -o cluster_size=3 a 1M
         qemu-img create -f qcow2 -o cluster_size=4M a 1M
         qemu-img create -f qcow2 -o cluster_size=4k,,x a 4M
         qemu-img create -f qcow2 -o compat=0.42 a 1M
         qemu-img create -f qcow2 -o compat=v2,lazy_refcounts=on a 1M
         qemu-img create -f qcow2 -o compat=0.10,refcount_bits=8 a 1M
         qemu-img create -f qcow2 -o refcount_bits=7 a 1M
         qemu-img create -f qcow2 -o refcount_bits=128 a 1M
         qemu-img create -f qcow2 -o refcount_bits=16k a 1M
         qemu-img create -f qcow2 -o compression_type=foo a 1M
         qemu-img create -f qcow2 -o compat=v2,compression_type=zstd a 1M
         qemu-img create -f qcow2 -o extended_l2=on,cluster_size=8k a 1M
         qemu-img create -f qcow2 -o extended_l2=on,compat=v2 a 1M
         qemu-img create -f qcow2 -o extended_l2=maybe a 1M
         qemu-img create -f qcow2 -o preallocation=on a 1M
         qemu-img create -f qcow2 -o data_file_raw=on a 1M
         qemu-img create -f qcow2 -o data_file=d,compat=v2 a 1M
         stock-img create -q -f qcow2 base 1M
         qemu-img create -f qcow2 -o data_file=d,data_file_raw=on -b base -F qcow2 a 1M
         qemu-img create -f qcow2 -o preallocation=metadata -b base -F qcow2 a
         qemu-img create -f qcow2 -o preallocation=full,compat=v2,lazy_refcounts -b base -F qcow2 a
         qemu-img create -f raw -o preallocation=metadata a 1M
         qemu-img create -f qcow2 -b base a
         qemu-img create -f qcow2 -b missing -F qcow2 a
         qemu-img create -f qcow2 -b missing -F qcow2 a 1M
         qemu-img create -u -f qcow2 -b missing -F qcow2 a
         qemu-img create -u -f qcow2 -b missing a 1M
         qemu-img create -f qcow2 -b base -F foo a
         qemu-img create -f qcow2 -F qcow2 a 2M
         qemu-img create -f qcow2 -b a -F qcow2 a
         qemu-img create -f raw -b base -F qcow2 a
         qemu-img create -f raw -o size=3M a 4M
         qemu-img create -f raw -o preallocation=foo a 1M
         qemu-img create -f raw -o foo=on a 1M
         qemu-img create -f qcow2 /nonexistent/a 1M
         qemu-img create -f qcow2 '' 1M",
    );
}

#[test]
fn preallocated_images_have_the_bytes_the_map_and_the_allocated_size_of_stock_ones() {
    let mut script = String::from("stock-img create -q -f raw base 1M\n");
    let mut names = Vec::new();
    for mode in ["off", "metadata", "falloc", "full"] {
        for (kind, rest) in [
            ("plain", "64M"),
            ("odd", "66000"),
            ("old", "-o compat=0.10 3M"),
            ("small", "-o cluster_size=4k,refcount_bits=64 3M"),
            ("wide", "-o cluster_size=2M,extended_l2=on 7M"),
            ("oddwide", "-o extended_l2=on 66000"),
            ("over", "-o extended_l2=on -b base -F raw 3M"),
        ] {
            let name = format!("{mode}-{kind}");
            script += &format!("qemu-img create -f qcow2 -o preallocation={mode} {name} {rest}\n");
            names.push(name);
        }
        for (kind, raw) in [("data", "off"), ("rawdata", "on")] {
            let name = format!("{mode}-{kind}");
            script += &format!(
                "qemu-img create -f qcow2 -o preallocation={mode},data_file={name}.data \
                 -o data_file_raw={raw} {name} 3M\n"
            );
            names.extend([format!("{name}.data"), name]);
        }
    }
    for name in &names {
        if !name.ends_with(".data") {
            script += &format!("stock-img check {name}\nstock-img map --output=json {name}\n");
        }
    }
    let (stock, ours) = both(&script);
    same_files(&stock, &ours, &names.iter().map(String::as_str).collect::<Vec<_>>());
    for name in &names {
        let allocated =
            |sandbox: &Sandbox| std::fs::metadata(sandbox.path(name)).unwrap().blocks() * 512;
        // File systems count some of their own blocks in, and stock tools allocate the first block
        // of any data file.
        let (theirs, ours) = (allocated(&stock), allocated(&ours));
        assert!(theirs.abs_diff(ours) <= 32 << 10, "{name}: {theirs} bytes, ours {ours}");
    }
}

#[test]
fn a_preallocation_that_finds_no_room_is_told_and_removed() {
    let (_, ours) = both(
        "trap '' XFSZ; ulimit -f 100; qemu-img create -q -f qcow2 -o preallocation=falloc a 1M
         trap '' XFSZ; ulimit -f 100; qemu-img create -q -f raw b 1M",
    );
    assert!(!ours.path("a").exists() && !ours.path("b").exists());
}

#[test]
fn an_image_is_never_made_over_its_own_backing_chain() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 base 1M; stock-img create -q -f qcow2 -b base -F qcow2 top
         ln base link",
    );
    let before = ours.bytes("base");
    for line in ["-b base -F qcow2 ./base", "-b base -F qcow2 link", "-b top -F qcow2 link"] {
        let refused = ours.run(&format!("lacuna create -f qcow2 {line}"));
        assert_eq!(refused.code, Some(1), "{line}");
        assert!(refused.text.contains("part of its own backing chain"), "{}", refused.text);
    }
    assert!(before == ours.bytes("base"));
    let refused = ours.run("lacuna create -f qcow2 -o data_file=../work/one one 1M");
    assert!(refused.text.contains("its own data file"), "{}", refused.text);
    let refused = ours.run("lacuna create -f qcow2 -b top -F qcow2 -o data_file=link new");
    assert!(refused.text.contains("data file is part of the backing chain"), "{}", refused.text);
    assert!(before == ours.bytes("base"));
}

#[test]
fn a_backing_format_that_nobody_has_is_refused() {
    both(
        "qemu-img create -f qcow2 -u -b missing -F fmt image 1M
         qemu-img create -f raw -F qcow2 image 1M
         qemu-img create -f qcow2 -u -b missing -F vmdk image 1M
         stock-img info image",
    );
}

#[test]
fn space_in_one_run_is_remembered_to_stay_where_it_is() {
    let ours = Sandbox::ours();
    let layout = "preallocation=metadata,preallocation_layout=contiguous,keep_mapping=on";
    ours.prepare(&format!("lacuna create -q -f qcow2 -o {layout} kept 2M"));
    let map = |sandbox: &Sandbox| sandbox.run("stock-img map --output=json kept").text;
    let before = map(&ours);
    assert_eq!(before.matches("start").count(), 1, "one run: {before}");
    let info = ours.run("lacuna info kept").text;
    assert!(info.contains("keep mapping: true") && info.contains("mapping kept: true"), "{info}");
    let changes = "-c 'write 0 2M' -c 'discard 64k 128k' -c 'write -z -u 1M 64k' -c 'write 0 2M'";
    ours.prepare(&format!("lacuna io {changes} kept"));
    assert_eq!(map(&ours).matches("start").count(), 1, "{}", map(&ours));
    assert_eq!(ours.run("stock-img check kept").code, Some(0));

    // A stranger's session ends the claim, not the wish; an option goes before both.
    ours.prepare("stock-io -c 'write 0 512' kept");
    let info = ours.run("lacuna info kept").text;
    assert!(info.contains("keep mapping: true") && info.contains("mapping kept: false"), "{info}");
    let options = "driver=qcow2,discard-no-unref=off,file.filename=kept";
    ours.prepare(&format!("lacuna io --image-opts -c 'discard 64k 64k' {options}"));
    assert!(map(&ours).matches("start").count() > 1, "{}", map(&ours));

    for (options, words) in [
        ("preallocation_layout=contiguous", "metadata, falloc or full"),
        ("preallocation=full,preallocation_layout=odd", "does not accept value 'odd'"),
        ("compat=0.10,keep_mapping=on", "Version 2"),
    ] {
        let refused = ours.run(&format!("lacuna create -f qcow2 -o {options} new 1M"));
        assert_eq!(refused.code, Some(1), "{}", refused.text);
        assert!(refused.text.contains(words), "{}", refused.text);
    }
    assert!(!ours.run("qemu-img create -f qcow2 -o help new").text.contains("keep_mapping"));
}
