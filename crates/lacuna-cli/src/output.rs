//! Numbers and names as QEMU's tools print them.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{CliError, CliResult};
use crate::verbs::Form;

/// How errors are said. Global, since an interruption has to know it too.
static ERRORS_AS_JSON: AtomicBool = AtomicBool::new(false);

static AT_THE_END: Mutex<String> = Mutex::new(String::new());

/// Chooses how errors are said from now on.
pub(crate) fn set_error_form(form: Form) {
    ERRORS_AS_JSON.store(form == Form::Json, Ordering::Relaxed);
}

/// Returns how errors are said.
pub(crate) fn error_form() -> Form {
    if ERRORS_AS_JSON.load(Ordering::Relaxed) { Form::Json } else { Form::Human }
}

/// Writes to standard output and flushes it, so that it keeps its place among other output.
///
/// A reader that went away ends the program as it would end one in C: quietly.
pub(crate) fn print(text: &str) -> CliResult<()> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> CliResult<()> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => std::process::exit(141),
        _ => {
            let error = lacuna::Error::io(error, "Writing to standard output");
            CliError::from(error).with_fact("file", "/dev/stdout")
        }
    })
}

/// Output on its way to standard output: lines that are printed many at a time.
pub(crate) struct Lines(Vec<u8>);

impl Lines {
    /// Bytes that are printed at once: enough to make the system calls cheap.
    const FULL: usize = 64 << 10;

    pub(crate) fn starting(text: &str) -> Self {
        let mut bytes = Vec::with_capacity(Self::FULL + 1024);
        bytes.extend_from_slice(text.as_bytes());
        Self(bytes)
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    /// Appends a word, filled up with spaces to `columns`.
    pub(crate) fn padded(&mut self, text: &str, columns: usize) {
        let end = self.0.len() + columns;
        self.text(text);
        self.0.resize(end.max(self.0.len()), b' ');
    }

    pub(crate) fn decimal(&mut self, value: u64) {
        self.digits::<10>(value);
    }

    /// Appends C's `%#x`, in which zero has no prefix, filled up with spaces to 16 places.
    pub(crate) fn hexadecimal(&mut self, value: u64) {
        let end = self.0.len() + 16;
        self.text(if value == 0 { "" } else { "0x" });
        self.digits::<16>(value);
        self.0.resize(end.max(self.0.len()), b' ');
    }

    /// The base is known when compiling: a division by it is a multiplication then.
    fn digits<const BASE: u64>(&mut self, mut value: u64) {
        let mut digits = [0; 20];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b"0123456789abcdef"[(value % BASE) as usize];
            value /= BASE;
            if value == 0 {
                break;
            }
        }
        self.0.extend_from_slice(&digits[first..]);
    }

    /// Prints what there is, once that is much.
    pub(crate) fn print_when_full(&mut self) -> CliResult<()> {
        if self.0.len() < Self::FULL { Ok(()) } else { self.print() }
    }

    /// Returns what was not printed yet.
    pub(crate) fn into_text(self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }

    /// Prints what there is.
    pub(crate) fn print(&mut self) -> CliResult<()> {
        let printed = print_bytes(&self.0);
        self.0.clear();
        printed
    }
}

/// Remembers ordinary output that comes last, behind errors even.
pub(crate) fn print_at_the_end(text: &str) {
    AT_THE_END.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
}

