//! `backup`, `restore` and `verify` from outside: what stock programs changed between is in the next
//! point, and what they read of the result is what was there.

mod common;

use common::{Outcome, Sandbox};

/// A disk with data, zeros over data and holes.
const DISK: &str = "
    stock-img create -q -f qcow2 disk 64M
    stock-io -f qcow2 -c 'write -P 1 0 5M' -c 'write -P 2 20M 3M' -c 'write -z 21M 1M' disk >&2";

fn disk() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(&format!("set -e; {DISK}"));
    sandbox
}

fn works(sandbox: &Sandbox, line: &str) -> Outcome {
    let got = sandbox.run(line);
    assert_eq!(got.code, Some(0), "{line}: {}", got.text);
    got
}

fn fails(sandbox: &Sandbox, line: &str, text: &str) {
    let got = sandbox.run(line);
    assert_eq!(got.code, Some(1), "{line}: {}", got.text);
    assert!(got.text.contains(text), "{line}: {}", got.text);
}

/// Restores a point, and has stock compare it with an image.
fn assert_restores(sandbox: &Sandbox, folder: &str, point: &str, image: &str) {
    works(
        sandbox,
        &format!(
            "rm -f back; lacuna restore -q --point {point} -O qcow2 {folder} back &&
            stock-img compare back {image} && stock-img check -q back"
        ),
    );
}

/// One member of what a folder says of its points.
fn listed(sandbox: &Sandbox, folder: &str, query: &str) -> String {
    let line = format!("lacuna backup --list --output=json {folder} | jq -c '{query}'");
    works(sandbox, &line).text.trim().to_owned()
}

#[test]
fn one_line_every_night_copies_all_and_then_what_changed() {
    for form in ["segments", "qcow2"] {
        let sandbox = disk();
        let night = |name: &str| {
            let line = format!("lacuna backup -q -O {form} -B nightly --point {name} disk points");
            works(&sandbox, &format!("{line} && cp disk {name}.was"));
        };
        night("mon");
        works(&sandbox, "stock-io -f qcow2 -c 'write -P 3 1M 64k' -c 'write -z 2M 1M' disk");
        night("tue");
        works(
            &sandbox,
            "stock-img resize -q disk 80M; stock-io -f qcow2 -c 'write -P 4 79M 1M' disk",
        );
        night("wed");
        works(&sandbox, "lacuna resize -q --shrink disk 22M; lacuna resize -q disk 30M");
        night("thu");
        night("fri");
        for name in ["mon", "tue", "wed", "thu", "fri"] {
            assert_restores(&sandbox, "points", name, &format!("{name}.was"));
        }
        works(&sandbox, "lacuna verify points && stock-img check -q disk");
        let data = listed(&sandbox, "points", "[.points[] | [.\"data-bytes\", .\"zero-bytes\"]]");
        let mib = 1 << 20;
        let expected = [(7 * mib, 0), (65536, mib), (mib, 0)];
        let expected: Vec<String> =
            expected.iter().map(|(data, zeros)| format!("[{data},{zeros}]")).collect();
        assert!(data.starts_with(&format!("[{}", expected.join(","))), "{form}: {data}");
        assert!(data.ends_with(",[0,0]]"), "nothing changed on friday: {data}");
    }
}

#[test]
fn a_chain_of_images_is_moved_and_restored_by_stock_alone() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        lacuna backup -q -O qcow2 -B b --point one disk chain
        stock-io -f qcow2 -c 'write -P 9 4M 3M' -c 'discard 20M 1M' disk
        lacuna backup -q -B b --point two disk chain; cp disk two.was
        mkdir elsewhere; mv chain elsewhere/moved; rm disk
        cd elsewhere/moved
        stock-img check -q one.qcow2; stock-img check -q two.qcow2
        stock-img convert -O raw two.qcow2 ../../two.raw
        stock-img compare -f raw -F qcow2 ../../two.raw ../../two.was
        [ \"$(stock-img info --output=json two.qcow2 | jq -r '.\"backing-filename\"')\" = one.qcow2 ]
        [ \"$(stock-img info --output=json two.qcow2 | jq -r '.\"backing-filename-format\"')\" = qcow2 ]",
    );
}

