//! `convert` and `compare` against the stock tool.

mod common;

use common::{Sandbox, both, same_files};

const CHAIN: &str = "stock-img create -q -f qcow2 base 8M
     stock-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -z 2M 128k' -c 'write -c -P 3 3M 64k' base
     stock-img create -q -f qcow2 -b base -F qcow2 top
     stock-io -f qcow2 -c 'write -P 2 512k 64k' -c 'write -z -u 4M 128k' top";

#[test]
fn plain_copies_have_the_bytes_of_the_stock_ones() {
    let (stock, ours) = both(&format!(
        "{CHAIN}
         qemu-img convert base raw
         qemu-img convert top top.raw
         qemu-img convert -O qcow2 base plain
         qemu-img convert -O qcow2 top flat
         qemu-img convert -O qcow2 -o cluster_size=4k base small
         qemu-img convert -O qcow2 -o extended_l2=on base extended
         qemu-img convert -O qcow2 -S 0 base full
         qemu-img convert -O qcow2 -f raw raw fromraw
         qemu-img convert -B base -F qcow2 -O qcow2 top rebased
         stock-img create -q there 8M
         qemu-img convert -n --target-is-zero -O raw base there
         qemu-img convert -n -O raw base there"
    ));
    let names = ["raw", "top.raw", "plain", "flat", "small", "extended", "full", "fromraw"];
    same_files(&stock, &ours, &names);
    same_files(&stock, &ours, &["rebased", "there"]);
}

/// Flags that change how a copy is made and not what it holds.
#[test]
fn every_flag_gives_the_disk_that_the_stock_tool_gives() {
    let lines = [
        "-O qcow2 -W -m 4 top out",
        "-W -m 16 -S 64k top out",
        "-O qcow2 -S 512 top out",
        "-O qcow2 -m 1 -r 1G top out",
        "-O qcow2 -r 0 -t none -T none top out",
        "-C top out",
        "-C -W -O qcow2 top out",
        "--salvage -O qcow2 top out",
        "--bitmaps -O qcow2 base out",
        "-U -q -O qcow2 top out",
        "-O qcow2 -c -W -m 16 top out",
        "-O qcow2 -c -o compression_type=zstd,cluster_size=2M top out",
        "-O qcow2 -o preallocation=metadata top out",
        "--image-opts -O qcow2 driver=qcow2,file.filename=top out",
        "-n --target-image-opts top driver=qcow2,file.filename=there",
        "-n -f qcow2 -O raw --target-is-zero top zeros",
    ];
    let mut script = format!(
        "{CHAIN}
         stock-img create -q -f qcow2 there 9M
         stock-io -f qcow2 -c 'write -P 9 0 9M' there
         stock-img create -q zeros 8M"
    );
    for line in lines {
        let target = line.rsplit(' ').next().unwrap().rsplit('=').next().unwrap();
        script += &format!(
            "\nqemu-img convert {line}
             stock-img compare top {target}
             stock-img info {target} | grep -v -e 'disk size' -e 'file length'"
        );
    }
    both(&script);
}

#[test]
fn what_cannot_be_read_is_said_and_left_out_as_the_stock_tool_does() {
    let script = format!(
        "{CHAIN}
         dd if=/dev/zero of=base bs=512 seek=2688 count=1 conv=notrunc status=none
         qemu-img convert base raw
         qemu-img convert -c -O qcow2 base image
         qemu-img convert --salvage base raw
         qemu-img convert --salvage -q -W base quiet
         qemu-img convert --salvage -O qcow2 -c base image"
    );
    let (stock, ours) = both(&script);
    same_files(&stock, &ours, &["raw", "quiet"]);
    let said = ours.run("qemu-img convert base raw").text;
    assert!(said.contains("error while reading at byte 3145728: Input/output error"), "{said}");
}

