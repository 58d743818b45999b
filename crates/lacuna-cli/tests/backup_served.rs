//! `backup --control`: one moment of a disk whose guests go on writing it.

mod common;

use common::{Outcome, Sandbox, served};

/// A disk of content that does not get shorter.
const IMAGES: &str = "
    set -e
    openssl enc -aes-128-ctr -K 00 -iv 00 -nosalt -in /dev/zero 2> /dev/null | head -c 40M > disk.raw
    stock-img convert -f raw -O qcow2 disk.raw disk.qcow2; stock-img resize -q disk.qcow2 64M";

/// How backups are made here; `io` is a guest.
const WORDS: &str = "
    night() { begin \"$@\"; wait $copy; }
    begin() { lacuna backup -q --control ctl.sock --segment-size 2M -B daily \"$@\" $a points & copy=$!; }
    io() { stock-io -f raw \"$@\" $a >&2; }
    list() { lacuna backup --list --output=json points | jq -c \"$1\"; }
    server_points() { ctl point --output=json | jq -c '[.points[].point]'; }
    back() { rm -f back; lacuna restore -q -O qcow2 --point $1 points back; }
    # Stops a copy when it has something that is durable.
    until_copied() { while ! compgen -G 'points/*.seg' > /dev/null; do sleep 0.002; done; }
    ";

fn run(lines: &str) -> (Sandbox, Outcome) {
    let sandbox = Sandbox::ours();
    sandbox.prepare(IMAGES);
    let got = served(&sandbox, "a=disk.qcow2", &format!("{WORDS}{lines}"));
    assert!(got.text.ends_with("server ended with 0\n"), "{}", got.text);
    (sandbox, got)
}

#[track_caller]
fn assert_whole(sandbox: &Sandbox, lines: &str) {
    let got = sandbox.run(&format!("set -e; {lines}"));
    assert_eq!(got.code, Some(0), "{}", got.text);
}

#[test]
fn every_night_is_one_moment_while_a_guest_writes() {
    // The guest counts, at the start of the disk first and then at its end: no moment has the end ahead of
    // the start, or more than one behind.
    let (sandbox, got) = run("cat > guest.py <<'END'
import os
h.connect_uri(os.environ['a'])
n = 0
while not os.path.exists('stop'):
    n += 1
    h.pwrite(n.to_bytes(8, 'big') * 64, 0)
    h.pwrite(n.to_bytes(8, 'big') * 64, (63 << 20))
    h.pwrite(n.to_bytes(8, 'big') * 8192, (n % 600) << 16)
    open('began', 'w')
END
        cat > check.py <<'END'
import sys
with open('back.raw', 'rb') as disk:
    first = int.from_bytes(disk.read(8), 'big'); disk.seek(63 << 20)
    last = int.from_bytes(disk.read(8), 'big')
assert 0 <= first - last <= 1 and first > 0, (first, last)
END
        a=$a nbdsh -c - < guest.py & guest=$!; while ! [ -e began ]; do sleep 0.01; done
        for name in one two three; do night --point $name; done
        touch stop; wait $guest
        night --point last; server_points
        for name in one two three; do
            back $name; stock-img convert -O raw back back.raw && python3 check.py && echo whole
        done");
    assert_eq!(got.text.matches("whole\n").count(), 3, "{}", got.text);
    assert!(got.text.contains("[]\n"), "the server keeps nothing: {}", got.text);
    assert_whole(
        &sandbox,
        "lacuna verify -q points; lacuna restore -q -O qcow2 points last
        stock-img compare last disk.qcow2; stock-img check -q disk.qcow2
        lacuna backup --list --output=json points | jq -e '[.points[].basis.by] ==
            [\"full\", \"bitmap\", \"bitmap\", \"bitmap\"]'",
    );
}

#[test]
fn a_copy_that_was_killed_goes_on_with_the_same_moment() {
    let (sandbox, got) = run("begin; until_copied; kill -9 $copy; wait $copy
        server_points | jq length
        # What is written now is of no concern to that moment.
        io -c 'write -P 9 0 8M' -c 'write -P 9 30M 8M'
        lacuna backup --control ctl.sock -B daily $a points
        server_points; list '.points | length'
        night --point more; list '.points[1].\"data-bytes\"'");
    assert!(got.text.contains(" goes on at "), "{}", got.text);
    assert!(got.text.contains("\n[]\n1\n16777216\n"), "{}", got.text);
    assert_whole(
        &sandbox,
        "lacuna verify -q points
        first=$(lacuna backup --list --output=json points | jq -r '.points[0].point')
        lacuna restore -q -O raw --point $first points first.raw
        cmp -n 41943040 first.raw disk.raw
        lacuna restore -q -O qcow2 points more && stock-img compare more disk.qcow2",
    );
}

#[test]
fn an_interrupted_copy_leaves_server_and_bitmap_as_if_it_had_not_been() {
    let (sandbox, got) = run("night --point one; io -c 'write -P 5 1M 1M'
        io -c 'write -P 6 0 20M'
        begin --point two
        while [ \"$(server_points)\" = '[]' ] && kill -0 $copy 2>/dev/null; do sleep 0.002; done
        kill -INT $copy; wait $copy; echo ended with $?
        server_points; io -c 'write -P 7 40M 1M'; night --point three; list '[.points[].point]'");
    // Where it was quicker than the signal, it is as any other.
    let is_late = got.text.contains("ended with 0\n[]\n");
    let is_cut = got.text.contains("ended with 130\n[]\n") && !got.text.contains("\"two\"");
    assert!(is_late || is_cut, "{}", got.text);
    assert_whole(
        &sandbox,
        "lacuna restore -q -O qcow2 points three && stock-img compare three disk.qcow2",
    );
}

#[test]
fn a_moment_that_the_server_cannot_keep_is_no_point_and_says_so() {
    let (sandbox, got) = run("night --point one
        io -c 'write -P 5 0 40M'
        begin --point two --space 128k
        while ! compgen -G 'points/two.begun' > /dev/null && kill -0 $copy 2>/dev/null; do sleep 0.001; done
        kill -STOP $copy; io -c 'write -P 6 0 40M'; kill -CONT $copy
        wait $copy; echo ended with $?
        server_points; list '[.points[].point]'; night --point three");
    assert!(got.text.contains("ended with 1\n[]\n[\"one\"]\n"), "{}", got.text);
    assert!(got.text.contains("The server could not keep what the disk was"), "{}", got.text);
    assert!(got.text.contains("--when-full wait"), "{}", got.text);
    assert_whole(
        &sandbox,
        "lacuna restore -q -O qcow2 points three && stock-img compare three disk.qcow2",
    );
}

#[test]
fn a_kept_bitmap_goes_on_and_what_cannot_be_is_refused_before_the_server_is_asked() {
    let (_, got) = run("night --point one; io -c 'write -P 5 1M 1M'
        night --keep-bitmap --point two; night --keep-bitmap --point three
        list '[.points[] | .\"stands-on\".point, .\"data-bytes\"]'
        lacuna backup -q --control ctl.sock -B other --keep-bitmap $a points
        lacuna backup -q --control ctl.sock disk.qcow2 points
        lacuna backup -q --control ctl.sock --levels 1 $a points
        lacuna backup -q --space 1M $a points
        lacuna backup -q --control ctl.sock --point all $a points && back all &&
            stock-img compare -f qcow2 -F raw back $a
        server_points");
    for text in [
        "[null,41943040,\"one\",1048576,\"one\",1048576]\n",
        "no restore point that began bitmap 'other'",
        "SOURCE is the URI of an export",
        "with --bitmap, or all of it",
        "--space needs --control",
        "Images are identical.\n[]\n",
    ] {
        assert!(got.text.contains(text), "{text}: {}", got.text);
    }
}

#[test]
fn a_moment_that_was_copied_and_not_given_up_is_settled_by_the_next_run() {
    let (sandbox, got) = run("night --point one; io -c 'write -P 5 0 20M'
        begin --point two
        while ! compgen -G 'points/two.begun' > /dev/null; do sleep 0.001; done
        mv ctl.sock away.sock; wait $copy; echo ended with $?; mv away.sock ctl.sock
        server_points; io -c 'write -P 6 50M 1M'
        night --point three; server_points; list '[.points[].\"data-bytes\"]'");
    assert!(got.text.contains("The server keeps the moment"), "{}", got.text);
    assert!(got.text.contains("ended with 0\n[\"two\"]\n"), "{}", got.text);
    assert!(got.text.contains("[]\n[41943040,20971520,1048576]\n"), "{}", got.text);
    assert_whole(
        &sandbox,
        "lacuna restore -q -O qcow2 points three && stock-img compare three disk.qcow2",
    );
}