#[test]
fn what_differs_from_a_snapshot_is_known_without_reading_it() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        stock-img snapshot -c one disk; lacuna backup -q -l one --point one disk points
        stock-io -f qcow2 -c 'write -P 5 3M 1M' -c 'discard 20M 512k' disk
        stock-img snapshot -c two disk; cp disk disk2; stock-img snapshot -a two disk2
        stock-io -f qcow2 -c 'write -P 6 40M 1M' disk
        lacuna backup -q --since-snapshot one -l two --point two disk points
        lacuna backup -q --since-snapshot two --point now disk points",
    );
    let held = listed(&sandbox, "points", "[.points[] | [.\"data-bytes\", .\"zero-bytes\"]]");
    assert_eq!(held, "[[7340032,0],[1048576,524288],[1048576,0]]");
    assert_restores(&sandbox, "points", "two", "disk2");
    assert_restores(&sandbox, "points", "now", "disk");
    // Another snapshot of the same name is another one.
    works(&sandbox, "stock-img snapshot -d one disk; stock-img snapshot -c one disk");
    fails(
        &sandbox,
        "lacuna backup --since-snapshot one disk points",
        "There is no restore point that holds snapshot 'one' of disk",
    );
}

#[test]
fn what_the_highest_levels_hold_is_added_to_a_point_of_the_rest() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        lacuna backup -q --point base disk points
        stock-img create -q -f qcow2 -b disk -F qcow2 middle
        stock-io -f qcow2 -c 'write -P 7 30M 1M' middle
        stock-img create -q -f qcow2 -b middle -F qcow2 top 70M
        stock-io -f qcow2 -c 'write -z 0 64k' -c 'write -P 8 69M 1M' top
        lacuna backup -q --levels 2 --point top top points",
    );
    assert_restores(&sandbox, "points", "top", "top");
    let held = listed(&sandbox, "points", ".points[1] | [.\"data-bytes\", .\"zero-bytes\"]");
    assert_eq!(held, "[2097152,65536]");
    fails(&sandbox, "lacuna backup --levels 3 top points", "The chain of top has 3 images");
}

#[test]
fn exports_of_others_are_copied_and_what_changed_by_their_bitmaps() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        stock-img bitmap --add disk b
        serve() { stock-nbd --fork -r -k $PWD/$1.sock -f qcow2 $2 disk; }
        serve one; lacuna backup -q --point one nbd+unix:///?socket=$PWD/one.sock points
        stock-io -f qcow2 -c 'write -P 5 3M 1M' -c 'write -z 20M 128k' disk
        serve two '-B b -e 2 -t --pid-file=pid'; pid=$(cat pid)
        lacuna backup -q -B b --point two nbd+unix:///?socket=$PWD/two.sock points
        kill $pid; while kill -0 $pid 2> /dev/null; do sleep 0.01; done",
    );
    assert_restores(&sandbox, "points", "two", "disk");
    let held = listed(&sandbox, "points", "[.points[] | [.\"data-bytes\", .\"zero-bytes\"]]");
    assert_eq!(held, "[[7340032,0],[1048576,131072]]");
    works(
        &sandbox,
        "set -e
        stock-img convert -O raw disk disk.raw
        nbdkit -r -U nbd.sock2 file disk.raw --run '
            lacuna backup -q --point kit \"$uri\" kit && lacuna restore -q kit kit.raw'
        cmp kit.raw disk.raw",
    );
}

#[test]
fn levels_of_a_chain_are_told_by_our_server() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        lacuna backup -q --point base disk points
        stock-img create -q -f qcow2 -b disk -F qcow2 top
        stock-io -f qcow2 -c 'write -P 7 30M 1M' -c 'write -z 1M 64k' top
        lacuna serve -r top --run 'lacuna backup -q --levels 1 --point top \"$uri\" points'",
    );
    assert_restores(&sandbox, "points", "top", "top");
    let held = listed(&sandbox, "points", ".points[1] | [.\"data-bytes\", .\"zero-bytes\"]");
    assert_eq!(held, "[1048576,65536]");
}

#[test]
fn a_point_is_restored_into_an_export_and_into_what_exists() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        lacuna backup -q disk points
        stock-img create -q -f raw full.raw 64M; stock-io -f raw -c 'write -P 77 0 64M' full.raw
        nbdkit -U - file full.raw --run 'lacuna restore -n points \"$uri\"'
        stock-img compare -f raw -F qcow2 full.raw disk
        stock-io -f raw -c 'write -P 77 0 64M' full.raw
        lacuna restore -n -O raw points full.raw; stock-img compare -f raw -F qcow2 full.raw disk
        lacuna restore --overwrite -O qcow2 -o cluster_size=4k -c points full.raw
        stock-img compare -f qcow2 full.raw disk",
    );
    fails(&sandbox, "lacuna restore points full.raw", "full.raw exists already");
    fails(&sandbox, "lacuna restore points nbd://localhost", "is an export, which cannot be made");
    fails(&sandbox, "lacuna restore --point x points new", "There is no restore point 'x'");
}