#[test]
fn several_sources_are_put_behind_each_other() {
    let (stock, ours) = both(
        "stock-img create -q -f qcow2 a 2M
         stock-img create -q b 1000k
         stock-io -f qcow2 -c 'write -P 1 0 64k' -c 'write -P 2 2032k 16k' a
         stock-io -f raw -c 'write -P 3 0 16k' -c 'write -P 4 500k 16k' b
         qemu-img convert a b a raw
         qemu-img convert -O qcow2 a b a image
         qemu-img convert -c -O qcow2 a b compressed
         stock-img convert compressed compressed.raw
         qemu-img convert -B a -F qcow2 -O qcow2 a b nothing
         qemu-img convert -n -o size=1M a raw",
    );
    same_files(&stock, &ours, &["raw", "image", "compressed.raw"]);
}

#[test]
fn options_of_the_target_mean_what_they_mean_to_the_stock_tool() {
    let (stock, ours) = both(&format!(
        "{CHAIN}
         qemu-img convert -O qcow2 -o size=1M top small
         stock-img compare top small
         qemu-img convert -O qcow2 -o size=1G top large
         stock-img compare -s top large
         qemu-img convert -O qcow2 -o backing_file=base,backing_fmt=qcow2 top thin
         stock-img map --output=json thin
         qemu-img convert -O qcow2 -F qcow2 top out
         qemu-img convert -F qcow2 top out
         qemu-img convert -c -O qcow2 -o preallocation=full top out
         qemu-img convert -c -O qcow2 -o preallocation=off top out
         qemu-img convert -F qcow2 -B base -O raw top raw"
    ));
    same_files(&stock, &ours, &["small", "large", "thin"]);
}

/// QEMU's program says this, does nothing, and calls it a success.
#[test]
fn a_target_with_a_backing_file_is_not_taken_to_be_zero() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    ours.prepare("stock-img create -q -f qcow2 there 8M");
    let line = "convert -n --target-is-zero -O qcow2 -B base -F qcow2 top there";
    let said = ours.run(&format!("qemu-img {line}"));
    let text = "Cannot use --target-is-zero when the destination image has a backing file";
    assert!(said.text.contains(text) && said.code == Some(1), "{said:?}");
}

#[test]
fn compressed_copies_are_sound_and_equal() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    for options in ["", "-o compression_type=zstd", "-o compat=v2", "-o cluster_size=512", "-W"] {
        ours.prepare(&format!(
            "lacuna convert -c -O qcow2 {options} top copy && stock-img check copy && \
             stock-img compare top copy"
        ));
    }
}

#[test]
fn progress_is_percent_or_json_lines() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    let percent = ours.run("qemu-img convert -p base raw | tr '\\r' '\\n' | tail -2 | head -1");
    assert_eq!(percent.text.trim(), "(100.00/100%)");
    let output = ours.command("lacuna convert --progress=json -O qcow2 base copy");
    assert!(output.stdout.is_empty());
    let lines = String::from_utf8(output.stderr).unwrap();
    let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(last["done"], last["total"]);
    assert_eq!(last["total"], 8 << 20);
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["phase"].is_string() && line["bytes_per_second"].is_u64(), "{line}");
    }
}

#[test]
fn half_a_target_is_removed_under_our_own_name() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    // The L2 entry of 3 MiB names a compressed cluster; what it names becomes rubbish.
    ours.prepare("dd if=/dev/urandom of=base bs=64k count=2 seek=21 conv=notrunc status=none");
    let failed = ours.run("lacuna convert base raw");
    assert_eq!(failed.code, Some(1), "{}", failed.text);
    assert!(!ours.path("raw").exists());
}

