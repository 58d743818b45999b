//! Backups that are killed, interrupted, or whose source changes meanwhile: no half point counts, earlier
//! ones stay, and the next run goes on where that is right.

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::Sandbox;

/// How often a copy is killed before it may end.
const KILLS: u64 = 6;

/// A disk of content that does not get shorter.
fn disk() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e; openssl enc -aes-128-ctr -K 00 -iv 00 -nosalt -in /dev/zero 2> /dev/null |
            head -c 48M > disk.raw
        stock-img convert -f raw -O qcow2 disk.raw disk",
    );
    sandbox
}

fn works(sandbox: &Sandbox, line: &str) -> String {
    let got = sandbox.run(line);
    assert_eq!(got.code, Some(0), "{line}: {}", got.text);
    got.text
}

/// Starts a backup and kills it as soon as `is_time`; says whether it was killed before its end.
fn killed(sandbox: &Sandbox, words: &str, is_time: impl Fn() -> bool) -> bool {
    let mut child = Command::new(sandbox.program("lacuna"))
        .args(words.split(' '))
        .current_dir(sandbox.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !is_time() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    child.kill().unwrap();
    child.wait().unwrap().code().is_none()
}

/// Returns how many bytes the files of the folder have.
fn stored(sandbox: &Sandbox) -> u64 {
    let files = sandbox.path("points").read_dir().unwrap();
    files.filter_map(|file| Some(file.ok()?.metadata().ok()?.len())).sum()
}

fn torture(form: &str) {
    let sandbox = disk();
    let words = format!("backup -q -O {form} --segment-size 2M -B b disk points");
    works(&sandbox, &format!("lacuna {words} --point first"));
    works(&sandbox, "cp disk first.was; stock-io -f qcow2 -c 'write -P 3 1M 40M' disk");
    // Content that does not get shorter, in the image itself.
    works(
        &sandbox,
        "dd if=disk.raw of=part bs=1M count=40 skip=3 status=none;
        stock-img dd -f raw -O raw if=part of=part2 bs=1M;
        lacuna io -f qcow2 -c 'write -s part2 1M 40M' disk",
    );
    let (before, mut kills) = (stored(&sandbox), 0);
    for number in 0..KILLS {
        // A few bytes, and then more each time: what was durable stays from kill to kill.
        let enough = before + 100 + number * (5 << 20);
        kills += u32::from(killed(&sandbox, &words, || stored(&sandbox) >= enough));
        let points =
            works(&sandbox, "lacuna backup --list --output=json points | jq -r '.points[].point'");
        if points.lines().count() > 1 {
            break;
        }
        works(&sandbox, "lacuna verify points; stock-img check -q disk");
    }
    assert!(kills > 0, "the copy was never cut off");
    works(
        &sandbox,
        &format!(
            "lacuna {words}; lacuna verify points
            lacuna restore -q -O qcow2 points back && stock-img compare back disk
            lacuna restore -q -O qcow2 --point first points old && stock-img compare old first.was
            ! ls points | grep -E 'part|begun|done' && stock-img check -q disk"
        ),
    );
}

#[test]
fn a_copy_into_segments_killed_anywhere_never_counts_and_completes_when_run_again() {
    torture("segments");
}

#[test]
fn a_copy_into_images_killed_anywhere_never_counts_and_completes_when_run_again() {
    torture("qcow2");
}

/// Kills a first copy when it has a part that is durable; with what it is run again.
fn cut_off(sandbox: &Sandbox) -> String {
    let words = "backup --segment-size 2M disk points".to_owned();
    let is_durable = || {
        sandbox.path("points").read_dir().is_ok_and(|mut files| {
            files.any(|file| file.unwrap().file_name().to_string_lossy().ends_with(".000003.seg"))
        })
    };
    assert!(killed(sandbox, &words, is_durable), "it ended before it could be killed");
    words
}

#[test]
fn a_copy_that_was_cut_off_goes_on_where_it_was() {
    let sandbox = disk();
    let words = cut_off(&sandbox);
    works(
        &sandbox,
        "lacuna backup --list --output=json points | jq -e '.points == [] and (.begun | length) == 1'",
    );
    let text = works(&sandbox, &format!("lacuna {words}"));
    assert!(text.contains(" goes on at "), "{text}");
    works(&sandbox, "lacuna restore -q -O qcow2 points back && stock-img compare back disk");
}

#[test]
fn a_source_that_changed_after_the_cut_is_copied_from_the_beginning() {
    let sandbox = disk();
    let words = cut_off(&sandbox);
    works(&sandbox, "stock-io -f qcow2 -c 'write -P 3 0 64k' disk");
    let text = works(&sandbox, &format!("lacuna {words}"));
    assert!(text.contains("begins anew"), "{text}");
    works(&sandbox, "lacuna restore -q -O qcow2 points back && stock-img compare back disk");
    works(&sandbox, "lacuna verify points; [ $(ls points/*.json | wc -l) = 2 ]");
}

#[test]
fn an_export_goes_on_only_where_the_user_says_that_it_is_unchanged() {
    let sandbox = disk();
    let server = "nbdkit -r -U - file disk.raw --run";
    let words = "lacuna backup --segment-size 2M \"$uri\" points";
    let cut = format!(
        "{server} '{words} & while ! [ -e points/*.000001.seg ]; do sleep 0.001; done
        kill -9 $!; wait $! || true'"
    );
    sandbox.run(&cut);
    let text = works(&sandbox, &format!("{server} '{words} --unchanged'"));
    assert!(text.contains(" goes on at "), "{text}");
    works(&sandbox, "rm -r points");
    sandbox.run(&cut);
    let text = works(&sandbox, &format!("{server} '{words}'"));
    assert!(text.contains("begins anew"), "{text}");
    works(&sandbox, "lacuna restore -q points back && cmp back disk.raw");
}

#[test]
fn an_interruption_keeps_what_was_copied() {
    let sandbox = disk();
    let got = sandbox.run(
        "lacuna backup --segment-size 2M disk points & copy=$!
        while ! [ -e points/*.000002.seg ]; do sleep 0.001; done; kill -INT $copy; wait $copy",
    );
    assert_eq!(got.code, Some(130), "{}", got.text);
    assert!(got.text.contains("run it again, and it goes on"), "{}", got.text);
    let text = works(&sandbox, "lacuna backup disk points");
    assert!(text.contains(" goes on at "), "{text}");
}

#[test]
fn two_do_not_add_points_to_one_folder_at_once() {
    let sandbox = disk();
    let got = sandbox.run(
        "lacuna backup -q disk points & copy=$!
        while ! [ -e points/*.begun ]; do sleep 0.001; done
        lacuna backup -q disk points; code=$?; wait $copy && exit $code",
    );
    assert_eq!(got.code, Some(1), "{}", got.text);
    assert!(got.text.contains("Somebody else adds a point"), "{}", got.text);
}
