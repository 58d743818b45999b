//! What a command line of qemu-nbd says, checked in that program's order and words.

use std::path::PathBuf;
use std::time::Duration;

use lacuna::block::ZeroDetection;
use lacuna::chain::{Sharing, UnnamedFormat};
use lacuna::qcow2::Access;
use lacuna::storage::CacheMode;
use lacuna_export::{Address, ExportOptions, Limits, WhenFull};

use super::list::Listing;
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::objects::Objects;
use crate::verbs::open::{self, Request};
use crate::verbs::serve::fork::Ready;
use crate::verbs::serve::sockets::{self, AlsoGiven};
use crate::verbs::serve::tls::{Secured, no_authorization};
use crate::verbs::serve::{Becomes, Named, Serving};
use crate::verbs::spec::ImageSpec;
use crate::verbs::spec::runtime::zero_detection;
use crate::verbs::spec::tree::{TopSpec, Window};

/// Longest name or description of an export in bytes.
const MAX_TEXT_BYTES: usize = 4096;
/// The port of the protocol.
const PORT: &str = "10809";
/// What `-L` does not go with: it is not about an image.
const ABOUT_AN_IMAGE: [&str; 14] = [
    "export-name",
    "description",
    "offset",
    "connect",
    "disconnect",
    "format",
    "load-snapshot",
    "bitmap",
    "allocation-depth",
    "aio",
    "discard",
    "cache",
    "nocache",
    "detect-zeroes",
];

/// What is to be done.
pub(super) enum Mode {
    /// Drive a device of the kernel, which we cannot.
    Device(String),
    /// Ask a server what it has.
    List(Listing),
    /// Serve an image.
    Serve(Box<Image>),
}

pub(super) struct Asked {
    pub(super) mode: Mode,
    address: Address,
    limits: Limits,
    is_persistent: bool,
    pid_file: Option<PathBuf>,
    secured: Secured,
}

/// The image, how it is opened, and how it is served.
pub(super) struct Image {
    pub(super) file: String,
    pub(super) export: ExportOptions,
    pub(super) becomes: Becomes,
    name: String,
    format: Option<String>,
    has_options: bool,
    access: Access,
    disk: DiskWish,
}

/// What becomes of the host's cache, of discards and of zeros.
struct DiskWish {
    cache: CacheMode,
    writes_through: bool,
    is_native: bool,
    discards: bool,
    detection: Option<ZeroDetection>,
}

impl Asked {
    pub(super) fn new(parsed: &Parsed) -> CliResult<Self> {
        let disk = DiskWish::new(parsed)?;
        check_values(parsed)?;
        check_count(parsed)?;
        let shared = shared(parsed)?;
        check_activation(parsed)?;
        let address = address(parsed)?;
        let secured = secured(parsed)?;
        let limits = limits(parsed, shared)?;
        let mode = match (parsed.operands.first(), parsed.last("connect")) {
            (Some(device), _) if parsed.has("disconnect") => Mode::Device(device.clone()),
            (_, Some(device)) => Mode::Device(device.to_owned()),
            (Some(file), None) => {
                check_unsupported(parsed)?;
                Mode::Serve(Box::new(Image::new(parsed, file, disk, shared)?))
            }
            (None, None) => Mode::List(Listing::new(parsed, address.clone())?),
        };
        let is_persistent = parsed.has("persistent");
        let pid_file = parsed.last("pid-file").map(PathBuf::from);
        Ok(Self { mode, address, limits, is_persistent, pid_file, secured })
    }

    /// Says how the image is served.
    pub(super) fn serving(&self, image: &Image, ready: Option<Ready>) -> CliResult<Serving> {
        Ok(Serving {
            images: vec![Named::new(&image.name, &image.file)],
            address: self.address.clone(),
            export: image.export.clone(),
            limits: self.limits,
            is_persistent: self.is_persistent,
            pid_file: self.pid_file.clone(),
            control: None,
            run: None,
            only_is_default: false,
            says_where: false,
            has_address: true,
            secured: self.secured.clone(),
            inherited: sockets::inherited()?,
            ready,
        })
    }
}

impl Image {
    fn new(parsed: &Parsed, file: &str, disk: DiskWish, shared: u32) -> CliResult<Self> {
        let read_only = parsed.has("read-only") || parsed.has("load-snapshot");
        let export = ExportOptions {
            description: parsed.last("description").map(str::to_owned),
            read_only,
            allocation_depth: parsed.has("allocation-depth"),
            bitmaps: Some(parsed.all("bitmap").map(str::to_owned).collect()),
            multi_conn: shared != 1,
            layers: None,
            ..ExportOptions::default()
        };
        Ok(Self {
            file: file.to_owned(),
            export,
            becomes: becomes(parsed)?,
            name: parsed.last("export-name").unwrap_or_default().to_owned(),
            format: parsed.last("format").map(str::to_owned),
            has_options: parsed.has("image-opts"),
            access: if read_only { Access::ReadOnly } else { Access::ReadWrite },
            disk,
        })
    }

