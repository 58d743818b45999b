//! Replays the corpus of every fuzz target and mutates it with a seed: a short fuzz run as a test.
//!
//! `cargo test -p testkit --test fuzz_corpus -- --ignored` writes the corpus anew from images that
//! qemu-img makes.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::{Random, fuzz};

const EXECUTIONS: u64 = 10_000;
/// Of what makes, opens and repairs an image each time.
const IMAGE_EXECUTIONS: u64 = 2_000;
/// Values that sit at the edges of fields and limits.
const EDGES: [u64; 16] =
    [0, 1, 2, 3, 7, 8, 9, 21, 512, 0x200, 0x10000, 1 << 31, 1 << 56, 1 << 62, 1 << 63, u64::MAX];

fn corpus_folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

/// The inputs in `fuzz/corpus/<target>`, in the order of their names.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = corpus_folder(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{folder:?} is empty");
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn overwrite(bytes: &mut [u8], at: usize, content: &[u8]) {
    for (place, byte) in bytes.iter_mut().skip(at).zip(content) {
        *place = *byte;
    }
}

/// Half of the changes hit the header, where most fields are.
fn place(random: &mut Random, len: usize) -> usize {
    let reach = if random.one_in(2) { len.min(160) } else { len };
    random.index(reach.max(1))
}

fn mutate_once(random: &mut Random, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    let at = place(random, bytes.len());
    let edge = random.pick(&EDGES).wrapping_add(random.below(3)).wrapping_sub(1);
    match random.below(7) {
        0 => overwrite(bytes, at, &[random.next() as u8]),
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        2 => overwrite(bytes, at & !3, &(edge as u32).to_be_bytes()),
        3 => overwrite(bytes, at & !7, &edge.to_be_bytes()),
        4 => bytes.truncate(at.max(1)),
        5 => {
            let from = place(random, bytes.len());
            let end = (from + random.index(64) + 1).min(bytes.len());
            let piece = bytes[from.min(end)..end].to_vec();
            overwrite(bytes, at, &piece);
        }
        _ => {
            let other = random.pick(others);
            let end = (at + random.index(600)).min(other.len());
            let piece = other.get(at..end).unwrap_or_default().to_vec();
            overwrite(bytes, at, &piece);
        }
    }
}

/// Runs the target; a panic leaves the input behind and says where.
fn run(target: &str, body: fn(&[u8]), input: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| body(input))).is_err() {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-crash"));
        fs::write(&path, input).unwrap();
        panic!("{target} failed with {what}; the input is in {}", path.display());
    }
}

fn replay_and_mutate(target: &str, body: fn(&[u8])) {
    replay_and_mutate_times(EXECUTIONS, target, body);
}

fn replay_and_mutate_times(executions: u64, target: &str, body: fn(&[u8])) {
    let inputs = corpus(target);
    for (index, input) in inputs.iter().enumerate() {
        run(target, body, input, &format!("corpus entry {index}"));
    }
    for seed in 0..executions {
        let mut random = Random::new(seed);
        let mut input = random.pick(&inputs).clone();
        for _ in 0..=random.below(4) {
            mutate_once(&mut random, &mut input, &inputs);
        }
        run(target, body, &input, &format!("seed {seed}"));
    }
}

#[test]
fn header_and_tables_survive_their_corpus_and_its_mutations() {
    replay_and_mutate("header_and_tables", fuzz::header_and_tables);
}

#[test]
fn compressed_clusters_survive_their_corpus_and_its_mutations() {
    replay_and_mutate("compressed_cluster", fuzz::compressed_cluster);
}

#[test]
fn damaged_images_survive_their_corpus_and_its_mutations() {
    replay_and_mutate_times(IMAGE_EXECUTIONS, "damaged_image", fuzz::damaged_image);
}

#[test]
fn operations_agree_with_the_model_for_their_corpus_and_its_mutations() {
    replay_and_mutate_times(IMAGE_EXECUTIONS, "operations", fuzz::operations);
}

#[test]
fn operations_on_damaged_images_survive_their_corpus_and_its_mutations() {
    replay_and_mutate_times(IMAGE_EXECUTIONS, "damaged_operations", fuzz::damaged_operations);
}

#[test]
fn snapshots_and_bitmaps_agree_with_the_model_for_their_corpus_and_its_mutations() {
    replay_and_mutate_times(IMAGE_EXECUTIONS, "history", fuzz::history);
}

