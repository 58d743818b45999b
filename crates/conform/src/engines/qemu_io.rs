//! The driver of qemu-io: its shell is asked, a command at a time.

use std::io::{PipeReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::Value;
use tempfile::NamedTempFile;

use crate::protocol::{Mode, Need, Status};
use crate::serve::{Engine, Failure, OpenDisk, Outcome};

/// What the shell says when it waits for a command.
const PROMPT: &[u8] = b"qemu-io> ";

/// The most bytes of an answer: the dump of what one request reads takes five for each.
const MOST_BYTES: usize = 64 << 20;

/// QEMU, by its program `qemu-io`, and `qemu-img` beside it for sizes and extents.
///
/// ```
/// use lacuna_conform::engines::QemuIo;
/// assert_eq!(QemuIo::new("/usr/bin/qemu-io").image_program(), std::path::Path::new("/usr/bin/qemu-img"));
/// ```
#[derive(Clone, Debug)]
pub struct QemuIo {
    program: PathBuf,
}

impl QemuIo {
    /// Takes the program of this name or path.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Returns the program `qemu-img` that belongs to it.
    #[must_use]
    pub fn image_program(&self) -> PathBuf {
        self.program.with_file_name("qemu-img")
    }
}

impl Engine for QemuIo {
    fn name(&self) -> String {
        let output = Command::new(&self.program).arg("--version").stdin(Stdio::null()).output();
        let text = output.map(|it| String::from_utf8_lossy(&it.stdout).into_owned());
        let version = text.unwrap_or_default();
        format!("qemu-io-{}", version.split(' ').nth(2).unwrap_or("unknown").trim())
    }

    fn lacks(&self) -> Vec<Need> {
        Vec::new()
    }

    fn open(&mut self, path: &Path, mode: Mode) -> Outcome<Box<dyn OpenDisk>> {
        let (output, errors) = std::io::pipe()?;
        let mut command = Command::new(&self.program);
        command.args(["-f", "qcow2", "-d", "unmap"]);
        if mode == Mode::Read {
            command.arg("-r");
        }
        // QEMU takes the name of a data file from where it runs, not from where the image is.
        if let Some(folder) = path.parent().filter(|folder| folder.is_absolute()) {
            command.current_dir(folder);
        }
        let mut child = command
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()?;
        // The ends that the command had are those of the program alone from now on.
        drop(command);
        let input = child.stdin.take().ok_or_else(|| "no way to ask".to_owned())?;
        let mut shell = Shell { child, input, output };
        shell.answer()?;
        let size = virtual_size(&self.image_program(), path)?;
        let (image_program, path) = (self.image_program(), path.to_owned());
        Ok(Box::new(Opened {
            shell,
            size,
            mode,
            image_program,
            path,
            payload: NamedTempFile::new()?,
        }))
    }
}

/// A qemu-io that waits for commands.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: PipeReader,
}

