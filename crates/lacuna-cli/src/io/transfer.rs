//! Commands that move bytes: read, write, their vector and asynchronous forms, discard, flush.

use std::time::Instant;

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::job::Target;
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, Result};
use pollster::block_on;

use super::commands::{Command, Done, Failure};
use super::report::{self, Style};
use super::session::Session;
use crate::args::Parsed;
use crate::error::errno_words;
use crate::nodes::ToolDisk;
use crate::size::{self, SizeError};

/// The longest request that is passed on: a signed 32-bit number, rounded down to a sector.
const MAX_BYTES: u64 = 2_147_483_136;
/// What is written where no pattern is given.
const PATTERN: u8 = 0xcd;

/// Reads an offset, length or size.
pub(super) fn number(session: &mut Session<'_>, text: &str) -> std::result::Result<u64, Failure> {
    let why = match size::parse_offset(text) {
        Ok(value) => return Ok(value),
        Err(SizeError::NotANumber) => "non-numeric argument, or extraneous/unrecognized suffix",
        Err(SizeError::OutOfRange) => "argument too large",
    };
    session.fail(&format!("Parsing error: {why} -- {text}\n"))?;
    Err(Failure::Said)
}

/// Reads the byte of `-P`.
fn pattern(session: &mut Session<'_>, parsed: &Parsed) -> std::result::Result<Option<u8>, Failure> {
    let Some(text) = parsed.last("P") else { return Ok(None) };
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let value = match digits {
        Some(digits) => u8::from_str_radix(digits, 16),
        None if text.len() > 1 && text.starts_with('0') => u8::from_str_radix(text, 8),
        None => text.parse(),
    };
    match value {
        Ok(byte) => Ok(Some(byte)),
        Err(_) => {
            session.fail(&format!("{text} is not a valid pattern byte\n"))?;
            Err(Failure::Said)
        }
    }
}

/// The two numbers that most commands end with.
fn offset_and_len(
    session: &mut Session<'_>,
    parsed: &Parsed,
) -> std::result::Result<(u64, u64), Failure> {
    let [offset, len] = &parsed.operands[..] else { return Err(Failure::Usage) };
    Ok((number(session, offset)?, number(session, len)?))
}

/// An offset and any number of lengths, added up: vectors are one request here.
fn offset_and_lens(
    session: &mut Session<'_>,
    parsed: &Parsed,
) -> std::result::Result<(u64, u64), Failure> {
    let [offset, lens @ ..] = &parsed.operands[..] else { return Err(Failure::Usage) };
    if lens.is_empty() {
        return Err(Failure::Usage);
    }
    let offset = number(session, offset)?;
    let mut total = 0;
    for text in lens {
        let len = number(session, text)?;
        if len > MAX_BYTES - total {
            session.fail(&format!("Argument '{text}' exceeds maximum size {MAX_BYTES}\n"))?;
        }
        total += len;
    }
    Ok((offset, total))
}

pub(super) fn read(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    let pattern = pattern(session, &parsed)?;
    let skipped = parsed.last("s").map(|text| number(session, text)).transpose()?;
    let counted = parsed.last("l").map(|text| number(session, text)).transpose()?;
    if pattern.is_none() && (skipped.is_some() || counted.is_some()) {
        return Err(Failure::Usage);
    }
    let (offset, len) = offset_and_len(session, &parsed)?;
    if len > MAX_BYTES {
        let given = &parsed.operands[1];
        return session.fail(&format!("length cannot exceed {MAX_BYTES}, given {given}\n"));
    }
    if parsed.has("b") {
        check_sectors(session, offset, len)?;
    }
    let skipped = skipped.unwrap_or(0);
    let Some(count) = counted
        .map_or_else(|| len.checked_sub(skipped), Some)
        .filter(|count| skipped.checked_add(*count).is_some_and(|end| end <= len))
    else {
        return session.fail("pattern verification range exceeds end of read data\n");
    };
    let check = Check { pattern, skipped: skipped as usize, count: count as usize };
    let (style, dump) = (Style::new(&parsed), parsed.has("v"));
    let read = Read { name: "read", of_vm_state: parsed.has("b"), style, dump, check };
    let (text, succeeded) = block_on(read.run(session.disk()?, offset, len));
    session.say(&text)?;
    succeeded.then_some(()).ok_or(Failure::Said)
}

