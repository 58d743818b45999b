//! `measure`: how much room would a new image take?

use lacuna::block::Layer;
use lacuna::job::{Estimate, measure, measure_bitmaps, measure_empty};
use lacuna::qcow2::format::{EntryWidth, Version};
use lacuna::qcow2::{BackingName, CreateOptions, Image};
use pollster::block_on;
use serde_json::{Map, Value};

use super::map::looks_preallocated;
use super::open::{self, FileChain, Request};
use super::{Example, Form, Task, Verb, common, create, form, info, snapshot};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::nodes::AnyStorage;
use crate::options::{self, Asked, Given, Values};
use crate::output;
use crate::persona::Tool;

/// Formats of QEMU whose size it cannot tell beforehand either.
const UNMEASURED: [&str; 9] =
    ["bochs", "cloop", "dmg", "nbd", "parallels", "qcow", "qed", "vdi", "vmdk"];

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "measure",
    task: Task::Look,
    summary: "Tell how much room a new image would take",
    operands: "[FILENAME]",
    flags: &[
        Flag::valued('O', "target-format", "FMT", "format of the new image (raw)"),
        Flag::valued('o', "options", "OPTS", "options of the new image; `-o help` lists them"),
        Flag::valued('s', "size", "SIZE", "measure an empty disk of this size"),
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('l', "snapshot", "SNAPSHOT", "measure this internal snapshot"),
        common::OUTPUT,
        common::FORCE_SHARE,
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "what a conversion to qcow2 takes", line: "-O qcow2 disk.qcow2" },
        Example { shows: "an empty disk, for programs", line: "-O qcow2 --size 20G --output=json" },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let size = parsed.last("size").map(create::image_size).transpose()?;
    let asked = options::parse(parsed.all("options"))?;
    let at = parsed.last("snapshot").map(|text| snapshot::choice(tool, text)).transpose()?;
    let source = source(parsed, size)?;
    let chain = source.map(|file| open_source(tool, parsed, file)).transpose()?;
    let chain = match (chain, at) {
        (Some(chain), Some(choice)) => Some(snapshot::at(tool, chain, &choice)?),
        (chain, _) => chain,
    };
    let format = target_format(parsed.last("target-format").unwrap_or("raw"))?;
    let given = match asked {
        Asked::Help => return create::list_options(tool, format),
        Asked::Values(given) => given,
    };
    let mut values = values(tool, format, &given)?;
    if let Some(size) = size {
        values.set("size", size.to_string());
    }
    let figures = match (format, &chain) {
        (Format::Raw, chain) => raw(chain.as_ref(), &values),
        (Format::Qcow2, None) => Figures::of(measure_empty(&image_options(&values)?.0)?),
        (Format::Qcow2, Some(chain)) => qcow2(chain, &values)?,
    };
    output::print(&figures.text(form)).map(|()| 0)
}

/// Returns the image that is measured, if it is one.
fn source(parsed: &Parsed, size: Option<u64>) -> CliResult<Option<&str>> {
    let about_image = ["image-opts", "format", "snapshot"].iter().any(|flag| parsed.has(flag));
    match (&parsed.operands[..], size) {
        ([_, _, ..], _) => Err(CliError::new("At most one filename argument is allowed.")),
        ([], _) if about_image => {
            Err(CliError::new("--image-opts, -f, and -l require a filename argument."))
        }
        ([], None) => Err(CliError::new("Either --size N or one filename must be specified.")),
        ([_], Some(_)) => Err(CliError::new("--size N cannot be used together with a filename.")),
        ([], Some(_)) => Ok(None),
        ([file], None) => Ok(Some(file)),
    }
}

/// Opens the source so that it knows of zeros what a conversion would know.
fn open_source(tool: &Tool, parsed: &Parsed, file: &str) -> CliResult<FileChain> {
    let request = Request::reading(file, parsed, "format")?;
    let chain = open::open(tool, &request)?;
    let asks_host = (0..chain.levels().len())
        .any(|level| tool.is_own() || block_on(looks_preallocated(&chain, level)));
    match asks_host {
        true => open::open_for_content(tool, &request),
        false => Ok(chain),
    }
}

