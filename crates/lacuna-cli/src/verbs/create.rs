//! `create`: makes an empty image.

use std::path::{Path, PathBuf};

use lacuna::ErrorKind;
use lacuna::block::{Layer, Preallocation};
use lacuna::chain::{Sharing, UnnamedFormat};
use lacuna::qcow2::format::{CompressionType, EntryWidth, Version};
use lacuna::qcow2::{self, Access, BackingName, CreateOptions, DataFileName, PreallocationLayout};
use lacuna::raw::Raw;
use lacuna::storage::{CacheMode, Claim, FileOptions, FileStorage, LockConflict, Locking, Storage};
use pollster::block_on;

use super::busy;
use super::open::{self, Request};
use super::spec::nbd::NbdSpec;
use super::spec::{self, ImageSpec};
use super::{Example, Task, Verb, advice, common, create_export};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, EFBIG, FILE_LIMITS, MAKE_ROOM, host_words, sentence};
use crate::format::{Format, is_known};
use crate::interrupt::{RemoveOnSignal, remove_half};
use crate::options::{self, Asked, Given, Values};
use crate::output;
use crate::persona::Tool;
use crate::size::{self, SizeError};

/// Largest L1 table that QEMU opens.
const MAX_L1_BYTES: u64 = 32 << 20;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "create",
    task: Task::Make,
    summary: "Make an empty image",
    operands: "FILENAME [SIZE]",
    flags: &[
        common::QUIET,
        Flag::valued('f', "format", "FMT", "format of the image (raw)"),
        Flag::valued('o', "options", "OPTS", "options of the format; `-o help` lists them"),
        Flag::valued('b', "backing", "FILE", "supplies what the image does not hold"),
        Flag::valued('F', "backing-format", "FMT", "format of the backing file"),
        Flag::switch('u', "backing-unsafe", "do not open the backing file"),
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "an empty disk of 20 GiB", line: "-f qcow2 new-disk.qcow2 20G" },
        Example {
            shows: "a disk that begins as another one",
            line: "-f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        },
        Example {
            shows: "subclusters in clusters of 128 KiB",
            line: "-f qcow2 -o cluster_size=128k,extended_l2=on sub.qcow2 1T",
        },
        Example {
            shows: "reserved space that discards leave where it is",
            line: "-f qcow2 -o preallocation=falloc,keep_mapping=on kept.qcow2 64M",
        },
        Example { shows: "the options that qcow2 has", line: "-f qcow2 -o help" },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let asked = options::parse(parsed.all("options"))?;
    let format_name = parsed.last("format").unwrap_or("raw");
    let given = match (asked, Format::from_name(format_name)) {
        (Asked::Values(given), _) => given,
        (Asked::Help, Some(format)) => return list_options(tool, format),
        (Asked::Help, None) => return Err(unknown_format(format_name)),
    };
    let (file, size) = match &parsed.operands[..] {
        [] => return Err(CliError::usage("Expecting image file name")),
        [file] => (file, None),
        [file, size] => (file, Some(image_size(size)?)),
        [_, _, more, ..] => {
            return Err(CliError::usage(format!("Unexpected argument: {more}")));
        }
    };
    let result = Format::from_name(format_name)
        .ok_or_else(|| unknown_format(format_name))
        .and_then(|format| Plan::new(tool, parsed, format, &given, file, size));
    result.and_then(|plan| plan.carry_out(parsed.has("quiet"))).map_err(|e| e.under(file))?;
    Ok(0)
}

/// Says that there is no such format.
pub(super) fn unknown_format(name: &str) -> CliError {
    CliError::new(format!("Unknown file format '{name}'")).with_hint(advice::FORMATS)
}

