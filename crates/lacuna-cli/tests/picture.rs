//! `map` under our own name: the picture, and the facts that it is drawn from.

mod common;

use common::Sandbox;

/// A chain of three files, the lowest too short for the disk, with something of everything.
const CHAIN: &str = "
    stock-img create -q -f qcow2 base 20M
    stock-io -f qcow2 -c 'write -P 1 0 2M' -c 'write -z 4M 2M' -c 'write -zu 6M 2M' \
        -c 'write -P 1 6528k 64k' -c 'write -c -P 7 10M 64k' -c 'write -c -P 8 10304k 64k' \
        -c 'write -P 3 12M 64k' base
    stock-img create -q -f qcow2 -b base -F qcow2 mid
    stock-io -f qcow2 -c 'write -P 2 1M 512k' -c 'write -zu 12M 128k' mid
    stock-img create -q -f qcow2 -o extended_l2=on -b mid -F qcow2 top 32M
    stock-io -f qcow2 -c 'write -P 2 1M 64k' -c 'write -P 1 24M 6k' -c 'write -z 28M 2k' top";

/// Runs a line; what the host allocated for files differs from host to host.
fn shown(sandbox: &Sandbox, line: &str) -> String {
    let got = sandbox.run(line);
    assert_eq!(got.code, Some(0), "{}", got.text);
    let line = |line: &str| match (line.find("(qcow2, "), line.find(" on the host")) {
        (Some(start), Some(end)) => format!("{}...{}\n", &line[..start + 8], &line[end..]),
        _ => format!("{}\n", line.trim_end()),
    };
    // Begins as a literal of many lines does.
    "\n".chars().chain(got.text.lines().map(line).collect::<String>().chars()).collect()
}

#[test]
fn a_chain_is_drawn_with_a_lane_for_each_file() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    let got = shown(&ours, "LC_ALL=C lacuna map --picture top");
    assert_eq!(
        got,
        "
32 MiB in 3 files, 128 KiB for each character

0 top (qcow2, ... on the host): data 70 KiB; zeros, space reserved 58 KiB; zeros, no space 2 KiB
        0 |........+.......................................................|
    8 MiB |................................................................|
   16 MiB |................................................................|
   24 MiB |-...............................,...............................|
1 mid (qcow2, ... on the host): data 448 KiB; zeros, no space 128 KiB
        0 |........+###....................................................|
    8 MiB |................................0...............................|
   16 MiB |................................                                |
   24 MiB |                                                                |
2 base (qcow2, ... on the host): data 1.56 MiB; compressed data 128 KiB; zeros, no space 3.94 MiB
        0 |########    ####................0000000000000000000+000000000000|
    8 MiB |................C............... ...............................|
   16 MiB |................................                                |
   24 MiB |                                                                |

  # data                                                  2.07 MiB   6.4 %
  C compressed data                                        128 KiB   0.3 %
    zeros, space reserved                                   58 KiB   0.1 %
  0 zeros, no space                                       4.06 MiB  12.7 %
  . unallocated: the next file decides, below all zeros   25.7 MiB  80.2 %
  + mostly data
  - mostly unallocated, with data
  , mostly unallocated, with zeros
    (blank) a file above decides, or this one is too short
"
    );
}

#[test]
fn an_image_is_drawn_with_block_elements_where_the_locale_has_them() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    ours.prepare("stock-io -f qcow2 -c 'write -P 1 16M 2M' -c 'write -z 16M 1M' base");
    assert_eq!(
        shown(&ours, "lacuna map --picture base"),
        "
20 MiB, 64 KiB for each character

base (qcow2, ... on the host)
        0 │████████████████████████████████································│
    4 MiB │00000000000000000000000000000000000000█0000000000000000000000000│
    8 MiB │································▚▚······························│
   12 MiB │█·······························································│
   16 MiB │□□□□□□□□□□□□□□□□████████████████································│

  █ data                                                  3.12 MiB  15.6 %
  ▚ compressed data                                        128 KiB   0.6 %
  □ zeros, space reserved                                    1 MiB   5.0 %
  0 zeros, no space                                       3.94 MiB  19.6 %
  · unallocated                                           11.8 MiB  59.0 %
"
    );
}

#[test]
fn a_part_of_a_disk_is_drawn_from_where_it_begins() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    assert_eq!(
        shown(&ours, "LC_ALL=C lacuna map --picture -s 6464k -l 300k base"),
        "
300 KiB, 64 KiB for each character

base (qcow2, ... on the host)
 6464 KiB |0#000|

  # data                                                    64 KiB  21.3 %
  0 zeros, no space                                        236 KiB  78.6 %
"
    );
    assert_eq!(
        shown(&ours, "LC_ALL=C lacuna map --picture -s 1G base"),
        "
0 B, 64 KiB for each character

base (qcow2, ... on the host)

"
    );
}

