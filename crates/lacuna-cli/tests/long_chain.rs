//! A chain of a thousand files, and what a host says that allows fewer.

mod common;

use common::Sandbox;
use lacuna::qcow2::{BackingName, CreateOptions, create};
use lacuna::storage::{FileAccess, FileOptions, FileStorage};
use pollster::block_on;

const IMAGES: usize = 1000;

/// Makes files `0` to `999`, each on the one before; the lowest has data.
fn chain() -> Sandbox {
    let sandbox = Sandbox::ours();
    for index in 0..IMAGES {
        let backing = index
            .checked_sub(1)
            .map(|below| BackingName { name: below.to_string(), format: Some("qcow2".to_owned()) });
        let options = CreateOptions { size_bytes: 4 << 20, backing, ..CreateOptions::default() };
        std::fs::File::create(sandbox.path(&index.to_string())).unwrap();
        let options_of_file =
            FileOptions { access: FileAccess::ReadWrite, ..FileOptions::default() };
        let file = FileStorage::open(sandbox.path(&index.to_string()), &options_of_file).unwrap();
        block_on(create(&file, &options)).unwrap();
    }
    sandbox.prepare(
        "lacuna io -c 'write -q -P 7 1M 1M' 0; lacuna io -c 'write -q -P 8 1M 64k' 500
         lacuna io -c 'write -q -P 9 3M 64k' 999",
    );
    sandbox
}

#[test]
fn a_thousand_files_are_opened_whatever_the_shell_allows_and_refused_where_the_host_does_not() {
    let ours = chain();
    let reads = "lacuna io -r -c 'read -q -P 0 0 1M' -c 'read -q -P 8 1M 64k' \
                 -c 'read -q -P 7 1088k 960k' -c 'read -q -P 9 3M 64k' 999";
    let got = ours.run(&format!("ulimit -Sn 256; {reads}"));
    assert_eq!((got.text.as_str(), got.code), ("", Some(0)));
    let got = ours.run(&format!("ulimit -n 256; {reads}"));
    assert_eq!(got.code, Some(1));
    for part in ["Too many open files", "hint: each image of a chain is an open file; `ulimit -n`"]
    {
        assert!(got.text.contains(part), "{}", got.text);
    }
    // All of it into the lowest, or into the highest.
    ours.prepare("lacuna convert -O raw 999 before.raw; cp 999 copy; lacuna commit -q -b 1 copy");
    ours.prepare(
        "stock-img compare before.raw 1; lacuna stream 999; stock-img compare before.raw 999",
    );
}
