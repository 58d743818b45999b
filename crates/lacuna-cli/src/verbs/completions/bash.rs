//! bash: one function that looks at the words of the line.

use super::{Values, flags, values};
use crate::args::Flag;
use crate::verbs::Verb;

/// Bash splits `--name=value` into three words; an empty answer means its own file names.
const START: &str = "\
# bash completion for lacuna, made by `lacuna completions bash`
_lacuna() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb= at options words=
    if [[ $word == '=' ]]; then
        word=
    elif [[ $before == '=' ]]; then
        before=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${COMP_WORDS[at]} in
";

const MIDDLE: &str = "\
                [[ ${COMP_WORDS[at+1]} == '=' ]] && ((at++))
                ((at++))
                ;;
            -*) ;;
            *)
                verb=${COMP_WORDS[at]}
                break
                ;;
        esac
    done
    COMPREPLY=()
    case $verb:$before in
";

const END: &str = "\
    esac
    [[ $word == -* ]] && words=$options
    COMPREPLY=($(compgen -W \"$words\" -- \"$word\"))
}
complete -o default -F _lacuna lacuna
";

/// Makes the script.
pub(super) fn script(verbs: &[&Verb]) -> String {
    let leading = &super::super::LEADING;
    let mut text = START.to_owned();
    let valued = leading.iter().filter(|flag| flag.value.is_some());
    text += &format!("            {})\n", valued.flat_map(names).collect::<Vec<_>>().join(" | "));
    text += MIDDLE;
    text += &leading.iter().map(|flag| value("", flag)).collect::<String>();
    for verb in verbs {
        text += &flags(verb).map(|flag| value(verb.name, flag)).collect::<String>();
    }
    text += "    esac\n    case $verb in\n";
    let names_of_verbs: Vec<&str> = verbs.iter().map(|verb| verb.name).collect();
    text += &arm("''", leading.iter(), &names_of_verbs);
    for verb in verbs {
        let words = match values(verb.operands) {
            Values::Words(words) => words,
            Values::Files | Values::Unknown => Vec::new(),
        };
        text += &arm(verb.name, flags(verb), &words);
    }
    text + END
}

fn arm<'a>(verb: &str, flags: impl Iterator<Item = &'a Flag>, words: &[&str]) -> String {
    let options: Vec<String> = flags.flat_map(names).collect();
    format!(
        "        {verb})\n            options='{}' words='{}'\n            ;;\n",
        options.join(" "),
        words.join(" ")
    )
}

/// What comes after an option with a value.
fn value(verb: &str, flag: &Flag) -> String {
    let Some(word) = flag.value else { return String::new() };
    let after: Vec<String> = match flag.optional {
        // The letter takes no value.
        true => vec![format!("{verb}:--{}", flag.long)],
        false => names(flag).map(|name| format!("{verb}:{name}")).collect(),
    };
    let answer = match values(word) {
        Values::Words(words) => {
            format!("COMPREPLY=($(compgen -W '{}' -- \"$word\"))", words.join(" "))
        }
        Values::Files | Values::Unknown => ":".to_owned(),
    };
    let after = after.join(" | ");
    format!("        {after})\n            {answer}\n            return\n            ;;\n")
}

fn names(flag: &Flag) -> impl Iterator<Item = String> + use<> {
    let short = flag.short.map(|short| format!("-{short}"));
    short.into_iter().chain([format!("--{}", flag.long)])
}
