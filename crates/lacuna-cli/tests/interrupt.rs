//! Signals during a long copy.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

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

/// A long conversion, far enough to have written its first cluster.
struct Conversion {
    folder: tempfile::TempDir,
    process: Child,
}

impl Conversion {
    fn started() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk.raw"), noise(64 << 20)).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_lacuna"))
            .args(["convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"])
            .args(["--error-format=json", "--progress=none"])
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let target = folder.path().join("disk.qcow2");
        // The first compressed cluster lies behind 4 clusters of metadata.
        while std::fs::metadata(&target).map_or(0, |found| found.len()) < 0x50001 {
            assert!(process.try_wait().unwrap().is_none(), "ended before it could be interrupted");
            std::thread::yield_now();
        }
        Self { folder, process }
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    fn line(&mut self) -> String {
        let mut text = String::new();
        BufReader::with_capacity(1, self.process.stderr.as_mut().unwrap())
            .read_line(&mut text)
            .unwrap();
        text
    }
}

#[test]
fn an_interrupted_conversion_leaves_no_half_made_target() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut conversion = Conversion::started();
        conversion.send(signal);
        let text = conversion.line();
        assert_eq!(conversion.process.wait().unwrap().code(), Some(code), "{text}");
        assert_eq!(
            text,
            format!(
                "{{\"error\":\"interrupted\",\"message\":\"Interrupted; disk.qcow2 was incomplete and is \
                 removed\",\"hint\":null,\"verb\":null,\"exit_code\":{code},\"file\":\"disk.qcow2\"}}\n"
            )
        );
        assert!(!conversion.folder.path().join("disk.qcow2").exists());
        assert!(conversion.folder.path().join("disk.raw").exists());
    }
}

#[test]
fn sigusr1_asks_how_far_a_conversion_is() {
    let mut conversion = Conversion::started();
    conversion.send(Signal::USR1);
    let text = conversion.line();
    let percent = text.strip_prefix("    (").and_then(|rest| rest.strip_suffix("/100%)\n"));
    let percent: f64 = percent.and_then(|number| number.parse().ok()).unwrap_or(-1.0);
    assert!((0.0..=100.0).contains(&percent), "{text}");
    conversion.send(Signal::TERM);
    conversion.process.wait().unwrap();
}
