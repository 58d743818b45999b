//! Claims on files: who gets along with whom, what a change of claim does, when a claim ends.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};

use lacuna::ErrorKind;
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, ChainOptions, FileOpener, Format, Sharing};
use lacuna::qcow2::{self, Access, BackingName, CreateOptions};
use lacuna::storage::{
    CacheMode, Claim, Create, FileAccess, FileOptions, FileStorage, LockConflict, Locking,
    Obstacle, Permissions, Storage,
};
use lacuna::units::HostOffset;
use pollster::block_on;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a scratch folder can be made")
}

fn file_in(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("disk.img");
    std::fs::write(&path, [7; 4096]).expect("the scratch file can be written");
    path
}

fn claimed(path: &Path, claim: Claim) -> lacuna::Result<FileStorage> {
    let options = FileOptions { claim: Some(claim), ..FileOptions::read_write() };
    FileStorage::open(path, &options)
}

fn busy(result: lacuna::Result<FileStorage>) -> Obstacle {
    let error = result.expect_err("somebody has the file");
    assert_eq!(error.kind(), ErrorKind::Busy);
    LockConflict::of(&error).expect("the error says what is in the way").obstacle()
}

/// All claims there are.
fn claims() -> impl Iterator<Item = Claim> {
    let sets = || (0..16).map(Permissions::from_bits_truncate);
    sets().flat_map(move |held| sets().map(move |shared| Claim { held, shared }))
}

#[test]
fn two_claims_are_had_at_once_exactly_if_they_get_along() {
    let folder = folder();
    let path = file_in(&folder);
    let (first, second) = (claimed(&path, Claim::NONE).unwrap(), claimed(&path, Claim::NONE));
    let second = second.unwrap();
    // A seventh of all pairs, another one for each row.
    for (index, one) in claims().enumerate() {
        first.claim(one).unwrap();
        for other in claims().skip(index % 7).step_by(7) {
            let had = second.claim(other).is_ok();
            assert_eq!(had, one.gets_along_with(other), "{one:?} {other:?}");
            second.claim(Claim::NONE).unwrap();
        }
    }
}

#[test]
fn readers_share_a_file_and_a_writer_shares_it_with_nobody() {
    let folder = folder();
    let path = file_in(&folder);
    let reader = FileStorage::open(&path, &FileOptions::read_only()).unwrap();
    let other = FileStorage::open(&path, &FileOptions::read_only()).unwrap();
    let writing = || FileStorage::open(&path, &FileOptions::read_write());
    assert_eq!(busy(writing()), Obstacle::Denied(Permissions::WRITE));
    drop(reader);
    assert_eq!(busy(writing()), Obstacle::Denied(Permissions::WRITE));
    drop(other);
    let _writer = writing().unwrap();
    let reading = FileStorage::open(&path, &FileOptions::read_only());
    assert_eq!(busy(reading), Obstacle::Held(Permissions::WRITE));
    assert_eq!(busy(writing()), Obstacle::Denied(Permissions::WRITE));
}

