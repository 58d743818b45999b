//! The line protocol between the kit and a driver: one line asks, one line answers.
//!
//! * Always: numbers are decimal, offsets and lengths in bytes, bytes in hexadecimal.
//! * Never: an answer without a question, or two; a line longer than [`MAX_LINE_BYTES`].
//!
//! `docs/conformance.md` describes it for authors of drivers.

use std::fmt;
use std::path::PathBuf;

/// The version of the protocol.
pub const VERSION: u32 = 1;

/// The most bytes that one request reads or writes.
pub const MAX_BYTES: u64 = 4 << 20;

/// The longest line: the bytes of a request in hexadecimal, and a few words.
pub const MAX_LINE_BYTES: u64 = 2 * MAX_BYTES + 8192;

/// Something that not every engine can do.
///
/// ```
/// use lacuna_conform::protocol::Need;
/// assert_eq!("extended-l2".parse(), Ok(Need::ExtendedL2));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Need {
    /// Images with a backing file.
    Backing,
    /// Images with an external data file.
    DataFile,
    /// Compressed clusters of deflate.
    Deflate,
    /// Images that were left dirty.
    Dirty,
    /// The request `discard`.
    Discard,
    /// Extended L2 entries.
    ExtendedL2,
    /// The request `extents`.
    Extents,
    /// Images of version 2.
    Version2,
    /// The request `write`, and opening for it.
    Write,
    /// The request `zero`.
    Zero,
    /// Compressed clusters of zstd.
    Zstd,
}

impl Need {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Backing,
        Self::DataFile,
        Self::Deflate,
        Self::Dirty,
        Self::Discard,
        Self::ExtendedL2,
        Self::Extents,
        Self::Version2,
        Self::Write,
        Self::Zero,
        Self::Zstd,
    ];

    /// Returns its word in the protocol.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Backing => "backing",
            Self::DataFile => "data-file",
            Self::Deflate => "deflate",
            Self::Dirty => "dirty",
            Self::Discard => "discard",
            Self::ExtendedL2 => "extended-l2",
            Self::Extents => "extents",
            Self::Version2 => "version-2",
            Self::Write => "write",
            Self::Zero => "zero",
            Self::Zstd => "zstd",
        }
    }
}

impl std::str::FromStr for Need {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|need| need.word() == word);
        found.ok_or_else(|| format!("there is no capability {}", quoted(word)))
    }
}

/// What an image is opened for.
///
/// ```
/// assert_ne!(lacuna_conform::protocol::Mode::Read, lacuna_conform::protocol::Mode::Write);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Nothing may be changed.
    Read,
    /// Everything.
    Write,
}

/// What is known of a range without reading it.
///
/// ```
/// assert_ne!(lacuna_conform::protocol::Status::Data, lacuna_conform::protocol::Status::Zero);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// It may hold anything.
    Data,
    /// It reads as zeros.
    Zero,
}

/// A line to the driver.
///
/// ```
/// use lacuna_conform::protocol::Request;
/// let line = "write 65536 0a0b";
/// let request = Request::parse(line)?;
/// assert_eq!(request, Request::Write { at: 65536, bytes: vec![10, 11] });
/// assert_eq!(request.to_string(), line);
/// # Ok::<_, String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The first line.
    Hello(u32),
    /// Opens an image, and what it names.
    Open(Mode, PathBuf),
    /// Asks for bytes.
    Read {
        /// Offset on the disk.
        at: u64,
        /// How many.
        len: u64,
    },
    /// Writes bytes.
    Write {
        /// Offset on the disk.
        at: u64,
        /// Which.
        bytes: Vec<u8>,
    },
    /// Makes a range read as zeros.
    Zero {
        /// Offset on the disk.
        at: u64,
        /// Length of the range.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
    },
    /// Says that a range is no longer needed.
    Discard {
        /// Offset on the disk.
        at: u64,
        /// Length of the range.
        len: u64,
    },
    /// Makes all durable that was written.
    Flush,
    /// Asks what is known of a range.
    Extents {
        /// Offset on the disk.
        at: u64,
        /// Length of the range.
        len: u64,
    },
    /// Closes the image.
    Close,
    /// The last line.
    Quit,
}

