//! Sizes as people type them, by QEMU's grammar: `64k`, `1.5G`, `0x200`.
//!
//! * Digits, an optional fraction, an optional suffix `b k M G T P E` in either case, powers of
//!   1024; or `0x` and hexadecimal digits without fraction or suffix.
//! * Never goes through floating point but for the fraction, so that whole numbers stay exact.

use crate::error::{CliError, CliResult};

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// It is not a number of this grammar.
    NotANumber,
    /// It is negative or does not fit into 64 bits.
    OutOfRange,
}

/// Reads a size in bytes, any value of 64 bits.
pub(crate) fn parse(text: &str) -> Result<u64, SizeError> {
    let rest = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    if let Some(digits) = rest.strip_prefix('-') {
        return Err(negative(digits));
    }
    let rest = rest.strip_prefix('+').unwrap_or(rest);
    match rest.strip_prefix("0x").or_else(|| rest.strip_prefix("0X")) {
        Some(digits) => hexadecimal(digits),
        None => decimal(rest),
    }
}

/// Reads a size that must stay within what a file can have: below 2^63.
pub(crate) fn parse_offset(text: &str) -> Result<u64, SizeError> {
    match parse(text)? {
        size if i64::try_from(size).is_ok() => Ok(size),
        _ => Err(SizeError::OutOfRange),
    }
}

/// Reads a number between two others, both included; `shown` is what it is called.
pub(crate) fn within(shown: &str, text: &str, least: u64, most: u64) -> CliResult<u64> {
    let problem = match parse(text) {
        Ok(value) if (least..=most).contains(&value) => return Ok(value),
        Err(SizeError::NotANumber) => format!("Invalid {shown} specified: '{text}'."),
        _ => format!("Invalid {shown} specified. Must be between {least} and {most}."),
    };
    Err(CliError::new(problem))
}

/// A plain negative number is out of range; anything else after a minus is no number at all.
fn negative(digits: &str) -> SizeError {
    match !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        true => SizeError::OutOfRange,
        false => SizeError::NotANumber,
    }
}

fn hexadecimal(digits: &str) -> Result<u64, SizeError> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(SizeError::NotANumber);
    }
    u64::from_str_radix(digits, 16).map_err(|_| SizeError::OutOfRange)
}

fn decimal(text: &str) -> Result<u64, SizeError> {
    let (whole, rest) = split_digits(text);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => split_digits(rest),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::NotANumber);
    }
    let unit = unit(rest).ok_or(SizeError::NotANumber)?;
    let part = part_of(fraction, unit)?;
    let whole = if whole.is_empty() { Ok(0) } else { whole.parse::<u64>() };
    let whole = whole.map_err(|_| SizeError::OutOfRange)?;
    let bytes = whole.checked_mul(unit).and_then(|bytes| bytes.checked_add(part));
    bytes.ok_or(SizeError::OutOfRange)
}

fn split_digits(text: &str) -> (&str, &str) {
    let end = text.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(end)
}

fn unit(suffix: &str) -> Option<u64> {
    let power = match suffix {
        "" => 0,
        _ if suffix.len() > 1 => return None,
        _ => "BKMGTPE".find(&suffix.to_ascii_uppercase())?,
    };
    Some(1 << (10 * power))
}

/// Returns the bytes that a fraction of the unit stands for, rounded to the nearest.
fn part_of(digits: &str, unit: u64) -> Result<u64, SizeError> {
    let fraction: f64 = format!("0.{digits}0").parse().map_err(|_| SizeError::NotANumber)?;
    match fraction > 0.0 && unit == 1 {
        true => Err(SizeError::NotANumber),
        false => Ok((fraction * unit as f64 + 0.5) as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_and_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            (" 5", 5),
            ("+5", 5),
            ("010", 10),
            ("5b", 5),
            ("5B", 5),
            ("64k", 65536),
            ("64K", 65536),
            ("1M", 1 << 20),
            ("1g", 1 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("1e", 1 << 60),
            ("18446744073709551615", u64::MAX),
            ("9223372036854775295", 9_223_372_036_854_775_295),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn fractions_need_a_unit_to_be_a_part_of() {
        for (text, bytes) in [
            ("1.", 1),
            ("1.0", 1),
            ("1.k", 1024),
            (".5k", 512),
            ("1.5G", 3 << 29),
            ("0.1k", 102),
            ("0.0000001k", 0),
            ("1.99999999999999999999k", 2048),
            ("7.999999E", 9_223_370_883_933_271_168),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["1.5", "1.25B", "0.4999", ".", "1..5k", ".k"] {
            assert_eq!(parse(text), Err(SizeError::NotANumber), "{text}");
        }
    }

    #[test]
    fn hexadecimal_takes_no_suffix() {
        assert_eq!(parse("0x100000"), Ok(1 << 20));
        assert_eq!(parse("0X1E"), Ok(30));
        for text in ["0x", "0x1g", "0x10k", "0x1.8", "0x-1", "00x5", "0x+1"] {
            assert_eq!(parse(text), Err(SizeError::NotANumber), "{text}");
        }
    }

    #[test]
    fn what_is_no_number_is_told_from_what_is_too_large() {
        for text in ["", " ", "x", "5 ", "5kk", "5kb", "5KiB", "1e3", "1,5", "-", "-x", "-1k", "é"]
        {
            assert_eq!(parse(text), Err(SizeError::NotANumber), "{text}");
        }
        for text in ["-1", "-0", "99999999999999999999", "0x10000000000000000", "16E", "16.5E"] {
            assert_eq!(parse(text), Err(SizeError::OutOfRange), "{text}");
        }
        assert_eq!(parse_offset("8E"), Err(SizeError::OutOfRange));
        assert_eq!(parse_offset("7E"), Ok(7 << 60));
    }
}
