//! `dedup IMAGE`: has equal clusters of one image share a place.

use lacuna::ErrorKind;
use lacuna::job::{Dedup, DedupOptions, DedupPhase, DedupProgress, Deduped, Sharing};
use lacuna::qcow2::{Access, Image};
use pollster::block_on;
use serde_json::json;

use super::{
    FileChain, Form, HAZARD, Meter, Request, declined, form, memory_bytes, open, would_free,
};
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::interrupt::{INTERRUPTED, Interrupted};
use crate::nodes::AnyStorage;
use crate::output::{self, short_size};
use crate::persona::Tool;
use crate::verbs::pace::Pace;

pub(super) fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let [name] = &parsed.operands[..] else {
        let text = "Expecting one image file name; --report takes several";
        return Err(CliError::usage(text));
    };
    let form = form(parsed)?;
    let pace = Pace::read(parsed)?;
    let memory_bytes = memory_bytes(parsed)?;
    // A look changes nothing, not even what opening for writing repairs.
    let access = if parsed.has("dry-run") { Access::ReadOnly } else { Access::ReadWrite };
    let request = Request { access, ..Request::reading(name, parsed, "format")? };
    let chain = open::open(tool, &request)?;
    let result = match chain.disk().as_qcow2() {
        None => Err(raw(name)),
        Some(_) if access == Access::ReadOnly => dry_run(tool, parsed, &chain, name),
        Some(image) => prepare(image, memory_bytes, &pace, name)
            .and_then(|dedup| steps(tool, parsed, dedup, pace, name)),
    };
    // The image is closed in any case; the first error is the one to tell.
    let closed = block_on(chain.into_disk().close());
    let outcome = result?;
    closed?;
    if !parsed.has("quiet") {
        output::print(&outcome.text(form))?;
    }
    Ok(outcome.exit_code())
}

fn prepare(
    image: &Image<AnyStorage>,
    memory_bytes: u64,
    pace: &Pace,
    name: &str,
) -> CliResult<Dedup<AnyStorage>> {
    begin(image, memory_bytes, pace).map_err(|error| {
        CliError::from(error).under(format!("Clusters of '{}' cannot share", output::tame(name)))
    })
}

/// Prepares to share in steps that are as large as the pace allows.
pub(crate) fn begin(
    image: &Image<AnyStorage>,
    memory_bytes: u64,
    pace: &Pace,
) -> lacuna::Result<Dedup<AnyStorage>> {
    let slice_bytes = pace.slice_bytes(DedupOptions::default().slice_bytes);
    let sharing = Sharing::WhereItPays;
    Dedup::new(image, DedupOptions { memory_bytes, slice_bytes, sharing, ..Default::default() })
}

pub(super) fn raw(name: &str) -> CliError {
    let text = format!("'{}' is a raw disk, which has no clusters to share", output::tame(name));
    CliError::new(text)
        .with_class(ErrorKind::Unsupported)
        .with_hint("--report tells what an image of qcow2 would save; convert makes one")
}

/// Only looks.
fn dry_run(tool: &Tool, parsed: &Parsed, chain: &FileChain, name: &str) -> CliResult<Outcome> {
    let mut meter = Meter::new(tool, parsed, "dedup")?;
    let found = would_free(chain, memory_bytes(parsed)?, &mut meter);
    meter.finish(found.is_ok());
    Ok(Outcome::Looked { name: name.to_owned(), would_free: found? })
}

/// Goes on until all is done, or somebody interrupts it.
fn steps(
    tool: &Tool,
    parsed: &Parsed,
    mut dedup: Dedup<AnyStorage>,
    mut pace: Pace,
    name: &str,
) -> CliResult<Outcome> {
    let interrupted = Interrupted::watch();
    let mut meter = Meter::new(tool, parsed, "dedup")?;
    let run = run_through(&mut dedup, &mut pace, &mut meter, &interrupted)?;
    meter.finish(run.is_whole);
    Ok(Outcome::Shared { name: name.to_owned(), done: dedup.so_far(), is_whole: run.is_whole })
}

/// How far the steps came.
pub(crate) struct Run {
    /// Nobody interrupted them.
    pub(crate) is_whole: bool,
    /// What they read.
    pub(crate) read_bytes: u64,
}

/// Takes all steps, or those before an interruption.
pub(crate) fn run_through(
    dedup: &mut Dedup<AnyStorage>,
    pace: &mut Pace,
    meter: &mut Meter,
    interrupted: &Interrupted,
) -> CliResult<Run> {
    let mut read_bytes = 0;
    while !interrupted.is_so() {
        let Some(progress) = block_on(dedup.step())? else {
            return Ok(Run { is_whole: true, read_bytes });
        };
        show(meter, &progress);
        read_bytes += progress.read_bytes;
        pace.keep(progress.read_bytes, interrupted);
    }
    Ok(Run { is_whole: false, read_bytes })
}

fn show(meter: &mut Meter, progress: &DedupProgress) {
    let phase = match progress.phase {
        DedupPhase::Find => "find",
        DedupPhase::Share => "share",
    };
    meter.update(phase, progress.done_bytes, progress.total_bytes);
}

enum Outcome {
    Looked { name: String, would_free: u64 },
    Shared { name: String, done: Deduped, is_whole: bool },
}

impl Outcome {
    const fn exit_code(&self) -> u8 {
        match self {
            Self::Shared { is_whole: false, .. } => INTERRUPTED,
            Self::Shared { .. } | Self::Looked { .. } => 0,
        }
    }

    fn text(&self, form: Form) -> String {
        match (form, self) {
            (Form::Human, Self::Looked { name, would_free }) => {
                format!("{}: would free about {}\n", output::tame(name), short_size(*would_free))
            }
            (Form::Json, Self::Looked { name, would_free }) => {
                output::pretty(&json!({ "filename": name, "would-free": would_free })) + "\n"
            }
            (Form::Human, Self::Shared { name, done, is_whole }) => human(name, done, *is_whole),
            (Form::Json, Self::Shared { name, done, is_whole }) => json(name, done, *is_whole),
        }
    }
}

fn human(name: &str, done: &Deduped, is_whole: bool) -> String {
    let Deduped { clusters, shared, keepers, .. } = done;
    let mut text = format!(
        "{}: {shared} of {clusters} clusters share a place now and did not before; {} freed\n",
        output::tame(name),
        short_size(done.freed_bytes)
    );
    if !is_whole {
        text += "Interrupted; the image is valid, and another run goes on from here\n";
    }
    text += &declined(&done.declined);
    if done.zero_clusters > 0 {
        text += &format!(
            "Clusters that hold nothing but zeros, and share nothing: {}\n",
            done.zero_clusters
        );
    }
    if done.united > 0 {
        text += &format!(
            "Clusters of snapshots, or shared before, given up for others with the same bytes: {}\n",
            done.united
        );
    }
    if *shared + done.united > 0 {
        let pins = match keepers {
            0 => String::new(),
            _ => {
                format!(
                    "New shared places, pinned by 8 bytes each in a hidden snapshot: {keepers}\n"
                )
            }
        };
        text += &(pins + HAZARD);
    }
    text
}

fn json(name: &str, done: &Deduped, is_whole: bool) -> String {
    let object = json!({
        "filename": name,
        "finished": is_whole,
        "clusters": done.clusters,
        "zero-clusters": done.zero_clusters,
        "shared": done.shared,
        "keepers": done.keepers,
        "united": done.united,
        "differed": done.differed,
        "freed": done.freed_bytes,
        "unpinned": done.unpinned_bytes,
        "declined": done.declined.saved_bytes,
    });
    output::pretty(&object) + "\n"
}
