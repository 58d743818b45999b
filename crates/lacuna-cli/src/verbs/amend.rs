//! `amend`: changes what an image is: version, refcount width, names, private claims.

use lacuna::block::{Layer, Preallocation};
use lacuna::qcow2::format::{Header, IncompatibleFeatures, Version};
use lacuna::qcow2::{Access, AmendOptions};
use lacuna::{Error, ErrorKind};
use pollster::block_on;

use super::open::{self, FileChain, Request};
use super::progress::Meter;
use super::resize::Change;
use super::{Example, Task, Verb, common, create};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::options::{self, Asked, Given, Spec, Values};
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "amend",
    task: Task::Change,
    summary: "Change what an image is: version, features, refcounts",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('t', "cache", "MODE", "cache mode of FILENAME (writeback)"),
        Flag::valued('o', "options", "OPTS", "what to change; `-o help` lists the options"),
        Flag::switch('\0', "force", "accepted; nothing here needs it").long_only(),
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "make it one that old programs read", line: "-o compat=0.10 disk.qcow2" },
        Example {
            shows: "back, and update refcounts late",
            line: "-o compat=1.1,lazy_refcounts=on disk.qcow2",
        },
        Example { shows: "refcounts of another width", line: "-p -o refcount_bits=8 disk.qcow2" },
        Example { shows: "what can be changed", line: "-f qcow2 -o help" },
    ],
    codes: &[],
    run,
};

/// What can be changed, by the names that `create` uses.
const OPTIONS: [&str; 9] = [
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
    "size",
    "zero_claims",
];

/// Options of new images that QEMU has besides those of [`options::specs`].
const OF_CREATION: [&str; 4] = ["encryption", "encrypt.format", "encrypt.key-secret", "nocow"];

/// Options of encrypted images.
const OF_ENCRYPTION: [&str; 5] = [
    "encrypt.iter-time",
    "encrypt.keyslot",
    "encrypt.new-secret",
    "encrypt.old-secret",
    "encrypt.state",
];

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    if !parsed.has("options") {
        return Err(CliError::usage("Must specify options (-o)"));
    }
    let asked = options::parse(parsed.all("options"))?;
    let told = parsed.last("format").filter(|_| asked == Asked::Help);
    if let Some(name) = told {
        let format = Format::from_name(name).ok_or_else(|| create::unknown_format(name))?;
        return list(tool, format);
    }
    let [name] = &parsed.operands[..] else {
        return Err(CliError::new("Expecting one image file name"));
    };
    let mut request =
        Request { access: Access::ReadWrite, ..Request::reading(name, parsed, "format")? };
    request.cache = open::target_cache(parsed, "cache")?.unwrap_or(request.cache);
    let meter = Meter::new(tool, parsed, "amend")?;
    let chain = open::open(tool, &request)?;
    open::warn_of_guess(&request, &chain);
    let done = match &asked {
        Asked::Help => list(tool, open::of_chain(chain.disk().format())).map(|_| None),
        Asked::Values(given) => amend(tool, given, &chain, meter),
    };
    let closed = block_on(chain.into_disk().close());
    let size = done?;
    closed?;
    match size {
        Some(new) => resize(&open::open(tool, &request)?, new).map(|()| 0),
        None => Ok(0),
    }
}

/// Changes the size of an image that was of a version before in which that was not possible.
fn resize(chain: &FileChain, new: u64) -> CliResult<()> {
    let old = chain.disk().size_bytes();
    let done = Change { old, new, mode: Preallocation::Off }.make(chain);
    let closed = block_on(chain.disk().clone().close());
    done?;
    Ok(closed?)
}

/// Prints what can be changed.
fn list(tool: &Tool, format: Format) -> CliResult<u8> {
    if format == Format::Raw {
        return Err(not_supported());
    }
    let is_ours = |spec: &Spec| OPTIONS.contains(&spec.name) && (tool.is_own() || !spec.is_ours);
    let mut specs = options::specs(format);
    specs.retain(is_ours);
    output::print(&options::table(&format!("Amend options for '{format}':\n"), specs)).map(|()| 0)
}

fn not_supported() -> CliError {
    CliError::new("Format driver 'raw' does not support option amendment")
        .with_class(ErrorKind::Unsupported)
        .with_hint("only qcow2 images have something to amend")
}

/// Returns the size that the image is to get after all that, where it cannot have it before: version 2
/// with snapshots keeps its own.
fn amend(
    tool: &Tool,
    given: &Given,
    chain: &FileChain,
    mut meter: Meter,
) -> CliResult<Option<u64>> {
    let Some(image) = chain.disk().as_qcow2() else { return Err(not_supported()) };
    let values = values(given)?;
    let header = image.header();
    let options = wish(&values, &header)?;
    check(&options, &values, &header)?;
    let size = values.number("size").filter(|size| *size > 0);
    let waits = options.version == Some(Version::V3) && header.snapshots.count > 0;
    if let Some(new) = size.filter(|_| !waits) {
        let old = image.size_bytes();
        Change { old, new, mode: Preallocation::Off }.make(chain)?;
    }
    let mut report = |done, total| meter.update("amend", done, total);
    let done = block_on(image.clone().amend(&options, &mut report));
    meter.finish(done.is_ok());
    done.map(|()| size.filter(|_| waits)).map_err(|error| words(tool, &header, error))
}

