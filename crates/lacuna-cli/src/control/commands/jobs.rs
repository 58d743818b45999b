//! `jobs`: what is at work on disks, and what came of it.

use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::{Command, Control, nothing, shown, table};
use crate::error::CliResult;
use crate::output::short_size;

pub(in super::super) const NAME: &str = "jobs";

pub(super) const COMMAND: Command = Command {
    name: NAME,
    operands: "",
    summary: "list what compact and dedup do, and did",
    flags: &[],
    ask: nothing,
    run,
    tell,
};

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["job"])?;
    Ok(json!({ "jobs": control.jobs.list(arguments.optional_number("job")?)? }))
}

fn tell(result: &Value) -> String {
    let head = ["#", "COMMAND", "EXPORT", "STATE", "PHASE", "DONE", "OF", "FREED"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut errors = String::new();
    for job in result["jobs"].as_array().into_iter().flatten() {
        let bytes = |value: &Value| short_size(value.as_u64().unwrap_or(0));
        rows.push(vec![
            job["job"].to_string(),
            shown(&job["command"]),
            format!("'{}'", shown(&job["export"])),
            shown(&job["state"]),
            shown(&job["phase"]),
            bytes(&job["done"]),
            bytes(&job["total"]),
            bytes(&job["result"]["freed_bytes"]),
        ]);
        if let Value::String(_) = job["error"]["message"] {
            errors += &format!("{}: {}\n", job["job"], shown(&job["error"]["message"]));
        }
    }
    table(&rows) + &errors
}

/// Tells people what came of a job, or that it began.
pub(super) fn summary(result: &Value) -> String {
    let bytes = |name: &str| short_size(result["result"][name].as_u64().unwrap_or(0));
    match result["command"].as_str() {
        Some("compact") => {
            let left = match result["result"]["left_bytes"].as_u64() {
                None | Some(0) => String::new(),
                Some(_) => format!(
                    "; {} could not move while the image is served (`lacuna reclaim` moves it)",
                    bytes("left_bytes")
                ),
            };
            format!(
                "The file is {} shorter, {} moved{left}\n",
                bytes("freed_bytes"),
                bytes("moved_bytes")
            )
        }
        Some("dedup") => {
            let shared = &result["result"]["shared_clusters"];
            format!("{shared} clusters share a place now, {} are free\n", bytes("freed_bytes"))
        }
        _ => format!("Job {} has begun; `lacuna ctl jobs` tells of it\n", result["job"]),
    }
}