    /// Says how the image is opened.
    pub(super) fn request(&self) -> CliResult<Request> {
        let mut image = match self.has_options {
            true => ImageSpec::from_options(&self.file)?,
            false => ImageSpec::from_name(&self.file, self.format.as_deref())?,
        };
        open::check_native(self.disk.is_native, self.disk.cache)?;
        let common = &mut image.disk.common;
        common.discard = common.discard.or(Some(self.disk.discards));
        common.detect_zeroes = self.disk.detection.unwrap_or(common.detect_zeroes);
        if self.disk.writes_through && self.access == Access::ReadWrite {
            image.disk.tops.push(TopSpec::WriteThrough);
        }
        let (access, cache) = (self.access, self.disk.cache);
        let (sharing, unnamed) = (Sharing::SameSize, UnnamedFormat::Probe);
        Ok(Request { image, access, cache, sharing, unnamed })
    }
}

fn becomes(parsed: &Parsed) -> CliResult<Becomes> {
    let text = parsed.last("offset").unwrap_or("0");
    let offset = number(text).filter(|offset| i64::try_from(*offset).is_ok()).ok_or_else(|| {
        CliError::new(format!("Value '{text}' is out of range for parameter 'offset'"))
    })?;
    Ok(Becomes {
        part: (offset > 0).then_some(Window { offset, size: None }),
        is_overlay: parsed.has("snapshot"),
        snapshot: parsed.last("load-snapshot").map(str::to_owned),
    })
}

impl DiskWish {
    /// Goes through the options in the order they were given: whether zeros may be unmapped is
    /// decided by what was said before.
    fn new(parsed: &Parsed) -> CliResult<Self> {
        for (flags, shown) in [
            (&["nocache", "cache"][..], "-n and --cache"),
            (&["aio"], "--aio"),
            (&["discard"], "--discard"),
        ] {
            if parsed.in_order().filter(|(flag, _)| flags.contains(flag)).count() > 1 {
                return Err(CliError::new(format!("{shown} can only be specified once")));
            }
        }
        let mut wish = Self {
            cache: CacheMode::Buffered,
            writes_through: false,
            is_native: false,
            discards: false,
            detection: None,
        };
        parsed.in_order().try_for_each(|(flag, value)| wish.take(flag, value))?;
        Ok(wish)
    }

    fn take(&mut self, flag: &str, value: &str) -> CliResult<()> {
        match (flag, value) {
            ("nocache", _) => self.cache = CacheMode::Direct,
            ("cache", mode) => {
                let cache = open::cache_mode(mode);
                self.cache = cache.ok_or_else(|| invalid("cache mode `", mode))?;
                self.writes_through = open::writes_through(mode);
            }
            ("aio", "threads" | "io_uring") => {}
            ("aio", "native") => self.is_native = true,
            ("aio", mode) => return Err(invalid("aio mode '", mode)),
            ("discard", "unmap" | "on") => self.discards = true,
            ("discard", "ignore" | "off") => {}
            ("discard", mode) => return Err(invalid("discard mode `", mode)),
            ("detect-zeroes", level) => self.detection = Some(self.detection(level)?),
            _ => {}
        }
        Ok(())
    }

    fn detection(&self, level: &str) -> CliResult<ZeroDetection> {
        match zero_detection(level).filter(|level| *level != ZeroDetection::Thorough) {
            Some(ZeroDetection::Unmap) if !self.discards => Err(CliError::new(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap",
            )),
            Some(level) => Ok(level),
            None => Err(CliError::new(format!(
                "Failed to parse detect_zeroes mode: invalid parameter value: {level}"
            ))),
        }
    }
}

/// `what` ends in the quote that the program uses for it.
fn invalid(what: &str, value: &str) -> CliError {
    CliError::new(format!("Invalid {what}{value}'"))
}

fn check_values(parsed: &Parsed) -> CliResult<()> {
    if let Some(offset) = parsed.all("offset").find(|text| number(text).is_none()) {
        return Err(invalid("offset '", offset));
    }
    if parsed.all("socket").any(|path| !path.starts_with('/')) {
        return Err(CliError::new("socket path must be absolute"));
    }
    for (flag, shown) in [("export-name", "name"), ("description", "description")] {
        if let Some(text) = parsed.all(flag).find(|text| text.len() > MAX_TEXT_BYTES) {
            return Err(CliError::new(format!("export {shown} '{text}' too long")));
        }
    }
    Objects::read(parsed.all("object")).map(drop)
}

/// One image, or none with `-L`.
fn check_count(parsed: &Parsed) -> CliResult<()> {
    if !parsed.has("list") {
        return match parsed.operands.len() {
            1 => Ok(()),
            _ => Err(CliError::usage("Invalid number of arguments")),
        };
    }
    let other = if !parsed.operands.is_empty() {
        "a file name"
    } else if ABOUT_AN_IMAGE.iter().any(|flag| parsed.has(flag) && !is_offset_zero(parsed, flag)) {
        "per-device settings"
    } else if parsed.has("fork") {
        "forking"
    } else if sockets::activated() > 0 {
        "socket activation"
    } else {
        return Ok(());
    };
    Err(CliError::new(format!("List mode is incompatible with {other}")))
}

