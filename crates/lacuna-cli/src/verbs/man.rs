//! `man`: manual pages, made from the tables of the verbs.

use super::{Example, Task, Verb, about, help};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "man",
    task: Task::About,
    summary: "Print a manual page",
    operands: "[VERB]",
    flags: &[about::ALL],
    examples: &[
        Example { shows: "the page of a verb, to be read by `man -l -`", line: "convert" },
        Example { shows: "all pages, as files in a folder", line: "--all pages" },
    ],
    codes: &[],
    run,
};

const DESCRIPTION: &str = "\
makes, describes, checks, repairs, copies and compares disk images, qcow2 and raw. It keeps them as \
small as the data in them, and says truthfully what is zero, what is allocated and where it lies. \
Verbs, options, output and exit codes are those of qemu-img and qemu-io; called by those names it \
keeps to their words as well.";

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    if parsed.has("all") {
        let verbs = super::VERBS.into_iter();
        let pages = verbs.map(|verb| (format!("lacuna-{}.1", verb.name), page(verb)));
        return about::write_all(parsed, pages.chain([("lacuna.1".to_owned(), overview())]));
    }
    let text = match &parsed.operands[..] {
        [] => overview(),
        [name] => page(super::find(tool, name)?),
        _ => return Err(CliError::usage("Expecting one verb")),
    };
    output::print(&text).map(|()| 0)
}

/// The page `lacuna(1)`.
fn overview() -> String {
    let mut text = head("lacuna", "disk images made, described, checked, repaired and copied");
    text += ".SH SYNOPSIS\n.B lacuna\n[\\fIOPTIONS\\fR]\n.I VERB\n[\\fIOPTIONS\\fR] ...\n";
    text += &format!(".SH DESCRIPTION\n.B lacuna\n{}\n", escaped(DESCRIPTION));
    text += ".SH VERBS\n";
    for verb in super::VERBS {
        let summary = escaped(verb.summary);
        text += &format!(".TP\n.BR lacuna\\-{} (1)\n{summary}\n", escaped(verb.name));
    }
    text += ".SH OPTIONS\n";
    text += &super::LEADING.iter().map(option).collect::<String>();
    text += ".SH EXIT STATUS\n0 is success, 1 failure; the pages of the verbs list others.\n";
    text
}

/// The page `lacuna-VERB(1)`.
fn page(verb: &Verb) -> String {
    let mut text = head(&format!("lacuna-{}", verb.name), verb.summary);
    let (name, operands) = (escaped(verb.name), escaped(verb.operands));
    text += &format!(".SH SYNOPSIS\n.B lacuna {name}\n[\\fIOPTIONS\\fR]");
    text += &if operands.is_empty() { "\n".to_owned() } else { format!("\n.I {operands}\n") };
    text += ".SH OPTIONS\n";
    text += &super::EVERYWHERE.iter().chain(verb.flags).map(option).collect::<String>();
    text += ".SH EXIT STATUS\n";
    for code in help::codes(verb) {
        text += &format!(".TP\n.B {}\n{}\n", code.code, escaped(code.means));
    }
    text += ".SH EXAMPLES\n";
    for example in verb.examples {
        let line = format!("lacuna {} {}", verb.name, example.line);
        let (shows, line) = (escaped(example.shows), escaped(line.trim_end()));
        text += &format!("{shows}:\n.PP\n.RS 4\n.nf\n{line}\n.fi\n.RE\n.PP\n");
    }
    text.truncate(text.trim_end_matches(".PP\n").len());
    text + ".SH SEE ALSO\n.BR lacuna (1)\n"
}

fn head(name: &str, summary: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let (title, name, summary) = (escaped(&name.to_uppercase()), escaped(name), escaped(summary));
    format!(
        ".TH {title} 1 \"\" \"lacuna {version}\" \"User Commands\"\n\
         .SH NAME\n{name} \\- {summary}\n"
    )
}

fn option(flag: &Flag) -> String {
    let short = flag.short.map_or_else(String::new, |short| format!("\\-{short}, "));
    let value = match (flag.value, flag.optional) {
        (Some(value), true) => format!("[=\\fI{}\\fR]", escaped(value)),
        (Some(value), false) => format!(" \\fI{}\\fR", escaped(value)),
        (None, _) => String::new(),
    };
    let (long, text) = (escaped(flag.long), escaped(flag.help));
    format!(".TP\n\\fB{short}\\-\\-{long}\\fR{value}\n{text}\n")
}

/// Takes from text what roff would take for its own.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    if text.starts_with(['.', '"']) { format!("\\&{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_list_verbs_options_codes_and_examples() {
        let overview = overview();
        for verb in super::super::VERBS {
            assert!(overview.contains(&format!("lacuna\\-{} (1)", verb.name)), "{}", verb.name);
            let page = page(verb);
            for flag in super::super::EVERYWHERE.iter().chain(verb.flags) {
                assert!(page.contains(&format!("\\-\\-{}", escaped(flag.long))), "{}", flag.long);
            }
            assert!(page.matches("\n.nf\n").count() == verb.examples.len(), "{}", verb.name);
        }
    }

    #[test]
    fn text_stays_text() {
        assert_eq!(escaped(".x"), "\\&.x");
        assert_eq!(escaped("a\\b -c 'd'"), "a\\eb \\-c \\(aqd\\(aq");
    }
}