/// Reads the size operand.
pub(super) fn image_size(text: &str) -> CliResult<u64> {
    size::parse_offset(text).map_err(|error| match error {
        SizeError::OutOfRange => CliError::new(format!(
            "Invalid image size specified. Must be between 0 and {}.",
            i64::MAX
        )),
        SizeError::NotANumber => CliError::new(format!("Invalid image size specified: '{text}'."))
            .with_hint(advice::SIZES),
    })
}

/// Prints the options of a format.
pub(super) fn list_options(tool: &Tool, format: Format) -> CliResult<u8> {
    let mut specs = options::specs(format);
    specs.retain(|spec| tool.is_own() || !spec.is_ours);
    let text = options::table(&format!("Supported {format} options:\n"), specs);
    output::print(&text).map(|()| 0)
}

/// What is to be made, checked as far as that is possible without making it.
pub(super) struct Plan {
    tool: Tool,
    file: PathBuf,
    shown: String,
    format: Format,
    values: Values,
    /// What is there already, where the name leads to no file.
    export: Option<Box<NbdSpec>>,
}

impl Plan {
    fn new(
        tool: &Tool,
        parsed: &Parsed,
        format: Format,
        given: &Given,
        file: &str,
        size: Option<u64>,
    ) -> CliResult<Self> {
        let mut values = Values::new(format, given)?;
        if let Some(size) = size {
            if values.text("size").is_some() {
                return Err(CliError::new("The image size must be specified only once"));
            }
            values.set("size", size.to_string());
        }
        set_backing(parsed, format, &mut values)?;
        let backing = match parsed.has("backing-unsafe") {
            true => None,
            false => backing_size(tool, file, &values)?,
        };
        if values.text("backing_file").is_some() && values.text("backing_fmt").is_none() {
            return Err(no_backing_format(file, &values, parsed.has("backing-unsafe")));
        }
        if let (None, Some(size)) = (values.text("size"), backing) {
            values.set("size", size.to_string());
        }
        if values.text("size").is_none() {
            return Err(CliError::new("Image creation needs a size parameter")
                .with_hint("give a size, like 20G, behind the name, or a backing file with -b"));
        }
        let export = create_export::described(file, parsed)?;
        Ok(Self::with_values(tool, format, values, file, export))
    }

    /// Takes values that are complete: with a size, and a format for the backing file.
    pub(super) fn checked(
        tool: &Tool,
        format: Format,
        values: Values,
        file: &str,
    ) -> CliResult<Self> {
        Ok(Self::with_values(tool, format, values, file, create_export::named(file)?))
    }

    fn with_values(
        tool: &Tool,
        format: Format,
        values: Values,
        file: &str,
        export: Option<Box<NbdSpec>>,
    ) -> Self {
        let path = spec::split_protocol(file).map_or_else(|_| file.to_owned(), |(_, path)| path);
        let (tool, shown) = (tool.clone(), file.to_owned());
        Self { tool, file: path.into(), shown, format, values, export }
    }

    /// Refuses names that lead to no file: those with a protocol, and `json:`.
    fn check_name(&self) -> CliResult<()> {
        if self.export.is_some() {
            return Ok(());
        }
        match spec::split_protocol(&self.shown)? {
            (Some(driver @ ("null-co" | "null-aio")), _) => Err(CliError::new(format!(
                "Protocol driver '{driver}' does not support image creation"
            ))
            .with_hint("only files and block devices can hold an image")),
            _ => Ok(()),
        }
    }

    fn carry_out(&self, quiet: bool) -> CliResult<()> {
        self.check_name()?;
        if !quiet {
            let (format, values) = (self.format, self.values.formatting());
            let file = self.shown.replace(',', ",,");
            output::print(&format!("Formatting '{file}', fmt={format}{values}\n"))?;
        }
        self.make()
    }

    /// Sees to it that an interruption leaves nothing half made; not before the file is ours.
    fn watch(&self) -> Option<RemoveOnSignal> {
        let is_long = self.values.text("preallocation").is_some();
        is_long.then(|| RemoveOnSignal::new(&self.file.to_string_lossy()))
    }

