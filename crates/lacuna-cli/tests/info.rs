//! `info` against the stock tool, for images of every kind.

mod common;

use common::{Sandbox, both};

#[test]
fn images_are_described_in_the_same_words_and_json() {
    both(
        "stock-img create -q -f qcow2 base 8M
         stock-io -f qcow2 -c 'write -P 1 0 1M' base
         stock-img create -q -f qcow2 -b base -F qcow2 top
         qemu-img info base
         qemu-img info --output=json base
         qemu-img info --backing-chain top
         qemu-img info --backing-chain --output=json top
         qemu-img info -f raw base
         qemu-img info -U --output=json -f qcow2 top
         qemu-img info --image-opts driver=qcow2,file.filename=base
         qemu-img info 'json:{\"driver\":\"qcow2\",\"file.filename\":\"base\"}'
         qemu-img info file:base
         cp base base:1
         qemu-img info file:base:1
         stock-img create -q raw 1000
         qemu-img info raw
         qemu-img info --output=json raw
         head -c 200 /dev/zero > small
         qemu-img info small
         stock-img create -q -f qcow2 -o compat=0.10 old 10M
         qemu-img info old
         qemu-img info --output=json old
         mkdir sub
         stock-img create -q -f qcow2 -b ../base -F qcow2 sub/o
         qemu-img info sub/o
         qemu-img info --output=json sub/o
         stock-img create -q -f qcow2 -u -b nbd://host/x -F raw sub/remote 1M
         qemu-img info sub/remote
         qemu-img info --output json sub/remote",
    );
}

#[test]
fn names_that_are_no_ascii_are_escaped_in_json_as_qemu_does() {
    both(
        r#"stock-img create -q -f qcow2 -u -b $'b\e[31m\u00e9\x7f\u009b\n\U1F600\\\"' -F raw image 1M
          qemu-img info --output=json image
          qemu-img info image
          qemu-img map image"#,
    );
}

#[test]
fn names_from_images_cannot_steer_the_terminal_under_our_own_name() {
    let ours = Sandbox::ours();
    ours.prepare(
        r"stock-img create -q -f qcow2 -u -b $'b\e[31m\u009b\nfile format raw\u202e' -F raw image 1M",
    );
    let tamed = r"b\x1b[31m\u{9b}\nfile format raw\u{202e}";
    let info = ours.run("lacuna info image").text;
    assert!(info.contains(&format!("\nbacking file: {tamed}\n")), "{info}");
    let error = ours.run("lacuna map image").text;
    assert_eq!(
        error,
        format!(
            "lacuna: Could not open 'image': Could not open backing file: \
             Could not open '{tamed}': No such file or directory\n\
             hint: `lacuna info IMAGE` shows which file the image names\n"
        )
    );
}

#[test]
fn hints_do_not_send_anybody_to_a_repair_that_cannot_help() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 -u -b ./image -F qcow2 image 1M");
    let got = ours.run("lacuna map image").text;
    assert!(got.contains("backing chain is a loop"), "{got}");
    assert!(got.ends_with("hint: `lacuna info IMAGE` shows which file the image names\n"), "{got}");
}

#[test]
fn data_files_are_named_and_not_opened() {
    both(
        "stock-img create -q -f qcow2 -o data_file=d,data_file_raw=on,lazy_refcounts=on x 10M
         stock-img create -q -f qcow2 -o data_file=e,extended_l2=on,compression_type=zstd y 10M
         rm d e
         qemu-img info x
         qemu-img info --output=json y",
    );
}

#[test]
fn snapshots_and_bitmaps_are_listed() {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    // Made once and copied: a snapshot carries the time at which it was made.
    stock.prepare(
        "stock-img create -q -f qcow2 image 8M
         stock-io -c 'write 0 1M' image
         stock-img snapshot -c first image
         stock-img snapshot -c 'a second one with a name that is too long for its column' image
         stock-img bitmap --add image b0
         stock-img bitmap --add --disable -g 4096 image b1",
    );
    std::fs::copy(stock.path("image"), ours.path("image")).unwrap();
    common::both_in(&stock, &ours, "qemu-img info image\nqemu-img info --output=json image");
}

