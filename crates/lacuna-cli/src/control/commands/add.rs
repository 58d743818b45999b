//! `add`: one more export.

use lacuna::ErrorKind;
use lacuna::block::Layer;
use serde_json::{Map, Value, json};

use super::super::arguments::{Arguments, invalid};
use super::{Command, Control, Members};
use crate::args::{self, Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::verbs::serve;
use crate::verbs::spec::split_protocol;

/// The options that say how an image is served.
pub(crate) const FLAGS: [Flag; 17] = serve::OF_EXPORTS;

pub(super) const COMMAND: Command = Command {
    name: "add",
    operands: "NAME FILENAME",
    summary: "serve one more image, with the options of `serve`",
    flags: &FLAGS,
    ask,
    run,
    tell,
};

fn ask(parsed: &Parsed, operands: &[String]) -> CliResult<Members> {
    let [name, file] = operands else {
        return Err(CliError::usage("Expecting the name of an export and an image file name"));
    };
    let mut options = Map::new();
    for flag in FLAGS.iter().filter(|flag| parsed.has(flag.long)) {
        let value = match flag.value {
            None => Value::Bool(true),
            Some(_) => parsed.all(flag.long).collect::<Vec<_>>().into(),
        };
        options.insert(flag.long.to_owned(), value);
    }
    let file = absolute(file, parsed.has("image-opts"))?;
    Ok(Map::from_iter([
        ("name".to_owned(), name.clone().into()),
        ("file".to_owned(), file.into()),
        ("options".to_owned(), options.into()),
    ]))
}

/// The server may stand in another folder.
fn absolute(file: &str, has_options: bool) -> CliResult<String> {
    if has_options || file.starts_with("json:") || !matches!(split_protocol(file), Ok((None, _))) {
        return Ok(file.to_owned());
    }
    let path = std::path::absolute(file)
        .map_err(|error| lacuna::Error::io(error, format!("Finding {file}")))?;
    path.into_os_string()
        .into_string()
        .map_err(|_| CliError::new("The name of the folder is not UTF-8 text"))
}

fn run(control: &Control, arguments: &Arguments) -> CliResult<Value> {
    arguments.only(&["name", "file", "options"])?;
    let (name, file) = (arguments.text("name")?, arguments.text("file")?);
    let parsed = options(&arguments.members("options")?)?;
    let _disks_stay_open = control.begin()?;
    if control.export(Some(name)).is_ok() {
        return Err(CliError::new(format!("There is an export '{name}' already"))
            .with_class(ErrorKind::InvalidRequest));
    }
    let export = serve::export(&control.tool, name, file, &parsed)?;
    let size = export.disk().size_bytes();
    let disk = export.disk().as_chain().map(|chain| chain.disk().clone());
    match control.server.exports().add(export) {
        Ok(_) => Ok(json!({ "name": name, "size": size })),
        // Somebody else was faster with the name.
        Err(error) => {
            if let Some(disk) = disk {
                pollster::block_on(disk.close())?;
            }
            Err(error.into())
        }
    }
}

/// Reads options as those of the command line: `"read-only": true`, `"format": "raw"`, and lists
/// of those that may be repeated.
fn options(options: &Arguments) -> CliResult<Parsed> {
    let known: Vec<&str> = FLAGS.iter().map(|flag| flag.long).collect();
    options.only(&known)?;
    let mut words = Vec::new();
    for (name, value) in &options.0 {
        match value {
            Value::Bool(false) | Value::Null => {}
            Value::Bool(true) => words.push(format!("--{name}")),
            Value::Array(values) => {
                for value in values {
                    words.push(format!("--{name}={}", text(name, value)?));
                }
            }
            value => words.push(format!("--{name}={}", text(name, value)?)),
        }
    }
    args::parse(&FLAGS, &words).map_err(|error| invalid(error.text().to_owned()))
}

fn text(name: &str, value: &Value) -> CliResult<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(invalid(format!("The option '{name}' should be a text, a number or true"))),
    }
}

fn tell(result: &Value) -> String {
    format!("'{}': {} bytes\n", super::shown(&result["name"]), result["size"])
}