#[test]
fn snapshots_and_bitmaps_of_damaged_images_survive_their_corpus_and_its_mutations() {
    replay_and_mutate_times(IMAGE_EXECUTIONS, "damaged_history", fuzz::damaged_history);
}

#[test]
fn jobs_on_damaged_images_survive_their_corpus_and_its_mutations() {
    replay_and_mutate_times(IMAGE_EXECUTIONS, "damaged_jobs", fuzz::damaged_jobs);
}

#[test]
fn nbd_servers_survive_their_corpus_and_its_mutations() {
    replay_and_mutate("nbd_server", fuzz::nbd_server);
}

#[test]
fn nbd_clients_survive_their_corpus_and_its_mutations() {
    replay_and_mutate("nbd_client", fuzz::nbd_client);
}

#[test]
fn nbd_uris_survive_their_corpus_and_its_mutations() {
    replay_and_mutate("nbd_uri", fuzz::nbd_uri);
}

#[test]
fn backup_manifests_survive_their_corpus_and_its_mutations() {
    replay_and_mutate("backup_manifest", fuzz::backup_manifest);
}

#[test]
fn backup_segments_survive_their_corpus_and_its_mutations() {
    replay_and_mutate("backup_segment", fuzz::backup_segment);
}

/// Runs a foreign tool in `folder`; a missing one is a failure.
fn tool(folder: &Path, words: &[&str]) {
    let output = Command::new(words[0])
        .args(&words[1..])
        .current_dir(folder)
        .output()
        .expect("a QEMU tool is missing: apt-get install qemu-utils");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Name, options of creation, and what to do with the image then.
const IMAGES: [(&str, &str, &[&[&str]]); 8] = [
    ("v3", "cluster_size=512", &[&["qemu-io", "-c", "write -P 7 0 3k", "image"]]),
    ("v2", "cluster_size=512,compat=0.10", &[&["qemu-io", "-c", "write 9k 3k", "image"]]),
    (
        "zstd",
        "cluster_size=512,compression_type=zstd",
        &[&["qemu-io", "-c", "write -c -P 3 2k 512", "image"]],
    ),
    ("deflate", "cluster_size=512", &[&["qemu-io", "-c", "write -c -P 3 2k 512", "image"]]),
    (
        "refcounts",
        "cluster_size=512,refcount_bits=1,lazy_refcounts=on",
        &[&["qemu-io", "-c", "write -z 0 4k", "-c", "discard 512 512", "image"]],
    ),
    (
        "snapshot",
        "cluster_size=512",
        &[
            &["qemu-io", "-c", "write -P 7 0 1k", "image"],
            &["qemu-img", "snapshot", "-c", "one", "image"],
            &["qemu-io", "-c", "write -P 8 512 1k", "image"],
        ],
    ),
    (
        "bitmap",
        "cluster_size=512",
        &[
            &["qemu-img", "bitmap", "--add", "-g", "512", "image", "one"],
            &["qemu-io", "-c", "write -P 8 512 1k", "image"],
        ],
    ),
    (
        "extended",
        "cluster_size=16k,extended_l2=on",
        &[&["qemu-io", "-c", "write -P 7 512 1k", "-c", "write -z 8k 4k", "image"]],
    ),
];

#[test]
#[ignore = "writes fuzz/corpus"]
fn write_the_corpus_anew() {
    let folder = corpus_folder("header_and_tables");
    fs::create_dir_all(&folder).unwrap();
    for (name, options, then) in IMAGES {
        let scratch = tempfile::tempdir().unwrap();
        let create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", "16k"];
        tool(scratch.path(), &create);
        for words in then {
            tool(scratch.path(), words);
        }
        fs::copy(scratch.path().join("image"), folder.join(name)).unwrap();
    }
    let folder = corpus_folder("compressed_cluster");
    fs::create_dir_all(&folder).unwrap();
    let words: Vec<u8> = (0..4096_u32).flat_map(|n| (n * n / 7).to_be_bytes()).collect();
    for (name, choice) in
        [("deflate-512", 0_u8), ("zstd-512", 1), ("deflate-16k", 10), ("zstd-16k", 11)]
    {
        let kind = match choice & 1 {
            0 => lacuna::qcow2::format::CompressionType::Deflate,
            _ => lacuna::qcow2::format::CompressionType::Zstd,
        };
        let len = 512 << (choice >> 1);
        let mut stream = vec![choice; len + 1];
        let done = lacuna::fuzzing::compress(kind, &words[..len], &mut stream[1..]).unwrap();
        stream.truncate(done.expect("words compress") + 1);
        fs::write(folder.join(name), stream).unwrap();
    }
}

#[test]
#[ignore = "writes fuzz/corpus"]
fn write_the_image_corpus_anew() {
    let targets = [
        "damaged_image",
        "operations",
        "damaged_operations",
        "history",
        "damaged_history",
        "damaged_jobs",
    ];
    for target in targets {
        let folder = corpus_folder(target);
        fs::create_dir_all(&folder).unwrap();
        for seed in 0..16 {
            let mut random = Random::new(seed);
            let len = 48 + random.index(160);
            let choices: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            fs::write(folder.join(format!("choices-{seed:02}")), choices).unwrap();
        }
    }
}

const URIS: [&str; 8] = [
    "nbd://example.com/disk",
    "nbds://user@[fe80::1%25eth0]:99//my%20disk?tls-type=x509&tls-verify-peer=0",
    "nbd+unix:///disk?socket=/run/nbd.sock",
    "nbds+unix:///?socket=%00/abstract&tls-hostname=a&tls-psk-file=/b",
    "nbd+vsock://2:10809/disk",
    "nbds+vsock:///?x-a=b%3dc&tls-certificates=/d",
    "nbd://localhost:/%c3%a4/?",
    "nbd:localhost:10809:exportname=x",
];

#[test]
#[ignore = "writes fuzz/corpus"]
fn write_the_nbd_corpus_anew() {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = corpus_folder(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), bytes).unwrap();
    };
    for seed in fuzz::nbd_seeds() {
        write("nbd_server", &seed.name, &seed.client);
        write("nbd_client", &seed.name, &seed.server);
    }
    for (index, uri) in URIS.iter().enumerate() {
        write("nbd_uri", &format!("uri-{index}"), uri.as_bytes());
    }
}

