//! How far a job is: QEMU's `(12.00/100%)`, a bar on a terminal, or JSON lines.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;

/// Tells the user how far a job is.
pub(super) enum Meter {
    Bar(ProgressBar),
    Json { verb: &'static str, start: Instant, last: Option<Instant> },
    Percent { last: f64 },
    Silent,
}

/// The least time between two JSON lines.
const JSON_EVERY: Duration = Duration::from_millis(200);

impl Meter {
    /// Chooses by `-p`, `--progress=json`, `-q`, the name of the program and where stderr goes.
    pub(super) fn new(tool: &Tool, parsed: &Parsed, verb: &'static str) -> CliResult<Self> {
        match parsed.last("progress") {
            _ if parsed.has("quiet") => Ok(Self::Silent),
            Some("json") => Ok(Self::Json { verb, start: Instant::now(), last: None }),
            Some("") if !tool.is_own() => Ok(Self::first_percent()),
            None if !tool.is_own() || !std::io::stderr().is_terminal() => Ok(Self::Silent),
            None | Some("") => Ok(Self::Bar(bar())),
            Some(other) => {
                Err(CliError::usage(format!("--progress expects nothing or 'json' not '{other}'")))
            }
        }
    }

    fn first_percent() -> Self {
        show_percent(0.0);
        Self::Percent { last: 0.0 }
    }

    /// Takes note of `done` of `total` bytes.
    pub(super) fn update(&mut self, phase: &str, done: u64, total: u64) {
        match self {
            Self::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Self::Json { verb, start, last } => {
                if done == total || last.is_none_or(|last| last.elapsed() >= JSON_EVERY) {
                    *last = Some(Instant::now());
                    let line = json_line(verb, phase, done, total, start.elapsed());
                    output::complain(&line);
                }
            }
            Self::Percent { last } => {
                let now = if total == 0 { 100.0 } else { done as f64 / total as f64 * 100.0 };
                if now - *last >= 1.0 || (now == 100.0 && *last < now) {
                    *last = now;
                    show_percent(now);
                }
            }
            Self::Silent => {}
        }
    }

    /// Ends the display; what comes next starts on a line of its own.
    pub(super) fn finish(self, succeeded: bool) {
        match self {
            Self::Bar(bar) => bar.finish_and_clear(),
            Self::Percent { .. } => {
                if succeeded {
                    show_percent(100.0);
                }
                drop(std::io::stdout().write_all(b"\n"));
            }
            Self::Json { .. } | Self::Silent => {}
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = "{bar:30} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn show_percent(percent: f64) {
    let mut stdout = std::io::stdout().lock();
    drop(write!(stdout, "    ({percent:.2}/100%)\r").and_then(|()| stdout.flush()));
}

fn json_line(verb: &str, phase: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let rate = if seconds > 0.0 { done as f64 / seconds } else { 0.0 };
    let line = serde_json::json!({
        "job": verb,
        "phase": phase,
        "done": done,
        "total": total,
        "bytes_per_second": rate as u64,
    });
    format!("{line}\n")
}
