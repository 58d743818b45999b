//! The `-o key=value,key2=value2` grammar and the options that image formats take.
//!
//! * A comma in a value is written twice. A key alone means `on`; with `no` in front, `off`.
//! * Repeated `-o` add up; of a repeated key the last wins.
//! * Values are kept as typed until they are used: the `Formatting` line shows them so.

use crate::error::{CliError, CliResult};
use crate::format::Format;
use crate::size::{self, SizeError};

/// What a value must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Number,
    Size,
    Switch,
    Text,
}

/// An option that a format takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) help: &'static str,
    /// The value of an option that is not given, where the `Formatting` line shows one.
    pub(crate) default: Option<&'static str>,
    /// Whether stock tools do not know it.
    pub(crate) is_ours: bool,
}

const fn spec(name: &'static str, kind: Kind, help: &'static str) -> Spec {
    Spec { name, kind, help, default: None, is_ours: false }
}

impl Spec {
    const fn or(self, value: &'static str) -> Self {
        Self { default: Some(value), ..self }
    }

    const fn ours(self) -> Self {
        Self { is_ours: true, ..self }
    }
}

/// The options of a new qcow2 image, in the order of the `Formatting` line.
const QCOW2: [Spec; 14] = [
    spec("cluster_size", Kind::Size, "Size of a cluster, 512 to 2M").or("65536"),
    spec("extended_l2", Kind::Switch, "32 subclusters for each cluster").or("off"),
    spec("preallocation", Kind::Text, "What to allocate at once (off)"),
    spec("preallocation_layout", Kind::Text, "Metadata in front of one run of data (contiguous)")
        .ours(),
    spec("compression_type", Kind::Text, "Compression of clusters (zlib, zstd)").or("zlib"),
    spec("size", Kind::Size, "Size of the disk"),
    spec("compat", Kind::Text, "Version of the format (v2 or 0.10, v3 or 1.1)"),
    spec("backing_file", Kind::Text, "File name of the backing image"),
    spec("backing_fmt", Kind::Text, "Format of the backing image"),
    spec("data_file", Kind::Text, "File name of an external data file"),
    spec("data_file_raw", Kind::Switch, "Keep the data file readable as a raw image"),
    spec("keep_mapping", Kind::Switch, "Remember that discards leave clusters where they are")
        .ours(),
    spec("zero_claims", Kind::Switch, "Say in private bits while all is zero or unallocated")
        .ours(),
    spec("lazy_refcounts", Kind::Switch, "Update reference counts late").or("off"),
];

/// The last of them, apart since it comes last in the line.
const REFCOUNT_BITS: Spec =
    spec("refcount_bits", Kind::Number, "Width of a reference count, 1 to 64").or("16");

/// The options of a new raw image.
const RAW: [Spec; 2] = [
    spec("size", Kind::Size, "Size of the disk"),
    spec("preallocation", Kind::Text, "What to allocate at once (off, falloc, full)"),
];

/// Returns the options a new image of `format` takes, in the order of the `Formatting` line.
pub(crate) fn specs(format: Format) -> Vec<Spec> {
    match format {
        Format::Qcow2 => QCOW2.into_iter().chain([REFCOUNT_BITS]).collect(),
        _ => RAW.to_vec(),
    }
}

/// Lists options by name, under a title.
pub(crate) fn table(title: &str, mut specs: Vec<Spec>) -> String {
    specs.sort_by_key(|spec| spec.name);
    let mut text = title.to_owned();
    for spec in specs {
        let kind = match spec.kind {
            Kind::Number => "num",
            Kind::Size => "size",
            Kind::Switch => "bool (on/off)",
            Kind::Text => "str",
        };
        text += &format!("  {:<22} - {}\n", format!("{}=<{kind}>", spec.name), spec.help);
    }
    text
}

/// Splits `text` at single commas and takes one of each pair of commas away.
///
/// Nothing where it is no option list: empty, or with an item that is empty or begins with a comma.
fn items(text: &str) -> Option<Vec<String>> {
    let mut items = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let item = items.last_mut()?;
        if character != ',' {
            item.push(character);
        } else if characters.next_if_eq(&',').is_some() {
            item.push(',');
        } else {
            items.push(String::new());
        }
    }
    let is_list = items.iter().all(|item| !item.is_empty() && !item.starts_with(','));
    is_list.then_some(items)
}

/// What was given with `-o`, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Given(Vec<(String, String)>);