/// Prints what was kept for the end.
pub(crate) fn print_the_end() -> CliResult<()> {
    print(&std::mem::take(&mut *AT_THE_END.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// Writes to standard error; where that is not possible there is nobody to tell.
pub(crate) fn complain(text: &str) {
    drop(std::io::stderr().lock().write_all(text.as_bytes()));
}

/// Returns a name or other text of one line as a terminal may have it: what would steer the
/// terminal, or begin a line, is spelt out.
///
/// Images come from strangers, and so do the names in them.
pub(crate) fn tame(text: &str) -> String {
    text.chars().flat_map(spelt).collect()
}

/// As [`tame`] for text of several lines.
pub(crate) fn tame_lines(text: &str) -> String {
    text.split('\n').map(tame).collect::<Vec<_>>().join("\n")
}

fn spelt(character: char) -> Vec<char> {
    match character {
        '\n' => vec!['\\', 'n'],
        '\t' => vec!['\\', 't'],
        // Control characters, and those that reverse the direction of what is shown.
        '\0'..='\x1f' | '\x7f' => format!("\\x{:02x}", u32::from(character)).chars().collect(),
        '\u{80}'..='\u{9f}'
        | '\u{200e}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}' => character.escape_unicode().collect(),
        other => vec![other],
    }
}

/// Says something on standard error that is no error of the verb: a line of text, or of JSON where
/// errors are said so.
pub(crate) fn warn(text: &str) {
    complain(&match error_form() {
        Form::Human => format!("{text}\n"),
        Form::Json => format!("{}\n", serde_json::json!({ "warning": text })),
    });
}

/// Prints a size in bytes with three significant digits, as `info` has it: `1.26 MiB`.
pub(crate) fn short_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // The unit is chosen so that at most three digits stand before the point.
    let index = (0..6).find(|&index| (bytes as f64) < 1000.0 * power(index)).unwrap_or(6);
    format!("{} {}B", three_digits(bytes as f64 / power(index)), UNITS[index as usize])
}

fn power(index: u32) -> f64 {
    (1u64 << (10 * index)) as f64
}

/// What C's `%.3g` prints for values below 1000.
fn three_digits(value: f64) -> String {
    let rounded: f64 = format!("{value:.2e}").parse().unwrap_or(value);
    let whole = format!("{rounded:.0}").len();
    let text = format!("{rounded:.*}", 5 - whole.clamp(1, 3) + usize::from(rounded < 0.1));
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// Prints a number of bytes with three digits behind the point, as qemu-io has it: `1.500 KiB`.
pub(crate) fn io_size(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let index = (1..=6).rev().find(|&index| bytes >= power(index));
    let (text, unit) = match index {
        Some(index) => (format!("{:.3}", bytes / power(index)), UNITS[index as usize - 1]),
        None => (format!("{bytes:.6}"), "bytes"),
    };
    match text.find(".000") {
        Some(point) => format!("{} {unit}", &text[..point]),
        None => format!("{text} {unit}"),
    }
}

/// Prints a duration as qemu-io has it: `00.05 sec`, or hours and minutes where there are any.
pub(crate) fn io_time(seconds: f64, verbose: bool) -> String {
    let centiseconds = (seconds * 100.0) as u64;
    let (whole, part) = (centiseconds / 100, centiseconds % 100);
    match verbose || whole >= 60 {
        true => format!("{}:{:02}:{:02}.{part:02}", whole / 3600, whole / 60 % 60, whole % 60),
        false => format!("{whole:02}.{part:02} sec"),
    }
}

/// Prints seconds since 1970 as `2026-11-21 07:06:22` in UTC.
pub(crate) fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Turns days since 1970 into a date, counting in eras of 400 years that begin in March.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let leaps = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leaps) / 365;
    let before = 365 * year_of_era + year_of_era / 4 - year_of_era / 100;
    let day_of_year = day_of_era - before;
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (400 * era + year_of_era + u64::from(month <= 2), month, day)
}

/// Writes JSON as QEMU does: four spaces, one line for each member, empty lists on two lines.
pub(crate) fn pretty(value: &serde_json::Value) -> String {
    let mut text = String::new();
    pretty_into(&mut text, value, 0);
    text
}

fn pretty_into(text: &mut String, value: &serde_json::Value, depth: usize) {
    use serde_json::Value;
    match value {
        Value::Array(items) => {
            let items = items.iter().map(|item| (None, item));
            pretty_members(text, items, ['[', ']'], depth);
        }
        Value::Object(members) => {
            let members = members.iter().map(|(key, value)| (Some(&**key), value));
            pretty_members(text, members, ['{', '}'], depth);
        }
        Value::String(string) => *text += &quoted(string),
        scalar => *text += &scalar.to_string(),
    }
}

/// Quotes a string as QEMU does: whatever is not printable ASCII becomes `\u` and four digits.
fn quoted(string: &str) -> String {
    let mut text = "\"".to_owned();
    for character in string.chars() {
        match character {
            '"' => text += "\\\"",
            '\\' => text += "\\\\",
            '\x08' => text += "\\b",
            '\x0c' => text += "\\f",
            '\n' => text += "\\n",
            '\r' => text += "\\r",
            '\t' => text += "\\t",
            ' '..='~' => text.push(character),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    text += &format!("\\u{unit:04X}");
                }
            }
        }
    }
    text + "\""
}

