//! The runs of a disk as JSON.

use lacuna::chain::MapRun;
use lacuna::units::GuestOffset;
use pollster::block_on;

use super::{as_qemu, is_data};
use crate::error::CliResult;
use crate::nodes::FileMap;
use crate::output::Lines;
use crate::persona::Tool;

/// Prints an object for each run.
pub(super) fn list(tool: &Tool, mut map: FileMap<'_>, start: GuestOffset) -> CliResult<u8> {
    let mut lines = Lines::starting("[");
    let walked: CliResult<bool> = block_on(async {
        let mut is_empty = true;
        while let Some(run) = map.next().await? {
            lines.text(if is_empty { "" } else { ",\n" });
            let run = if tool.is_own() { run } else { as_qemu(run) };
            line(tool, &mut lines, &run);
            lines.print_when_full()?;
            is_empty = false;
        }
        Ok(is_empty)
    });
    if walked? {
        lines.text(&past_the_end(tool, start));
    }
    lines.text("]\n");
    lines.print().map(|()| 0)
}

/// One of a million lines: put together by hand, the formatting machinery costs several times the
/// walk itself.
fn line(tool: &Tool, lines: &mut Lines, run: &MapRun) {
    let truth = |value: bool| if value { "true" } else { "false" };
    lines.text("{ \"start\": ");
    lines.decimal(run.range.start.0);
    lines.text(", \"length\": ");
    lines.decimal(run.range.len);
    lines.text(", \"depth\": ");
    lines.decimal(run.level as u64);
    lines.text(", \"present\": ");
    lines.text(truth(run.is_present()));
    lines.text(", \"zero\": ");
    lines.text(truth(run.status.reads_zero));
    lines.text(", \"data\": ");
    lines.text(truth(is_data(run) || run.never_written));
    lines.text(", \"compressed\": ");
    lines.text(truth(run.status.is_compressed));
    // QEMU's members do not tell reserved space from none where the content is zeros.
    if tool.is_own() {
        lines.text(", \"hole\": ");
        lines.text(truth(run.status.is_hole));
    }
    if let Some(host) = run.status.host {
        lines.text(", \"offset\": ");
        lines.decimal(host.0);
    }
    lines.text("}");
}

/// A list without entries would be `[]`; scripts know one entry without length.
fn past_the_end(tool: &Tool, start: GuestOffset) -> String {
    let hole = if tool.is_own() { ", \"hole\": true" } else { "" };
    format!(
        "{{ \"start\": {}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \
         \"data\": false, \"compressed\": false{hole}}}",
        start.0
    )
}
