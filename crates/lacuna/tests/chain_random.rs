//! Random chains that QEMU made: read, mapped and written here, and judged by QEMU.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use lacuna::block::{Layer, WriteFlags, ZeroFlags, is_zero};
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, Chain, ChainOptions, FileOpener, Format};
use lacuna::job::{
    self, ConvertOptions, Encoding, KnownZeros, Mover, TargetContent, Threads, WriteOrder,
};
use lacuna::qcow2::{Access, ExtentDetail, OpenOptions};
use lacuna::storage::FileStorage;
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, QEMU_IO, qemu_img_check};
use testkit::{Random, seeds};

const LAYOUTS: [&str; 10] = [
    "compat=0.10,cluster_size=512",
    "compat=0.10",
    "compat=1.1,cluster_size=4k",
    "compat=1.1,cluster_size=1k,refcount_bits=1",
    "compat=1.1",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on",
    "compression_type=zstd,cluster_size=32k",
    // Where guest data lies in a file of its own; its name is put in.
    "cluster_size=8k,data_file=",
    "extended_l2=on,cluster_size=32k,data_file=",
];

struct Tower {
    directory: tempfile::TempDir,
    levels: usize,
    top_size: u64,
    top_format: &'static str,
}

impl Tower {
    fn path(&self, level: usize) -> PathBuf {
        self.directory.path().join(level.to_string())
    }

    /// Level 0 is the base; each level is larger, smaller or of the same size as the one below.
    fn random(random: &mut Random) -> Self {
        let mut tower = Self {
            directory: tempfile::tempdir().unwrap(),
            levels: 1 + random.index(4),
            top_size: 0,
            top_format: "qcow2",
        };
        for level in 0..tower.levels {
            let raw = level == 0 && tower.levels > 1 && random.one_in(2);
            tower.top_format = if raw { "raw" } else { "qcow2" };
            tower.top_size = 512 * (1 + random.below(6000));
            tower.make_level(level, random);
        }
        tower
    }

    fn make_level(&self, level: usize, random: &mut Random) {
        let (path, size) = (self.path(level), self.top_size.to_string());
        let mut words: Vec<&OsStr> = ["create", "-q", "-u", "-f"].map(OsStr::new).into();
        words.push(self.top_format.as_ref());
        let below = if level > 0 { self.path(level - 1) } else { PathBuf::new() };
        let below_format = self.format_of(level.saturating_sub(1));
        if level > 0 {
            words.extend([OsStr::new("-b"), below.as_os_str(), "-F".as_ref()]);
            words.push(below_format.as_ref());
        }
        let mut layout = random.pick(&LAYOUTS).to_string();
        if layout.ends_with('=') {
            layout += &path.with_extension("data").display().to_string();
        }
        if self.top_format == "qcow2" {
            words.extend([OsStr::new("-o"), OsStr::new(&layout)]);
        }
        words.extend([path.as_os_str(), size.as_ref()]);
        QEMU_IMG.succeed(words);
        let extended = layout.contains("extended");
        self.fill(&path, level > 0 && !extended, random);
    }

    fn format_of(&self, level: usize) -> &'static str {
        let start = std::fs::read(self.path(level)).unwrap_or_default();
        if start.starts_with(b"QFI\xfb") { "qcow2" } else { "raw" }
    }

    fn fill(&self, path: &Path, discards: bool, random: &mut Random) {
        let mut words: Vec<String> = vec!["-f".to_owned(), self.top_format.to_owned()];
        for _ in 0..random.below(9) {
            let range = range(random, self.top_size);
            let (start, len) = (range.start.0, range.len);
            let verb = match random.below(6) {
                // In a raw file we know that such space reads as zeros; QEMU takes it for data.
                0 if self.top_format == "qcow2" => "write -z".to_owned(),
                1 => "write -z -u".to_owned(),
                2 if discards => "discard".to_owned(),
                _ => format!("write -P {}", 1 + random.below(255)),
            };
            words.extend(["-c".to_owned(), format!("{verb} {start} {len}")]);
        }
        words.push(path.display().to_string());
        QEMU_IO.succeed(words);
    }

    /// What QEMU reads.
    fn content(&self) -> Vec<u8> {
        let (top, flat) = (self.path(self.levels - 1), self.directory.path().join("flat"));
        let words = ["convert", "-f", self.top_format, "-O", "raw"].map(OsStr::new);
        QEMU_IMG.succeed([&words[..], &[top.as_os_str(), flat.as_os_str()]].concat());
        std::fs::read(flat).unwrap()
    }

    fn open(&self, access: Access) -> Chain<FileStorage> {
        self.open_in_detail(access, ExtentDetail::Map)
    }

    fn open_in_detail(&self, access: Access, detail: ExtentDetail) -> Chain<FileStorage> {
        let format: Format = self.top_format.parse().unwrap();
        let options = ChainOptions {
            backing: Allow::Named,
            data_file: Allow::Named,
            image: OpenOptions::new(access).extent_detail(detail),
            ..ChainOptions::new(format, access)
        };
        let top = self.path(self.levels - 1);
        block_on(chain::open(&FileOpener::default(), &top, &options)).unwrap()
    }
}

