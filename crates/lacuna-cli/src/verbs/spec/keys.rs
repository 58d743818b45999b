//! Options by dotted key, each taken by the one it is for; what is left over is nobody's.

use crate::error::{CliError, CliResult};
use crate::options::{self, Kind};

/// A value. Numbers and switches of JSON are kept as people type them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    Null,
    Text(String),
}

/// Options that nobody has taken yet, in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Keys(Vec<(String, Scalar)>);

impl Keys {
    /// Reads pairs; of a repeated key the last wins.
    pub(crate) fn from_pairs(pairs: Vec<(String, String)>) -> Self {
        let mut keys = Self::default();
        pairs.into_iter().for_each(|(key, value)| keys.set(key, Scalar::Text(value)));
        keys
    }

    /// Sets or replaces a value.
    pub(crate) fn set(&mut self, key: String, value: Scalar) {
        match self.0.iter_mut().find(|(name, _)| *name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    /// Takes over what `others` has and this one lacks.
    pub(super) fn add_missing(&mut self, others: Self) {
        for (key, value) in others.0 {
            if self.0.iter().all(|(name, _)| *name != key) {
                self.0.push((key, value));
            }
        }
    }

    /// Returns a text without taking it.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.0.iter().find_map(|(name, value)| match value {
            Scalar::Text(text) if name == key => Some(&**text),
            _ => None,
        })
    }

    /// Returns all of them.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&str, &Scalar)> {
        self.0.iter().map(|(key, value)| (&**key, value))
    }

    /// Keeps those whose key passes.
    #[must_use]
    pub(crate) fn only(self, passes: impl Fn(&str) -> bool) -> Self {
        Self(self.0.into_iter().filter(|(key, _)| passes(key)).collect())
    }

    /// Takes a value out.
    pub(crate) fn take(&mut self, key: &str) -> Option<Scalar> {
        let at = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.remove(at).1)
    }

    /// Takes a value out; null is none.
    pub(crate) fn take_text(&mut self, key: &str) -> Option<String> {
        match self.take(key)? {
            Scalar::Text(text) => Some(text),
            Scalar::Null => None,
        }
    }

    /// Takes a switch out.
    pub(crate) fn take_switch(&mut self, key: &str) -> CliResult<Option<bool>> {
        let Some(text) = self.take_text(key) else { return Ok(None) };
        options::check(key, Kind::Switch, &text).map(|()| options::switch(&text))
    }

    /// Takes a size in bytes out.
    pub(crate) fn take_size(&mut self, key: &str) -> CliResult<Option<u64>> {
        let Some(text) = self.take_text(key) else { return Ok(None) };
        options::check(key, Kind::Size, &text).map(|()| crate::size::parse(&text).ok())
    }

    /// Takes a number out.
    pub(crate) fn take_number(&mut self, key: &str) -> CliResult<Option<u64>> {
        let Some(text) = self.take_text(key) else { return Ok(None) };
        options::check(key, Kind::Number, &text).map(|()| options::number(&text).ok())
    }

    /// Takes all options below `prefix` out, without it.
    pub(crate) fn take_below(&mut self, prefix: &str) -> Self {
        let is_below =
            |key: &str| key.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'));
        let (below, rest) =
            std::mem::take(&mut self.0).into_iter().partition(|(key, _)| is_below(key));
        self.0 = rest;
        let short = |(key, value): (String, Scalar)| (key[prefix.len() + 1..].to_owned(), value);
        let below: Vec<(String, Scalar)> = below;
        Self(below.into_iter().map(short).collect())
    }

    /// Takes out the members of the list `prefix`, in order.
    pub(crate) fn take_list(&mut self, prefix: &str) -> Vec<Self> {
        let mut below = self.take_below(prefix);
        let mut items = Vec::new();
        loop {
            let item = below.take_below(&items.len().to_string());
            if item.is_empty() {
                return items;
            }
            items.push(item);
        }
    }

    /// Says whether there is nothing left.
    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns what is left, first of all.
    pub(crate) fn first(&self) -> Option<&str> {
        self.0.first().map(|(key, _)| &**key)
    }

    /// Refuses what is left, in the name of a format.
    pub(crate) fn none_for_format(&self, format: &str) -> CliResult<()> {
        self.none(|key| format!("Block format '{format}' does not support the option '{key}'"))
    }

    /// Refuses what is left, in the name of what keeps an image's bytes.
    pub(crate) fn none_for_storage(&self, driver: &str) -> CliResult<()> {
        self.none(|key| format!("Block protocol '{driver}' doesn't support the option '{key}'"))
    }

    fn none(&self, text: impl FnOnce(&str) -> String) -> CliResult<()> {
        self.first().map_or(Ok(()), |key| Err(CliError::new(text(key))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&str, &str)]) -> Keys {
        Keys::from_pairs(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn what_is_below_a_prefix_is_taken_whole() {
        let mut all =
            keys(&[("file.a", "1"), ("filename", "x"), ("file.b.c", "2"), ("file.a", "3")]);
        assert_eq!(all.take_below("file"), keys(&[("a", "3"), ("b.c", "2")]));
        assert_eq!(all.first(), Some("filename"));
    }

    #[test]
    fn lists_are_taken_in_order() {
        let mut all = keys(&[("l.1.b", "2"), ("l.0.a", "1"), ("m", "3")]);
        assert_eq!(all.take_list("l"), [keys(&[("a", "1")]), keys(&[("b", "2")])]);
    }

    #[test]
    fn values_of_the_wrong_type_are_refused() {
        let mut all = keys(&[("s", "5"), ("z", "5x")]);
        assert_eq!(all.take_switch("s").unwrap_err().text(), "Parameter 's' expects 'on' or 'off'");
        assert!(all.take_size("z").is_err());
        assert_eq!(all.take_number("none").unwrap(), None);
    }
}
