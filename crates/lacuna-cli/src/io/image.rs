//! Commands about the image as a whole: open, close, reopen, truncate, length, info.

use lacuna::block::{Layer, Preallocation};
use lacuna::chain::{Sharing, UnnamedFormat};
use lacuna::qcow2::Access;
use lacuna::qcow2::format::Header;
use lacuna::storage::CacheMode;
use serde_json::Value;

use super::commands::{Command, Done, Failure};
use super::session::Session;
use super::transfer::number;
use crate::args::Parsed;
use crate::error::{CliError, CliResult, sentence};
use crate::options::{self, Asked};
use crate::output::io_size;
use crate::verbs::create::preallocation;
use crate::verbs::open::{
    cache_mode, check_force_share, hold_length, sharing, unnamed, writes_through,
};
use crate::verbs::resize::Change;
use crate::verbs::spec::ImageSpec;
use crate::verbs::{dump, specifics};

/// How an image is to be opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenFlags {
    pub(super) access: Access,
    pub(super) cache: CacheMode,
    pub(super) sharing: Sharing,
    /// Whether writes go to a file of their own that is gone when the image is closed.
    pub(super) snapshot: bool,
    pub(super) unnamed: UnnamedFormat,
    /// Whether the kernel's own asynchronous calls are asked for.
    pub(super) is_native: bool,
    /// Whether discards are passed on.
    pub(super) discards: Option<bool>,
    /// Whether what is read from below is kept.
    pub(super) copies_on_read: bool,
    /// Whether what is written is durable at once.
    pub(super) writes_through: bool,
}

impl OpenFlags {
    /// Reads the options of the program.
    pub(super) fn of_program(parsed: &Parsed) -> CliResult<Self> {
        check_mode(parsed, "aio", &["threads", "native", "io_uring"])?;
        check_mode(parsed, "discard", &["ignore", "off", "unmap", "on"])?;
        let cache = match parsed.last("cache") {
            Some(name) => cache_mode(name)
                .ok_or_else(|| CliError::new(format!("Invalid cache option: {name}")))?,
            None if parsed.has("nocache") => CacheMode::Direct,
            None => CacheMode::Buffered,
        };
        let is_native = parsed.has("native-aio") || parsed.last("aio") == Some("native");
        let discards = parsed.last("discard").map(|mode| ["unmap", "on"].contains(&mode));
        let access = super::access(parsed.has("read-only"));
        let (snapshot, unnamed) = (parsed.has("snapshot"), unnamed(parsed));
        let sharing = sharing(parsed);
        let copies_on_read = parsed.has("copy-on-read");
        let writes_through = parsed.last("cache").is_some_and(writes_through);
        Ok(Self {
            access,
            cache,
            sharing,
            snapshot,
            unnamed,
            is_native,
            discards,
            copies_on_read,
            writes_through,
        })
    }
}

fn check_mode(parsed: &Parsed, flag: &str, modes: &[&str]) -> CliResult<()> {
    match parsed.last(flag) {
        Some(mode) if !modes.contains(&mode) => {
            Err(CliError::new(format!("Invalid {flag} option: {mode}")))
        }
        _ => Ok(()),
    }
}

pub(super) fn open(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    let flags = match OpenFlags::of_program(&parsed) {
        Ok(flags) => flags,
        Err(error) => return session.report(error.text()),
    };
    let shown = match &parsed.operands[..] {
        [] => "",
        [file] => file,
        _ => return Err(Failure::Usage),
    };
    if session.has_image() {
        return session.report("file open already, try 'help close'");
    }
    let image = spec(&parsed, shown);
    if let Ok(image) = &image
        && let Err(error) = check_force_share(&parsed, image, "-U")
    {
        return session.report(error.text());
    }
    let opened = image.and_then(|image| session.open(image, &flags));
    match opened {
        Ok(()) => Ok(()),
        Err(error) if shown.is_empty() => session.report(&format!("can't open: {}", error.text())),
        Err(error) => session.report(&format!("can't open device {shown}: {}", error.text())),
    }
}

