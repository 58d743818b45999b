//! Comparisons of random images, held against what `qemu-img compare` says.

use std::ffi::OsStr;
use std::path::Path;

use lacuna::chain::{self, ChainOptions, FileOpener, Format};
use lacuna::job::{self, CompareOptions, Comparison, Strictness};
use lacuna::qcow2::Access;
use pollster::block_on;
use testkit::foreign::{QEMU_IMG, QEMU_IO};
use testkit::{Random, seeds};

const LAYOUTS: [&str; 3] = ["cluster_size=4k", "compat=0.10", "extended_l2=on"];
const SIZES: [u64; 3] = [3 << 20, (3 << 20) + 512, 5 << 20];

/// Few places and few patterns, so that images are equal now and then.
fn fill(path: &Path, random: &mut Random) {
    let mut words = vec!["-f".to_owned(), "qcow2".to_owned()];
    for _ in 0..random.below(4) {
        let start = random.below(8) * 300_000;
        let verb = *random.pick(&["write -P 0", "write -P 0", "write -z", "write -P 7"]);
        words.extend(["-c".to_owned(), format!("{verb} {start} 70000")]);
    }
    words.push(path.display().to_string());
    QEMU_IO.succeed(words);
}

fn image(path: &Path, layout: &str, random: &mut Random) {
    let size = random.pick(&SIZES).to_string();
    let words = ["create", "-q", "-f", "qcow2", "-o", layout].map(OsStr::new);
    QEMU_IMG.succeed([&words[..], &[path.as_os_str(), size.as_ref()]].concat());
    fill(path, random);
}

fn ours(first: &Path, second: &Path, strictness: Strictness) -> Comparison {
    let open = |path: &Path| {
        let options = ChainOptions::new(Format::Qcow2, Access::ReadOnly);
        block_on(chain::open(&FileOpener::default(), path, &options)).unwrap()
    };
    let (first, second) = (open(first), open(second));
    let options = CompareOptions { strictness };
    block_on(job::compare(first.disk(), second.disk(), options, &mut |_, _| ())).unwrap()
}

fn assert_like_qemu(first: &Path, second: &Path) -> bool {
    let words = ["compare", "-f", "qcow2", "-F", "qcow2"].map(OsStr::new);
    let theirs = QEMU_IMG.run([&words[..], &[first.as_os_str(), second.as_os_str()]].concat());
    let ours = ours(first, second, Strictness::Content);
    assert_eq!(i32::from(!ours.is_identical()), theirs.code, "{ours:?} {}", theirs.stdout);
    // QEMU speaks of the sizes only where all that both have is the same.
    if ours.is_identical() {
        assert_eq!(ours.sizes_differ, theirs.stdout.contains("Image size mismatch"), "{ours:?}");
    }
    if let Some(sector) = ours.difference.and_then(|difference| difference.sector()) {
        let line = format!("Content mismatch at offset {}!", sector.0);
        assert!(theirs.stdout.contains(&line), "{ours:?} {}", theirs.stdout);
    }
    ours.is_identical()
}

#[test]
fn random_images_compare_like_in_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("first"), directory.path().join("second"));
    let mut identical = 0;
    for seed in seeds(24) {
        println!("seed {seed}");
        let random = &mut Random::new(seed);
        for path in [&first, &second] {
            let layout = *random.pick(&LAYOUTS);
            image(path, layout, random);
        }
        identical += usize::from(assert_like_qemu(&first, &second));
        assert_like_qemu(&second, &first);
    }
    assert!(std::env::var_os("LACUNA_SEED").is_some() || identical > 0, "no pair was identical");
}

#[test]
fn a_strict_comparison_sees_what_qemu_sees() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (directory.path().join("first"), directory.path().join("second"));
    let strict = |first: &Path, second: &Path| {
        let words = ["compare", "-s", "-f", "qcow2", "-F", "qcow2"].map(OsStr::new);
        let theirs = QEMU_IMG.run([&words[..], &[first.as_os_str(), second.as_os_str()]].concat());
        let ours = ours(first, second, Strictness::Allocation);
        assert_eq!(i32::from(!ours.is_identical()), theirs.code, "{ours:?} {}", theirs.stdout);
        ours.is_identical()
    };
    let first_write = "write -P 1 0 64k";
    let seconds = [(first_write, true), ("write -P 0 1M 64k", false), ("write -z 1M 64k", false)];
    for (second_write, same) in seconds {
        for (path, commands) in [(&first, [first_write; 2]), (&second, [first_write, second_write])]
        {
            let words = ["create", "-q", "-f", "qcow2"].map(OsStr::new);
            QEMU_IMG.succeed([&words[..], &[path.as_os_str(), "3M".as_ref()]].concat());
            for command in commands {
                let words = ["-f", "qcow2", "-c", command].map(OsStr::new);
                QEMU_IO.succeed([&words[..], &[path.as_os_str()]].concat());
            }
        }
        assert_eq!(strict(&first, &second), same, "{second_write}");
    }
}
