//! Opens the images that a command line names.
//!
//! * What an image names (backing file, data file) is followed: naming the image on the command
//!   line is the user's consent. A backing file whose format the image leaves out is probed only
//!   under QEMU's names, as those programs do, or with `--probe-backing`; a guest may have written
//!   what a probe finds.

use std::path::Path;

use lacuna::chain::{self, Allow, ChainOptions, FormatChoice, Levels, Sharing, UnnamedFormat};
use lacuna::qcow2::{Access, ExtentDetail};
use lacuna::storage::{CacheMode, FileOptions, LockConflict, Obstacle, Permissions};
use lacuna::{Error, ErrorKind};
use pollster::block_on;

use super::qemu_words;
use super::spec::ImageSpec;
use super::spec::nbd::NbdSpec;
use super::spec::tree::{BelowSpec, FileKind, FileSpec};
use super::{advice, busy};
use crate::args::Parsed;
use crate::error::{CliError, CliResult, host_words, sentence};
use crate::format::Format;
use crate::objects::Objects;
use crate::output;
use crate::persona::{Persona, Tool};

use crate::nodes::{AnyStorage, Base, Opening};
pub(crate) use crate::nodes::{FileChain, FileChainParts};

/// How long the header of version 3 is at least; its length is the last field of those.
const SHORTEST_V3: u64 = 104;

/// What to open and how.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) image: ImageSpec,
    pub(crate) access: Access,
    pub(crate) cache: CacheMode,
    /// What others may do with it meanwhile.
    pub(crate) sharing: Sharing,
    /// Whether the user allows to guess the format of a backing file that the image leaves out.
    pub(crate) unnamed: UnnamedFormat,
}

impl Request {
    /// Asks for the image of a verb, to be read: `name` is a file name, or options if
    /// `--image-opts` was given.
    pub(crate) fn reading(name: &str, parsed: &Parsed, format_flag: &str) -> CliResult<Self> {
        let format = parsed.last(format_flag);
        let image = match parsed.has("image-opts") {
            true if format.is_some() => {
                let text = format!("--image-opts and --{format_flag} are mutually exclusive");
                return Err(CliError::new(text));
            }
            true => ImageSpec::from_options(name),
            false => ImageSpec::from_name(name, format),
        };
        let image = image.and_then(|image| with_certificates(image, parsed));
        let image = image.map_err(|error| cannot_open(name, error))?;
        check_force_share(parsed, &image, "--force-share/-U")?;
        let (cache, sharing) = (CacheMode::Buffered, sharing(parsed));
        Ok(Self { image, access: Access::ReadOnly, cache, sharing, unnamed: unnamed(parsed) })
    }
}

/// Gives an image the certificates that its options name.
pub(crate) fn with_certificates(mut image: ImageSpec, parsed: &Parsed) -> CliResult<ImageSpec> {
    let objects = Objects::read(parsed.all("object"))?;
    image.disk.find_certificates(&objects)?;
    Ok(image)
}

/// Refuses `-U` for an image whose options say the opposite; `flag` is how that is called.
pub(crate) fn check_force_share(parsed: &Parsed, image: &ImageSpec, flag: &str) -> CliResult<()> {
    match parsed.has("force-share") && image.disk.common.force_share == Some(false) {
        true => Err(CliError::new(format!("{flag} conflicts with image options"))),
        false => Ok(()),
    }
}

impl Request {
    /// Returns what others may do meanwhile: what was asked for, unless the image's options say
    /// that they may do anything.
    pub(crate) fn sharing(&self) -> Sharing {
        let spec = &self.image.disk;
        let of_file = spec.file.files().and_then(|file| file.common.force_share);
        match [spec.common.force_share, of_file].contains(&Some(true)) {
            true => Sharing::All,
            false => self.sharing,
        }
    }

    /// Refuses to share with everybody what is to be written.
    fn check_sharing(&self) -> CliResult<()> {
        let is_written =
            self.access == Access::ReadWrite && self.image.disk.common.read_only != Some(true);
        match self.sharing() == Sharing::All && is_written {
            true => Err(CliError::new("force-share=on can only be used with read-only images")),
            false => Ok(()),
        }
    }
}

