//! Image formats by the names that command lines use.

use std::fmt;

/// A format that images can have here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Qcow2,
    Raw,
}

impl Format {
    /// Returns the format of that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" | "file" | "host_device" => Some(Self::Raw),
            _ => None,
        }
    }

    /// Returns its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
