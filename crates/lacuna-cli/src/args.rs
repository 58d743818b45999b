//! Options by the rules of GNU getopt_long, driven by a table per verb.
//!
//! * Short options cluster (`-pcO qcow2`), long ones may be shortened while that is unambiguous,
//!   options may follow operands, `--` ends them, and the caller decides what repetition means
//!   (mostly: the last wins).
//! * By hand, since the messages are part of what scripts see, and parser crates word their own.

use crate::error::{CliError, CliResult};

/// One option of a verb.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flag {
    /// The letter, or nothing where there is only a long form.
    pub(crate) short: Option<char>,
    /// The name; what the other methods call it by.
    pub(crate) long: &'static str,
    /// What its value is called in the help, or nothing where it takes none.
    pub(crate) value: Option<&'static str>,
    /// Whether the value may be left out; it must be attached with `=` then.
    pub(crate) optional: bool,
    /// One line of help.
    pub(crate) help: &'static str,
}

impl Flag {
    /// Makes an option without value.
    pub(crate) const fn switch(short: char, long: &'static str, help: &'static str) -> Self {
        Self { short: Some(short), long, value: None, optional: false, help }
    }

    /// Makes an option with a value.
    pub(crate) const fn valued(
        short: char,
        long: &'static str,
        value: &'static str,
        help: &'static str,
    ) -> Self {
        Self { short: Some(short), long, value: Some(value), optional: false, help }
    }

    /// Makes the value one that may be left out.
    pub(crate) const fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    /// Takes the letter away.
    pub(crate) const fn long_only(self) -> Self {
        Self { short: None, ..self }
    }
}

/// What was given: options in order, then operands in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parsed {
    options: Vec<(&'static str, String)>,
    pub(crate) operands: Vec<String>,
}

impl Parsed {
    /// Says whether the option was given.
    pub(crate) fn has(&self, long: &str) -> bool {
        self.options.iter().any(|(name, _)| *name == long)
    }

    /// Returns the value that was given last.
    pub(crate) fn last(&self, long: &str) -> Option<&str> {
        self.all(long).last()
    }

    /// Returns all values in order.
    pub(crate) fn all<'a>(&'a self, long: &str) -> impl Iterator<Item = &'a str> {
        self.options.iter().filter(move |(name, _)| *name == long).map(|(_, value)| &**value)
    }
}

/// Sorts `arguments` into options of `table` and operands.
pub(crate) fn parse(table: &[Flag], arguments: &[String]) -> CliResult<Parsed> {
    scan(table, arguments, Operands::Anywhere)
}

/// As [`parse`], but the first operand ends the options: what follows belongs to a verb.
pub(crate) fn parse_leading(table: &[Flag], arguments: &[String]) -> CliResult<Parsed> {
    scan(table, arguments, Operands::EndOptions)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operands {
    Anywhere,
    EndOptions,
}

fn scan(table: &[Flag], arguments: &[String], operands: Operands) -> CliResult<Parsed> {
    let mut parsed = Parsed::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            parsed.operands.extend(rest.by_ref().cloned());
        } else if let Some(long) = argument.strip_prefix("--").filter(|_| has_long(table)) {
            parsed.options.push(long_option(table, long, &mut rest)?);
        } else if let Some(letters) = argument.strip_prefix('-').filter(|rest| !rest.is_empty()) {
            short_options(table, letters, &mut rest, &mut parsed.options)?;
        } else {
            parsed.operands.push(argument.clone());
            if operands == Operands::EndOptions {
                parsed.operands.extend(rest.by_ref().cloned());
            }
        }
    }
    Ok(parsed)
}

/// Commands of `io` have letters only: their long names are those letters.
fn has_long(table: &[Flag]) -> bool {
    table.is_empty() || table.iter().any(|flag| flag.long.len() > 1)
}

type Rest<'a> = std::slice::Iter<'a, String>;

fn long_option(
    table: &[Flag],
    text: &str,
    rest: &mut Rest<'_>,
) -> CliResult<(&'static str, String)> {
    let (name, attached) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    let flag = find_long(table, name)?;
    let long = flag.long;
    let value = match (flag.value, attached) {
        (None, None) => String::new(),
        (None, Some(_)) => {
            return Err(CliError::option(format!("option '--{long}' doesn't allow an argument")));
        }
        (Some(_), Some(value)) => value,
        (Some(_), None) if flag.optional => String::new(),
        (Some(_), None) => rest
            .next()
            .cloned()
            .ok_or_else(|| CliError::option(format!("option '--{long}' requires an argument")))?,
    };
    Ok((long, value))
}

