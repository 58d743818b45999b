//! File names as images hold them: plain names of local files, and nothing else (D.1-41).
//!
//! * Never interpreted: `json:`, protocols, options. Whoever made the image chose the bytes
//!   (CVE-2024-4467).
//! * A relative name starts from the directory of the image that holds it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::opener::Opener;
use crate::{Error, Result};

/// How much of a name an error quotes.
const QUOTED_BYTES: usize = 80;

/// Returns the path that `name`, found in `image`, stands for.
///
/// # Errors
/// `Corrupt` for what cannot name a file, `Unsupported` for what names something else than a
/// local file or what `opener` knows of elsewhere.
pub(super) fn resolve<O: Opener>(name: &[u8], image: &Path, opener: &O) -> Result<PathBuf> {
    if name.contains(&0) {
        return Err(Error::corrupt(format!("The name {} has a zero byte in it", quoted(name))));
    }
    if opener.is_remote(name) {
        return as_path(name).map(Path::to_owned);
    }
    let plain = match name.strip_prefix(b"file:") {
        Some(plain) => plain,
        None => refuse_protocol(name)?,
    };
    if plain.is_empty() {
        return Err(Error::corrupt("The name is empty; the name of a local file would be right"));
    }
    let plain = as_path(plain)?;
    if plain.is_relative() && opener.is_remote(image.as_os_str().as_encoded_bytes()) {
        return Err(Error::unsupported(format!(
            "The name {} starts from the folder of its image, but the image is on a server, which \
             has no folders",
            quoted(name)
        )));
    }
    Ok(match image.parent() {
        Some(directory) => directory.join(plain),
        None => plain.to_owned(),
    })
}

/// Refuses what stands before a colon, as long as no slash comes first.
fn refuse_protocol(name: &[u8]) -> Result<&[u8]> {
    let head = name.split(|&byte| byte == b'/').next().unwrap_or_default();
    match head.iter().position(|&byte| byte == b':') {
        None => Ok(name),
        Some(colon) => Err(Error::unsupported(format!(
            "The name {} asks for {}: only plain names of local files are followed (a file whose \
             name has a colon can be named with ./ in front)",
            quoted(name),
            quoted(&head[..colon]),
        ))),
    }
}

/// Shows bytes from an image, shortened and with control characters escaped.
pub(super) fn quoted(name: &[u8]) -> String {
    let shown = &name[..name.len().min(QUOTED_BYTES)];
    let dots = if shown.len() < name.len() { "..." } else { "" };
    format!("'{}{dots}'", shown.escape_ascii())
}

#[cfg(unix)]
fn as_path(name: &[u8]) -> Result<&Path> {
    use std::os::unix::ffi::OsStrExt;
    Ok(Path::new(OsStr::from_bytes(name)))
}

#[cfg(not(unix))]
fn as_path(name: &[u8]) -> Result<&Path> {
    std::str::from_utf8(name)
        .map(|name| Path::new(OsStr::new(name)))
        .map_err(|_| Error::unsupported(format!("The name {} is not UTF-8", quoted(name))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::chain::MemoryOpener;

    #[test]
    fn plain_names_start_from_the_directory_of_the_image() {
        let table: [(&[u8], &str, &str); 8] = [
            (b"base.img", "top.img", "base.img"),
            (b"base.img", "/vm/top.img", "/vm/base.img"),
            (b"../base.img", "vm/top.img", "vm/../base.img"),
            (b"/abs/base.img", "/vm/top.img", "/abs/base.img"),
            (b"file:base.img", "/vm/top.img", "/vm/base.img"),
            (b"file:///abs/base.img", "/vm/top.img", "///abs/base.img"),
            (b"./a:b", "/vm/top.img", "/vm/./a:b"),
            (b"file:json:{}", "/vm/top.img", "/vm/json:{}"),
        ];
        for (name, image, path) in table {
            let found = resolve(name, Path::new(image), &MemoryOpener::default()).unwrap();
            assert_eq!(found, Path::new(path), "{}", quoted(name));
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let table: [(&[u8], ErrorKind); 14] = [
            (b"", ErrorKind::Corrupt),
            (b"file:", ErrorKind::Corrupt),
            (b"a\0b", ErrorKind::Corrupt),
            (b"file:a\0b", ErrorKind::Corrupt),
            (b"json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}", ErrorKind::Unsupported),
            (b"json:", ErrorKind::Unsupported),
            (b"JSON:{}", ErrorKind::Unsupported),
            (b"nbd:localhost:10809", ErrorKind::Unsupported),
            (b"nbd://localhost/x", ErrorKind::Unsupported),
            (b"http://localhost/x", ErrorKind::Unsupported),
            (b"fat:rw:/etc", ErrorKind::Unsupported),
            (b"host_device:/dev/sda", ErrorKind::Unsupported),
            (b":x", ErrorKind::Unsupported),
            (b"File:x", ErrorKind::Unsupported),
        ];
        for (name, kind) in table {
            let error =
                resolve(name, Path::new("/vm/top.img"), &MemoryOpener::default()).unwrap_err();
            assert_eq!(error.kind(), kind, "{}: {error}", quoted(name));
        }
    }

    #[test]
    fn errors_quote_little_and_nothing_that_moves_a_terminal() {
        let mut name = b"\x1b[31m:".to_vec();
        name.resize(1 << 20, b'x');
        let error =
            resolve(&name, Path::new("top.img"), &MemoryOpener::default()).unwrap_err().to_string();
        assert!(error.len() < 500 && !error.contains('\x1b'), "{error}");
    }
}
