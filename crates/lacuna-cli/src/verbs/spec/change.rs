//! Changing the options of an image that is open already (`reopen -o`).
//!
//! * What decides which image it is stays as it was; saying it again is no change.
//! * Options that speak of one thing in two ways replace each other: the size of all caches and
//!   those of each, a template of checks and single ones.

use super::ImageSpec;
use super::keys::{Keys, Scalar};
use crate::error::{CliError, CliResult};
use crate::format::Format;

/// What cannot be learnt from the options that were given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opened {
    pub(crate) format: Format,
    /// That of the image below.
    pub(crate) below: Option<Format>,
}

/// Options that may change while an image is open, for a disk or a backing layer.
const OF_DISK: [&str; 22] = [
    "auto-read-only",
    "cache-clean-interval",
    "cache-size",
    "cache.direct",
    "cache.no-flush",
    "detect-zeroes",
    "discard",
    "discard-no-unref",
    "force-share",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "offset",
    "overlap-check",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "read-only",
    "refcount-cache-size",
    "size",
    "aio-max-batch",
    "drop-cache",
];

impl ImageSpec {
    /// Returns the spec with `new` options.
    pub(crate) fn changed(&self, mut new: Keys, opened: Opened) -> CliResult<Self> {
        for part in ["file", "backing"] {
            if let Some(Scalar::Text(name)) = new.take(part) {
                let text = format!("Cannot find device='' nor node-name='{name}'");
                return Err(CliError::new(text));
            }
        }
        for (key, value) in new.pairs() {
            self.check_change(key, value, opened)?;
        }
        let mut new = new.only(is_changeable);
        let old = joined(self.keys.clone(), &mut new);
        new.add_missing(old);
        Self::build(&self.shown, new, self.name.as_deref())
    }

    fn check_change(&self, key: &str, value: &Scalar, opened: Opened) -> CliResult<()> {
        let (part, leaf) = split(key);
        let is_same = match self.now(key, part, leaf, opened) {
            Some(now) => *value == Scalar::Text(now),
            None => is_changeable(key),
        };
        match is_same {
            true => Ok(()),
            false => Err(CliError::new(format!("Cannot change the option '{leaf}'"))),
        }
    }

    /// What an option that decides about the image is now, where it is one.
    fn now(&self, key: &str, part: &str, leaf: &str, opened: Opened) -> Option<String> {
        let given = || self.keys.text(key).map(str::to_owned);
        match (part, leaf) {
            ("", "driver") => Some(given().unwrap_or_else(|| opened.format.name().to_owned())),
            ("backing", "driver") => {
                given().or_else(|| opened.below.map(|format| format.name().to_owned()))
            }
            ("file", "driver") => Some(given().unwrap_or_else(|| "file".to_owned())),
            ("file", "filename") => Some(self.file.clone()),
            (_, "node-name") => Some(given().unwrap_or_default()),
            _ => None,
        }
    }
}

/// Splits a key into the part of the disk that it is about, and its name there.
fn split(key: &str) -> (&str, &str) {
    for part in ["file", "backing"] {
        if let Some(leaf) = key.strip_prefix(part).and_then(|rest| rest.strip_prefix('.')) {
            return (part, leaf);
        }
    }
    ("", key)
}

fn is_changeable(key: &str) -> bool {
    let (_, leaf) = split(key);
    OF_DISK.contains(&leaf) || leaf.starts_with("overlap-check.")
}

/// Takes out of the old options what the new ones replace.
fn joined(old: Keys, new: &mut Keys) -> Keys {
    let has = |keys: &Keys, key: &str| keys.text(key).is_some();
    let new_template = has(new, "overlap-check") || has(new, "overlap-check.template");
    let new_total = has(new, "cache-size");
    let new_parts = has(new, "l2-cache-size") && has(new, "refcount-cache-size");
    let old = old.only(|key| {
        let is_check = key.starts_with("overlap-check");
        let is_part = key == "l2-cache-size" || key == "refcount-cache-size";
        !(new_template && is_check || new_total && is_part)
    });
    let any = |key: &str| has(new, key) || has(&old, key);
    let all_three = any("cache-size") && any("l2-cache-size") && any("refcount-cache-size");
    match all_three && !(new_total && new_parts) {
        true => {
            if !new_total {
                return old.only(|key| key != "cache-size");
            }
            new.take("cache-size");
            old
        }
        false => old,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Keys {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        Keys::from_pairs(pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    fn spec(text: &str) -> ImageSpec {
        ImageSpec::from_options(text).unwrap()
    }

    const OPENED: Opened = Opened { format: Format::Qcow2, below: None };

    #[test]
    fn what_decides_about_the_image_stays() {
        let image = spec("file.filename=a,node-name=x");
        for (text, leaf) in [
            ("driver=raw", "driver"),
            ("file.driver=qcow2", "driver"),
            ("file.filename=b", "filename"),
            ("node-name=y", "node-name"),
            ("file.node-name=y", "node-name"),
            ("foo=bar", "foo"),
            ("backing.driver=raw", "driver"),
        ] {
            let error = image.changed(keys(text), OPENED).unwrap_err();
            assert_eq!(error.text(), format!("Cannot change the option '{leaf}'"), "{text}");
        }
        for same in ["driver=qcow2", "file.driver=file", "file.filename=a", "node-name=x", ""] {
            assert!(image.changed(keys(same), OPENED).is_ok(), "{same}");
        }
    }

    #[test]
    fn one_way_to_say_it_replaces_the_other() {
        let image = spec("file.filename=a,cache-size=1M,l2-cache-size=64k,overlap-check=all");
        let changed = image.changed(keys("overlap-check.template=none"), OPENED).unwrap();
        assert_eq!(changed.keys.text("overlap-check"), None);
        let changed = image.changed(keys("refcount-cache-size=64k"), OPENED).unwrap();
        assert_eq!(changed.keys.text("cache-size"), None);
        let changed = image.changed(keys("cache-size=2M"), OPENED).unwrap();
        assert_eq!(changed.keys.text("l2-cache-size"), None);
    }
}
