//! What other programs read: errors and progress as JSON.

mod common;

use common::Sandbox;
use serde_json::{Value, json};

/// Runs a line and returns its standard error, as JSON where a line is JSON.
fn stderr(sandbox: &Sandbox, line: &str) -> (Option<i32>, Vec<Value>) {
    let output = sandbox.command(line);
    let text = String::from_utf8(output.stderr).unwrap();
    let value = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| Value::from(line));
    (output.status.code(), text.lines().map(value).collect())
}

#[test]
fn errors_come_as_one_json_line_whichever_way_it_is_asked_for() {
    let ours = Sandbox::ours();
    let missing = json!({
        "error": "not_found",
        "message": "Could not open 'x': No such file or directory",
        "hint": null,
        "verb": "info",
        "exit_code": 1,
        "file": "x",
    });
    for line in [
        "lacuna --error-format=json info x",
        "lacuna --error-format json info x",
        "lacuna info --error-format=json x",
        "lacuna info x --error-format json",
    ] {
        assert_eq!(stderr(&ours, line), (Some(1), vec![missing.clone()]), "{line}");
    }
}

#[test]
fn errors_in_the_command_line_itself_are_json_too() {
    let ours = Sandbox::ours();
    let table = [
        ("bogus", Value::Null, "Command not found: bogus", "`lacuna --help` shows what there is"),
        ("creat", Value::Null, "Command not found: creat", "create is the nearest"),
        (
            "map -Z",
            "map".into(),
            "invalid option -- 'Z'",
            "`lacuna map --help` shows what there is",
        ),
        (
            "--bogus",
            Value::Null,
            "unrecognized option '--bogus'",
            "`lacuna --help` shows what there is",
        ),
    ];
    for (line, verb, message, hint) in table {
        let expected = json!({
            "error": "usage", "message": message, "hint": hint, "verb": verb, "exit_code": 1,
        });
        let got = stderr(&ours, &format!("lacuna {line} --error-format=json"));
        assert_eq!(got, (Some(1), vec![expected]), "{line}");
    }
}

#[test]
fn classes_and_exit_codes_of_errors() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 image 1M; stock-img create -q raw 1M
         cp image broken; printf '\\xff' | dd of=broken bs=1 seek=$((0x28)) conv=notrunc status=none",
    );
    for (line, class, code) in [
        ("compare image nothing", "not_found", 2),
        ("map -f qcow2 broken", "corrupt", 1),
        ("check raw", "unsupported", 63),
    ] {
        let (got, lines) = stderr(&ours, &format!("lacuna --error-format=json {line}"));
        assert_eq!(got, Some(code), "{line}: {lines:?}");
        let last = lines.last().unwrap_or_else(|| panic!("{line}"));
        assert_eq!((&last["error"], &last["exit_code"]), (&class.into(), &code.into()), "{line}");
    }
}

/// Checks the rules that hold for progress of every job.
fn check_progress(lines: &[Value], job: &str, state: &str) {
    let (last, before) = lines.split_last().unwrap_or_else(|| panic!("{job}: no lines"));
    assert_eq!(last["state"], state, "{job}: {lines:?}");
    for line in lines {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        let schema =
            ["job", "state", "phase", "done", "total", "unit", "bytes_per_second", "seconds"];
        assert_eq!(keys, schema, "{job}");
        assert_eq!(line["job"], job);
        assert!(line["done"].as_u64() <= line["total"].as_u64(), "{line}");
        assert_eq!(line["bytes_per_second"].is_u64(), line["unit"] == "bytes", "{line}");
    }
    assert!(before.iter().all(|line| line["state"] == "running"), "{job}: {lines:?}");
    for pair in before.windows(2) {
        let seconds = |line: &Value| line["seconds"].as_f64().unwrap();
        let apart = seconds(&pair[1]) - seconds(&pair[0]);
        // Two roundings to milliseconds.
        assert!(apart > 0.198 || pair[0]["phase"] != pair[1]["phase"], "{job}: {pair:?}");
    }
}

#[test]
fn progress_as_json_begins_goes_on_and_ends() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -f qcow2 image 64M; stock-io -c 'write -P 5 0 64M' image >&2
         cp image other",
    );
    for (job, line) in [
        ("convert", "convert --progress=json -O qcow2 image copy"),
        ("compare", "compare --progress=json image other"),
        ("check", "check --progress=json image"),
    ] {
        let (code, lines) = stderr(&ours, &format!("lacuna {line}"));
        assert_eq!(code, Some(0), "{line}: {lines:?}");
        check_progress(&lines, job, "done");
        assert_eq!(lines.last().unwrap()["done"], lines.last().unwrap()["total"], "{job}");
    }
}

#[test]
fn progress_of_a_job_that_fails_says_so_before_the_error() {
    let ours = Sandbox::ours();
    // A compressed cluster that is none, halfway.
    ours.prepare(
        "stock-img create -q -f raw raw 8M; stock-io -f raw -c 'write -P 5 0 8M' raw >&2
         stock-img convert -c -O qcow2 raw image
         printf '\\xff\\xff\\xff\\xff' | dd of=image bs=1 seek=$((0x50000)) conv=notrunc status=none",
    );
    let (code, mut lines) =
        stderr(&ours, "lacuna convert --error-format=json --progress=json -O raw image copy");
    assert_eq!(code, Some(1), "{lines:?}");
    let error = lines.pop().unwrap();
    assert_eq!((&error["verb"], &error["offset"]), (&"convert".into(), &0x50000.into()), "{error}");
    check_progress(&lines, "convert", "failed");
}

#[test]
fn progress_that_nobody_can_see_as_a_bar_comes_as_lines_where_asked_for() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 image 1M; cp image other");
    let got = ours.run("lacuna compare -p image other");
    assert_eq!(got.text, "compare: compare 0%\ncompare: compare 100%\nImages are identical.\n");
    assert_eq!(ours.run("lacuna compare image other").text, "Images are identical.\n");
    assert_eq!(ours.run("lacuna compare -q --progress=json image other").text, "");
}
