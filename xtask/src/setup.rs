//! Installs the foreign tools that tests compare with: without them the tests fail, never skip.
//!
//! * Always: does nothing, and needs no network, where every tool is there.
//! * Never: changes the machine's apt settings; an extra source lives in a scratch folder.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use crate::Outcome;
use crate::run::{command, find, output, run};

/// The major version of QEMU whose tools the tests know.
const QEMU_MAJOR: u32 = 10;

/// A package and the programs of it that tests call.
struct Peer {
    package: &'static str,
    programs: &'static [&'static str],
}

const PEERS: [Peer; 8] = [
    Peer { package: "qemu-utils", programs: &["qemu-img", "qemu-io", "qemu-nbd"] },
    Peer { package: "libnbd-bin", programs: &["nbdinfo", "nbdcopy"] },
    Peer { package: "fio", programs: &["fio"] },
    Peer { package: "nbdkit", programs: &["nbdkit"] },
    Peer { package: "python3-libnbd", programs: &["nbdsh"] },
    Peer { package: "e2fsprogs", programs: &["mke2fs", "e2fsck", "debugfs"] },
    Peer { package: "systemd", programs: &["systemd-socket-activate"] },
    Peer { package: "time", programs: &["time"] },
];

/// What counts system calls in a benchmark; tests do without.
const TRACER: [Peer; 2] = [
    Peer { package: "strace", programs: &["strace"] },
    Peer { package: "qemu-utils", programs: &["qemu-img", "qemu-io", "qemu-nbd"] },
];

/// What the harness that boots a guest calls on this machine.
const GUEST: [Peer; 2] = [
    Peer { package: "kmod", programs: &["depmod"] },
    Peer { package: "qemu-utils", programs: &["qemu-img", "qemu-io", "qemu-nbd"] },
];

/// What makes an image small by booting a kernel beside it, for a benchmark.
const SPARSIFY: [Peer; 2] = [
    Peer { package: "libguestfs-tools", programs: &["virt-sparsify"] },
    Peer { package: "qemu-utils", programs: &["qemu-img", "qemu-io", "qemu-nbd"] },
];
/// The kernel that it boots, which no program tells of.
const KERNEL: &str = "linux-image-cloud-amd64";

/// What a benchmark of NBD compares with, and what makes certificates for it.
const WIRES: [Peer; 4] = [
    Peer { package: "qemu-utils", programs: &["qemu-img", "qemu-nbd"] },
    Peer { package: "libnbd-bin", programs: &["nbdcopy"] },
    Peer { package: "nbdkit", programs: &["nbdkit"] },
    Peer { package: "gnutls-bin", programs: &["certtool"] },
];

/// What makes, fills, checks and reads file systems without mounting them.
const FILE_SYSTEMS: [Peer; 7] = [
    Peer { package: "e2fsprogs", programs: &["mke2fs", "e2fsck", "debugfs"] },
    Peer { package: "zerofree", programs: &["zerofree"] },
    Peer { package: "btrfs-progs", programs: &["btrfs"] },
    Peer { package: "ntfs-3g", programs: &["mkntfs", "ntfscp", "ntfscat", "ntfsfix", "ntfswipe"] },
    Peer { package: "debootstrap", programs: &["debootstrap"] },
    Peer { package: "kmod", programs: &["depmod"] },
    Peer { package: "qemu-utils", programs: &["qemu-img", "qemu-io", "qemu-nbd"] },
];

/// Who else finds duplicates, for a benchmark.
const DEDUPLICATORS: [Peer; 4] = [
    Peer { package: "duperemove", programs: &["duperemove"] },
    Peer { package: "borgbackup", programs: &["borg"] },
    Peer { package: "restic", programs: &["restic"] },
    Peer { package: "libnbd-bin", programs: &["nbdcopy"] },
];

/// Installs what tests need and is missing.
pub(crate) fn peers() -> Outcome {
    ensure(&PEERS)
}

/// Installs what the benchmark that counts system calls needs and is missing.
pub(crate) fn tracer() -> Outcome {
    ensure(&TRACER)
}

/// Installs what sparsifying an image needs and is missing.
pub(crate) fn sparsify() -> Outcome {
    ensure(&SPARSIFY)?;
    let kernels = fs::read_dir("/boot").into_iter().flatten().flatten();
    let is_kernel = |name: std::ffi::OsString| name.to_string_lossy().starts_with("vmlinuz");
    match kernels.map(|entry| entry.file_name()).any(is_kernel) {
        true => Ok(()),
        false => install(&[KERNEL]),
    }
}

/// Installs what the benchmarks of NBD need and is missing.
pub(crate) fn peers_of_wires() -> Outcome {
    ensure(&WIRES)
}

/// Installs what real file systems need and is missing.
pub(crate) fn file_systems() -> Outcome {
    ensure(&FILE_SYSTEMS)
}