/// A range of whole sectors half of the time, of any bytes else.
fn range(random: &mut Random, size: u64) -> GuestRange {
    let unit = if random.one_in(2) { 512 } else { 1 };
    let start = random.below(size) / unit * unit;
    let limit = if random.one_in(3) { 600 } else { 300_000 };
    let len = (1 + random.below(limit)).next_multiple_of(unit).min(size - start);
    GuestRange::new(GuestOffset(start), len)
}

fn slice(bytes: &mut [u8], range: GuestRange) -> &mut [u8] {
    &mut bytes[range.start.0 as usize..range.end().0 as usize]
}

fn assert_reads(disk: &impl Layer, expected: &mut [u8], random: &mut Random) {
    let whole = disk.whole();
    for range in (0..20).map(|_| range(random, whole.len)).chain([whole]) {
        let (result, read) = block_on(disk.read(range.start, Buffer::new(range.len as usize)));
        result.unwrap();
        assert!(*read == *slice(expected, range), "{range:?}");
    }
}

/// What extents call zero is zero, and they cover any range without gaps.
fn assert_extents(disk: &impl Layer, expected: &mut [u8], random: &mut Random) {
    let whole = disk.whole();
    for asked in (0..10).map(|_| range(random, whole.len)).chain([whole]) {
        let mut at = asked.start;
        while at < asked.end() {
            for extent in block_on(disk.extents(GuestRange::new(at, asked.end() - at))).unwrap() {
                assert_eq!(extent.range.start, at);
                let bytes = slice(expected, extent.range);
                assert!(!extent.status.reads_zero || bytes.iter().all(|&byte| byte == 0));
                at = extent.range.end();
            }
        }
        assert_eq!(at, asked.end());
    }
}

fn assert_maps_like_qemu(tower: &Tower, chain: &Chain<FileStorage>) {
    let top = tower.path(tower.levels - 1);
    let words = ["map", "-f", tower.top_format, "--output=json"].map(OsStr::new);
    let theirs = QEMU_IMG.succeed([&words[..], &[top.as_os_str()]].concat());
    let theirs: Vec<serde_json::Value> = serde_json::from_str(&theirs).unwrap();
    let mut map = chain.map(chain.disk().whole());
    for their in theirs {
        let ours = block_on(map.next()).unwrap().expect("as many runs as QEMU has");
        let facts = serde_json::json!({
            "start": ours.range.start.0,
            "length": ours.range.len,
            "depth": ours.level,
            "present": ours.is_present(),
            "zero": ours.status.reads_zero,
            "data": !ours.status.reads_zero,
            "compressed": ours.status.is_compressed,
        });
        for (key, value) in facts.as_object().unwrap() {
            assert_eq!(value, &their[key], "{key} of {their}, ours {ours:?}");
        }
    }
    assert_eq!(block_on(map.next()).unwrap(), None);
}

/// Changes the top image; what is cut out of clusters comes from the layers below.
fn change(disk: &impl Layer, expected: &mut [u8], random: &mut Random) {
    for _ in 0..25 {
        let range = range(random, disk.size_bytes());
        let byte = 1 + random.below(255) as u8;
        if random.one_in(4) {
            let unmap = if random.one_in(2) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            block_on(disk.write_zeroes(range, unmap)).unwrap();
            slice(expected, range).fill(0);
        } else {
            let bytes = Buffer::from(&vec![byte; range.len as usize][..]);
            block_on(disk.write(range.start, bytes, WriteFlags::empty())).0.unwrap();
            slice(expected, range).fill(byte);
        }
    }
}

