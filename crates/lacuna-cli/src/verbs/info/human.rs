//! The description of an image for people.

use serde_json::Value;

use super::totals;
use crate::output::{self, date, short_size};

/// Prints one image with the file it lies in.
pub(super) fn node(node: &Value) -> String {
    let word = |key: &str| node.get(key).and_then(Value::as_str);
    let file = word("filename").unwrap_or_default();
    let size = number(node, "virtual-size");
    let mut text = format!(
        "image: {file}\nfile format: {}\nvirtual size: {} ({size} bytes)\ndisk size: {}\n",
        word("format").unwrap_or_default(),
        short_size(size),
        disk_size(node),
    );
    if is_set(node, "encrypted") {
        text += "encrypted: yes\n";
    }
    if node.get("cluster-size").is_some() {
        text += &format!("cluster_size: {}\n", number(node, "cluster-size"));
    }
    if is_set(node, "dirty-flag") {
        text += "cleanly shut down: no\n";
    }
    text += &backing(word("backing-filename"), word("full-backing-filename"));
    if let Some(format) = word("backing-filename-format") {
        text += &format!("backing file format: {format}\n");
    }
    if let Some(list) = node.get("snapshots").and_then(Value::as_array) {
        text += &snapshots(list);
    }
    if let Some(data) = node.pointer("/format-specific/data") {
        text += "Format specific information:\n";
        dump(&mut text, data, 1);
    }
    text + &totals::text(node) + &children(node, "", 0)
}

/// Tames every text in a description: names in an image are its maker's.
pub(crate) fn tamed(value: Value) -> Value {
    match value {
        Value::String(text) => output::tame(&text).into(),
        Value::Array(items) => items.into_iter().map(tamed).collect(),
        Value::Object(members) => {
            members.into_iter().map(|(key, value)| (output::tame(&key), tamed(value))).collect()
        }
        scalar => scalar,
    }
}

fn number(node: &Value, key: &str) -> u64 {
    node.get(key).and_then(Value::as_u64).unwrap_or(0)
}

fn is_set(node: &Value, key: &str) -> bool {
    node.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn backing(name: Option<&str>, full: Option<&str>) -> String {
    match (name, full) {
        (None, _) => String::new(),
        (Some(name), Some(full)) if name != full => {
            format!("backing file: {name} (actual path: {full})\n")
        }
        (Some(name), _) => format!("backing file: {name}\n"),
    }
}

fn disk_size(node: &Value) -> String {
    let size = node.get("actual-size").and_then(Value::as_u64);
    size.map_or_else(|| "unavailable".to_owned(), short_size)
}

/// Prints what an image lies in, and what that lies in.
fn children(node: &Value, path: &str, depth: usize) -> String {
    let Some(list) = node.get("children").and_then(Value::as_array) else { return String::new() };
    let mut text = String::new();
    for item in list {
        let path = format!("{path}/{}", item["name"].as_str().unwrap_or_default());
        let indent = " ".repeat(4 * depth);
        text += &format!("{indent}Child node '{path}':\n");
        for line in child(&item["info"]).lines() {
            text += &format!("{indent}    {line}\n");
        }
        text += &children(&item["info"], &path, depth + 1);
    }
    text
}

fn child(info: &Value) -> String {
    let file = info["filename"].as_str().unwrap_or_default();
    let format = info["format"].as_str().unwrap_or_default();
    let (Some(len), true) = (info["virtual-size"].as_u64(), is_storage(info)) else {
        return format!("image: {file}\nfile format: {format}\ndisk size: {}\n", disk_size(info));
    };
    format!(
        "filename: {file}\nprotocol type: {format}\nfile length: {} ({len} bytes)\n\
         disk size: {}\n",
        short_size(len),
        disk_size(info),
    )
}

/// What stands on nothing is no image.
fn is_storage(info: &Value) -> bool {
    info["children"].as_array().is_none_or(Vec::is_empty)
}

/// Prints a list of snapshots; nothing where there are none.
pub(crate) fn snapshots(list: &[Value]) -> String {
    if list.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "Snapshot list:\n{:<8}{:<17}{:>8}{:>20}{:>16}{:>11}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for snapshot in list {
        text += &snapshot_line(snapshot);
    }
    text
}

fn snapshot_line(snapshot: &Value) -> String {
    let seconds = number(snapshot, "vm-clock-sec");
    let clock = format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        number(snapshot, "vm-clock-nsec") / 1_000_000
    );
    let icount = snapshot.get("icount").map_or_else(String::new, Value::to_string);
    format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        snapshot["id"].as_str().unwrap_or_default(),
        snapshot["name"].as_str().unwrap_or_default(),
        short_size(number(snapshot, "vm-state-size")),
        date(number(snapshot, "date-sec")),
        clock,
        icount
    )
}

/// Prints members and items a level deeper, with spaces for dashes in keys.
pub(crate) fn dump(text: &mut String, value: &Value, depth: usize) {
    let indent = " ".repeat(4 * depth);
    let mut line = |key: &str, value: &Value| {
        let is_deeper = value.is_array() || value.is_object();
        *text += &format!("{indent}{key}:");
        if is_deeper {
            *text += "\n";
            dump(text, value, depth + 1);
        } else {
            *text += &format!(" {}\n", scalar(value));
        }
    };
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                line(&key.replace('-', " "), value);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                line(&format!("[{index}]"), value);
            }
        }
        _ => {}
    }
}

fn scalar(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
