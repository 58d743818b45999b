//! Images as they come to be: file systems that guests or tools filled, deleted in, and wiped.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::file_system::FileSystem;
use crate::Outcome;
use crate::harness::locate_in;
use crate::run::{command, output, run, workspace};
use crate::scratch::Scratch;

/// An image to try, with what is in it.
pub(super) struct Input {
    pub(super) name: &'static str,
    pub(super) file_system: FileSystem,
    pub(super) image: String,
    /// A second disk of the same origin.
    pub(super) sibling: Option<String>,
}

/// A guest's life on top of the harness's own: a folder is copied, the free space wiped with zeros.
const WIPE: &str = "
mount -t $FS /dev/vda /mnt
cp -a /mnt/usr /mnt/usr.copy
sync
dd if=/dev/zero of=/mnt/zeros bs=1M 2> /dev/null || true
sync
rm /mnt/zeros
sync
umount /mnt
";

/// Boots a guest on a disk that `server` serves without finding zeros.
pub(super) fn guest(
    scratch: &Scratch,
    server: &Path,
    name: &'static str,
    file_system: FileSystem,
) -> Outcome<Input> {
    let (program, _) = locate_in("guest", "nbd.sh", &[])?;
    run(command(&program.with_file_name("setup").to_string_lossy(), &[]))?;
    let (image, script) = (scratch.file("guest.qcow2"), scratch.file("life.sh"));
    let bloat = program.with_file_name("scripts").join("bloat.sh");
    let bloat = fs::read_to_string(&bloat).map_err(|error| format!("no bloat.sh: {error}"))?;
    fs::write(&script, bloat + WIPE).map_err(|error| format!("cannot write {script}: {error}"))?;
    run(command("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1G"]))?;
    let of = format!("FS={}", file_system.word());
    let words = ["-o", "-t 500", "-i", &image, &script, &of, "ROUNDS=2", "--"];
    let mut guest = command(&program.to_string_lossy(), &words);
    guest.arg(server).args(["serve", "disk={image}", "-f", "qcow2", "-t", "-k", "{socket}"]);
    run(guest)?;
    Ok(Input { name, file_system, image, sibling: None })
}

/// A Debian system in ext4, whose package caches were deleted.
pub(super) fn debian(scratch: &Scratch) -> Outcome<Input> {
    let (tree, name) = tree()?;
    let (raw, other) = (scratch.file("debian.raw"), scratch.file("debian-2.raw"));
    let words = ["-q", "-F", "-t", "ext4", "-b", "4096", "-d", &tree.to_string_lossy(), &raw, "1G"];
    output(command("mke2fs", &words))?;
    output(command("cp", &["--sparse=always", &raw, &other]))?;
    delete_below(&raw, &tree, &["var/cache/apt", "var/lib/apt/lists", "usr/share/doc"])?;
    // Another machine of the same template: something else is deleted, something is added.
    delete_below(&other, &tree, &["usr/share/locale"])?;
    let own = std::env::current_exe().map_err(|error| format!("who am I? {error}"))?;
    output(command("debugfs", &["-w", "-R", &format!("write {} added", own.display()), &other]))?;
    for raw in [&raw, &other] {
        output(command("zerofree", &[raw]))?;
    }
    let image = stored_in_full(scratch, &raw, "debian.qcow2")?;
    let sibling = Some(stored_in_full(scratch, &other, "debian-2.qcow2")?);
    Ok(Input { name, file_system: FileSystem::Ext4, image, sibling })
}

