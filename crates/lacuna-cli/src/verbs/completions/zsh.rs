//! zsh: specifications for `_arguments`.

use super::{Values, flags, quoted, values};
use crate::args::Flag;
use crate::verbs::Verb;

const START: &str = "\
#compdef lacuna
# zsh completion for lacuna, made by `lacuna completions zsh`
_lacuna() {
    local curcontext=$curcontext state line
    typeset -A opt_args
";

const END: &str = "            esac
            ;;
    esac
}
if [[ $funcstack[1] == _lacuna ]]; then
    _lacuna \"$@\"
else
    compdef _lacuna lacuna
fi
";

/// Makes the script.
pub(super) fn script(verbs: &[&Verb]) -> String {
    let mut text = START.to_owned();
    text += "    _arguments -C \\\n";
    for flag in &super::super::LEADING {
        text += &spec(flag, "        ");
    }
    text += "        '1:verb:->verb' '*::argument:->rest'\n    case $state in\n        verb)\n";
    text += "            local -a verbs=(\n";
    for verb in verbs {
        let line = format!("{}:{}", verb.name, verb.summary.replace(':', "\\:"));
        text += &format!("                {}\n", single(&line));
    }
    text += "            )\n            _describe verb verbs\n            ;;\n        rest)\n";
    text += "            case $line[1] in\n";
    for verb in verbs {
        text += &format!("                {})\n                    _arguments -s \\\n", verb.name);
        for flag in flags(verb) {
            text += &spec(flag, "                        ");
        }
        text += &format!("                        {}\n", operands(verb));
        text += "                    ;;\n";
    }
    text + END
}

/// `*{-f+,--format=}'[help]:FMT:(qcow2 raw)' \`; the star lets an option come again.
fn spec(flag: &Flag, indent: &str) -> String {
    let help = flag.help.replace('[', "\\[").replace(']', "\\]");
    let long = flag.long;
    let with = |value: &str| single(&format!("[{help}]{value}"));
    let lines = match (flag.value, flag.short) {
        (None, None) => vec![format!("'*--{long}'{}", with(""))],
        (None, Some(short)) => vec![format!("'*'{{-{short},--{long}}}{}", with(""))],
        (Some(word), short) if flag.optional => {
            let value = format!("::{word}:{}", action(values(word)));
            let letter = short.map(|short| format!("'*-{short}'{}", with("")));
            letter.into_iter().chain([format!("'*--{long}=-'{}", with(&value))]).collect()
        }
        (Some(word), short) => {
            let value = format!(":{}:{}", word.replace('|', " or "), action(values(word)));
            let names = match short {
                Some(short) => format!("'*'{{-{short}+,--{long}=}}"),
                None => format!("'*--{long}='"),
            };
            vec![format!("{names}{}", with(&value))]
        }
    };
    lines.iter().map(|line| format!("{indent}{line} \\\n")).collect()
}

fn operands(verb: &Verb) -> String {
    match verb.operands {
        "" => "'*: :'".to_owned(),
        word => single(&format!("*:operand:{}", action(values(word)))),
    }
}

fn action(values: Values) -> String {
    match values {
        Values::Words(words) => format!("({})", words.join(" ")),
        Values::Files => "_files".to_owned(),
        Values::Unknown => " ".to_owned(),
    }
}

fn single(text: &str) -> String {
    quoted(text, "'\\''")
}