#[test]
fn what_cannot_be_converted_is_refused_in_the_same_words() {
    both(&format!(
        "{CHAIN}
         stock-img create -q tiny 1k
         qemu-img convert
         qemu-img convert a
         qemu-img convert missing raw
         qemu-img convert -O foo base raw
         qemu-img convert -f foo base raw
         qemu-img convert -O raw -c base raw
         qemu-img convert -O raw -o foo=1 base raw
         qemu-img convert -O qcow2 -o cluster_size=3 base image
         qemu-img convert -n -O raw base missing
         qemu-img convert --target-image-opts -O qcow2 base driver=raw,file.filename=tiny
         qemu-img convert -n -O raw base tiny
         qemu-img convert -S 1 base raw
         qemu-img convert -S foo base raw
         qemu-img convert -m 0 base raw
         qemu-img convert -m 17 base raw
         qemu-img convert -m x base raw
         qemu-img convert -B base -O qcow2 top image
         qemu-img convert -B base -F qcow2 -O raw top image
         qemu-img convert -t foo base raw
         qemu-img convert -T foo base raw
         qemu-img convert --target-is-zero -O qcow2 base raw
         qemu-img convert -C -S 4k -O qcow2 base raw
         qemu-img convert -C -c -O qcow2 base raw
         qemu-img convert -C --salvage base raw
         qemu-img convert -r foo base raw
         qemu-img convert -r -1 base raw
         qemu-img convert -r 18446744073709551615 base raw
         qemu-img convert --skip-broken-bitmaps base raw
         qemu-img convert --bitmaps base raw
         qemu-img convert --bitmaps -f raw -O qcow2 tiny image
         qemu-img convert --bitmaps -O qcow2 base base image
         qemu-img convert --image-opts -f qcow2 base raw
         qemu-img convert -n --target-image-opts -O raw base driver=raw,file.filename=raw
         qemu-img convert -O raw base /nonexistent/raw"
    ));
}

#[test]
fn a_chain_is_never_converted_onto_one_of_its_files() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    ours.prepare("stock-img create -q -f qcow2 -o data_file=data split 1M; cp data kept");
    for line in ["-O qcow2 top base", "-n -O qcow2 top ./base", "split data"] {
        let refused = ours.run(&format!("lacuna convert {line}"));
        assert_eq!(refused.code, Some(1), "{line}: {}", refused.text);
    }
    let refused = ours.run("lacuna convert -B base -F qcow2 -O qcow2 split ../work/base");
    assert!(refused.text.contains("part of its own backing chain"), "{}", refused.text);
    assert!(ours.bytes("kept") == ours.bytes("data"));
    ours.prepare("stock-io -r -c 'read -P 1 0 512k' top");
    let before = ours.bytes("base");
    let refused = ours.run("ln base other; lacuna convert -O qcow2 base other");
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.text.contains("The target is the source, or a file the source lies in"),
        "{}",
        refused.text
    );
    assert!(before == ours.bytes("base"));
}

#[test]
fn comparisons_agree_in_words_and_exit_codes() {
    both(&format!(
        "{CHAIN}
         stock-img convert base raw
         qemu-img compare base raw
         qemu-img compare base base
         qemu-img compare -s base base
         qemu-img compare base top
         qemu-img compare -q base top
         qemu-img compare base missing
         qemu-img compare -f raw base raw
         stock-img create -q z9 9M
         stock-img create -q z10 10M
         stock-io -f raw -c 'write 9M 1k' z10
         qemu-img compare z9 z10
         qemu-img compare z10 z9
         stock-img create -q z8 8M
         qemu-img compare z9 z8
         qemu-img compare -s z9 z8
         qemu-img compare -f foo z9 z8
         qemu-img compare -F foo z9 z8
         stock-io -f raw -c 'write -P 9 1M 512' z8
         qemu-img compare z9 z8
         qemu-img compare
         qemu-img compare a
         qemu-img compare a b c
         qemu-img compare -Z a b
         qemu-img compare -T foo z9 z8
         stock-img create -q -f qcow2 broken 9M
         stock-io -f qcow2 -c 'write 0 64k' broken
         printf '\\2' | dd of=broken bs=1 seek=$((0x40006)) conv=notrunc status=none
         {{ qemu-img compare z9 broken; echo $?; }} 2>&1 | grep -v ^qcow2:
         {{ qemu-img compare broken z9; echo $?; }} 2>&1 | grep -v ^qcow2:"
    ));
}

#[test]
fn progress_is_printed_as_stock_prints_it() {
    both(
        "stock-img create -q -f raw disk 8M
         stock-io -f raw -c 'write -P 3 0 8M' disk
         qemu-img convert -p -f raw -O raw disk out | tr '\\r' '|'
         qemu-img convert -p -q -f raw -O raw disk out
         qemu-img convert -p -O raw missing out | tr '\\r' '|'
         qemu-img convert -p -f raw -O raw disk missing/out | tr '\\r' '|'
         qemu-img compare -p disk out | tr '\\r' '|'
         stock-io -f raw -c 'write -P 4 4M 64k' out
         qemu-img compare -p disk out | tr '\\r' '|'",
    );
}
