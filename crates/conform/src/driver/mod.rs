//! A driver that runs: it is asked, waited for with a limit, and ended.
//!
//! * `command` — a program, in a group of processes of its own
//! * `thread` — an engine in this process, for tests of the kit

mod command;
mod thread;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use crate::protocol::{Answer, MAX_LINE_BYTES, Need, Request, VERSION, parse_hello, quoted};
use crate::serve::Engine;

/// How an engine in this process is made.
type Make = dyn Fn() -> Box<dyn Engine> + Send + Sync;

/// What speaks the protocol.
///
/// ```
/// use lacuna_conform::driver::Driver;
/// use lacuna_conform::engines::Lacuna;
/// let driver = Driver::thread(|| Box::new(Lacuna));
/// assert!(driver.start(std::time::Duration::from_secs(10)).is_ok());
/// ```
#[derive(Clone)]
pub enum Driver {
    /// A line of shell.
    Shell(String),
    /// A program with its arguments.
    Program(PathBuf, Vec<String>),
    /// An engine in a thread of this process.
    Thread(Arc<Make>),
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shell(line) => write!(f, "Shell({line:?})"),
            Self::Program(path, arguments) => write!(f, "Program({path:?}, {arguments:?})"),
            Self::Thread(_) => f.write_str("Thread"),
        }
    }
}

/// Why there is no answer.
///
/// ```
/// use lacuna_conform::driver::Gone;
/// assert_eq!(Gone::Hung.to_string(), "did not answer in time, and was ended");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gone {
    /// The driver ended; what it said on standard error.
    Died(String),
    /// It did not answer in time, and was ended.
    Hung,
    /// It does not keep to the protocol.
    Nonsense(String),
}

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Died(said) if said.is_empty() => f.write_str("ended without an answer"),
            Self::Died(said) => write!(f, "ended without an answer: {said}"),
            Self::Hung => f.write_str("did not answer in time, and was ended"),
            Self::Nonsense(what) => write!(f, "does not keep to the protocol: {what}"),
        }
    }
}

impl Driver {
    /// Makes a driver of an engine in this process.
    pub fn thread(make: impl Fn() -> Box<dyn Engine> + Send + Sync + 'static) -> Self {
        Self::Thread(Arc::new(make))
    }

    /// Starts it; an answer may take as long as `limit`.
    ///
    /// # Errors
    /// Why it cannot be started, or what it answered instead of its name.
    pub fn start(&self, limit: Duration) -> Result<Session, Gone> {
        let streams = match self {
            Self::Shell(line) => command::start("sh".as_ref(), &["-c", line]),
            Self::Program(path, arguments) => command::start(path, arguments),
            Self::Thread(make) => thread::start(Arc::clone(make)),
        };
        let streams = streams.map_err(|error| Gone::Died(format!("cannot be started: {error}")))?;
        Session::greet(streams, limit)
    }
}

/// Both directions of a conversation, and the one who can end it.
struct Streams {
    input: Box<dyn Write + Send>,
    output: Box<dyn Read + Send>,
    running: Box<dyn Running>,
}

/// A driver that runs.
trait Running: Send {
    /// Ends it at once.
    fn kill(&mut self);

    /// Returns the last of what it said on standard error.
    fn said(&mut self) -> String;
}

#[derive(PartialEq, Eq)]
enum Line {
    Whole(Vec<u8>),
    TooLong,
}

/// A conversation with a driver that said who it is.
pub struct Session {
    /// Name and version of the engine.
    pub name: String,
    /// What it cannot do.
    pub lacks: Vec<Need>,
    /// What was said, shortened.
    pub log: Vec<String>,
    ask: SyncSender<Vec<u8>>,
    answers: Receiver<Line>,
    running: Box<dyn Running>,
    limit: Duration,
}