#[test]
fn a_refused_change_leaves_the_claim_as_it_was() {
    let folder = folder();
    let path = file_in(&folder);
    let first = claimed(&path, Claim::READING).unwrap();
    let second = claimed(&path, Claim::READING).unwrap();
    assert_eq!(first.claim(Claim::WRITING).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(first.claimed(), Claim::READING);
    // What was tried is not left behind: others still read, and the second still denies writing.
    claimed(&path, Claim::READING).unwrap();
    drop(second);
    first.claim(Claim::WRITING).unwrap();
    assert!(claimed(&path, Claim::READING).is_err());
    first.claim(Claim::READING).unwrap();
    claimed(&path, Claim::READING).unwrap();
}

#[test]
fn a_file_in_use_is_not_emptied() {
    let folder = folder();
    let path = file_in(&folder);
    let _reader = FileStorage::open(&path, &FileOptions::read_only()).unwrap();
    busy(FileStorage::open(&path, &FileOptions::replace()));
    assert_eq!(std::fs::read(&path).unwrap(), [7; 4096]);
}

#[test]
fn the_holder_is_found_with_what_it_holds() {
    let folder = folder();
    let path = file_in(&folder);
    let _writer = claimed(&path, Claim::MAKING).unwrap();
    let error = claimed(&path, Claim::READING).unwrap_err();
    let conflict = LockConflict::of(&error).unwrap();
    assert_eq!(conflict.path(), path);
    let holders = conflict.holders();
    let own = holders.found.iter().find(|holder| holder.pid == std::process::id()).unwrap();
    assert_eq!((own.claim, holders.found.len()), (Claim::MAKING, 1));
    assert!(own.command.starts_with("locks"), "{own}");
    let text = error.clone().context("Opening").to_string();
    assert_eq!(text, format!("Opening: {} is in use by somebody who holds write", path.display()));
    drop(_writer);
    assert_eq!(conflict.holders().found, []);
}

/// A ring keeps files for a moment after their last completion; nobody may notice.
#[test]
fn a_storage_that_was_dropped_is_in_nobodys_way() {
    let folder = folder();
    let path = file_in(&folder);
    for round in 0..200u64 {
        let cache = if round % 2 == 0 { CacheMode::Direct } else { CacheMode::Buffered };
        let options = FileOptions { cache, ..FileOptions::read_write() };
        let storage = FileStorage::open(&path, &options)
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        block_on(async {
            let offset = HostOffset(round % 4 * 512);
            storage.write_at(offset, Buffer::zeroed(512)).await.0.unwrap();
            storage.read_at(offset, Buffer::new(4096)).await.0.unwrap();
            storage.flush().await.unwrap();
        });
    }
}

#[test]
fn without_locking_nobody_is_asked() {
    let folder = folder();
    let path = file_in(&folder);
    let _writer = FileStorage::open(&path, &FileOptions::read_write()).unwrap();
    let options = FileOptions { locking: Locking::Off, ..FileOptions::read_write() };
    let other = FileStorage::open(&path, &options).unwrap();
    other.claim(Claim::READING).unwrap();
    assert_eq!(other.claimed(), Claim::READING);
}

fn make(path: &Path, backing: Option<&str>) {
    let options = FileOptions { create: Create::Exclusive, ..FileOptions::read_write() };
    let storage = FileStorage::open(path, &options).unwrap();
    let format = Some("qcow2".to_owned());
    let backing = backing.map(|name| BackingName { name: name.to_owned(), format });
    let options = CreateOptions { size_bytes: 1 << 20, backing, ..CreateOptions::default() };
    block_on(qcow2::create(&storage, &options)).unwrap();
}

#[test]
fn a_chain_claims_each_file_for_what_it_does_with_it() {
    let folder = folder();
    let (base, top) = (folder.path().join("base"), folder.path().join("top"));
    make(&base, None);
    make(&top, Some("base"));
    let open = |path: &Path, access, sharing| {
        let options = ChainOptions {
            backing: Allow::Named,
            sharing,
            ..ChainOptions::new(Format::Qcow2, access)
        };
        block_on(chain::open(&FileOpener::default(), path, &options))
    };
    let chain = open(&top, Access::ReadWrite, Sharing::Format).unwrap();
    assert_eq!(chain.disk().storage().claimed(), Claim::WRITING);
    // The base is read: others may read it, and nobody may write it.
    open(&base, Access::ReadOnly, Sharing::Format).unwrap();
    let refused = open(&base, Access::ReadWrite, Sharing::Format).unwrap_err();
    assert_eq!(LockConflict::of(&refused).unwrap().path(), base);
    assert!(open(&top, Access::ReadOnly, Sharing::Format).is_err());
    open(&top, Access::ReadOnly, Sharing::All).unwrap();
    let both = open(&top, Access::ReadWrite, Sharing::All).unwrap_err();
    assert_eq!(both.kind(), ErrorKind::InvalidRequest);
    drop(chain);
    open(&base, Access::ReadWrite, Sharing::Format).unwrap();
}

#[test]
fn access_and_claim_are_two_things() {
    let folder = folder();
    let path = file_in(&folder);
    let options = FileOptions {
        access: FileAccess::ReadOnly,
        claim: Some(Claim::WRITING),
        ..Default::default()
    };
    let reader = FileStorage::open(&path, &options).unwrap();
    let written = block_on(reader.write_at(HostOffset(0), Buffer::zeroed(512))).0;
    assert_eq!(written.unwrap_err().kind(), ErrorKind::ReadOnly);
    busy(claimed(&path, Claim::READING));
}
