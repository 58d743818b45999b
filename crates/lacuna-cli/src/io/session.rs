//! The state of the shell: the open image and the requests in flight.
//!
//! * Requests of `aio_*` run while further ones are issued; every other command waits for them
//!   first, and they are reported in the order in which they were issued.

use std::future::poll_fn;
use std::task::Poll;

use futures_util::StreamExt as _;
use futures_util::future::FutureExt as _;
use futures_util::stream::FuturesOrdered;
use lacuna::ErrorKind;
use lacuna::block::{BoxFuture, Layer};
use pollster::block_on;

use super::commands::{self, Command, Done, Failure, Needs};
use super::corruption;
use super::image::OpenFlags;
use crate::args::{self, Parsed};
use crate::error::{CliError, CliResult};
use crate::nodes::{Rules, ToolDisk, is_by_rule};
use crate::objects::Objects;
use crate::output;
use crate::persona::Tool;
use crate::verbs::open::{self, FileChain, Request};
use crate::verbs::overlay::{self, Overlay};
use crate::verbs::spec::ImageSpec;
use crate::verbs::spec::tree::TopSpec;

/// An opened image and how it was asked for.
pub(super) struct Opened {
    pub(super) chain: FileChain,
    pub(super) request: Request,
}

/// A running shell.
pub(super) struct Session<'t> {
    tool: &'t Tool,
    /// What images may name that are opened.
    objects: Objects,
    opened: Option<Opened>,
    /// What the path of an image opened by `-s` leads to.
    overlay: Option<Overlay>,
    in_flight: FuturesOrdered<BoxFuture<'static, String>>,
    is_over: bool,
    /// Whether QEMU's words for an image that contradicts itself were said.
    told_of_corruption: bool,
    /// Standard output or error is gone: there is nothing left to do.
    broken: Option<CliError>,
}

impl<'t> Session<'t> {
    /// Starts without an image.
    pub(super) fn new(tool: &'t Tool, objects: Objects) -> Self {
        Self {
            tool,
            objects,
            opened: None,
            overlay: None,
            in_flight: FuturesOrdered::new(),
            is_over: false,
            told_of_corruption: false,
            broken: None,
        }
    }

