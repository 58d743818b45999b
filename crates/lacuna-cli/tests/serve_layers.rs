//! `x-lacuna:layers`: what every level of a chain says of a range, in one answer.

mod client;
mod common;

#[path = "../../lacuna-nbd/examples/incremental_copy.rs"]
mod incremental_copy;

use client::{Client, Served, contexts, range};
use common::Sandbox;
use incremental_copy::{Changed, Copied, copy};
use lacuna_nbd::client::Headers;

const MIB: u64 = 1 << 20;
const ZERO: u64 = 1;

const fn dirty(level: u64) -> u64 {
    1 << (1 + 2 * level)
}

const fn allocated(level: u64) -> u64 {
    1 << (2 + 2 * level)
}

/// Three levels; `monday` on the lowest two, `tuesday` on the middle one.
fn chain() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e
        stock-img create -q -f qcow2 base 4M; stock-img bitmap --add base monday
        stock-io -f qcow2 -c 'write 0 2M' base >&2
        stock-img create -q -f qcow2 -b base -F qcow2 middle
        stock-img bitmap --add middle monday; stock-img bitmap --add middle tuesday
        stock-io -f qcow2 -c 'write 1M 2M' middle >&2
        stock-img create -q -f qcow2 -b middle -F qcow2 top 5M
        stock-io -f qcow2 -c 'write -z 2M 1M' top >&2",
    );
    sandbox
}

#[test]
fn the_contexts_are_listed_with_64_bit_headers_alone() {
    let sandbox = chain();
    let served = Served::start(&sandbox, "-r top");
    let listed = |headers, queries: &[&str]| contexts(&served.socket(), headers, queries);
    let of_bitmaps = ["x-lacuna:layers:monday", "x-lacuna:layers:tuesday"];
    let all = ["x-lacuna:layers", of_bitmaps[0], of_bitmaps[1]];
    assert_eq!(listed(Headers::Extended, &["x-lacuna:"]), all);
    assert_eq!(listed(Headers::Extended, &["x-lacuna:layers:"]), of_bitmaps);
    assert_eq!(listed(Headers::Extended, &["x-lacuna:layers"]), all[..1]);
    assert!(listed(Headers::Extended, &[]).ends_with(&all.map(str::to_owned)));
    assert!(listed(Headers::Structured, &["x-lacuna:"]).is_empty());
    assert!(listed(Headers::Structured, &[]).iter().all(|name| !name.starts_with("x-lacuna")));
}

#[test]
fn each_level_says_for_itself_what_is_dirty_and_what_is_there() {
    let sandbox = chain();
    let served = Served::start(&sandbox, "-r --layers-bitmap tuesday --layers-bitmap 2=monday top");
    let names = ["x-lacuna:layers", "x-lacuna:layers:monday", "x-lacuna:layers:tuesday"];
    let status = |name| Client::new(&served.socket(), "", &[name]).status(range(0, 5 * MIB));
    let base = allocated(2);
    let both = allocated(1) | base;
    let hidden = ZERO | allocated(0) | allocated(1);
    assert_eq!(
        status(names[1]),
        [
            (MIB, base | dirty(2)),
            (MIB, both | dirty(1) | dirty(2)),
            (MIB, hidden | dirty(1)),
            (2 * MIB, ZERO),
        ]
    );
    assert_eq!(
        status(names[2]),
        [(MIB, base), (MIB, both | dirty(1)), (MIB, hidden | dirty(1)), (2 * MIB, ZERO)]
    );
    // What the server chose: tuesday where there is one, monday on level 2.
    assert_eq!(
        status(names[0]),
        [
            (MIB, base | dirty(2)),
            (MIB, both | dirty(1) | dirty(2)),
            (MIB, hidden | dirty(1)),
            (2 * MIB, ZERO),
        ]
    );
    let answer = Client::new(&served.socket(), "", &names)
        .ask(lacuna_nbd::Command::BlockStatus, range(0, MIB));
    assert_eq!(answer.extents.len(), 3, "any number at once: {:?}", answer.extents);
}

#[test]
fn each_export_has_the_levels_and_bitmaps_of_its_own_chain() {
    let sandbox = chain();
    let served = Served::start(&sandbox, "-r a=top b=base --layers-bitmap tuesday");
    let layers = |export| {
        Client::new(&served.socket(), export, &["x-lacuna:layers"]).status(range(2 * MIB, MIB))
    };
    let hidden = ZERO | allocated(0) | allocated(1);
    assert_eq!(layers("a"), [(MIB, hidden | dirty(1))]);
    assert_eq!(layers("b"), [(MIB, ZERO)]);
}