#[test]
#[ignore = "writes fuzz/corpus"]
fn write_the_backup_corpus_anew() {
    use lacuna::block::{Layer, WriteFlags, ZeroFlags};
    use lacuna::units::{GuestOffset, GuestRange};
    use lacuna_backup::{
        Basis, CopyOptions, Everything, Folder, Form, GoOn, PointFacts, PointName,
    };

    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open_or_create(&place.path().join("points"), Form::Segments).unwrap();
    pollster::block_on(async {
        let disk = lacuna::raw::Raw::create(lacuna::storage::MemoryStorage::new(), 1 << 20).await?;
        let mut below = None;
        for (name, at) in [("full", 0), ("more", 9)] {
            let mut random = Random::new(at);
            let bytes: Vec<u8> =
                (0..3000).map(|at| at as u8 % 7 + random.next() as u8 % 2).collect();
            disk.write(GuestOffset(at * 512), bytes[..].into(), WriteFlags::empty()).await.0?;
            let noise: Vec<u8> = (0..512).map(|_| random.next() as u8).collect();
            disk.write(GuestOffset(65536), noise[..].into(), WriteFlags::empty()).await.0?;
            let mut facts = PointFacts::full(PointName::new(name)?, 1 << 20);
            if let Some(below) = below {
                facts.stands_on = Some(below);
                facts.basis = Basis::Bitmap { name: "b".into() };
                let range = GuestRange::new(GuestOffset(8192), 512);
                disk.write_zeroes(range, ZeroFlags::empty()).await?;
            }
            let mut work = folder.begin(facts, GoOn::default()).await?;
            work.copy(&disk, &Everything, CopyOptions::default(), &mut |_| ()).await?;
            below = Some(work.finish().await?.reference());
        }
        Ok::<_, lacuna::Error>(())
    })
    .unwrap();
    for (target, ending) in [("backup_manifest", "json"), ("backup_segment", "000000.seg")] {
        fs::create_dir_all(corpus_folder(target)).unwrap();
        for name in ["full", "more"] {
            let bytes = fs::read(folder.path().join(format!("{name}.{ending}"))).unwrap();
            // Of a manifest the content: what stands in front of it is the checksum of that.
            let content = match target {
                "backup_manifest" => {
                    let front =
                        bytes.windows(16).position(|it| it == b"\"lacuna-point\":{").unwrap();
                    &bytes[front + 15..bytes.len() - 2]
                }
                _ => &bytes[..],
            };
            fs::write(corpus_folder(target).join(name), content).unwrap();
        }
    }
}
