//! The files at hand: what lies in the current folder, and this program.

use std::fs;
use std::path::{Path, PathBuf};

/// No more than this is taken, so that the demo stays quick. The disk holds it twice.
const LIMIT_BYTES: u64 = 40 << 20;
/// A file larger than this is passed by.
const LARGE_BYTES: u64 = 24 << 20;

/// Reads them: names without folders, made unique, and contents, in a stable order.
///
/// What cannot be read is passed by: the demo needs some files, not all of them.
pub(super) fn at_hand() -> Vec<(String, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = std::env::current_exe().into_iter().collect();
    paths.extend(std::env::current_dir().map(|folder| walk(&folder, 6)).unwrap_or_default());
    let mut files = Vec::new();
    let mut left = LIMIT_BYTES;
    for path in paths {
        let len = path.metadata().map_or(u64::MAX, |metadata| metadata.len());
        if len == 0 || len > left.min(LARGE_BYTES) {
            continue;
        }
        if let Ok(content) = fs::read(&path) {
            left = left.saturating_sub(content.len() as u64);
            files.push((unique_name(files.len(), &path), content));
        }
    }
    files
}

/// Returns them as they lie in the folder that is copied: with a file more that makes the copy begin
/// where the first began within a cluster, `blocks` of the file system later.
///
/// A guest's kernel sees to that for large files. What makes file systems here does not.
pub(super) fn evened_out(
    files: &[(String, Vec<u8>)],
    blocks: u64,
    block_bytes: u64,
) -> Vec<(String, Vec<u8>)> {
    let mut files = files.to_vec();
    if blocks > 0 {
        files.push(("notes.txt".to_owned(), vec![b'.'; (blocks * block_bytes) as usize]));
    }
    files
}

fn unique_name(number: usize, path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("{number:04}-{name}")
}

/// Lists the files of a folder, without hidden ones and without what a build leaves.
fn walk(folder: &Path, levels: u32) -> Vec<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut paths = Vec::new();
    for entry in entries {
        let name = entry.file_name();
        let is_passed_by = name.to_string_lossy().starts_with('.') || name == "target";
        match entry.file_type() {
            Ok(kind) if kind.is_file() && !is_passed_by => paths.push(entry.path()),
            Ok(kind) if kind.is_dir() && !is_passed_by && levels > 0 => {
                paths.extend(walk(&entry.path(), levels - 1));
            }
            _ => {}
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_in_order_without_hidden_files() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b", ".hidden", "target/x", "a/c"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        let names: Vec<_> = walk(folder.path(), 2)
            .iter()
            .map(|path| path.strip_prefix(folder.path()).unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["a/c", "b"]);
    }

    #[test]
    fn there_is_always_something_at_hand() {
        assert!(!at_hand().is_empty());
    }
}
