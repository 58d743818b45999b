//! What the program is when it is called `qemu-nbd`: the verb `serve` with that program's options,
//! defaults and words.
//!
//! * `flags.rs`: the options, in QEMU's order: it shows where a shortened name is ambiguous
//! * `asked.rs`: what a command line of them says
//! * `list.rs`: `-L`, which asks another server what it has

mod asked;
mod flags;
mod list;

use std::fs::OpenOptions;

use self::asked::{Asked, Mode};
use crate::args;
use crate::error::{CliError, CliResult};
use crate::persona::Tool;
use crate::verbs::open;
use crate::verbs::serve::fork::{self, Role};
use crate::verbs::serve::{self, BitmapWish, ChainDisk};
use crate::verbs::{options_help, version};

/// Runs a command line and returns the exit code.
pub(crate) fn run(tool: &Tool, arguments: &[String]) -> CliResult<u8> {
    let parsed = args::parse(&flags::FLAGS, arguments)?;
    if parsed.has("help") {
        return help(tool);
    }
    if parsed.has("version") {
        return version(tool);
    }
    let asked = Asked::new(&parsed)?;
    match &asked.mode {
        Mode::List(listing) => list::run(listing),
        Mode::Device(device) => Err(no_device(device)),
        Mode::Serve(image) => {
            let ready = match parsed.has("fork").then(fork::role).transpose()? {
                Some(Role::Caller(code)) => return Ok(code),
                Some(Role::Child(ready)) => Some(ready),
                None => None,
            };
            let serving = asked.serving(image, ready)?;
            let disk = opened(tool, image)?;
            serve::until_the_end(tool, serving, vec![disk])
        }
    }
}

fn help(tool: &Tool) -> CliResult<u8> {
    let call = tool.invocation("");
    options_help(
        &format!("Usage: {call} [OPTIONS] FILE\n   or: {call} -L [OPTIONS]\n"),
        "Serve a disk image to NBD clients, or list what another server has",
        &flags::FLAGS,
    )
}

fn opened(tool: &Tool, image: &asked::Image) -> CliResult<ChainDisk> {
    let cannot = |error: CliError| error.under(format!("Failed to blk_new_open '{}'", image.file));
    let request = image.request().map_err(cannot)?;
    let bitmaps = BitmapWish::only(image.export.bitmaps.clone().unwrap_or_default());
    let disk = serve::disk(tool, request, &image.becomes, &bitmaps, cannot)?;
    bitmaps.check(std::iter::once(disk.own_bitmaps()))?;
    Ok(disk.silent_about_turning())
}

/// The kernel's own client is not driven.
fn no_device(device: &str) -> CliError {
    match OpenOptions::new().read(true).write(true).open(device) {
        Err(error) => CliError::new(format!("Cannot open {device}: {}", open::of_host(&error))),
        Ok(_) => CliError::new("Kernel /dev/nbdN support not available"),
    }
}
