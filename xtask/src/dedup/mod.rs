//! A benchmark of our own: what it costs to find equal clusters and to have them share a place.
//!
//! * `rates.rs` — how fast an image is read and fingerprinted, and what that takes of memory
//! * `online.rs` — what `serve --dedup=online` costs clients that write nothing twice, and saves others
//! * `peers.rs` — what borg, restic and duperemove find in two images of one origin

mod online;
mod peers;
mod rates;

use std::path::Path;

use crate::Outcome;
use crate::run::{command, output};
use crate::scratch::Scratch;

/// A part: it makes its own files, and returns a table.
type Part = fn(&Path, &Scratch) -> Outcome<String>;

/// Runs all parts, or those that are named.
pub(crate) fn run(ours: &Path, arguments: &[String]) -> Outcome {
    let parts: [(&str, Part); 3] =
        [("rates", rates::run), ("online", online::run), ("peers", peers::run)];
    if let Some(wrong) = arguments.iter().find(|word| !parts.iter().any(|(name, _)| name == word)) {
        return Err(format!("--dedup has no part `{wrong}`: rates, online, peers"));
    }
    for (name, part) in parts {
        if arguments.is_empty() || arguments.iter().any(|word| word == name) {
            let scratch = Scratch::new("dedup")?;
            println!("{}\n", part(ours, &scratch)?);
        }
    }
    Ok(())
}

/// Makes a file of bytes that nothing has twice.
fn random(scratch: &Scratch, name: &str, mib: u64) -> Outcome<String> {
    let file = scratch.file(name);
    let line = format!("head -c {mib}M /dev/urandom > \"$0\"");
    output(command("bash", &["-c", &line, &file]))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_known_by_name() {
        let reason = run(Path::new("x"), &["rate".to_owned()]).unwrap_err();
        assert!(reason.contains("rates, online, peers"), "{reason}");
    }
}
