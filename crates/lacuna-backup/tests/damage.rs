//! Damage at every byte of every file of a backup is found, and nothing damaged is given out.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{damage, sample};
use lacuna_backup::{Folder, Form};

/// Bytes of a file that are damaged one after the other: all of short ones, a sample of long ones, and all
/// of the end, where indexes are.
fn places(len: usize) -> Vec<usize> {
    let step = (len / 150).max(1);
    let end = len.saturating_sub(300);
    (0..end).step_by(step).chain(end..len).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn is_found(folder: &Path) -> bool {
    Folder::open(folder).map_or(true, |folder| !damage(&folder).is_empty())
}

fn every_byte_counts(form: Form, seed: u64) {
    let (bench, points) = sample(form, seed);
    assert_eq!(points.len(), 2);
    let folder = bench.folder.path();
    assert!(!is_found(folder));
    let files = files(folder);
    assert!(files.len() >= 5, "{files:?}");
    for file in files {
        let whole = fs::read(&file).unwrap();
        for at in places(whole.len()) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&file, &bytes).unwrap();
            assert!(is_found(folder), "byte {at} of {}", file.display());
        }
        for len in [0, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..len]).unwrap();
            assert!(is_found(folder), "{len} bytes of {}", file.display());
        }
        fs::write(&file, [&whole[..], &[0]].concat()).unwrap();
        assert!(is_found(folder), "a byte more of {}", file.display());
        fs::write(&file, &whole).unwrap();
    }
    assert!(!is_found(folder));
}

#[test]
fn damage_at_every_byte_of_segments_and_manifests_is_found() {
    every_byte_counts(Form::Segments, 7);
}

#[test]
fn damage_of_images_and_their_manifests_is_found() {
    every_byte_counts(Form::Qcow2, 7);
}

#[test]
fn a_file_that_is_gone_is_found() {
    let (bench, _) = sample(Form::Segments, 9);
    let folder = bench.folder.path();
    for file in files(folder) {
        if file.ends_with("p1.json") {
            // That is how a point is removed.
            continue;
        }
        let whole = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        assert!(is_found(folder), "{}", file.display());
        fs::write(&file, whole).unwrap();
    }
}

#[test]
fn a_point_below_that_was_made_anew_is_another_point() {
    let (bench, points) = sample(Form::Segments, 11);
    let (other, _) = sample(Form::Segments, 12);
    for file in files(other.folder.path()) {
        if file.file_name().unwrap().to_str().unwrap().starts_with("p0.") {
            fs::copy(&file, bench.folder.path().join(file.file_name().unwrap())).unwrap();
        }
    }
    let now = bench.folder.points().unwrap();
    let error = now.chain(&points[1]).unwrap_err();
    assert!(error.to_string().contains("was another one"), "{error}");
}
