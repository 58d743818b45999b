//! How much of an image is data, zeros, unallocated, shared: under our own name.
//!
//! * Without `--totals` only images with small tables are counted, so that describing an image stays
//!   a matter of a millisecond. [`FREE_TABLE_BYTES`] is what that costs at most.
//! * Never: an image goes undescribed since its tables cannot be added up, unless they were asked for.

use lacuna::chain::LevelInfo;
use lacuna::qcow2::format::Header;
use lacuna::qcow2::{PinFacts, Totals, pin_facts, totals};
use pollster::block_on;
use serde_json::{Value, json};

use crate::error::CliResult;
use crate::nodes::AnyStorage;
use crate::output::short_size;

/// Tables that are read without being asked to: 8 GiB of disk at clusters of 64 KiB.
const FREE_TABLE_BYTES: u64 = 1 << 20;
/// Keys of the totals in JSON, and what they are called for people.
const NAMES: [(&str, &str); 6] = [
    ("data", "data"),
    ("compressed", "compressed"),
    ("zero", "zeros"),
    ("unallocated", "unallocated"),
    ("reserved", "reserved for zeros and unallocated"),
    ("shared", "shared host clusters"),
];

/// How much may be read for totals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// What costs nothing worth mentioning.
    Free,
    /// All there is.
    Whole,
}

/// Adds the totals of an image to its description: null where its tables are too large to be
/// read unasked, and where they cannot be read, `totals-error`.
pub(super) fn add(
    node: &mut Value,
    level: &LevelInfo<AnyStorage>,
    effort: Effort,
) -> CliResult<()> {
    let (Some(header), Value::Object(members)) = (&level.header, node) else { return Ok(()) };
    let most_table_bytes = match effort {
        Effort::Free => FREE_TABLE_BYTES,
        Effort::Whole => u64::MAX,
    };
    let found = match block_on(totals(&level.storage, header, most_table_bytes)) {
        Ok(found) => found,
        Err(error) if effort == Effort::Free => {
            members.insert("totals-error".into(), error.to_string().into());
            None
        }
        Err(error) => return Err(error.into()),
    };
    members.insert("totals".into(), found.as_ref().map_or(Value::Null, members_of));
    match block_on(pin_facts(&level.storage, header, most_table_bytes)) {
        Ok(Some(facts)) => members.insert("pins".into(), pins_of(&facts)),
        Ok(None) => {
            let shared_bytes = found.map_or(0, |found| found.shared_bytes);
            let is_unpinned = shared_bytes > 0 && is_for_pins(header);
            is_unpinned
                .then(|| members.insert("unpinned-bytes".into(), shared_bytes.into()))
                .flatten()
        }
        Err(error) if effort == Effort::Free => {
            members.insert("pins-error".into(), error.to_string().into())
        }
        Err(error) => return Err(error.into()),
    };
    Ok(())
}

/// Says whether nothing but deduplication lets clusters of an image share a place.
const fn is_for_pins(header: &Header) -> bool {
    header.snapshots.count == 0 && header.extensions.zero_cluster.is_none()
}

fn pins_of(facts: &PinFacts) -> Value {
    json!({
        "keepers": facts.keepers,
        "references": facts.references,
        "without-sharers": facts.without_sharers,
        "table-bytes": facts.table_bytes,
    })
}

/// Prints what is shared by pins; nothing where nothing is.
fn pins_text(node: &Value) -> String {
    if let Some(reason) = node.get("pins-error").and_then(Value::as_str) {
        return format!("pins of shared clusters: unknown: {reason}\n");
    }
    if let Some(bytes) = node.get("unpinned-bytes").and_then(Value::as_u64) {
        return format!(
            "pins of shared clusters: none for {}; `lacuna dedup --repin` before stock QEMU writes\n",
            short_size(bytes)
        );
    }
    let Some(pins) = node.get("pins") else { return String::new() };
    let number = |key: &str| pins.get(key).and_then(Value::as_u64).unwrap_or(0);
    format!(
        "pins of shared clusters: {} clusters with {} references, {} without any; tables: {}\n",
        number("keepers"),
        number("references"),
        number("without-sharers"),
        short_size(number("table-bytes"))
    )
}

fn members_of(totals: &Totals) -> Value {
    json!({
        "data": totals.data_bytes,
        "compressed": totals.compressed_bytes,
        "zero": totals.zero_bytes,
        "unallocated": totals.unallocated_bytes,
        "reserved": totals.reserved_bytes,
        "shared": totals.shared_bytes,
    })
}

/// Prints the totals of a description; nothing where it has none.
pub(super) fn text(node: &Value) -> String {
    totals_text(node) + &pins_text(node)
}

fn totals_text(node: &Value) -> String {
    match (node.get("totals"), node.get("totals-error").and_then(Value::as_str)) {
        (None, _) => String::new(),
        (Some(_), Some(reason)) => format!("totals: unknown: {reason}\n"),
        (Some(Value::Null), None) => "totals: not counted, --totals does\n".to_owned(),
        (Some(totals), None) => {
            let line = |(key, words): (&str, &str)| {
                let bytes = totals.get(key).and_then(Value::as_u64).unwrap_or(0);
                format!("    {words}: {} ({bytes} bytes)\n", short_size(bytes))
            };
            "totals of the image's own tables:\n".to_owned()
                + &NAMES.into_iter().map(line).collect::<String>()
        }
    }
}
