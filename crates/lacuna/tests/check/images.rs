//! Images made by QEMU's tools, bytes poked into them, and QEMU's opinion of the result.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lacuna::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use lacuna::storage::MemoryStorage;
use tempfile::TempDir;

/// Runs a foreign tool; its absence is a failure.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| {
        panic!("{program} cannot be run ({error}): apt-get install qemu-utils")
    })
}

/// An image in a directory of its own.
pub(crate) struct Image {
    directory: TempDir,
}

impl Image {
    /// Makes an image with `qemu-img create -o options` and runs qemu-io commands on it.
    pub(crate) fn new(options: &str, size: &str, commands: &[&str]) -> Self {
        let image = Self { directory: tempfile::tempdir().unwrap() };
        let data_file = format!("data_file={}", image.file("data").display());
        let options = options.replace("data_file", &data_file);
        let path = image.path();
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", &options]);
        }
        arguments.extend([path.to_str().unwrap(), size]);
        let output = run("qemu-img", &arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        image.io(commands);
        image
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.file("image.qcow2")
    }

    /// Runs qemu-io commands; an argument that starts with `!` is one for qemu-img, in which `@`
    /// is the image.
    pub(crate) fn io(&self, commands: &[&str]) {
        let path = self.path();
        let path = path.to_str().unwrap();
        for command in commands {
            let output = match command.strip_prefix('!') {
                Some(img) => {
                    let words: Vec<String> =
                        img.split_whitespace().map(|word| word.replace('@', path)).collect();
                    run("qemu-img", &words.iter().map(String::as_str).collect::<Vec<_>>())
                }
                None => run("qemu-io", &["-f", "qcow2", "-c", command, path]),
            };
            assert!(output.status.success(), "{command}: {output:?}");
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    pub(crate) fn set_bytes(&self, bytes: &[u8]) {
        std::fs::write(self.path(), bytes).unwrap();
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_be_bytes(self.bytes()[at..at + 8].try_into().unwrap())
    }

    pub(crate) fn poke(&self, at: u64, patch: &[u8]) {
        let mut bytes = self.bytes();
        let at = at as usize;
        bytes[at..at + patch.len()].copy_from_slice(patch);
        self.set_bytes(&bytes);
    }

    pub(crate) fn poke_word(&self, at: u64, word: u64) {
        self.poke(at, &word.to_be_bytes());
    }

    /// Returns where L2 entry `index` of the first table is.
    pub(crate) fn l2(&self, index: u64) -> u64 {
        self.l2_table(0) + index * 8
    }

    pub(crate) fn l2_table(&self, l1_index: u64) -> u64 {
        self.word(self.l1(l1_index)) & 0x00ff_ffff_ffff_fe00
    }

    pub(crate) fn l1(&self, index: u64) -> u64 {
        self.word(40) + index * 8
    }

    /// Returns where the bitmap directory is, by its header extension.
    pub(crate) fn bitmap_directory(&self) -> u64 {
        let bytes = self.bytes();
        let magic = 0x2385_2875_u32.to_be_bytes();
        let at = bytes[..0x10000].windows(4).position(|window| window == magic).unwrap();
        self.word(at as u64 + 24)
    }

    pub(crate) fn refcount_block(&self) -> u64 {
        self.word(self.word(48))
    }

    /// Returns what the guest reads, by qemu-img; nothing where it reports errors.
    pub(crate) fn try_guest(&self) -> Option<Vec<u8>> {
        let raw = self.file("guest.raw");
        let path = self.path();
        let paths = [path.to_str().unwrap(), raw.to_str().unwrap()];
        let output = run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", paths[0], paths[1]]);
        output.status.success().then(|| std::fs::read(raw).unwrap())
    }

    pub(crate) fn guest(&self) -> Vec<u8> {
        self.try_guest().unwrap()
    }

    /// Keeps the image as it is, for [`reads_as_before`](Self::reads_as_before).
    pub(crate) fn keep_copy(&self) {
        std::fs::copy(self.path(), self.file("before.qcow2")).unwrap();
    }

    /// Says whether the guest reads what it could read when the copy was made.
    pub(crate) fn reads_as_before(&self) -> bool {
        let (before, after) = (self.file("before.qcow2"), self.path());
        let paths = [before.to_str().unwrap(), after.to_str().unwrap()];
        let same = |pair: [&str; 2]| {
            let arguments = ["compare", "-U", "-f", "qcow2", "-F", "qcow2", pair[0], pair[1]];
            run("qemu-img", &arguments).status.code()
        };
        // What could not be read before need not be readable now.
        same([paths[0], paths[0]]) != Some(0) || same(paths) == Some(0)
    }

    /// Checks with lacuna; a repair is written back.
    pub(crate) fn check(&self, repair: Repair) -> CheckReport {
        let before = self.bytes();
        let storage = MemoryStorage::from(before.as_slice());
        let options = CheckOptions { repair };
        let report = pollster::block_on(check(&storage, &options, &mut |_| {})).unwrap();
        let after = storage.to_vec();
        if repair == Repair::None {
            assert!(before == after, "a check wrote to the image");
        } else {
            self.set_bytes(&after);
        }
        report
    }

    pub(crate) fn qemu_check(&self) -> QemuCheck {
        QemuCheck::run(&self.path(), &[])
    }

    pub(crate) fn qemu_repair(&self, what: &str) -> QemuCheck {
        QemuCheck::run(&self.path(), &["-r", what])
    }
}

/// What opening an image with stale bitmaps says, without a line end.
const ADVICE: &str =
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.";

/// What `qemu-img check --output=json` says.
#[derive(Debug)]
pub(crate) struct QemuCheck {
    pub(crate) status: i32,
    json: String,
    pub(crate) lines: Vec<String>,
}

impl QemuCheck {
    fn run(path: &Path, more: &[&str]) -> Self {
        let mut arguments = vec!["check", "-f", "qcow2", "--output=json"];
        arguments.extend(more);
        arguments.push(path.to_str().unwrap());
        let output = run("qemu-img", &arguments);
        let lines = String::from_utf8_lossy(&output.stderr);
        Self {
            status: output.status.code().unwrap_or(-1),
            json: String::from_utf8_lossy(&output.stdout).into_owned(),
            lines: lines
                .replace(ADVICE, "")
                .lines()
                .filter(|line| !line.is_empty() && !line.starts_with("qemu-img: warning: "))
                .map(str::to_owned)
                .collect(),
        }
    }

    /// Returns a number of the answer; 0 where the key is left out.
    pub(crate) fn number(&self, key: &str) -> u64 {
        let Some((_, rest)) = self.json.split_once(&format!("\"{key}\": ")) else { return 0 };
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }
}

/// The counts of a check by their names in QEMU's answer.
pub(crate) type Counts = Vec<(&'static str, u64)>;

impl QemuCheck {
    /// Says whether there is an answer at all.
    pub(crate) fn has_checked(&self) -> bool {
        !self.json.is_empty()
    }

    /// The counts and the first lines.
    pub(crate) fn brief(&self) -> String {
        let lines = &self.lines[..self.lines.len().min(40)];
        format!("{:?}\n{}\n", self.counts(), lines.join("\n"))
    }

    pub(crate) fn counts(&self) -> Counts {
        let ours = counts(&CheckReport::default());
        ours.into_iter().map(|(key, _)| (key, self.number(key))).collect()
    }
}

pub(crate) fn counts(report: &CheckReport) -> Counts {
    vec![
        ("check-errors", report.check_errors),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("image-end-offset", report.image_end_offset.0),
    ]
}

/// Asserts that all counts of the two are the same.
pub(crate) fn assert_same(name: &str, ours: &CheckReport, theirs: &QemuCheck) {
    let (counts, their_counts) = (counts(ours), theirs.counts());
    assert_eq!(counts, their_counts, "{name}: ours, then QEMU's: {ours:#?} {theirs:#?}");
}
