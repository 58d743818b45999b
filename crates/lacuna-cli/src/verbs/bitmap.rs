//! `bitmap`: makes, changes, lists and repairs the dirty bitmaps that an image keeps.

use lacuna::qcow2::check::{self, CheckOptions, Repair};
use lacuna::qcow2::format::StoredName;
use lacuna::qcow2::{Access, Image, NewBitmap, repair_bitmaps};
use lacuna::{Error, ErrorKind};
use pollster::block_on;
use serde_json::json;

use super::open::{self, FileChain, Request};
use super::{Example, Form, Task, Verb, common, form};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::output::{self, Lines};
use crate::persona::Tool;
use crate::size;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "bitmap",
    task: Task::Change,
    summary: "Make, merge, list and repair the dirty bitmaps of an image",
    operands: "FILENAME [BITMAP]",
    flags: &[
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::switch('\0', "add", "make BITMAP; it records changes").long_only(),
        Flag::switch('\0', "remove", "remove BITMAP").long_only(),
        Flag::switch('\0', "clear", "have BITMAP say that nothing has changed").long_only(),
        Flag::switch('\0', "enable", "have BITMAP record changes").long_only(),
        Flag::switch('\0', "disable", "have BITMAP record nothing").long_only(),
        Flag::valued('\0', "merge", "SOURCE", "add to BITMAP what bitmap SOURCE names").long_only(),
        Flag::valued('b', "source-file", "FILE", "with --merge: the image that SOURCE is in"),
        Flag::valued('F', "source-format", "FMT", "with -b: the format of that image"),
        Flag::valued('g', "granularity", "SIZE", "with --add: guest bytes for a bit (64k)"),
        Flag::switch('\0', "dump", "list what BITMAP names").long_only().own(),
        Flag::switch('\0', "repair", "make all bitmaps usable: those left in use name everything")
            .long_only()
            .own(),
        common::OUTPUT.own(),
        common::PROBE_BACKING,
        common::OBJECT,
    ],
    examples: &[
        Example { shows: "record what changes from now on", line: "--add disk.qcow2 monday" },
        Example {
            shows: "what has changed? for programs",
            line: "--dump --output=json bitmaps.qcow2 monday",
        },
        Example {
            shows: "a line of backups goes on, another begins",
            line: "--add -g 1M --disable --merge monday bitmaps.qcow2 week",
        },
        Example { shows: "after a crash of another program", line: "--repair bitmaps.qcow2" },
    ],
    codes: &[],
    run,
};

/// The options that say what to do; they are done in their order.
const ACTIONS: [&str; 6] = ["add", "remove", "clear", "enable", "disable", "merge"];

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let actions: Vec<_> =
        parsed.in_order().filter(|(option, _)| ACTIONS.contains(option)).collect();
    match (parsed.has("dump"), parsed.has("repair"), actions.is_empty()) {
        (true, false, true) => dump(tool, parsed, form),
        (false, true, true) => repair(tool, parsed, form),
        (false, false, false) => change(tool, parsed, &actions),
        (false, false, true) => Err(CliError::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        )
        .with_hint("--dump lists what a bitmap names, --repair makes bitmaps usable again")),
        _ => Err(CliError::usage("--dump and --repair stand alone")),
    }
}

/// Returns the two operands.
fn file_and_bitmap(parsed: &Parsed) -> CliResult<(&str, StoredName)> {
    match &parsed.operands[..] {
        [file, bitmap] => Ok((file, bitmap.as_str().into())),
        _ => Err(CliError::new("Expecting filename and bitmap name")),
    }
}

// ---- changes ---------------------------------------------------------------------------------