pub(super) fn readv(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    let (read, offset, len) = vector_read(session, &parsed)?;
    let (text, succeeded) = block_on(read.run(session.disk()?, offset, len));
    session.say(&text)?;
    succeeded.then_some(()).ok_or(Failure::Said)
}

pub(super) fn aio_read(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    if parsed.has("i") {
        return session.say("injecting invalid read request\n");
    }
    let (read, offset, len) = vector_read(session, &parsed)?;
    let disk = session.disk()?;
    session.launch(Box::pin(async move { read.run(disk, offset, len).await.0 }))
}

fn vector_read(
    session: &mut Session<'_>,
    parsed: &Parsed,
) -> std::result::Result<(Read, u64, u64), Failure> {
    let pattern = pattern(session, parsed)?;
    let (offset, len) = offset_and_lens(session, parsed)?;
    let check = Check { pattern, skipped: 0, count: len as usize };
    let (style, dump) = (Style::new(parsed), parsed.has("v"));
    Ok((Read { name: "readv", of_vm_state: false, style, dump, check }, offset, len))
}

/// What the bytes read must be.
struct Check {
    pattern: Option<u8>,
    skipped: usize,
    count: usize,
}

impl Check {
    fn complaint(&self, offset: u64, bytes: &[u8]) -> Option<String> {
        let pattern = self.pattern?;
        let checked = bytes.get(self.skipped..self.skipped + self.count)?;
        let is_right = checked.iter().all(|byte| *byte == pattern);
        let (at, count) = (offset + self.skipped as u64, self.count);
        (!is_right).then(|| format!("Pattern verification failed at offset {at}, {count} bytes\n"))
    }
}

/// A read and what to say of it.
struct Read {
    /// The name under which it fails.
    name: &'static str,
    of_vm_state: bool,
    style: Style,
    dump: bool,
    check: Check,
}

impl Read {
    async fn run(self, disk: ToolDisk, offset: u64, len: u64) -> (String, bool) {
        let start = Instant::now();
        let buffer = Buffer::new(len as usize);
        let (result, buffer) = match (self.of_vm_state, disk.as_qcow2()) {
            (false, _) => disk.read(GuestOffset(offset), buffer).await,
            (true, Some(image)) => image.read_vm_state(offset, buffer).await,
            (true, None) => (Err(no_vm_state()), buffer),
        };
        let took = start.elapsed();
        if let Err(error) = result {
            return (format!("{} failed: {}\n", self.name, errno_words(&error)), false);
        }
        let complaint = self.check.complaint(offset, &buffer);
        let is_right = complaint.is_none();
        let mut text = complaint.unwrap_or_default();
        if self.style != Style::Quiet && self.dump {
            text += &report::dump(offset, &buffer);
        }
        text += &report::transfer(self.style, "read", offset, len, took);
        (text, is_right)
    }
}

pub(super) fn write(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    check_write_flags(session, &parsed)?;
    let pattern = pattern(session, &parsed)?;
    let (offset, len) = offset_and_len(session, &parsed)?;
    if len > MAX_BYTES && !parsed.has("n") {
        let given = &parsed.operands[1];
        let text = format!("length cannot exceed {MAX_BYTES} without -n, given {given}\n");
        return session.fail(&text);
    }
    if parsed.has("b") || parsed.has("c") {
        check_sectors(session, offset, len)?;
    }
    let content = match (parsed.has("z"), parsed.has("c")) {
        _ if parsed.has("b") => Content::VmState(filled(session, &parsed, pattern, len)?),
        (true, _) => Content::Zeros(zero_flags(&parsed)),
        (_, true) => Content::Compressed(filled(session, &parsed, pattern, len)?),
        _ => Content::Plain(filled(session, &parsed, pattern, len)?, write_flags(&parsed)),
    };
    let write = Write { name: "write", style: Style::new(&parsed), content };
    let (text, succeeded) = block_on(write.run(session.disk()?, offset, len));
    session.say(&text)?;
    succeeded.then_some(()).ok_or(Failure::Said)
}

