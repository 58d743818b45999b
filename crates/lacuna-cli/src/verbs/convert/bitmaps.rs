//! `--bitmaps`: the copy gets the dirty bitmaps of its source.

use lacuna::chain::Format;
use lacuna::job;
use lacuna::qcow2::format::Version;
use lacuna::qcow2::{BitmapFacts, Image};
use pollster::block_on;

use super::super::open::FileChain;
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::output;
use crate::persona::Tool;

/// Refuses what cannot be copied, before anything is made.
pub(super) fn check(parsed: &Parsed, sources: &[FileChain], target: Format) -> CliResult<()> {
    if !parsed.has("bitmaps") {
        return Ok(());
    }
    let [source] = sources else {
        return Err(CliError::new("Copying bitmaps only possible with single source"));
    };
    let image = source.disk().as_qcow2();
    let image = image.ok_or_else(|| CliError::new("Source lacks bitmap support"))?;
    if target == Format::Raw {
        return Err(CliError::new("Format driver 'raw' does not support bitmaps"));
    }
    let broken = block_on(image.bitmaps())?.into_iter().rev().find(is_broken);
    match broken.filter(|_| !parsed.has("skip-broken-bitmaps")) {
        None => Ok(()),
        Some(broken) => {
            let (name, way) = (output::tame(&broken.name.to_string()), "--skip-broken-bitmaps");
            let stock = format!(
                "Cannot copy inconsistent bitmap '{name}'\n\
                 Try {way}, or use 'qemu-img bitmap --remove' to delete it"
            );
            Err(CliError::new(stock)
                .in_our_words(format!("Bitmap '{name}' cannot be used, nor copied"))
                .with_hint(format!("{way} leaves it out; `lacuna bitmap --repair` mends it")))
        }
    }
}

fn is_broken(facts: &BitmapFacts) -> bool {
    facts.problem.is_some()
}

/// Copies the bitmaps, where that is asked for.
pub(super) fn copy(
    tool: &Tool,
    parsed: &Parsed,
    source: &FileChain,
    target: &FileChain,
) -> CliResult<()> {
    let Some(image) = source.disk().as_qcow2().filter(|_| parsed.has("bitmaps")) else {
        return Ok(());
    };
    let (broken, sound): (Vec<_>, Vec<_>) =
        block_on(image.bitmaps())?.into_iter().partition(is_broken);
    let to = takes_bitmaps(target)?;
    for facts in broken.iter().rev().filter(|_| !parsed.has("quiet")) {
        let name = output::tame(&facts.name.to_string());
        output::warn(&format!("{}: warning: Skipping inconsistent bitmap '{name}'", tool.name));
    }
    Ok(block_on(job::copy_bitmaps(image, to, &sound))?)
}

/// Version 2 keeps no bitmaps.
pub(super) fn takes_bitmaps(target: &FileChain) -> CliResult<&Image<AnyStorage>> {
    let image = target.disk().bare_image();
    let image = image.filter(|image| image.geometry().version() != Version::V2);
    image.ok_or_else(|| CliError::new("Format driver 'qcow2' does not support bitmaps"))
}
