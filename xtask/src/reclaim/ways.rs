//! Who makes an image short.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::command;
use crate::scratch::Scratch;
use crate::watched::{Cost, watch};
use crate::{Outcome, setup};

/// A way to a short file.
#[derive(Debug)]
pub(super) enum Way {
    /// `lacuna reclaim`, in place.
    Ours(PathBuf),
    /// `qemu-img convert` to a second file, as it is called: without any flush.
    Convert,
    /// `virt-sparsify` to a second file: what it has beyond convert needs a file system to look at,
    /// and the disk has none.
    Sparsify,
}

impl Way {
    pub(super) fn all(ours: &Path) -> [Self; 3] {
        [Self::Ours(ours.to_owned()), Self::Convert, Self::Sparsify]
    }

    pub(super) const fn words(&self) -> &'static str {
        match self {
            Self::Ours(_) => "`lacuna reclaim`",
            Self::Convert => "`qemu-img convert`",
            Self::Sparsify => "`virt-sparsify`",
        }
    }

    /// Says whether a machine may be without it. It boots a kernel in an emulator, which not every
    /// machine allows.
    pub(super) const fn may_be_missing(&self) -> bool {
        matches!(self, Self::Sparsify)
    }

    /// Makes `image` short, or a file beside it; returns which is the result.
    pub(super) fn run(&self, scratch: &Scratch, image: &str) -> Outcome<(Cost, String)> {
        let target = scratch.file("target");
        let (mut program, result) = match self {
            Self::Ours(program) => {
                (command(&program.to_string_lossy(), &["reclaim", "-q", image]), image)
            }
            Self::Convert => {
                let words = ["convert", "-f", "qcow2", "-O", "qcow2", image, &target];
                (command("qemu-img", &words), &target[..])
            }
            Self::Sparsify => (sparsify(scratch, image, &target)?, &target[..]),
        };
        let (cost, _) = watch(&mut program, scratch.path())?;
        Ok((cost, result.to_owned()))
    }
}

/// Without libvirt, and without KVM, which may be there and still boot nothing.
fn sparsify(scratch: &Scratch, image: &str, target: &str) -> Outcome<Command> {
    setup::sparsify()?;
    let folder = scratch.file("");
    let words = ["--quiet", "--format", "qcow2", "--convert", "qcow2", "--tmp", &folder];
    let mut program = command("virt-sparsify", &[&words[..], &[image, target]].concat());
    program.env("LIBGUESTFS_BACKEND", "direct").env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
    Ok(program)
}