    /// Makes the image.
    pub(super) fn make(&self) -> CliResult<()> {
        match self.format {
            Format::Qcow2 => self.make_qcow2(),
            Format::Raw => self.make_raw(),
        }
    }

    fn size_bytes(&self) -> u64 {
        self.values.number("size").unwrap_or(0)
    }

    fn make_raw(&self) -> CliResult<()> {
        let mode = match self.values.text("preallocation").map(preallocation).transpose() {
            Ok(mode) => mode.unwrap_or_default(),
            Err(name) => return Err(CliError::new(format!("invalid parameter value: {name}"))),
        };
        if mode == Preallocation::Metadata {
            return Err(CliError::new("Unsupported preallocation mode: metadata"));
        }
        let size = self.size_bytes().checked_next_multiple_of(512);
        let size =
            size.filter(|size| i64::try_from(*size).is_ok()).ok_or_else(|| self.too_large())?;
        if let Some(export) = &self.export {
            return create_export::make_raw(export, size);
        }
        let storage = self.replace(&self.file)?;
        let _watch = self.watch();
        let grown = block_on(Raw::grow(storage, size, mode));
        grown.map(drop).map_err(|error| self.half_made(self.no_room(error, mode)))
    }

    /// The host refuses a file of this length, which QEMU takes for the format's refusal.
    fn too_long(&self) -> CliError {
        let own = format!(
            "A file for a disk of {} bytes is longer than may be here: File too large",
            self.size_bytes()
        );
        self.too_large().in_our_words(own).with_class(ErrorKind::Io).with_hint(FILE_LIMITS)
    }

    fn too_large(&self) -> CliError {
        let format = self.format;
        let advice = match format {
            Format::Raw => "",
            Format::Qcow2 => " (try using a larger cluster size)",
        };
        CliError::new(format!("The image size is too large for file format '{format}'{advice}"))
    }

    fn make_qcow2(&self) -> CliResult<()> {
        let options = self.create_options()?;
        if let Some(export) = &self.export {
            return self.fill_qcow2(&create_export::open(export)?, &options);
        }
        let storage = self.replace(&self.file)?;
        let _watch = self.watch();
        self.fill_qcow2(&storage, &options).map_err(|error| self.half_made(error))
    }

    fn fill_qcow2<S: Storage>(&self, storage: &S, options: &CreateOptions) -> CliResult<()> {
        if let Some(data) = &options.data_file {
            self.make_data_file(data, options)?;
        }
        let mode = options.preallocation;
        block_on(qcow2::create(storage, options)).map_err(|error| match mode {
            _ if error.raw_os_error() == Some(EFBIG) => self.too_long(),
            Preallocation::Falloc | Preallocation::Full if error.kind() == ErrorKind::NoSpace => {
                no_room(&error, mode)
                    .under("Could not resize image: Failed to resize underlying file")
            }
            _ => error.into(),
        })
    }