/// Refuses what is no whole sectors.
fn check_sectors(session: &mut Session<'_>, offset: u64, len: u64) -> Done {
    for (value, name) in [(offset, "offset"), (len, "count")] {
        if value % 512 != 0 {
            session.fail(&format!("{value} is not a sector-aligned value for '{name}'\n"))?;
        }
    }
    Ok(())
}

fn check_write_flags(session: &mut Session<'_>, parsed: &Parsed) -> Done {
    let has = |flag: &str| parsed.has(flag);
    let sources = ["z", "P", "s"].into_iter().filter(|flag| has(flag)).count();
    let problem = if has("b") && has("z") {
        "-b and -z cannot be specified at the same time"
    } else if has("f") && (has("b") || has("c")) {
        "-f and -b or -c cannot be specified at the same time"
    } else if has("n") && !has("z") {
        "-n requires -z to be specified"
    } else if has("u") && !has("z") {
        "-u requires -z to be specified"
    } else if sources > 1 {
        "Only one of -z, -P, and -s can be specified at the same time"
    } else {
        return Ok(());
    };
    session.fail(&format!("{problem}\n"))
}

fn zero_flags(parsed: &Parsed) -> ZeroFlags {
    let mut flags = ZeroFlags::empty();
    flags.set(ZeroFlags::FUA, parsed.has("f"));
    flags.set(ZeroFlags::MAY_UNMAP, parsed.has("u"));
    flags.set(ZeroFlags::FAST, parsed.has("n"));
    flags
}

fn write_flags(parsed: &Parsed) -> WriteFlags {
    if parsed.has("f") { WriteFlags::FUA } else { WriteFlags::empty() }
}

/// Makes what is to be written: the pattern, or a file's content again and again.
fn filled(
    session: &mut Session<'_>,
    parsed: &Parsed,
    pattern: Option<u8>,
    len: u64,
) -> std::result::Result<Buffer, Failure> {
    let mut buffer = Buffer::new(len as usize);
    let Some(file) = parsed.last("s") else {
        buffer.fill(pattern.unwrap_or(PATTERN));
        return Ok(buffer);
    };
    match std::fs::read(file) {
        Ok(bytes) if !bytes.is_empty() => {
            for part in buffer.chunks_mut(bytes.len()) {
                part.copy_from_slice(&bytes[..part.len()]);
            }
            Ok(buffer)
        }
        Ok(_) => {
            session.fail(&format!("{file}: file is empty\n"))?;
            Err(Failure::Said)
        }
        Err(error) => {
            let why = crate::verbs::open::of_host(&error);
            session.complain(&format!("{file}: {why}\n"))?;
            Err(Failure::Said)
        }
    }
}

pub(super) fn writev(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    let (content, offset, len) = vector_content(session, &parsed)?;
    let write = Write { name: "writev", style: Style::new(&parsed), content };
    let (text, succeeded) = block_on(write.run(session.disk()?, offset, len));
    session.say(&text)?;
    succeeded.then_some(()).ok_or(Failure::Said)
}

pub(super) fn aio_write(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    if parsed.has("z") && parsed.operands.len() != 2 {
        return session.fail("-z supports only a single length parameter\n");
    }
    if parsed.has("u") && !parsed.has("z") {
        return session.fail("-u requires -z to be specified\n");
    }
    if parsed.has("z") && parsed.has("P") {
        return session.fail("-z and -P cannot be specified at the same time\n");
    }
    if parsed.has("i") {
        return session.say("injecting invalid write request\n");
    }
    let (content, offset, len) = vector_content(session, &parsed)?;
    let write = Write { name: "aio_write", style: Style::new(&parsed), content };
    let disk = session.disk()?;
    session.launch(Box::pin(async move { write.run(disk, offset, len).await.0 }))
}

