//! The first thing a newcomer runs.

use std::process::Command;

#[test]
fn demo_proves_its_images_and_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_lacuna"))
        .arg("demo")
        .env("TMPDIR", scratch.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.matches("lacuna: equal, clean").count(), 3, "{said}");
    let hint = "install qemu-utils: apt-get install qemu-utils";
    assert_eq!(said.matches("qemu-img: equal, clean").count(), 3, "{hint}\n{said}");
    let shared = said.split(" clusters share a place").next().unwrap_or_default();
    let shared = shared.rsplit(' ').next().and_then(|digits| digits.parse::<u64>().ok());
    assert!(shared.is_some_and(|clusters| clusters > 10), "a folder and its copy: {said}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}