impl Given {
    /// Returns the keys in order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(key, _)| &**key)
    }

    /// Returns the last value of a key.
    pub(crate) fn last(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| &**value)
    }

    /// Returns keys and values in order.
    pub(crate) fn into_pairs(self) -> Vec<(String, String)> {
        self.0
    }
}

/// Either values or the wish to see what there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Help,
    Values(Given),
}

/// Reads all `-o` texts of a command.
pub(crate) fn parse<'a>(texts: impl Iterator<Item = &'a str>) -> CliResult<Asked> {
    let mut given = Vec::new();
    let mut wants_help = false;
    for text in texts {
        let items =
            items(text).ok_or_else(|| CliError::new(format!("Invalid option list: {text}")))?;
        wants_help |= items.iter().any(|item| item == "help" || item == "?");
        given.extend(items.iter().map(|item| key_and_value(item)));
    }
    Ok(if wants_help { Asked::Help } else { Asked::Values(Given(given)) })
}

fn key_and_value(item: &str) -> (String, String) {
    let (key, value) = match (item.split_once('='), item.strip_prefix("no")) {
        (Some(pair), _) => pair,
        (None, Some(key)) => (key, "off"),
        (None, None) => (item, "on"),
    };
    (key.to_owned(), value.to_owned())
}

/// Checked values for one format.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    specs: Vec<Spec>,
    values: Vec<(&'static str, String)>,
}

impl Values {
    /// Checks that `format` has each option and that values are of their kind.
    pub(crate) fn new(format: Format, given: &Given) -> CliResult<Self> {
        let mut values = Self { specs: specs(format), values: Vec::new() };
        for (key, value) in &given.0 {
            let found = values.specs.iter().find(|spec| spec.name == key);
            let spec = *found.ok_or_else(|| {
                CliError::new(format!("Invalid parameter '{key}'")).with_hint(format!(
                    "`create -f {format} -o help` lists the options of the format"
                ))
            })?;
            check(spec.name, spec.kind, value)?;
            values.set(spec.name, value.clone());
        }
        Ok(values)
    }

    /// Says whether the format has this option.
    pub(crate) fn takes(&self, name: &str) -> bool {
        self.specs.iter().any(|spec| spec.name == name)
    }

    /// Sets or replaces a value.
    pub(crate) fn set(&mut self, name: &'static str, value: String) {
        self.values.retain(|(key, _)| *key != name);
        self.values.push((name, value));
    }

    /// Returns what was given.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.values.iter().find(|(key, _)| *key == name).map(|(_, value)| &**value)
    }

    /// Returns what was given or the default.
    fn effective(&self, name: &str) -> Option<&str> {
        let default = || self.specs.iter().find(|spec| spec.name == name)?.default;
        self.text(name).or_else(default)
    }

    /// Returns a size or number in effect.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        let text = self.effective(name)?;
        let kind = self.specs.iter().find(|spec| spec.name == name)?.kind;
        if kind == Kind::Size { size::parse(text).ok() } else { number(text).ok() }
    }

    /// Says whether a switch is on.
    pub(crate) fn is_on(&self, name: &str) -> bool {
        self.effective(name).and_then(switch) == Some(true)
    }

    /// Returns ` key=value` for each option in effect.
    pub(crate) fn formatting(&self) -> String {
        let shown = self.specs.iter().filter_map(|spec| {
            let text = self.effective(spec.name)?;
            let text = match spec.kind {
                Kind::Number | Kind::Size => (self.number(spec.name)? as i64).to_string(),
                Kind::Switch | Kind::Text => text.replace(',', ",,"),
            };
            Some(format!(" {}={text}", spec.name))
        });
        shown.collect()
    }
}

/// Refuses a value that is not of the kind that the option `name` takes.
pub(crate) fn check(name: &str, kind: Kind, value: &str) -> CliResult<()> {
    let problem = match kind {
        Kind::Text => None,
        Kind::Switch => match switch(value) {
            Some(_) => None,
            None => Some(format!("Parameter '{name}' expects 'on' or 'off'")),
        },
        Kind::Number => match number(value) {
            Ok(_) => None,
            Err(SizeError::NotANumber) => Some(format!("Parameter '{name}' expects a number")),
            Err(SizeError::OutOfRange) => {
                Some(format!("Value '{value}' is too large for parameter '{name}'"))
            }
        },
        Kind::Size => match size::parse(value) {
            Ok(_) => None,
            Err(SizeError::NotANumber) => Some(no_size(name)),
            Err(SizeError::OutOfRange) => {
                Some(format!("Value '{value}' is out of range for parameter '{name}'"))
            }
        },
    };
    problem.map_or(Ok(()), |text| Err(CliError::new(text)))
}

