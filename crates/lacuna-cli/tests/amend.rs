//! `amend` against the stock tool: same words, same exit codes, the same disk afterwards.

mod common;

use common::{Sandbox, both};

#[test]
fn what_cannot_be_amended_is_refused_in_the_same_words() {
    both(
        "stock-img create -q -f qcow2 a 1M; stock-img create -q -f raw base 1M
         stock-img create -q -f qcow2 -b base -F raw b; stock-img create -q -f qcow2 -o compat=0.10 o 1M
         stock-img create -q -f qcow2 -o data_file=d,data_file_raw=on e 1M; stock-img create -q -f qcow2 -o data_file=dd g 1M
         stock-img create -q -f qcow2 -o extended_l2=on x 1M
         stock-img create -q -f qcow2 -o refcount_bits=8 n 1M
         stock-img create -q -f qcow2 s 1M; stock-img snapshot -c one s; stock-img resize -q s 2M
         qemu-img amend
         qemu-img amend a
         qemu-img amend -o size=1M
         qemu-img amend -o size=1M a b
         qemu-img amend -U -o size=1M a
         qemu-img amend --bogus -o size=1M a
         qemu-img amend -t foo -o size=1M a
         qemu-img amend -f qcow2 --image-opts -o size=1M driver=qcow2,file.filename=a
         qemu-img amend -f foo -o size=1M a
         qemu-img amend -f foo -o help
         qemu-img amend -f raw -o help
         qemu-img amend -o help nope
         qemu-img amend -o help base
         qemu-img amend -o size=1M nope
         qemu-img amend -o '' a
         qemu-img amend -o ,size=1 a
         qemu-img amend -o cluster_size=32k a
         qemu-img amend -o foo=1 a
         qemu-img amend -o encryption=on a
         qemu-img amend -o preallocation=full a
         qemu-img amend -o extended_l2=on a
         qemu-img amend -o encrypt.keyslot=1 a
         qemu-img amend -o compat=0.42 a
         qemu-img amend -o compat= a
         qemu-img amend -o backing_file=x a
         qemu-img amend -o backing_fmt=raw a
         qemu-img amend -o backing_file=base b
         qemu-img amend -o backing_file=base,backing_fmt=raw b
         qemu-img amend -o lazy_refcounts=on o
         qemu-img amend -o refcount_bits=8 o
         qemu-img amend -o compat=0.10,lazy_refcounts=on a
         qemu-img amend -o compat=0.10 n
         qemu-img amend -o compat=0.10 e
         qemu-img amend -o compat=0.10 x
         qemu-img amend -o compat=0.10 s
         qemu-img amend -o refcount_bits=7 a
         qemu-img amend -o refcount_bits=128 a
         qemu-img amend -o refcount_bits=1 s
         qemu-img amend -o data_file=x a
         qemu-img amend -o data_file_raw=on a
         qemu-img amend -o data_file_raw=on g
         qemu-img amend -f raw -o size=2M base
         qemu-img amend -o size=1000 a
         qemu-img amend -o size=foo a
         for f in a b o e g x n s; do stock-img check -q $f; stock-img info $f | grep -A9 compat; done",
    );
}

#[test]
fn what_is_amended_is_as_after_the_stock_tool() {
    both(
        "stock-img create -q -f qcow2 a 1M; stock-io -c 'write -P 7 0 200k' a >/dev/null
         for o in compat=0.10 compat=1.1,lazy_refcounts=on lazy_refcounts=off size=2M size=512k \
             refcount_bits=8 compat=0.10,refcount_bits=16 compat=v3; do \
             echo $o; qemu-img amend -o $o a; stock-img check -q a; stock-img info a | grep 'compat\\|virtual\\|refcount'; \
             stock-io -c 'read -P 7 0 200k' a | head -1; stock-io -c 'write -P 7 0 200k' a >/dev/null; done
         qemu-img amend --image-opts -o size=1M driver=qcow2,file.filename=a; qemu-img amend --force -o size=3M a
         qemu-img amend -q -f qcow2 -o size=1M -o lazy_refcounts=on a; stock-img info a | grep 'lazy\\|virtual'
         stock-img create -q -f qcow2 -o data_file=d g 1M; cp d other
         qemu-img amend -o data_file=other g; stock-img info g | grep 'data file'
         stock-img create -q -f qcow2 -o data_file=e,data_file_raw=on f 1M
         qemu-img amend -o data_file_raw=on f; qemu-img amend -o data_file_raw=off f; stock-img info f | grep 'data file'",
    );
}

/// As above, in the tables of snapshots, which share some of them with each other. The stock tool writes
/// zeros into clusters that only the disk's own map calls zeros, and snapshots lose what they had.
#[test]
fn a_downgrade_turns_zeros_of_snapshots_into_what_version_2_can_say() {
    for from in ["", "-b base -F raw"] {
        let ours = Sandbox::ours();
        ours.prepare(&format!(
            "set -e; stock-img create -q -f raw base 2M; stock-io -f raw -c 'write -P 5 0 2M' base >&2
             stock-img create -q -f qcow2 {from} a 2M
             stock-io -c 'write -P 7 0 1M' -c 'write -z 128k 128k' -c 'write -z -u 512k 64k' \
                 -c 'write -z 1M 300k' a >&2
             stock-img snapshot -c one a; stock-img snapshot -c two a
             stock-io -c 'write -P 8 0 600k' -c 'write -z 900k 128k' a >&2; stock-img snapshot -c three a
             for s in one two three; do stock-img convert -O raw -l $s a $s; done
             stock-img convert -O raw a now"
        ));
        let got = ours.run(
            "qemu-img amend -o compat=0.10 a; stock-img check a | head -1; stock-img info a | grep compat
             for s in one two three; do stock-img convert -O raw -l $s a again; cmp $s again; done
             stock-img compare -F raw a now; stock-io -c 'write -P 9 0 2M' a >/dev/null
             for s in one two three; do stock-img convert -O raw -l $s a again; cmp $s again; done
             for s in one two three; do stock-img snapshot -d $s a; done
             stock-img check a | head -1",
        );
        let clean = "No errors were found on the image.\n";
        let expected = format!("{clean}    compat: 0.10\nImages are identical.\n{clean}");
        assert_eq!(got.text, expected, "{from}");
    }
}