/// Reads `--probe-backing`.
pub(crate) fn unnamed(parsed: &Parsed) -> UnnamedFormat {
    if parsed.has("probe-backing") { UnnamedFormat::Probe } else { UnnamedFormat::Refuse }
}

/// Reads `-U`.
pub(crate) fn sharing(parsed: &Parsed) -> Sharing {
    if parsed.has("force-share") { Sharing::All } else { Sharing::Format }
}

/// Returns what others may do with an image whose clients rely on its size.
pub(crate) const fn served(asked: Sharing) -> Sharing {
    match asked {
        Sharing::Format => Sharing::SameSize,
        asked => asked,
    }
}

/// Opens an image with its backing chain.
pub(crate) fn open(tool: &Tool, request: &Request) -> CliResult<FileChain> {
    open_bare(tool, request).map_err(|error| cannot_open(&request.image.shown, error))
}

/// As [`open`], for a verb that goes through all the content: extents tell of every zero that
/// anybody knows of, so that it need not be read.
pub(crate) fn open_for_content(tool: &Tool, request: &Request) -> CliResult<FileChain> {
    open_in_detail(tool, request, ExtentDetail::Host)
        .map_err(|error| cannot_open(&request.image.shown, error))
}

/// As [`open`]; the error does not say yet which image it is about.
pub(crate) fn open_bare(tool: &Tool, request: &Request) -> CliResult<FileChain> {
    open_in_detail(tool, request, ExtentDetail::Map)
}

/// As [`open_for_content`]; the error does not say yet which image it is about.
pub(crate) fn open_bare_for_content(tool: &Tool, request: &Request) -> CliResult<FileChain> {
    open_in_detail(tool, request, ExtentDetail::Host)
}

fn open_in_detail(tool: &Tool, request: &Request, detail: ExtentDetail) -> CliResult<FileChain> {
    let spec = &request.image;
    let opened = block_on(opening_in_detail(tool, request, detail)?.open());
    let chain = opened.map_err(|error| match LockConflict::of(&error) {
        Some(conflict) => busy_in_chain(tool, conflict, request),
        None => reason(tool, spec, &error),
    })?;
    if let Some(image) = chain.disk().as_qcow2() {
        spec.disk.runtime.check(&image.header())?;
    }
    check_below(spec, &chain)?;
    Ok(chain)
}

/// Opens an image in two parts, so that the one at `level` of its chain is written as it is.
pub(crate) fn open_split(
    tool: &Tool,
    request: &Request,
    level: usize,
) -> CliResult<FileChainParts> {
    let opening = opening_in_detail(tool, request, ExtentDetail::Host);
    let parts = opening.map_err(|error| cannot_open(&request.image.shown, error))?;
    let parts = block_on(parts.open_split(level)).map_err(|error| {
        let lower = LockConflict::of(&error).filter(|conflict| {
            let is_top = same_file(conflict.path(), Path::new(&request.image.file));
            !is_top && matches!(conflict.obstacle(), Obstacle::Denied(_))
        });
        let why = match (lower, LockConflict::of(&error)) {
            // It could be read: only the one to be written is in the way.
            (Some(conflict), _) => return busy::refusal(tool, conflict, Access::ReadWrite),
            (None, Some(conflict)) => busy_in_chain(tool, conflict, request),
            (None, None) => reason(tool, &request.image, &error),
        };
        cannot_open(&request.image.shown, why)
    })?;
    if let Some(image) = parts.chain().above.disk().as_qcow2() {
        request.image.disk.runtime.check(&image.header())?;
    }
    Ok(parts)
}

/// Claims the length of an image file, which a raw disk leaves to others unless it is resized.
pub(crate) fn hold_length(tool: &Tool, storage: &AnyStorage) -> CliResult<()> {
    storage.hold_more(Permissions::RESIZE).map_err(|error| match LockConflict::of(&error) {
        Some(conflict) => busy::refusal(tool, conflict, Access::ReadWrite),
        None => error.into(),
    })
}

