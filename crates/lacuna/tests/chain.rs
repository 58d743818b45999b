//! What a chain opens, what it refuses, and that it never opens more than it was allowed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::chain::{
    self, Allow, Chain, ChainOptions, Disk, Format, FormatChoice, Identity, Instead, Levels,
    MAX_LEVELS, MemoryOpener, Opener, Role, StandIn, UnnamedFormat,
};
use lacuna::qcow2::Access;
use lacuna::storage::{Claim, MemoryStorage};
use lacuna::units::GuestOffset;
use lacuna::{Error, ErrorKind, Result};
use pollster::block_on;
use testkit::ImageBuilder;

const SIZE: u64 = 1 << 20;
/// Header extensions and the feature bit (qcow2: B.2, B.3).
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;
const EXTERNAL_DATA_FILE: u64 = 1 << 2;

/// An opener that writes down what was opened, and how.
#[derive(Default)]
struct Recorder {
    files: MemoryOpener,
    opened: Mutex<Vec<(PathBuf, Access)>>,
}

impl Recorder {
    fn with(mut self, path: &str, storage: MemoryStorage) -> Self {
        self.files = self.files.with(path, storage);
        self
    }

    fn opened(&self) -> Vec<(String, Access)> {
        let opened = self.opened.lock().unwrap();
        opened.iter().map(|(path, access)| (path.display().to_string(), *access)).collect()
    }
}

impl Opener for Recorder {
    type Storage = Arc<MemoryStorage>;

    async fn open(&self, path: &Path, access: Access) -> Result<Self::Storage> {
        self.opened.lock().unwrap().push((path.to_owned(), access));
        self.files.open(path, access).await
    }

    async fn claim(&self, storage: &Self::Storage, claim: Claim) -> Result<()> {
        self.files.claim(storage, claim).await
    }

    async fn identify(&self, path: &Path) -> Result<Identity> {
        self.files.identify(path).await
    }
}

fn built(builder: &ImageBuilder) -> MemoryStorage {
    let bytes = builder.build().bytes;
    MemoryStorage::from(&bytes.read_vec(0, bytes.len() as usize)[..])
}

fn builder() -> ImageBuilder {
    ImageBuilder::new(3, 16, SIZE)
}

fn overlay(name: &str, format: Option<&str>) -> MemoryStorage {
    let named = builder().backing(name);
    built(&match format {
        Some(format) => named.extension(BACKING_FORMAT, format.as_bytes()),
        None => named,
    })
}

fn with_data_file(name: &str) -> MemoryStorage {
    built(&builder().features(EXTERNAL_DATA_FILE, 0, 0).extension(DATA_FILE, name.as_bytes()))
}

fn raw(byte: u8) -> MemoryStorage {
    MemoryStorage::from(&vec![byte; SIZE as usize][..])
}

fn trusting() -> ChainOptions {
    ChainOptions {
        backing: Allow::Named,
        data_file: Allow::Named,
        ..ChainOptions::new(Format::Qcow2, Access::ReadWrite)
    }
}

fn open(recorder: &Recorder, options: &ChainOptions) -> Result<Chain<Arc<MemoryStorage>>> {
    block_on(chain::open(recorder, Path::new("/vm/top"), options))
}

fn refused(recorder: &Recorder, options: &ChainOptions) -> Error {
    match open(recorder, options) {
        Ok(_) => panic!("the chain was opened"),
        Err(error) => error,
    }
}

fn first_byte(chain: &Chain<Arc<MemoryStorage>>) -> u8 {
    let (result, buffer) = block_on(chain.disk().read(GuestOffset(0), Buffer::new(512)));
    result.unwrap();
    buffer[0]
}

#[test]
fn names_in_images_are_not_followed_unless_allowed() {
    let recorder =
        Recorder::default().with("/vm/top", overlay("base", Some("raw"))).with("/vm/base", raw(7));
    let strict = ChainOptions::new(Format::Qcow2, Access::ReadOnly);
    let error = refused(&recorder, &strict);
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(error.message().contains("ChainOptions::backing"), "{error}");
    assert!(error.message().contains("/vm/base"), "{error}");
    assert_eq!(recorder.opened(), [("/vm/top".to_owned(), Access::ReadOnly)]);

    let recorder =
        Recorder::default().with("/vm/top", with_data_file("data")).with("/vm/data", raw(7));
    let error = refused(&recorder, &ChainOptions { backing: Allow::Named, ..strict });
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    assert!(error.message().contains("ChainOptions::data_file"), "{error}");
    assert_eq!(recorder.opened(), [("/vm/top".to_owned(), Access::ReadOnly)]);
}