#[test]
fn version_2_with_snapshots_gets_another_version_and_size_in_one_call() {
    both(
        "stock-img create -q -f qcow2 -o compat=0.10 a 1M; stock-io -c 'write -P 1 0 64k' a >/dev/null
         stock-img snapshot -c s a; stock-img convert -O raw -l s a old.raw
         qemu-img amend -o size=2M a
         qemu-img amend -o compat=0.10,size=2M a
         qemu-img amend -o compat=1.1,size=2M a; stock-img check a | head -1
         stock-img info a | grep 'compat\\|virtual'; stock-img convert -O raw -l s a new.raw
         cmp -n 1048576 old.raw new.raw; stock-io -c 'read -P 1 0 64k' a | head -1",
    );
}

/// Zero clusters with and without a place, over a backing file and over nothing.
#[test]
fn a_downgrade_turns_zeros_into_what_version_2_can_say() {
    for from in ["", "-b base -F raw"] {
        both(&format!(
            "stock-img create -q -f raw base 2M; stock-io -f raw -c 'write -P 5 0 2M' base >/dev/null
             stock-img create -q -f qcow2 {from} a 2000k
             stock-io -c 'write -P 7 0 1M' -c 'write -z 128k 128k' -c 'write -z -u 512k 64k' -c 'write -z 1M 300k' \
                 -c 'discard 1900k 100k' a >/dev/null
             stock-img convert -O raw a content
             qemu-img amend -o compat=0.10 a
             stock-img compare -F raw a content; stock-img check a | head -1; stock-img info a | grep compat
             stock-img map --output=json a | grep -c '\"zero\": true, \"data\": true'"
        ));
    }
}

#[test]
fn refcounts_of_every_width_count_the_same() {
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; stock-img create -q -f qcow2 -o cluster_size=512 a 3M
         stock-io -c 'write -P 7 1M 1M' a >&2; stock-img snapshot -c one a
         stock-io -c 'write -P 8 1M 64k' a >&2; stock-img convert -O raw a content",
    );
    for bits in [2, 64, 4, 32, 8, 16] {
        let got = ours.run(&format!(
            "lacuna amend -o refcount_bits={bits} a && stock-img check -q a && stock-img compare -q -F raw a content
             stock-img info a | grep 'refcount bits'"
        ));
        assert_eq!(got.text, format!("    refcount bits: {bits}\n"), "{got:?}");
    }
    let narrow = ours.run("lacuna amend -o refcount_bits=1 a; stock-img check -q a; echo $?");
    assert!(narrow.text.contains("does not fit into 1 bits\n"), "{}", narrow.text);
    assert!(narrow.text.ends_with("\n0\n"), "{}", narrow.text);
}

#[test]
fn claims_are_put_up_where_they_are_true_and_taken_off_on_request() {
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; stock-img create -q -f qcow2 a 1M; cp a b; cp a c
         stock-io -c 'write -z 0 64k' b >&2; stock-io -c 'write -P 1 0 64k' c >&2
         truncate -s 1M base; stock-img create -q -f qcow2 -b base -F raw d",
    );
    for (file, zero, unallocated) in
        [("a", true, true), ("b", true, false), ("c", false, false), ("d", false, true)]
    {
        let claims = |line: &str| {
            let got = ours.run(&format!("{line} && lacuna info {file} | grep '^    all '; true"));
            got.text
        };
        let mut expected = String::new();
        expected += if zero { "    all zero: true\n" } else { "" };
        expected += if unallocated { "    all unallocated: true\n" } else { "" };
        assert_eq!(claims(&format!("lacuna amend -o zero_claims=on {file}")), expected, "{file}");
        assert_eq!(
            claims(&format!("lacuna check -q {file} && stock-img check -q {file}")),
            expected
        );
        assert_eq!(claims(&format!("lacuna amend -o zero_claims=off {file}")), "", "{file}");
    }
    let got = ours.run("lacuna amend -o compat=0.10 a; lacuna amend -o zero_claims=on a");
    assert_eq!(got.code, Some(1), "{}", got.text);
}

#[test]
fn a_downgrade_that_would_lose_something_is_refused() {
    let ours = Sandbox::ours();
    ours.prepare(
        "set -e; stock-img create -q -f qcow2 a 1M; stock-img bitmap --add a b0
         stock-img create -q -f qcow2 -o compression_type=zstd z 1M",
    );
    for (file, text) in [
        // Stock takes it, and what is compressed in it cannot be read any more.
        (
            "z",
            "lacuna: Version 2 lacks what the image has: IncompatibleFeatures(COMPRESSION_TYPE)\n",
        ),
        (
            "a",
            "lacuna: Version 2 cannot keep the bitmaps that the image has\nhint: `bitmap --remove` \
             takes them off; qemu-img loses them and their clusters\n",
        ),
    ] {
        let got =
            ours.run(&format!("lacuna amend -o compat=0.10 {file}; stock-img check -q {file}"));
        assert_eq!(got.text, text);
    }
    let listed = ours.run(
        "lacuna amend -f qcow2 -o help | grep -c =; qemu-img amend -f qcow2 -o help | grep -c =",
    );
    assert_eq!(listed.text, "9\n8\n");
}
