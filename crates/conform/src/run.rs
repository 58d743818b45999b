//! How a case is run: files, a driver, requests, and the judgement.
//!
//! ```
//! use lacuna_conform::driver::Driver;
//! use lacuna_conform::engines::Lacuna;
//! use lacuna_conform::run::{Options, Verdict, run};
//!
//! let folder = tempfile::tempdir()?;
//! let case = lacuna_conform::suite::all(1).remove(0);
//! let driver = Driver::thread(|| Box::new(Lacuna));
//! let done = run(&driver, &case, &Options::new(folder.path())).unwrap();
//! assert_eq!(done.verdict, Verdict::Passed);
//! # Ok::<_, std::io::Error>(())
//! ```

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::case::{Case, Expect, Step};
use crate::driver::{Driver, Gone, Session};
use crate::folder::Folder;
use crate::judge::judge;
use crate::model::{Difference, Model};
use crate::protocol::{Answer, Mode, Need, Request, Status, parse_extents, unhex};

/// The most bytes that are read at once.
const PIECE_BYTES: u64 = 256 << 10;
/// Disks up to this size are read whole.
const SMALL_BYTES: u64 = 1 << 20;
/// What is read before and behind the edges of clusters of larger ones.
const EDGE_BYTES: u64 = 4096;
/// How many edges.
const MOST_EDGES: u64 = 64;

/// How cases are run.
///
/// ```
/// use lacuna_conform::run::Options;
/// assert!(Options::new("/tmp/scratch").qemu_check.is_none());
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder in which each case gets one of its own.
    pub folder: PathBuf,
    /// How long an answer may take.
    pub time_limit: Duration,
    /// Whether files, what they were and the conversation stay.
    pub keep: bool,
    /// The program `qemu-img`, if it is to check what is left too.
    pub qemu_check: Option<PathBuf>,
}

impl Options {
    /// Runs cases in folders within this one, and leaves nothing.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        let (folder, time_limit) = (folder.into(), Duration::from_secs(20));
        Self { folder, time_limit, keep: false, qemu_check: None }
    }
}

/// How a case went.
///
/// [`run`](self) has an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it must.
    Passed,
    /// The engine says that it does not offer what is needed, and did no harm.
    Unsupported(String),
    /// What is wrong, in the order in which it was noticed.
    Failed(Vec<String>),
}

/// A case that was run.
#[derive(Clone, Debug)]
pub struct Done {
    /// Name and version of the engine.
    pub engine: String,
    /// How it went.
    pub verdict: Verdict,
}

/// Why nothing can be said of an engine.
///
/// ```
/// use lacuna_conform::driver::Gone;
/// use lacuna_conform::run::Broken;
/// assert_eq!(Broken::Driver(Gone::Hung).to_string(), "The driver did not answer in time, and was ended");
/// ```
#[derive(Debug)]
pub enum Broken {
    /// The driver did not say who it is, or does not keep to the protocol.
    Driver(Gone),
    /// The files of a case cannot be written or read.
    Host(std::io::Error),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(gone) => write!(f, "The driver {gone}"),
            Self::Host(error) => write!(f, "Files of a case: {error}"),
        }
    }
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Host(error)
    }
}

/// Runs a case.
///
/// # Errors
/// Where the driver is none, or the host fails: nothing is known of the engine then.
pub fn run(driver: &Driver, case: &Case, options: &Options) -> Result<Done, Broken> {
    let folder = Folder::create(options.folder.join(case.name.replace('/', "-")), &case.layout)?;
    let session = driver.start(options.time_limit).map_err(Broken::Driver)?;
    let engine = session.name.clone();
    let lacking: Vec<&str> = case
        .needs
        .iter()
        .filter(|need| session.lacks.contains(need))
        .map(|need| need.word())
        .collect();
    let verdict = match lacking.is_empty() {
        false => Verdict::Unsupported(format!("the driver is without {}", lacking.join(", "))),
        true => {
            let run = Run::new(case, &folder, driver, options, session);
            run.finish()?
        }
    };
    if !options.keep {
        std::fs::remove_dir_all(folder.path())?;
    }
    Ok(Done { engine, verdict })
}

/// A case while it runs.
struct Run<'a> {
    case: &'a Case,
    folder: &'a Folder,
    driver: &'a Driver,
    options: &'a Options,
    session: Option<Session>,
    is_open: bool,
    model: Model,
    /// What was changed and not flushed.
    unflushed: Vec<(u64, u64)>,
    faults: Vec<String>,
    unsupported: Option<String>,
    log: Vec<String>,
}

/// Whether further requests make sense.
type Goes = Result<(), End>;

enum End {
    /// Nothing more is asked.
    Case,
    /// The driver is none.
    Broken(Broken),
}

