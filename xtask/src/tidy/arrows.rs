//! Which module of the engine may name which: the arrows of the design.
//!
//! Every path that starts with `crate`, `self` or `super` is followed to the area it ends in. Unit
//! tests are left out: they may build whatever world they need.

use super::Finding;
use super::source::{Source, Token};

const ENGINE: &str = "crates/lacuna/src/";

/// A part of the engine and what it may name besides itself and the vocabulary.
struct Area {
    path: &'static str,
    may_name: &'static [&'static str],
}

/// What everything may name.
const VOCABULARY: [&str; 6] = ["units", "buffer", "error", "Error", "ErrorKind", "Result"];

/// A path belongs to the longest entry that it begins with.
const AREAS: [Area; 14] = [
    Area { path: "units", may_name: &[] },
    Area { path: "buffer", may_name: &[] },
    Area { path: "error", may_name: &[] },
    Area { path: "storage", may_name: &["storage::sys"] },
    Area { path: "storage::sys", may_name: &["storage"] },
    // A transfer gives the buffer back whoever makes it: storage's word, used by layers as well.
    // So is how firmly space is set aside, which preallocation comes down to.
    Area {
        path: "block",
        may_name: &["storage::Transfer", "storage::Reserve", "storage::HostSource"],
    },
    // Waits for a layer on the calling thread.
    Area { path: "blocking", may_name: &["block", "storage::Transfer"] },
    Area { path: "raw", may_name: &["block", "storage"] },
    Area { path: "qcow2::format", may_name: &[] },
    Area { path: "qcow2", may_name: &["qcow2::format", "block", "storage"] },
    Area { path: "chain", may_name: &["qcow2", "qcow2::format", "raw", "block", "storage"] },
    Area { path: "job", may_name: &["chain", "qcow2", "qcow2::format", "raw", "block", "storage"] },
    // Internals that the fuzz targets reach.
    Area { path: "fuzzing", may_name: &["qcow2", "qcow2::format"] },
    Area { path: "", may_name: &[] },
];

pub(super) fn check(source: &Source, findings: &mut Vec<Finding>) {
    let Some(file) = source.path.strip_prefix(ENGINE) else { return };
    let module = module_of(file);
    let from = area_of(&module);
    // The root only declares modules and re-exports.
    if from.path.is_empty() && module.is_empty() {
        return;
    }
    for (target, line) in paths(&source.product(), &module) {
        if let Some(text) = judge(from, &module, &target) {
            findings.push(Finding { path: source.path.clone(), line, text });
        }
    }
}

/// Says what is wrong with naming `target` from a module of area `from`.
fn judge(from: &Area, module: &[String], target: &[String]) -> Option<String> {
    let name = target.join("::");
    if from.path.is_empty() {
        let module = module.join("::");
        return Some(format!("module `{module}` has no arrows yet: add it to AREAS in xtask"));
    }
    let to = area_of(target);
    let is_fine = to.path == from.path && !to.path.is_empty()
        || target.first().is_none_or(|first| VOCABULARY.contains(&first.as_str()))
        || from.may_name.iter().any(|allowed| permits(allowed, &name, to));
    (!is_fine).then(|| format!("{} must not name `{name}` (no arrow points there)", from.path))
}

/// An allowed area permits what belongs to it, but not the areas inside of it.
fn permits(allowed: &str, name: &str, to: &Area) -> bool {
    allowed == to.path
        || AREAS.iter().all(|area| area.path != allowed)
            && (name == allowed || name.starts_with(&format!("{allowed}::")))
}

fn area_of(path: &[String]) -> &'static Area {
    let name = path.join("::");
    let holds = |area: &&Area| {
        area.path.is_empty() || name == area.path || name.starts_with(&format!("{}::", area.path))
    };
    let longest = AREAS.iter().filter(holds).max_by_key(|area| area.path.len());
    longest.unwrap_or(&AREAS[AREAS.len() - 1])
}

/// `qcow2/format/l2.rs` is `qcow2::format::l2`, `qcow2/mod.rs` is `qcow2`.
fn module_of(file: &str) -> Vec<String> {
    let mut parts: Vec<String> =
        file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if matches!(parts.last().map(String::as_str), Some("mod" | "lib")) {
        parts.pop();
    }
    parts
}

/// Lists all paths within the crate, from its root on.
fn paths(tokens: &[Token], file_module: &[String]) -> Vec<(Vec<String>, usize)> {
    let mut found = Vec::new();
    let mut module = Inline { path: file_module.to_vec(), depth: 0, opened: Vec::new() };
    for at in 0..tokens.len() {
        module.enter(tokens, at);
        let follows_path = at > 0 && tokens[at - 1].text == "::";
        let leads_path = tokens.get(at + 1).is_some_and(|next| next.text == "::");
        let start = match tokens[at].text.as_str() {
            "crate" => Vec::new(),
            "self" => module.path.clone(),
            "super" => up(&module.path),
            _ => continue,
        };
        if leads_path && !follows_path {
            tree(tokens, at + 2, start, &mut found);
        }
    }
    found
}