/// Says that a file of the chain cannot be had.
fn busy_in_chain(tool: &Tool, conflict: &LockConflict, request: &Request) -> CliError {
    let refusal = busy::refusal(tool, conflict, request.access);
    match tool.is_own() {
        true => refusal,
        // One for each step down, as QEMU's programs go.
        false => (0..depth(tool, conflict.path(), request).unwrap_or(0))
            .fold(refusal, |refusal, _| refusal.under("Could not open backing file")),
    }
}

/// Says how far below the top image a file of the chain is; nothing for data files.
fn depth(tool: &Tool, file: &Path, request: &Request) -> Option<usize> {
    let (access, sharing) = (Access::ReadOnly, Sharing::All);
    let request = Request { access, sharing, ..request.clone() };
    let levels = block_on(opening(tool, &request).ok()?.inspect(Levels::All)).ok()?;
    levels.iter().position(|level| level.path == file)
}

/// Prepares to open what `request` is about, after a look at the files that it describes.
pub(crate) fn opening(tool: &Tool, request: &Request) -> CliResult<Opening> {
    opening_in_detail(tool, request, ExtentDetail::Map)
}

fn opening_in_detail(tool: &Tool, request: &Request, detail: ExtentDetail) -> CliResult<Opening> {
    let spec = &request.image;
    request.check_sharing()?;
    let mut chain = options(tool, request)?;
    chain.image = chain.image.extent_detail(detail);
    let base = Base { files: file_options(request), chain };
    spec.disk.common.check(request.cache)?;
    if let Some(file) = spec.disk.file.files() {
        file.common.check(request.cache)?;
        check_spec(file, request.access)?;
    }
    Ok(Opening::new(&spec.disk, &base, request.access))
}

/// A raw disk whose format was guessed has limits that QEMU's programs warn of.
pub(crate) fn warn_of_guess(request: &Request, chain: &FileChain) {
    let was_told = !matches!(request.image.format(), Ok(None));
    let is_raw = chain.disk().as_qcow2().is_none();
    if is_raw && !was_told && request.access == Access::ReadWrite {
        let file = &request.image.file;
        output::complain(&format!(
            "WARNING: Image format was not specified for '{file}' and probing guessed raw.\n\
             \x20        Automatically detecting the format is dangerous for raw images, write \
             operations on block 0 will be restricted.\n\
             \x20        Specify the 'raw' format explicitly to remove the restrictions.\n"
        ));
    }
}

/// Refuses the kernel's own asynchronous calls where the page cache is between.
pub(crate) fn check_native(is_native: bool, cache: CacheMode) -> CliResult<()> {
    match is_native && cache != CacheMode::Direct {
        false => Ok(()),
        true => Err(CliError::new(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        )),
    }
}

/// Options for a backing layer make no sense where there is none.
fn check_below(spec: &ImageSpec, chain: &FileChain) -> CliResult<()> {
    match &spec.disk.below {
        BelowSpec::Changed(changed) if changed.file.is_none() && chain.levels().len() == 1 => {
            let text = "Could not open backing file: Must specify either driver or file";
            Err(CliError::new(text))
        }
        _ => Ok(()),
    }
}

/// Returns how a chain is opened for `request`.
pub(crate) fn options(tool: &Tool, request: &Request) -> CliResult<ChainOptions> {
    let choice = match request.image.format()? {
        Some(format) => FormatChoice::Known(of_library(format)),
        None => FormatChoice::Probe,
    };
    let mut options = ChainOptions::new(choice, request.access);
    options.backing = Allow::Named;
    options.data_file = Allow::Named;
    options.sharing = request.sharing();
    options.image = options.image.placement(tool.placement()).discard_unit(tool.discard_unit());
    options.unnamed_format = match tool.persona {
        Persona::Lacuna => request.unnamed,
        _ => UnnamedFormat::Probe,
    };
    Ok(options)
}

/// Returns how files are opened for `request`.
pub(crate) fn file_options(request: &Request) -> FileOptions {
    FileOptions { cache: request.cache, ..FileOptions::default() }
}

/// The library's word for a format.
pub(crate) fn of_library(format: Format) -> chain::Format {
    match format {
        Format::Qcow2 => chain::Format::Qcow2,
        Format::Raw => chain::Format::Raw,
    }
}