impl Shell {
    /// Reads up to the next prompt.
    fn answer(&mut self) -> Outcome<String> {
        let mut text = Vec::new();
        let mut piece = vec![0; 1 << 16];
        while !text.ends_with(PROMPT) {
            match self.output.read(&mut piece)? {
                0 => return Err(words(&text).into()),
                len => text.extend_from_slice(&piece[..len]),
            }
            if text.len() > MOST_BYTES {
                return Err("an answer without end".to_owned().into());
            }
        }
        text.truncate(text.len() - PROMPT.len());
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn ask(&mut self, command: &str) -> Outcome<String> {
        writeln!(self.input, "{command}")?;
        self.input.flush()?;
        self.answer()
    }

    /// Asks for something that is acknowledged with a count of bytes.
    fn transfer(&mut self, command: &str) -> Outcome<String> {
        let text = self.ask(command)?;
        match text.contains(" bytes at offset ") {
            true => Ok(text),
            false => Err(words(text.as_bytes()).into()),
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // It has ended, or nobody wants to know any more.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

/// The first line of what it said.
fn words(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it ended").trim().to_owned()
}

struct Opened {
    shell: Shell,
    size: u64,
    mode: Mode,
    image_program: PathBuf,
    path: PathBuf,
    /// What is written next.
    payload: NamedTempFile,
}

impl OpenDisk for Opened {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Outcome<()> {
        let text = self.shell.transfer(&format!("read -v {at} {}", bytes.len()))?;
        match dumped(&text, bytes) == bytes.len() {
            true => Ok(()),
            false => Err(format!("a dump of other than {} bytes", bytes.len()).into()),
        }
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Outcome<()> {
        std::fs::write(self.payload.path(), bytes)?;
        let file = self.payload.path().display();
        self.shell.transfer(&format!("write -s {file} {at} {}", bytes.len())).map(drop)
    }

    fn zero(&mut self, at: u64, len: u64, unmap: bool) -> Outcome<()> {
        let flag = if unmap { "-u " } else { "" };
        self.shell.transfer(&format!("write -z {flag}{at} {len}")).map(drop)
    }

    fn discard(&mut self, at: u64, len: u64) -> Outcome<()> {
        self.shell.transfer(&format!("discard {at} {len}")).map(drop)
    }

    fn flush(&mut self) -> Outcome<()> {
        let text = self.shell.ask("flush")?;
        match text.trim().is_empty() {
            true => Ok(()),
            false => Err(words(text.as_bytes()).into()),
        }
    }

    fn extents(&mut self, at: u64, len: u64) -> Outcome<Vec<(u64, Status)>> {
        if self.mode == Mode::Write {
            // The other program sees what is in the file.
            self.flush()?;
        }
        let map = told(&self.image_program, "map", &self.path)?;
        let extents: Vec<_> = map.as_array().into_iter().flatten().collect();
        let part = |extent: &&Value| {
            let (start, len_there) = (extent["start"].as_u64()?, extent["length"].as_u64()?);
            let (from, to) = (start.max(at), start.checked_add(len_there)?.min(at + len));
            let zero = extent["zero"].as_bool()?;
            (from < to).then_some((to - from, if zero { Status::Zero } else { Status::Data }))
        };
        Ok(extents.iter().filter_map(part).collect())
    }

    fn close(mut self: Box<Self>) -> Outcome<()> {
        writeln!(self.shell.input, "quit")?;
        self.shell.input.flush()?;
        let mut text = Vec::new();
        self.shell.output.by_ref().take(MOST_BYTES as u64).read_to_end(&mut text)?;
        match self.shell.child.wait()? {
            status if status.success() => Ok(()),
            status => Err(Failure::Failed(format!("{status}: {}", words(&text)))),
        }
    }
}

/// Reads a dump, and returns how many bytes it had.
fn dumped(text: &str, bytes: &mut [u8]) -> usize {
    let mut count = 0;
    for line in text.lines() {
        // `00000000:  61 62 63  abc`: the bytes are what follows the first two blanks.
        let Some((place, rest)) = line.split_once(":  ") else { continue };
        if u64::from_str_radix(place, 16).is_err() {
            continue;
        }
        for digits in rest.split(' ').take(16).take_while(|digits| digits.len() == 2) {
            let (Ok(byte), Some(slot)) = (u8::from_str_radix(digits, 16), bytes.get_mut(count))
            else {
                return count;
            };
            *slot = byte;
            count += 1;
        }
    }
    count
}

fn virtual_size(program: &Path, path: &Path) -> Outcome<u64> {
    let size = told(program, "info", path)?["virtual-size"].as_u64();
    size.ok_or_else(|| "no size is told".to_owned().into())
}

/// What `qemu-img` tells of an image that is open.
fn told(program: &Path, verb: &str, path: &Path) -> Outcome<Value> {
    let folder = path.parent().filter(|folder| folder.is_absolute());
    let output = Command::new(program)
        .current_dir(folder.unwrap_or_else(|| Path::new(".")))
        .args([verb, "-U", "--output=json", "-f", "qcow2"])
        .arg(path)
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        return Err(words(&output.stderr).into());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_is_read_with_any_text_beside_it() {
        let text = "00000000:  61 62 63 64 65 66 67 68 69 6a 20 20 2e 3a 20 20  abcdefghij  .:  \n\
                    00000010:  00 ff  ..\n\
                    read 18/18 bytes at offset 512\n18 bytes, 1 ops; 00.00 sec (1 MiB/sec)\n";
        let mut bytes = [0; 18];
        assert_eq!(dumped(text, &mut bytes), 18);
        assert_eq!(&bytes, b"abcdefghij  .:  \x00\xff");
    }
}