#[test]
fn without_a_choice_nothing_is_dirty() {
    let sandbox = chain();
    let served = Served::start(&sandbox, "-r top");
    let status = Client::new(&served.socket(), "", &["x-lacuna:layers"]).status(range(0, MIB));
    assert_eq!(status, [(MIB, allocated(2))]);
}

#[test]
fn what_lies_below_level_30_shares_one_bit() {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e
        stock-img create -q -f qcow2 0 1M; stock-io -f qcow2 -c 'write 0 64k' 0 >&2
        for n in $(seq 33); do
          stock-img create -q -f qcow2 -b $((n - 1)) -F qcow2 $n
          [ $n = 3 ] && stock-io -f qcow2 -c 'write 64k 64k' 3 >&2
          [ $n = 2 ] && stock-io -f qcow2 -c 'write 128k 64k' 2 >&2
        done; true",
    );
    let served = Served::start(&sandbox, "-r 33");
    let status = Client::new(&served.socket(), "", &["x-lacuna:layers"]).status(range(0, MIB));
    // Level 33 and 31 are deeper, 30 is the last with bits of its own.
    let deeper = 1 << 63;
    let rest = MIB - (192 << 10);
    assert_eq!(
        status,
        [(64 << 10, deeper), (64 << 10, allocated(30)), (64 << 10, deeper), (rest, ZERO)]
    );
}

#[test]
fn a_bitmap_that_cannot_be_read_on_one_level_is_told_of_on_none() {
    let sandbox = chain();
    sandbox.run("stock-io -c 'write 0 1k' -c abort middle");
    let served = Served::start(&sandbox, "-r top 2>warnings");
    // The highest `monday` is the broken one; `tuesday` was left in use as well.
    assert_eq!(contexts(&served.socket(), Headers::Extended, &["x-lacuna:"]), ["x-lacuna:layers"]);
    drop(served);
    sandbox.prepare(
        "stock-img create -q -f qcow2 -b base -F qcow2 sound; cp base sound-base
        stock-img bitmap --add sound monday; stock-io -c 'write 0 1k' -c abort base || true",
    );
    let served = Served::start(&sandbox, "-r sound 2>>warnings");
    let names = contexts(&served.socket(), Headers::Extended, &[]);
    assert!(names.iter().any(|name| name == "qemu:dirty-bitmap:monday"), "{names:?}");
    assert!(names.iter().all(|name| name != "x-lacuna:layers:monday"), "{names:?}");
    assert!(sandbox.run("cat warnings").text.contains("base: not offered: Bitmap 'monday'"));
}

#[test]
fn the_example_copies_what_the_top_allocates_into_a_copy_of_the_rest() {
    let sandbox = chain();
    sandbox.prepare("stock-img convert -O raw middle copy");
    let served = Served::start(&sandbox, "-r disk=top");
    let changed = Changed { allocated: 1, ..Changed::default() };
    let copied = copy(&served.socket(), "disk", &sandbox.path("copy"), &changed).unwrap();
    assert_eq!(copied, Copied { data_bytes: 0, zero_bytes: MIB });
    assert_identical(&sandbox, "top");
}

#[test]
fn the_example_copies_what_changed_since_a_bitmap_began() {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e
        stock-img create -q -f qcow2 base 64M; stock-io -f qcow2 -c 'write -P 1 0 40M' base >&2
        stock-img bitmap --add base since; stock-img convert -O raw base copy
        stock-io -f qcow2 -c 'write -P 2 3M 1M' -c 'write -z 8M 2M' -c 'discard 12M 1M' base >&2
        stock-img create -q -f qcow2 -b base -F qcow2 top; stock-img bitmap --add top since
        stock-io -f qcow2 -c 'write -P 3 20M 128k' -c 'write -z 24M 64k' top >&2",
    );
    let served = Served::start(&sandbox, "top");
    // And while it is served.
    Client::new(&served.socket(), "", &[]).write(30 * MIB, &[7; 100_000]);
    let changed = Changed { dirty: 2, bitmap: Some("since".into()), ..Changed::default() };
    let copied = copy(&served.socket(), "", &sandbox.path("copy"), &changed).unwrap();
    let grain = 64 << 10;
    assert_eq!(copied.data_bytes, MIB + 2 * grain + 2 * grain);
    assert_eq!(copied.zero_bytes, 3 * MIB + grain);
    drop(served);
    assert_identical(&sandbox, "top");
}

fn assert_identical(sandbox: &Sandbox, image: &str) {
    let compared = sandbox.run(&format!("stock-img compare -F raw {image} copy"));
    assert_eq!((compared.code, &*compared.text), (Some(0), "Images are identical.\n"));
}