fn pretty_members<'a>(
    text: &mut String,
    members: impl Iterator<Item = (Option<&'a str>, &'a serde_json::Value)>,
    brackets: [char; 2],
    depth: usize,
) {
    text.push(brackets[0]);
    for (index, (key, value)) in members.enumerate() {
        if index > 0 {
            text.push(',');
        }
        *text += &format!("\n{}", " ".repeat(4 * (depth + 1)));
        if let Some(key) = key {
            *text += &format!("{}: ", quoted(key));
        }
        pretty_into(text, value, depth + 1);
    }
    *text += &format!("\n{}{}", " ".repeat(4 * depth), brackets[1]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sizes_are_those_of_qemu_img() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (197_120, "192 KiB"),
            (1_318_912, "1.26 MiB"),
            (1_376_768, "1.31 MiB"),
            (8 << 20, "8 MiB"),
            (999 << 10, "999 KiB"),
            (1000 << 10, "0.977 MiB"),
            (104_857_600, "100 MiB"),
            (1_610_612_736, "1.5 GiB"),
            (7 << 60, "7 EiB"),
        ] {
            assert_eq!(short_size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn io_sizes_are_those_of_qemu_io() {
        for (bytes, text) in [
            (0.0, "0 bytes"),
            (1.0, "1 bytes"),
            (23.486_326, "23.486326 bytes"),
            (1536.0, "1.500 KiB"),
            (65536.0, "64 KiB"),
            (7_995_392.0, "7.625 MiB"),
        ] {
            assert_eq!(io_size(bytes), text);
        }
    }

    #[test]
    fn times_show_hours_only_where_there_are_minutes() {
        assert_eq!(io_time(0.004, false), "00.00 sec");
        assert_eq!(io_time(12.349, false), "12.34 sec");
        assert_eq!(io_time(2790.39, false), "0:46:30.39");
        assert_eq!(io_time(0.0, true), "0:00:00.00");
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_244_782), "2026-11-21 07:06:22");
    }

    #[test]
    fn numbers_of_lines_are_those_of_c() {
        let mut lines = Lines::starting("");
        for value in [0, 7, 0x10000, u64::MAX] {
            lines.hexadecimal(value);
            lines.decimal(value);
            lines.text("|");
        }
        let expected: String = [0, 7, 0x10000, u64::MAX]
            .iter()
            .map(|&value: &u64| match value {
                0 => format!("{:<16}0|", "0"),
                _ => format!("{value:<#16x}{value}|"),
            })
            .collect();
        assert_eq!(lines.into_text(), expected);
    }

    #[test]
    fn what_steers_a_terminal_is_spelt_out() {
        for (text, tamed) in [
            ("disk-1 ä.qcow2", "disk-1 ä.qcow2"),
            ("\x1b[31mred\x7f", "\\x1b[31mred\\x7f"),
            ("a\nformat: raw\t\r", "a\\nformat: raw\\t\\x0d"),
            ("\u{9b}2J \u{202e}gpj", "\\u{9b}2J \\u{202e}gpj"),
        ] {
            assert_eq!(tame(text), tamed);
        }
        assert_eq!(tame_lines("a\x07\nb"), "a\\x07\nb");
    }

    #[test]
    fn strings_in_json_are_ascii() {
        assert_eq!(quoted("a\"\\\n\x1b\x7fé😀"), r#""a\"\\\n\u001B\u007F\u00E9\uD83D\uDE00""#);
    }

    #[test]
    fn json_has_the_shape_of_qemu() {
        let value = serde_json::json!({"a": [], "b": {}, "c": [1, {"d": "x"}]});
        let expected = "{\n    \"a\": [\n    ],\n    \"b\": {\n    },\n    \"c\": [\n        1,\n        \
                        {\n            \"d\": \"x\"\n        }\n    ]\n}";
        assert_eq!(pretty(&value), expected);
    }
}