/// Takes the options that can be changed; says of others why they cannot.
fn values(given: &Given) -> CliResult<Values> {
    let of_creation = |key: &str| {
        OF_CREATION.contains(&key)
            || options::specs(Format::Qcow2).iter().any(|spec| spec.name == key)
    };
    let Some(key) = given.keys().find(|key| !OPTIONS.contains(key)) else {
        return Values::new(Format::Qcow2, given);
    };
    let problem = match key {
        key if OF_ENCRYPTION.contains(&key) => {
            "Can't amend encryption options - encryption not present".to_owned()
        }
        key if of_creation(key) => {
            format!("Invalid parameter '{key}'\nThis option is only supported for image creation")
        }
        key => format!("Invalid parameter '{key}'"),
    };
    Err(CliError::new(problem).with_hint("`amend -f qcow2 -o help` lists the options"))
}

fn wish(values: &Values, header: &Header) -> CliResult<AmendOptions> {
    let switch = |name: &str| values.text(name).and_then(options::switch);
    let version = match values.text("compat") {
        None => None,
        Some("0.10" | "v2") => Some(Version::V2),
        Some("1.1" | "v3") => Some(Version::V3),
        Some(other) => {
            return Err(CliError::new(format!("Unknown compatibility level {other}"))
                .with_hint("versions are v2 (also 0.10) and v3 (also 1.1)"));
        }
    };
    let bits = values.text("refcount_bits").map(|_| create::refcount_bits(values)).transpose()?;
    // What is so already is no wish.
    let bits = bits.filter(|bits| *bits != 1 << header.geometry.refcount_order());
    Ok(AmendOptions {
        version: version.filter(|version| *version != header.geometry.version()),
        lazy_refcounts: switch("lazy_refcounts"),
        refcount_bits: bits,
        data_file: values.text("data_file").map(str::to_owned),
        data_file_raw: switch("data_file_raw"),
        zero_claims: switch("zero_claims"),
    })
}

/// Says in QEMU's words, and in its order, what the image cannot become.
fn check(options: &AmendOptions, values: &Values, header: &Header) -> CliResult<()> {
    let external = header.has_external_data_file();
    let version = options.version.unwrap_or_else(|| header.geometry.version());
    let is_old = version == Version::V2;
    let bits = options.refcount_bits.unwrap_or_else(|| 1 << header.geometry.refcount_order());
    let newer = "1.1 or above (use compat=1.1 or greater)";
    let problem = match () {
        () if options.data_file.is_some() && !external => {
            "data-file can only be set for images that use an external data file".to_owned()
        }
        () if options.data_file_raw == Some(true) && !header.has_raw_external_data() => {
            "data-file-raw cannot be set on existing images".to_owned()
        }
        () if is_old && options.refcount_bits.is_some_and(|bits| bits != 16) => {
            format!("Refcount widths other than 16 bits require compatibility level {newer}")
        }
        () if names_another_backing(values, header) => {
            "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.".to_owned()
        }
        () if is_old && options.lazy_refcounts == Some(true) => {
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 \
             or greater)"
                .to_owned()
        }
        () if is_old && options.zero_claims == Some(true) => {
            format!("Claims of being all zero require compatibility level {newer}")
        }
        () if is_old && bits != 16 => "compat=0.10 requires refcount_bits=16".to_owned(),
        () if is_old && external => "Cannot downgrade an image with a data file".to_owned(),
        () => return Ok(()),
    };
    Err(CliError::new(problem))
}

/// The backing file may be named, but not be another one.
fn names_another_backing(values: &Values, header: &Header) -> bool {
    let (name, format) = (values.text("backing_file"), values.text("backing_fmt"));
    let stored = |name: Option<&lacuna::qcow2::format::StoredName>| {
        name.map(|name| name.to_string_lossy().into_owned())
    };
    let is_asked = name.is_some() || format.is_some();
    let now = stored(header.backing_name.as_ref());
    let now_format = stored(header.extensions.backing_format.as_ref());
    is_asked && (name != now.as_deref() || format != now_format.as_deref())
}

/// Says in QEMU's words what the engine found out on the way.
fn words(tool: &Tool, header: &Header, error: Error) -> CliError {
    let own = CliError::from(error.clone());
    let message = error.message();
    let own = match message.starts_with("Version 2 cannot keep the bitmaps") {
        true => own
            .with_hint("`bitmap --remove` takes them off; qemu-img loses them and their clusters"),
        false => own,
    };
    if tool.is_own() {
        return own;
    }
    let text = match () {
        () if message.contains("does not fit into") => too_narrow(message),
        () if message.starts_with("Version 2 cannot say that snapshot") => {
            Some("Internal snapshots prevent downgrade of image".to_owned())
        }
        () if message.starts_with("Version 2 lacks") => {
            let bits = header.features.incompatible - IncompatibleFeatures::DIRTY;
            let bits = bits.bits();
            Some(format!("Cannot downgrade an image with incompatible features {bits:#x} set"))
        }
        () => None,
    };
    text.map_or(own, |text| CliError::new(text).with_class(error.kind()))
}

fn too_narrow(message: &str) -> Option<String> {
    let (count, rest) = message.strip_prefix("Refcount ")?.split_once(" of the cluster at ")?;
    let (at, bits) = rest.strip_suffix(" bits")?.split_once(" does not fit into ")?;
    Some(format!(
        "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {at} has a \
         refcount of {count}"
    ))
}
