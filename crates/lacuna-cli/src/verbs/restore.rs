//! `restore`: makes a disk of a restore point.

use std::path::Path;

use lacuna::ErrorKind;
use lacuna::block::Layer;
use lacuna::job::{self, CompareOptions, ConvertOptions, Encoding, TargetContent};
use lacuna::qcow2::Access;
use lacuna_backup::{Content, Folder, Point, PointDisk};
use pollster::block_on;

use super::backup::{POINT, open_point};
use super::open::{self, FileChain, Request};
use super::progress::Meter;
use super::spec::ImageSpec;
use super::spec::nbd::NbdSpec;
use super::{Example, ExitCode, Task, Verb, advice, common, create};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::interrupt::whole_or_gone;
use crate::options::{self, Asked, Values};
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "restore",
    task: Task::Beside,
    summary: "Make a disk of a restore point of `backup`",
    operands: "FOLDER TARGET",
    flags: &[
        common::QUIET,
        common::PROGRESS,
        POINT,
        Flag::valued(
            'O',
            "target-format",
            "FMT",
            "format of TARGET (that of the source; of exports raw)",
        ),
        Flag::valued('o', "target-options", "OPTS", "options of TARGET's format"),
        Flag::switch('c', "compress", "compress; qcow2 only"),
        Flag::switch('n', "no-create", "TARGET exists, and is written"),
        Flag::switch('\0', "overwrite", "replace TARGET where it exists").long_only(),
        Flag::switch('\0', "no-verify", "do not read TARGET once more to compare it").long_only(),
        common::OBJECT,
    ],
    examples: &[
        Example {
            shows: "the last point, in the format of its source",
            line: "points disk2.qcow2",
        },
        Example {
            shows: "an earlier one, as a raw disk",
            line: "--point monday -O raw points old.raw",
        },
    ],
    codes: &[
        ExitCode { code: 0, means: "done, and read once more" },
        ExitCode { code: 1, means: "not done; standard error says why" },
    ],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let [folder, target] = &parsed.operands[..] else {
        return Err(CliError::usage("Expecting a folder of restore points and a target"));
    };
    let meter = Meter::new(tool, parsed, "restore")?;
    let (folder, points) = open_point(parsed, folder)?;
    let work = Work { tool, parsed, target, point: &points[0] };
    work.check()?;
    match &points[0].manifest.content {
        Content::Segments { .. } => work.carry_out(&PointDisk::open(&folder, &points)?, meter)?,
        Content::Qcow2 { .. } => {
            work.carry_out(work.open_image(&folder)?.disk(), meter)?;
        }
    }
    if !parsed.has("quiet") {
        output::print(&format!("Point '{}' is restored to {target}\n", points[0].name()))?;
    }
    Ok(0)
}

struct Work<'a> {
    tool: &'a Tool,
    parsed: &'a Parsed,
    target: &'a str,
    point: &'a Point,
}

impl Work<'_> {
    /// Refuses to replace what is there.
    fn check(&self) -> CliResult<()> {
        let (is_export, exists) = (NbdSpec::is_name(self.target), Path::new(self.target).exists());
        let text = match self.creates() {
            true if is_export => format!("{} is an export, which cannot be made", self.target),
            true if exists && !self.parsed.has("overwrite") => {
                format!("{} exists already", self.target)
            }
            _ => return Ok(()),
        };
        Err(CliError::new(text)
            .with_class(ErrorKind::InvalidRequest)
            .with_hint("-n writes into what is there; --overwrite replaces a file"))
    }

    fn creates(&self) -> bool {
        !self.parsed.has("no-create")
    }

    /// Opens the image of the point, which no guest has written to.
    fn open_image(&self, folder: &Folder) -> CliResult<FileChain> {
        let path = folder.image_path(self.point.name());
        let request = self.request(&path.to_string_lossy(), Format::Qcow2, Access::ReadOnly)?;
        open::open_for_content(self.tool, &request)
    }

    fn request(&self, name: &str, format: Format, access: Access) -> CliResult<Request> {
        let image = ImageSpec::from_name(name, Some(format.name()))?;
        let image = open::with_certificates(image, self.parsed)?;
        let (cache, sharing) = Default::default();
        let unnamed = open::unnamed(self.parsed);
        Ok(Request { image, access, cache, sharing, unnamed })
    }

    fn format(&self) -> CliResult<Format> {
        let usual = match NbdSpec::is_name(self.target) {
            true => Format::Raw.name(),
            false => &self.point.manifest.facts.source_format,
        };
        let name = self.parsed.last("target-format").unwrap_or(usual);
        Format::from_name(name).ok_or_else(|| {
            CliError::new(format!("Unknown file format '{name}'")).with_hint(advice::FORMATS)
        })
    }

    fn carry_out<L: Layer>(&self, source: &L, mut meter: Meter) -> CliResult<()> {
        let made = match self.creates() {
            true => whole_or_gone(self.target, || {
                self.create(source.size_bytes())?;
                self.copy_and_compare(source, &mut meter)
            }),
            false => self.copy_and_compare(source, &mut meter),
        };
        meter.finish(made.is_ok());
        made
    }

    fn create(&self, size_bytes: u64) -> CliResult<()> {
        let given = match options::parse(self.parsed.all("target-options"))? {
            Asked::Values(given) => given,
            Asked::Help => return Err(CliError::usage("`lacuna create -o help` lists them")),
        };
        let format = self.format()?;
        let mut values = Values::new(format, &given)?;
        values.set("size", size_bytes.to_string());
        create::Plan::checked(self.tool, format, values, self.target)?.make()
    }

    fn copy_and_compare<L: Layer>(&self, source: &L, meter: &mut Meter) -> CliResult<()> {
        let target = open::open(self.tool, &self.target_request(Access::ReadWrite)?)?;
        let content = if self.creates() { TargetContent::Zero } else { TargetContent::Unknown };
        let encoding = match self.parsed.has("compress") {
            true => Encoding::Compressed,
            false => Encoding::Plain,
        };
        let options = ConvertOptions { content, encoding, ..ConvertOptions::default() };
        let mut report = |progress| meter.show_copy(&progress);
        let copied = block_on(job::convert(source, target.disk(), &options, &mut report));
        let closed = block_on(target.into_disk().close());
        copied?;
        closed?;
        match self.parsed.has("no-verify") {
            true => Ok(()),
            false => self.compare(source, meter),
        }
    }

    /// Reads what was written, and compares it with the point.
    fn compare<L: Layer>(&self, source: &L, meter: &mut Meter) -> CliResult<()> {
        let target = open::open_for_content(self.tool, &self.target_request(Access::ReadOnly)?)?;
        let mut report = |done, total| meter.update("compare", done, total);
        let options = CompareOptions::default();
        let found = block_on(job::compare(source, target.disk(), options, &mut report))?;
        let size = source.size_bytes();
        match found.difference.and_then(|found| found.sector()).filter(|at| at.0 < size) {
            None => Ok(()),
            Some(at) => {
                let text = format!("{} reads other bytes at {} than the point", self.target, at.0);
                Err(CliError::new(text).with_class(ErrorKind::Corrupt).with_fact("offset", at.0))
            }
        }
    }

    fn target_request(&self, access: Access) -> CliResult<Request> {
        self.request(self.target, self.format()?, access)
    }
}
