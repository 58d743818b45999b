//! The steps on the opened image, in order, for real or as an estimate.

use std::time::Instant;

use lacuna::job::{SweepProgress, sweep, sweep_estimate};
use lacuna::qcow2::{
    CompactOptions, CompactOrder, CompactPhase, CompactProgress, KeptMapping, compact_estimate,
};
use pollster::block_on;

use super::guest;
use super::report::{Report, Step};
use crate::error::CliResult;
use crate::interrupt::{Interrupted, interrupted_in_place};
use crate::nodes::AnyStorage;
use crate::verbs::dedup::{in_place, would_free};
use crate::verbs::open::FileChain;
use crate::verbs::pace::Pace;
use crate::verbs::progress::Meter;

/// What every step works with.
pub(super) struct Work {
    pub(super) pace: Pace,
    pub(super) meter: Meter,
    pub(super) interrupted: Interrupted,
    /// For each step.
    pub(super) memory_bytes: u64,
    pub(super) dedups: bool,
    pub(super) kept_mapping: KeptMapping,
    pub(super) order: CompactOrder,
    pub(super) is_dry: bool,
}

type Image = lacuna::qcow2::Image<AnyStorage>;

/// Runs the steps that go through the disk, and closes the image.
pub(super) fn opened(chain: FileChain, work: &mut Work, report: &mut Report) -> CliResult<()> {
    report.guests = guest::look(chain.disk());
    let done = through_the_disk(&chain, work, report);
    // The image is closed in any case; the first error is the one to tell.
    let closed = block_on(chain.into_disk().close());
    done?;
    Ok(closed?)
}

fn through_the_disk(chain: &FileChain, work: &mut Work, report: &mut Report) -> CliResult<()> {
    let Some(image) = chain.disk().as_qcow2() else { return Ok(()) };
    report.steps.push(sweeping(image, work)?);
    if work.dedups {
        report.steps.push(match work.is_dry {
            true => counting_equals(chain, work)?,
            false => sharing(image, work)?,
        });
    }
    Ok(())
}

/// Zeros that are stored become zeros that the map tells of.
fn sweeping(image: &Image, work: &mut Work) -> CliResult<Step> {
    let start = Instant::now();
    work.pace.restart();
    let Work { pace, meter, interrupted, is_dry, .. } = work;
    let mut before = 0;
    let mut progress = |progress: SweepProgress| {
        meter.update("zeros", progress.done_bytes, progress.total_bytes);
        pace.keep(progress.read_bytes - before, interrupted);
        before = progress.read_bytes;
    };
    let done = match is_dry {
        true => block_on(interrupted.or(sweep_estimate(image, &mut progress))),
        false => block_on(interrupted.or(sweep(image, &mut progress))),
    };
    let swept = done.ok_or_else(interrupted_in_place)??;
    Ok(Step {
        freed_bytes: swept.freed_bytes,
        zeroed_bytes: swept.zeroed_bytes,
        read_bytes: swept.read_bytes,
        seconds: start.elapsed().as_secs_f64(),
        ..Step::nothing("zeros")
    })
}

/// Equal clusters share a place.
fn sharing(image: &Image, work: &mut Work) -> CliResult<Step> {
    let start = Instant::now();
    work.pace.restart();
    let mut dedup = in_place::begin(image, work.memory_bytes, &work.pace)?;
    let Work { pace, meter, interrupted, .. } = work;
    let run = in_place::run_through(&mut dedup, pace, meter, interrupted)?;
    if !run.is_whole {
        return Err(interrupted_in_place());
    }
    let done = dedup.so_far();
    Ok(Step {
        freed_bytes: done.freed_bytes,
        shared_clusters: done.shared,
        read_bytes: run.read_bytes,
        written_bytes: done.keepers * image.geometry().cluster_bytes(),
        seconds: start.elapsed().as_secs_f64(),
        ..Step::nothing("dedup")
    })
}

/// Tells what sharing would free.
fn counting_equals(chain: &FileChain, work: &mut Work) -> CliResult<Step> {
    let start = Instant::now();
    let freed_bytes = would_free(chain, work.memory_bytes, &mut work.meter)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Step { freed_bytes, seconds, ..Step::nothing("dedup") })
}

/// The file gets shorter. The image is for nobody else meanwhile, and closed afterwards.
pub(super) fn compacting(chain: &FileChain, work: &mut Work, report: &mut Report) -> CliResult<()> {
    let Some(image) = chain.disk().as_qcow2() else { return Ok(()) };
    let step = match work.is_dry {
        true => estimated(image, work, report)?,
        false => compacted(image, work, report)?,
    };
    report.steps.push(step);
    match work.interrupted.is_so() {
        true => Err(interrupted_in_place()),
        false => Ok(()),
    }
}

fn compacted(image: &Image, work: &mut Work, report: &mut Report) -> CliResult<Step> {
    let start = Instant::now();
    work.pace.restart();
    let options = options(work);
    let Work { pace, meter, interrupted, .. } = work;
    let mut before = 0;
    let mut progress = |progress: CompactProgress| {
        if progress.phase == CompactPhase::Survey {
            return meter.update("survey", progress.done, progress.total);
        }
        meter.update("move", progress.done, progress.total);
        pace.keep(progress.done.saturating_sub(before), interrupted);
        before = progress.done;
    };
    let done = block_on(image.clone().compact(&options, &mut progress))?;
    report.extents = done.extents;
    Ok(Step {
        shortened_bytes: done.before_bytes.saturating_sub(done.after_bytes),
        read_bytes: done.moved_bytes,
        written_bytes: done.moved_bytes + done.metadata_bytes,
        seconds: start.elapsed().as_secs_f64(),
        ..Step::nothing("compact")
    })
}

/// Tells what compacting would do after the other steps. What they free leaves more to be moved, and
/// nobody knows yet how much more: the figure is the most.
fn estimated(image: &Image, work: &Work, report: &mut Report) -> CliResult<Step> {
    let found = block_on(compact_estimate(image.storage(), &options(work)))?;
    report.extents = found.extents;
    let freed = report.freed_use_bytes();
    let goal_bytes = found.goal_bytes.saturating_sub(freed);
    let moved_bytes = found.moved_bytes.saturating_add(freed).min(goal_bytes);
    Ok(Step {
        shortened_bytes: found.before_bytes.saturating_sub(goal_bytes),
        read_bytes: moved_bytes,
        written_bytes: moved_bytes,
        seconds: report.seconds_for(moved_bytes.saturating_mul(2)),
        ..Step::nothing("compact")
    })
}

fn options(work: &Work) -> CompactOptions {
    CompactOptions {
        memory_bytes: work.memory_bytes,
        kept_mapping: work.kept_mapping,
        order: work.order,
        stop: Some(work.interrupted.flag()),
        ..CompactOptions::default()
    }
}