/// Says that a value is no size.
pub(crate) fn no_size(name: &str) -> String {
    format!(
        "Parameter '{name}' expects a non-negative number below 2^64\n\
         Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
         and exabytes, respectively."
    )
}

/// Reads `on` or `off` in any of their spellings.
pub(crate) fn switch(value: &str) -> Option<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// Reads a number in any base of C; negative ones wrap as they do there.
pub(crate) fn number(text: &str) -> Result<u64, SizeError> {
    let (digits, is_negative) = match text.strip_prefix('-') {
        Some(digits) => (digits, true),
        None => (text, false),
    };
    let (digits, base) = match digits.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(base)) {
        return Err(SizeError::NotANumber);
    }
    let value = u64::from_str_radix(digits, base).map_err(|_| SizeError::OutOfRange)?;
    Ok(if is_negative { value.wrapping_neg() } else { value })
}

/// For the fuzzer: values that are shown and read again are shown alike.
pub(crate) fn parse_hostile(text: &str) {
    let Ok(Asked::Values(given)) = parse([text].into_iter()) else { return };
    let again: Vec<String> = given
        .0
        .iter()
        .map(|(key, value)| format!("{}={}", key.replace(',', ",,"), value.replace(',', ",,")))
        .collect();
    // An empty value at the end of a key is a list of its own kind; keys may hold no `=`.
    if given.0.iter().all(|(key, _)| !key.is_empty() && !key.starts_with(',')) {
        let read = parse([again.join(",").as_str()].into_iter());
        assert_eq!(read.ok(), Some(Asked::Values(given.clone())), "{text}");
    }
    for format in [Format::Qcow2, Format::Raw] {
        if let Ok(values) = Values::new(format, &given) {
            assert!(values.formatting().is_empty() || values.formatting().starts_with(' '));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> Given {
        match parse([text].into_iter()) {
            Ok(Asked::Values(given)) => given,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn values(text: &str) -> CliResult<Values> {
        Values::new(Format::Qcow2, &given(text))
    }

    #[test]
    fn doubled_commas_belong_to_the_value() {
        let values = values("data_file=a,,b,size=1M").unwrap();
        assert_eq!(values.text("data_file"), Some("a,b"));
        assert_eq!(values.number("size"), Some(1 << 20));
        assert_eq!(items("a,,,b").unwrap(), ["a,", "b"]);
    }

    #[test]
    fn lists_with_empty_items_are_no_lists() {
        for text in ["", ",", "a,", ",a", "a,b,", ",,a", "a,,,"] {
            assert_eq!(items(text), None, "{text}");
        }
    }

    #[test]
    fn help_anywhere_asks_for_help() {
        for text in ["help", "?", "size=1M,help", "help,size=1M"] {
            assert_eq!(parse([text].into_iter()).unwrap(), Asked::Help, "{text}");
        }
        assert_eq!(values("size=1M,,help").unwrap_err().text(), no_size("size"));
    }

    #[test]
    fn keys_alone_are_switches() {
        assert!(values("lazy_refcounts").unwrap().is_on("lazy_refcounts"));
        assert!(!values("lazy_refcounts,nolazy_refcounts").unwrap().is_on("lazy_refcounts"));
        assert!(values("extended_l2=yes").unwrap().is_on("extended_l2"));
    }

    #[test]
    fn wrong_values_are_told_by_kind() {
        for (text, message) in [
            ("foo=bar", "Invalid parameter 'foo'"),
            ("=5", "Invalid parameter ''"),
            ("lazy_refcounts=1", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
            ("refcount_bits=16k", "Parameter 'refcount_bits' expects a number"),
            (
                "refcount_bits=99999999999999999999999",
                "Value '99999999999999999999999' is too large for parameter 'refcount_bits'",
            ),
            ("cluster_size=-1", "Value '-1' is out of range for parameter 'cluster_size'"),
        ] {
            assert_eq!(values(text).unwrap_err().text(), message, "{text}");
        }
    }

    #[test]
    fn the_formatting_line_has_defaults_and_what_was_given() {
        let values = values("size=64k,refcount_bits=-1,backing_file=a,,b").unwrap();
        assert_eq!(
            values.formatting(),
            " cluster_size=65536 extended_l2=off compression_type=zlib size=65536 \
             backing_file=a,,b lazy_refcounts=off refcount_bits=-1"
        );
    }
}
