//! A bound on bytes per second, kept by waiting.

use std::time::{Duration, Instant};

use crate::args::{Flag, Parsed};
use crate::error::CliResult;
use crate::interrupt::Interrupted;
use crate::size;

/// What verbs with such a bound offer.
pub(crate) const BANDWIDTH: Flag =
    Flag::valued('\0', "bandwidth", "BYTES", "read and write at most so much per second")
        .long_only();

/// Longest single wait, so that an interruption is noticed.
const LONGEST: Duration = Duration::from_millis(100);

/// Holds work back to a rate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    bytes_per_second: Option<u64>,
    start: Instant,
    done_bytes: u64,
}

/// Reads `-r`: bytes per second, or nothing for no limit.
pub(crate) fn rate(parsed: &Parsed) -> CliResult<Option<u64>> {
    let Some(text) = parsed.last("rate") else { return Ok(None) };
    let rate = size::within("rate limit", text, 0, i64::MAX as u64)?;
    Ok(Some(rate).filter(|rate| *rate > 0))
}

impl Pace {
    /// Reads `--bandwidth`; without one nothing waits.
    pub(crate) fn read(parsed: &Parsed) -> CliResult<Self> {
        let bound = parsed.last(BANDWIDTH.long);
        let bound = bound.map(|text| size::within(BANDWIDTH.long, text, 1, 1 << 62)).transpose()?;
        Ok(Self::at(bound))
    }

    /// Holds work back to so many bytes per second, or not at all.
    pub(crate) fn at(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, start: Instant::now(), done_bytes: 0 }
    }

    /// Takes note of how many bytes were moved in all since the start, and waits.
    pub(crate) fn keep_up_to(&mut self, done_bytes: u64, interrupted: &Interrupted) {
        let more_bytes = done_bytes.saturating_sub(self.done_bytes);
        self.keep(more_bytes, interrupted);
    }

    /// Returns how much to do at once, `most` at most: where it is to be slow, a quarter of a second.
    pub(crate) fn slice_bytes(&self, most: u64) -> u64 {
        self.bytes_per_second.map_or(most, |bound| (bound / 4).min(most))
    }

    /// Begins to count anew.
    pub(crate) fn restart(&mut self) {
        (self.start, self.done_bytes) = (Instant::now(), 0);
    }

    /// Takes note of more bytes, and waits until all since the start fit the bound.
    pub(crate) fn keep(&mut self, more_bytes: u64, interrupted: &Interrupted) {
        self.done_bytes += more_bytes;
        while !interrupted.is_so()
            && let Some(rest) = self.due().checked_sub(self.start.elapsed())
            && !rest.is_zero()
        {
            std::thread::sleep(rest.min(LONGEST));
        }
    }

    /// Returns how long all that was moved should have taken.
    fn due(&self) -> Duration {
        self.bytes_per_second.map_or(Duration::ZERO, |bound| due(self.done_bytes, bound))
    }
}

/// Returns how long so many bytes take at a rate above zero.
pub(crate) fn due(bytes: u64, bytes_per_second: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_second);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_moved_is_due_by_the_rate_and_at_once_without_one() {
        let pace = |bytes_per_second| Pace {
            bytes_per_second,
            start: Instant::now(),
            done_bytes: 3 << 20,
        };
        assert_eq!(pace(Some(1 << 20)).due(), Duration::from_secs(3));
        assert_eq!(pace(None).due(), Duration::ZERO);
        assert_eq!(pace(Some(1 << 20)).slice_bytes(8 << 20), 1 << 18);
    }
}
