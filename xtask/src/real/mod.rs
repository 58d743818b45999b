//! Real file systems before and after: `reclaim --dedup` and `dedup --across` on images that guests
//! and tools made.
//!
//! * `inputs.rs` makes the images
//! * `file_system.rs` checks and hashes what is in them
//!
//! For each image: a dry run changes no byte; afterwards `qemu-img check` is clean, `qemu-img compare`
//! finds the same disk, the file system's own checker finds nothing, and every file has its hash.

mod file_system;
mod inputs;

use std::path::Path;

use serde_json::Value;

use self::file_system::FileSystem;
use self::inputs::Input;
use crate::cells::mib;
use crate::looks::length;
use crate::run::{built, command, json, output};
use crate::scratch::Scratch;
use crate::{Outcome, looks, setup};

/// What there is to try.
const INPUTS: [&str; 4] = ["guest-ext4", "guest-btrfs", "debian", "ntfs"];
/// What an image, its copy, its raw disk and its files may take.
const NEEDED_BYTES: u64 = 10 << 30;

const HEADER: &str = "\
| disk | files | file before | a dry run said | after `reclaim --dedup` | clusters that share | `qemu-img convert` |
|---|---|---|---|---|---|---|";
const ACROSS: &str = "
| two disks | on the host before | base and overlays after `dedup --across` |
|---|---|---|";

/// Tries the inputs that are named, or all.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    let names = match arguments {
        [] => INPUTS.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    if let Some(name) = names.iter().find(|name| !INPUTS.contains(name)) {
        return Err(format!("no input `{name}`: {}", INPUTS.join(", ")));
    }
    setup::file_systems()?;
    let ours = built("release")?;
    let (mut rows, mut across) = (vec![HEADER.to_owned()], vec![ACROSS.to_owned()]);
    for name in names {
        let scratch = Scratch::new("real")?;
        scratch.require(NEEDED_BYTES)?;
        let input = made(&scratch, &ours, name)?;
        let trial = Trial { ours: &ours, scratch: &scratch, input: &input };
        // Before the image itself changes.
        across.extend(trial.across()?);
        rows.push(trial.reclaim()?);
        eprintln!("{}", rows[rows.len() - 1]);
    }
    println!("{}\n{}", rows.join("\n"), across.join("\n"));
    Ok(())
}

/// Makes two disks of one Debian, for others to look at.
pub(crate) fn debian_pair(scratch: &Scratch) -> Outcome<[String; 2]> {
    let Input { image, sibling, .. } = inputs::debian(scratch)?;
    Ok([image, sibling.ok_or("a Debian has no sibling")?])
}

fn made(scratch: &Scratch, ours: &Path, name: &str) -> Outcome<Input> {
    match name {
        "guest-ext4" => inputs::guest(scratch, ours, "ext4 of a guest, wiped", FileSystem::Ext4),
        "guest-btrfs" => inputs::guest(scratch, ours, "btrfs of a guest, wiped", FileSystem::Btrfs),
        "debian" => inputs::debian(scratch),
        _ => inputs::ntfs(scratch),
    }
}

struct Trial<'a> {
    ours: &'a Path,
    scratch: &'a Scratch,
    input: &'a Input,
}

impl Trial<'_> {
    fn lacuna(&self, words: &[&str]) -> Outcome<String> {
        output(command(&self.ours.to_string_lossy(), words))
    }

    fn copy(&self, image: &str, name: &str) -> Outcome<String> {
        let copy = self.scratch.file(name);
        output(command("cp", &["--sparse=always", image, &copy]))?;
        Ok(copy)
    }

    /// Makes the image short; returns a row.
    fn reclaim(&self) -> Outcome<String> {
        let Input { name, image, file_system, .. } = self.input;
        let before = self.copy(image, "before.qcow2")?;
        let files = file_system.content(self.scratch, image)?;
        let dry = self.lacuna(&["reclaim", "--dry-run", "--dedup", "--report=json", image])?;
        output(command("cmp", &[image, &before]))?;
        let done = self.lacuna(&["reclaim", "--dedup", "--report=json", image])?;
        self.judge(image, &before)?;
        if file_system.content(self.scratch, image)? != files {
            return Err(format!("{name}: files differ after reclaim"));
        }
        let converted = self.scratch.file("converted.qcow2");
        output(command("qemu-img", &["convert", "-O", "qcow2", &before, &converted]))?;
        let (dry, done) = (json(&dry)?, json(&done)?);
        Ok(format!(
            "| {name} | {} | {} | {} | {} | {} | {} |",
            files.files(),
            mib(length(&before)?),
            mib(dry["after"]["file-bytes"].as_u64().unwrap_or_default()),
            mib(length(image)?),
            shared(&done),
            mib(length(&converted)?),
        ))
    }

    /// Moves what the disk and its sibling have in common to a base; returns a row.
    fn across(&self) -> Outcome<Option<String>> {
        let Input { name, image, sibling, file_system } = self.input;
        let Some(sibling) = sibling else { return Ok(None) };
        let images = [self.copy(image, "one.qcow2")?, self.copy(sibling, "two.qcow2")?];
        // Wiped disks have most zeros in common, which are no use in a base.
        for image in &images {
            self.lacuna(&["reclaim", "-q", image])?;
        }
        let befores = [self.copy(&images[0], "one.before")?, self.copy(&images[1], "two.before")?];
        let contents = self.contents(file_system, &images)?;
        let base = self.scratch.file("base.qcow2");
        self.lacuna(&["dedup", "-q", "--across", &images[0], &images[1], "--base", &base])?;
        for (image, before) in images.iter().zip(&befores) {
            self.judge(image, before)?;
        }
        looks::clean(&base)?;
        if self.contents(file_system, &images)? != contents {
            return Err(format!("{name}: files differ after dedup --across"));
        }
        let before = allocated(&befores)?;
        let after = allocated(&[&images[..], &[base]].concat())?;
        Ok(Some(format!("| {name}, twice | {} | {} |", mib(before), mib(after))))
    }

    fn contents(
        &self,
        file_system: &FileSystem,
        images: &[String; 2],
    ) -> Outcome<Vec<file_system::Content>> {
        // The second NTFS has the same names; what is added to it only is compared as bytes.
        images.iter().map(|image| file_system.content(self.scratch, image)).collect()
    }

    /// Has stock tools check an image and compare it with what it was.
    fn judge(&self, image: &str, before: &str) -> Outcome {
        looks::clean(image)?;
        looks::same("qcow2", before, image)
    }
}

fn shared(report: &Value) -> u64 {
    let steps = report["steps"].as_array().into_iter().flatten();
    steps.filter_map(|step| step["shared-clusters"].as_u64()).sum()
}

fn allocated(files: &[String]) -> Outcome<u64> {
    files.iter().map(|file| looks::allocated(Path::new(file))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_a_report() {
        let report = json(r#"{"steps": [{"shared-clusters": 3}, {"shared-clusters": 4}, {}]}"#);
        assert_eq!(shared(&report.unwrap()), 7);
        assert!(json("nothing").is_err());
    }

    #[test]
    fn unknown_inputs_are_refused_with_those_there_are() {
        let reason = run(&["fat".to_owned()]).unwrap_err();
        assert!(reason.contains("guest-btrfs"), "{reason}");
    }
}
