//! What a verb ends with when it does not succeed, and how that is said.

use std::fmt;

use lacuna::ErrorKind;
use serde_json::{Value, json};

use crate::output;
use crate::persona::{Fault, Tool};

/// The host's number for a file that would be too large.
pub(crate) const EFBIG: i32 = 27;

/// What helps where the host is full.
pub(crate) const MAKE_ROOM: &str = "make room on the host, then run the command again";
/// What helps where a file may not be as long as it would have to be.
pub(crate) const FILE_LIMITS: &str =
    "`ulimit -f` and the file system say how long a file may be; a copy elsewhere may fit";

/// Shorthand for a result with a [`CliError`].
pub(crate) type CliResult<T> = Result<T, CliError>;

/// A failure: what to say on stderr and the exit code.
#[derive(Clone, Debug)]
pub(crate) struct CliError {
    /// In QEMU's words where it has any.
    text: String,
    /// In ours, where they say more.
    own: Option<Box<str>>,
    code: u8,
    kind: Kind,
    /// The class that the engine or the host gave it.
    class: Option<ErrorKind>,
    /// Said under the program's own name only: the command or option that helps.
    hint: Option<Box<str>>,
    /// What programs may want to know of it besides, for `--error-format=json`.
    facts: Vec<(&'static str, Value)>,
    /// Ordinary output that was made before, printed after the error: programs in C that write to
    /// a pipe have it so, and scripts compare the two in one stream.
    output: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Something did not work.
    Failure,
    /// An option that does not exist or lacks its value.
    Option,
    /// The verb was called in a way that makes no sense.
    Usage,
}

impl CliError {
    /// Makes a failure with exit code 1.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            own: None,
            code: 1,
            kind: Kind::Failure,
            class: None,
            hint: None,
            facts: Vec::new(),
            output: String::new(),
        }
    }

    /// Makes a failure that is followed by the way to the help.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, ..Self::new(text) }
    }

    /// Makes a failure of the option parser.
    pub(crate) fn option(text: impl Into<String>) -> Self {
        Self { kind: Kind::Option, ..Self::new(text) }
    }

    /// Changes the exit code.
    pub(crate) fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// Says which class of failure it is, where no error of the engine says so.
    pub(crate) fn with_class(self, class: ErrorKind) -> Self {
        Self { class: Some(class), ..self }
    }

    /// Adds what would help, unless somebody nearer to the failure said so already.
    pub(crate) fn with_hint(self, hint: impl Into<String>) -> Self {
        let hint = self.hint.or_else(|| Some(hint.into().into()));
        Self { hint, ..self }
    }

    /// Replaces what would help by what helps better.
    pub(crate) fn with_better_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into().into()), ..self }
    }

    /// Adds a fact for programs: `file`, `offset`, `holder_pid`. What is known already stays, since
    /// whoever is nearer to the failure knows better.
    pub(crate) fn with_fact(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        if self.facts.iter().all(|(known, _)| *known != name) {
            self.facts.push((name, value.into()));
        }
        self
    }

    /// Adds where in the file it went wrong, if the engine says so.
    pub(crate) fn located(self, error: &lacuna::Error) -> Self {
        match error.host_offset() {
            Some(offset) => self.with_fact("offset", offset.0),
            None => self,
        }
    }

    /// Adds ordinary output that is to follow the error.
    pub(crate) fn with_output(self, output: String) -> Self {
        Self { output, ..self }
    }

    /// Returns ordinary output that is to follow the error.
    pub(crate) fn output(&self) -> &str {
        &self.output
    }

    /// Adds other words for the same, to be said under our own name.
    pub(crate) fn in_our_words(self, text: impl Into<String>) -> Self {
        Self { own: Some(text.into().into()), ..self }
    }

    /// Puts `text` and a colon in front.
    pub(crate) fn under(self, text: impl fmt::Display) -> Self {
        let own = self.own.map(|own| format!("{text}: {own}").into());
        Self { text: format!("{text}: {}", self.text), own, ..self }
    }

    /// Adds a line to the text.
    pub(crate) fn followed_by(self, line: impl fmt::Display) -> Self {
        let own = self.own.map(|own| format!("{own}\n{line}").into());
        Self { text: format!("{}\n{line}", self.text), own, ..self }
    }

    /// Returns the class of the failure, where there is one.
    pub(crate) const fn class(&self) -> Option<ErrorKind> {
        self.class
    }

    /// Returns the exit code.
    pub(crate) const fn code(&self) -> u8 {
        self.code
    }

    /// Returns what went wrong, without program name and hint.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Returns the lines for stderr, for people.
    pub(crate) fn render(&self, tool: &Tool, verb: &str) -> String {
        let name = match self.kind {
            Kind::Option => tool.invocation(verb),
            _ => tool.name.clone(),
        };
        let mut lines = match tool.is_own() {
            true => output::tame_lines(&format!("{name}: {}\n", self.own_text())),
            false => format!("{name}: {}\n", self.text),
        };
        match self.kind {
            Kind::Failure => {}
            Kind::Option => lines += &tool.way_to_help(verb, Fault::Option),
            Kind::Usage => lines += &tool.way_to_help(verb, Fault::Usage),
        }
        match &self.hint {
            Some(hint) if tool.is_own() => lines += &format!("hint: {hint}\n"),
            _ => {}
        }
        lines
    }

    /// Returns the line for stderr, for programs. README and man pages describe its members.
    pub(crate) fn json(&self, tool: &Tool, verb: &str) -> String {
        let help = || format!("`{} --help` shows what there is", tool.invocation(verb));
        let hint = self.hint.as_deref().map(str::to_owned);
        let hint = hint.or_else(|| (self.kind != Kind::Failure).then(help));
        let mut line = json!({
            "error": self.class_word(),
            "message": self.own_text(),
            "hint": hint,
            "verb": if verb.is_empty() { Value::Null } else { verb.into() },
            "exit_code": self.code,
        });
        self.add_facts(&mut line);
        format!("{line}\n")
    }

    /// Returns it as a member of an answer, where no verb failed and nothing exits.
    pub(crate) fn value(&self) -> Value {
        let mut value = json!({
            "error": self.class_word(),
            "message": self.own_text(),
            "hint": self.hint.as_deref(),
        });
        self.add_facts(&mut value);
        value
    }

    /// Takes what [`value`](Self::value) made.
    pub(crate) fn from_value(value: &Value) -> Self {
        let text = |name: &str| value.get(name).and_then(Value::as_str);
        let error = Self::new(text("message").unwrap_or("It failed without a word"));
        let class = CLASSES.into_iter().find(|class| text("error") == Some(word(*class)));
        let error = Self { class, ..error };
        match text("hint") {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }

    fn add_facts(&self, value: &mut Value) {
        for (name, fact) in &self.facts {
            value[*name] = fact.clone();
        }
    }

    fn own_text(&self) -> String {
        without_echo(self.own.as_deref().unwrap_or(&self.text))
    }

    fn class_word(&self) -> &'static str {
        match (self.kind, self.class) {
            (Kind::Option | Kind::Usage, _) => "usage",
            (Kind::Failure, None) => "failed",
            (Kind::Failure, Some(class)) => word(class),
        }
    }
}

