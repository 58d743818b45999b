//! How far a job is: QEMU's `(12.00/100%)`, a bar on a terminal, lines, or JSON lines.
//!
//! JSON lines go to standard error, one object a line:
//!
//! `{"job":"convert","state":"running","phase":"copy","done":65536,"total":1048576,`
//! `"unit":"bytes","bytes_per_second":123456,"seconds":0.5}`
//!
//! * The first comes when the job knows its size, and each phase begins with one; between those at
//!   least 200 ms pass from line to line.
//! * The last has the `state` `done` or `failed`, and repeats how far the job came. A job that was
//!   killed has none.
//! * `bytes_per_second` is the mean since the job began, and `null` where the unit is no byte.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lacuna::job::{Phase, Progress};
use signal_hook::consts::SIGUSR1;

use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::output;
use crate::persona::Tool;

/// The least time between two JSON lines of a phase.
const JSON_EVERY: Duration = Duration::from_millis(200);

/// Tells the user how far a job is. One that is dropped without [`Meter::finish`] has failed.
pub(crate) struct Meter {
    display: Display,
    job: &'static str,
    unit: &'static str,
    start: Instant,
    reached: Reached,
    is_over: bool,
}

/// The last report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reached {
    phase: &'static str,
    done: u64,
    total: u64,
}

enum Display {
    Bar(ProgressBar),
    Json {
        last: Option<Instant>,
    },
    /// Tenths that were shown.
    Lines {
        tenths: u64,
    },
    Percent {
        last: f64,
    },
    /// When somebody asks by SIGUSR1.
    OnRequest(Arc<AtomicBool>),
}

impl Meter {
    /// Chooses by `-p`, `--progress`, `-q`, the name of the program and where stderr goes.
    pub(crate) fn new(tool: &Tool, parsed: &Parsed, job: &'static str) -> CliResult<Self> {
        let is_terminal = std::io::stderr().is_terminal();
        let display = match parsed.last("progress") {
            _ if parsed.has("quiet") => on_request(),
            Some("json") => Display::Json { last: None },
            Some("") if !tool.is_own() => first_percent(),
            Some("") if !is_terminal => Display::Lines { tenths: 0 },
            Some("none") => on_request(),
            None if !tool.is_own() || !is_terminal => on_request(),
            None | Some("") => Display::Bar(bar()),
            Some(other) => {
                let text = format!("--progress expects nothing, 'json' or 'none' not '{other}'");
                return Err(CliError::usage(text));
            }
        };
        let reached = Reached { phase: "start", done: 0, total: 0 };
        Ok(Self { display, job, unit: "bytes", start: Instant::now(), reached, is_over: false })
    }

    /// Makes it count something else than bytes.
    pub(crate) fn counting(mut self, unit: &'static str) -> Self {
        if let Display::Bar(bar) = &self.display {
            bar.set_style(style("{msg} {bar:30} {percent:>3}%"));
        }
        self.unit = unit;
        self
    }

    /// Shows how far a copy of a disk is.
    pub(crate) fn show_copy(&mut self, progress: &Progress) {
        let phase = match progress.phase {
            Phase::Copy => "copy",
            Phase::Flush => "flush",
        };
        self.update(phase, progress.done_bytes, progress.total_bytes);
    }

    /// Takes note of `done` of `total` bytes, or what else is counted.
    pub(crate) fn update(&mut self, phase: &'static str, done: u64, total: u64) {
        let is_new = phase != self.reached.phase;
        self.reached = Reached { phase, done, total };
        let percent = self.reached.percent();
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                if is_new {
                    bar.set_message(phase);
                }
            }
            Display::Json { last } => {
                if is_new || last.is_none_or(|last| last.elapsed() >= JSON_EVERY) {
                    *last = Some(Instant::now());
                    self.json_line("running");
                }
            }
            Display::Lines { tenths } => {
                let now = (percent / 10.0) as u64;
                if is_new || now > *tenths {
                    *tenths = now;
                    output::complain(&format!("{}: {phase} {}%\n", self.job, now * 10));
                }
            }
            Display::Percent { last } => {
                if percent - *last >= 1.0 || (percent == 100.0 && *last < percent) {
                    *last = percent;
                    show_percent(percent);
                }
            }
            Display::OnRequest(asked) => {
                if asked.swap(false, Ordering::Relaxed) {
                    output::complain(&format!("    ({percent:.2}/100%)\n"));
                }
            }
        }
    }

    /// Ends the display.
    pub(crate) fn finish(mut self, succeeded: bool) {
        self.end(succeeded);
    }

    fn end(&mut self, succeeded: bool) {
        self.is_over = true;
        match &self.display {
            Display::Bar(bar) => bar.finish_and_clear(),
            Display::Json { .. } => self.json_line(if succeeded { "done" } else { "failed" }),
            Display::Percent { .. } => {
                // Stock ends with this line once more; a comparison may end anywhere.
                if succeeded && self.job != "compare" {
                    show_percent(100.0);
                }
                // Whatever the verb says or complains of comes before the end of the line.
                output::print_at_the_end("\n");
            }
            Display::Lines { .. } | Display::OnRequest(_) => {}
        }
    }

    fn json_line(&self, state: &str) {
        let Reached { phase, done, total } = self.reached;
        let seconds = self.start.elapsed().as_secs_f64();
        let rate = if seconds > 0.0 { done as f64 / seconds } else { 0.0 };
        let line = serde_json::json!({
            "job": self.job,
            "state": state,
            "phase": phase,
            "done": done,
            "total": total,
            "unit": self.unit,
            "bytes_per_second": (self.unit == "bytes").then_some(rate as u64),
            "seconds": (seconds * 1000.0).round() / 1000.0,
        });
        output::complain(&format!("{line}\n"));
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if !self.is_over {
            self.end(false);
        }
    }
}

impl Reached {
    fn percent(&self) -> f64 {
        if self.total == 0 { 100.0 } else { self.done as f64 / self.total as f64 * 100.0 }
    }
}

/// SIGUSR1 ends programs that do not expect it; stock programs answer it in long verbs.
fn on_request() -> Display {
    let asked = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(SIGUSR1, Arc::clone(&asked)) {
        output::warn(&format!("SIGUSR1 cannot be answered: {error}"));
    }
    Display::OnRequest(asked)
}

fn first_percent() -> Display {
    show_percent(0.0);
    Display::Percent { last: 0.0 }
}

fn bar() -> ProgressBar {
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style(
        "{msg} {bar:30} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
    ))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn show_percent(percent: f64) {
    let mut stdout = std::io::stdout().lock();
    drop(write!(stdout, "    ({percent:.2}/100%)\r").and_then(|()| stdout.flush()));
}
