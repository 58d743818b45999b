//! What stock tools make of what a power loss left.

use std::path::Path;

use testkit::foreign::{qemu_img_check, qemu_img_read, qemu_io};

use crate::judge::Left;
use crate::stage::Stage;
use crate::truth::Allowed;

/// `qemu-img check` finds leaks at worst, and what `qemu-img convert` reads is allowed; then `qemu-io` writes,
/// and the check is as before.
///
/// # Errors
/// What must not be.
pub(crate) fn look(stage: &Stage, allowed: &Allowed<'_>, left: &Left) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let path = save(stage, left, folder.path());
    let is_dirty = left.is_dirty()?;
    let safe = |when: &str| {
        let found = qemu_img_check(&path);
        if found.is_safe() { Ok(()) } else { Err(format!("qemu-img check {when}: {}", found.text)) }
    };
    if !is_dirty {
        safe("as it was left")?;
    }
    let seen = qemu_img_read(&path).to_vec();
    allowed.disk.judge(&seen).map_err(|error| format!("As qemu-img reads it: {error}"))?;
    // Opening for writing repairs what is dirty.
    let most = seen.len() / 512 * 512;
    let len = most.min(3 << 9);
    qemu_io(&path, [format!("write -q -P 7 {} {len}", most - len), "flush".into()]);
    safe("after qemu-io")
}

/// Writes all files; returns where the image is.
fn save(stage: &Stage, left: &Left, folder: &Path) -> std::path::PathBuf {
    if let Some(data) = &left.data {
        data.save(&folder.join("data.raw"));
    }
    for beside in &stage.beside {
        beside.file.save(&folder.join(&beside.name));
    }
    if let Some(base) = &left.base {
        base.save(&folder.join("backing.img"));
    }
    let path = folder.join("image.qcow2");
    left.image.save(&path);
    path
}
