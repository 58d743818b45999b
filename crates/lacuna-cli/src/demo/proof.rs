//! Whether an image holds what it should: by our own read path and by QEMU's tools.

use std::path::Path;
use std::process::Command;

use lacuna::job::{self, CompareOptions};
use lacuna::qcow2::check::{CheckOptions, check};
use lacuna::raw::Raw;
use lacuna::storage::{FileOptions, FileStorage};
use pollster::block_on;

use super::{DemoResult, file_system, image};

/// Compares an image with the raw disk it should hold, and checks its metadata; tells the result
/// in a line. A difference is an error.
pub(super) fn of(raw: &Path, path: &Path, name: &str) -> DemoResult<String> {
    ours(raw, path, name)?;
    let theirs = theirs(raw, path)?;
    Ok(format!("  {name:<16} lacuna: equal, clean   {theirs}\n"))
}

fn ours(raw: &Path, path: &Path, name: &str) -> DemoResult {
    let expected = FileStorage::open(raw, &FileOptions::read_only())?;
    let expected = block_on(Raw::open(expected))?;
    let options = CompareOptions::default();
    let found = block_on(job::compare(&expected, &image::open(path)?, options, &mut |_, _| ()))?;
    if let Some(difference) = found.difference {
        return Err(format!("{name} differs from the disk it should hold: {difference:?}").into());
    }
    let storage = FileStorage::open(path, &FileOptions::read_only())?;
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| ()))?;
    if report.is_clean() { Ok(()) } else { Err(format!("{name} is damaged: {report:?}").into()) }
}

fn theirs(raw: &Path, path: &Path) -> DemoResult<&'static str> {
    let Some(program) = file_system::find("qemu-img") else {
        return Ok("(qemu-img is not here: apt-get install qemu-utils)");
    };
    let calls = [&["compare", "-q", "-f", "raw", "-F", "qcow2"][..], &["check", "-q"]];
    for (arguments, paths) in calls.into_iter().zip([&[raw, path][..], &[path]]) {
        let output = Command::new(&program).args(arguments).args(paths).output()?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            return Err(format!("qemu-img {} objects: {said}", arguments.join(" ")).into());
        }
    }
    Ok("qemu-img: equal, clean")
}
