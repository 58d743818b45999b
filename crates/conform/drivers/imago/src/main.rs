//! A driver that lets `lacuna conform` try imago: `docs/conformance.md` describes the protocol.
//!
//! It stands on imago alone, as an example for authors of other engines.

use std::io::{self, BufRead, ErrorKind, Write};
use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, Mapping, PermissiveImplicitOpenGate};

/// The version that is built in, and what it has no code for.
const HELLO: &str = "1 imago-0.2.6 without dirty extended-l2 zstd";

fn main() -> io::Result<()> {
    let mut open = None;
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line?;
        match answer(&mut open, &line) {
            Ok(text) if text.is_empty() => writeln!(output, "ok")?,
            Ok(text) => writeln!(output, "ok {text}")?,
            Err(error) => {
                let word = match error.kind() {
                    ErrorKind::Unsupported => "unsupported",
                    _ => "error",
                };
                writeln!(output, "{word} {}", error.to_string().replace('\n', " "))?;
            }
        }
        output.flush()?;
        if line == "quit" {
            break;
        }
    }
    Ok(())
}

fn answer(open: &mut Option<FormatAccess<File>>, line: &str) -> io::Result<String> {
    let (request, rest) = line.split_once(' ').unwrap_or((line, ""));
    match request {
        "hello" => return Ok(HELLO.to_owned()),
        "open" => {
            let (mode, path) = rest.split_once(' ').ok_or_else(|| wrong(line))?;
            let image = Qcow2::<File>::builder_path(Path::new(path))
                .write(mode == "rw")
                .open(PermissiveImplicitOpenGate::default())?;
            return Ok(open.insert(FormatAccess::new(image)).size().to_string());
        }
        "quit" => return Ok(String::new()),
        _ => {}
    }
    let image = open.as_mut().ok_or_else(|| wrong("no image is open"))?;
    let done = match request {
        "read" => {
            let (at, len) = range(rest)?;
            let mut bytes = vec![0; len as usize];
            image.read(&mut bytes, at)?;
            return Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        "extents" => {
            let (at, len) = range(rest)?;
            let (mapping, len) = image.get_mapping(at, len)?;
            let word = if matches!(mapping, Mapping::Zero { .. }) { "zero" } else { "data" };
            return Ok(format!("{len} {word}"));
        }
        "write" => {
            let (at, text) = rest.split_once(' ').ok_or_else(|| wrong(line))?;
            image.write(&unhex(text)?, number(at)?)
        }
        "zero" => match rest.strip_suffix(" unmap") {
            Some(rest) => range(rest).and_then(|(at, len)| image.discard_to_zero(at, len)),
            None => range(rest).and_then(|(at, len)| image.write_zeroes(at, len)),
        },
        "discard" => range(rest).and_then(|(at, len)| image.discard_to_any(at, len)),
        "flush" => image.flush().and_then(|()| image.sync()),
        "close" => {
            let result = image.flush().and_then(|()| image.sync());
            *open = None;
            result
        }
        _ => Err(wrong(line)),
    };
    done.map(|()| String::new())
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, format!("not understood: {what:.60}"))
}

fn range(text: &str) -> io::Result<(u64, u64)> {
    let (at, len) = text.split_once(' ').ok_or_else(|| wrong(text))?;
    Ok((number(at)?, number(len)?))
}

fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| wrong(text))
}

fn unhex(text: &str) -> io::Result<Vec<u8>> {
    let byte = |at: usize| {
        let digits = text.get(at..at + 2)?;
        u8::from_str_radix(digits, 16).ok()
    };
    (0..text.len()).step_by(2).map(byte).collect::<Option<_>>().ok_or_else(|| wrong(text))
}
