//! What others find in two disks of one origin, beside `lacuna dedup --report`.
//!
//! Compared is what is left once everything is stored once. Chunks are as like ours as each allows:
//! borg cuts at fixed places where told to; restic cuts by content only, at about 1 MiB; duperemove
//! has blocks, and a file system with reflinks, which takes root to mount. It shares whole extents well,
//! so that each chunk is one there.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::cells::{mib, on_one_line};
use crate::real::debian_pair;
use crate::run::{command, json, output};
use crate::scratch::Scratch;
use crate::watched::{Cost, watch};
use crate::{Outcome, setup};

/// What a file that is opened past the page cache asks of buffers, and how that is asked for.
const ALIGNMENT: usize = 4096;
const O_DIRECT: i32 = if cfg!(target_arch = "aarch64") { 0x1_0000 } else { 0x4000 };

pub(super) fn run(ours: &Path, scratch: &Scratch) -> Outcome<String> {
    setup::deduplicators()?;
    setup::file_systems()?;
    scratch.require(10 << 30)?;
    let images = debian_pair(scratch)?;
    let raws = [scratch.file("one.raw"), scratch.file("two.raw")];
    for (image, raw) in images.iter().zip(&raws) {
        output(command("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, raw]))?;
    }
    let bench = Bench { ours, scratch, images, raws };
    let mut lines = vec![
        "| two disks of one Debian, by | chunks | data left | CPU | wall |".to_owned(),
        "|---|---|---|---|---|".to_owned(),
    ];
    lines.extend(bench.lacuna()?);
    lines.push(bench.borg("4 KiB, fixed", "fixed,4096")?);
    lines.push(bench.borg("64 KiB, fixed", "fixed,65536")?);
    lines.push(bench.borg("by content, about 2 MiB", "buzhash,19,23,21,4095")?);
    lines.push(bench.restic()?);
    for size in ["4K", "64K"] {
        lines.push(bench.duperemove(size).unwrap_or_else(|reason| {
            format!("| duperemove | {size}iB | cannot run here: {} | | |", on_one_line(&reason))
        }));
    }
    Ok(lines.join("\n"))
}

struct Bench<'a> {
    ours: &'a Path,
    scratch: &'a Scratch,
    images: [String; 2],
    /// The same disks, with holes where zeros are.
    raws: [String; 2],
}

impl Bench<'_> {
    fn watched(&self, program: &mut Command) -> Outcome<(Cost, String)> {
        watch(program, self.scratch.path())
    }

    fn lacuna(&self) -> Outcome<Vec<String>> {
        let words = ["dedup", "--report", "--output=json", &self.images[0], &self.images[1]];
        let (cost, said) = self.watched(&mut command(&self.ours.to_string_lossy(), &words))?;
        let report = json(&said)?;
        let sizes = report["sizes"].as_array().cloned().unwrap_or_default();
        let row = |size: &Value| {
            let cluster = size["cluster-size"].as_u64()?;
            let count = size["all"]["distinct-clusters"].as_u64()?;
            let chunks = format!("{} KiB, fixed", cluster >> 10);
            let is_shown = [4096, 65536].contains(&cluster);
            is_shown.then(|| {
                row("`dedup --report`, all sizes at once", &chunks, count * cluster, &cost)
            })
        };
        Ok(sizes.iter().filter_map(row).collect())
    }

    fn borg(&self, chunks: &str, parameters: &str) -> Outcome<String> {
        let repository = self.scratch.file("borg");
        let own = |words: &[&str]| {
            let mut borg = command("borg", words);
            borg.env("BORG_BASE_DIR", self.scratch.file("borg-own"));
            borg
        };
        output(own(&["init", "-e", "none", &repository]))?;
        let archive = format!("{repository}::both");
        let words = ["create", "--json", "--sparse", "-C", "none", "--chunker-params", parameters];
        let mut create = own(&[&words[..], &[&archive, &self.raws[0], &self.raws[1]]].concat());
        let (cost, said) = self.watched(&mut create)?;
        output(command("rm", &["-rf", &repository, &self.scratch.file("borg-own")]))?;
        let left = json(&said)?["archive"]["stats"]["deduplicated_size"].as_u64();
        let left = left.ok_or_else(|| format!("borg says no size: {said}"))?;
        Ok(row("`borg create`", chunks, left, &cost))
    }

    fn restic(&self) -> Outcome<String> {
        let repository = self.scratch.file("restic");
        let own = |words: &[&str]| {
            let mut restic = command("restic", &["--no-cache", "-r", &repository]);
            restic.args(words).env("RESTIC_PASSWORD", "bench");
            restic
        };
        output(own(&["init", "-q"]))?;
        let mut backup = own(&["backup", "--json", &self.raws[0], &self.raws[1]]);
        let (cost, said) = self.watched(&mut backup)?;
        output(command("rm", &["-rf", &repository]))?;
        let summary = said.lines().rfind(|line| line.contains("\"summary\"")).unwrap_or_default();
        let left = json(summary)?["data_added"].as_u64();
        let left = left.ok_or_else(|| format!("restic says no size: {said}"))?;
        Ok(row("`restic backup`", "by content, about 1 MiB", left, &cost))
    }

    /// On a btrfs of its own, in a file.
    fn duperemove(&self, size: &str) -> Outcome<String> {
        let (disk, folder) = (self.scratch.file("btrfs"), self.scratch.file("mounted"));
        let mount = "truncate -s 4G \"$0\" && mkfs.btrfs -q -f \"$0\" && mkdir -p \"$1\" && \
                     mount -o loop \"$0\" \"$1\"";
        output(command("bash", &["-c", mount, &disk, &folder]))?;
        let done = self.duperemove_in(&folder, size);
        output(command("umount", &[&folder]))?;
        output(command("rm", &["-f", &disk]))?;
        let (left, shared, cost) = done?;
        let who = format!("`duperemove -d`, {} MiB of extents shared", shared >> 20);
        Ok(row(&who, &format!("{size}iB, fixed"), left, &cost))
    }

    fn duperemove_in(&self, folder: &str, size: &str) -> Outcome<(u64, u64, Cost)> {
        let chunk = if size == "4K" { 4 << 10 } else { 64 << 10 };
        interleave(&self.raws, Path::new(folder), chunk)
            .map_err(|error| format!("Writing to {folder}: {error}"))?;
        output(command("sync", &["-f", folder]))?;
        let words = ["-dr", "-b", size, "--dedupe-options=same", folder];
        let (cost, said) = self.watched(&mut command("duperemove", &words))?;
        output(command("sync", &["-f", folder]))?;
        let facts = output(command("btrfs", &["filesystem", "df", "--raw", folder]))?;
        Ok((used(&facts)?, shared(&said), cost))
    }
}