/// Finds the option whose name is `name` or, if only one is meant, begins with it.
fn find_long<'t>(table: &'t [Flag], name: &str) -> CliResult<&'t Flag> {
    if let Some(exact) = table.iter().find(|flag| flag.long == name) {
        return Ok(exact);
    }
    let meant: Vec<&Flag> = table.iter().filter(|flag| flag.long.starts_with(name)).collect();
    match meant[..] {
        [] => Err(CliError::option(format!("unrecognized option '--{name}'"))),
        [flag] => Ok(flag),
        _ => {
            let names: String = meant.iter().map(|flag| format!(" '--{}'", flag.long)).collect();
            let text = format!("option '--{name}' is ambiguous; possibilities:{names}");
            Err(CliError::option(text))
        }
    }
}

fn short_options(
    table: &[Flag],
    letters: &str,
    rest: &mut Rest<'_>,
    options: &mut Vec<(&'static str, String)>,
) -> CliResult<()> {
    for (at, letter) in letters.char_indices() {
        let Some(flag) = table.iter().find(|flag| flag.short == Some(letter)) else {
            return Err(CliError::option(format!("invalid option -- '{letter}'")));
        };
        if flag.value.is_none() || flag.optional {
            options.push((flag.long, String::new()));
            continue;
        }
        let glued = &letters[at + letter.len_utf8()..];
        let value = match glued {
            "" => rest.next().cloned().ok_or_else(|| {
                CliError::option(format!("option requires an argument -- '{letter}'"))
            })?,
            glued => glued.to_owned(),
        };
        options.push((flag.long, value));
        return Ok(());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: [Flag; 6] = [
        Flag::switch('q', "quiet", ""),
        Flag::valued('f', "format", "FMT", ""),
        Flag::valued('o', "options", "OPTS", ""),
        Flag::valued('b', "backing", "FILE", ""),
        Flag::switch('u', "backing-unsafe", ""),
        Flag::valued('O', "output", "FMT", "").long_only(),
    ];

    fn parsed(line: &str) -> CliResult<Parsed> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&TABLE, &words)
    }

    fn text(line: &str) -> String {
        parsed(line).unwrap_err().text().to_owned()
    }

    #[test]
    fn short_options_cluster_and_may_carry_their_value() {
        let got = parsed("-qfqcow2 image -quo size=1M 1G").unwrap();
        assert_eq!(got.operands, ["image", "1G"]);
        assert_eq!(got.last("format"), Some("qcow2"));
        assert_eq!(got.last("options"), Some("size=1M"));
        assert!(got.has("quiet") && got.has("backing-unsafe") && !got.has("backing"));
    }

    #[test]
    fn the_last_of_repeated_options_wins_but_all_are_kept() {
        let got = parsed("-f raw --format=qcow2 -o a -o b").unwrap();
        assert_eq!(got.last("format"), Some("qcow2"));
        assert_eq!(got.all("options").collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn long_options_may_be_shortened_while_unambiguous() {
        assert!(parsed("--q --backing x").unwrap().has("backing"));
        assert_eq!(parsed("--outp json").unwrap().last("output"), Some("json"));
        assert_eq!(
            text("--b x"),
            "option '--b' is ambiguous; possibilities: '--backing' '--backing-unsafe'"
        );
    }

    #[test]
    fn two_dashes_end_the_options_and_one_is_an_operand() {
        let got = parsed("- -q -- -f --quiet").unwrap();
        assert_eq!(got.operands, ["-", "-f", "--quiet"]);
    }

    #[test]
    fn messages_are_those_of_getopt() {
        for (line, message) in [
            ("--bogus", "unrecognized option '--bogus'"),
            ("--bogus=5", "unrecognized option '--bogus'"),
            ("-Z", "invalid option -- 'Z'"),
            ("-q=4", "invalid option -- '='"),
            ("-f", "option requires an argument -- 'f'"),
            ("--quiet=4", "option '--quiet' doesn't allow an argument"),
            ("--opt", "option '--options' requires an argument"),
        ] {
            assert_eq!(text(line), message, "{line}");
        }
    }

    #[test]
    fn leading_options_stop_at_the_verb() {
        let words: Vec<String> = ["-q", "create", "-f"].map(str::to_owned).into();
        let got = parse_leading(&TABLE, &words).unwrap();
        assert_eq!(got.operands, ["create", "-f"]);
    }
}
