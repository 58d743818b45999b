//! `convert`: copies a disk, or several in a row, into another image.

mod asked;
mod bitmaps;
mod concat;
mod run;

use std::path::Path;

use lacuna::block::Layer;
use lacuna::chain::{Sharing, UnnamedFormat};
use lacuna::job::{ConvertOptions, KnownZeros, TargetContent};
use lacuna::qcow2::{Access, SnapshotChoice};
use lacuna::storage::CacheMode;

use super::busy;
use super::open::{self, FileChain, Request};
use super::progress::Meter;
use super::spec::ImageSpec;
use super::spec::nbd::NbdSpec;
use super::{Example, Task, Verb, advice, common, create, snapshot};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::interrupt::whole_or_gone;
use crate::options::{self, Asked, Given, Values};
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "convert",
    task: Task::Make,
    summary: "Copy a disk into a new image, whatever the formats",
    operands: "SOURCE... TARGET",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        Flag::valued('f', "source-format", "FMT", "format of SOURCE; probed where not given"),
        Flag::switch('\0', "image-opts", "SOURCE is a list of options").long_only(),
        Flag::switch('\0', "source-image-opts", "as --image-opts").long_only(),
        Flag::valued('l', "source-snapshot", "SNAPSHOT", "copy this internal snapshot of SOURCE"),
        Flag::valued('T', "source-cache", "MODE", "cache mode of SOURCE (writeback)"),
        Flag::valued('O', "target-format", "FMT", "format of TARGET (raw)"),
        Flag::switch('\0', "target-image-opts", "TARGET is a list of options; needs -n")
            .long_only(),
        Flag::valued('o', "target-options", "OPTS", "options of TARGET's format"),
        Flag::switch('c', "compress", "compress; qcow2 only"),
        Flag::valued('t', "target-cache", "MODE", "cache mode of TARGET (unsafe)"),
        Flag::valued('B', "backing", "FILE", "store only what differs from this backing file"),
        Flag::valued('F', "backing-format", "FMT", "format of the backing file"),
        Flag::switch('n', "no-create", "TARGET exists"),
        Flag::switch('\0', "target-is-zero", "TARGET reads as zeros; with -n").long_only(),
        Flag::valued('S', "sparse-size", "SIZE", "least run of zeros to leave out (4k; 0: none)"),
        Flag::switch('\0', "bitmaps", "copy dirty bitmaps too").long_only(),
        Flag::switch('\0', "skip-broken-bitmaps", "with --bitmaps: leave out broken ones")
            .long_only(),
        common::FORCE_SHARE,
        Flag::valued('r', "rate", "RATE", "bytes to write per second at most"),
        Flag::valued('m', "parallel", "COUNT", "requests in flight, 1 to 16 (8)"),
        Flag::switch('C', "copy-range-offloading", "let the host copy, sharing blocks if it can"),
        Flag::switch('\0', "salvage", "go on where SOURCE cannot be read: zeros there").long_only(),
        Flag::switch('W', "oob-writes", "write in any order"),
        Flag::switch('\0', "dedup", "store equal clusters once; qcow2 only").long_only().own(),
        common::DEDUP_MEMORY,
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example {
            shows: "a qcow2 image of a raw disk, compressed",
            line: "-c -O qcow2 disk.raw copy.qcow2",
        },
        Example {
            shows: "equal clusters of 4 KiB stored once",
            line: "--dedup -O qcow2 -o cluster_size=4k disk.raw copy.qcow2",
        },
        Example {
            shows: "the other way, with progress for a program",
            line: "--progress=json -O raw disk.qcow2 copy.raw",
        },
        Example {
            shows: "the disk as it was when a snapshot was made",
            line: "-l monday -O qcow2 snapshots.qcow2 monday.qcow2",
        },
        Example {
            shows: "only what differs from a backing file",
            line: "-O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 thin.qcow2",
        },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let Some(wish) = Wish::new(tool, parsed)? else { return help(tool, parsed) };
    // Progress begins before anything is opened, as stock's does.
    let meter = Meter::new(tool, parsed, "convert")?;
    let sources = wish.open_sources(tool, parsed)?;
    wish.check_target(tool, &sources)?;
    if wish.creates {
        wish.create(tool, &sources)?;
    }
    let copy = || {
        wish.open_target(tool, parsed, &sources).and_then(|target| {
            let mut options =
                ConvertOptions { content: wish.content(&sources, &target), ..wish.options };
            if target.levels().len() > 1 {
                // What is below may be exchanged one day; the copy is not to change with it.
                options.known_zeros = KnownZeros::Zeroed;
            }
            run::copy(tool, parsed, &sources, target, &options, meter)
        })
    };
    // Half a copy looks like a whole one. QEMU's programs leave it, and scripts know that.
    // What was on an export before is gone already, and the export is not ours to remove.
    match wish.creates && tool.is_own() && !wish.is_export() {
        true => whole_or_gone(&wish.target_name, copy)?,
        false => copy()?,
    }
    Ok(0)
}