fn change(tool: &Tool, parsed: &Parsed, actions: &[(&'static str, &str)]) -> CliResult<u8> {
    let merges = parsed.has("merge");
    let problem = match () {
        () if parsed.has("source-format") && !parsed.has("source-file") => {
            Some("-F only supported with -b")
        }
        () if parsed.has("source-file") && !merges => {
            Some("Merge bitmap source file only supported with --merge")
        }
        () if parsed.has("granularity") && !parsed.has("add") => {
            Some("granularity only supported with --add")
        }
        () => None,
    };
    if let Some(problem) = problem {
        return Err(CliError::new(problem));
    }
    let granularity = parsed.last("granularity").map(granularity).transpose()?;
    let (file, name) = file_and_bitmap(parsed)?;
    let request =
        Request { access: Access::ReadWrite, ..Request::reading(file, parsed, "format")? };
    let chain = open::open(tool, &request)?;
    open::warn_of_guess(&request, &chain);
    let source = parsed.last("source-file").map(|file| open_source(tool, parsed, file));
    let source = source.transpose()?;
    let new = NewBitmap { granularity_bytes: granularity, ..NewBitmap::new(name) };
    let work = Work { chain: &chain, source: source.as_ref(), new };
    let done = actions.iter().try_for_each(|(action, value)| work.run(tool, action, value));
    let closed = block_on(chain.into_disk().close());
    done?;
    closed?;
    Ok(0)
}

fn granularity(text: &str) -> CliResult<u64> {
    size::parse(text).map_err(|_| {
        CliError::new(format!("Invalid granularity specified: '{text}'."))
            .with_hint("it is a power of two, as 64k or 1M")
    })
}

fn open_source(tool: &Tool, parsed: &Parsed, file: &str) -> CliResult<FileChain> {
    let request = Request::reading(file, parsed, "source-format")?;
    open::open(tool, &request)
}

struct Work<'a> {
    chain: &'a FileChain,
    source: Option<&'a FileChain>,
    new: NewBitmap,
}

impl Work<'_> {
    fn run(&self, tool: &Tool, action: &str, value: &str) -> CliResult<()> {
        let name = &self.new.name;
        let image = with_bitmaps(self.chain);
        let done = image.and_then(|image| block_on(self.act(image, action, value)));
        done.map_err(|error| {
            let shown = output::tame(&name.to_string());
            words(tool, error, if action == "merge" { value } else { &shown })
                .under(format!("Operation {action} on bitmap {shown} failed"))
        })
    }

    async fn act(
        &self,
        image: &Image<AnyStorage>,
        action: &str,
        value: &str,
    ) -> lacuna::Result<()> {
        let name = &self.new.name;
        match action {
            "add" => image.add_bitmap(&self.new).await,
            "remove" => image.remove_bitmap(name).await,
            "clear" => image.clear_bitmap(name).await,
            "enable" => image.enable_bitmap(name, true).await,
            "disable" => image.enable_bitmap(name, false).await,
            _ => {
                let other = self.source.map_or(Ok(image), with_bitmaps)?;
                image.merge_bitmap(name, &other.bitmap(&value.into()).await?).await
            }
        }
    }
}

/// Says what went wrong with a bitmap, in QEMU's words and in ours.
fn words(tool: &Tool, error: Error, name: &str) -> CliError {
    let own = error.to_string();
    let is_granularity = own.starts_with("Granularity");
    let qemu = match error.kind() {
        _ if tool.is_own() => return hinted(error),
        ErrorKind::NotFound => format!("Dirty bitmap '{name}' not found"),
        ErrorKind::Corrupt if own.contains("in use") => {
            format!("Bitmap '{name}' is inconsistent and cannot be used")
        }
        ErrorKind::InvalidRequest if is_granularity => {
            "Granularity must be power of 2 and at least 512".to_owned()
        }
        _ => return CliError::from(error),
    };
    CliError::new(qemu).with_class(error.kind()).in_our_words(own)
}

/// A check has nothing to say of a bitmap that was left in use.
fn hinted(error: Error) -> CliError {
    let is_corrupt = error.kind() == ErrorKind::Corrupt;
    let failure = CliError::from(error);
    match is_corrupt {
        true => {
            failure.with_better_hint("`lacuna bitmap --repair IMAGE` makes bitmaps usable again")
        }
        false => failure,
    }
}

// ---- listing ---------------------------------------------------------------------------------