impl Session {
    fn greet(streams: Streams, limit: Duration) -> Result<Self, Gone> {
        let (ask, asked) = sync_channel(1);
        let (answer, answers) = sync_channel(1);
        std::thread::spawn(move || pass_on(&asked, streams.input));
        std::thread::spawn(move || listen(&answer, streams.output));
        let (name, lacks, log) = (String::new(), Vec::new(), Vec::new());
        let running = streams.running;
        let mut session = Self { name, lacks, log, ask, answers, running, limit };
        match session.ask(&Request::Hello(VERSION))? {
            Answer::Ok(text) => {
                (session.name, session.lacks) = parse_hello(&text).map_err(Gone::Nonsense)?;
                Ok(session)
            }
            other => Err(Gone::Nonsense(format!(
                "hello is answered with {}",
                quoted(&other.to_string())
            ))),
        }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// Why there is none; the driver has ended then.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, Gone> {
        let text = request.to_string();
        self.note("> ", &text);
        let answer = self.answer(text);
        match &answer {
            Ok(answer) => self.note("< ", &answer.to_string()),
            Err(gone) => {
                self.note("! ", &gone.to_string());
                self.end();
            }
        }
        answer
    }

    fn answer(&mut self, mut text: String) -> Result<Answer, Gone> {
        text.push('\n');
        let deadline = Instant::now() + self.limit;
        if self.ask.send(text.into_bytes()).is_err() {
            return Err(self.died());
        }
        match self.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Line::Whole(line)) => {
                let text = std::str::from_utf8(&line).map_err(|_| {
                    Gone::Nonsense(format!(
                        "{} is not UTF-8",
                        quoted(&String::from_utf8_lossy(&line))
                    ))
                })?;
                Answer::parse(text).map_err(Gone::Nonsense)
            }
            Ok(Line::TooLong) => {
                Err(Gone::Nonsense(format!("a line of more than {MAX_LINE_BYTES} bytes")))
            }
            Err(RecvTimeoutError::Timeout) => Err(Gone::Hung),
            Err(RecvTimeoutError::Disconnected) => Err(self.died()),
        }
    }

    fn died(&mut self) -> Gone {
        self.end();
        Gone::Died(self.running.said())
    }

    /// Ends the driver, and waits until what it started has gone as well: its output ends then.
    fn end(&mut self) {
        self.running.kill();
        let patience = Instant::now() + Duration::from_secs(5);
        while Instant::now() < patience
            && self.answers.recv_timeout(Duration::from_secs(1))
                != Err(RecvTimeoutError::Disconnected)
        {}
    }

    /// Ends the driver at once, as a crash does.
    pub fn kill(mut self) -> Vec<String> {
        self.end();
        self.log.push("! ended by the kit".to_owned());
        std::mem::take(&mut self.log)
    }

    /// Keeps a line, or its beginning.
    fn note(&mut self, mark: &str, text: &str) {
        const MOST: usize = 160;
        let shown: String = text.chars().take(MOST).collect();
        let more = if shown.len() < text.len() {
            format!("... ({} bytes)", text.len())
        } else {
            String::new()
        };
        self.log.push(format!("{mark}{shown}{more}"));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

/// Writes what is asked, so that a driver that does not read keeps nobody waiting for ever.
fn pass_on(asked: &Receiver<Vec<u8>>, mut input: Box<dyn Write + Send>) {
    while let Ok(line) = asked.recv() {
        if input.write_all(&line).and_then(|()| input.flush()).is_err() {
            return;
        }
    }
}

/// Reads answers, none longer than allowed, one ahead at most.
fn listen(answers: &SyncSender<Line>, output: Box<dyn Read + Send>) {
    let mut output = BufReader::new(output);
    while let Ok(Some(line)) = next_line(&mut output) {
        let is_last = matches!(line, Line::TooLong);
        if answers.send(line).is_err() || is_last {
            return;
        }
    }
}

fn next_line(output: &mut impl BufRead) -> io::Result<Option<Line>> {
    let mut line = Vec::new();
    output.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    match line.pop() {
        Some(b'\n') => Ok(Some(Line::Whole(line))),
        Some(_) if line.len() as u64 + 1 == MAX_LINE_BYTES => Ok(Some(Line::TooLong)),
        _ => Ok(None),
    }
}