#[test]
fn a_crash_before_the_bitmap_begins_anew_makes_the_next_point_larger_and_no_less() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        lacuna backup -q -B b --point one disk points
        stock-io -f qcow2 -c 'write -P 5 3M 1M' disk; cp disk before
        lacuna backup -q -B b --point two disk points
        cp before disk; stock-io -f qcow2 -c 'write -P 6 40M 64k' disk
        lacuna backup -q -B b --point three disk points",
    );
    assert_restores(&sandbox, "points", "three", "disk");
    assert_eq!(listed(&sandbox, "points", ".points[2].\"data-bytes\""), "1114112");
}

#[test]
fn a_bitmap_that_is_kept_makes_every_point_stand_on_the_one_that_began_it() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        lacuna backup -q -B b --point one disk points
        for name in two three; do
            stock-io -f qcow2 -c 'write -P 5 3M 1M' disk
            lacuna backup -q -B b --keep-bitmap --point $name disk points
        done",
    );
    let below = listed(&sandbox, "points", "[.points[].\"stands-on\".point]");
    assert_eq!(below, "[null,\"one\",\"one\"]");
    assert_restores(&sandbox, "points", "three", "disk");
}

#[test]
fn what_does_not_fit_is_refused_with_what_helps() {
    let sandbox = disk();
    works(&sandbox, "lacuna backup -q -B b --point one disk points; mkdir other; touch other/x");
    for (line, text) in [
        ("lacuna backup -B b --point one disk points", "There is a restore point 'one' already"),
        ("lacuna backup -O qcow2 disk points", "kept as segments, not as qcow2"),
        ("lacuna backup disk other", "holds something else than a backup"),
        ("lacuna backup --list other", "is no folder of a backup"),
        ("lacuna backup -B c --keep-bitmap disk points", "no restore point that began bitmap 'c'"),
        ("lacuna backup --levels 1 disk points", "The chain of disk has 1 images"),
        ("lacuna backup --point ../x disk points", "is no name of a restore point"),
        ("lacuna backup -l nothing disk points", "no snapshot with identifier or name 'nothing'"),
        ("lacuna backup --since one disk points", "--since needs --bitmap"),
        ("lacuna backup -B b --since two disk points", "There is no restore point 'two'"),
        ("stock-img bitmap --disable disk b; lacuna backup -B b disk points", "it records nothing"),
        ("stock-img bitmap --remove disk b; lacuna backup -B b disk points", "--full copies all"),
    ] {
        fails(&sandbox, line, text);
    }
    works(&sandbox, "lacuna backup -B b --full --point again disk points");
    assert_restores(&sandbox, "points", "again", "disk");
    fails(
        &sandbox,
        "rm points/one.json; lacuna restore --point one points x",
        "no restore point 'one'",
    );
}

#[test]
fn damage_is_told_with_an_exit_code_of_its_own_and_never_restored() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e; lacuna backup -q -B b --point one disk points
        stock-io -f qcow2 -c 'write -P 5 3M 1M' disk; lacuna backup -q -B b --point two disk points
        printf X | dd of=points/one.000000.seg bs=1 seek=100 conv=notrunc status=none",
    );
    let got = sandbox.run("lacuna verify points");
    assert_eq!(got.code, Some(2), "{}", got.text);
    assert!(got.text.contains("one.000000.seg") && got.text.contains("1 faults"), "{}", got.text);
    assert_eq!(sandbox.run("lacuna verify -q --point two points").code, Some(2));
    fails(&sandbox, "lacuna restore --point two points back", "does not fit its checksum");
    assert!(!sandbox.path("back").exists(), "half a disk looks like a whole one");
}

#[test]
fn programs_read_progress_and_points() {
    let sandbox = disk();
    works(
        &sandbox,
        "set -e
        lacuna backup --progress=json --output=json disk points > out 2> err
        jq -e '.\"data-bytes\" == 7340032 and .basis.by == \"full\" and .form == \"segments\"' out
        jq -se '.[0].job == \"backup\" and .[0].state == \"running\" and .[-1].state == \"done\"' err
        lacuna verify --progress=json --output=json points 2> err |
            jq -e '.points == 1 and .damage == []'
        jq -se '.[-1].done == .[-1].total' err
        lacuna restore --progress=json points back 2> err
        jq -se 'any(.phase == \"compare\")' err",
    );
}
