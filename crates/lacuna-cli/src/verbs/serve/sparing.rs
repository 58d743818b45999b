//! Lines about clients, few enough that none of them can fill a log.

use std::time::{Duration, Instant};

/// So many lines in one period.
const MOST: u32 = 10;
const PERIOD: Duration = Duration::from_secs(10);

/// What was said in the present period.
#[derive(Debug, Default)]
pub(super) struct Sparing {
    since: Option<Instant>,
    said: u32,
    unsaid: u64,
}

/// What is to be said about one more client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Say {
    Nothing,
    /// The line, behind how many were left out before it.
    Line {
        left_out: u64,
    },
}

impl Sparing {
    pub(super) const fn new() -> Self {
        Self { since: None, said: 0, unsaid: 0 }
    }

    pub(super) fn one_more(&mut self, now: Instant) -> Say {
        if self.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            (self.since, self.said) = (Some(now), 0);
        }
        if self.said == MOST {
            self.unsaid += 1;
            return Say::Nothing;
        }
        self.said += 1;
        Say::Line { left_out: std::mem::take(&mut self.unsaid) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_ten_lines_and_the_next_one_says_how_many_were_left_out() {
        let (mut sparing, start) = (Sparing::new(), Instant::now());
        let mut said = |seconds| sparing.one_more(start + Duration::from_secs(seconds));
        for _ in 0..MOST {
            assert_eq!(said(0), Say::Line { left_out: 0 });
        }
        assert_eq!([said(1), said(9), said(9)], [Say::Nothing; 3]);
        assert_eq!(said(10), Say::Line { left_out: 3 });
        assert_eq!(said(11), Say::Line { left_out: 0 });
    }
}
