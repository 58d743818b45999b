//! Which points there are, for people and for programs.

use std::path::Path;

use lacuna_backup::{Basis, Content, Point, PointFacts};
use serde_json::{Value, json};

use super::super::{Form, form};
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::output;

/// Lists the points of a folder.
pub(super) fn list(parsed: &Parsed, path: &Path) -> CliResult<u8> {
    let form = form(parsed)?;
    let (_, points) = super::open(path)?;
    let text = match form {
        Form::Human => table(&points.sound),
        Form::Json => {
            let list: CliResult<Vec<Value>> = points.sound.iter().map(json).collect();
            let broken: Vec<Value> = points
                .broken
                .iter()
                .map(|(name, error)| json!({ "point": name, "error": error.to_string() }))
                .collect();
            let begun: Vec<&str> = points.begun.iter().map(|name| name.as_str()).collect();
            output::pretty(&json!({ "points": list?, "broken": broken, "begun": begun })) + "\n"
        }
    };
    output::print(&text).map(|()| 0)
}

fn table(points: &[Point]) -> String {
    let row = |cells: [&str; 6]| {
        let [point, created, size, data, stored, holds] = cells;
        format!("{point:<24}{created:<21}{size:>10}{data:>10}{stored:>10}  {holds}\n")
    };
    let mut text = row(["POINT", "CREATED (UTC)", "DISK", "DATA", "STORED", "HOLDS"]);
    for Point { manifest, .. } in points {
        let size = output::short_size;
        text += &row([
            manifest.facts.point.as_str(),
            &output::date(manifest.facts.created),
            &size(manifest.facts.size),
            &size(manifest.data_bytes),
            &size(manifest.stored_bytes),
            &holds(&manifest.facts),
        ]);
    }
    text
}

/// Says what a point holds.
fn holds(facts: &PointFacts) -> String {
    let below = facts.stands_on.as_ref().map_or("", |below| below.point.as_str());
    match &facts.basis {
        Basis::Full => "all".to_owned(),
        Basis::Bitmap { name } => format!("changes since {below} (bitmap {})", output::tame(name)),
        Basis::Snapshot { since } => {
            format!("changes since {below} (snapshot {})", output::tame(&since.name))
        }
        Basis::Levels { count } => format!("changes since {below} (levels {count})"),
    }
}

/// Says what was made.
pub(super) fn told(point: &Point) -> String {
    let manifest = &point.manifest;
    format!(
        "Point '{}': {}; {} of data in {}\n",
        manifest.facts.point,
        holds(&manifest.facts),
        output::short_size(manifest.data_bytes),
        output::short_size(manifest.stored_bytes),
    )
}

/// Describes a point for programs.
pub(super) fn json(point: &Point) -> CliResult<Value> {
    let manifest = &point.manifest;
    let facts = serde_json::to_value(&manifest.facts)
        .map_err(|error| CliError::new(format!("A point cannot be described: {error}")))?;
    let mut value = facts;
    value["form"] = manifest.content.form().name().into();
    value["data-bytes"] = manifest.data_bytes.into();
    value["zero-bytes"] = manifest.zero_bytes.into();
    value["stored-bytes"] = manifest.stored_bytes.into();
    value["checksum"] = point.checksum.to_string().into();
    if let Content::Segments { segments } = &manifest.content {
        value["segments"] = segments.len().into();
    }
    Ok(value)
}
