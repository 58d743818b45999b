//! The options of `blkdebug`: limits, and rules about when what fails or waits.

use std::io::Read as _;
use std::path::Path;

use super::keys::{Keys, Scalar};
use crate::error::{CliError, CliResult};
use crate::verbs::open::of_host;

/// All events that rules may name. Rules for those that the engine does not tell of never apply.
const EVENTS: [&str; 47] = [
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
];

/// What is done to requests of which kind.
const IO_TYPES: [&str; 6] = ["read", "write", "write-zeroes", "discard", "flush", "block-status"];

/// Instead of an event: in force from the start.
pub(crate) const ALWAYS: &str = "none";

/// What is read of a file with rules.
const MOST_CONFIG_BYTES: u64 = 1 << 20;

/// The kinds of rules.
const SECTIONS: [&str; 2] = ["inject-error", "set-state"];

/// Returns the event of that name.
pub(crate) fn event(name: &str) -> Option<&'static str> {
    EVENTS.into_iter().find(|event| *event == name)
}

/// Largest sizes of requests, and how they are to be aligned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    align: u64,
    max_transfer: u64,
    opt_write_zero: u64,
    max_write_zero: u64,
    opt_discard: u64,
    max_discard: u64,
}

impl Limits {
    fn take(keys: &mut Keys) -> CliResult<Self> {
        let mut size = |key| keys.take_size(key).map(Option::unwrap_or_default);
        let limits = Self {
            align: size("align")?,
            max_transfer: size("max-transfer")?,
            opt_write_zero: size("opt-write-zero")?,
            max_write_zero: size("max-write-zero")?,
            opt_discard: size("opt-discard")?,
            max_discard: size("max-discard")?,
        };
        limits.check()?;
        Ok(limits)
    }

    fn check(&self) -> CliResult<()> {
        const MOST: u64 = i32::MAX as u64;
        let align = self.align.max(1);
        let is_power = self.align == 0 || self.align.is_power_of_two();
        for (name, value, step, is_fine) in [
            ("align", self.align, 1, is_power),
            ("max-transfer", self.max_transfer, align, true),
            ("opt-write-zero", self.opt_write_zero, align, true),
            ("max-write-zero", self.max_write_zero, align.max(self.opt_write_zero), true),
            ("opt-discard", self.opt_discard, align, true),
            ("max-discard", self.max_discard, align.max(self.opt_discard), true),
        ] {
            if value >= MOST || value % step != 0 || !is_fine {
                return Err(CliError::new(format!("Cannot meet constraints with {name} {value}")));
            }
        }
        Ok(())
    }

    /// Returns the alignment that requests should have.
    pub(crate) fn align(&self) -> u64 {
        self.align.max(1)
    }

    /// Cuts a transfer.
    pub(crate) fn transfers(&self, start: u64, len: u64) -> Vec<(u64, u64)> {
        pieces(start, len, self.max_transfer, start)
    }

    /// Cuts a range to be zeroed, and says of each piece whether it is large enough to be zeroed
    /// as such; others are written as bytes.
    pub(crate) fn zeroes(&self, start: u64, len: u64) -> Vec<(u64, u64, bool)> {
        let align = self.opt_write_zero.max(1);
        let head = (start.next_multiple_of(align) - start).min(len);
        let tail = (len - head) % align;
        let middle = pieces(start + head, len - head - tail, self.max_write_zero, 0);
        let mut all = pieces(start, head, self.max_transfer, start);
        all.extend(middle);
        all.extend(pieces(start + len - tail, tail, self.max_transfer, start + len - tail));
        all.into_iter().map(|(start, len)| (start, len, len >= self.opt_write_zero)).collect()
    }

    /// Cuts a range to be discarded.
    pub(crate) fn discards(&self, start: u64, len: u64) -> Vec<(u64, u64)> {
        pieces(start, len, self.max_discard, 0)
    }
}