/// Our word for a format of the library.
pub(crate) fn of_chain(format: chain::Format) -> Format {
    match format {
        chain::Format::Qcow2 => Format::Qcow2,
        chain::Format::Raw => Format::Raw,
    }
}

/// Says in QEMU's words what is not there or is no file.
fn check_spec(file: &FileSpec, access: Access) -> CliResult<()> {
    if file.path.as_os_str().is_empty() {
        return Err(CliError::new("The 'file' block driver requires a file name"));
    }
    use std::os::unix::fs::FileTypeExt;
    let shown = file.path.display();
    let facts = std::fs::metadata(&file.path).map_err(|error| {
        let text = format!("Could not open '{shown}': {}", of_host(&error));
        let failure = CliError::new(text).with_fact("file", shown.to_string());
        advice::on_missing(failure, &file.path, &error).with_class(Error::io(error, "").kind())
    })?;
    let kind = facts.file_type();
    if kind.is_dir() && access == Access::ReadWrite {
        return Err(CliError::new(format!("Could not open '{shown}': Is a directory")));
    }
    let is_device = kind.is_block_device() || kind.is_char_device();
    let driver = file.kind.name();
    match file.kind {
        FileKind::Regular if kind.is_file() || kind.is_block_device() => Ok(()),
        FileKind::Regular => {
            let text = format!("'{driver}' driver requires '{shown}' to be a regular file");
            let own = "an image is a file or a block device";
            Err(CliError::new(text)
                .in_our_words(format!("It is a {}; {own}", advice::kind_word(kind))))
        }
        _ if is_device => Ok(()),
        _ => Err(CliError::new(format!(
            "'{driver}' driver requires '{shown}' to be either a character or block device"
        ))),
    }
}

/// Returns the host's words for its error.
pub(crate) fn of_host(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), host_words)
}

/// Wraps what kept an image from being opened.
pub(crate) fn cannot_open(shown: &str, error: CliError) -> CliError {
    error.under(format!("Could not open '{shown}'")).with_fact("file", shown)
}

/// Turns the library's error about opening an image into ours.
pub(crate) fn reason(tool: &Tool, spec: &ImageSpec, error: &Error) -> CliError {
    let file = &spec.file;
    let text = match (error.raw_os_error(), qemu_words(file, spec)) {
        _ if !tool.is_own() && error.message().ends_with(LOST) => {
            let words = error.raw_os_error().map_or_else(|| sentence(error), host_words);
            format!("Failed to read from the server: {}", words.trim_start_matches(LOST_FRONT))
        }
        (Some(code), _) => file_words(file, error.message(), code),
        (None, Some(words)) if !tool.is_own() => words,
        // The name stands in front already.
        _ if !tool.is_own() => qemu_words::of_opening(error.message())
            .unwrap_or_else(|| without_image(&sentence(error), file)),
        _ => sentence(error),
    };
    // One line, whatever the image calls its files.
    let text = if tool.is_own() { output::tame(&text) } else { text };
    let failure = CliError::new(text).with_class(error.kind()).located(error);
    match error.kind() {
        // What follows the semicolon is advice for callers of the library.
        ErrorKind::InvalidRequest if error.message().contains("ChainOptions::") => {
            CliError::new(text_before(failure.text())).with_hint(
                "--probe-backing looks at its content; do that only where no guest could write it",
            )
        }
        _ => advice::on_opening(failure, error),
    }
}

/// How `lacuna-remote` says that a server left before all was agreed.
const LOST: &str = "The connection is lost";
const LOST_FRONT: &str = "The connection is lost: ";

fn without_image(text: &str, file: &str) -> String {
    text.strip_prefix(&format!("Image {file}: ")).unwrap_or(text).to_owned()
}

fn text_before(text: &str) -> &str {
    text.split_once(';').map_or(text, |(before, _)| before)
}

/// Turns the error of opening an export that is no image yet into ours.
pub(crate) fn of_export(error: &Error) -> CliError {
    let text = match error.raw_os_error() {
        Some(code) => file_words("", error.message(), code),
        None => sentence(error),
    };
    CliError::new(text).with_class(error.kind())
}

