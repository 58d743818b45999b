//! `statistics`: what was done through each export, and in all.

use lacuna_export::Statistics;
use serde_json::{Map, Value, json};

use super::super::arguments::Arguments;
use super::{Command, Control, nothing, shown, table};
use crate::error::CliResult;

pub(super) const COMMAND: Command = Command {
    name: "statistics",
    operands: "",
    summary: "count what was done through each export",
    flags: &[],
    ask: nothing,
    run,
    tell,
};

/// The counts and how their columns are called.
const COLUMNS: [(&str, &str); 8] = [
    ("reads", "READS"),
    ("read_bytes", "BYTES READ"),
    ("writes", "WRITES"),
    ("written_bytes", "BYTES WRITTEN"),
    ("zeroes", "ZEROES"),
    ("flushes", "FLUSHES"),
    ("statuses", "STATUS"),
    ("errors", "ERRORS"),
];

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&[])?;
    let exports = control.server.exports().all();
    let of_exports: Vec<(String, Counts)> = exports
        .iter()
        .map(|export| (export.name().as_str().to_owned(), counts(&export.statistics())))
        .collect();
    let mut total = Counts::default();
    of_exports.iter().for_each(|(_, counts)| add(&mut total, counts));
    {
        let removed = control.removed();
        removed.statistics.iter().for_each(|gone| add(&mut total, &counts(gone)));
        removed.leaving.iter().for_each(|export| add(&mut total, &counts(&export.statistics())));
    }
    let named = |(name, counts): &(String, Counts)| {
        let mut members = Map::from_iter([("name".to_owned(), Value::from(name.clone()))]);
        members.extend(object(counts));
        Value::Object(members)
    };
    let exports: Vec<Value> = of_exports.iter().map(named).collect();
    Ok(json!({ "exports": exports, "total": object(&total) }))
}

/// In the order of [`COLUMNS`].
type Counts = [u64; 8];

fn counts(it: &Statistics) -> Counts {
    [
        it.reads,
        it.read_bytes,
        it.writes,
        it.written_bytes,
        it.zeroes,
        it.flushes,
        it.statuses,
        it.errors,
    ]
}

fn add(total: &mut Counts, more: &Counts) {
    total.iter_mut().zip(more).for_each(|(sum, count)| *sum = sum.wrapping_add(*count));
}

fn object(counts: &Counts) -> Map<String, Value> {
    let names = COLUMNS.iter().map(|(name, _)| (*name).to_owned());
    names.zip(counts.iter().map(|count| Value::from(*count))).collect()
}

fn tell(result: &Value) -> String {
    let titles = COLUMNS.iter().map(|(_, title)| (*title).to_owned());
    let mut rows = vec![std::iter::once("NAME".to_owned()).chain(titles).collect()];
    let row = |name: String, counts: &Value| {
        let cells = COLUMNS.iter().map(|(member, _)| counts[*member].to_string());
        std::iter::once(name).chain(cells).collect()
    };
    for export in result["exports"].as_array().into_iter().flatten() {
        rows.push(row(format!("'{}'", shown(&export["name"])), export));
    }
    rows.push(row("total".to_owned(), &result["total"]));
    table(&rows)
}