#[test]
fn backing_layers_are_opened_for_reading_and_data_files_like_their_image() {
    let recorder = Recorder::default()
        .with("/vm/top", overlay("middle", Some("qcow2")))
        .with("/vm/middle", overlay("/base/raw", Some("raw")))
        .with("/base/raw", raw(7));
    let chain = open(&recorder, &trusting()).unwrap();
    assert_eq!(first_byte(&chain), 7);
    let expected = [
        ("/vm/top".to_owned(), Access::ReadWrite),
        ("/vm/middle".to_owned(), Access::ReadOnly),
        ("/base/raw".to_owned(), Access::ReadOnly),
    ];
    assert_eq!(recorder.opened(), expected);
    let formats: Vec<Format> = chain.levels().iter().map(|level| level.format).collect();
    assert_eq!(formats, [Format::Qcow2, Format::Qcow2, Format::Raw]);

    let recorder =
        Recorder::default().with("/vm/top", with_data_file("data")).with("/vm/data", raw(9));
    let chain = open(&recorder, &trusting()).unwrap();
    assert_eq!(chain.levels()[0].content_path(), Path::new("/vm/data"));
    assert_eq!(recorder.opened()[1], ("/vm/data".to_owned(), Access::ReadWrite));
}

#[test]
fn the_callback_sees_each_name_and_decides() {
    let recorder = Recorder::default()
        .with("/vm/top", overlay("middle", Some("qcow2")))
        .with("/vm/middle", overlay("/base/raw", Some("raw")))
        .with("/base/raw", raw(7));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let backing = Allow::asking(move |reference| {
        let entry = (reference.role, reference.image.to_owned(), reference.path.to_owned());
        log.lock().unwrap().push(entry);
        reference.path.starts_with("/vm")
    });
    let error = refused(&recorder, &ChainOptions { backing, ..trusting() });
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    let expected = [
        (Role::Backing, PathBuf::from("/vm/top"), PathBuf::from("/vm/middle")),
        (Role::Backing, PathBuf::from("/vm/middle"), PathBuf::from("/base/raw")),
    ];
    assert_eq!(*asked.lock().unwrap(), expected);
    assert_eq!(recorder.opened().len(), 2);
}

#[test]
fn a_backing_format_is_never_guessed_unasked() {
    // What a guest could have written into a raw disk: a header that names a secret.
    let trap = || overlay("/etc/secret", Some("raw"));
    let over = |format| Recorder::default().with("/vm/top", overlay("base", format));
    let recorder = over(None).with("/vm/base", trap());
    let error = refused(&recorder, &trusting());
    assert!(error.message().contains("ChainOptions::unnamed_format"), "{error}");
    assert_eq!(recorder.opened().len(), 1);

    let recorder = over(None).with("/vm/base", raw(5));
    let options = ChainOptions { unnamed_format: UnnamedFormat::Probe, ..trusting() };
    assert_eq!(first_byte(&open(&recorder, &options).unwrap()), 5);

    let recorder = over(Some("raw")).with("/vm/base", trap());
    assert_eq!(first_byte(&open(&recorder, &trusting()).unwrap()), b'Q');
    assert_eq!(recorder.opened().len(), 2);

    let recorder = over(Some("vmdk")).with("/vm/base", raw(5));
    assert_eq!(refused(&recorder, &trusting()).kind(), ErrorKind::Unsupported);
}

#[test]
fn hostile_names_open_nothing() {
    let names = [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
        "json:{}",
        "nbd:localhost:10809",
        "nbd+unix:///disk?socket=/run/x",
        "http://localhost/base",
        "fat:rw:/etc",
        "host_device:/dev/sda",
        "blkdebug::base",
        ":base",
    ];
    for name in names {
        for storage in [overlay(name, Some("raw")), with_data_file(name)] {
            let recorder = Recorder::default().with("/vm/top", storage);
            let error = refused(&recorder, &trusting());
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{name}: {error}");
            assert_eq!(recorder.opened().len(), 1, "{name}");
        }
    }
}

