//! The sizes that requests keep to (C.8).

use crate::{Error, Result};

/// Payload that every server takes and no client exceeds unless told otherwise, in bytes.
pub const DEFAULT_MAX_PAYLOAD_BYTES: u32 = 32 << 20;
const MAX_MINIMUM_BYTES: u32 = 64 << 10;
const LEAST_PREFERRED_BYTES: u32 = 512;

/// Minimum, preferred and largest sizes of an export, checked.
///
/// * `minimum`: a power of two, 1 to 64 KiB; offsets and lengths are multiples of it.
/// * `preferred`: a power of two, at least 512 and the minimum.
/// * `max_payload`: at least the preferred size.
///
/// ```
/// use lacuna_nbd::BlockSizes;
/// let sizes = BlockSizes::default();
/// assert_eq!((sizes.minimum(), sizes.preferred(), sizes.max_payload()), (1, 4096, 32 << 20));
/// assert!(BlockSizes::new(3, 4096, 1 << 20).is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    minimum: u32,
    preferred: u32,
    max_payload: u32,
}

impl BlockSizes {
    /// Takes three sizes in bytes.
    ///
    /// # Errors
    /// `InvalidRequest` where one is outside of its limits.
    pub fn new(minimum: u32, preferred: u32, max_payload: u32) -> Result<Self> {
        if !minimum.is_power_of_two() || minimum > MAX_MINIMUM_BYTES {
            return Err(Error::invalid(format!(
                "Minimum block size is {minimum}; it should be a power of two up to 65536"
            )));
        }
        let least = minimum.max(LEAST_PREFERRED_BYTES);
        if !preferred.is_power_of_two() || preferred < least {
            return Err(Error::invalid(format!(
                "Preferred block size is {preferred}; it should be a power of two from {least} on"
            )));
        }
        if max_payload < preferred {
            return Err(Error::invalid(format!(
                "Maximum payload is {max_payload}; it should be at least the preferred block size, \
                 {preferred}"
            )));
        }
        Ok(Self { minimum, preferred, max_payload })
    }

    /// Returns what offsets and lengths must be multiples of, in bytes.
    #[must_use]
    pub const fn minimum(self) -> u32 {
        self.minimum
    }

    /// Returns what offsets and lengths had better be multiples of, in bytes.
    #[must_use]
    pub const fn preferred(self) -> u32 {
        self.preferred
    }

    /// Returns the longest payload in bytes.
    #[must_use]
    pub const fn max_payload(self) -> u32 {
        self.max_payload
    }

    /// Says whether `number` is a multiple of the minimum.
    pub(crate) fn is_aligned(self, number: u64) -> bool {
        // A power of two, at least 1.
        number & u64::from(self.minimum).saturating_sub(1) == 0
    }
}

impl Default for BlockSizes {
    /// What holds where nothing was negotiated.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, max_payload: DEFAULT_MAX_PAYLOAD_BYTES }
    }
}