#[test]
fn encrypted_images_are_described_without_a_key() {
    let secret = "--object secret,id=s,data=abc";
    let options = "encrypt.key-secret=s";
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    for (name, format) in
        [("aes", "encrypt.format=aes"), ("luks", "encrypt.format=luks,encrypt.iter-time=10")]
    {
        stock.prepare(&format!(
            "stock-img create -q -f qcow2 {secret} -o {format},{options} {name} 10M"
        ));
        std::fs::copy(stock.path(name), ours.path(name)).unwrap();
        let lines = format!("qemu-img info {name}\nqemu-img info --output=json {name}");
        common::both_in(&stock, &ours, &lines);
    }
}

#[test]
fn dirty_and_corrupt_bits_show() {
    both(
        "stock-img create -q -f qcow2 image 8M
         printf '\\001' | dd of=image bs=1 seek=79 conv=notrunc status=none
         qemu-img info image
         qemu-img info --output=json image
         printf '\\003' | dd of=image bs=1 seek=79 conv=notrunc status=none
         qemu-img info image",
    );
}

#[test]
fn what_is_no_image_is_refused_in_the_same_words() {
    both(
        "qemu-img info
         qemu-img info a b
         qemu-img info missing
         qemu-img info -f
         qemu-img info --out
         qemu-img info --output=foo a
         stock-img create -q raw 1M
         qemu-img info -f foo raw
         qemu-img info -f qcow2 raw
         qemu-img info --image-opts -f raw raw
         printf 'QFI\\373\\0\\0\\0\\004' > four
         qemu-img info four
         mkdir folder
         qemu-img info folder",
    );
}

/// Makes an image with something of everything, some of it shared with a snapshot.
const LIVED_IN: &str = "
    stock-img create -q -f qcow2 image 16M
    stock-io -c 'write -P 1 0 1M' -c 'write -zu 2M 1M' -c 'write -c -P 7 4M 64k' image
    stock-img snapshot -c s image
    stock-io -c 'write -P 2 0 256k' -c 'write -z 768k 256k' image";

#[test]
fn totals_are_told_under_our_own_name_only() {
    let ours = Sandbox::ours();
    ours.prepare(LIVED_IN);
    let qemu = ours.run("qemu-img info image").text;
    let (before, _) = qemu.split_once("Child node").unwrap();
    let own = ours.run("lacuna info image").text;
    let totals = own.strip_prefix(before).and_then(|rest| rest.split_once("Child node"));
    assert_eq!(
        totals.unwrap_or_else(|| panic!("{own}")).0,
        "totals of the image's own tables:\n    \
         data: 768 KiB (786432 bytes)\n    \
         compressed: 64 KiB (65536 bytes)\n    \
         zeros: 1.25 MiB (1310720 bytes)\n    \
         unallocated: 13.9 MiB (14614528 bytes)\n    \
         reserved for zeros and unallocated: 256 KiB (262144 bytes)\n    \
         shared host clusters: 768 KiB (786432 bytes)\n"
    );
    let json = ours.command("lacuna info --output=json image").stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let expected = serde_json::json!({
        "data": 786_432, "compressed": 65_536, "zero": 1_310_720, "unallocated": 14_614_528,
        "reserved": 262_144, "shared": 786_432,
    });
    assert_eq!(json["totals"], expected);
    assert!(!ours.run("qemu-img info --output=json image").text.contains("totals"));
    let got = ours.run("qemu-img info --totals image");
    assert!(got.text.contains("unrecognized option '--totals'"), "{}", got.text);
}

#[test]
fn what_pins_hold_is_told_under_our_own_name_only() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 image 16M
         stock-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 2M 128k' image",
    );
    assert!(!ours.run("lacuna info image").text.contains("pins"));
    let got = ours.run("lacuna dedup image");
    assert_eq!(got.code, Some(0), "{}", got.text);
    let got = ours.run("lacuna info image").text;
    let line =
        "pins of shared clusters: 2 clusters with 18 references, 0 without any; tables: 128 KiB\n";
    assert!(got.contains(line), "{got}");
    let json = ours.command("lacuna info --output=json image").stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let expected = serde_json::json!({
        "keepers": 2, "references": 18, "without-sharers": 0, "table-bytes": 131_072,
    });
    assert_eq!(json["pins"], expected);
    let qemu = ours.run("qemu-img info --output=json image").text;
    assert!(!qemu.contains("\"pins\""), "{qemu}");
}