impl<'a> Run<'a> {
    fn new(
        case: &'a Case,
        folder: &'a Folder,
        driver: &'a Driver,
        options: &'a Options,
        session: Session,
    ) -> Self {
        let mut model = Model::new(case.layout.content());
        if let Expect::Survives(sound) = &case.expect {
            let bytes = case.layout.cluster_bytes();
            let damaged = (0..model.size().div_ceil(bytes)).filter(|it| !sound.contains(it));
            damaged.take(1 << 16).for_each(|cluster| model.forget(cluster * bytes, bytes));
        }
        Self {
            case,
            folder,
            driver,
            options,
            session: Some(session),
            is_open: false,
            model,
            unflushed: Vec::new(),
            faults: Vec::new(),
            unsupported: None,
            log: Vec::new(),
        }
    }

    fn finish(mut self) -> Result<Verdict, Broken> {
        for step in &self.case.steps {
            match self.step(step) {
                Ok(()) => {}
                Err(End::Case) => break,
                Err(End::Broken(broken)) => return Err(broken),
            }
        }
        self.part();
        let qemu_check = self.options.qemu_check.as_deref();
        let found = judge(self.case, self.folder, &self.model, qemu_check)?;
        self.faults.extend(found);
        if self.options.keep {
            self.keep()?;
        }
        Ok(match (self.faults.is_empty(), self.unsupported) {
            (false, _) => Verdict::Failed(self.faults),
            (true, Some(what)) => Verdict::Unsupported(what),
            (true, None) => Verdict::Passed,
        })
    }

    /// Closes what is open, and says goodbye.
    fn part(&mut self) {
        let Some(mut session) = self.session.take() else { return };
        if std::mem::take(&mut self.is_open) {
            // Only where a case ended early, which has been told.
            drop(session.ask(&Request::Close));
        }
        drop(session.ask(&Request::Quit));
        self.log.append(&mut session.log);
    }

    fn keep(&self) -> std::io::Result<()> {
        let steps: Vec<String> = self.case.steps.iter().map(ToString::to_string).collect();
        let texts = [
            ("steps.txt", steps.join("\n") + "\n"),
            ("conversation.txt", self.log.join("\n") + "\n"),
            ("faults.txt", self.faults.iter().map(|fault| format!("{fault}\n")).collect()),
        ];
        self.folder.keep(&texts, self.model.content())
    }

    fn may_fail(&self) -> bool {
        matches!(self.case.expect, Expect::Survives(_))
    }

    fn step(&mut self, step: &Step) -> Goes {
        match *step {
            Step::Open(mode) => self.open(mode),
            Step::Write { at, len, seed } => {
                let bytes = crate::content(seed, at..at + len);
                self.change(step, (at, len), Request::Write { at, bytes })
            }
            Step::Zero { at, len, unmap } => {
                self.change(step, (at, len), Request::Zero { at, len, unmap })
            }
            Step::Discard { at, len } => self.change(step, (at, len), Request::Discard { at, len }),
            Step::Read { at, len } => self.compare(at, len),
            Step::Verify => {
                let ranges = self.ranges();
                ranges.into_iter().try_for_each(|(at, len)| self.compare(at, len))
            }
            Step::Extents => self.extents(),
            Step::Flush => {
                self.done(step, Request::Flush)?;
                self.unflushed.clear();
                Ok(())
            }
            Step::Kill => self.kill(),
            Step::Close => {
                self.is_open = false;
                self.done(step, Request::Close)
            }
        }
    }

    /// Asks the driver; one that has gone ends the case.
    fn ask(&mut self, request: &Request) -> Result<Answer, End> {
        let Some(session) = &mut self.session else { return Err(End::Case) };
        match session.ask(request) {
            Ok(answer) => Ok(answer),
            Err(gone @ Gone::Nonsense(_)) => Err(End::Broken(Broken::Driver(gone))),
            Err(gone) => {
                let word = request.to_string();
                let word = word.split(' ').next().unwrap_or_default();
                self.faults.push(format!("{word}: the driver {gone}"));
                self.log.append(&mut session.log);
                (self.session, self.is_open) = (None, false);
                Err(End::Case)
            }
        }
    }

    fn open(&mut self, mode: Mode) -> Goes {
        let answer = self.ask(&Request::Open(mode, self.folder.image()))?;
        let refuses = self.case.expect == Expect::Refuses;
        match answer {
            Answer::Ok(_) if refuses => {
                self.is_open = true;
                self.faults.push("it was opened, and must be refused".to_owned());
            }
            Answer::Ok(text) => {
                self.is_open = true;
                if text != self.model.size().to_string() {
                    if self.may_fail() {
                        // Whatever a damaged header says: nothing can be compared.
                        return Err(End::Case);
                    }
                    let what = crate::protocol::quoted(&text);
                    self.faults
                        .push(format!("the size is {what} instead of {}", self.model.size()));
                    return Err(End::Case);
                }
                return Ok(());
            }
            _ if refuses || self.may_fail() => {}
            Answer::Unsupported(text) => self.unsupported = Some(text),
            Answer::Error(text) => self.faults.push(format!("open: {text}")),
        }
        Err(End::Case)
    }

    /// Asks for something that gives nothing.
    fn done(&mut self, step: &Step, request: Request) -> Goes {
        match self.ask(&request)? {
            Answer::Ok(_) => Ok(()),
            answer => self.not_done(step, answer),
        }
    }

