//! What stands behind `json:`: an object, flattened to dotted keys.

use serde_json::Value;

use super::keys::{Keys, Scalar};
use crate::error::{CliError, CliResult};

/// Reads `{"driver": "qcow2", "file": {"filename": "a"}}` as `driver` and `file.filename`.
pub(crate) fn keys(json: &str) -> CliResult<Keys> {
    let value: Value =
        serde_json::from_str(&with_double_quotes(json)).map_err(|error| wrong(json, &error))?;
    let Value::Object(_) = value else { return Err(CliError::new("Invalid JSON object given")) };
    let mut keys = Keys::default();
    flatten("", &value, &mut keys);
    Ok(keys)
}

fn wrong(json: &str, error: &serde_json::Error) -> CliError {
    let text = error.to_string();
    let why = if json.trim().is_empty() {
        "Expecting a JSON value"
    } else if error.is_eof() {
        "JSON parse error, premature EOI"
    } else if text.starts_with("expected `,`") {
        "JSON parse error, expected separator in dict"
    } else {
        "JSON parse error, expecting value"
    };
    CliError::new(format!("Could not parse the JSON options: {why}"))
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

/// Empty objects and lists leave nothing.
fn flatten(prefix: &str, value: &Value, keys: &mut Keys) {
    let under = |key: &dyn std::fmt::Display| match prefix {
        "" => key.to_string(),
        prefix => format!("{prefix}.{key}"),
    };
    let scalar = match value {
        Value::Object(members) => {
            members.iter().for_each(|(key, value)| flatten(&under(key), value, keys));
            return;
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(at, value)| flatten(&under(&at), value, keys));
            return;
        }
        Value::Null => Scalar::Null,
        Value::String(text) => Scalar::Text(text.clone()),
        Value::Bool(on) => Scalar::Text(if *on { "on" } else { "off" }.to_owned()),
        Value::Number(number) => Scalar::Text(number.to_string()),
    };
    keys.set(prefix.to_owned(), scalar);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_and_lists_become_dotted_keys() {
        let mut keys = keys(r#"{"a": [{"b": 5}], "c.d": true, "e": null, "f": {}}"#).unwrap();
        assert_eq!(keys.take_text("a.0.b").as_deref(), Some("5"));
        assert_eq!(keys.take_text("c.d").as_deref(), Some("on"));
        assert_eq!(keys.take("e"), Some(Scalar::Null));
        assert!(keys.first().is_none());
    }

    #[test]
    fn what_is_no_object_is_told_apart() {
        for (json, why) in [
            ("", "Could not parse the JSON options: Expecting a JSON value"),
            ("5", "Invalid JSON object given"),
            (
                "{\"a\":{\"b\":\"c\"}",
                "Could not parse the JSON options: JSON parse error, premature EOI",
            ),
            ("{\"a\":5,}", "Could not parse the JSON options: JSON parse error, expecting value"),
            (
                "{'a':5 'b':6}",
                "Could not parse the JSON options: JSON parse error, expected separator in dict",
            ),
        ] {
            assert_eq!(keys(json).unwrap_err().text(), why, "{json}");
        }
    }
}