/// Copies two files by turns, chunk by chunk without the page cache, so that each chunk is an extent: of larger
/// ones duperemove finds but one equal part for each pair, and an extent of which a part is shared
/// keeps its place on btrfs. What is zeros stays a hole.
fn interleave(files: &[String; 2], folder: &Path, chunk: usize) -> io::Result<()> {
    let mut buffer = vec![0; chunk + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut buffer[start..start + chunk];
    let mut pairs = Vec::new();
    for (file, name) in files.iter().zip(["one.raw", "two.raw"]) {
        let mut options = File::options();
        let target = options.write(true).create_new(true).custom_flags(O_DIRECT);
        pairs.push((File::open(file)?, target.open(folder.join(name))?));
    }
    let mut at = 0;
    loop {
        let mut is_over = true;
        for (source, target) in &pairs {
            let len = source.read_at(buffer, at)?;
            is_over &= len == 0;
            buffer[len..].fill(0);
            if buffer.iter().any(|byte| *byte != 0) {
                target.write_all_at(buffer, at)?;
            }
        }
        if is_over {
            return Ok(());
        }
        at += chunk as u64;
    }
}

/// Reads what btrfs has in use for data.
fn used(said: &str) -> Outcome<u64> {
    let line = said.lines().find(|line| line.starts_with("Data"));
    let used = line.and_then(|line| line.rsplit("used=").next()?.trim().parse().ok());
    used.ok_or_else(|| format!("btrfs says no size: {said}"))
}

/// Reads what duperemove says it has had shared: nothing where it says nothing.
fn shared(said: &str) -> u64 {
    let line = said.lines().rfind(|line| line.contains("net change in shared extents of:"));
    let bytes = line.and_then(|line| line.rsplit(": ").next()?.trim().parse().ok());
    bytes.unwrap_or_default()
}

fn row(who: &str, chunks: &str, left_bytes: u64, cost: &Cost) -> String {
    format!("| {who} | {chunks} | {} | {:.2} s | {:.1} s |", mib(left_bytes), cost.cpu, cost.wall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_copied_by_turns_are_the_same_but_for_holes_and_a_whole_last_chunk() {
        let folder = std::env::temp_dir().join(format!("lacuna-turns-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let of = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let (short, long) = ([&[7; 5000][..], &[0; 9000]].concat(), vec![9; 20_000]);
        std::fs::write(of("a"), &short).unwrap();
        std::fs::write(of("b"), &long).unwrap();
        interleave(&[of("a"), of("b")], &folder, 4096).unwrap();
        let (one, two) =
            (std::fs::read(of("one.raw")).unwrap(), std::fs::read(of("two.raw")).unwrap());
        assert!(one.len() == 8192 && one[..5000] == short[..5000]);
        assert!(one[5000..].iter().all(|byte| *byte == 0));
        assert_eq!(two[..20_000], long[..]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_btrfs_uses_is_read_from_its_words() {
        let said = "Data, single: total=8388608, used=5242880\nSystem, DUP: total=1, used=2\n";
        assert_eq!(used(said), Ok(5_242_880));
        assert!(used("Metadata").is_err());
        assert_eq!(shared("Comparison shows a net change in shared extents of: 4096\n"), 4096);
        assert_eq!(shared("nothing"), 0);
    }
}