#[test]
fn a_chain_that_bites_its_tail_is_refused() {
    let recorder = Recorder::default().with("/vm/top", overlay("top", Some("qcow2")));
    assert_eq!(refused(&recorder, &trusting()).kind(), ErrorKind::Corrupt);
    let recorder = Recorder::default()
        .with("/vm/top", overlay("middle", Some("qcow2")))
        .with("/vm/middle", overlay("top", Some("qcow2")));
    assert_eq!(refused(&recorder, &trusting()).kind(), ErrorKind::Corrupt);
    let recorder = Recorder::default().with("/vm/top", with_data_file("top"));
    assert_eq!(refused(&recorder, &trusting()).kind(), ErrorKind::Corrupt);
}

/// `levels` images over a raw disk of sevens.
fn tower(levels: usize) -> Recorder {
    let name = |level: usize| if level == 0 { "top".to_owned() } else { level.to_string() };
    let mut recorder = Recorder::default().with(&format!("/vm/{levels}"), raw(7));
    for level in 0..levels {
        let format = if level + 1 == levels { "raw" } else { "qcow2" };
        let path = format!("/vm/{}", name(level));
        recorder = recorder.with(&path, overlay(&name(level + 1), Some(format)));
    }
    recorder
}

#[test]
fn the_deepest_chain_reads_and_one_level_more_is_refused() {
    let deepest = tower(MAX_LEVELS - 1);
    let chain = open(&deepest, &trusting()).unwrap();
    assert_eq!(chain.levels().len(), MAX_LEVELS);
    assert_eq!(first_byte(&chain), 7);
    assert!(!block_on(chain.disk().extents(chain.disk().whole())).unwrap().is_empty());
    let error = refused(&tower(MAX_LEVELS), &trusting());
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// The raw disk at the bottom decides, and past its end every level above reads as zeros.
#[test]
fn extents_go_down_the_deepest_chain_and_past_the_end_of_what_is_too_short() {
    let chain = open(&tower(MAX_LEVELS - 1), &trusting()).unwrap();
    let disk = chain.disk();
    let extents = block_on(disk.extents(disk.whole())).unwrap();
    let bottom = MAX_LEVELS as u32;
    assert_eq!((extents[0].status.depth.0, extents[0].status.reads_zero), (bottom, false));
    let there = extents[0].range.len;
    let (result, bytes) =
        block_on(disk.read(GuestOffset(0), Buffer::new(disk.size_bytes() as usize)));
    result.unwrap();
    assert!(bytes[..there as usize].iter().all(|byte| *byte == 7));
    assert!(bytes[there as usize..].iter().all(|byte| *byte == 0));
    let beyond = (there < disk.size_bytes()).then_some((0, true));
    let found = extents.get(1).map(|it| (it.status.depth.0, it.status.reads_zero));
    assert_eq!(found, beyond, "one extent to the end: {extents:?}");
}

#[test]
fn describing_a_chain_opens_no_data_file_and_nothing_for_writing() {
    let recorder = Recorder::default()
        .with("/vm/top", overlay("middle", Some("qcow2")))
        .with("/vm/middle", with_data_file("json:{}"));
    let options = ChainOptions { data_file: Allow::None, ..trusting() };
    let described = chain::inspect(&recorder, Path::new("/vm/top"), &options, Levels::All);
    let levels = block_on(described).unwrap();
    assert_eq!(levels.len(), 2);
    assert_eq!(levels[1].path, Path::new("/vm/middle"));
    assert_eq!(levels[1].size_bytes, SIZE);
    assert!(levels[1].header.as_ref().unwrap().has_external_data_file());
    assert!(recorder.opened().iter().all(|(_, access)| *access == Access::ReadOnly));

    let nothing_allowed = ChainOptions::new(Format::Qcow2, Access::ReadOnly);
    let top = chain::inspect(&recorder, Path::new("/vm/top"), &nothing_allowed, Levels::Top);
    assert_eq!(block_on(top).unwrap().len(), 1);
}

fn write(chain: &Chain<Arc<MemoryStorage>>, offset: u64, bytes: &[u8]) -> Result<()> {
    let buffer = Buffer::from(bytes);
    block_on(chain.disk().write(GuestOffset(offset), buffer, WriteFlags::empty())).0
}

#[test]
fn a_guessed_raw_disk_never_turns_into_something_else() {
    let recorder = Recorder::default().with("/vm/top", raw(7));
    let guessed = ChainOptions { format: FormatChoice::Probe, ..trusting() };
    let chain = open(&recorder, &guessed).unwrap();
    assert!(matches!(chain.disk(), Disk::Raw(_)));
    let header = &built(&builder()).to_vec()[..512];
    let refused: [(u64, &[u8]); 4] = [(0, header), (0, b"Q"), (1, b"FI\xfb"), (3, b"\xfb12345")];
    for (offset, bytes) in refused {
        let error = write(&chain, offset, bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    }
    write(&chain, 0, &[1; 512]).unwrap();
    write(&chain, 4, header).unwrap();

    let told = ChainOptions { format: FormatChoice::Known(Format::Raw), ..trusting() };
    write(&open(&recorder, &told).unwrap(), 0, header).unwrap();
}

#[test]
fn a_disk_opened_for_reading_refuses_changes() {
    for (storage, format) in [(raw(7), Format::Raw), (built(&builder()), Format::Qcow2)] {
        let recorder = Recorder::default().with("/vm/top", storage);
        let options = ChainOptions::new(format, Access::ReadOnly);
        let chain = open(&recorder, &options).unwrap();
        assert!(chain.disk().is_read_only());
        assert_eq!(write(&chain, 0, &[0; 512]).unwrap_err().kind(), ErrorKind::ReadOnly);
    }
}

#[test]
fn a_missing_image_is_named_in_the_error() {
    let recorder = Recorder::default().with("/vm/top", overlay("base", Some("raw")));
    let error = refused(&recorder, &trusting());
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("/vm/base"), "{error}");
}

#[test]
fn a_truncated_header_is_an_error_not_a_panic() {
    let whole = built(&builder()).to_vec();
    for len in 0..104 {
        let recorder = Recorder::default().with("/vm/top", MemoryStorage::from(&whole[..len]));
        assert!(open(&recorder, &trusting()).is_err(), "{len} bytes");
    }
}

#[test]
fn the_callers_choice_stands_in_for_what_an_image_names() {
    let recorder = Recorder::default()
        .with("/vm/top", overlay("base", Some("raw")))
        .with("/vm/base", raw(7))
        .with("/other", raw(9));
    let strict = ChainOptions::new(Format::Qcow2, Access::ReadOnly);
    let instead = |backing, format| ChainOptions {
        instead: vec![Instead { backing, format }],
        ..strict.clone()
    };
    let raw_format = Some(FormatChoice::Known(Format::Raw));
    let other = open(&recorder, &instead(StandIn::At("/other".into()), raw_format)).unwrap();
    assert_eq!(first_byte(&other), 9);
    let alone = open(&recorder, &instead(StandIn::Nothing, None)).unwrap();
    assert_eq!((first_byte(&alone), alone.levels().len()), (0, 1));
    // Without a format the image does not help: it speaks of another file.
    let error = refused(&recorder, &instead(StandIn::At("/other".into()), None));
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    // And what the image names still needs leave.
    let error = refused(&recorder, &instead(StandIn::Named, raw_format));
    assert!(error.message().contains("ChainOptions::backing"), "{error}");
    assert!(recorder.opened().iter().all(|(path, _)| path != "/vm/base"));
}

#[test]
fn the_callers_data_file_needs_no_leave() {
    let recorder =
        Recorder::default().with("/vm/top", with_data_file("data")).with("/other", raw(9));
    let options = ChainOptions {
        data_path: Some("/other".into()),
        ..ChainOptions::new(Format::Qcow2, Access::ReadOnly)
    };
    let chain = open(&recorder, &options).unwrap();
    assert_eq!(chain.levels()[0].data_path.as_deref(), Some(Path::new("/other")));
}
