//! `connections`: who is there.

use std::time::{SystemTime, UNIX_EPOCH};

use lacuna_export::Connection;
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::{Command, Control, nothing, shown, table};
use crate::error::CliResult;

pub(super) const COMMAND: Command = Command {
    name: "connections",
    operands: "",
    summary: "list the clients: where from, at which export, what they moved",
    flags: &[],
    ask: nothing,
    run,
    tell,
};

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&[])?;
    let connections: Vec<Value> = control.server.connections().iter().map(describe).collect();
    Ok(json!({ "connections": connections }))
}

fn describe(connection: &Connection) -> Value {
    json!({
        "number": connection.number,
        "peer": connection.peer,
        "export": connection.export,
        "tls": connection.is_tls,
        "since": seconds(connection.since),
        "received_bytes": connection.received_bytes,
        "sent_bytes": connection.sent_bytes,
        "requests": connection.requests,
        "in_flight": connection.in_flight,
    })
}

/// Returns the seconds since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn tell(result: &Value) -> String {
    let head = ["#", "PEER", "EXPORT", "TLS", "SECONDS", "RECEIVED", "SENT", "REQUESTS", "RUNNING"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let now = seconds(SystemTime::now());
    for connection in result["connections"].as_array().into_iter().flatten() {
        let export = match &connection["export"] {
            Value::String(_) => format!("'{}'", shown(&connection["export"])),
            _ => "-".to_owned(),
        };
        let number = |name: &str| connection[name].to_string();
        let since = now.saturating_sub(connection["since"].as_u64().unwrap_or(now));
        rows.push(vec![
            number("number"),
            shown(&connection["peer"]),
            export,
            if connection["tls"] == true { "yes" } else { "no" }.to_owned(),
            since.to_string(),
            number("received_bytes"),
            number("sent_bytes"),
            number("requests"),
            number("in_flight"),
        ]);
    }
    table(&rows)
}
