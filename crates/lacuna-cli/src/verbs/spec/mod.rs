//! Images named by a file name, by options (`--image-opts`) or by `json:`.
//!
//! All three come down to a tree of options ([`tree`]); a plain name is a tree of one file.

pub(crate) mod change;
pub(crate) mod debug;
mod json;
pub(crate) mod keys;
pub(crate) mod nbd;
pub(crate) mod runtime;
mod storage;
pub(crate) mod tree;

use std::path::PathBuf;

use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::options::{self, Asked};
use keys::{Keys, Scalar};
use tree::DiskSpec;

pub(crate) use json::keys as object_keys;
pub(crate) use tree::split_protocol;

/// Which image is meant.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ImageSpec {
    /// What the user wrote, for messages.
    pub(crate) shown: String,
    /// The file that all comes from.
    pub(crate) file: String,
    /// What it is made of.
    pub(crate) disk: DiskSpec,
    /// The name of a format that is not known, as the user wrote it.
    unknown: Option<String>,
    /// All options, those in a `json:` name among them.
    keys: Keys,
    /// The name beside them, where it is none of `json:`.
    name: Option<String>,
}

impl ImageSpec {
    /// Reads a file name: plain, with a protocol, or `json:{...}`.
    pub(crate) fn from_name(name: &str, format: Option<&str>) -> CliResult<Self> {
        let mut keys = Keys::default();
        if let Some(format) = format {
            keys.set("driver".to_owned(), Scalar::Text(format.to_owned()));
        }
        match format.filter(|format| Format::from_name(format).is_none() && !is_storage(format)) {
            None => Self::read(name, keys, Some(name)),
            // Told when the image is opened, as that of a missing file is.
            Some(format) => {
                let unknown = Some(format.to_owned());
                Ok(Self { unknown, ..Self::read(name, Keys::default(), Some(name))? })
            }
        }
    }

    /// Reads `driver=qcow2,file.filename=NAME`.
    pub(crate) fn from_options(text: &str) -> CliResult<Self> {
        if text.is_empty() {
            return Err(CliError::new("Must specify either driver or file"));
        }
        match options::parse([text].into_iter())? {
            Asked::Help => Err(CliError::new("Image options are driver and file.filename")),
            Asked::Values(given) => Self::from_pairs(text, given.into_pairs()),
        }
    }

    /// Reads keys and values; `shown` is what the user wrote.
    pub(crate) fn from_pairs(shown: &str, pairs: Vec<(String, String)>) -> CliResult<Self> {
        Self::read(shown, Keys::from_pairs(pairs), None)
    }

    /// Reads keys and values beside a file name.
    pub(crate) fn from_name_and_pairs(name: &str, pairs: Vec<(String, String)>) -> CliResult<Self> {
        Self::read(name, Keys::from_pairs(pairs), Some(name))
    }

    fn read(shown: &str, mut keys: Keys, name: Option<&str>) -> CliResult<Self> {
        let mut name = name;
        if let Some(json) = name.and_then(|name| name.strip_prefix("json:")) {
            keys.add_missing(json::keys(json)?);
            name = None;
        }
        Self::build(shown, keys, name)
    }

    fn build(shown: &str, keys: Keys, name: Option<&str>) -> CliResult<Self> {
        let disk = DiskSpec::read(keys.clone(), name)?;
        let file = disk.file.path().to_string_lossy().into_owned();
        let (shown, name) = (shown.to_owned(), name.map(str::to_owned));
        Ok(Self { shown, file, disk, unknown: None, keys, name })
    }

    /// Returns the format if one was named.
    pub(crate) fn format(&self) -> CliResult<Option<Format>> {
        match &self.unknown {
            None => Ok(self.disk.format),
            Some(name) => Err(CliError::new(format!("Unknown driver '{name}'"))
                .with_hint("formats are qcow2 and raw")),
        }
    }