impl Request {
    /// Reads a line, without its end.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(line: &str) -> Result<Self, String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "hello" => Ok(Self::Hello(number(rest)?)),
            "open" => opening(rest),
            "read" => pair(rest).map(|(at, len)| Self::Read { at, len }),
            "write" => written(rest),
            "zero" => match rest.strip_suffix(" unmap") {
                Some(rest) => pair(rest).map(|(at, len)| Self::Zero { at, len, unmap: true }),
                None => pair(rest).map(|(at, len)| Self::Zero { at, len, unmap: false }),
            },
            "discard" => pair(rest).map(|(at, len)| Self::Discard { at, len }),
            "extents" => pair(rest).map(|(at, len)| Self::Extents { at, len }),
            "flush" | "close" | "quit" if !rest.is_empty() => Err(format!("{word} takes nothing")),
            "flush" => Ok(Self::Flush),
            "close" => Ok(Self::Close),
            "quit" => Ok(Self::Quit),
            _ => Err(format!("there is no request {}", quoted(word))),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello(version) => write!(f, "hello {version}"),
            Self::Open(Mode::Read, path) => write!(f, "open ro {}", path.display()),
            Self::Open(Mode::Write, path) => write!(f, "open rw {}", path.display()),
            Self::Read { at, len } => write!(f, "read {at} {len}"),
            Self::Write { at, bytes } => write!(f, "write {at} {}", hex(bytes)),
            Self::Zero { at, len, unmap: false } => write!(f, "zero {at} {len}"),
            Self::Zero { at, len, unmap: true } => write!(f, "zero {at} {len} unmap"),
            Self::Discard { at, len } => write!(f, "discard {at} {len}"),
            Self::Flush => f.write_str("flush"),
            Self::Extents { at, len } => write!(f, "extents {at} {len}"),
            Self::Close => f.write_str("close"),
            Self::Quit => f.write_str("quit"),
        }
    }
}

fn opening(rest: &str) -> Result<Request, String> {
    match rest.split_once(' ') {
        Some(("ro", path)) if !path.is_empty() => Ok(Request::Open(Mode::Read, path.into())),
        Some(("rw", path)) if !path.is_empty() => Ok(Request::Open(Mode::Write, path.into())),
        _ => Err("open takes ro or rw, and a path".to_owned()),
    }
}

fn written(rest: &str) -> Result<Request, String> {
    let (at, text) = rest.split_once(' ').ok_or("write takes an offset and bytes")?;
    Ok(Request::Write { at: number(at)?, bytes: unhex(text)? })
}

fn pair(text: &str) -> Result<(u64, u64), String> {
    let (at, len) = text.split_once(' ').ok_or("an offset and a length are missing")?;
    Ok((number(at)?, number(len)?))
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{} is no number", quoted(text)))
}

/// A line from the driver.
///
/// ```
/// use lacuna_conform::protocol::Answer;
/// assert_eq!(Answer::parse("error no room")?, Answer::Error("no room".into()));
/// # Ok::<_, String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done; what was asked for follows.
    Ok(String),
    /// The engine does not offer this; nothing was changed.
    Unsupported(String),
    /// It was not done.
    Error(String),
}

impl Answer {
    /// Reads a line, without its end.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(line: &str) -> Result<Self, String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "ok" => Ok(Self::Ok(rest.to_owned())),
            "unsupported" => Ok(Self::Unsupported(rest.to_owned())),
            "error" => Ok(Self::Error(rest.to_owned())),
            _ => Err(format!("{} is no answer", quoted(line))),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, rest) = match self {
            Self::Ok(rest) => ("ok", rest),
            Self::Unsupported(rest) => ("unsupported", rest),
            Self::Error(rest) => ("error", rest),
        };
        match rest.is_empty() {
            true => f.write_str(word),
            // An answer is one line, whatever the engine said.
            false => write!(f, "{word} {}", rest.replace(['\n', '\r'], " ")),
        }
    }
}

/// Reads what follows `ok` after `hello`: the name of the engine, and what it lacks.
///
/// ```
/// use lacuna_conform::protocol::{Need, parse_hello};
/// let (name, lacks) = parse_hello("1 engine-0.3 without zstd discard")?;
/// assert_eq!((name.as_str(), lacks), ("engine-0.3", vec![Need::Zstd, Need::Discard]));
/// # Ok::<_, String>(())
/// ```
///
/// # Errors
/// What is wrong with it.
pub fn parse_hello(text: &str) -> Result<(String, Vec<Need>), String> {
    let mut words = text.split(' ');
    let version: u32 = number(words.next().unwrap_or_default())?;
    if version != VERSION {
        return Err(format!("protocol {version} instead of {VERSION}"));
    }
    let name =
        words.next().filter(|name| !name.is_empty()).ok_or("the engine's name is missing")?;
    match words.next() {
        None => Ok((name.to_owned(), Vec::new())),
        Some("without") => {
            Ok((name.to_owned(), words.map(str::parse).collect::<Result<_, String>>()?))
        }
        Some(other) => Err(format!("{} instead of 'without'", quoted(other))),
    }
}