/// Says which file of a chain the host did not give: the image, its data file, or one below.
fn file_words(file: &str, message: &str, code: i32) -> String {
    let words = host_words(code);
    let own = message.strip_prefix(&format!("Image {file}: "));
    let doing = own.unwrap_or(message).rsplit(": ").next().unwrap_or_default();
    let path = ["Opening ", "Looking for "].iter().find_map(|verb| doing.strip_prefix(verb));
    if let Some(place) = doing.strip_prefix("Connecting to ") {
        return format!("Failed to connect to '{place}': {words}");
    }
    match path {
        None => format!("{}: {words}", own.unwrap_or(message)),
        Some(path) if own.is_some() || path == file => format!("Could not open '{path}': {words}"),
        Some(path) => format!("Could not open backing file: Could not open '{path}': {words}"),
    }
}

/// What QEMU says of a file that is no qcow2 image of a version it knows.
fn qemu_words(file: &str, spec: &ImageSpec) -> Option<String> {
    let mut start = Vec::new();
    let opened = std::fs::File::open(file).ok()?;
    std::io::Read::read_to_end(&mut std::io::Read::take(opened, SHORTEST_V3), &mut start).ok()?;
    let is_long = start.len() >= 8;
    start.resize(SHORTEST_V3 as usize, 0);
    let field =
        |at: usize| start[at..at + 4].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let version = field(4);
    if !is_long || !start.starts_with(b"QFI\xfb") {
        let is_qcow2 = matches!(spec.format(), Ok(Some(Format::Qcow2)));
        return is_qcow2.then(|| "Image is not in qcow2 format".to_owned());
    }
    if version == 3 && field(SHORTEST_V3 as usize - 4) < SHORTEST_V3 {
        return Some("qcow2 header too short".to_owned());
    }
    (!(2..=3).contains(&version)).then(|| format!("Unsupported qcow2 version {version}"))
}

/// Says whether two names lead to one file.
pub(crate) fn same_file(first: &Path, second: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (std::fs::metadata(first), std::fs::metadata(second)) {
        (Ok(first), Ok(second)) => (first.dev(), first.ino()) == (second.dev(), second.ino()),
        _ => false,
    }
}

/// Says whether `file` is one of the files that a chain consists of.
pub(crate) fn is_part_of(file: &Path, chain: &FileChain) -> bool {
    let export = file.to_str().filter(|name| NbdSpec::is_name(name));
    let export = export.and_then(|name| NbdSpec::from_name(name).ok());
    chain.levels().iter().any(|level| {
        if let Some(export) = &export {
            return level.path == export.path();
        }
        let data = level.data_path.as_deref();
        same_file(file, &level.path) || data.is_some_and(|data| same_file(file, data))
    })
}

/// Reads a cache mode of QEMU; nothing where there is no such mode.
pub(crate) fn cache_mode(name: &str) -> Option<CacheMode> {
    match name {
        "none" | "off" | "directsync" => Some(CacheMode::Direct),
        "writeback" | "writethrough" | "unsafe" => Some(CacheMode::Buffered),
        _ => None,
    }
}

/// Says whether a cache mode of QEMU makes every write durable at once.
pub(crate) fn writes_through(mode: &str) -> bool {
    ["writethrough", "directsync"].contains(&mode)
}

/// Reads the option for the cache mode of an image that is written; nothing where it is not given.
pub(crate) fn target_cache(parsed: &Parsed, flag: &str) -> CliResult<Option<CacheMode>> {
    let mode = |name| {
        let invalid = || CliError::new(format!("Invalid cache option: {name}"));
        cache_mode(name).ok_or_else(|| invalid().with_hint(advice::CACHE_MODES))
    };
    parsed.last(flag).map(mode).transpose()
}

/// Reads the option for the cache mode of images that are read.
pub(crate) fn source_cache(parsed: &Parsed, flag: &str) -> CliResult<CacheMode> {
    match parsed.last(flag) {
        None => Ok(CacheMode::Buffered),
        Some(name) => cache_mode(name).ok_or_else(|| {
            let text = format!("Invalid source cache option: {name}");
            CliError::new(text).with_hint(advice::CACHE_MODES)
        }),
    }
}
