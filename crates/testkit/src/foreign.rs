//! Tools that others wrote, run to disagree with us.
//!
//! * Never: a missing tool is skipped; the panic names the line that installs it.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::SparseBytes;

/// A foreign program and the package that has it.
///
/// ```
/// let version = testkit::foreign::QEMU_IMG.succeed(["--version"]);
/// assert!(version.starts_with("qemu-img version"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    /// File name of the program.
    pub name: &'static str,
    /// Debian package.
    pub package: &'static str,
}

/// Puts loads on disks and verifies what it wrote.
pub const FIO: Tool = Tool { name: "fio", package: "fio" };
/// Copies from and to NBD servers.
pub const NBDCOPY: Tool = Tool { name: "nbdcopy", package: "libnbd-bin" };
/// Asks an NBD server.
pub const NBDINFO: Tool = Tool { name: "nbdinfo", package: "libnbd-bin" };
/// Talks to an NBD server in Python.
pub const NBDSH: Tool = Tool { name: "nbdsh", package: "python3-libnbd" };
/// Makes, checks and compares images.
pub const QEMU_IMG: Tool = Tool { name: "qemu-img", package: "qemu-utils" };
/// Reads and writes images by commands.
pub const QEMU_IO: Tool = Tool { name: "qemu-io", package: "qemu-utils" };
/// Serves images.
pub const QEMU_NBD: Tool = Tool { name: "qemu-nbd", package: "qemu-utils" };
/// Checks ext file systems.
pub const E2FSCK: Tool = Tool { name: "e2fsck", package: "e2fsprogs" };
/// Makes ext file systems.
pub const MKE2FS: Tool = Tool { name: "mke2fs", package: "e2fsprogs" };

/// What a program left: its exit code (-1 for a signal) and what it said.
///
/// ```
/// let finished = testkit::foreign::QEMU_IMG.run(["no-such-verb"]);
/// assert_eq!(finished.code, 1);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Tool {
    /// Returns a command for the tool, which also looks where only root's path leads.
    #[must_use]
    pub fn command(&self) -> Command {
        let places = ["/usr/sbin", "/sbin", "/usr/local/sbin"];
        let place = places.iter().map(|place| Path::new(place).join(self.name));
        let found = place.into_iter().find(|path| path.exists());
        Command::new(found.unwrap_or_else(|| self.name.into()))
    }

    /// Runs the tool with `arguments` and no input.
    ///
    /// # Panics
    /// If the tool is not installed.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        self.run_in(Path::new("."), arguments)
    }

    /// Runs the tool in `folder`, where names stored in images lead.
    ///
    /// # Panics
    /// If the tool is not installed.
    pub fn run_in<A: AsRef<OsStr>>(
        &self,
        folder: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Finished {
        let mut command = self.command();
        command.current_dir(folder).args(arguments).stdin(Stdio::null());
        self.finish(command.output())
    }

    /// Runs the tool and returns what it printed.
    ///
    /// # Panics
    /// If the tool is not installed, or its exit code is not 0.
    pub fn succeed<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        self.succeed_in(Path::new("."), arguments)
    }

    /// Runs the tool in `folder`, where names stored in images lead, and returns what it printed.
    ///
    /// # Panics
    /// If the tool is not installed, or its exit code is not 0.
    pub fn succeed_in<A: AsRef<OsStr>>(
        &self,
        folder: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> String {
        let arguments: Vec<_> = arguments.into_iter().collect();
        let shown: Vec<_> = arguments.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        let finished = self.run_in(folder, &arguments);
        assert!(
            finished.code == 0,
            "{} {}: exit code {}\n{}{}",
            self.name,
            shown.join(" "),
            finished.code,
            finished.stdout,
            finished.stderr
        );
        finished.stdout
    }

    fn finish(&self, output: std::io::Result<Output>) -> Finished {
        let output = match output {
            Ok(output) => output,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                panic!("{} not found: install with apt-get install {}", self.name, self.package)
            }
            Err(error) => panic!("{} cannot be started: {error}", self.name),
        };
        Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// What `qemu-img check` says of an image.
///
/// ```
/// use testkit::foreign::QemuCheck;
/// assert!(!QemuCheck { leaks: 1, ..QemuCheck::default() }.is_clean());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QemuCheck {
    /// Clusters whose refcount is too low, or entries that make no sense.
    pub corruptions: u64,
    /// Clusters whose refcount is too high.
    pub leaks: u64,
    /// Exit code.
    pub code: i32,
    /// Everything it said.
    pub text: String,
}

impl QemuCheck {
    /// Says whether there is nothing to complain of.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.code == 0 && self.corruptions == 0 && self.leaks == 0
    }

    /// Says whether there is nothing worse than leaks.
    #[must_use]
    pub const fn is_safe(&self) -> bool {
        matches!(self.code, 0 | 3) && self.corruptions == 0
    }
}

/// Runs `qemu-img check` on a qcow2 file.
///
/// # Panics
/// If the tool is not installed.
#[must_use]
pub fn qemu_img_check(path: &Path) -> QemuCheck {
    let path = &whole_path(path);
    let mut command = QEMU_IMG.command();
    command.args(["check", "-f", "qcow2"]).arg(path).stdin(Stdio::null());
    let finished = QEMU_IMG.finish(command.current_dir(folder_of(path)).output());
    let text = format!("{}{}", finished.stdout, finished.stderr);
    let number_before = |what: &str| {
        let line = text.lines().find(|line| line.contains(what))?;
        line.split_whitespace().next()?.parse().ok()
    };
    QemuCheck {
        corruptions: number_before("errors were found").unwrap_or(0),
        leaks: number_before("leaked clusters were found").unwrap_or(0),
        code: finished.code,
        text,
    }
}

/// Returns what `qemu-img convert` reads in a qcow2 file.
///
/// # Panics
/// If the tool is not installed, or failed.
#[must_use]
pub fn qemu_img_read(path: &Path) -> SparseBytes {
    let path = &whole_path(path);
    let folder = tempfile::tempdir().expect("a folder for what is read");
    let raw = folder.path().join("seen.raw");
    let words = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
    let words = words.into_iter().chain([path.as_os_str(), raw.as_os_str()]);
    QEMU_IMG.succeed_in(folder_of(path), words);
    SparseBytes::load(&raw)
}

/// Runs `qemu-io` commands on a qcow2 file and returns what it printed.
///
/// # Panics
/// If the tool is not installed, or a command failed.
pub fn qemu_io(path: &Path, commands: impl IntoIterator<Item = String>) -> String {
    let path = &whole_path(path);
    let mut words: Vec<std::ffi::OsString> = ["-f", "qcow2", "-d", "unmap"].map(Into::into).into();
    for command in commands {
        words.extend(["-c".into(), command.into()]);
    }
    words.push(path.into());
    let printed = QEMU_IO.succeed_in(folder_of(path), &words);
    let bad = ["failed", "error", "Pattern verification"];
    assert!(!bad.iter().any(|word| printed.contains(word)), "qemu-io {words:?}:\n{printed}");
    printed
}

fn whole_path(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The folder that relative names of data and backing files start from.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// Asserts that two images show the guest the same bytes.
///
/// # Panics
/// If the tool is not installed, or the images differ.
pub fn assert_same_guest(first: (&str, &Path), second: (&str, &Path)) {
    let words = ["compare", "-f", first.0, "-F", second.0].map(OsStr::new);
    QEMU_IMG.succeed(words.into_iter().chain([first.1.as_os_str(), second.1.as_os_str()]));
}
