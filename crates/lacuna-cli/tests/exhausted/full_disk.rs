//! Each verb that writes, on a file system with less and less room.
//!
//! The file system is a small tmpfs in a mount namespace of its own, which takes no privilege where
//! users may have namespaces.

use crate::common::{Outcome, Sandbox};

/// KiB that are free, the rest being taken by a file: every size at which something else is the first
/// that finds no room.
const FREE: &str = "0 4 8 64 128 192 256 384 512 768 1024 3072";

/// What is done on the file system.
struct Case {
    /// Makes the images, in the empty folder.
    prepare: &'static str,
    /// What needs room.
    verb: &'static str,
    /// Says that nothing that was there is lost, whatever became of the verb.
    kept: &'static str,
    /// Says that it has done its work.
    done: &'static str,
}

impl Case {
    /// Runs it once for each size of `FREE`.
    fn judge(&self) {
        let sandbox = Sandbox::ours();
        let (mut failures, mut successes) = (0, 0);
        for free in FREE.split(' ') {
            let got = self.run(&sandbox, free);
            let story = format!("{} with {free} KiB free: {}", self.verb, got.text);
            let value = |name: &str| {
                let line = got.text.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_else(|| panic!("no '{name}' in {story}")).to_owned()
            };
            match &*value("first ") {
                "0" => successes += 1,
                "1" => {
                    failures += 1;
                    assert!(got.text.contains("No space left on device"), "{story}");
                    // A shell goes on with its next command, as qemu-io does.
                    let has_hint = got.text.contains("hint: make room on the host");
                    assert!(has_hint || self.verb.starts_with("lacuna io"), "{story}");
                }
                _ => panic!("{story}"),
            }
            assert_eq!(value("kept "), "0", "{story}");
            assert_eq!(value("again "), "0", "{story}");
            assert_eq!(value("done "), "0", "{story}");
            assert!(!got.text.contains("panicked"), "{story}");
        }
        assert!(
            failures > 0 && successes > 0,
            "{}: {failures} failed, {successes} did not",
            self.verb
        );
    }

    fn run(&self, sandbox: &Sandbox, free: &str) -> Outcome {
        let Self { prepare, verb, kept, done } = self;
        let script = format!(
            "set -e; mkdir -p full; mount -t tmpfs -o size=12m none full; cd full
             {prepare}
             left=$(($(df --output=avail -k . | tail -1) - {free}))
             head -c ${{left}}k /dev/zero > filler
             set +e; {{ {verb}; }}; echo first $?
             {{ {kept}; }}; echo kept $?
             rm filler
             [ -e finished ] || {{ {verb}; }}; echo again $?
             {{ {done}; }}; echo done $?"
        );
        std::fs::write(sandbox.path("script"), script).unwrap();
        let got = sandbox.run("unshare --map-root-user --mount bash script");
        let text = &got.text;
        assert!(
            text.contains("first "),
            "no small file system (root, or namespaces for users, are needed): {text}"
        );
        got
    }
}

/// An image of 2 MiB of data, flushed, and a copy of what its guest reads.
const IMAGE: &str = "
    stock-img create -q -f qcow2 image 64M
    stock-io -f qcow2 -c 'write -q -P 1 0 1M' -c 'write -q -P 2 8M 1M' image
    stock-img convert -O qcow2 -c image ../before.qcow2";

#[test]
fn writing_and_flushing() {
    Case {
        prepare: IMAGE,
        verb: "lacuna io -f qcow2 -c 'write -q -P 3 1M 600k' -c flush image",
        kept: "stock-img check -q image; [ $? = 0 -o $? = 3 ] && \
               stock-io -r -f qcow2 -c 'read -P 1 0 1M' -c 'read -P 2 8M 1M' image | grep -c fail \
               | grep -qx 0",
        done: "stock-io -r -f qcow2 -c 'read -P 3 1M 600k' image | grep -c fail | grep -qx 0",
    }
    .judge();
}

#[test]
fn converting_leaves_no_half_of_a_copy() {
    Case {
        prepare: IMAGE,
        verb: "lacuna convert -f qcow2 -O qcow2 image copy && touch finished",
        kept: "[ -e finished -o ! -e copy ] && stock-img compare -q image ../before.qcow2",
        done: "stock-img compare -q image copy",
    }
    .judge();
}

#[test]
fn creating_leaves_no_half_of_an_image() {
    Case {
        prepare: "true",
        verb: "lacuna create -q -f qcow2 -o preallocation=falloc new 512k && touch finished",
        kept: "[ -e finished -o ! -e new ]",
        done: "stock-img check -q new",
    }
    .judge();
}

#[test]
fn growing_with_preallocation() {
    Case {
        prepare: IMAGE,
        verb: "lacuna resize -q -f qcow2 --preallocation=falloc image 65M && touch finished",
        kept: "stock-img check -q image; [ $? = 0 -o $? = 3 ] && \
               stock-io -r -f qcow2 -c 'read -P 1 0 1M' -c 'read -P 2 8M 1M' image | grep -c fail \
               | grep -qx 0",
        done: "stock-img info image | grep -q 65.MiB",
    }
    .judge();
}