    fn make_data_file(&self, name: &DataFileName, options: &CreateOptions) -> CliResult<()> {
        let path = beside(&self.file, &name.name);
        if open::same_file(&self.file, &path) {
            return Err(CliError::new("The image cannot be its own data file"));
        }
        let mode = match options.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            mode => mode,
        };
        let grown = block_on(Raw::grow(self.replace(&path)?, options.size_bytes, mode));
        grown.map(drop).map_err(|error| self.no_room(error, mode))
    }

    /// Removes what was made of an image that failed; says so where that is not possible.
    fn half_made(&self, error: CliError) -> CliError {
        let file = self.file.to_string_lossy();
        match remove_half(&file) {
            Ok(()) => error,
            Err(why) => {
                let why = open::of_host(&why);
                error.followed_by(format!("{file} is incomplete: {why}"))
            }
        }
    }

    /// Words what the host said about a file that was to grow to `size`.
    fn no_room(&self, error: lacuna::Error, mode: Preallocation) -> CliError {
        let words = no_room(&error, mode);
        match (error.raw_os_error(), self.format) {
            (Some(EFBIG), _) => self.too_long(),
            (_, Format::Raw) => words,
            (_, Format::Qcow2) => words.under("Could not resize image"),
        }
    }

    /// Makes or empties a file, unless somebody else uses it.
    fn replace(&self, path: &Path) -> CliResult<FileStorage> {
        let options = FileOptions { claim: Some(Claim::MAKING), ..FileOptions::replace() };
        FileStorage::open(path, &options).map_err(|error| {
            if let Some(conflict) = LockConflict::of(&error) {
                return busy::refusal(&self.tool, conflict, Access::ReadWrite);
            }
            let why = match error.raw_os_error() {
                Some(code) => host_words(code),
                None => sentence(&error),
            };
            let failure = CliError::new(format!("Could not create '{}': {why}", path.display()))
                .with_class(error.kind())
                .with_fact("file", path.display().to_string());
            match error.kind() {
                ErrorKind::NotFound => failure.with_hint("its folder has to be there before"),
                _ => failure,
            }
        })
    }

    /// Turns values into what the library takes, with QEMU's words for what cannot be.
    fn create_options(&self) -> CliResult<CreateOptions> {
        let values = &self.values;
        let mut options = CreateOptions {
            size_bytes: self.size_bytes().checked_next_multiple_of(512).unwrap_or(u64::MAX),
            version: version(values.text("compat"))?,
            cluster_bytes: cluster_bytes(values)?,
            compression: compression(values.text("compression_type"))?,
            lazy_refcounts: values.is_on("lazy_refcounts"),
            zero_claims: values.is_on("zero_claims"),
            keep_mapping: values.is_on("keep_mapping"),
            preallocation_layout: layout(values.text("preallocation_layout"))?,
            backing: backing(values)?,
            data_file: data_file(values)?,
            ..CreateOptions::default()
        };
        if let Some(name) = values.text("preallocation") {
            options.preallocation = preallocation(name).map_err(|name| {
                CliError::new(format!("Parameter 'preallocation' does not accept value '{name}'"))
                    .with_hint("kinds are off, metadata, falloc and full")
            })?;
        }
        if values.is_on("extended_l2") {
            options.entry_width = EntryWidth::Extended;
        }
        options.refcount_bits = refcount_bits(values)?;
        check_combination(&options)?;
        Ok(options)
    }
}

/// Says what kept a file from growing, by what was to be done with the space.
pub(super) fn no_room(error: &lacuna::Error, mode: Preallocation) -> CliError {
    let doing = match mode {
        Preallocation::Off | Preallocation::Metadata => "Could not resize file",
        Preallocation::Falloc => "Could not preallocate new data",
        Preallocation::Full => "Could not write zeros for preallocation",
    };
    let failure = CliError::new(format!("{doing}: {}", crate::error::errno_words(error)));
    match error.kind() {
        ErrorKind::NoSpace => failure.with_class(ErrorKind::NoSpace).with_hint(MAKE_ROOM),
        kind => failure.with_class(kind),
    }
}

/// Reads the name of a kind of preallocation; gives it back where there is no such kind.
pub(crate) fn preallocation(name: &str) -> Result<Preallocation, &str> {
    match name {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        other => Err(other),
    }
}

/// Takes `-b` and `-F` over into the values.
fn set_backing(parsed: &Parsed, format: Format, values: &mut Values) -> CliResult<()> {
    for (flag, name, shown) in [
        ("backing", "backing_file", "Backing file"),
        ("backing-format", "backing_fmt", "Backing file format"),
    ] {
        let Some(text) = parsed.last(flag) else { continue };
        if !values.takes(name) {
            let text = format!("{shown} not supported for file format '{format}'");
            return Err(CliError::new(text));
        }
        values.set(name, text.to_owned());
    }
    Ok(())
}

