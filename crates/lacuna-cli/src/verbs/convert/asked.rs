//! What the flags ask of the copy itself, and what they must not ask together.

use lacuna::job::{ConvertOptions, Encoding, KnownZeros, Mover, WriteOrder};
use lacuna::storage::CacheMode;

use super::super::advice;
use super::super::open;
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::options::Values;
use crate::persona::Tool;
use crate::size::{self, SizeError};

/// Refuses what makes no sense, and what this verb does not do, rather than do something else.
pub(super) fn check(parsed: &Parsed) -> CliResult<()> {
    let offloads = parsed.has("copy-range-offloading");
    let problem = match () {
        () if parsed.has("skip-broken-bitmaps") && !parsed.has("bitmaps") => {
            "Use of --skip-broken-bitmaps requires --bitmaps"
        }
        () if offloads && parsed.has("sparse-size") => {
            "Cannot enable copy offloading when -S is used"
        }
        () if offloads && parsed.has("compress") => "Cannot enable copy offloading when -c is used",
        () if offloads && parsed.has("dedup") => {
            "Cannot enable copy offloading when --dedup is used"
        }
        () if parsed.has("dedup-memory") && !parsed.has("dedup") => {
            "Use of --dedup-memory requires --dedup"
        }
        () if offloads && parsed.has("salvage") => "Cannot use copy offloading in salvaging mode",
        () => return Ok(()),
    };
    Err(CliError::new(problem))
}

/// Refuses a format beside options that say it; QEMU's programs name the same two options always.
pub(super) fn two_formats(tool: &Tool, options: &str, format: &str) -> CliError {
    let (options, format) = match tool.is_own() {
        true => (options, format),
        false => ("--image-opts", "--format"),
    };
    CliError::new(format!("{options} and {format} are mutually exclusive"))
}

/// Reads the flags that say how to copy.
pub(super) fn options(tool: &Tool, parsed: &Parsed) -> CliResult<ConvertOptions> {
    let mut options = ConvertOptions::default();
    if let Some(text) = parsed.last("sparse-size") {
        options.sparse_bytes = sparse_size(text)?;
    }
    if let Some(text) = parsed.last("parallel") {
        options.in_flight = in_flight(text)?;
    }
    if parsed.has("oob-writes") {
        options.order = WriteOrder::Any;
    }
    if parsed.has("compress") {
        options.encoding = Encoding::Compressed;
    }
    if parsed.has("copy-range-offloading") {
        options.mover = Mover::Host;
    }
    if !tool.is_own() {
        options.known_zeros = KnownZeros::Zeroed;
    }
    Ok(options)
}

/// Refuses to reserve space for clusters that will be stored elsewhere, compressed.
pub(super) fn check_compressed(encoding: Encoding, values: &Values) -> CliResult<()> {
    let reserves = values.text("preallocation").is_some_and(|mode| mode != "off");
    match encoding == Encoding::Compressed && reserves {
        true => {
            let text = "Compression and preallocation not supported at the same time";
            Err(CliError::new(text).with_hint("leave out -c or -o preallocation"))
        }
        false => Ok(()),
    }
}

/// Reads `-t`. A copy ends on the disk anyway: where nothing is asked for, large writes go there
/// directly.
pub(super) fn target_cache(parsed: &Parsed) -> CliResult<CacheMode> {
    let asked = open::target_cache(parsed, "target-cache")?;
    Ok(asked.unwrap_or(CacheMode::LargeWritesDirect))
}

fn sparse_size(text: &str) -> CliResult<u64> {
    const MOST: u64 = 16 << 20;
    match size::parse_offset(text) {
        Ok(size) if size % 512 == 0 && size <= MOST => Ok(size),
        Err(SizeError::NotANumber) => Err(CliError::new(format!(
            "Invalid buffer size for sparse output specified: '{text}'."
        ))
        .with_hint(advice::SIZES)),
        _ => Err(CliError::new(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up \
             to {MOST}. Select 0 to disable sparse detection (fully allocates output)."
        ))),
    }
}

fn in_flight(text: &str) -> CliResult<usize> {
    match size::parse_offset(text) {
        Ok(count @ 1..=16) => Ok(count as usize),
        Err(SizeError::NotANumber) => {
            let text = format!("Invalid number of coroutines specified: '{text}'.");
            Err(CliError::new(text).with_hint("a number from 1 to 16 would be right"))
        }
        _ => {
            Err(CliError::new("Invalid number of coroutines specified. Must be between 1 and 16."))
        }
    }
}