#[test]
fn repairing_makes_nothing_worse() {
    Case {
        // No refcounts are left: they are made anew, in new clusters.
        prepare: "
            stock-img create -q -f qcow2 image 64M
            stock-io -f qcow2 -c 'write -q -P 1 0 1M' -c 'write -q -P 2 8M 1M' image
            stock-img convert -O qcow2 -c image ../before.qcow2
            head -c 8 /dev/zero | dd of=image bs=1 seek=65536 conv=notrunc status=none",
        verb: "lacuna check -q -r all image",
        kept: "stock-img compare -q image ../before.qcow2",
        done: "stock-img check -q image && stock-img compare -q image ../before.qcow2",
    }
    .judge();
}

#[test]
fn making_a_snapshot() {
    Case {
        prepare: IMAGE,
        verb: "lacuna snapshot -c one image && touch finished",
        kept: "stock-img check -q image; [ $? = 0 -o $? = 3 ] && \
               stock-img compare -q image ../before.qcow2",
        done: "[ $(stock-img snapshot -l image | grep -c one) = 1 ]",
    }
    .judge();
}

#[test]
fn reclaiming() {
    Case {
        prepare: "
            stock-img create -q -f qcow2 image 64M
            stock-io -f qcow2 -c 'write -q -P 1 0 1M' -c 'write -q -P 2 8M 1M' \\
                -c 'discard 0 896k' image
            stock-img convert -O qcow2 -c image ../before.qcow2",
        verb: "lacuna reclaim -q image > report",
        kept: "stock-img check -q image; [ $? = 0 -o $? = 3 ] && \
               stock-img compare -q image ../before.qcow2",
        done: "stock-img check -q image && stock-img compare -q image ../before.qcow2",
    }
    .judge();
}

#[test]
fn committing() {
    Case {
        prepare: "
            stock-img create -q -f qcow2 image 64M
            stock-io -f qcow2 -c 'write -q -P 1 0 1M' image
            stock-img create -q -f qcow2 -b image -F qcow2 top
            stock-io -f qcow2 -c 'write -q -P 2 512k 1M' top
            stock-img convert -O qcow2 -c top ../before.qcow2",
        verb: "lacuna commit -q top && touch finished",
        kept: "stock-img check -q image; [ $? = 0 -o $? = 3 ] && \
               stock-img compare -q top ../before.qcow2",
        done: "stock-img compare -q image ../before.qcow2 && stock-img check -q image",
    }
    .judge();
}

#[test]
fn changing_the_width_of_refcounts() {
    Case {
        prepare: IMAGE,
        verb: "lacuna amend -q -o refcount_bits=64 image",
        kept: "stock-img check -q image; [ $? = 0 -o $? = 3 ] && \
               stock-img compare -q image ../before.qcow2",
        done: "stock-img check -q image && stock-img compare -q image ../before.qcow2",
    }
    .judge();
}

#[test]
fn streaming() {
    Case {
        prepare: "
            stock-img create -q -f qcow2 image 64M
            stock-io -f qcow2 -c 'write -q -P 1 0 768k' image
            stock-img create -q -f qcow2 -b image -F qcow2 top
            stock-io -f qcow2 -c 'write -q -P 2 512k 64k' top
            stock-img convert -O qcow2 -c top ../before.qcow2",
        verb: "lacuna stream -q top && touch finished",
        kept: "stock-img compare -q top ../before.qcow2",
        done: "stock-img compare -q top ../before.qcow2 && ! stock-img info top | grep -q backing",
    }
    .judge();
}

/// A client meets a full disk, is told so, goes on when there is room again, on the same server, and
/// finds what was flushed and what is written now.
#[test]
fn serving_goes_on_when_there_is_room_again() {
    let sandbox = Sandbox::ours();
    let reads = "-c 'read -P 1 0 1M' -c 'read -P 2 8M 1M'";
    for free in FREE.split(' ') {
        let script = format!(
            "set -e; mkdir -p full; mount -t tmpfs -o size=12m none full; cd full
             {IMAGE}
             left=$(($(df --output=avail -k . | tail -1) - {free}))
             head -c ${{left}}k /dev/zero > filler
             set +e; lacuna serve -f qcow2 image --run '
                 lacuna io -f raw -c \"write -q -P 3 1M 3M\" -c flush $uri; echo first $?
                 rm filler
                 lacuna io -f raw -c \"write -q -P 4 1M 3M\" -c flush $uri; echo again $?'
             echo served $?
             stock-img check -q image; echo sound $?
             stock-io -r -f qcow2 {reads} -c 'read -P 4 1M 3M' image | grep -c fail; echo read"
        );
        std::fs::write(sandbox.path("script"), script).unwrap();
        let got = sandbox.run("unshare --map-root-user --mount bash script");
        let has = |line: &str| got.text.lines().any(|found| found == line);
        let is_told = has("first 1") && got.text.contains("No space left on device");
        assert!(is_told || (has("first 0") && free == "3072"), "{free} KiB: {got:?}");
        assert!(has("again 0") && has("served 0") && has("0"), "{free} KiB: {got:?}");
        assert!(has("sound 0") || has("sound 3"), "{free} KiB: {got:?}");
    }
}