/// Cuts a range where multiples of `most` lie, counted from `origin`; 0 cuts nowhere.
fn pieces(start: u64, len: u64, most: u64, origin: u64) -> Vec<(u64, u64)> {
    let mut pieces = Vec::new();
    let (mut at, mut rest) = (start, len);
    while rest > 0 {
        let piece = match most {
            0 => rest,
            most => rest.min(most - (at - origin) % most),
        };
        pieces.push((at, piece));
        at = at.saturating_add(piece);
        rest -= piece;
    }
    pieces
}

/// What happens at an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) event: &'static str,
    /// The state in which it applies; 0 is any.
    pub(crate) state: u64,
    pub(crate) action: Action,
}

/// See [`Rule`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The next requests fail.
    Fail(Fault),
    SetState(u64),
    /// The request waits until the tag is resumed.
    Suspend(String),
}

/// Which requests fail, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) errno: i32,
    /// Only those that touch this byte.
    pub(crate) offset: Option<u64>,
    /// Only the first.
    pub(crate) once: bool,
    /// Only of this kind.
    pub(crate) io_type: Option<&'static str>,
}

/// All options of a debug driver but what it stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DebugSpec {
    pub(crate) config: String,
    pub(crate) limits: Limits,
    pub(crate) rules: Vec<Rule>,
}

impl DebugSpec {
    /// Takes its options out of `keys`; `config` is a file with rules, or empty.
    pub(crate) fn take(keys: &mut Keys, config: Option<String>) -> CliResult<Self> {
        let config = keys.take_text("config").or(config).unwrap_or_default();
        let mut rules = match config.is_empty() {
            true => Vec::new(),
            false => rules_in_file(Path::new(&config))?,
        };
        for section in SECTIONS {
            for options in keys.take_list(section) {
                rules.push(rule(section, options, |left| {
                    format!("[{section}] section doesn't support the option '{left}'")
                })?);
            }
        }
        keys.take("take-child-perms");
        keys.take("unshare-child-perms");
        Ok(Self { config, limits: Limits::take(keys)?, rules })
    }

    /// Says whether nothing but the name of a file with rules was given.
    pub(crate) fn has_only_config(&self) -> bool {
        self.limits == Limits::default() && (self.rules.is_empty() || !self.config.is_empty())
    }
}

/// Reads a rule; `left` words what no rule has.
fn rule(section: &str, mut keys: Keys, left: impl Fn(&str) -> String) -> CliResult<Rule> {
    let name = keys.take_text("event");
    let name = name.ok_or_else(|| CliError::new("Missing event name for rule"))?;
    let event = event(&name).or_else(|| (name == ALWAYS).then_some(ALWAYS));
    let event = event.ok_or_else(|| invalid(&name))?;
    let state = keys.take_number("state")?.unwrap_or(0);
    let action = match section {
        "set-state" => Action::SetState(keys.take_number("new_state")?.unwrap_or(0)),
        _ => Action::Fail(Fault::take(&mut keys)?),
    };
    match keys.first() {
        None => Ok(Rule { event, state, action }),
        Some(key) => Err(CliError::new(left(key))),
    }
}

impl Fault {
    fn take(keys: &mut Keys) -> CliResult<Self> {
        const EIO: u64 = 5;
        let errno = keys.take_number("errno")?.unwrap_or(EIO);
        let sector = keys.take_number("sector")?.filter(|sector| *sector != u64::MAX);
        let once = keys.take_switch("once")?.unwrap_or(false);
        // Nothing is delayed here.
        keys.take_switch("immediately")?;
        let io_type = match keys.take_text("iotype") {
            None => None,
            Some(name) => {
                let known = IO_TYPES.into_iter().find(|known| **known == *name);
                Some(known.ok_or_else(|| invalid(&name))?)
            }
        };
        Ok(Self {
            errno: i32::try_from(errno).unwrap_or(EIO as i32),
            offset: sector.map(|sector| sector.saturating_mul(512)),
            once,
            io_type,
        })
    }
}

fn invalid(value: &str) -> CliError {
    CliError::new(format!("invalid parameter value: {value}"))
}