    /// Returns the path of the file that all comes from.
    pub(crate) fn path(&self) -> PathBuf {
        self.disk.file.path().to_owned()
    }
}

/// Names that stand for a storage where a format is expected.
fn is_storage(name: &str) -> bool {
    let known =
        ["blkdebug", "compress", "copy-on-read", "host_cdrom", "nbd", "null-co", "null-aio"];
    known.contains(&name)
}

/// For the fuzzer: what is accepted names a file.
pub(crate) fn parse_hostile(text: &str) {
    let json = format!("json:{text}");
    let specs = [ImageSpec::from_options(text), ImageSpec::from_name(&json, None)];
    for spec in specs.into_iter().flatten() {
        // An empty name is the host's to refuse.
        assert_eq!(spec.path().to_string_lossy(), spec.file, "{text}");
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
    fn what_nobody_takes_is_refused_by_whoever_it_was_for() {
        for (text, message) in [
            (
                "driver=qcow2,file.filename=a,foo=b",
                "Block format 'qcow2' does not support the option 'foo'",
            ),
            (
                "driver=qcow2,file.filename=a,file.foo=b",
                "Block protocol 'file' doesn't support the option 'foo'",
            ),
            (
                "driver=file,filename=a,foo=b",
                "Block protocol 'file' doesn't support the option 'foo'",
            ),
            ("driver=foo,filename=a", "Unknown driver 'foo'"),
            ("driver=qcow2,file.driver=foo,file.filename=a", "Unknown driver 'foo'"),
            ("driver=qcow2", "A block device must be specified for \"file\""),
            ("driver=file", "The 'file' block driver requires a file name"),
            ("driver=host_device", "The 'host_device' block driver requires a file name"),
            ("filename=a", "Must specify either driver or file"),
            ("driver=qcow2,filename=a", "A block device must be specified for \"file\""),
            ("driver=qcow2,file=a", "Cannot find device='a' nor node-name='a'"),
            (
                "driver=qcow2,file.filename=a,backing=foo",
                "Could not open backing file: Cannot find device='foo' nor node-name='foo'",
            ),
            (
                "driver=qcow2,file.filename=a,read-only=foo",
                "Parameter 'read-only' expects 'on' or 'off'",
            ),
            ("driver=qcow2,file.filename=a,file.locking=foo", "invalid parameter value: foo"),
            ("driver=qcow2,file.filename=a,discard=foo", "Invalid discard option"),
            ("driver=qcow2,file.filename=a,node-name=5", "Invalid node-name: '5'"),
            ("", "Must specify either driver or file"),
        ] {
            assert_eq!(ImageSpec::from_options(text).unwrap_err().text(), message, "{text}");
        }
        let error = ImageSpec::from_name("foo:bar", None).unwrap_err();
        assert_eq!(error.text(), "Unknown protocol 'foo'");
    }

    #[test]
    fn an_unknown_format_is_told_when_it_matters() {
        let spec = ImageSpec::from_name("a", Some("foo")).unwrap();
        assert_eq!(spec.format().unwrap_err().text(), "Unknown driver 'foo'");
    }

    #[test]
    fn options_given_beside_a_name_win() {
        let pairs = vec![("driver".to_owned(), "qcow2".to_owned())];
        let name = r#"json:{"driver":"raw","file.filename":"a"}"#;
        let spec = ImageSpec::from_name_and_pairs(name, pairs).unwrap();
        assert_eq!((spec.format().unwrap(), &*spec.file), (Some(Format::Qcow2), "a"));
    }

    #[test]
    fn descriptions_are_not_nested_without_bound() {
        let mut prefix = String::new();
        let mut text = "driver=raw".to_owned();
        for _ in 0..1000 {
            prefix += "file.";
            text += &format!(",{prefix}driver=raw");
        }
        let error = ImageSpec::from_options(&text).unwrap_err();
        assert!(error.text().contains("nested"), "{}", error.text());
    }
}