/// Joins `-o` and the file name.
fn spec(parsed: &Parsed, file: &str) -> CliResult<ImageSpec> {
    match options::parse(parsed.all("o"))? {
        Asked::Help => Err(CliError::new("Image options are driver and file.filename")),
        Asked::Values(given) if file.is_empty() => ImageSpec::from_pairs(file, given.into_pairs()),
        Asked::Values(given) => ImageSpec::from_name_and_pairs(file, given.into_pairs()),
    }
}

pub(super) fn close(session: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    match session.close() {
        Ok(_) => Ok(()),
        Err(error) => session.report(error.text()),
    }
}

pub(super) fn truncate(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    let mode = match preallocation(parsed.last("m").unwrap_or("off")) {
        Ok(mode) => mode,
        Err(name) => return session.report(&format!("Invalid preallocation mode '{name}'")),
    };
    let Some(text) = parsed.operands.first() else { return Err(Failure::Usage) };
    let new = number(session, text)?;
    match resized(session, new, mode) {
        Ok(()) => Ok(()),
        Err(error) => session.report(error.text()),
    }
}

fn resized(session: &mut Session<'_>, new: u64, mode: Preallocation) -> CliResult<()> {
    let image = session.image().map_err(|_| CliError::new("There is no image"))?;
    let disk = image.chain.disk();
    let change = Change { old: disk.size_bytes(), new, mode };
    let is_raw = disk.as_qcow2().is_none();
    let is_refused = is_raw && mode == Preallocation::Metadata;
    if mode != Preallocation::Off && new == change.old && !is_refused {
        return Ok(());
    }
    if mode != Preallocation::Off && new < change.old {
        return Err(CliError::new(match is_raw {
            true => "Cannot use preallocation for shrinking files",
            false => "Preallocation can't be used for shrinking an image",
        }));
    }
    if is_raw {
        hold_length(session.tool(), disk.storage())?;
    }
    change.make(&image.chain)?;
    // A raw disk learns its size when it is opened.
    if is_raw { session.reopen(|_| ()) } else { Ok(()) }
}

pub(super) fn length(session: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    let size = session.size_bytes()?;
    session.say(&format!("{}\n", io_size(size as f64)))
}

pub(super) fn info(session: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    let disk = session.disk()?;
    let Some(image) = disk.as_qcow2() else {
        return raw_info(session);
    };
    let header = image.header();
    let specific = match specifics(&header, image.storage()) {
        Ok(value) => value,
        Err(error) => return session.report(error.text()),
    };
    session.say(&described(&header, &specific))
}

/// What stands for a disk without being one has nothing more to say.
fn raw_info(session: &mut Session<'_>) -> Done {
    let name = session.image()?.request.image.disk.storage_name;
    match name {
        None => session.say("format name: raw\ncluster size: 0 bytes\nvm state offset: 0 bytes\n"),
        // The name of the format, and that of the protocol.
        Some(name) => {
            session.say(&format!("format name: {name}\nformat name: {name}\n"))?;
            match name.starts_with("null") {
                true => Err(Failure::Said),
                false => session.say("cluster size: 0 bytes\nvm state offset: 0 bytes\n"),
            }
        }
    }
}

fn described(header: &Header, specific: &Value) -> String {
    let mut text = format!(
        "format name: qcow2\ncluster size: {}\nvm state offset: {}\nFormat specific information:\n",
        io_size(header.geometry.cluster_bytes() as f64),
        io_size(vm_state_offset(header) as f64),
    );
    dump(&mut text, specific, 1);
    text
}

/// The state of a virtual machine lies behind the part of the disk that whole L2 tables cover.
fn vm_state_offset(header: &Header) -> u64 {
    let geometry = header.geometry;
    let covered = geometry.l2_entries() * geometry.cluster_bytes();
    header.size_bytes.div_ceil(covered).saturating_mul(covered)
}

/// Reports an error of the library in the words of its author.
pub(super) fn report_error(session: &Session<'_>, error: &lacuna::Error) -> Done {
    session.report(&sentence(error))
}
