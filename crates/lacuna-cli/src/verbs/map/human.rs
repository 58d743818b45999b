//! The runs of a disk as lines of a table.
//!
//! Under QEMU's names only what lies in files as it is, and an error where something does not.
//! Under our own everything, each fact in a column of its own.

use lacuna::chain::{LevelFacts, MapRun};
use pollster::block_on;

use super::{as_qemu, is_data};
use crate::error::{CliError, CliResult};
use crate::nodes::{FileChain, FileMap};
use crate::output::{self, Lines};
use crate::persona::Tool;

/// Prints a line for each run.
pub(super) fn list(tool: &Tool, chain: &FileChain, map: FileMap<'_>) -> CliResult<u8> {
    match tool.is_own() {
        true => facts(chain, map),
        false => data(chain, map),
    }
}

fn facts(chain: &FileChain, mut map: FileMap<'_>) -> CliResult<u8> {
    let files: Vec<String> =
        chain.levels().iter().map(|level| output::tame(&name(level))).collect();
    let columns = ["Offset", "Length", "Mapped to"].map(|title| format!("{title:<16}")).concat();
    let mut lines =
        Lines::starting(&format!("{columns}{:<7}{:<12}{:<7}File\n", "Depth", "Content", "Space"));
    block_on(async {
        while let Some(run) = map.next().await? {
            fact_line(&mut lines, &run, &files);
            lines.print_when_full()?;
        }
        lines.print().map(|()| 0)
    })
}

/// A line for a run: each column says one thing, whatever the others say.
fn fact_line(lines: &mut Lines, run: &MapRun, files: &[String]) {
    lines.hexadecimal(run.range.start.0);
    lines.hexadecimal(run.range.len);
    match run.status.host {
        Some(host) => lines.hexadecimal(host.0),
        None => lines.padded("-", 16),
    }
    match run.is_present() {
        true => lines.padded(&run.level.to_string(), 7),
        false => lines.padded("-", 7),
    }
    let content = match (run.status.is_compressed, run.status.reads_zero) {
        (true, _) => "compressed",
        (_, true) => "zeros",
        (_, false) => "data",
    };
    lines.padded(content, 12);
    lines.padded(if run.status.is_hole { "none" } else { "taken" }, 7);
    lines.text(if run.is_present() { &files[run.level] } else { "-" });
    lines.text("\n");
}

fn name(level: &LevelFacts) -> String {
    level.content_path().display().to_string()
}

fn data(chain: &FileChain, mut map: FileMap<'_>) -> CliResult<u8> {
    let files: Vec<String> = chain.levels().iter().map(name).collect();
    let mut lines =
        Lines::starting(&format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"));
    block_on(async {
        while let Some(run) = map.next().await?.map(as_qemu) {
            if !is_data(&run) {
                continue;
            }
            let Some(host) = run.status.host else {
                let text = "File contains external, encrypted or compressed clusters.";
                let error = CliError::new(text).with_hint("--output=json lists those as well");
                return Err(error.with_output(lines.into_text()));
            };
            for value in [run.range.start.0, run.range.len, host.0] {
                lines.hexadecimal(value);
            }
            lines.text(&files[run.level]);
            lines.text("\n");
            lines.print_when_full()?;
        }
        lines.print().map(|()| 0)
    })
}
