//! `lacuna conform`: this engine passes, stock qemu-io fails what is known, and drivers that are none are
//! told and ended.

mod common;

use common::{Outcome, Sandbox};

/// What stock qemu-io 10.0.2 fails, and why: `docs/conformance.md` has the same.
const FAILED_BY_STOCK: [&str; 2] = ["hostile/backing-itself", "hostile/backing-loop"];

fn conform(options: &str) -> Outcome {
    Sandbox::ours().run(&format!("lacuna conform {options}"))
}

/// The names of cases that failed, of a group.
fn failed_by_stock(filter: &str) -> Vec<String> {
    let got = conform(&format!(
        "--driver qemu-io=/usr/bin/qemu-io --time-limit 8 --output=json --filter '{filter}'"
    ));
    let report: serde_json::Value =
        serde_json::from_str(&got.text).unwrap_or_else(|_| panic!("{}", got.text));
    assert!(report["engine"].as_str().unwrap().starts_with("qemu-io-"), "{}", got.text);
    let cases = report["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    assert!(cases.iter().all(|case| case["verdict"] != "unsupported"), "{}", got.text);
    let failed = cases.iter().filter(|case| case["verdict"] == "fail");
    let failed: Vec<String> =
        failed.map(|case| case["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(got.code, Some(i32::from(!failed.is_empty())));
    failed
}

#[test]
fn lacuna_passes_as_a_process_too() {
    for filter in ["sharing/*", "durable/*", "header/*", "hostile/*"] {
        let got = conform(&format!("--driver lacuna -q --filter '{filter}'"));
        assert_eq!(got.code, Some(0), "{}", got.text);
        assert!(got.text.contains(" 0 failed, 0 not supported (seed 1)"), "{}", got.text);
    }
}

#[test]
fn stock_qemu_io_fails_nothing_in_sharing_and_headers() {
    for filter in ["sharing/*", "header/*", "durable/*"] {
        assert_eq!(failed_by_stock(filter), [""; 0], "{filter}");
    }
}

#[test]
fn stock_qemu_io_fails_nothing_in_reads_and_writes() {
    for filter in ["read/*", "write/*"] {
        assert_eq!(failed_by_stock(filter), [""; 0], "{filter}");
    }
}

#[test]
fn stock_qemu_io_fails_nothing_in_zeros_and_backing_files() {
    for filter in ["zero*", "discard/*", "backing/*"] {
        assert_eq!(failed_by_stock(filter), [""; 0], "{filter}");
    }
}

#[test]
fn stock_qemu_io_fails_what_is_known_of_damaged_images() {
    assert_eq!(failed_by_stock("hostile/*"), FAILED_BY_STOCK);
}

#[test]
fn stock_qemu_io_fails_no_random_sequence() {
    assert_eq!(failed_by_stock("random/*"), [""; 0]);
}

/// A driver in shell that knows its name, and what it says of anything else.
fn shell(rest: &str) -> String {
    format!(
        "--driver 'while read -r word rest; do case $word in hello) echo ok 1 shell-1;; \
         {rest} esac; done' --filter read/v3-cluster-4096 --time-limit 2"
    )
}

#[test]
fn what_is_no_driver_is_told_and_ends_with_2() {
    for (driver, words) in [
        ("exit 3", "The driver ended without an answer: exit status: 3"),
        ("echo no such engine >&2; exit 1", "exit status: 1; no such engine"),
        ("/no/such/driver", "not found"),
        ("sleep 1000", "The driver did not answer in time, and was ended"),
        ("sleep 1000 & wait", "The driver did not answer in time, and was ended"),
        ("yes", "does not keep to the protocol"),
        ("cat /dev/zero", "a line of more than 8396800 bytes"),
        ("cat", "does not keep to the protocol"),
        ("echo ok 2 later; cat", "protocol 2 instead of 1"),
        ("echo ok 1 x without wings; cat", "there is no capability"),
        ("echo error not today; cat", "hello is answered with"),
    ] {
        let got = conform(&format!("--driver '{driver}' --time-limit 2 --filter read/empty"));
        assert_eq!(got.code, Some(2), "{driver}: {}", got.text);
        assert!(got.text.contains(words), "{driver}: {}", got.text);
        assert!(got.text.lines().count() <= 2, "{driver}: {}", got.text);
    }
    let got = conform(&shell("open) echo ok 38912;; *) echo fine;;"));
    assert_eq!(got.code, Some(2), "{}", got.text);
    assert!(got.text.contains("is no answer"), "{}", got.text);
}

#[test]
fn an_engine_that_dies_hangs_or_fails_fails_the_case() {
    for (rest, words) in [
        ("open) exit 5;;", "open: the driver ended without an answer: exit status: 5"),
        ("open) sleep 1000;;", "open: the driver did not answer in time, and was ended"),
        ("open) echo error no such image;;", "open: no such image"),
        ("open) echo ok 1;;", "the size is"),
        ("open) echo ok 38912;; read) echo error broken;; *) echo ok;;", "broken"),
        ("open) echo ok 38912;; read) exit;; *) echo ok;;", "read: the driver ended"),
    ] {
        let got = conform(&shell(rest));
        assert_eq!(got.code, Some(1), "{rest}: {}", got.text);
        assert!(got.text.contains(words), "{rest}: {}", got.text);
        assert!(got.text.contains("shell-1: 1 cases, 0 passed, 1 failed"), "{rest}: {}", got.text);
    }
}

#[test]
fn what_an_engine_does_not_offer_is_counted_apart() {
    let got = conform(&shell("open) echo unsupported a lesser engine;; *) echo ok;;"));
    assert_eq!(got.code, Some(0), "{}", got.text);
    assert!(got.text.contains("unsupported read/v3-cluster-4096: a lesser engine"), "{}", got.text);
    let lacking =
        "--driver 'read line; echo ok 1 less-1 without deflate; cat' --filter read/v3-cluster-4096";
    let got = conform(lacking);
    assert_eq!(got.code, Some(0), "{}", got.text);
    assert!(got.text.contains("the driver is without deflate"), "{}", got.text);
}

#[test]
fn cases_are_listed_chosen_and_kept() {
    let ours = Sandbox::ours();
    let all = ours.run("lacuna conform --list");
    assert_eq!(all.code, Some(0));
    assert!(all.text.lines().count() > 200, "{}", all.text);
    let got = ours.run("lacuna conform --list --output=json --filter sharing/two-entries");
    let list: serde_json::Value = serde_json::from_str(&got.text).unwrap();
    assert_eq!(list[0]["steps"][1], "write 512 512 (seed 20)");
    let got = ours.run("lacuna conform --driver lacuna --filter sharing/two-entries --keep kept");
    assert_eq!(got.code, Some(0), "{}", got.text);
    for name in ["disk.qcow2", "before/disk.qcow2", "expected.raw", "steps.txt", "conversation.txt"]
    {
        let kept = ours.bytes(&format!("kept/sharing-two-entries/{name}"));
        assert!(!kept.is_empty(), "{name}");
    }
    // The same case looks the same to the stock tools.
    ours.prepare("cd kept/sharing-two-entries && stock-img compare -f raw -F qcow2 expected.raw disk.qcow2 >&2");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    for (options, words) in [
        ("", "Expecting --driver CMD, or --list"),
        ("--driver lacuna image", "Unexpected argument: image"),
        ("--driver lacuna --filter nothing", "No case has a name like 'nothing'"),
        ("--driver lacuna --seed x", "--seed expects a number, not 'x'"),
        ("--serve qemu", "--serve expects lacuna, qemu-io or qemu-io=PROGRAM, not 'qemu'"),
        ("--driver lacuna --keep .", "Making the folder ."),
    ] {
        let got = conform(options);
        assert_eq!(got.code, Some(1), "{options}: {}", got.text);
        assert!(got.text.contains(words), "{options}: {}", got.text);
    }
}
