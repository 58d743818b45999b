//! Options that say how an image is opened, not which one it is.

use lacuna::block::ZeroDetection;
use lacuna::qcow2::format::{Header, Version};
use lacuna::qcow2::{OnDiscard, SharedZeroCluster, ZeroUnmap};
use lacuna::storage::CacheMode;

use super::keys::Keys;
use crate::error::{CliError, CliResult};
use crate::verbs::open;

/// The parts of the metadata whose overlap check can be switched.
const OVERLAP_CHECKS: [&str; 9] = [
    "overlap-check.main-header",
    "overlap-check.active-l1",
    "overlap-check.active-l2",
    "overlap-check.refcount-table",
    "overlap-check.refcount-block",
    "overlap-check.snapshot-table",
    "overlap-check.inactive-l1",
    "overlap-check.inactive-l2",
    "overlap-check.bitmap-directory",
];

/// What every part of a disk takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Common {
    pub(crate) read_only: Option<bool>,
    pub(crate) direct: Option<bool>,
    pub(crate) force_share: Option<bool>,
    pub(crate) node_name: Option<String>,
    /// Whether discards reach what is below.
    pub(crate) discard: Option<bool>,
    pub(crate) detect_zeroes: ZeroDetection,
    pub(crate) locking: Option<Locking>,
    aio_native: bool,
}

/// Whether a file is locked against others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Locking {
    /// Where the host can.
    Auto,
    Off,
    On,
}

impl Common {
    /// Takes its options out of `keys`.
    pub(crate) fn take(keys: &mut Keys) -> CliResult<Self> {
        let mut common = Self {
            read_only: keys.take_switch("read-only")?,
            direct: keys.take_switch("cache.direct")?,
            force_share: keys.take_switch("force-share")?,
            node_name: keys.take_text("node-name"),
            discard: discard(keys)?,
            ..Self::default()
        };
        if let Some(name) = common.node_name.as_deref().filter(|name| !is_node_name(name)) {
            return Err(CliError::new(format!("Invalid node-name: '{name}'")));
        }
        // Accepted, and without effect: nothing is switched while an image is open, and a flush is
        // always done.
        keys.take_switch("auto-read-only")?;
        keys.take_switch("cache.no-flush")?;
        common.detect_zeroes = detection(keys)?;
        match (common.detect_zeroes, common.discard) {
            (ZeroDetection::Unmap | ZeroDetection::Thorough, Some(false)) => Err(CliError::new(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap",
            )),
            _ => Ok(common),
        }
    }

    /// Takes over what `upper` says and this one does not.
    pub(super) fn add(&mut self, upper: Self) {
        self.read_only = self.read_only.or(upper.read_only);
        self.direct = self.direct.or(upper.direct);
        self.force_share = self.force_share.or(upper.force_share);
        self.discard = self.discard.or(upper.discard);
    }

    /// Takes what only files of the host have.
    pub(super) fn take_for_file(&mut self, keys: &mut Keys) -> CliResult<()> {
        self.locking = match keys.take_text("locking").as_deref() {
            None => None,
            Some("auto") => Some(Locking::Auto),
            Some("off") => Some(Locking::Off),
            Some("on") => Some(Locking::On),
            Some(other) => return Err(invalid(other)),
        };
        self.aio_native = match keys.take_text("aio").as_deref() {
            None | Some("threads" | "io_uring") => false,
            Some("native") => true,
            Some(other) => return Err(invalid(other)),
        };
        keys.take_number("aio-max-batch")?;
        keys.take_switch("drop-cache")?;
        keys.take_switch("x-check-cache-dropped")?;
        Ok(())
    }

    /// Refuses what contradicts itself once it is known how the file is opened.
    pub(crate) fn check(&self, cache: CacheMode) -> CliResult<()> {
        let is_direct = self.direct.unwrap_or(cache == CacheMode::Direct);
        let cache = if is_direct { CacheMode::Direct } else { CacheMode::Buffered };
        open::check_native(self.aio_native, cache)
    }
}

fn invalid(value: &str) -> CliError {
    CliError::new(format!("invalid parameter value: {value}"))
}

/// A letter, then letters, digits and a few signs, 31 in all at most.
fn is_node_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    name.len() < 32 && name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.bytes().all(fits)
}

