//! Rust text as tokens, without comments, strings and unit tests.
//!
//! This is no compiler: it knows just enough to tell code from what only looks like it.

/// A Rust file.
pub(super) struct Source {
    /// Path from the workspace, with `/`.
    pub(super) path: String,
    /// How many lines there are.
    pub(super) lines: usize,
    /// All tokens.
    pub(super) tokens: Vec<Token>,
}

/// A word, a `::` or another single character of code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) text: String,
    pub(super) line: usize,
}

impl Source {
    pub(super) fn new(path: &str, text: &str) -> Self {
        let code = masked(text);
        Self { path: path.to_owned(), lines: text.lines().count(), tokens: tokens(&code) }
    }

    /// Says whether the whole file is a test.
    pub(super) fn is_test(&self) -> bool {
        let in_folder = ["tests/", "benches/", "examples/"];
        in_folder
            .iter()
            .any(|part| self.path.starts_with(part) || self.path.contains(&format!("/{part}")))
            || self.path.ends_with("/tests.rs")
            || self.path.ends_with("_tests.rs")
    }

    /// Returns the tokens outside of items marked `#[cfg(test)]`; none where the file is a test.
    pub(super) fn product(&self) -> Vec<Token> {
        if self.is_test() {
            return Vec::new();
        }
        let mut kept = Vec::new();
        let mut at = 0;
        while at < self.tokens.len() {
            if starts_with(&self.tokens[at..], &["#", "[", "cfg", "(", "test", ")", "]"]) {
                at = end_of_item(&self.tokens, at + 7);
            } else {
                kept.push(self.tokens[at].clone());
                at += 1;
            }
        }
        kept
    }
}

/// Says whether the tokens begin with these words.
pub(super) fn starts_with(tokens: &[Token], words: &[&str]) -> bool {
    tokens.len() >= words.len() && tokens.iter().zip(words).all(|(token, word)| token.text == *word)
}

/// Returns the index behind the `;` or the closing brace of the item that begins at `at`.
fn end_of_item(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "{" => depth += 1,
            "}" if depth <= 1 => return at + 1,
            "}" => depth -= 1,
            ";" if depth == 0 => return at + 1,
            _ => {}
        }
        at += 1;
    }
    at
}

fn tokens(code: &str) -> Vec<Token> {
    let mut tokens: Vec<Token> = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let len = if is_word(first) {
                rest.find(|character| !is_word(character)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            tokens.push(Token { text: rest[..len].to_owned(), line: index + 1 });
            rest = rest[len..].trim_start();
        }
    }
    tokens
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Returns the text with comments and the insides of strings and characters blanked.
fn masked(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    let mut previous = ' ';
    while let Some(first) = rest.chars().next() {
        let len = if is_word(previous) && first != '"' && first != '/' && first != '\'' {
            0
        } else {
            opaque_len(rest)
        };
        if len == 0 {
            masked.push(first);
            rest = &rest[first.len_utf8()..];
            previous = first;
        } else {
            masked.extend(rest[..len].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[len..];
            previous = ' ';
        }
    }
    masked
}

/// Returns how many bytes of comment, string or character literal `rest` begins with.
fn opaque_len(rest: &str) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment_len(rest);
    }
    let prefix = rest.find(|c: char| !matches!(c, 'b' | 'c' | 'r')).unwrap_or(rest.len());
    let body = &rest[prefix.min(2)..];
    let is_raw = rest[..prefix.min(2)].contains('r');
    let hashes = body.len() - body.trim_start_matches('#').len();
    if is_raw && body[hashes..].starts_with('"') {
        let closing = format!("\"{}", "#".repeat(hashes));
        let inside = prefix.min(2) + hashes + 1;
        return rest[inside..].find(&closing).map_or(rest.len(), |at| inside + at + closing.len());
    }
    match body.chars().next() {
        Some('"') => prefix.min(2) + quoted_len(body, '"'),
        Some('\'') if is_character(body) => prefix.min(2) + quoted_len(body, '\''),
        _ => 0,
    }
}

/// Tells a character literal from a lifetime: the latter has no quote behind its first letter.
fn is_character(body: &str) -> bool {
    let mut characters = body.chars().skip(1);
    match characters.next() {
        Some('\\') => true,
        Some(_) => characters.next() == Some('\''),
        None => false,
    }
}

fn quoted_len(body: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, character) in body.char_indices().skip(1) {
        if is_escaped {
            is_escaped = false;
        } else if character == '\\' {
            is_escaped = true;
        } else if character == quote {
            return at + 1;
        }
    }
    body.len()
}

fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> String {
        let tokens = Source::new("src/x.rs", text).product();
        tokens.iter().map(|token| token.text.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_and_strings_are_not_code() {
        assert_eq!(words("a // unsafe\nb /* x /* y */ z */ c"), "a b c");
        assert_eq!(
            words(r##"f("unsafe \" {", r#"a " b"#, b"x", b'"', '"', '\'') + d"##),
            "f ( , , , , , ) + d"
        );
    }

    #[test]
    fn lifetimes_are_not_characters() {
        assert_eq!(words("fn f<'a>(x: &'a str) {}"), "fn f < ' a > ( x : & ' a str ) { }");
    }

    #[test]
    fn words_that_end_like_a_string_prefix_stay_words() {
        assert_eq!(words("bar(r, b) r#type"), "bar ( r , b ) r # type");
    }

    #[test]
    fn unit_tests_are_left_out() {
        assert_eq!(words("a; #[cfg(test)] mod tests { fn f() { b } } c"), "a ; c");
        assert_eq!(words("a; #[cfg(test)] mod tests; c"), "a ; c");
        assert!(Source::new("crates/lacuna/tests/x.rs", "a").product().is_empty());
    }

    #[test]
    fn tokens_know_their_line() {
        let source = Source::new("x.rs", "a\n/* \n */ b::c");
        let lines: Vec<_> = source.tokens.iter().map(|t| (t.text.as_str(), t.line)).collect();
        assert_eq!(lines, [("a", 1), ("b", 3), ("::", 3), ("c", 3)]);
    }
}
