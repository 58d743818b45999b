//! Runs the same shell lines with the stock tools and with ours, in a folder each.

#![allow(dead_code, reason = "each test program uses its part of this module")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// The stock tools, as installed.
const STOCK: &str = "/usr/bin";
/// Functions of the shell that every line may call.
const FUNCTIONS: [(&str, &str); 3] = [
    // Says whether somebody listens on this socket of the folder: its file is there a moment earlier.
    ("listens", "grep -q \"00010000 .* $PWD/$1\\$\" /proc/net/unix"),
    ("awaited", "until listens $1; do sleep 0.01; done"),
    // Has `stock-io` with these arguments keep an image open, until `exec 3>&-; wait`: the prompt comes
    // when it is open.
    (
        "held",
        "mkfifo commands; stock-io \"$@\" <commands >prompt & exec 3>commands
         timeout 60 sh -c 'until grep -q \\> prompt; do sleep 0.01; done'",
    ),
];
/// What to do where they are missing.
const INSTALL: &str = "the stock tools are missing: apt-get install qemu-utils";

/// A folder to work in, with `qemu-img`, `qemu-io` and `qemu-nbd` of one make; `stock-img`,
/// `stock-io` and `stock-nbd` are the stock ones in any case, for preparations.
pub(crate) struct Sandbox {
    folder: TempDir,
}

/// What a line printed, errors among the rest, and its exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) text: String,
    pub(crate) code: Option<i32>,
}

impl Sandbox {
    /// Makes a folder with the stock tools.
    pub(crate) fn stock() -> Self {
        Self::with(|name| Path::new(STOCK).join(name))
    }

    /// Makes a folder with our tools.
    pub(crate) fn ours() -> Self {
        Self::with(|_| PathBuf::from(env!("CARGO_BIN_EXE_lacuna")))
    }

    fn with(tool: impl Fn(&str) -> PathBuf) -> Self {
        let folder = TempDir::new().unwrap();
        let bin = folder.path().join("bin");
        std::fs::create_dir_all(&bin).unwrap();
        let link = |target: &Path, name: &str| {
            std::os::unix::fs::symlink(target, bin.join(name)).unwrap();
        };
        for (kind, name) in [("img", "qemu-img"), ("io", "qemu-io"), ("nbd", "qemu-nbd")] {
            let stock = Path::new(STOCK).join(name);
            assert!(stock.exists(), "{INSTALL}");
            link(&tool(name), name);
            link(&stock, &format!("stock-{kind}"));
        }
        link(Path::new(env!("CARGO_BIN_EXE_lacuna")), "lacuna");
        std::fs::create_dir(folder.path().join("work")).unwrap();
        Self { folder }
    }

    /// Lets other users in, and at our program, which lies in the folder of whoever built it.
    pub(crate) fn open_to_everybody(&self) {
        use std::os::unix::fs::PermissionsExt;
        let own = self.folder.path().join("own");
        std::fs::copy(env!("CARGO_BIN_EXE_lacuna"), &own).unwrap();
        let bin = self.folder.path().join("bin");
        for name in ["qemu-img", "qemu-io", "lacuna"] {
            let link = bin.join(name);
            if std::fs::read_link(&link).unwrap() == Path::new(env!("CARGO_BIN_EXE_lacuna")) {
                std::fs::remove_file(&link).unwrap();
                std::os::unix::fs::symlink(&own, &link).unwrap();
            }
        }
        let everybody = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(self.folder.path(), everybody).unwrap();
    }

    /// Returns the path of a file in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("work").join(name)
    }

    /// Returns the path of one of the programs.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.path().join("bin").join(name)
    }

    /// Returns the content of a file in the folder.
    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Runs a line of shell.
    pub(crate) fn run(&self, line: &str) -> Outcome {
        let output = self.command(&format!("{{ {line}\n}} 2>&1"));
        Outcome {
            text: normal(&String::from_utf8_lossy(&output.stdout)),
            code: output.status.code(),
        }
    }

    /// Runs a line that must succeed.
    pub(crate) fn prepare(&self, line: &str) {
        let output = self.command(line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {error}");
    }

    /// Runs a line and keeps its streams apart.
    pub(crate) fn command(&self, line: &str) -> Output {
        let bin = self.folder.path().join("bin");
        Command::new("bash")
            .args(["-c", line])
            .current_dir(self.folder.path().join("work"))
            .env("PATH", format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", bin.display()))
            .envs(
                FUNCTIONS.map(|(name, body)| {
                    (format!("BASH_FUNC_{name}%%"), format!("() {{ {body}\n}}"))
                }),
            )
            .env("TZ", "UTC")
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

/// Takes out what differs from run to run: times, rates, and how the host stores a file.
fn normal(text: &str) -> String {
    let mut lines: Vec<String> = text.lines().map(normal_line).collect();
    lines.push(String::new());
    lines.join("\n")
}

/// Starts a server that stays in the background: its exports are at `$a` and `$b`, `ctl` talks to it.
pub(crate) fn serving(exports: &str) -> String {
    format!(
        "ctl() {{ lacuna ctl --control ctl.sock \"$@\"; }}
         lacuna serve -t -k nbd.sock --control ctl.sock -f qcow2 {exports} > where & server=$!
         while ! [ -s where ]; do sleep 0.01; done
         a=nbd+unix:///a?socket=$PWD/nbd.sock; b=nbd+unix:///b?socket=$PWD/nbd.sock
         "
    )
}

/// Runs lines beside such a server, and ends it by `stop` if it is there still.
pub(crate) fn served(sandbox: &Sandbox, exports: &str, lines: &str) -> Outcome {
    let serving = serving(exports);
    sandbox.run(&format!(
        "{serving}{lines}\n[ -e ctl.sock ] && ctl stop; wait $server; echo server ended with $?"
    ))
}

fn normal_line(line: &str) -> String {
    for (start, end) in [(" ops; ", ""), ("disk size: ", ""), ("\"actual-size\": ", ",")] {
        if let Some((before, after)) = line.split_once(start) {
            let _how_much = after;
            return format!("{before}{start}...{end}");
        }
    }
    if line.starts_with("Run completed in ") {
        return "Run completed in ... seconds.".to_owned();
    }
    for key in ["\"date-sec\": ", "\"date-nsec\": ", "\"uuid\": "] {
        if let Some((before, _)) = line.split_once(key) {
            return format!("{before}{key}...");
        }
    }
    line.to_owned()
}

/// Runs each line with both makes and expects the same text and exit code.
///
/// Lines that begin with `#` are left out; a line goes on where the next one begins with blanks.
pub(crate) fn both(script: &str) -> (Sandbox, Sandbox) {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    both_in(&stock, &ours, script);
    (stock, ours)
}

/// As [`both`], in folders that were prepared.
pub(crate) fn both_in(stock: &Sandbox, ours: &Sandbox, script: &str) {
    let mut differences = String::new();
    for line in script.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (expected, got) = (stock.run(line), ours.run(line));
        if expected != got {
            differences += &format!(
                "$ {line}\n--- stock, exit code {:?}\n{}--- ours, exit code {:?}\n{}\n",
                expected.code, expected.text, got.code, got.text
            );
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

/// Expects files of the same bytes in both folders.
pub(crate) fn same_files(stock: &Sandbox, ours: &Sandbox, names: &[&str]) {
    for name in names {
        assert!(stock.bytes(name) == ours.bytes(name), "{name} differs");
    }
}