fn vector_content(
    session: &mut Session<'_>,
    parsed: &Parsed,
) -> std::result::Result<(Content, u64, u64), Failure> {
    let pattern = pattern(session, parsed)?;
    let (offset, len) = offset_and_lens(session, parsed)?;
    let content = match parsed.has("z") {
        true => Content::Zeros(zero_flags(parsed)),
        false => Content::Plain(filled(session, parsed, pattern, len)?, write_flags(parsed)),
    };
    Ok((content, offset, len))
}

/// What is written.
enum Content {
    Compressed(Buffer),
    Plain(Buffer, WriteFlags),
    VmState(Buffer),
    Zeros(ZeroFlags),
}

/// A write and what to say of it.
struct Write {
    /// The name under which it fails.
    name: &'static str,
    style: Style,
    content: Content,
}

impl Write {
    async fn run(self, disk: ToolDisk, offset: u64, len: u64) -> (String, bool) {
        let start = Instant::now();
        let at = GuestOffset(offset);
        let result = match self.content {
            Content::Compressed(buffer) => compress(&disk, at, buffer).await,
            Content::Plain(buffer, flags) => disk.write(at, buffer, flags).await.0,
            Content::VmState(buffer) => match disk.as_qcow2() {
                Some(image) => image.write_vm_state(offset, buffer).await.0,
                None => Err(no_vm_state()),
            },
            Content::Zeros(flags) => disk.write_zeroes(GuestRange::new(at, len), flags).await,
        };
        match result {
            Ok(()) => (report::transfer(self.style, "wrote", offset, len, start.elapsed()), true),
            Err(error) => (format!("{} failed: {}\n", self.name, errno_words(&error)), false),
        }
    }
}

fn no_vm_state() -> Error {
    Error::unsupported("Only images of the format qcow2 have room for the state of a machine")
}

/// Writes cluster by cluster: the engine takes one at a time.
async fn compress(disk: &ToolDisk, start: GuestOffset, mut rest: Buffer) -> Result<()> {
    let unit = disk
        .compressed_unit_bytes()
        .ok_or_else(|| Error::unsupported("The disk cannot store compressed data"))?;
    let mut at = start;
    while !rest.is_empty() {
        let tail = rest.split_off(rest.len().min(unit as usize));
        let len = rest.len() as u64;
        disk.write_compressed(at, rest).await.0?;
        at = at + len;
        rest = tail;
    }
    Ok(())
}

pub(super) fn discard(session: &mut Session<'_>, command: &Command, words: &[String]) -> Done {
    let parsed = session.parse(command, words)?;
    let (offset, len) = offset_and_len(session, &parsed)?;
    if len > MAX_BYTES {
        let given = &parsed.operands[1];
        return session.fail(&format!("length cannot exceed {MAX_BYTES}, given {given}\n"));
    }
    let disk = session.disk()?;
    let start = Instant::now();
    let range = GuestRange::new(GuestOffset(offset), len);
    match block_on(disk.discard(range, DiscardMode::Guest)) {
        Ok(()) => {
            let took = start.elapsed();
            let text = report::transfer(Style::new(&parsed), "discard", offset, len, took);
            session.say(&text)
        }
        Err(error) => session.fail(&format!("discard failed: {}\n", errno_words(&error))),
    }
}

pub(super) fn flush(session: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    let disk = session.disk()?;
    match block_on(disk.flush()) {
        Ok(()) => Ok(()),
        Err(error) => session.report(&format!("flush failed: {}", errno_words(&error))),
    }
}

pub(super) fn aio_flush(session: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    session.wait_for_all()
}