/// Returns the size of the backing file, if there is to be one.
fn backing_size(tool: &Tool, file: &str, values: &Values) -> CliResult<Option<u64>> {
    let Some(name) = values.text("backing_file").filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    if name == file {
        let text = "Error: Trying to create an image with the same filename as the backing file";
        return Err(CliError::new(text));
    }
    let path = beside(Path::new(file), name).to_string_lossy().into_owned();
    let spec = ImageSpec::from_name(&path, values.text("backing_fmt"))?;
    let (access, cache) = (Access::ReadOnly, CacheMode::Buffered);
    let unnamed = UnnamedFormat::Refuse;
    let request = Request { image: spec, access, cache, sharing: Sharing::All, unnamed };
    let chain = open::open_bare(tool, &request).map_err(|error| {
        error
            .followed_by("Could not open backing image.")
            .with_hint("-u makes the image without looking at the backing file; give a size then")
    })?;
    if open::is_part_of(Path::new(file), &chain) {
        return Err(CliError::new("The new image would be part of its own backing chain"));
    }
    if let Some(data) = values.text("data_file")
        && open::is_part_of(&beside(Path::new(file), data), &chain)
    {
        return Err(CliError::new("The data file is part of the backing chain")
            .with_hint("it would be emptied; give another name"));
    }
    Ok(Some(chain.disk().size_bytes()))
}

fn no_backing_format(file: &str, values: &Values, unsafely: bool) -> CliError {
    let text = "Backing file specified without backing format";
    let error = CliError::new(text).with_hint("-F names the format of the backing file");
    if unsafely {
        return error;
    }
    let path = beside(Path::new(file), values.text("backing_file").unwrap_or_default());
    match probed(&path) {
        Some(format) => CliError::new(format!("{text}\nDetected format of {format}."))
            .with_hint(format!("give -F {format} if that is right")),
        None => error,
    }
}

/// Says what the content of a file looks like.
pub(super) fn probed(path: &Path) -> Option<Format> {
    let options = FileOptions { locking: Locking::Off, ..FileOptions::read_only() };
    let storage = FileStorage::open(path, &options).ok()?;
    let format = block_on(lacuna::chain::probe(&storage)).ok()?;
    Some(open::of_chain(format))
}

/// A name in an image is seen from where the image is, unless it is one of a server's export.
pub(super) fn beside(image: &Path, name: &str) -> PathBuf {
    if NbdSpec::is_name(name) {
        return PathBuf::from(name);
    }
    let name = name.strip_prefix("file:").unwrap_or(name);
    image.parent().unwrap_or_else(|| Path::new("")).join(name)
}

fn version(compat: Option<&str>) -> CliResult<Version> {
    match compat {
        None | Some("v3" | "1.1") => Ok(Version::V3),
        Some("v2" | "0.10") => Ok(Version::V2),
        Some(other) => {
            Err(CliError::new(format!("Parameter 'version' does not accept value '{other}'"))
                .with_hint("versions are v2 (also 0.10) and v3 (also 1.1)"))
        }
    }
}

fn compression(name: Option<&str>) -> CliResult<CompressionType> {
    match name {
        None | Some("zlib") => Ok(CompressionType::Deflate),
        Some("zstd") => Ok(CompressionType::Zstd),
        Some(other) => Err(CliError::new(format!(
            "Parameter 'compression-type' does not accept value '{other}'"
        ))
        .with_hint("compression types are zlib and zstd")),
    }
}

/// Reads the cluster size.
pub(super) fn cluster_bytes(values: &Values) -> CliResult<u64> {
    let bytes = values.number("cluster_size").unwrap_or(0);
    match bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes) {
        true => Ok(bytes),
        false => Err(CliError::new("Cluster size must be a power of two between 512 and 2048k")),
    }
}

