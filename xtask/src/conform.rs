//! The conformance kit before all the engines that it has a driver for.
//!
//! What others fail is known (`docs/conformance.md`); anything beyond that is an error. The driver of imago is
//! outside of the workspace, so that it is built here.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Outcome;
use crate::run::{built, cargo, command, json, run as start, workspace};

/// Seconds that a step of a case may take: engines that follow loops of backing files never end.
const SECONDS: &str = "8";
const IMAGO: &str = "crates/conform/drivers/imago";

/// An engine, and what it may fail.
struct Engine {
    driver: String,
    known: &'static [&'static str],
}

const LOOPS: [&str; 2] = ["hostile/backing-itself", "hostile/backing-loop"];
const FAILED_BY_IMAGO: [&str; 6] = [
    "durable/small-clusters",
    "header/encrypted-aes",
    "hostile/refcount-block-missing",
    "hostile/refcount-block-beyond",
    LOOPS[0],
    LOOPS[1],
];

/// Runs all cases with all drivers; a row of the table in `docs/conformance.md` for each.
pub(crate) fn run() -> Outcome {
    let lacuna = built("dev")?;
    let engines = [
        Engine { driver: "lacuna".into(), known: &[] },
        Engine { driver: "qemu-io=/usr/bin/qemu-io".into(), known: &LOOPS },
        Engine { driver: imago()?.display().to_string(), known: &FAILED_BY_IMAGO },
    ];
    println!("| engine | passed | failed | not supported |\n|---|---|---|---|");
    let mut beyond = Vec::new();
    for engine in &engines {
        let report = report(&lacuna, &engine.driver)?;
        println!("{}", row(&report));
        beyond.extend(failed(&report).filter(|name| !engine.known.contains(&name.as_str())));
    }
    match beyond.is_empty() {
        true => Ok(()),
        false => Err(format!("cases that were not known to fail: {}", beyond.join(", "))),
    }
}

/// Builds the driver of imago.
fn imago() -> Outcome<PathBuf> {
    let target = workspace().join("target/imago");
    let mut build = cargo(&["build", "--locked", "--quiet"]);
    build.current_dir(IMAGO).env("CARGO_TARGET_DIR", &target);
    start(build)?;
    Ok(target.join("debug/imago-driver"))
}

/// What the kit says of an engine; that cases fail is no error here.
fn report(lacuna: &Path, driver: &str) -> Outcome<Value> {
    let words = ["conform", "--driver", driver, "--time-limit", SECONDS, "--output=json"];
    let mut kit = command(&lacuna.to_string_lossy(), &words);
    let done =
        kit.output().map_err(|error| format!("cannot start {}: {error}", lacuna.display()))?;
    json(&String::from_utf8_lossy(&done.stdout))
        .map_err(|error| format!("{error}{}", String::from_utf8_lossy(&done.stderr)))
}

fn cases(report: &Value) -> impl Iterator<Item = &Value> {
    report["cases"].as_array().into_iter().flatten()
}

fn failed(report: &Value) -> impl Iterator<Item = String> {
    let failed = cases(report).filter(|case| case["verdict"] == "fail");
    failed.filter_map(|case| case["name"].as_str().map(str::to_owned))
}

fn row(report: &Value) -> String {
    let count = |verdict: &str| cases(report).filter(|case| case["verdict"] == verdict).count();
    let engine = report["engine"].as_str().unwrap_or("?");
    format!("| {engine} | {} | {} | {} |", count("pass"), count("fail"), count("unsupported"))
}
