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

/// Says whether QEMU has a format of this name, be it one that is not ours.
pub(crate) fn is_known(name: &str) -> bool {
    const KNOWN: &[&str] = &[
        "qcow2",
        "raw",
        "bochs",
        "cloop",
        "dmg",
        "luks",
        "parallels",
        "qcow",
        "qed",
        "vdi",
        "vhdx",
        "vmdk",
        "vpc",
        "vvfat",
        "file",
        "host_device",
        "nbd",
        "null-co",
        "null-aio",
        "blkdebug",
        "blkverify",
        "quorum",
        "throttle",
        "http",
        "https",
        "ftp",
        "ftps",
        "iscsi",
        "nfs",
        "rbd",
        "ssh",
        "gluster",
        "copy-on-read",
        "compress",
        "preallocate",
        "replication",
    ];
    KNOWN.contains(&name)
}
