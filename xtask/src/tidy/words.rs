//! Names that the glossary rules out, where a program can tell (docs/glossary.md has the others).
//!
//! Only names that our code defines are judged: functions, types, variables, fields. Names of other
//! crates are what they are.

use super::Finding;
use super::source::{Source, Token};

/// Words that no name may have in it, and what to say instead.
const NOWHERE: [(&str, &str); 12] = [
    ("dst", "`target`"),
    ("freelist", "the quarantine, or the allocator"),
    ("helper", "what it does"),
    ("helpers", "what they do"),
    ("manager", "what it does"),
    ("parent", "`backing`"),
    ("src", "`source`"),
    ("subblock", "`subcluster`"),
    ("trim", "`discard`"),
    ("util", "what it does"),
    ("utils", "what they do"),
    ("validate", "`decode` or `TryFrom`: the checked thing is a type"),
];

/// Words that no function may begin with.
const NO_FUNCTION: [(&str, &str); 3] =
    [("get", "the noun alone"), ("handle", "what it does"), ("process", "`execute`")];

/// Where a protocol's own word is the right one.
const ON_THE_WIRE: [(&str, &str); 1] = [("crates/lacuna-nbd/", "trim")];

pub(super) fn check(source: &Source, findings: &mut Vec<Finding>) {
    let own = ON_THE_WIRE.iter().filter(|(folder, _)| source.path.starts_with(folder));
    let own: Vec<&str> = own.map(|(_, word)| *word).collect();
    for at in 0..source.tokens.len() {
        let token = &source.tokens[at];
        let Some(kind) = definition(&source.tokens, at) else { continue };
        if let Some(text) = judge(&token.text, kind, &own) {
            findings.push(Finding { path: source.path.clone(), line: token.line, text });
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Function,
    Other,
}

/// Says what the token defines, if it is the name in a definition.
fn definition(tokens: &[Token], at: usize) -> Option<Kind> {
    let text = |index: usize| tokens.get(index).map_or("", |token| token.text.as_str());
    let is_name = text(at).starts_with(|c: char| c.is_alphabetic() || c == '_');
    let before = if at == 0 { "" } else { text(at - 1) };
    match before {
        _ if !is_name => None,
        "fn" => Some(Kind::Function),
        "struct" | "enum" | "trait" | "type" | "mod" | "const" | "static" | "let" | "mut" => {
            Some(Kind::Other)
        }
        // A field, a parameter: `name: Type`; not a path, not a match on another crate's fields.
        "," | "(" | "{" | "pub" | "|" if text(at + 1) == ":" => Some(Kind::Other),
        _ => None,
    }
}

fn judge(name: &str, kind: Kind, own: &[&str]) -> Option<String> {
    let words = words(name);
    let first = words.first().map_or("", String::as_str);
    let in_function = NO_FUNCTION.iter().filter(|(word, _)| {
        // `get` alone is what collections call it.
        kind == Kind::Function && words.len() > 1 && first == *word
    });
    let foreign = NOWHERE.iter().filter(|(word, _)| !own.contains(word));
    let anywhere = foreign.filter(|(word, _)| words.iter().any(|part| part == word));
    let (word, instead) = in_function.chain(anywhere).next()?;
    Some(format!("`{name}`: not `{word}`, say {instead}"))
}

/// `ByteRange` and `byte_range` are both `byte`, `range`.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut was_lower = false;
    for character in name.chars() {
        if character == '_' || character.is_uppercase() && was_lower {
            words.push(String::new());
        }
        was_lower = character.is_lowercase() || character.is_numeric();
        if let Some(word) = words.last_mut().filter(|_| character != '_') {
            word.extend(character.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        super::super::found(check, "crates/lacuna/src/raw.rs", text)
    }

    #[test]
    fn banned_words_in_definitions_are_found() {
        for text in [
            "struct CacheManager;",
            "mod util;",
            "fn get_size(&self) {}",
            "fn process_request() {}",
            "fn f(parent: u32) {}",
            "struct S { pub src: u8 }",
            "let dst = 1;",
            "fn validate_header() {}",
        ] {
            assert_eq!(found(text).len(), 1, "{text}");
        }
    }

    #[test]
    fn a_protocol_has_words_of_its_own() {
        let text = "const SEND_TRIM: u16 = 1 << 5;";
        assert_eq!(found(text).len(), 1);
        let path = "crates/lacuna-nbd/src/wire/flags.rs";
        assert_eq!(super::super::found(check, path, text).len(), 0);
    }

    #[test]
    fn foreign_names_and_longer_words_are_not() {
        let text = "fn get(&self) { path.parent(); text.trim(); processed(); } fn gets() {} \
                    let transparent = \"the manager\"; // parent";
        assert_eq!(found(text), [""; 0]);
    }
}