    /// Returns the name the program goes by.
    pub(super) const fn tool(&self) -> &'t Tool {
        self.tool
    }

    /// Says whether `quit` was given.
    pub(super) const fn is_over(&self) -> bool {
        self.is_over
    }

    /// Makes this command the last one.
    pub(super) const fn end(&mut self) {
        self.is_over = true;
    }

    /// Executes a line; false if it did not succeed.
    pub(super) fn execute(&mut self, line: &str) -> CliResult<bool> {
        let words: Vec<String> =
            line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
        let Some((name, words)) = words.split_first() else { return Ok(true) };
        let done = match commands::find(name) {
            Some(command) => self.run(command, words),
            None => self.complain(&format!("command \"{name}\" not found\n")),
        };
        match self.broken.take() {
            Some(error) => Err(error),
            None => Ok(done.is_ok()),
        }
    }

    fn run(&mut self, command: &'static Command, words: &[String]) -> Done {
        self.check(command, words.len())?;
        if !command.name.starts_with("aio_") && !command.is_about_breaks() {
            self.wait_until_all_wait()?;
        }
        match (command.run)(self, command, words) {
            Err(Failure::Usage) => {
                self.say(&command.line())?;
                Err(Failure::Said)
            }
            other => other,
        }
    }

    fn check(&self, command: &Command, count: usize) -> Done {
        let (least, most) = command.words;
        if (least..=most).contains(&count) {
            return self.check_image(command);
        }
        let expected = match (least, most) {
            (least, usize::MAX) => format!("at least {least}"),
            (least, most) if least == most => least.to_string(),
            (least, most) => format!("between {least} and {most}"),
        };
        let name = command.name;
        self.complain(&format!(
            "bad argument count {count} to {name}, expected {expected} arguments\n"
        ))
    }

    fn check_image(&self, command: &Command) -> Done {
        match (&self.opened, command.needs) {
            (_, Needs::Nothing) | (Some(_), Needs::Image) => Ok(()),
            (None, _) => self.complain("no file open, try 'help open'\n"),
            (Some(opened), Needs::WritableImage) => match opened.chain.disk().is_read_only() {
                false => Ok(()),
                true => self.report("Block node is read-only"),
            },
        }
    }

    /// Sorts the words of a command by its table.
    pub(super) fn parse(&self, command: &Command, words: &[String]) -> Result<Parsed, Failure> {
        args::parse(command.flags, words).map_err(|error| {
            output::complain(&format!("{}: {}\n", command.name, error.text()));
            Failure::Usage
        })
    }

    /// Under QEMU's names, says that the image contradicts itself, where it was found out now.
    fn warn_of_corruption(&mut self) {
        let failure = self.opened.as_ref().and_then(|opened| opened.chain.disk().failure());
        let Some(failure) = failure.filter(|error| error.kind() == ErrorKind::Corrupt) else {
            return;
        };
        if !self.tool.is_own() && !std::mem::replace(&mut self.told_of_corruption, true) {
            output::complain(&format!(
                "qcow2: Marking image as corrupt: {}; further corruption events will be \
                 suppressed\n",
                corruption::words(failure.message())
            ));
        }
    }

    /// Prints a result.
    pub(super) fn say(&mut self, text: &str) -> Done {
        self.warn_of_corruption();
        output::print(text).map_err(|error| {
            self.broken = Some(error);
            Failure::Said
        })
    }

    /// Prints why the command fails, where qemu-io prints it: on standard output.
    pub(super) fn fail(&mut self, text: &str) -> Done {
        self.say(text)?;
        Err(Failure::Said)
    }

    /// Prints why the command fails on standard error.
    pub(super) fn complain(&self, text: &str) -> Done {
        output::complain(text);
        Err(Failure::Said)
    }

    /// Prints why the command fails on standard error, under the name of the program.
    pub(super) fn report(&self, text: &str) -> Done {
        self.complain(&format!("{}: {text}\n", self.tool.name))
    }

    /// Lets a request run while further commands are read.
    pub(super) fn launch(&mut self, request: BoxFuture<'static, String>) -> Done {
        self.in_flight.push_back(request);
        // Polls once, so that the request is on its way and what is done at once is reported.
        while let Some(Some(text)) = self.in_flight.next().now_or_never() {
            self.say(&text)?;
        }
        Ok(())
    }

    /// Says whether a request waits at a breakpoint: others are not waited for then.
    fn has_waiting(&self) -> bool {
        let rules = self.opened.as_ref().and_then(|opened| opened.chain.disk().rules());
        rules.is_some_and(|rules| rules.is_waiting(None))
    }

    /// Waits until a request of this tag waits at a breakpoint.
    pub(super) fn wait_for_break(&mut self, rules: &Rules, tag: &str) -> Done {
        let mut texts = Vec::new();
        let in_flight = &mut self.in_flight;
        let found = block_on(poll_fn(|context| {
            let all_done = loop {
                match in_flight.poll_next_unpin(context) {
                    Poll::Ready(Some(text)) => texts.push(text),
                    Poll::Ready(None) => break true,
                    Poll::Pending => break false,
                }
            };
            match (rules.is_waiting(Some(tag)), all_done) {
                (true, _) => Poll::Ready(true),
                (false, true) => Poll::Ready(false),
                (false, false) => Poll::Pending,
            }
        }));
        texts.iter().try_for_each(|text| self.say(text))?;
        match found {
            true => Ok(()),
            false => self.report(&format!("No request in flight can come to breakpoint {tag}")),
        }
    }

    /// Waits until all requests are done, or one waits at a breakpoint that a later command may lift.
    fn wait_until_all_wait(&mut self) -> Done {
        while !self.has_waiting() {
            let next = block_on(poll_fn(|context| match self.in_flight.poll_next_unpin(context) {
                Poll::Pending if self.has_waiting() => Poll::Ready(None),
                other => other,
            }));
            match next {
                Some(text) => self.say(&text)?,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Waits for all requests and prints how they went.
    pub(super) fn wait_for_all(&mut self) -> Done {
        while let Some(text) = block_on(self.in_flight.next()) {
            self.say(&text)?;
        }
        Ok(())
    }

    /// Opens an image where none is open.
    pub(super) fn open(&mut self, mut image: ImageSpec, flags: &OpenFlags) -> CliResult<()> {
        image.disk.find_certificates(&self.objects)?;
        let (access, cache, unnamed) = (flags.access, flags.cache, flags.unnamed);
        open::check_native(flags.is_native, cache)?;
        let mut request = Request { image, access, cache, sharing: flags.sharing, unnamed };
        if !flags.snapshot {
            put_on_top(&mut request, flags);
            return self.open_request(request);
        }
        let overlay = overlay::make(self.tool, &request)?;
        let mut request = overlay.request(access);
        put_on_top(&mut request, flags);
        self.overlay = Some(overlay);
        self.open_request(request)
    }

    /// As [`open`](Self::open), for a request that was made before.
    pub(super) fn open_request(&mut self, request: Request) -> CliResult<()> {
        let chain = open::open_bare(self.tool, &request)?;
        open::warn_of_guess(&request, &chain);
        self.opened = Some(Opened { chain, request });
        Ok(())
    }

    /// Says whether an image is open.
    pub(super) const fn has_image(&self) -> bool {
        self.opened.is_some()
    }

    /// Returns the opened image; the table of commands sees to it that there is one.
    pub(super) fn image(&self) -> Result<&Opened, Failure> {
        self.opened.as_ref().ok_or(Failure::Said)
    }

    /// Returns the disk.
    pub(super) fn disk(&self) -> Result<ToolDisk, Failure> {
        Ok(self.image()?.chain.disk().clone())
    }

    /// Returns the size of the disk.
    pub(super) fn size_bytes(&self) -> Result<u64, Failure> {
        Ok(self.image()?.chain.disk().size_bytes())
    }

    /// Closes the image; gives back how it had been asked for.
    pub(super) fn close(&mut self) -> CliResult<Option<Request>> {
        let Some(Opened { chain, request }) = self.opened.take() else { return Ok(None) };
        let closed = block_on(chain.into_disk().close());
        // What closed it to changes was said already, and what a test driver does is no news.
        let was_told = std::mem::replace(&mut self.told_of_corruption, false);
        match closed {
            Err(error) if !was_told && !is_by_rule(&error) => Err(error.into()),
            _ => Ok(Some(request)),
        }
    }

    /// Closes the image and opens it in another way; as before where that cannot be.
    pub(super) fn reopen(&mut self, change: impl FnOnce(&mut Request)) -> CliResult<()> {
        let Some(before) = self.close()? else { return Ok(()) };
        let mut request = before.clone();
        change(&mut request);
        self.open_request(request).map_err(|error| match self.open_request(before) {
            Ok(()) => error,
            Err(also) => {
                CliError::new(format!("{}; the image is closed: {}", error.text(), also.text()))
            }
        })
    }

    /// Waits for what is in flight and closes the image; false if that did not succeed.
    pub(super) fn finish(mut self) -> CliResult<bool> {
        if let Some(rules) = self.opened.as_ref().and_then(|opened| opened.chain.disk().rules()) {
            rules.resume_all();
        }
        let all_said = self.wait_for_all().is_ok();
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        self.close()?;
        Ok(all_said)
    }
}

/// Adds what the flags say about the disk on top.
fn put_on_top(request: &mut Request, flags: &OpenFlags) {
    let disk = &mut request.image.disk;
    disk.common.discard = disk.common.discard.or(flags.discards);
    if flags.writes_through {
        disk.tops.push(TopSpec::WriteThrough);
    }
    if flags.copies_on_read {
        disk.tops.push(TopSpec::CopyOnRead);
    }
}