fn dump(tool: &Tool, parsed: &Parsed, form: Form) -> CliResult<u8> {
    let (file, name) = file_and_bitmap(parsed)?;
    let chain = open::open(tool, &Request::reading(file, parsed, "format")?)?;
    let image = with_bitmaps(&chain)?;
    let mut ranges = block_on(image.bitmap(&name)).map_err(hinted)?.ranges();
    let mut lines = match form {
        Form::Human => Lines::starting(&format!("{:<16}Length\n", "Offset")),
        Form::Json => Lines::starting("["),
    };
    let mut separator = "\n";
    while let Some(range) = block_on(ranges.next())? {
        match form {
            Form::Human => lines.text(&format!("{:<#16x}{:#x}\n", range.start.0, range.len)),
            Form::Json => {
                let range = json!({ "start": range.start.0, "length": range.len });
                lines.text(&format!("{separator}{range}"));
                separator = ",\n";
            }
        }
        lines.print_when_full()?;
    }
    if form == Form::Json {
        lines.text("]\n");
    }
    lines.print().map(|()| 0)
}

/// Returns the image at the top, which is to be one that keeps bitmaps.
fn with_bitmaps(chain: &FileChain) -> lacuna::Result<&Image<AnyStorage>> {
    let image = chain.disk().as_qcow2();
    image.ok_or_else(|| Error::unsupported("Only qcow2 images keep bitmaps"))
}

// ---- repairing -------------------------------------------------------------------------------

fn repair(tool: &Tool, parsed: &Parsed, form: Form) -> CliResult<u8> {
    let [file] = &parsed.operands[..] else {
        return Err(CliError::usage("Expecting one image file name: all its bitmaps are repaired"));
    };
    let request =
        Request { access: Access::ReadWrite, ..Request::reading(file, parsed, "format")? };
    let storage = super::check::opened(tool, &request)?;
    super::check::claim(tool, &storage, crate::format::Format::Qcow2, &request)
        .map_err(|error| open::cannot_open(file, error))?;
    let repairs = block_on(repair_bitmaps(&storage))?;
    if repairs.changed_anything() {
        // Clusters of bits that nothing names any more.
        let options = CheckOptions { repair: Repair::Leaks };
        block_on(check::check(&storage, &options, &mut |_| ()))?;
    }
    drop(storage);
    remove_broken(tool, &request, &repairs.broken)?;
    output::print(&match form {
        Form::Human => told(&repairs),
        Form::Json => {
            let names = |names: &[StoredName]| -> serde_json::Value {
                names.iter().map(|name| name.to_string_lossy().into_owned()).collect()
            };
            let value = json!({
                "outdated": repairs.outdated,
                "lost-entries": repairs.lost_entries,
                "all-dirty": names(&repairs.all_dirty),
                "removed": names(&repairs.broken),
            });
            output::pretty(&value) + "\n"
        }
    })?;
    Ok(0)
}

fn remove_broken(tool: &Tool, request: &Request, broken: &[StoredName]) -> CliResult<()> {
    if broken.is_empty() {
        return Ok(());
    }
    let chain = open::open(tool, request)?;
    let image = with_bitmaps(&chain)?;
    let removed = broken.iter().try_for_each(|name| block_on(image.remove_bitmap(name)));
    let closed = block_on(chain.into_disk().close());
    removed?;
    closed?;
    Ok(())
}

fn told(repairs: &lacuna::qcow2::BitmapRepairs) -> String {
    let mut text = String::new();
    if repairs.outdated {
        text += "All bitmaps were out of date, and are gone.\n";
    }
    if repairs.lost_entries > 0 {
        text += &format!("{} bitmaps could not be read, and are gone.\n", repairs.lost_entries);
    }
    for name in &repairs.all_dirty {
        let name = output::tame(&name.to_string());
        text += &format!("Bitmap '{name}' had been left in use: it names the whole disk now.\n");
    }
    for name in &repairs.broken {
        let name = output::tame(&name.to_string());
        text += &format!("Bitmap '{name}' could not be used, and is gone.\n");
    }
    match text.is_empty() {
        true => "Every bitmap can be used.\n".to_owned(),
        false => text,
    }
}