/// `-o help`.
fn help(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let name = parsed.last("target-format").unwrap_or("raw");
    let format = Format::from_name(name).ok_or_else(|| unknown_format(name))?;
    create::list_options(tool, format)
}

fn unknown_format(name: &str) -> CliError {
    CliError::new(format!("Unknown file format '{name}'")).with_hint(advice::FORMATS)
}

/// What the command line asks for, checked as far as that goes without opening anything.
struct Wish {
    options: ConvertOptions,
    sources: Vec<Request>,
    /// The snapshot of the first source that is copied, not its disk.
    at: Option<SnapshotChoice>,
    target_name: String,
    target_format: Option<Format>,
    target_cache: CacheMode,
    given: Given,
    backing: Option<String>,
    backing_format: Option<String>,
    creates: bool,
    is_zero: bool,
    target_image_opts: bool,
    unnamed: UnnamedFormat,
}

impl Wish {
    /// Nothing where the options of the format are asked for.
    fn new(tool: &Tool, parsed: &Parsed) -> CliResult<Option<Self>> {
        asked::check(parsed)?;
        let given = match options::parse(parsed.all("target-options"))? {
            Asked::Help => return Ok(None),
            Asked::Values(given) => given,
        };
        let options = asked::options(tool, parsed)?;
        let at = parsed.last("source-snapshot").map(|text| snapshot::choice(tool, text));
        super::pace::rate(parsed)?;
        let (sources, target) = operands(parsed)?;
        let creates = !parsed.has("no-create");
        if parsed.has("target-is-zero") && creates {
            return Err(CliError::new("--target-is-zero requires use of -n flag"));
        }
        let target_image_opts = parsed.has("target-image-opts");
        if target_image_opts && creates {
            return Err(CliError::new("--target-image-opts requires use of -n flag"));
        }
        if target_image_opts && parsed.has("target-format") {
            return Err(asked::two_formats(tool, "--target-image-opts", "--target-format"));
        }
        let cache = open::source_cache(parsed, "source-cache")?;
        let sources: CliResult<Vec<Request>> =
            sources.iter().map(|source| source_request(tool, parsed, source, cache)).collect();
        let sources = sources?;
        if !creates && parsed.has("target-options") {
            return Err(CliError::new("-o has no effect when skipping image creation"));
        }
        let backing = parsed.last("backing").or_else(|| given.last("backing_file"));
        let backing = backing.filter(|name| !name.is_empty()).map(str::to_owned);
        if parsed.has("target-is-zero") && backing.is_some() {
            return Err(CliError::new(
                "Cannot use --target-is-zero when the destination image has a backing file",
            ));
        }
        Ok(Some(Self {
            options,
            sources,
            at: at.transpose()?,
            target_name: target.to_owned(),
            target_format: target_format(parsed)?,
            target_cache: asked::target_cache(parsed)?,
            given,
            backing,
            backing_format: parsed.last("backing-format").map(str::to_owned),
            creates,
            is_zero: parsed.has("target-is-zero"),
            target_image_opts,
            unnamed: open::unnamed(parsed),
        }))
    }

    fn open_sources(&self, tool: &Tool, parsed: &Parsed) -> CliResult<Vec<FileChain>> {
        let chains: CliResult<Vec<FileChain>> =
            self.sources.iter().map(|source| open::open_for_content(tool, source)).collect();
        let chains = chains?;
        if chains.len() > 1 && self.backing.is_some() {
            return Err(CliError::new(
                "Having a backing file for the target makes no sense when concatenating multiple \
                 input images",
            ));
        }
        let is_raw = self.target_format.unwrap_or(Format::Raw) == Format::Raw;
        if parsed.has("compress") && is_raw && !self.target_image_opts {
            let text = "Compression not supported for this file format";
            return Err(CliError::new(text).with_hint("-O qcow2 makes a qcow2 image"));
        }
        if parsed.has("dedup") && is_raw && !self.target_image_opts {
            let text = "Clusters of a raw disk cannot share: it has none";
            return Err(CliError::new(text).with_hint("-O qcow2 makes a qcow2 image"));
        }
        let target = open::of_library(self.target_format.unwrap_or(Format::Raw));
        bitmaps::check(parsed, &chains, target)?;
        self.at_snapshot(tool, chains)
    }