/// `script` is the terminal.
#[test]
fn a_terminal_gets_colours_and_its_whole_width() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 image 16M; stock-io -c 'write -z 1M 1M' image");
    let on_terminal = |environment: &str| {
        let line = format!(
            "script -qec 'stty cols 100; {environment} lacuna map --picture image' /dev/null"
        );
        ours.run(&line).text.replace('\r', "")
    };
    let got = on_terminal("TERM=xterm");
    let row = format!(
        "        0 │\x1b[90m{}\x1b[m\x1b[34m{}\x1b[m\x1b[90m{}\x1b[m│\n",
        "·".repeat(16),
        "0".repeat(16),
        "·".repeat(48)
    );
    assert!(got.contains(&row), "install util-linux's script where it is missing:\n{got}");
    for plain in ["TERM=xterm NO_COLOR=1", "TERM=dumb"] {
        let got = on_terminal(plain);
        assert!(!got.contains('\x1b') && got.contains(&"·".repeat(48)), "{got}");
    }
}

#[test]
fn the_picture_is_for_people_and_ours() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    let got = ours.run("lacuna map --picture --output=json base");
    assert_eq!(got.code, Some(1));
    assert!(
        got.text.contains("--picture is for people, --output=json for programs"),
        "{}",
        got.text
    );
    let got = ours.run("qemu-img map --picture base");
    assert_eq!(got.code, Some(1));
    assert!(got.text.contains("unrecognized option '--picture'"), "{}", got.text);
}

#[test]
fn every_fact_has_a_column() {
    let ours = Sandbox::ours();
    ours.prepare(CHAIN);
    assert_eq!(
        shown(&ours, "lacuna map top"),
        "
Offset          Length          Mapped to       Depth  Content     Space  File
0               0x100000        0x50000         2      data        taken  base
0x100000        0x10000         0x50000         0      data        taken  top
0x110000        0x70000         0x60000         1      data        taken  mid
0x180000        0x80000         0x1d0000        2      data        taken  base
0x200000        0x200000        -               -      zeros       none   -
0x400000        0x260000        -               2      zeros       none   base
0x660000        0x10000         0x250000        2      data        taken  base
0x670000        0x190000        -               2      zeros       none   base
0x800000        0x200000        -               -      zeros       none   -
0xa00000        0x20000         -               2      compressed  taken  base
0xa20000        0x1e0000        -               -      zeros       none   -
0xc00000        0x20000         -               1      zeros       none   mid
0xc20000        0x7e0000        -               -      zeros       none   -
0x1400000       0x400000        -               -      zeros       none   -
0x1800000       0x1800          0x60000         0      data        taken  top
0x1801800       0xe800          0x61800         -      zeros       taken  -
0x1810000       0x3f0000        -               -      zeros       none   -
0x1c00000       0x800           -               0      zeros       none   top
0x1c00800       0x3ff800        -               -      zeros       none   -
"
    );
}

#[test]
fn reserved_subclusters_are_unallocated_and_take_space() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 -o extended_l2=on image 1M");
    ours.prepare("stock-io -f qcow2 -c 'write -P 1 128k 3k' -c 'write -z 160k 6k' image");
    assert_eq!(
        shown(&ours, "lacuna map image"),
        "
Offset          Length          Mapped to       Depth  Content     Space  File
0               0x20000         -               -      zeros       none   -
0x20000         0x1000          0x50000         0      data        taken  image
0x21000         0x7000          0x51000         -      zeros       taken  -
0x28000         0x1800          0x58000         0      zeros       taken  image
0x29800         0x6800          0x59800         -      zeros       taken  -
0x30000         0xd0000         -               -      zeros       none   -
"
    );
    assert_eq!(shown(&ours, "lacuna map --output=json image"), "
[{ \"start\": 0, \"length\": 131072, \"depth\": 0, \"present\": false, \"zero\": true, \"data\": false, \"compressed\": false, \"hole\": true},
{ \"start\": 131072, \"length\": 4096, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \"compressed\": false, \"hole\": false, \"offset\": 327680},
{ \"start\": 135168, \"length\": 28672, \"depth\": 0, \"present\": false, \"zero\": true, \"data\": false, \"compressed\": false, \"hole\": false, \"offset\": 331776},
{ \"start\": 163840, \"length\": 6144, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, \"compressed\": false, \"hole\": false, \"offset\": 360448},
{ \"start\": 169984, \"length\": 26624, \"depth\": 0, \"present\": false, \"zero\": true, \"data\": false, \"compressed\": false, \"hole\": false, \"offset\": 366592},
{ \"start\": 196608, \"length\": 851968, \"depth\": 0, \"present\": false, \"zero\": true, \"data\": false, \"compressed\": false, \"hole\": true}]
");
    assert_eq!(
        shown(&ours, "LC_ALL=C lacuna map --picture image"),
        "
1 MiB, 2 KiB for each character

image (qcow2, ... on the host)
        0 |................................................................|
  128 KiB |##ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ................................|
  256 KiB |................................................................|
  384 KiB |................................................................|
  512 KiB |................................................................|
  640 KiB |................................................................|
  768 KiB |................................................................|
  896 KiB |................................................................|

  # data                                                     4 KiB   0.3 %
  Z zeros, space reserved                                   60 KiB   5.8 %
  . unallocated                                            960 KiB  93.7 %
"
    );
}
