//! Ctrl-C during a long copy.

use std::io::Read;
use std::process::{Command, Stdio};

/// Bytes that take the compressor seconds, so that the signal comes in time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8 & 0x3f
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn an_interrupted_conversion_leaves_no_half_made_target() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("disk.raw");
    let target = folder.path().join("disk.qcow2");
    std::fs::write(&source, noise(64 << 20)).unwrap();
    let mut convert = Command::new(env!("CARGO_BIN_EXE_lacuna"))
        .args(["convert", "-c", "-f", "raw", "-O", "qcow2"])
        .args([&source, &target])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first compressed cluster lies behind 4 clusters of metadata.
    while std::fs::metadata(&target).map_or(0, |found| found.len()) < 0x50001 {
        assert!(convert.try_wait().unwrap().is_none(), "ended before it could be interrupted");
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&convert);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = convert.wait().unwrap();
    let mut text = String::new();
    convert.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(status.code(), Some(130), "{text}");
    assert!(text.contains("incomplete and is removed"), "{text}");
    assert!(!target.exists());
    assert!(source.exists());
}
