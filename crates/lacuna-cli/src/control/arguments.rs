//! The members of a request, each of the kind that it should be.

use lacuna::ErrorKind;
use serde_json::{Map, Value};

use crate::error::{CliError, CliResult};

/// An object of a request.
pub(crate) struct Arguments(pub(super) Map<String, Value>);

impl Arguments {
    /// Refuses members that are not among `known`: who sends one expects something of it.
    pub(super) fn only(&self, known: &[&str]) -> CliResult<()> {
        match self.0.keys().find(|name| !known.contains(&&***name)) {
            None => Ok(()),
            Some(name) => {
                let known = known.join(", ");
                Err(invalid(format!("There is no member '{name}' here; there are: {known}")))
            }
        }
    }

    /// Returns a text that must be there.
    pub(super) fn text(&self, name: &str) -> CliResult<&str> {
        self.optional_text(name)?.ok_or_else(|| invalid(format!("The member '{name}' is missing")))
    }

    /// Returns a text that may be left out.
    pub(super) fn optional_text(&self, name: &str) -> CliResult<Option<&str>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong(name, "a text")),
        }
    }

    /// Returns a list of texts; an empty one where it was left out.
    pub(super) fn texts(&self, name: &str) -> CliResult<Vec<String>> {
        let list = match self.0.get(name) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(wrong(name, "a list of texts")),
        };
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let texts: Option<Vec<String>> = list.iter().map(text).collect();
        texts.ok_or_else(|| wrong(name, "a list of texts"))
    }

    /// Returns a number that may be left out.
    pub(super) fn optional_number(&self, name: &str) -> CliResult<Option<u64>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().filter(|number| i64::try_from(*number).is_ok()) {
                Some(number) => Ok(Some(number)),
                None => Err(wrong(name, "a whole number from 0 to 2^63 - 1")),
            },
        }
    }

    /// Says whether a switch is on.
    pub(super) fn switch(&self, name: &str) -> CliResult<bool> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(is_on)) => Ok(*is_on),
            Some(_) => Err(wrong(name, "true or false")),
        }
    }

    /// Returns an object within this one; an empty one where it was left out.
    pub(super) fn members(&self, name: &str) -> CliResult<Self> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(Self(Map::new())),
            Some(Value::Object(members)) => Ok(Self(members.clone())),
            Some(_) => Err(wrong(name, "an object")),
        }
    }
}

fn wrong(name: &str, should: &str) -> CliError {
    invalid(format!("The member '{name}' should be {should}"))
}

pub(super) fn invalid(text: String) -> CliError {
    CliError::new(text).with_class(ErrorKind::InvalidRequest)
}