#[test]
fn random_chains_read_map_and_write_like_in_qemu() {
    for seed in seeds(24) {
        println!("seed {seed}");
        let random = &mut Random::new(seed);
        let tower = Tower::random(random);
        let mut expected = tower.content();
        let chain = tower.open(Access::ReadOnly);
        assert_eq!(chain.levels().len(), tower.levels);
        assert_reads(chain.disk(), &mut expected, random);
        assert_extents(chain.disk(), &mut expected, random);
        assert_maps_like_qemu(&tower, &chain);
        drop(chain);

        let below: Vec<Vec<u8>> =
            (0..tower.levels - 1).map(|level| std::fs::read(tower.path(level)).unwrap()).collect();
        let chain = tower.open(Access::ReadWrite);
        change(chain.disk(), &mut expected, random);
        assert_reads(chain.disk(), &mut expected, random);
        assert_extents(chain.disk(), &mut expected, random);
        block_on(chain.into_disk().close()).unwrap();
        assert!(tower.content() == expected, "QEMU reads what was written");
        for (level, bytes) in below.iter().enumerate() {
            assert!(std::fs::read(tower.path(level)).unwrap() == *bytes, "level {level} changed");
        }
        let check = qemu_img_check(&tower.path(tower.levels - 1));
        assert!(check.is_clean(), "{}", check.text);
    }
}

/// What a copy is to be made into.
struct Copy {
    options: ConvertOptions,
    format: Format,
    path: PathBuf,
}

impl Copy {
    /// Makes the target: new, or full of something else.
    fn random(tower: &Tower, random: &mut Random) -> Self {
        let format = if random.one_in(4) { Format::Raw } else { Format::Qcow2 };
        let path = tower.directory.path().join("copy");
        let size = (tower.top_size + *random.pick(&[0, 0, 512, 1_000_448])).to_string();
        let mut words = vec!["create", "-q", "-f", format.name()];
        let layout = random.pick(&LAYOUTS[..8]);
        if format == Format::Qcow2 {
            words.extend(["-o", layout]);
        }
        let text = path.to_str().unwrap();
        QEMU_IMG.succeed([&words[..], &[text, &size]].concat());
        let is_new = random.one_in(2);
        if !is_new {
            let write = format!("write -P 238 0 {}", tower.top_size);
            QEMU_IO.succeed(["-f", format.name(), "-c", &write, text]);
        }
        let compresses = format == Format::Qcow2 && random.one_in(2);
        let options = ConvertOptions {
            content: if is_new { TargetContent::Zero } else { TargetContent::Unknown },
            encoding: if compresses { Encoding::Compressed } else { Encoding::Plain },
            in_flight: 1 + random.index(16),
            known_zeros: *random.pick(&[KnownZeros::Left, KnownZeros::Zeroed]),
            mover: *random.pick(&[Mover::Host, Mover::Job]),
            order: *random.pick(&[WriteOrder::Guest, WriteOrder::Any]),
            sparse_bytes: *random.pick(&[0, 512, 4096, 12288, 65536]),
            threads: *random.pick(&[Threads::Caller, Threads::Cores]),
        };
        Self { options, format, path }
    }

    fn run(&self, source: &impl Layer) {
        let options = ChainOptions::new(self.format, Access::ReadWrite);
        let opener = FileOpener::default();
        let target = block_on(chain::open(&opener, &self.path, &options)).unwrap().into_disk();
        block_on(job::convert(source, &target, &self.options, &mut |_| ())).unwrap();
        block_on(target.close()).unwrap();
    }

    /// What QEMU reads, up to `len`; the rest must be zeros.
    fn content(&self, len: usize) -> Vec<u8> {
        let flat = self.path.with_extension("flat");
        let words = ["convert", "-f", self.format.name(), "-O", "raw"].map(OsStr::new);
        QEMU_IMG.succeed([&words[..], &[self.path.as_os_str(), flat.as_os_str()]].concat());
        let mut bytes = std::fs::read(flat).unwrap();
        assert!(is_zero(&bytes.split_off(len)));
        bytes
    }
}

#[test]
fn random_chains_are_copied_whole_whatever_the_options() {
    for seed in seeds(24) {
        println!("seed {seed}");
        let random = &mut Random::new(seed);
        let tower = Tower::random(random);
        let expected = tower.content();
        let chain = tower.open_in_detail(Access::ReadOnly, ExtentDetail::Host);
        let copy = Copy::random(&tower, random);
        println!("{:?} to {}", copy.options, copy.format);
        copy.run(chain.disk());
        assert!(copy.content(expected.len()) == expected);
        if copy.format == Format::Qcow2 {
            let check = qemu_img_check(&copy.path);
            assert!(check.is_clean(), "{}", check.text);
        }
    }
}