/// Reads the refcount width.
pub(super) fn refcount_bits(values: &Values) -> CliResult<u32> {
    let bits = values.number("refcount_bits").unwrap_or(0);
    match u32::try_from(bits) {
        Ok(bits) if bits.is_power_of_two() && bits <= 64 => Ok(bits),
        _ => Err(CliError::new("Refcount width must be a power of two and may not exceed 64 bits")),
    }
}

fn backing(values: &Values) -> CliResult<Option<BackingName>> {
    let format = values.text("backing_fmt").map(backing_format).transpose()?;
    match values.text("backing_file").filter(|name| !name.is_empty()) {
        Some(name) => Ok(Some(BackingName { name: name.to_owned(), format })),
        None if format.is_some() => {
            Err(CliError::new("Backing format cannot be used without backing file"))
        }
        None => Ok(None),
    }
}

/// Takes the name of a format that QEMU has, be it one that is not ours: the image may be for QEMU.
fn backing_format(name: &str) -> CliResult<String> {
    match is_known(name) {
        true => Ok(name.to_owned()),
        false => {
            let text = format!("Parameter 'backing-fmt' does not accept value '{name}'");
            Err(CliError::new(text).with_hint("mostly it is qcow2 or raw"))
        }
    }
}

fn layout(name: Option<&str>) -> CliResult<PreallocationLayout> {
    match name {
        None | Some("qemu") => Ok(PreallocationLayout::AsQemu),
        Some("contiguous") => Ok(PreallocationLayout::Contiguous),
        Some(other) => {
            let text = format!("Parameter 'preallocation_layout' does not accept value '{other}'");
            Err(CliError::new(text).with_hint("layouts are qemu and contiguous"))
        }
    }
}

fn data_file(values: &Values) -> CliResult<Option<DataFileName>> {
    let raw = values.is_on("data_file_raw");
    match values.text("data_file") {
        Some(name) => Ok(Some(DataFileName { name: name.to_owned(), raw })),
        None if raw => Err(CliError::new("data-file-raw requires data-file")),
        None => Ok(None),
    }
}

/// Refuses what version 2 does not have and what contradicts itself.
fn check_combination(options: &CreateOptions) -> CliResult<()> {
    const NEWER: &str = "compatibility level 1.1 and above (use version=v3 or greater)";
    let is_old = options.version == Version::V2;
    let extended = options.entry_width == EntryWidth::Extended;
    let hides = options.backing.is_some() && !extended;
    let problem = if hides && options.preallocation != Preallocation::Off {
        "Backing file and preallocation can only be used at the same time if extended_l2 is on"
            .to_owned()
    } else if is_old && options.lazy_refcounts {
        format!("Lazy refcounts only supported with {NEWER}")
    } else if is_old && options.refcount_bits != 16 {
        "Different refcount widths than 16 bits require compatibility level 1.1 or above \
         (use version=v3 or greater)"
            .to_owned()
    } else if is_old && options.data_file.is_some() {
        format!("External data files are only supported with {NEWER}")
    } else if options.backing.is_some() && options.data_file.as_ref().is_some_and(|file| file.raw) {
        "Backing file and data-file-raw cannot be used at the same time".to_owned()
    } else if is_old && options.compression != CompressionType::Deflate {
        format!("Non-zlib compression type is only supported with {NEWER}")
    } else if is_old && extended {
        format!("Extended L2 entries are only supported with {NEWER}")
    } else if extended && options.cluster_bytes < 16384 {
        "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
            .to_owned()
    } else if options.size_bytes > largest(options) {
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
            .to_owned()
    } else {
        return Ok(());
    };
    Err(CliError::new(problem))
}

/// The largest disk that an L1 table can map.
fn largest(options: &CreateOptions) -> u64 {
    let entry_bytes = if options.entry_width == EntryWidth::Extended { 16 } else { 8 };
    let covered = options.cluster_bytes / entry_bytes * options.cluster_bytes;
    (MAX_L1_BYTES / 8).saturating_mul(covered)
}
