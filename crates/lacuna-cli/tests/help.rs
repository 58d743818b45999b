//! What the program says of itself, and that it is true.

mod common;

use std::path::Path;

use common::Sandbox;
use testkit::certificates::{Authority, LOCAL};

/// Lines and columns of a terminal that nobody has made larger.
const SCREEN: (usize, usize) = (24, 80);

/// The files that examples are about, each where an example expects it to be.
const CAST: &str = "
    stock-img create -q -f raw disk.raw 4M
    stock-io -f raw -c 'write -P 7 1M 1M' disk.raw >&2
    stock-img convert -f raw -O qcow2 disk.raw disk.qcow2
    cp disk.qcow2 old.qcow2; cp disk.qcow2 new.qcow2; cp disk.qcow2 base.qcow2
    cp disk.qcow2 snapshots.qcow2; stock-img snapshot -c monday snapshots.qcow2
    cp disk.qcow2 bitmaps.qcow2; stock-img bitmap --add bitmaps.qcow2 monday
    stock-img create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
    stock-io -f qcow2 -c 'write -P 8 2M 64k' overlay.qcow2 >&2
    lacuna backup -q --point monday disk.qcow2 points";

/// A folder of certificates for both ends of TLS.
fn certificates(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    let authority = Authority::new("cast");
    authority.trusted_in(folder);
    authority.server_in(folder, &LOCAL);
    authority.client_in(folder);
}

/// The verbs, as the overview lists them: a title or nothing, the name, what it does.
fn verbs(sandbox: &Sandbox) -> Vec<String> {
    let overview = sandbox.run("lacuna").text;
    let lines = overview.lines().filter(|line| line.starts_with("  "));
    let names = lines.map(|line| line[10..20].trim().to_owned());
    // Verbs about the program are in the text below.
    let names: Vec<String> = names
        .chain(["commit", "restore", "stream", "verify"].map(str::to_owned))
        .chain(["bench", "completions", "conform", "ctl", "help", "io", "man"].map(str::to_owned))
        .collect();
    assert!(names.len() >= 8, "{overview}");
    names
}

fn help(sandbox: &Sandbox, verb: &str) -> String {
    let got = sandbox.run(&format!("lacuna help {verb}"));
    assert_eq!(got.code, Some(0), "{verb}: {}", got.text);
    got.text
}

fn examples(help: &str) -> Vec<String> {
    let (_, examples) = help.split_once("\nExamples:\n").unwrap_or_else(|| panic!("{help}"));
    let lines = examples.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines.map(str::to_owned).collect()
}

#[test]
fn the_overview_fits_on_a_screen_and_lists_every_verb() {
    let ours = Sandbox::ours();
    let overview = ours.run("lacuna");
    assert_eq!(overview.code, Some(0));
    assert_eq!(overview, ours.run("lacuna --help"));
    assert_eq!(overview, ours.run("lacuna help"));
    let lines: Vec<&str> = overview.text.lines().collect();
    assert!(lines.len() < SCREEN.0, "leave a line for the prompt:\n{}", overview.text);
    assert!(lines.iter().all(|line| line.chars().count() <= SCREEN.1), "{}", overview.text);
}

#[test]
fn every_verb_explains_itself_within_80_columns() {
    let ours = Sandbox::ours();
    for verb in verbs(&ours) {
        let text = help(&ours, &verb);
        assert_eq!(text, ours.run(&format!("lacuna {verb} --help")).text, "{verb}");
        for part in ["\nUsage: lacuna ", "\nOptions:\n", "\nExit codes:\n  0   ", "\nExamples:\n"] {
            assert!(text.contains(part), "{verb} lacks {part:?}: {text}");
        }
        let longest = text.lines().max_by_key(|line| line.len()).unwrap_or_default();
        assert!(longest.len() <= SCREEN.1, "{verb}: {longest}");
    }
}

#[test]
fn every_example_of_every_verb_works() {
    let ours = Sandbox::ours();
    for verb in verbs(&ours) {
        let examples = examples(&help(&ours, &verb));
        assert!(!examples.is_empty(), "{verb}");
        // The demo is the example, and has a test of its own.
        for line in examples.into_iter().filter(|_| verb != "demo") {
            let sandbox = Sandbox::ours();
            sandbox.prepare(&format!("set -e; {CAST}"));
            certificates(&sandbox.path("pki"));
            // What talks to a server needs one.
            let run = match verb == "ctl" {
                true => format!("lacuna serve --control ctl.sock disk.qcow2 --run '{line}'"),
                false => line.clone(),
            };
            let got = sandbox.run(&run);
            assert_eq!(got.code, Some(0), "{line}: {}", got.text);
            let is_of_verb = line.starts_with(&format!("lacuna {verb} "));
            assert!(is_of_verb, "an example of {verb}: {line}");
        }
    }
}

#[test]
fn options_of_ours_do_not_show_under_names_of_others() {
    let ours = Sandbox::ours();
    for line in ["qemu-img --help", "qemu-img map --help", "qemu-img check --help"] {
        let got = ours.run(line);
        assert_eq!(got.code, Some(0), "{line}");
        for option in ["--error-format", "--probe-backing", "--progress", "demo"] {
            assert!(!got.text.contains(option), "{line}: {}", got.text);
        }
    }
}