fn is_offset_zero(parsed: &Parsed, flag: &str) -> bool {
    flag == "offset" && parsed.last(flag).and_then(number) == Some(0)
}

fn shared(parsed: &Parsed) -> CliResult<u32> {
    let Some(text) = parsed.last("shared") else { return Ok(1) };
    let shared = number(text).and_then(|shared| i32::try_from(shared).ok());
    let shared = shared.and_then(|shared| u32::try_from(shared).ok());
    shared.ok_or_else(|| invalid("shared device number '", text))
}

fn limits(parsed: &Parsed, shared: u32) -> CliResult<Limits> {
    let usual = Limits::default();
    let handshake = match parsed.last("handshake-limit") {
        None => usual.handshake,
        Some(text) => match number(text).and_then(|seconds| u32::try_from(seconds).ok()) {
            Some(0) => Duration::MAX,
            Some(seconds) => Duration::from_secs(seconds.into()),
            None => return Err(invalid("handshake limit '", text)),
        },
    };
    let connections = if shared == 0 { usual.connections } else { shared as usize };
    Ok(Limits { connections, when_full: WhenFull::Wait, handshake, ..usual })
}

/// One socket that systemd opened, and nothing that contradicts it.
fn check_activation(parsed: &Parsed) -> CliResult<()> {
    let count = sockets::activated();
    if count == 0 {
        return Ok(());
    }
    let (socket, bind) = (parsed.has("socket"), parsed.has("bind"));
    let also = AlsoGiven { socket, bind, port: parsed.has("port"), ..AlsoGiven::default() };
    also.refuse_beside_activation()?;
    match count {
        1 => Ok(()),
        _ => Err(CliError::new("qemu-nbd does not support socket activation with LISTEN_FDS > 1")),
    }
}

fn address(parsed: &Parsed) -> CliResult<Address> {
    if let Some(path) = parsed.last("socket") {
        return Ok(Address::Unix(PathBuf::from(path)));
    }
    let host = parsed.last("bind").unwrap_or("0.0.0.0");
    let port = parsed.last("port").unwrap_or(PORT);
    let number = port.parse::<u16>().map_err(|_| {
        CliError::new(format!(
            "address resolution failed for {host}:{port}: Servname not supported for ai_socktype"
        ))
    })?;
    Ok(Address::Tcp(host.to_owned(), number))
}

fn secured(parsed: &Parsed) -> CliResult<Secured> {
    let (is_list, has_authz) = (parsed.has("list"), parsed.has("tls-authz"));
    let has_hostname = parsed.has("tls-hostname");
    let text = match parsed.last("tls-creds") {
        Some(_) if parsed.has("connect") => "TLS is not supported with a host device",
        Some(_) if has_authz && is_list => "TLS authorization is incompatible with export list",
        Some(_) if has_hostname && !is_list => "TLS hostname is only supported with export list",
        Some(_) if is_list => return Ok(Secured::default()),
        Some(_) if has_authz => return Err(no_authorization()),
        Some(id) => {
            return Secured::of_object(&Objects::read(parsed.all("object"))?, id, false);
        }
        None if has_authz => "--tls-authz is not permitted without --tls-creds",
        None if has_hostname => "--tls-hostname is not permitted without --tls-creds",
        None if !parsed.has("selinux-label") => return Ok(Secured::default()),
        None if !parsed.has("socket") => "--selinux-label is not permitted without --socket",
        None => "SELinux support not enabled in this build",
    };
    Err(CliError::new(text))
}

/// Says what this program cannot do, where QEMU's can.
fn check_unsupported(parsed: &Parsed) -> CliResult<()> {
    let text = match () {
        () if parsed.has("image-opts") && parsed.has("format") => {
            "--image-opts and -f are mutually exclusive"
        }
        () => return Ok(()),
    };
    Err(CliError::new(text))
}

/// Reads a number as C does where the digits say the base: `0x` and `0` in front; one that is
/// negative wraps.
fn number(text: &str) -> Option<u64> {
    let text = text.trim_start();
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let value = match (lower.strip_prefix("0x"), lower.strip_prefix('0')) {
        (Some(digits), _) => u64::from_str_radix(digits, 16),
        (None, Some(digits)) if !digits.is_empty() => u64::from_str_radix(digits, 8),
        _ => lower.parse(),
    };
    let is_plain = digits.starts_with(|first: char| first.is_ascii_digit());
    value
        .ok()
        .filter(|_| is_plain)
        .map(|value| if is_negative { value.wrapping_neg() } else { value })
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_are_read_as_c_reads_them() {
        for (text, value) in [
            ("12", Some(12)),
            (" +7", Some(7)),
            ("0x1F", Some(31)),
            ("010", Some(8)),
            ("0", Some(0)),
            ("-1", Some(u64::MAX)),
            ("1k", None),
            ("08", None),
            ("", None),
            ("+-1", None),
            ("0x", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(number(text), value, "{text}");
        }
    }
}
