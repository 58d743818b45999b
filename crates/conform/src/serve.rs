//! The driver's side of the protocol: a loop that puts an engine behind it.
//!
//! For engines in Rust: implement [`Engine`] and [`OpenDisk`], and call [`serve`] with standard input
//! and output. Any other program can speak the [`protocol`](crate::protocol) itself.

use std::io::{self, BufRead, Read, Write};
use std::path::Path;

use crate::protocol::{
    Answer, MAX_BYTES, MAX_LINE_BYTES, Mode, Need, Request, Status, VERSION, extents, hello, hex,
};

/// Why something was not done.
///
/// ```
/// use lacuna_conform::serve::Failure;
/// assert_ne!(Failure::from("no room".to_owned()), Failure::Unsupported("no room".into()));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The engine does not offer it, and changed nothing.
    Unsupported(String),
    /// It went wrong.
    Failed(String),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What a driver's request gives.
pub type Outcome<T> = Result<T, Failure>;

/// An engine that opens images.
///
/// ```
/// use std::path::Path;
/// use lacuna_conform::protocol::{Mode, Need};
/// use lacuna_conform::serve::{Engine, Failure, OpenDisk, Outcome, serve};
///
/// struct Nothing;
/// impl Engine for Nothing {
///     fn name(&self) -> String { "nothing-1".into() }
///     fn lacks(&self) -> Vec<Need> { vec![Need::Write] }
///     fn open(&mut self, _: &Path, _: Mode) -> Outcome<Box<dyn OpenDisk>> {
///         Err(Failure::Unsupported("there is no engine here".into()))
///     }
/// }
///
/// let mut answers = Vec::new();
/// serve(&mut Nothing, &b"hello 1\nopen ro disk.qcow2\nquit\n"[..], &mut answers)?;
/// let expected = "ok 1 nothing-1 without write\nunsupported there is no engine here\nok\n";
/// assert_eq!(String::from_utf8_lossy(&answers), expected);
/// # Ok::<_, std::io::Error>(())
/// ```
pub trait Engine {
    /// Returns name and version in one word.
    fn name(&self) -> String;

    /// Returns what the engine cannot do at all.
    fn lacks(&self) -> Vec<Need>;

    /// Opens the image at `path` with all that it names.
    ///
    /// # Errors
    /// Why not.
    fn open(&mut self, path: &Path, mode: Mode) -> Outcome<Box<dyn OpenDisk>>;
}

/// An image that is open. [`Engine`] has an example.
pub trait OpenDisk {
    /// Returns the size of the disk in bytes.
    fn size(&self) -> u64;

    /// Fills `bytes` from offset `at` on.
    ///
    /// # Errors
    /// Why not.
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Outcome<()>;

    /// Writes bytes.
    ///
    /// # Errors
    /// Why not.
    fn write(&mut self, at: u64, bytes: &[u8]) -> Outcome<()>;

    /// Makes a range read as zeros; `unmap` says that its space may be given back.
    ///
    /// # Errors
    /// Why not.
    fn zero(&mut self, at: u64, len: u64, unmap: bool) -> Outcome<()>;

    /// Takes note that a range is no longer needed: it reads as before or as zeros afterwards.
    ///
    /// # Errors
    /// Why not.
    fn discard(&mut self, at: u64, len: u64) -> Outcome<()>;

    /// Makes all durable that was written.
    ///
    /// # Errors
    /// Why not.
    fn flush(&mut self) -> Outcome<()>;

    /// Says what is known of a range without reading it: leading extents, at least one.
    ///
    /// # Errors
    /// Why not.
    fn extents(&mut self, at: u64, len: u64) -> Outcome<Vec<(u64, Status)>>;

    /// Flushes and closes the image.
    ///
    /// # Errors
    /// Why not.
    fn close(self: Box<Self>) -> Outcome<()>;
}

/// Answers requests until `quit` or the end of `input`. What is open then is dropped without a
/// flush.
///
/// # Errors
/// What reading and writing give.
pub fn serve(
    engine: &mut dyn Engine,
    mut input: impl BufRead,
    mut output: impl Write,
) -> io::Result<()> {
    let mut disk = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.pop_if(|last| *last == b'\n').is_none() && line.len() as u64 > MAX_LINE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without end"));
        }
        let request = match std::str::from_utf8(&line) {
            Ok(text) => Request::parse(text),
            Err(_) => Err("a line is not UTF-8 text".to_owned()),
        };
        let is_last = request == Ok(Request::Quit);
        let answer = match request {
            Ok(request) => answered(execute(engine, &mut disk, request)),
            Err(text) => Answer::Error(text),
        };
        writeln!(output, "{answer}")?;
        output.flush()?;
        if is_last {
            return Ok(());
        }
    }
}

fn answered(outcome: Outcome<String>) -> Answer {
    match outcome {
        Ok(text) => Answer::Ok(text),
        Err(Failure::Unsupported(text)) => Answer::Unsupported(text),
        Err(Failure::Failed(text)) => Answer::Error(text),
    }
}

fn execute(
    engine: &mut dyn Engine,
    open: &mut Option<Box<dyn OpenDisk>>,
    request: Request,
) -> Outcome<String> {
    match request {
        Request::Hello(VERSION) => return Ok(hello(&engine.name(), &engine.lacks())),
        Request::Hello(other) => return Err(format!("protocol {other} is unknown").into()),
        Request::Open(..) if open.is_some() => return Err("an image is open".to_owned().into()),
        Request::Open(mode, path) => {
            let disk = open.insert(engine.open(&path, mode)?);
            return Ok(disk.size().to_string());
        }
        Request::Quit => return Ok(String::new()),
        _ => {}
    }
    if request == Request::Close {
        let disk = open.take().ok_or_else(no_image)?;
        return disk.close().map(|()| String::new());
    }
    let disk = open.as_mut().ok_or_else(no_image)?;
    on_disk(disk.as_mut(), request)
}

fn no_image() -> Failure {
    Failure::Failed("no image is open".into())
}

fn on_disk(disk: &mut dyn OpenDisk, request: Request) -> Outcome<String> {
    let done = match request {
        Request::Read { len, .. } if len > MAX_BYTES => {
            return Err(format!("{len} bytes are more than {MAX_BYTES}").into());
        }
        Request::Read { at, len } => {
            let mut bytes = vec![0; len as usize];
            return disk.read(at, &mut bytes).map(|()| hex(&bytes));
        }
        Request::Extents { at, len } => return disk.extents(at, len).map(|found| extents(&found)),
        Request::Write { at, bytes } => disk.write(at, &bytes),
        Request::Zero { at, len, unmap } => disk.zero(at, len, unmap),
        Request::Discard { at, len } => disk.discard(at, len),
        Request::Flush => disk.flush(),
        Request::Hello(_) | Request::Open(..) | Request::Close | Request::Quit => Ok(()),
    };
    done.map(|()| String::new())
}