    /// As in QEMU's programs a snapshot is one of the first source, and a bare word needs it to be
    /// the only one.
    fn at_snapshot(&self, tool: &Tool, mut chains: Vec<FileChain>) -> CliResult<Vec<FileChain>> {
        let Some(choice) = &self.at else { return Ok(chains) };
        if chains.len() > 1 && matches!(choice, SnapshotChoice::IdOrName(_)) {
            return Err(CliError::new("No support for concatenating multiple snapshot"));
        }
        let first = chains.remove(0);
        chains.insert(0, snapshot::at(tool, first, choice)?);
        Ok(chains)
    }

    fn open_target(
        &self,
        tool: &Tool,
        parsed: &Parsed,
        sources: &[FileChain],
    ) -> CliResult<FileChain> {
        let format = self.target_format.unwrap_or(Format::Raw);
        let image = match self.target_image_opts {
            true => ImageSpec::from_options(&self.target_name)?,
            false => ImageSpec::from_name(&self.target_name, Some(format.name()))?,
        };
        let image = open::with_certificates(image, parsed)?;
        let (access, cache) = (Access::ReadWrite, self.target_cache);
        let (sharing, unnamed) = (Sharing::Format, self.unnamed);
        let request = Request { image, access, cache, sharing, unnamed };
        let target = open::open(tool, &request)?;
        match target.disk().size_bytes() < total(sources)? {
            true => {
                Err(CliError::new("output file is smaller than input file").in_our_words(format!(
                    "{} is smaller ({} bytes) than what is to be copied ({} bytes)",
                    self.target_name,
                    target.disk().size_bytes(),
                    total(sources)?
                )))
            }
            false => Ok(target),
        }
    }

    /// Refuses to write to what is read from, also where it is not locked: `-U` was given, or the
    /// host has no locks.
    fn check_target(&self, tool: &Tool, sources: &[FileChain]) -> CliResult<()> {
        let target = Path::new(&self.target_name);
        let is_locked = self.sources.iter().all(|source| source.sharing != Sharing::All);
        match sources.iter().any(|chain| open::is_part_of(target, chain)) {
            false => Ok(()),
            true if is_locked && !tool.is_own() => Err(match self.creates {
                true => busy::own_source(&self.target_name).under(self.while_converting()),
                false => open::cannot_open(&self.target_name, busy::own_source(&self.target_name)),
            }),
            true => Err(CliError::new("The target is the source, or a file the source lies in")
                .under(&self.target_name)),
        }
    }

    fn while_converting(&self) -> String {
        let format = self.target_format.unwrap_or(Format::Raw);
        format!("{}: error while converting {format}", self.target_name)
    }

    fn create(&self, tool: &Tool, sources: &[FileChain]) -> CliResult<()> {
        let format = self.target_format.unwrap_or(Format::Raw);
        let mut values = Values::new(format, &self.given)?;
        // QEMU's programs read `-o size` and make the target as large as the sources all the same.
        if values.text("size").is_none() || !tool.is_own() {
            values.set("size", total(sources)?.to_string());
        }
        self.set_backing(tool, &mut values, format)?;
        asked::check_compressed(self.options.encoding, &values)?;
        let plan = create::Plan::checked(tool, format, values, &self.target_name);
        plan.and_then(|plan| plan.make()).map_err(|error| error.under(self.while_converting()))
    }

