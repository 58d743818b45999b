//! Images named by a file name, by options (`--image-opts`) or by `json:`.
//!
//! Only local files are known, so all three come down to a file and perhaps a format.

use serde_json::Value;

use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::options::{self, Asked};

/// Which image is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageSpec {
    /// What the user wrote, for messages.
    pub(crate) shown: String,
    pub(crate) file: String,
    /// The name of the format, as the user wrote it.
    driver: Option<String>,
}

impl ImageSpec {
    /// Reads a file name: plain, `file:NAME` or `json:{...}`.
    pub(crate) fn from_name(name: &str, format: Option<&str>) -> CliResult<Self> {
        let mut spec = match (name.strip_prefix("json:"), name.strip_prefix("file:")) {
            (Some(json), _) => Self::from_pairs(name, pairs_of_json(json)?)?,
            (None, Some(file)) => Self::plain(name, &without_protocol(file)),
            (None, None) => Self::plain(name, name),
        };
        spec.driver = format.map(str::to_owned).or(spec.driver);
        Ok(spec)
    }

    /// Reads `driver=qcow2,file.filename=NAME`.
    pub(crate) fn from_options(text: &str) -> CliResult<Self> {
        match options::parse([text].into_iter())? {
            Asked::Help => Err(CliError::new("Image options are driver and file.filename")),
            Asked::Values(given) => Self::from_pairs(text, given.into_pairs()),
        }
    }

    fn plain(shown: &str, file: &str) -> Self {
        Self { shown: shown.to_owned(), file: file.to_owned(), driver: None }
    }

    /// Returns the format if one was named.
    pub(crate) fn format(&self) -> CliResult<Option<Format>> {
        let Some(name) = &self.driver else { return Ok(None) };
        match Format::from_name(name) {
            Some(format) => Ok(Some(format)),
            None => Err(CliError::new(format!("Unknown driver '{name}'"))
                .with_hint("formats are qcow2 and raw")),
        }
    }

    /// Reads keys and values; `shown` is what the user wrote.
    pub(crate) fn from_pairs(shown: &str, pairs: Vec<(String, String)>) -> CliResult<Self> {
        let mut spec = Self::plain(shown, "");
        for (key, value) in pairs {
            match (&*key, &*value) {
                ("driver", "file") if spec.driver.is_some() => {}
                ("driver", _) => spec.driver = Some(value),
                ("filename" | "file.filename" | "file", _) => spec.file = value,
                ("file.driver", "file") => {}
                // What QEMU's programs need to be told and this one does not.
                ("read-only" | "auto-read-only" | "node-name" | "file.node-name", _) => {}
                ("cache.direct" | "cache.no-flush" | "locking" | "file.locking", _) => {}
                _ => return Err(spec.no_option(&key)),
            }
        }
        match spec.file.is_empty() {
            true => Err(CliError::new("A block device must be specified for \"file\"")),
            false => Ok(spec),
        }
    }

    fn no_option(&self, key: &str) -> CliError {
        let driver = self.driver.as_deref().unwrap_or("raw");
        CliError::new(format!("Block format '{driver}' does not support the option '{key}'"))
    }
}

/// A name that would again look like a protocol is given a folder, as QEMU shows it.
fn without_protocol(file: &str) -> String {
    let looks_like_one = file.split('/').next().is_some_and(|first| first.contains(':'));
    if looks_like_one { format!("./{file}") } else { file.to_owned() }
}

/// Flattens `{"driver": "qcow2", "file": {"filename": "a"}}` to dotted keys.
fn pairs_of_json(json: &str) -> CliResult<Vec<(String, String)>> {
    let wrong = || CliError::new("Could not parse the JSON options");
    let value: Value = serde_json::from_str(&with_double_quotes(json)).map_err(|_| wrong())?;
    let mut pairs = Vec::new();
    flatten("", &value, &mut pairs);
    match value.is_object() {
        true => Ok(pairs),
        false => Err(wrong()),
    }
}

/// QEMU takes strings in single quotes as well.
fn with_double_quotes(json: &str) -> String {
    let mut quote = None;
    let mut text = String::with_capacity(json.len());
    let mut characters = json.chars();
    while let Some(character) = characters.next() {
        match (character, quote) {
            ('\\', Some(_)) => match characters.next() {
                Some('\'') => text.push('\''),
                Some(escaped) => text.extend(['\\', escaped]),
                None => text.push('\\'),
            },
            ('\'' | '"', None) => {
                quote = Some(character);
                text.push('"');
            }
            (_, Some(open)) if open == character => {
                quote = None;
                text.push('"');
            }
            ('"', Some(_)) => text.push_str("\\\""),
            _ => text.push(character),
        }
    }
    text
}

fn flatten(prefix: &str, value: &Value, pairs: &mut Vec<(String, String)>) {
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{key}"), value, pairs);
            }
        }
        Value::String(text) => pairs.push((prefix.to_owned(), text.clone())),
        Value::Bool(on) => pairs.push((prefix.to_owned(), if *on { "on" } else { "off" }.into())),
        other => pairs.push((prefix.to_owned(), other.to_string())),
    }
}

/// For the fuzzer: what is accepted names a file.
pub(crate) fn parse_hostile(text: &str) {
    let json = format!("json:{text}");
    let specs = [ImageSpec::from_options(text), ImageSpec::from_name(&json, None)];
    for spec in specs.into_iter().flatten() {
        assert!(!spec.file.is_empty(), "{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_ways_to_name_one_image() {
        let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a,b"}}"#;
        let by_json = ImageSpec::from_name(json, None).unwrap();
        let single = "json:{'driver':'qcow2','file.filename':'a,b'}";
        let by_quotes = ImageSpec::from_name(single, None).unwrap();
        let by_options =
            ImageSpec::from_options("driver=qcow2,file.filename=a,,b,file.driver=file").unwrap();
        let by_name = ImageSpec::from_name("file:a,b", Some("qcow2")).unwrap();
        for spec in [by_json, by_quotes, by_options, by_name] {
            assert_eq!(spec.file, "a,b");
            assert_eq!(spec.format().unwrap(), Some(Format::Qcow2));
        }
    }

    #[test]
    fn unknown_options_and_formats_are_named() {
        let error = ImageSpec::from_options("driver=qcow2,file.filename=a,foo=bar").unwrap_err();
        assert_eq!(error.text(), "Block format 'qcow2' does not support the option 'foo'");
        let spec = ImageSpec::from_name("a", Some("foo")).unwrap();
        assert_eq!(spec.format().unwrap_err().text(), "Unknown driver 'foo'");
        for json in ["json:", "json:{", "json:[]", "json:5", "json:{}"] {
            assert!(ImageSpec::from_name(json, None).is_err(), "{json}");
        }
    }
}
