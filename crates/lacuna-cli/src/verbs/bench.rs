//! `bench`: how long a row of requests takes.
//!
//! * At most `--depth` requests are in flight; their buffers are made once and reused.

use std::io::IsTerminal;
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lacuna::block::{BoxFuture, Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::Access;
use lacuna::storage::CacheMode;
use lacuna::units::GuestOffset;
use pollster::block_on;

use super::open::{self, Request};
use super::spec::tree::TopSpec;
use super::{Example, Task, Verb, common, one_image};
use crate::args::{Flag, Parsed};
use crate::error::{CliError, CliResult, errno_words};
use crate::nodes::ToolDisk;
use crate::output;
use crate::persona::Tool;
use crate::size::within;

/// What buffers may take together.
const MOST_BUFFER_BYTES: u64 = 16 << 30;
/// The largest number most options take.
const MOST: u64 = i32::MAX as u64;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "bench",
    task: Task::About,
    summary: "Measure how fast requests are",
    operands: "FILENAME",
    flags: &[
        common::QUIET,
        common::FORMAT,
        common::IMAGE_OPTS,
        Flag::valued('t', "cache", "MODE", "cache mode of the host (writeback)"),
        Flag::valued('c', "count", "COUNT", "number of requests (75000)"),
        Flag::valued('s', "buffer-size", "SIZE", "size of a request (4k)"),
        Flag::valued('d', "depth", "DEPTH", "requests in flight (64)"),
        Flag::valued('o', "offset", "OFFSET", "where the first request starts (0)"),
        Flag::valued('S', "step-size", "SIZE", "from one start to the next (size of a request)"),
        Flag::valued('i', "aio", "MODE", "threads, native or io_uring: changes nothing"),
        Flag::switch('n', "native", "as -i native"),
        Flag::switch('w', "write", "write (reads without)"),
        Flag::valued('\0', "pattern", "BYTE", "what to write (0)").long_only(),
        Flag::valued('\0', "flush-interval", "COUNT", "flush after so many requests").long_only(),
        Flag::switch('\0', "no-drain", "go on while a flush runs").long_only(),
        common::FORCE_SHARE,
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example { shows: "read 1000 times 64 KiB in a row", line: "-c 1000 -s 64k disk.qcow2" },
        Example {
            shows: "write, four at a time, with a flush after every 16",
            line: "-w -c 64 -d 4 --flush-interval 16 disk.qcow2",
        },
    ],
    codes: &[],
    run,
};

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let wish = Wish::new(parsed)?;
    let name = one_image(parsed)?;
    if parsed.has("image-opts") && parsed.has("format") {
        return Err(CliError::new("--image-opts and --format are mutually exclusive"));
    }
    let request = wish.request(parsed, name)?;
    let chain = open::open(tool, &request)?;
    open::warn_of_guess(&request, &chain);
    // What C programs write to a pipe comes after their errors.
    let comes_late = !tool.is_own() && !std::io::stdout().is_terminal();
    let (early, late) = match comes_late {
        false => (wish.announced(), String::new()),
        true => (String::new(), wish.announced()),
    };
    output::print(&early)?;
    let start = Instant::now();
    let result = block_on(wish.send(chain.disk()));
    result.map_err(|error| {
        let text = format!("Failed request: {}", errno_words(&error));
        CliError::new(text).with_output(late.clone())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    output::print(&format!("{late}Run completed in {seconds:3.3} seconds.\n"))?;
    if tool.is_own() {
        output::print(&wish.rates(seconds))?;
    }
    block_on(chain.into_disk().close())?;
    Ok(0)
}

/// What the command line asks for.
struct Wish {
    count: u64,
    size_bytes: u64,
    depth: u64,
    offset: u64,
    step: u64,
    writes: bool,
    pattern: u8,
    flush_interval: u64,
    drains: bool,
    cache: CacheMode,
    is_native: bool,
}

impl Wish {
    fn new(parsed: &Parsed) -> CliResult<Self> {
        let cache = match parsed.last("cache") {
            None => CacheMode::Buffered,
            Some(mode) => {
                open::cache_mode(mode).ok_or_else(|| CliError::new("Invalid cache mode"))?
            }
        };
        if let Some(mode) = parsed.last("aio")
            && !["threads", "native", "io_uring"].contains(&mode)
        {
            return Err(CliError::new(format!("Invalid aio option: {mode}")));
        }
        let number = |flag, shown, least, most| number(parsed, flag, shown, least, most);
        let size_bytes = number("buffer-size", "buffer size", 1, MOST)?.unwrap_or(4096);
        let wish = Self {
            count: number("count", "request count", 1, MOST)?.unwrap_or(75_000),
            size_bytes,
            depth: number("depth", "queue depth", 1, MOST)?.unwrap_or(64),
            offset: number("offset", "offset", 0, i64::MAX as u64)?.unwrap_or(0),
            step: number("step-size", "step size", 0, MOST)?
                .filter(|step| *step > 0)
                .unwrap_or(size_bytes),
            writes: parsed.has("write"),
            pattern: number("pattern", "pattern byte", 0, 255)?.unwrap_or(0) as u8,
            flush_interval: number("flush-interval", "flush interval", 0, MOST)?.unwrap_or(0),
            drains: !parsed.has("no-drain"),
            cache,
            is_native: parsed.has("native") || parsed.last("aio") == Some("native"),
        };
        wish.check().map(|()| wish)
    }

    fn check(&self) -> CliResult<()> {
        let in_flight = self.depth.min(self.count);
        if self.flush_interval > 0 && !self.writes {
            Err(CliError::new("--flush-interval is only available in write tests"))
        } else if self.flush_interval > 0 && self.flush_interval < self.depth {
            Err(CliError::new("Flush interval can't be smaller than depth"))
        } else if in_flight.saturating_mul(self.size_bytes) > MOST_BUFFER_BYTES {
            Err(CliError::new(format!(
                "{in_flight} requests of {} bytes need more than {} GiB of buffers",
                self.size_bytes,
                MOST_BUFFER_BYTES >> 30
            )))
        } else {
            Ok(())
        }
    }

    fn request(&self, parsed: &Parsed, name: &str) -> CliResult<Request> {
        let access = if self.writes { Access::ReadWrite } else { Access::ReadOnly };
        let reading = Request::reading(name, parsed, "format")?;
        let native = open::check_native(self.is_native, self.cache);
        native.map_err(|error| open::cannot_open(name, error))?;
        let mut request = Request { access, cache: self.cache, ..reading };
        if self.writes && parsed.last("cache").is_some_and(open::writes_through) {
            request.image.disk.tops.push(TopSpec::WriteThrough);
        }
        Ok(request)
    }

    fn announced(&self) -> String {
        let kind = if self.writes { "write" } else { "read" };
        let mut text = format!(
            "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, \
             step size {})\n",
            self.count, self.size_bytes, self.depth, self.offset, self.step
        );
        if self.flush_interval > 0 {
            text += &format!("Sending flush every {} requests\n", self.flush_interval);
        }
        text
    }

    fn rates(&self, seconds: f64) -> String {
        let seconds = seconds.max(1e-9);
        let requests = self.count as f64 / seconds;
        let bytes = output::io_size(requests * self.size_bytes as f64);
        format!("{requests:.0} requests/s, {bytes}/s\n")
    }

    /// Sends all requests, the starts of which wrap at the end of the disk.
    async fn send(&self, disk: &ToolDisk) -> lacuna::Result<()> {
        let mut in_flight = FuturesUnordered::new();
        let mut spare: Vec<Buffer> = Vec::new();
        let (mut offset, mut sent, mut done) = (self.offset, 0, 0);
        let size = disk.size_bytes();
        while done < self.count {
            let may_send = !self.is_flush_due(sent, done);
            if may_send && sent < self.count && sent - done < self.depth {
                let buffer = spare.pop().unwrap_or_else(|| self.buffer());
                in_flight.push(self.transfer(disk, offset, buffer));
                sent += 1;
                offset = offset.saturating_add(self.step).checked_rem(size).unwrap_or(0);
                continue;
            }
            let Some(answer) = in_flight.next().await else { break };
            let Some(buffer) = answer? else { continue };
            spare.push(buffer);
            done += 1;
            if self.flush_interval > 0 && done.is_multiple_of(self.flush_interval) {
                match self.drains {
                    true => disk.flush().await?,
                    false => in_flight.push(flush(disk)),
                }
            }
        }
        while let Some(answer) = in_flight.next().await {
            answer?;
        }
        Ok(())
    }

    /// Nothing is sent past a flush that waits for all requests before it.
    fn is_flush_due(&self, sent: u64, done: u64) -> bool {
        self.drains
            && self.flush_interval > 0
            && sent > done
            && sent.is_multiple_of(self.flush_interval)
    }

    fn buffer(&self) -> Buffer {
        let mut buffer = Buffer::zeroed(self.size_bytes as usize);
        if self.pattern != 0 {
            buffer.fill(self.pattern);
        }
        buffer
    }

    fn transfer<'a>(
        &self,
        disk: &'a ToolDisk,
        offset: u64,
        buffer: Buffer,
    ) -> BoxFuture<'a, lacuna::Result<Option<Buffer>>> {
        let (at, writes) = (GuestOffset(offset), self.writes);
        Box::pin(async move {
            let (result, buffer) = match writes {
                true => disk.write(at, buffer, WriteFlags::empty()).await,
                false => disk.read(at, buffer).await,
            };
            result.map(|()| Some(buffer))
        })
    }
}

fn flush(disk: &ToolDisk) -> BoxFuture<'_, lacuna::Result<Option<Buffer>>> {
    Box::pin(async move { disk.flush().await.map(|()| None) })
}

fn number(
    parsed: &Parsed,
    flag: &str,
    shown: &str,
    least: u64,
    most: u64,
) -> CliResult<Option<u64>> {
    parsed.last(flag).map(|text| within(shown, text, least, most)).transpose()
}
