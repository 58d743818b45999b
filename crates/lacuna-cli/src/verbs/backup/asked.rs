//! What the command line wants, checked as far as that goes without opening anything.

use std::path::PathBuf;

use lacuna::qcow2::SnapshotChoice;
use lacuna_backup::{CopyOptions, Form, PointName};

use super::super::ctl::CONTROL;
use super::super::snapshot;
use crate::args::Parsed;
use crate::control::commands::{DIRECTORY, SPACE, WHEN_FULL};
use crate::error::{CliError, CliResult};
use crate::persona::Tool;
use crate::size;

/// Levels that can be told apart over NBD.
const MAX_LEVELS: u64 = 30;

/// How it is to be known what changed.
#[derive(Clone, Debug)]
pub(super) enum By {
    /// Nothing: all is copied.
    Nothing,
    /// A dirty bitmap, which begins anew with the point unless it is kept.
    Bitmap { name: String, is_kept: bool },
    /// What differs from an internal snapshot.
    Snapshot(SnapshotChoice),
    /// What the highest levels of the chain hold.
    Levels(u32),
}

/// The wish of a user.
pub(super) struct Wish {
    pub(super) by: By,
    /// The snapshot that is copied, not the disk.
    pub(super) at: Option<SnapshotChoice>,
    /// All, whatever there is to stand on.
    pub(super) is_full: bool,
    /// The point to stand on.
    pub(super) since: Option<PointName>,
    /// What to call the point.
    pub(super) name: Option<PointName>,
    /// The form of a new folder.
    pub(super) form: Option<Form>,
    pub(super) is_unchanged: bool,
    /// The control socket of the server whose disk is copied as it is at one moment.
    pub(super) control: Option<PathBuf>,
    pub(super) copy: CopyOptions,
}

impl Wish {
    pub(super) fn read(tool: &Tool, parsed: &Parsed) -> CliResult<Self> {
        let at = parsed.last("source-snapshot").map(|text| snapshot::choice(tool, text));
        let point = |flag| parsed.last(flag).map(PointName::new).transpose();
        let wish = Self {
            by: by(tool, parsed)?,
            at: at.transpose()?,
            is_full: parsed.has("full"),
            since: point("since")?,
            name: point("point")?,
            form: parsed.last("target-format").map(form).transpose()?,
            is_unchanged: parsed.has("unchanged"),
            control: parsed.last(CONTROL.long).map(PathBuf::from),
            copy: copy_options(parsed)?,
        };
        wish.check()?;
        let needs_control = [DIRECTORY, SPACE, WHEN_FULL].map(|flag| flag.long);
        match needs_control.into_iter().find(|flag| parsed.has(flag)) {
            Some(flag) if wish.control.is_none() => {
                Err(CliError::usage(format!("--{flag} needs --control, whose server it is about")))
            }
            _ => Ok(wish),
        }
    }

    fn check(&self) -> CliResult<()> {
        let is_bitmap = matches!(self.by, By::Bitmap { .. });
        let problem = match &self.by {
            By::Nothing if self.since.is_some() => {
                "--since needs --bitmap, --since-snapshot or --levels, which say what changed"
            }
            By::Bitmap { is_kept: true, .. } if self.is_full => {
                "--full begins the bitmap anew, which --keep-bitmap forbids"
            }
            _ if is_bitmap && self.at.is_some() => {
                "A bitmap tells of the disk as it is now, not of a snapshot of it"
            }
            By::Levels(_) if self.at.is_some() => {
                "--levels tells of the disk as it is now, not of a snapshot of it"
            }
            By::Snapshot(_) | By::Levels(_) if self.control.is_some() => {
                "A server keeps a moment of a disk with --bitmap, or all of it"
            }
            _ if self.at.is_some() && self.control.is_some() => {
                "A server keeps a moment of a disk, not of a snapshot of it"
            }
            By::Snapshot(_) | By::Levels(_) if self.is_full => {
                "--full asks for all, --since-snapshot and --levels for a part"
            }
            _ => return Ok(()),
        };
        Err(CliError::usage(problem))
    }
}

fn by(tool: &Tool, parsed: &Parsed) -> CliResult<By> {
    let is_kept = parsed.has("keep-bitmap");
    let given = ["bitmap", "since-snapshot", "levels"].map(|flag| parsed.last(flag));
    match given {
        [Some(name), None, None] => Ok(By::Bitmap { name: name.to_owned(), is_kept }),
        _ if is_kept => Err(CliError::usage("--keep-bitmap needs --bitmap, and nothing else")),
        [None, None, None] => Ok(By::Nothing),
        [None, Some(text), None] => snapshot::choice(tool, text).map(By::Snapshot),
        [None, None, Some(text)] => {
            let count = size::within("number of levels", text, 1, MAX_LEVELS)?;
            Ok(By::Levels(count as u32))
        }
        _ => Err(CliError::usage(
            "--bitmap, --since-snapshot and --levels each say what changed; one is enough",
        )),
    }
}

fn form(text: &str) -> CliResult<Form> {
    [Form::Segments, Form::Qcow2].into_iter().find(|form| form.name() == text).ok_or_else(|| {
        CliError::new(format!("Restore points cannot be kept as '{text}'"))
            .with_hint("-O segments and -O qcow2 are right")
    })
}

fn copy_options(parsed: &Parsed) -> CliResult<CopyOptions> {
    let mut options = CopyOptions::default();
    if let Some(text) = parsed.last("level") {
        options.level = size::within("compression level", text, 1, 22)? as i32;
    }
    if let Some(text) = parsed.last("segment-size") {
        options.durable_every_bytes = size::within("segment size", text, 1 << 20, 1 << 40)?;
    }
    Ok(options)
}