#[test]
fn large_tables_are_read_only_when_totals_are_asked_for() {
    let ours = Sandbox::ours();
    // Twenty tables of 64 KiB.
    ours.prepare(
        "stock-img create -q -f qcow2 image 20G
         for table in {0..19}; do echo \"write -zu $((table * 512))M 64k\"; done | stock-io image",
    );
    let got = ours.run("lacuna info image").text;
    assert!(got.contains("\ntotals: not counted, --totals does\n"), "{got}");
    let json = ours.run("lacuna info --output=json image").text;
    assert!(json.contains("\"totals\": null"), "{json}");
    let got = ours.run("lacuna info --totals image").text;
    assert!(got.contains("    zeros: 1.25 MiB (1310720 bytes)\n"), "{got}");
}

#[test]
fn an_image_whose_tables_cannot_be_added_up_is_described_all_the_same() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 image 1M; stock-io -c 'write 0 64k' image
         printf '\\x02' | dd of=image bs=1 seek=$((0x40006)) conv=notrunc status=none",
    );
    let reason = "L2 entry 0x8000000000050200 (subclusters 0x0000000000000000) of guest offset 0x0 \
                  points to no multiple of the cluster size";
    let got = ours.run("lacuna info image");
    assert_eq!(got.code, Some(0), "{}", got.text);
    assert!(got.text.contains(&format!("\ntotals: unknown: {reason}\n")), "{}", got.text);
    let got = ours.run("lacuna info --totals image");
    assert_eq!(got.code, Some(1));
    assert!(got.text.contains(reason), "{}", got.text);
}

#[test]
fn header_fields_outside_of_their_limits_are_named_in_the_same_words() {
    // Where, and the bytes.
    let fields = [
        (20, r"\0\0\0\50"),
        (8, r"\377\0\0\0\0\0\0\0"),
        (8, r"\0\0\0\0\0\0\2\0\0\0\10\0"),
        (36, r"\177\377\377\377"),
        (40, r"\22\64\126\170\220\253\315\357"),
        (48, r"\22\64\126\170\220\253\315\357"),
        (56, r"\177\377\377\377"),
        (60, r"\177\377\377\377"),
        (60, r"\0\0\0\1\22\64\126\170\220\253\315\357"),
        (100, r"\177\377\377\377"),
        (112, r"\22\64\126\170\177\377\377\377"),
    ];
    let poke = |(at, bytes)| {
        format!(
            "stock-img create -q -f qcow2 image 64M
             printf '{bytes}' | dd of=image bs=1 seek={at} conv=notrunc status=none
             qemu-img info image
             qemu-io -f qcow2 -c length image\n"
        )
    };
    both(&fields.map(poke).concat());
}

#[test]
fn a_shared_zero_cluster_is_told_of_where_the_image_remembers_it() {
    let ours = Sandbox::ours();
    ours.prepare("qemu-img create -q -f raw below 1M");
    ours.prepare("qemu-img create -q -f qcow2 -o compat=0.10 -F raw -b below disk");
    assert!(!ours.run("lacuna info disk").text.contains("shared zero cluster"));
    ours.prepare(
        "lacuna io --image-opts -c 'write -z 0 1M' \
         driver=qcow2,file.filename=disk,shared-zero-cluster=on",
    );
    assert!(ours.run("lacuna info disk").text.contains("shared zero cluster: true"));
    let json = ours.run("lacuna info --output=json disk").text;
    assert!(json.contains("\"shared-zero-cluster\": true"), "{json}");
    assert!(!ours.run("qemu-img info disk").text.contains("shared zero cluster"));
    ours.prepare("lacuna check -q disk && /usr/bin/qemu-img check -q disk");
}
