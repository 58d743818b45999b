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
    /// Whether it exists under our own name only. Options of ours must not make shortened names of
    /// QEMU's ambiguous.
    pub(crate) own: bool,
    /// One line of help.
    pub(crate) help: &'static str,
}

impl Flag {
    /// Makes an option without value.
    pub(crate) const fn switch(short: char, long: &'static str, help: &'static str) -> Self {
        Self { short: Some(short), long, value: None, optional: false, own: false, help }
    }

    /// Makes an option with a value.
    pub(crate) const fn valued(
        short: char,
        long: &'static str,
        value: &'static str,
        help: &'static str,
    ) -> Self {
        Self { short: Some(short), long, value: Some(value), optional: false, own: false, help }
    }

    /// Makes the value one that may be left out.
    pub(crate) const fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    /// Takes the letter away.
    pub(crate) const fn long_only(self) -> Self {
        Self { short: None, ..self }
    }

    /// Keeps it to our own name.
    pub(crate) const fn own(self) -> Self {
        Self { own: true, ..self }
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

    /// Returns names and values of all options in order.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.options.iter().map(|(name, value)| (*name, &**value))
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

/// Returns the value of the last `--NAME=VALUE` or `--NAME VALUE` before `--`, wherever it stands.
///
/// For what must be known before the options of a verb are: how to say that they are wrong.
pub(crate) fn peek<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let mut found = None;
    let mut rest = arguments.iter().take_while(|argument| *argument != "--").peekable();
    while let Some(argument) = rest.next() {
        match argument.strip_prefix("--").and_then(|text| text.strip_prefix(name)) {
            Some("") => found = rest.peek().map(|value| value.as_str()),
            Some(value) => found = value.strip_prefix('=').or(found),
            None => {}
        }
    }
    found
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
    let flag = find_long(table, name, text)?;
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

/// Finds the option whose name is `name` or, if only one is meant, begins with it; `text` is what
/// errors call it, its value included.
fn find_long<'t>(table: &'t [Flag], name: &str, text: &str) -> CliResult<&'t Flag> {
    if let Some(exact) = table.iter().find(|flag| flag.long == name) {
        return Ok(exact);
    }
    let meant: Vec<&Flag> = table.iter().filter(|flag| flag.long.starts_with(name)).collect();
    match meant[..] {
        [] => Err(unknown_long(table, name, text)),
        [flag] => Ok(flag),
        _ => {
            let names: String = meant.iter().map(|flag| format!(" '--{}'", flag.long)).collect();
            let text = format!("option '--{text}' is ambiguous; possibilities:{names}");
            Err(CliError::option(text))
        }
    }
}

fn unknown_long(table: &[Flag], name: &str, text: &str) -> CliError {
    let error = CliError::option(format!("unrecognized option '--{text}'"));
    match nearest(name, table.iter().map(|flag| flag.long)) {
        Some(near) => error.with_hint(format!("--{near} is the nearest")),
        None => error,
    }
}

/// Returns the name that `word` was most likely meant to be.
pub(crate) fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const LONGEST: usize = 40;
    const SHORTEST: usize = 4;
    let letters = word.chars().count();
    if !(SHORTEST..=LONGEST).contains(&letters) {
        return None;
    }
    // A third of the letters may be wrong: more is another word.
    let most = letters.div_ceil(3).min(3);
    let by_distance = names.map(|name| (distance(word, name), name));
    by_distance.filter(|(distance, _)| *distance <= most).min().map(|(_, name)| name)
}

/// Counts the letters to insert, drop, change or swap with the next.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=to.len()).collect()];
    for (i, letter) in from.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, other) in to.iter().enumerate() {
            let changed = rows[i][j] + usize::from(letter != other);
            let mut least = changed.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && from[i - 1] == *other && *letter == to[j - 1] {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
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
            ("--bogus=5", "unrecognized option '--bogus=5'"),
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
    fn the_nearest_name_is_found_unless_it_is_far() {
        let names = ["create", "convert", "compare", "check", "info", "map", "io"];
        for (word, near) in [
            ("creat", Some("create")),
            ("chekc", Some("check")),
            ("covnert", Some("convert")),
            ("inof", Some("info")),
            ("pam", None),
            ("rebase", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, names.into_iter()), near, "{word}");
        }
    }

    #[test]
    fn a_value_is_seen_before_the_rest_is_understood() {
        for (line, value) in [
            ("--bogus --form=json create", Some("json")),
            ("create a --form json", Some("json")),
            ("--form=human create --form=json", Some("json")),
            ("create -- --form=json", None),
            ("create --former=json", None),
            ("create --form", None),
        ] {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            assert_eq!(peek(&words, "form"), value, "{line}");
        }
    }

    #[test]
    fn leading_options_stop_at_the_verb() {
        let words: Vec<String> = ["-q", "create", "-f"].map(str::to_owned).into();
        let got = parse_leading(&TABLE, &words).unwrap();
        assert_eq!(got.operands, ["create", "-f"]);
    }
}