fn detection(keys: &mut Keys) -> CliResult<ZeroDetection> {
    match keys.take_text("detect-zeroes").as_deref() {
        None => Ok(ZeroDetection::Off),
        Some(level) => zero_detection(level).ok_or_else(|| invalid(level)),
    }
}

/// Reads a level of zero detection; nothing where there is no such level.
pub(crate) fn zero_detection(level: &str) -> Option<ZeroDetection> {
    Some(match level {
        "off" => ZeroDetection::Off,
        "on" => ZeroDetection::On,
        "unmap" => ZeroDetection::Unmap,
        "thorough" => ZeroDetection::Thorough,
        _ => return None,
    })
}

fn discard(keys: &mut Keys) -> CliResult<Option<bool>> {
    match keys.take_text("discard").as_deref() {
        None => Ok(None),
        Some("unmap" | "on") => Ok(Some(true)),
        Some("ignore" | "off") => Ok(Some(false)),
        Some(_) => Err(CliError::new("Invalid discard option")),
    }
}

/// What only qcow2 images take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Runtime {
    pub(crate) lazy_refcounts: Option<bool>,
    pub(crate) pass_discard_request: Option<bool>,
    pub(crate) pass_discard_snapshot: Option<bool>,
    pub(crate) pass_discard_other: Option<bool>,
    pub(crate) on_discard: Option<OnDiscard>,
    pub(crate) zero_unmap: ZeroUnmap,
    pub(crate) shared_zero: SharedZeroCluster,
    cache_bytes: Option<u64>,
    l2_cache_bytes: Option<u64>,
    l2_entry_bytes: Option<u64>,
    refcount_cache_bytes: Option<u64>,
    clean_interval_seconds: Option<u64>,
    overlap_check: Option<String>,
    overlap_template: Option<String>,
}

impl Runtime {
    /// Takes its options out of `keys`.
    pub(crate) fn take(keys: &mut Keys) -> CliResult<Self> {
        let runtime = Self {
            lazy_refcounts: keys.take_switch("lazy-refcounts")?,
            pass_discard_request: keys.take_switch("pass-discard-request")?,
            pass_discard_snapshot: keys.take_switch("pass-discard-snapshot")?,
            pass_discard_other: keys.take_switch("pass-discard-other")?,
            on_discard: keys.take_switch("discard-no-unref")?.map(|keeps| match keeps {
                true => OnDiscard::KeepMapping,
                false => OnDiscard::Free,
            }),
            zero_unmap: match keys.take_text("zero-unmap").as_deref() {
                None | Some("flag") => ZeroUnmap::Flag,
                Some("unallocate") => ZeroUnmap::Unallocate,
                Some(other) => return Err(invalid(other)),
            },
            shared_zero: match keys.take_switch("shared-zero-cluster")? {
                None => SharedZeroCluster::AsRemembered,
                Some(true) => SharedZeroCluster::On,
                Some(false) => SharedZeroCluster::Off,
            },
            cache_bytes: keys.take_size("cache-size")?,
            l2_cache_bytes: keys.take_size("l2-cache-size")?,
            l2_entry_bytes: keys.take_size("l2-cache-entry-size")?,
            refcount_cache_bytes: keys.take_size("refcount-cache-size")?,
            clean_interval_seconds: keys.take_number("cache-clean-interval")?,
            overlap_check: keys.take_text("overlap-check"),
            overlap_template: keys.take_text("overlap-check.template"),
        };
        // The checks are always on: they cost a look into a table in memory.
        for check in OVERLAP_CHECKS {
            keys.take_switch(check)?;
        }
        Ok(runtime)
    }

    /// Refuses values that make no sense together or for this image.
    pub(crate) fn check(&self, header: &Header) -> CliResult<()> {
        let problem = self
            .problem_of_sizes(header)
            .or_else(|| self.problem_of_overlap_check())
            .or_else(|| self.problem_of_interval())
            .or_else(|| self.problem_of_discard(header));
        problem.map_or(Ok(()), |text| Err(CliError::new(text)))
    }