/// Says what [`parse_hello`] reads.
#[must_use]
pub fn hello(name: &str, lacks: &[Need]) -> String {
    let mut text = format!("{VERSION} {}", name.replace(' ', "-"));
    for (index, need) in lacks.iter().enumerate() {
        text += if index == 0 { " without " } else { " " };
        text += need.word();
    }
    text
}

/// Reads what follows `ok` after `extents`: lengths and what is known of them, by turns.
///
/// ```
/// use lacuna_conform::protocol::{Status, parse_extents};
/// assert_eq!(parse_extents("512 zero 1024 data")?, [(512, Status::Zero), (1024, Status::Data)]);
/// # Ok::<_, String>(())
/// ```
///
/// # Errors
/// What is wrong with it.
pub fn parse_extents(text: &str) -> Result<Vec<(u64, Status)>, String> {
    let words: Vec<&str> = text.split(' ').collect();
    let extent = |pair: &[&str]| match pair {
        [len, "data"] => Ok((number(len)?, Status::Data)),
        [len, "zero"] => Ok((number(len)?, Status::Zero)),
        _ => Err(format!("{} is no extent", quoted(&pair.join(" ")))),
    };
    words.chunks(2).map(extent).collect()
}

/// Says what [`parse_extents`] reads.
#[must_use]
pub fn extents(extents: &[(u64, Status)]) -> String {
    let word = |(len, status): &(u64, Status)| match status {
        Status::Data => format!("{len} data"),
        Status::Zero => format!("{len} zero"),
    };
    extents.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// Says bytes in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)].into());
        text.push(DIGITS[usize::from(byte & 15)].into());
    }
    text
}

/// Reads bytes in hexadecimal.
///
/// # Errors
/// What is wrong with them.
pub fn unhex(text: &str) -> Result<Vec<u8>, String> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = pairs.map(byte).collect();
    bytes.ok_or_else(|| format!("{} is not in hexadecimal", quoted(text)))
}

/// Shows a short piece of what somebody else wrote.
pub(crate) fn quoted(text: &str) -> String {
    const MOST: usize = 60;
    let shown: String = text.chars().take(MOST).flat_map(char::escape_default).collect();
    let more = if text.chars().nth(MOST).is_some() { "..." } else { "" };
    format!("'{shown}{more}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_read_as_it_was_written() {
        let requests = [
            Request::Hello(1),
            Request::Open(Mode::Read, "/a folder/disk.qcow2".into()),
            Request::Open(Mode::Write, "disk".into()),
            Request::Read { at: 512, len: 0 },
            Request::Write { at: 0, bytes: vec![0, 255, 16] },
            Request::Zero { at: 1, len: 2, unmap: false },
            Request::Zero { at: 1, len: 2, unmap: true },
            Request::Discard { at: 1, len: u64::MAX },
            Request::Flush,
            Request::Extents { at: 3, len: 4 },
            Request::Close,
            Request::Quit,
        ];
        for request in requests {
            assert_eq!(Request::parse(&request.to_string()), Ok(request));
        }
    }

    #[test]
    fn lines_that_make_no_sense_are_refused() {
        for line in [
            "",
            " ",
            "hello",
            "hello x",
            "open",
            "open ro",
            "open ro ",
            "open wo x",
            "read 1",
            "read 1 2 3",
            "read -1 2",
            "write 0",
            "write 0 abc",
            "write 0 0g",
            "write 0 äö",
            "zero 1",
            "zero 1 2 map",
            "discard",
            "flush now",
            "Read 1 2",
            "read 18446744073709551616 1",
        ] {
            assert!(Request::parse(line).is_err(), "{line:?}");
        }
        for line in ["", "okay", "fine", "OK", "warning x"] {
            assert!(Answer::parse(line).is_err(), "{line:?}");
        }
        for text in ["", "1", "2 engine", "1 engine with zstd", "1 engine without speed"] {
            assert!(parse_hello(text).is_err(), "{text:?}");
        }
        for text in ["", "512", "512 hole", "x data", "512 zero 3"] {
            assert!(parse_extents(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_answer_is_one_line() {
        let answer = Answer::Error("it\nbroke\r\n".into());
        assert_eq!(answer.to_string().lines().count(), 1);
        assert_eq!(
            Answer::parse(&Answer::Ok(String::new()).to_string()),
            Ok(Answer::Ok("".into()))
        );
    }

    #[test]
    fn what_an_engine_lacks_is_said_and_read() {
        for count in 0..=Need::ALL.len() {
            let lacks = Need::ALL[..count].to_vec();
            assert_eq!(parse_hello(&hello("an engine", &lacks)), Ok(("an-engine".into(), lacks)));
        }
    }
}
