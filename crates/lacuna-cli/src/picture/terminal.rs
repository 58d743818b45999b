//! What the output can show: how wide it is, which characters and colours there are.

use std::io::IsTerminal;

use super::look::Charset;

/// Columns where there is no terminal that says.
const COLUMNS: usize = 80;

/// What standard output can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terminal {
    pub(crate) columns: usize,
    pub(crate) charset: Charset,
    pub(crate) has_colours: bool,
}

impl Terminal {
    /// Looks at standard output and the environment.
    pub(crate) fn of_stdout() -> Self {
        let stdout = std::io::stdout();
        let size = rustix::termios::tcgetwinsize(&stdout).ok();
        let columns = size.map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0);
        Self {
            columns: columns.unwrap_or(COLUMNS),
            charset: Charset::of_locale(variable),
            has_colours: stdout.is_terminal() && wants_colours(variable),
        }
    }
}

/// Returns a variable of the environment; an empty one is none.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Colours are for terminals that have them, and nobody who said no.
fn wants_colours(variable: impl Fn(&str) -> Option<String>) -> bool {
    variable("NO_COLOR").is_none() && variable("TERM").is_some_and(|name| name != "dumb")
}

impl Charset {
    /// Chooses by the locale: the first of LC_ALL, LC_CTYPE and LANG that says anything.
    fn of_locale(variable: impl Fn(&str) -> Option<String>) -> Self {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(variable);
        let locale = locale.unwrap_or_default().to_ascii_lowercase();
        match locale.contains("utf-8") || locale.contains("utf8") {
            true => Self::Unicode,
            false => Self::Ascii,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Variables<'a> = &'a [(&'a str, &'a str)];

    fn environment(variables: Variables<'_>) -> impl Fn(&str) -> Option<String> {
        move |name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        }
    }

    #[test]
    fn the_first_variable_that_says_anything_decides_the_characters() {
        for (variables, charset) in [
            (&[("LANG", "de_DE.UTF-8")][..], Charset::Unicode),
            (&[("LC_ALL", "C"), ("LANG", "C.UTF-8")], Charset::Ascii),
            (&[("LC_CTYPE", "C.utf8"), ("LANG", "C")], Charset::Unicode),
            (&[], Charset::Ascii),
        ] {
            assert_eq!(Charset::of_locale(environment(variables)), charset, "{variables:?}");
        }
    }

    #[test]
    fn colours_need_a_terminal_that_has_them_and_nobody_against() {
        for (variables, wanted) in [
            (&[("TERM", "xterm")][..], true),
            (&[("TERM", "xterm"), ("NO_COLOR", "1")], false),
            (&[("TERM", "dumb")], false),
            (&[], false),
        ] {
            assert_eq!(wants_colours(environment(variables)), wanted, "{variables:?}");
        }
    }
}