/// Reads a file of sections `[kind]` with lines `key = "value"`.
fn rules_in_file(path: &Path) -> CliResult<Vec<Rule>> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map(|file| file.take(MOST_CONFIG_BYTES));
    file.and_then(|mut file| file.read_to_string(&mut text)).map_err(|error| {
        CliError::new(format!("Could not read blkdebug config file: {}", of_host(&error)))
    })?;
    rules_in_text(&text)
}

/// For the fuzzer: what is accepted is a rule for each section.
pub(crate) fn parse_hostile(text: &str) {
    if let Ok(rules) = rules_in_text(text) {
        let sections = text.lines().filter(|line| line.trim().starts_with('['));
        assert_eq!(rules.len(), sections.count(), "{text}");
    }
}

fn rules_in_text(text: &str) -> CliResult<Vec<Rule>> {
    let mut sections: Vec<(&str, Keys)> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let section = SECTIONS
                .into_iter()
                .find(|section| *section == name)
                .ok_or_else(|| CliError::new(format!("There is no option group '{name}'")))?;
            sections.push((section, Keys::default()));
            continue;
        }
        let Some((_, keys)) = sections.last_mut() else {
            return Err(CliError::new("no group defined"));
        };
        let (key, value) = assignment(line).ok_or_else(|| CliError::new("parse error"))?;
        keys.set(key.to_owned(), Scalar::Text(value.to_owned()));
    }
    let read = |(section, keys)| rule(section, keys, |left| format!("Invalid parameter '{left}'"));
    sections.into_iter().map(read).collect()
}

fn assignment(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
    Some((key.trim(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Keys {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        Keys::from_pairs(pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    #[test]
    fn ranges_are_cut_at_multiples_of_the_limit() {
        assert_eq!(pieces(5, 20, 0, 0), [(5, 20)]);
        assert_eq!(pieces(5, 20, 10, 0), [(5, 5), (10, 10), (20, 5)]);
        assert_eq!(pieces(5, 20, 10, 5), [(5, 10), (15, 10)]);
        assert_eq!(pieces(5, 0, 10, 0), []);
    }

    #[test]
    fn parts_below_the_best_size_are_zeroed_by_writing() {
        let limits = Limits::take(&mut keys("opt-write-zero=10,max-write-zero=20")).unwrap();
        let cut = limits.zeroes(5, 50);
        assert_eq!(
            cut,
            [(5, 5, false), (10, 10, true), (20, 20, true), (40, 10, true), (50, 5, false)]
        );
        assert_eq!(Limits::default().zeroes(5, 50), [(5, 50, true)]);
    }

    #[test]
    fn limits_that_contradict_each_other_are_named() {
        for (text, name) in [
            ("align=5", "align 5"),
            ("align=4k,max-transfer=5000", "max-transfer 5000"),
            ("align=3G", "align 3221225472"),
            ("opt-discard=1M,max-discard=512k", "max-discard 524288"),
        ] {
            let error = Limits::take(&mut keys(text)).unwrap_err();
            assert_eq!(error.text(), format!("Cannot meet constraints with {name}"));
        }
        assert!(Limits::take(&mut keys("align=512,opt-discard=15M,max-discard=15M")).is_ok());
    }

    #[test]
    fn rules_say_what_they_lack() {
        let rule = |text: &str| {
            let text = text.to_owned();
            rule("inject-error", keys(&text), |left| format!("left {left}"))
        };
        assert_eq!(rule("errno=5").unwrap_err().text(), "Missing event name for rule");
        assert_eq!(rule("event=foo").unwrap_err().text(), "invalid parameter value: foo");
        assert_eq!(rule("event=read_aio,x=5").unwrap_err().text(), "left x");
        let read = rule("event=read_aio,sector=2,once=on,errno=28").unwrap();
        let fault = Fault { errno: 28, offset: Some(1024), once: true, io_type: None };
        assert_eq!(read, Rule { event: "read_aio", state: 0, action: Action::Fail(fault) });
    }
}