    fn not_done(&mut self, step: &Step, answer: Answer) -> Goes {
        match answer {
            _ if self.may_fail() => return Ok(()),
            Answer::Unsupported(text) => self.unsupported = Some(text),
            Answer::Error(text) | Answer::Ok(text) => self.faults.push(format!("{step}: {text}")),
        }
        Err(End::Case)
    }

    fn change(&mut self, step: &Step, (at, len): (u64, u64), request: Request) -> Goes {
        self.unflushed.push((at, len));
        let answer = self.ask(&request);
        if !matches!(answer, Ok(Answer::Ok(_) | Answer::Unsupported(_))) {
            self.model.forget(at, len);
        }
        match answer? {
            Answer::Ok(_) => {}
            other => return self.not_done(step, other),
        }
        match *step {
            Step::Write { seed, .. } => self.model.write(at, len, seed),
            Step::Zero { .. } => self.model.zero(at, len),
            Step::Discard { .. } => return self.settle(at, len),
            _ => {}
        }
        Ok(())
    }

    /// Reads what a discard left: each byte as before or zero.
    fn settle(&mut self, at: u64, len: u64) -> Goes {
        for (at, len) in pieces(at, len) {
            if let Some(bytes) = self.read(at, len)? {
                let difference = self.model.settle_discard(at, &bytes);
                self.wrong("after a discard", difference);
            }
        }
        Ok(())
    }

    fn compare(&mut self, at: u64, len: u64) -> Goes {
        for (at, len) in pieces(at, len) {
            if let Some(bytes) = self.read(at, len)? {
                let difference = self.model.difference(at, &bytes);
                self.wrong("read", difference);
            }
        }
        Ok(())
    }

    fn wrong(&mut self, what: &str, difference: Option<Difference>) {
        if let Some(difference) = difference {
            self.faults.push(format!("{what}: {difference}"));
        }
    }

    fn read(&mut self, at: u64, len: u64) -> Result<Option<Vec<u8>>, End> {
        let answer = self.ask(&Request::Read { at, len })?;
        let text = match answer {
            Answer::Ok(text) => text,
            other => {
                self.not_done(&Step::Read { at, len }, other)?;
                return Ok(None);
            }
        };
        let bytes = unhex(&text).map_err(nonsense)?;
        match bytes.len() as u64 == len {
            true => Ok(Some(bytes)),
            false => Err(nonsense(format!("{} bytes instead of {len}", bytes.len()))),
        }
    }

    /// Returns what is read to know the disk.
    fn ranges(&self) -> Vec<(u64, u64)> {
        let size = self.model.size();
        if size <= SMALL_BYTES {
            return vec![(0, size)];
        }
        let bytes = self.case.layout.cluster_bytes();
        let edges = (0..=size.div_ceil(bytes)).map(|cluster| (cluster * bytes).min(size));
        let around = |edge: u64| {
            let start = edge.saturating_sub(EDGE_BYTES);
            (start, (edge + EDGE_BYTES).min(size) - start)
        };
        edges.take(MOST_EDGES as usize).map(around).collect()
    }

    /// Extents cover the disk, and what is called zero is.
    fn extents(&mut self) -> Goes {
        let lacks = |session: &Session| session.lacks.contains(&Need::Extents);
        if self.session.as_ref().is_some_and(lacks) {
            return Ok(());
        }
        let (mut at, size) = (0, self.model.size());
        while at < size {
            let answer = self.ask(&Request::Extents { at, len: size - at })?;
            let Answer::Ok(text) = answer else { return self.not_done(&Step::Extents, answer) };
            let before = at;
            for (len, status) in parse_extents(&text).map_err(nonsense)? {
                if len == 0 || len > size - at {
                    return Err(nonsense(format!("an extent of {len} bytes at {at}")));
                }
                self.claimed(at, len, status);
                at += len;
            }
            if at == before {
                return Err(nonsense(format!("no extent at {at}")));
            }
        }
        Ok(())
    }

    fn claimed(&mut self, at: u64, len: u64, status: Status) {
        let found = match status {
            Status::Data => None,
            Status::Zero => pieces(at, len)
                .find_map(|(at, len)| self.model.difference(at, &vec![0; len as usize])),
        };
        if let Some(Difference { at, expected, .. }) = found {
            self.faults.push(format!("extents: zero is said of {at}, which holds {expected:#04x}"));
        }
    }

    /// Ends the driver as a crash does; what was not flushed may be there or not.
    fn kill(&mut self) -> Goes {
        if let Some(session) = self.session.take() {
            self.log.extend(session.kill());
        }
        self.is_open = false;
        for (at, len) in std::mem::take(&mut self.unflushed) {
            self.model.forget(at, len);
        }
        let started = self.driver.start(self.options.time_limit);
        self.session = Some(started.map_err(|gone| End::Broken(Broken::Driver(gone)))?);
        Ok(())
    }
}

fn nonsense(what: String) -> End {
    End::Broken(Broken::Driver(Gone::Nonsense(what)))
}

/// Cuts a range into what is asked for at once.
fn pieces(at: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = at + len;
    (at..end).step_by(PIECE_BYTES as usize).map(move |at| (at, PIECE_BYTES.min(end - at)))
}