    fn problem_of_sizes(&self, header: &Header) -> Option<String> {
        let text = match (self.cache_bytes, self.l2_cache_bytes, self.refcount_cache_bytes) {
            (Some(_), Some(_), Some(_)) => {
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            }
            (Some(all), Some(l2), _) if l2 > all => "l2-cache-size may not exceed cache-size",
            (Some(all), _, Some(counts)) if counts > all => {
                "refcount-cache-size may not exceed cache-size"
            }
            _ => return self.problem_of_entries(header),
        };
        Some(text.to_owned())
    }

    /// QEMU counts cache entries in a signed number of 32 bits.
    fn problem_of_entries(&self, header: &Header) -> Option<String> {
        const MOST_ENTRIES: u64 = i32::MAX as u64;
        let cluster_bytes = header.geometry.cluster_bytes();
        let entry_bytes = self.l2_entry_bytes.unwrap_or(cluster_bytes);
        if !entry_bytes.is_power_of_two() || !(512..=cluster_bytes).contains(&entry_bytes) {
            return Some(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size \
                 ({cluster_bytes})"
            ));
        }
        let covered = header.geometry.l2_entries() * cluster_bytes;
        let all_tables = header.size_bytes.div_ceil(covered).saturating_mul(cluster_bytes);
        if self.l2_cache_bytes.unwrap_or(0).min(all_tables) / entry_bytes > MOST_ENTRIES {
            return Some("L2 cache size too big".to_owned());
        }
        let too_big = self.refcount_cache_bytes.unwrap_or(0) / cluster_bytes > MOST_ENTRIES;
        too_big.then(|| "Refcount cache size too big".to_owned())
    }

    fn problem_of_overlap_check(&self) -> Option<String> {
        let template = match (&self.overlap_check, &self.overlap_template) {
            (Some(check), Some(template)) if check != template => {
                return Some(format!(
                    "Conflicting values for qcow2 options 'overlap-check' ('{check}') and \
                     'overlap-check.template' ('{template}')"
                ));
            }
            (check, template) => check.as_ref().or(template.as_ref())?,
        };
        let is_known = ["none", "constant", "cached", "all"].contains(&&**template);
        (!is_known).then(|| {
            format!(
                "Unsupported value '{template}' for qcow2 option 'overlap-check'. Allowed are any \
                 of the following: none, constant, cached, all"
            )
        })
    }

    fn problem_of_discard(&self, header: &Header) -> Option<String> {
        let is_old = header.geometry.version() == Version::V2;
        (is_old && self.on_discard == Some(OnDiscard::KeepMapping))
            .then(|| "discard-no-unref is only supported since qcow2 version 3".to_owned())
    }

    fn problem_of_interval(&self) -> Option<String> {
        let interval = self.clean_interval_seconds?;
        (interval > u64::from(u32::MAX)).then(|| "Cache clean interval too big".to_owned())
    }

    /// Returns the bound for cached tables, where one was given.
    pub(crate) fn table_cache_bytes(&self) -> Option<u64> {
        self.l2_cache_bytes.or_else(|| {
            let rest = self.refcount_cache_bytes.unwrap_or(0);
            Some(self.cache_bytes?.saturating_sub(rest))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&str, &str)]) -> Keys {
        Keys::from_pairs(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn node_names_start_with_a_letter() {
        for (name, is_good) in [("a", true), ("a-b.c_1", true), ("5", false), ("", false)] {
            assert_eq!(is_node_name(name), is_good, "{name}");
        }
        assert!(!is_node_name(&"a".repeat(32)));
    }

    #[test]
    fn the_table_cache_gets_what_refcounts_leave() {
        let bytes =
            |pairs: &[(&str, &str)]| Runtime::take(&mut keys(pairs)).unwrap().table_cache_bytes();
        assert_eq!(bytes(&[]), None);
        assert_eq!(bytes(&[("cache-size", "1M")]), Some(1 << 20));
        assert_eq!(bytes(&[("cache-size", "1M"), ("refcount-cache-size", "512k")]), Some(1 << 19));
        assert_eq!(bytes(&[("cache-size", "1M"), ("l2-cache-size", "64k")]), Some(1 << 16));
    }

    #[test]
    fn unmapping_zeros_needs_discards() {
        let error = Common::take(&mut keys(&[("detect-zeroes", "unmap"), ("discard", "ignore")]));
        assert!(error.unwrap_err().text().starts_with("setting detect-zeroes to unmap"));
        assert!(Common::take(&mut keys(&[("detect-zeroes", "off")])).is_ok());
    }
}