fn target_format(name: &str) -> CliResult<Format> {
    match Format::from_name(name) {
        Some(format) => Ok(format),
        None if UNMEASURED.contains(&name) => {
            Err(CliError::new(format!("Block driver '{name}' does not support size measurement")))
        }
        None => Err(create::unknown_format(name)),
    }
}

fn values(tool: &Tool, format: Format, given: &Given) -> CliResult<Values> {
    if given.keys().any(|key| key == "encryption" || key.starts_with("encrypt.")) {
        return Err(CliError::new("Encrypted images cannot be made, so their size is not known"));
    }
    Values::new(format, given).map_err(|error| {
        let more = format!("{}: Invalid options for file format '{format}'", tool.name);
        CliError::new(format!("{}\n{more}", error.text()))
    })
}

/// A raw image is as long as its disk.
fn raw(chain: Option<&FileChain>, values: &Values) -> Figures {
    let size = match chain {
        Some(chain) => chain.disk().size_bytes(),
        None => values.number("size").unwrap_or(0).next_multiple_of(512),
    };
    Figures { required: size, fully_allocated: size, bitmaps: None }
}

fn qcow2(chain: &FileChain, values: &Values) -> CliResult<Figures> {
    let (options, version) = image_options(values)?;
    let estimate = block_on(measure(chain.disk(), &options))?;
    let mut figures = Figures::of(estimate);
    let image = chain.disk().as_qcow2();
    let has_bitmaps = |image: &&Image<AnyStorage>| image.geometry().version() == Version::V3;
    if let Some(image) = image.filter(has_bitmaps).filter(|_| version == Version::V3) {
        let bitmaps = info::bitmaps(&image.header(), image.storage())?;
        let size = chain.disk().size_bytes();
        figures.bitmaps = Some(measure_bitmaps(&bitmaps, size, options.cluster_bytes));
    }
    Ok(figures)
}

/// Takes those options that decide the size, and the version of the new image.
fn image_options(values: &Values) -> CliResult<(CreateOptions, Version)> {
    let extended = values.is_on("extended_l2");
    let cluster_bytes = create::cluster_bytes(values)?;
    if extended && cluster_bytes < 16384 {
        return Err(CliError::new(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ));
    }
    let version = match values.text("compat") {
        None | Some("1.1") => Version::V3,
        Some("0.10") => Version::V2,
        Some(other) => {
            return Err(CliError::new(format!("Invalid compatibility level: '{other}'")));
        }
    };
    let refcount_bits = create::refcount_bits(values)?;
    if version == Version::V2 && refcount_bits != 16 {
        return Err(CliError::new(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above \
             (use compat=1.1 or greater)",
        ));
    }
    let preallocation = create::preallocation(values.text("preallocation").unwrap_or("off"))
        .map_err(|name| CliError::new(format!("invalid parameter value: {name}")))?;
    let backing = values.text("backing_file");
    let options = CreateOptions {
        size_bytes: values.number("size").unwrap_or(0),
        cluster_bytes,
        entry_width: if extended { EntryWidth::Extended } else { EntryWidth::Standard },
        refcount_bits,
        backing: backing.map(|name| BackingName { name: name.to_owned(), format: None }),
        preallocation,
        ..CreateOptions::default()
    };
    Ok((options, version))
}

/// What is printed, in bytes.
struct Figures {
    required: u64,
    fully_allocated: u64,
    bitmaps: Option<u64>,
}

impl Figures {
    const fn of(estimate: Estimate) -> Self {
        Self {
            required: estimate.required_bytes,
            fully_allocated: estimate.fully_allocated_bytes,
            bitmaps: None,
        }
    }

    fn text(&self, form: Form) -> String {
        match form {
            Form::Human => self.human(),
            Form::Json => self.json(),
        }
    }

    fn human(&self) -> String {
        let bitmaps = self.bitmaps.map(|bytes| format!("bitmaps size: {bytes}\n"));
        format!(
            "required size: {}\nfully allocated size: {}\n{}",
            self.required,
            self.fully_allocated,
            bitmaps.unwrap_or_default()
        )
    }

    fn json(&self) -> String {
        let mut members = Map::new();
        if let Some(bytes) = self.bitmaps {
            members.insert("bitmaps".into(), bytes.into());
        }
        members.insert("required".into(), self.required.into());
        members.insert("fully-allocated".into(), self.fully_allocated.into());
        output::pretty(&Value::Object(members)) + "\n"
    }
}