/// Makes a Debian system, once: by debootstrap where we may, else by unpacking packages.
fn tree() -> Outcome<(PathBuf, &'static str)> {
    let folder = workspace().join("target").join("real-debian");
    let is_root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    let name = match is_root {
        true => "Debian by debootstrap, wiped",
        false => "Debian packages unpacked, wiped",
    };
    if folder.join("usr").is_dir() {
        return Ok((folder, name));
    }
    let unfinished = folder.with_extension("unfinished");
    let path = unfinished.to_string_lossy();
    let script = match is_root {
        true => "debootstrap --variant=minbase stable \"$0\" > /dev/null",
        false => {
            "mkdir -p \"$0/packages\" && cd \"$0/packages\" && apt-get -q download \
             base-files bash coreutils dpkg libc6 perl-base tar util-linux tzdata python3-minimal && \
             for package in *.deb; do dpkg-deb -x \"$package\" \"$0\"; done"
        }
    };
    run(command("bash", &["-c", script, &path]))?;
    fs::rename(&unfinished, &folder).map_err(|error| format!("cannot rename {path}: {error}"))?;
    Ok((folder, name))
}

/// Deletes the files of folders, in the image of a tree.
fn delete_below(raw: &str, tree: &Path, folders: &[&str]) -> Outcome {
    let mut script = String::new();
    for folder in folders {
        let files = output(command("find", &[&tree.join(folder).to_string_lossy(), "-type", "f"]));
        for file in files.unwrap_or_default().lines() {
            let inside = Path::new(file).strip_prefix(tree).map_err(|error| error.to_string())?;
            script += &format!("rm \"/{}\"\n", inside.display());
        }
    }
    let list = format!("{raw}.commands");
    fs::write(&list, script).map_err(|error| format!("cannot write {list}: {error}"))?;
    output(command("debugfs", &["-w", "-f", &list, raw])).map(drop)
}

/// Programs and libraries in NTFS, with copies, of which some were emptied again.
pub(super) fn ntfs(scratch: &Scratch) -> Outcome<Input> {
    let (raw, other) = (scratch.file("ntfs.raw"), scratch.file("ntfs-2.raw"));
    let make = "truncate -s 512M \"$0\" && mkntfs -F -Q -q \"$0\" 2> /dev/null";
    output(command("bash", &["-c", make, &raw]))?;
    let find = ["/usr/bin", "/usr/lib", "-type", "f", "-size", "+64k", "-size", "-4M", "-readable"];
    let found = output(command("find", &find)).unwrap_or_default();
    let mut files: Vec<&str> = found.lines().collect();
    files.sort_unstable();
    files.truncate(NTFS_FILES);
    let (mut kept, empty) = (Vec::new(), scratch.file("empty"));
    fs::write(&empty, "").map_err(|error| format!("cannot write {empty}: {error}"))?;
    for (number, file) in files.iter().enumerate() {
        for kind in ["file", "copy", "gone"] {
            output(command("ntfscp", &["-q", &raw, file, &format!("{kind}-{number}")]))?;
        }
        kept.extend([format!("file-{number}"), format!("copy-{number}")]);
    }
    for number in 0..files.len() {
        output(command("ntfscp", &["-q", &raw, &empty, &format!("gone-{number}")]))?;
    }
    output(command("cp", &["--sparse=always", &raw, &other]))?;
    for number in (0..files.len()).step_by(5) {
        output(command("ntfscp", &["-q", &other, files[0], &format!("gone-{number}")]))?;
    }
    for raw in [&raw, &other] {
        output(command("ntfswipe", &["-f", "-U", raw]))?;
    }
    let image = stored_in_full(scratch, &raw, "ntfs.qcow2")?;
    let sibling = Some(stored_in_full(scratch, &other, "ntfs-2.qcow2")?);
    let name = "NTFS with copies, wiped";
    Ok(Input { name, file_system: FileSystem::Ntfs { files: kept }, image, sibling })
}

/// How many files go into NTFS, each three times.
const NTFS_FILES: usize = 60;

/// Makes the image of a disk that was wiped: zeros are stored as data.
fn stored_in_full(scratch: &Scratch, raw: &str, name: &str) -> Outcome<String> {
    let image = scratch.file(name);
    let words = ["convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, &image];
    output(command("qemu-img", &words))?;
    fs::remove_file(raw).map_err(|error| format!("{raw} stays behind: {error}"))?;
    Ok(image)
}
