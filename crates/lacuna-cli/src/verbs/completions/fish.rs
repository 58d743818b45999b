//! fish: a line for each verb and for each option.

use super::{Values, flags, quoted, values};
use crate::args::Flag;
use crate::verbs::Verb;

/// Makes the script.
pub(super) fn script(verbs: &[&Verb]) -> String {
    let mut text = "# fish completion for lacuna, made by `lacuna completions fish`\n".to_owned();
    let names: Vec<&str> = verbs.iter().map(|verb| verb.name).collect();
    let none_yet = format!("not __fish_seen_subcommand_from {}", names.join(" "));
    text += &format!("complete -c lacuna -n {} -f\n", single(&none_yet));
    for flag in &super::super::LEADING {
        text += &option(&none_yet, flag);
    }
    for verb in verbs {
        let summary = single(verb.summary);
        let when = single(&none_yet);
        text += &format!("complete -c lacuna -n {when} -a {} -d {summary}\n", verb.name);
        let after = format!("__fish_seen_subcommand_from {}", verb.name);
        for flag in flags(verb) {
            text += &option(&after, flag);
        }
        text += &operands(&after, verb);
    }
    text
}

fn option(when: &str, flag: &Flag) -> String {
    let short = flag.short.map_or_else(String::new, |short| format!(" -s {short}"));
    let value = match flag.value.map(values) {
        None => String::new(),
        // A value that may be left out must not be asked for.
        Some(Values::Words(words)) if flag.optional => format!(" -a '{}'", words.join(" ")),
        Some(Values::Words(words)) => format!(" -x -a '{}'", words.join(" ")),
        Some(Values::Files) => " -r -F".to_owned(),
        Some(Values::Unknown) => " -x".to_owned(),
    };
    let (when, help) = (single(when), single(flag.help));
    format!("complete -c lacuna -n {when}{short} -l {}{value} -d {help}\n", flag.long)
}

fn operands(when: &str, verb: &Verb) -> String {
    match values(verb.operands) {
        Values::Words(words) => {
            format!("complete -c lacuna -n {} -f -a '{}'\n", single(when), words.join(" "))
        }
        Values::Unknown => format!("complete -c lacuna -n {} -f\n", single(when)),
        Values::Files => String::new(),
    }
}

fn single(text: &str) -> String {
    quoted(text, "\\'")
}