/// Installs who else finds duplicates.
pub(crate) fn deduplicators() -> Outcome {
    ensure(&DEDUPLICATORS)
}

/// Installs what booting a guest needs and is missing.
pub(crate) fn guest() -> Outcome {
    ensure(&GUEST)
}

fn ensure(peers: &[Peer]) -> Outcome {
    let missing: Vec<&str> =
        peers.iter().filter(|peer| !is_there(peer)).map(|peer| peer.package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing).map_err(|reason| {
        format!(
            "{reason}\ninstall the missing peers by hand: \
             apt-get update && apt-get install -y {}",
            missing.join(" ")
        )
    })?;
    match peers.iter().find(|peer| !has_programs(peer)) {
        Some(peer) => Err(format!("{} was installed, but not all of its programs", peer.package)),
        None => Ok(()),
    }
}

fn is_there(peer: &Peer) -> bool {
    has_programs(peer) && (peer.package != "qemu-utils" || qemu_is_new_enough())
}

fn has_programs(peer: &Peer) -> bool {
    peer.programs.iter().all(|program| find(program).is_some())
}

/// An older QEMU is replaced where that is possible; `peers` does not insist on it.
fn qemu_is_new_enough() -> bool {
    output(command("qemu-img", &["--version"]))
        .is_ok_and(|text| major_version(&text).is_some_and(|major| major >= QEMU_MAJOR))
}

fn major_version(text: &str) -> Option<u32> {
    text.split("version ").nth(1)?.split('.').next()?.parse().ok()
}

fn install(packages: &[&str]) -> Outcome {
    if find("apt-get").is_none() {
        return Err("there is no apt-get on this machine".into());
    }
    let sources = Sources::write().map_err(|error| format!("cannot write sources: {error}"))?;
    run(sources.apt(&["update"]))?;
    // A package may be there while one of its programs was removed by hand.
    let mut arguments = vec!["install", "-y", "--no-install-recommends", "--reinstall"];
    if let Some(release) = &sources.backports {
        arguments.extend(["-t", release]);
    }
    arguments.extend(packages);
    run(sources.apt(&arguments))
}

/// The machine's package sources, and Debian's backports where the release is too old for us.
struct Sources {
    parts: PathBuf,
    backports: Option<String>,
}

impl Sources {
    fn write() -> io::Result<Self> {
        let parts = std::env::temp_dir().join(format!("lacuna-apt-{}", std::process::id()));
        fs::create_dir_all(&parts)?;
        let backports = backports(&fs::read_to_string("/etc/os-release").unwrap_or_default());
        let sources = Self { parts, backports };
        for name in source_files(Path::new("/etc/apt/sources.list.d")) {
            fs::copy(&name, sources.parts.join(name.file_name().unwrap_or_default()))?;
        }
        if let Some(release) = &sources.backports {
            fs::write(sources.parts.join("lacuna-backports.list"), backports_line(release))?;
        }
        Ok(sources)
    }

    fn apt(&self, arguments: &[&str]) -> Command {
        let is_root = fs::metadata("/proc/self").is_ok_and(|own| {
            use std::os::unix::fs::MetadataExt;
            own.uid() == 0
        });
        let program = if is_root { "apt-get" } else { "sudo" };
        let mut apt = command(program, if is_root { &[] } else { &["-n", "apt-get"] });
        apt.arg("-o").arg(format!("Dir::Etc::sourceparts={}", self.parts.display()));
        apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        apt
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.parts) {
            eprintln!("{} stays behind: {error}", self.parts.display());
        }
    }
}

/// Names the backports release that has the QEMU we need: Debian 12 itself has version 7.2.
fn backports(os_release: &str) -> Option<String> {
    let is_debian_12 = os_release.lines().any(|line| line == "VERSION_CODENAME=bookworm");
    is_debian_12.then(|| "bookworm-backports".to_owned())
}

fn backports_line(release: &str) -> String {
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    format!("deb [signed-by={keys}] http://deb.debian.org/debian {release} main\n")
}

/// What apt itself would read of a folder: files ending in `.list` or `.sources`.
fn source_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let is_source = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "list" || extension == "sources")
    };
    entries.flatten().map(|entry| entry.path()).filter(is_source).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_found_in_qemus_own_words() {
        let text = "qemu-img version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(major_version(text), Some(10));
        assert_eq!(major_version("something else"), None);
    }

    #[test]
    fn only_debian_12_needs_backports() {
        let bookworm = backports("ID=debian\nVERSION_CODENAME=bookworm\n");
        assert_eq!(bookworm.as_deref(), Some("bookworm-backports"));
        assert_eq!(backports("ID=debian\nVERSION_CODENAME=trixie\n"), None);
    }
}
