//! What is printed after a transfer.

use std::fmt::Write as _;
use std::time::Duration;

use crate::output::{io_size, io_time};

/// How much is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Human,
    Machine,
    Quiet,
}

impl Style {
    /// Reads `-C` and `-q`.
    pub(super) fn new(parsed: &crate::args::Parsed) -> Self {
        match (parsed.has("q"), parsed.has("C")) {
            (true, _) => Self::Quiet,
            (_, true) => Self::Machine,
            _ => Self::Human,
        }
    }
}

/// Says what was transferred: verb, offset and bytes, in what time.
pub(super) fn transfer(style: Style, verb: &str, offset: u64, len: u64, took: Duration) -> String {
    let seconds = took.as_secs_f64().max(1e-9);
    let (bytes_rate, ops_rate) = (len as f64 / seconds, 1.0 / seconds);
    match style {
        Style::Quiet => String::new(),
        Style::Machine => {
            format!("{len},1,{},{bytes_rate:.3},{ops_rate:.3}\n", io_time(seconds, true))
        }
        Style::Human => format!(
            "{verb} {len}/{len} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and {ops_rate:.4} \
             ops/sec)\n",
            io_size(len as f64),
            io_time(seconds, false),
            io_size(bytes_rate),
        ),
    }
}

/// Prints bytes as hexadecimal numbers and letters, 16 a line.
pub(super) fn dump(offset: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (index, line) in bytes.chunks(16).enumerate() {
        // Writing to a string cannot fail.
        let _infallible = write!(text, "{:08x}:  ", offset + 16 * index as u64);
        for byte in line {
            let _infallible = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        text.extend(line.iter().map(|byte| match byte.is_ascii_alphanumeric() {
            true => char::from(*byte),
            false => '.',
        }));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_has_sixteen_bytes_a_line() {
        assert_eq!(
            dump(0x10000, b"\x05a-Z0123456789abcde"),
            "00010000:  05 61 2d 5a 30 31 32 33 34 35 36 37 38 39 61 62  .a.Z0123456789ab\n\
             00010010:  63 64 65  cde\n"
        );
    }

    #[test]
    fn reports_come_in_three_styles() {
        let took = Duration::from_millis(500);
        let human = transfer(Style::Human, "wrote", 512, 1536, took);
        assert_eq!(
            human,
            "wrote 1536/1536 bytes at offset 512\n1.500 KiB, 1 ops; 00.50 sec (3 KiB/sec and \
             2.0000 ops/sec)\n"
        );
        let machine = transfer(Style::Machine, "wrote", 0, 1024, took);
        assert_eq!(machine, "1024,1,0:00:00.50,2048.000,2.000\n");
        assert_eq!(transfer(Style::Quiet, "wrote", 0, 1024, took), "");
    }
}
