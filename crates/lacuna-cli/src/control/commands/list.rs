//! `list`: the exports there are.

use lacuna::block::Layer;
use serde_json::{Value, json};

use super::super::Exported;
use super::super::arguments::Arguments;
use super::{Command, Control, nothing, shown, table};
use crate::error::CliResult;

pub(super) const COMMAND: Command = Command {
    name: "list",
    operands: "",
    summary: "list the exports",
    flags: &[],
    ask: nothing,
    run,
    tell,
};

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&[])?;
    let exports: Vec<Value> = control.server.exports().all().iter().map(describe).collect();
    Ok(json!({ "exports": exports }))
}

fn describe(export: &Exported) -> Value {
    let clients = export.clients();
    json!({
        "name": export.name().as_str(),
        "description": export.options().description,
        "size": export.disk().size_bytes(),
        "read_only": export.is_read_only(),
        "clients": clients.now,
        "clients_ever": clients.ever,
    })
}

fn tell(result: &Value) -> String {
    let mut rows = vec![["NAME", "SIZE", "ACCESS", "CLIENTS"].map(str::to_owned).to_vec()];
    for export in result["exports"].as_array().into_iter().flatten() {
        let name = format!("'{}'", shown(&export["name"]));
        let access = if export["read_only"] == true { "read-only" } else { "read-write" };
        let size = export["size"].to_string();
        rows.push(vec![name, size, access.to_owned(), export["clients"].to_string()]);
    }
    table(&rows)
}