/// QEMU names a file once for each layer that could not open it; once will do.
fn without_echo(text: &str) -> String {
    let end = text.find("': ").map_or(0, |at| at + 3);
    let (head, mut rest) = text.split_at(end);
    let Some(file) =
        head.strip_prefix("Could not open '").and_then(|rest| rest.strip_suffix("': "))
    else {
        return text.to_owned();
    };
    for echo in [head, &format!("Image {file}: ")] {
        rest = rest.strip_prefix(echo).unwrap_or(rest);
    }
    format!("{head}{rest}")
}

/// All classes that have a name.
const CLASSES: [ErrorKind; 9] = [
    ErrorKind::Io,
    ErrorKind::Corrupt,
    ErrorKind::Unsupported,
    ErrorKind::OutOfBounds,
    ErrorKind::NotFound,
    ErrorKind::Busy,
    ErrorKind::ReadOnly,
    ErrorKind::NoSpace,
    ErrorKind::InvalidRequest,
];

/// The name of a class in JSON.
const fn word(class: ErrorKind) -> &'static str {
    match class {
        ErrorKind::Io => "io",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::OutOfBounds => "out_of_bounds",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Busy => "busy",
        ErrorKind::ReadOnly => "read_only",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::InvalidRequest => "invalid_request",
        _ => "failed",
    }
}

impl From<lacuna::Error> for CliError {
    fn from(error: lacuna::Error) -> Self {
        let hint = match error.kind() {
            ErrorKind::Busy => Some("-U opens an image that somebody else has open for reading"),
            ErrorKind::Corrupt => Some("`lacuna check IMAGE` lists what is wrong"),
            ErrorKind::NoSpace => Some(MAKE_ROOM),
            ErrorKind::Io if error.raw_os_error() == Some(EFBIG) => Some(FILE_LIMITS),
            _ => None,
        };
        let failure = Self::new(sentence(&error)).with_class(error.kind()).located(&error);
        hint.map_or_else(|| failure.clone(), |hint| failure.clone().with_hint(hint))
    }
}

/// Says the error without the number that the standard library adds to the host's words.
pub(crate) fn sentence(error: &lacuna::Error) -> String {
    let text = match error.raw_os_error() {
        Some(code) => format!("{}: {}", error.message(), host_words(code)),
        None => error.to_string(),
    };
    // It is one line; more can only come from a name in an image.
    text.replace('\n', "\\n")
}

/// Returns the host's words for its error number.
pub(crate) fn host_words(code: i32) -> String {
    let words = std::io::Error::from_raw_os_error(code).to_string();
    let end = words.rfind(" (os error").unwrap_or(words.len());
    words[..end].to_owned()
}

/// Returns the host's words for the class of an error: what QEMU's tools, which know error numbers
/// only, say of it.
pub(crate) fn errno_words(error: &lacuna::Error) -> String {
    const EIO: i32 = 5;
    const EPERM: i32 = 1;
    let code = error.raw_os_error().unwrap_or_else(|| match error.kind() {
        ErrorKind::NotFound => 2,
        ErrorKind::Busy => 16,
        ErrorKind::InvalidRequest => 22,
        ErrorKind::NoSpace => 28,
        ErrorKind::ReadOnly => EPERM,
        ErrorKind::Unsupported => 95,
        _ => EIO,
    });
    host_words(code)
}
