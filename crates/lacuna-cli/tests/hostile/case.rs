//! One hostile image, and what each verb does with it.

use std::path::Path;

use lacuna::block::Layer;
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, CheckReport, check};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts};
use lacuna::storage::MemoryStorage;
use lacuna::units::GuestOffset;
use pollster::block_on;
use testkit::ImageBuilder;

use crate::bounded;
use crate::common::{Outcome, Sandbox};

/// Clusters of the disks here, each of 64 KiB.
const CLUSTERS: u64 = 16;
pub(crate) const CLUSTER: usize = 65536;

/// A disk of 1 MiB whose clusters 0 to 3 are full of 1, 2, 3 and 4.
pub(crate) fn image(version: u32) -> ImageBuilder {
    (0..4).fold(ImageBuilder::new(version, 16, 1 << 20), |image, index| {
        image.data(index, &[index as u8 + 1; CLUSTER])
    })
}

/// Reads the clusters with data one by one, the way it goes over the wire as well.
const READS: &str = r#"-c "read -P 1 0 64k" -c "read -P 2 64k 64k" -c "read -P 3 128k 64k" -c "read -P 4 192k 64k""#;

/// What is asked: a name, and a command of which `IMAGE` is the image.
fn questions() -> [(&'static str, String); 6] {
    [
        ("info", "info IMAGE > /dev/null".into()),
        ("map", "map IMAGE".into()),
        ("check", "check IMAGE".into()),
        ("read", format!("io -r -f qcow2 {READS} IMAGE")),
        ("convert", "convert -f qcow2 -O raw IMAGE out".into()),
        ("serve", format!("serve -r -f qcow2 IMAGE --run 'lacuna io -r -f raw {READS} $uri'")),
    ]
}

/// Holds what every verb does with the image against `outcomes/NAME.txt`, and what must be true of
/// every image against what it is.
pub(crate) fn assert_outcomes(name: &str, builder: &ImageBuilder) {
    let sandbox = Sandbox::ours();
    builder.build().bytes.save(&sandbox.path("IMAGE"));
    let (got, file) = (outcomes(&sandbox), format!("{name}.txt"));
    let expected = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/outcomes").join(&file);
    let text = std::fs::read_to_string(&expected).unwrap_or_default();
    let new = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&file);
    std::fs::write(&new, &got).unwrap();
    assert!(got == text, "diff {} {}\n{got}", expected.display(), new.display());
}

fn outcomes(sandbox: &Sandbox) -> String {
    let before = sandbox.bytes("IMAGE");
    let mut text = String::new();
    for (what, words) in questions() {
        text += &told(what, &bounded::lacuna(sandbox, &words));
        assert!(sandbox.bytes("IMAGE") == before, "{what} changes the image");
    }
    text += &told("write", &written(sandbox));
    std::fs::write(sandbox.path("IMAGE"), &before).unwrap();
    text + &told("check -r all", &repaired(sandbox, &before))
}

/// Lines of an output that are kept; of more, the first and the last of them.
const LINES: usize = 24;

fn told(what: &str, outcome: &Outcome) -> String {
    let mut lines: Vec<&str> = outcome.text.lines().filter(|line| !is_rate(line)).collect();
    let omitted = lines.len().saturating_sub(LINES);
    let note = format!("({omitted} lines)");
    if omitted > 0 {
        lines.splice(LINES / 2..LINES / 2 + omitted, [&*note]);
    }
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    format!("$ {what}\n{text}= {}\n", outcome.code.unwrap())
}

/// Says whether a line is about how fast it was.
fn is_rate(line: &str) -> bool {
    line.contains(" ops; ")
}

/// Writes to what is there, and to what is not, and reads all of it again.
fn written(sandbox: &Sandbox) -> Outcome {
    let writes =
        r#"-c "write -P 9 64k 64k" -c "write -P 8 512k 4k" -c flush -c "read -P 8 512k 4k""#;
    bounded::lacuna(sandbox, &format!("io -f qcow2 {writes} {READS} IMAGE"))
}

fn repaired(sandbox: &Sandbox, before: &[u8]) -> Outcome {
    let (found, readable) = (report(before), guest(before));
    let outcome = bounded::lacuna(sandbox, "check -r all IMAGE");
    let after = sandbox.bytes("IMAGE");
    let left = report(&after);
    assert!(worth(left.as_ref()) <= worth(found.as_ref()), "worse than {found:#?}: {left:#?}");
    for (index, (read, now)) in readable.iter().zip(&guest(&after)).enumerate() {
        let is_same = read.as_ref().is_none_or(|read| {
            now.as_ref() == Some(read) || is_repaired_metadata(read, before, &after)
        });
        assert!(is_same, "cluster {index} could be read before the repair, and reads otherwise");
    }
    outcome
}

/// Says whether guest bytes are a table that the repair has changed: a damaged entry may show one.
fn is_repaired_metadata(read: &[u8], before: &[u8], after: &[u8]) -> bool {
    let mut clusters = before.chunks(CLUSTER).zip(after.chunks(CLUSTER));
    clusters.any(|(old, new)| old != new && old == read)
}

/// What a check finds; nothing where it cannot be made.
fn report(bytes: &[u8]) -> Option<CheckReport> {
    let storage = MemoryStorage::from(bytes);
    block_on(check(&storage, &CheckOptions::default(), &mut |_| {})).ok()
}

/// How bad it is, worst first.
fn worth(report: Option<&CheckReport>) -> (bool, u64, u64) {
    report.map_or((true, 0, 0), |report| (false, report.check_errors, report.corruptions))
}

/// What can be read of the disk, by clusters.
fn guest(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let parts = Parts { storage: MemoryStorage::from(bytes), data: None, backing: None };
    let Ok(image) = block_on(Image::open(parts, OpenOptions::new(Access::ReadOnly))) else {
        return Vec::new();
    };
    let read = |cluster: u64| {
        let at = GuestOffset(cluster * CLUSTER as u64);
        let (result, buffer) = block_on(image.read(at, Buffer::new(CLUSTER)));
        result.is_ok().then(|| buffer.to_vec())
    };
    (0..CLUSTERS).map(read).collect()
}
