//! Damage in images of tebibytes: found, repaired as far as it can be, in little memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::Value;
use testkit::ImageBuilder;

use crate::bounded::lacuna;
use crate::common::Sandbox;

const COPIED: u64 = 1 << 63;

/// A disk of 4 TiB, all of it mapped: 2 million clusters, in a file of 4 TiB with few bytes in it.
struct Large {
    sandbox: Sandbox,
    file: File,
}

impl Large {
    fn new() -> Self {
        let sandbox = Sandbox::ours();
        sandbox.prepare(
            "stock-img create -q -f qcow2 -o preallocation=metadata,cluster_size=2M IMAGE 4T
             stock-io -f qcow2 -c 'write -P 1 0 64k' -c 'write -P 2 1T 64k' \\
                 -c 'write -P 3 4398046507008 4k' IMAGE",
        );
        let path = sandbox.path("IMAGE");
        let file = File::options().read(true).write(true).open(path).unwrap();
        assert!(file.metadata().unwrap().len() > 4 << 40);
        Self { sandbox, file }
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn set_word(&self, at: u64, word: u64) {
        self.file.write_all_at(&word.to_be_bytes(), at).unwrap();
    }

    /// Where an entry of the L2 table lies that begins `table` half tebibytes into the disk.
    fn l2(&self, table: u64, index: u64) -> u64 {
        (self.word(self.word(40) + table * 8) & !COPIED) + index * 8
    }

    fn refcount_table(&self) -> u64 {
        self.word(48)
    }

    fn assert_reads(&self) {
        self.sandbox.prepare(
            "stock-io -r -f qcow2 -c 'read -P 1 0 64k' -c 'read -P 2 1T 64k' \
                 -c 'read -P 3 4398046507008 4k' IMAGE | grep -c -i fail | grep -qx 0",
        );
    }

    /// Checks with these words behind the verb; returns the exit code and the report.
    fn check(&self, words: &str) -> (Option<i32>, Value) {
        let got = lacuna(&self.sandbox, &format!("check --output=json {words} IMAGE"));
        // What is wrong is told before, on standard error.
        let start = got.text.find("{\n").unwrap_or_default();
        let report = serde_json::from_str(&got.text[start..]);
        (got.code, report.unwrap_or_else(|error| panic!("{error}: {got:?}")))
    }
}

#[test]
fn refcounts_of_4_tib_are_made_anew_and_nothing_is_lost() {
    let large = Large::new();
    // The first refcount block, which counts 2 TiB, is not found any more, a flag is lost, and
    // a cluster is counted that nothing uses.
    large.set_word(large.refcount_table(), 0);
    let at = large.l2(3, 77);
    large.set_word(at, large.word(at) & !COPIED);
    large.set_word(large.l2(5, 99), 0);
    let (code, before) = large.check("");
    assert_eq!(code, Some(2), "{before:#}");
    assert!(before["corruptions"].as_u64() > Some(1 << 20), "{}", before["corruptions"]);
    let (code, after) = large.check("-r all");
    assert_eq!(
        (code, after["corruptions"].as_u64(), after["leaks"].as_u64()),
        (Some(0), None, None)
    );
    assert!(after["corruptions-fixed"].as_u64() >= Some(1 << 20));
    large.assert_reads();
    large.sandbox.prepare("stock-img check -q IMAGE");
}

#[test]
fn a_damaged_pointer_in_4_tib_leaves_all_the_rest_as_it_was() {
    let large = Large::new();
    let (unaligned, beyond) = (large.l2(4, 1000), large.l2(7, 5));
    let lost = [large.word(unaligned), large.word(beyond)];
    large.set_word(unaligned, lost[0] + 0x200);
    large.set_word(beyond, COPIED | 1 << 55);
    let (code, before) = large.check("");
    assert_eq!(code, Some(2));
    let (code, after) = large.check("-r all");
    assert_eq!(code, Some(2), "what was meant is not known");
    assert!(after["corruptions"].as_u64() <= before["corruptions"].as_u64());
    large.assert_reads();
    // Whoever puts the pointers back has lost nothing.
    large.set_word(unaligned, lost[0]);
    large.set_word(beyond, lost[1]);
    assert_eq!(large.check("-r all").0, Some(0));
    large.assert_reads();
    large.sandbox.prepare("stock-img check -q IMAGE");
}

#[test]
fn a_disk_of_a_pebibyte_with_little_in_it_is_looked_at_at_once() {
    let sandbox = Sandbox::ours();
    let far = (1_u64 << 50) / (2 << 20) - 1;
    let image = ImageBuilder::new(3, 21, 1 << 50).data(0, b"near").data(far, b"far");
    image.change_l2(far, |words| words[0] &= !COPIED).build().bytes.save(&sandbox.path("IMAGE"));
    for (words, code) in [
        ("info IMAGE", 0),
        ("map IMAGE", 0),
        ("measure -O qcow2 IMAGE", 0),
        ("check IMAGE", 2),
        ("convert -O qcow2 IMAGE copy", 0),
        ("compare IMAGE copy", 0),
        ("check -r all IMAGE", 0),
        ("compare IMAGE copy", 0),
    ] {
        let got = lacuna(&sandbox, words);
        assert_eq!(got.code, Some(code), "{words}: {got:?}");
    }
}