    fn set_backing(&self, tool: &Tool, values: &mut Values, format: Format) -> CliResult<()> {
        for (asked, name, shown) in [
            (&self.backing, "backing_file", "Backing file"),
            (&self.backing_format, "backing_fmt", "Backing file format"),
        ] {
            if asked.is_some() && !values.takes(name) {
                let text = format!("{shown} not supported for file format '{format}'");
                return Err(CliError::new(text));
            }
        }
        let Some(name) = &self.backing else {
            // Making the image refuses it, as there is nothing that it could be the format of.
            if let Some(format) = &self.backing_format {
                values.set("backing_fmt", format.clone());
            }
            return Ok(());
        };
        let Some(backing_format) = self
            .backing_format
            .as_deref()
            .or_else(|| values.text("backing_fmt"))
            .map(str::to_owned)
        else {
            return Err(CliError::new("Use of backing file requires explicit backing format")
                .with_hint("-F names the format of the backing file"));
        };
        let path = create::beside(Path::new(&self.target_name), name);
        let image = ImageSpec::from_name(&path.to_string_lossy(), Some(&backing_format))?;
        let (access, cache) = (Access::ReadOnly, CacheMode::Buffered);
        // Nothing is read of it; the target is opened with it later.
        let (sharing, unnamed) = (Sharing::All, self.unnamed);
        let request = Request { image, access, cache, sharing, unnamed };
        let chain = match tool.is_own() {
            true => open::open(tool, &request)?,
            // Stock finds out when it opens the target.
            false => open::open_bare(tool, &request).map_err(|error| {
                let error = error.under("Could not open backing file");
                open::cannot_open(&self.target_name, error)
            })?,
        };
        if open::is_part_of(Path::new(&self.target_name), &chain) {
            return Err(CliError::new("The target is part of its own backing chain")
                .under(&self.target_name));
        }
        values.set("backing_file", name.clone());
        values.set("backing_fmt", backing_format);
        Ok(())
    }

    fn is_export(&self) -> bool {
        NbdSpec::is_name(&self.target_name)
    }

    /// Says whether making the target leaves zeros; a raw disk keeps what its export had.
    fn creates_zeros(&self) -> bool {
        let is_raw = self.target_format.unwrap_or(Format::Raw) == Format::Raw;
        self.creates && !(is_raw && self.is_export())
    }

    /// Says what is known of the target's content.
    fn content(&self, sources: &[FileChain], target: &FileChain) -> TargetContent {
        let below = |chain: &FileChain| chain.levels().get(1).map_or(0, |level| level.size_bytes);
        if self.creates && self.backing.is_some() {
            let source_bytes = sources.first().map_or(0, below);
            TargetContent::Backing { source_bytes, target_bytes: below(target) }
        } else if self.is_zero || (self.creates_zeros() && target.levels().len() == 1) {
            TargetContent::Zero
        } else {
            TargetContent::Unknown
        }
    }
}

fn source_request(
    tool: &Tool,
    parsed: &Parsed,
    source: &str,
    cache: CacheMode,
) -> CliResult<Request> {
    let format = parsed.last("source-format");
    let with_options = parsed.has("image-opts") || parsed.has("source-image-opts");
    let image = match with_options {
        true if format.is_some() => {
            return Err(asked::two_formats(tool, "--image-opts", "--source-format"));
        }
        true => ImageSpec::from_options(source),
        false => ImageSpec::from_name(source, format),
    };
    let image = image.and_then(|image| open::with_certificates(image, parsed));
    let image = image.map_err(|error| open::cannot_open(source, error))?;
    open::check_force_share(parsed, &image, "--force-share/-U")?;
    let sharing = match open::sharing(parsed) {
        // What is copied has to hold still.
        Sharing::Format => Sharing::Readers,
        shared => shared,
    };
    let unnamed = open::unnamed(parsed);
    Ok(Request { image, access: Access::ReadOnly, cache, sharing, unnamed })
}

fn target_format(parsed: &Parsed) -> CliResult<Option<Format>> {
    let Some(name) = parsed.last("target-format") else { return Ok(None) };
    Format::from_name(name).map(Some).ok_or_else(|| unknown_format(name))
}

fn operands(parsed: &Parsed) -> CliResult<(&[String], &str)> {
    match &parsed.operands[..] {
        [] | [_] => {
            let failure = CliError::new("Must specify image file name");
            Err(failure.in_our_words("Expecting a source and a target"))
        }
        [sources @ .., target] => Ok((sources, target)),
    }
}

/// Adds the sizes of the sources.
fn total(sources: &[FileChain]) -> CliResult<u64> {
    let sizes = sources.iter().map(|source| source.disk().size_bytes());
    let total = sizes.into_iter().try_fold(0u64, u64::checked_add);
    total.ok_or_else(|| CliError::new("The sources together are too large for a disk"))
}