/// The module that a token belongs to, where a file has modules in braces.
struct Inline {
    path: Vec<String>,
    depth: usize,
    /// The depths at which they were opened.
    opened: Vec<usize>,
}

impl Inline {
    fn enter(&mut self, tokens: &[Token], at: usize) {
        match tokens[at].text.as_str() {
            "{" => {
                if at >= 2 && tokens[at - 2].text == "mod" {
                    self.path.push(tokens[at - 1].text.clone());
                    self.opened.push(self.depth);
                }
                self.depth += 1;
            }
            "}" => {
                self.depth = self.depth.saturating_sub(1);
                if self.opened.last() == Some(&self.depth) {
                    self.opened.pop();
                    self.path.pop();
                }
            }
            _ => {}
        }
    }
}

fn up(module: &[String]) -> Vec<String> {
    module[..module.len().saturating_sub(1)].to_vec()
}

/// Reads what may follow `::` from `at` on: a name, `super`, `*` or a group in braces; returns
/// the index behind it.
fn tree(
    tokens: &[Token],
    at: usize,
    mut start: Vec<String>,
    found: &mut Vec<(Vec<String>, usize)>,
) -> usize {
    let Some(token) = tokens.get(at) else { return at };
    match token.text.as_str() {
        "{" => return group(tokens, at + 1, &start, found),
        "super" => start = up(&start),
        "self" => {}
        text if text.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
            start.push(text.to_owned());
        }
        _ => {
            found.push((start, token.line));
            return at + 1;
        }
    }
    if tokens.get(at + 1).is_some_and(|next| next.text == "::") {
        tree(tokens, at + 2, start, found)
    } else {
        found.push((start, token.line));
        at + 1
    }
}

fn group(
    tokens: &[Token],
    mut at: usize,
    start: &[String],
    found: &mut Vec<(Vec<String>, usize)>,
) -> usize {
    while let Some(token) = tokens.get(at) {
        at = match token.text.as_str() {
            "}" => return at + 1,
            "," => at + 1,
            "as" => at + 2,
            _ => tree(tokens, at, start.to_vec(), found),
        };
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        super::super::found(check, &format!("{ENGINE}{path}"), text)
    }

    #[test]
    fn storage_knows_nothing_above_itself() {
        assert_eq!(
            found("storage/file.rs", "use crate::{Error, buffer::Buffer, units::*};").len(),
            0
        );
        let named =
            found("storage/file.rs", "use crate::{Error,\n block::{self, Layer}, qcow2::X};");
        assert_eq!(named.len(), 3, "{named:?}");
        assert!(named[1].starts_with("2: storage must not name `block::Layer`"), "{named:?}");
    }

    #[test]
    fn format_does_not_know_storage_nor_its_own_engine() {
        assert_eq!(
            found("qcow2/format/l2.rs", "use super::l1::COPIED; use crate::Result;").len(),
            0
        );
        assert_eq!(found("qcow2/format/l2.rs", "fn f() { crate::storage::len() }").len(), 1);
        assert_eq!(found("qcow2/format/l2.rs", "use super::super::Image;").len(), 1);
    }

    #[test]
    fn layers_may_speak_of_transfers_only() {
        assert_eq!(found("block/layer.rs", "use crate::storage::Transfer;").len(), 0);
        assert_eq!(found("block/layer.rs", "use crate::storage::{Storage, Transfer};").len(), 1);
    }

    #[test]
    fn qcow2_opens_nothing_and_raw_does_not_know_it() {
        assert_eq!(
            found("qcow2/read.rs", "use crate::block::Layer; use crate::storage::X;").len(),
            0
        );
        assert_eq!(found("qcow2/read.rs", "use crate::chain::open;").len(), 1);
        assert_eq!(found("qcow2/read.rs", "use crate::storage::sys::pread;").len(), 1);
        assert_eq!(found("raw.rs", "use crate::qcow2::Image;").len(), 1);
    }

    #[test]
    fn jobs_stand_on_top() {
        let text = "use crate::{chain, qcow2::Image, qcow2::format::Header, raw::Raw};";
        assert_eq!(found("job/convert.rs", text).len(), 0);
        assert_eq!(found("chain/mod.rs", "use crate::job::convert;").len(), 1);
    }

    #[test]
    fn a_module_without_arrows_is_found() {
        assert_eq!(found("extra.rs", "use crate::Result;").len(), 1);
    }

    #[test]
    fn modules_in_braces_have_a_super_of_their_own() {
        let text = "mod inner { use super::super::Storage; }";
        assert_eq!(found("storage/file.rs", text).len(), 0);
        let text = "mod inner { use super::super::super::block::Layer; }";
        assert_eq!(found("storage/file.rs", text).len(), 1);
    }

    #[test]
    fn unit_tests_and_visibility_are_no_paths() {
        let text = "pub(crate) fn f() {} pub(in crate::storage) fn g() {} \
                    #[cfg(test)] mod tests { use crate::qcow2::Image; }";
        assert_eq!(found("storage/file.rs", text).len(), 0);
    }
}
