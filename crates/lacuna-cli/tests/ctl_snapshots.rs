//! Internal snapshots of an image that is served are made and deleted under load, and applied where
//! nobody has it.

mod common;

use common::{Outcome, Sandbox};

const IMAGES: &str = "
    set -e
    stock-img create -q -f qcow2 disk.qcow2 64M
    stock-io -f qcow2 -c 'write -P 7 0 24M' -c 'write -z 0 1M' disk.qcow2 >&2
    stock-img create -q -f raw flat.raw 1M";

fn prepared() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(IMAGES);
    sandbox
}

fn served(lines: &str) -> (Sandbox, Outcome) {
    let sandbox = prepared();
    let got = common::served(&sandbox, "a=disk.qcow2", lines);
    (sandbox, got)
}

fn clean(sandbox: &Sandbox, image: &str) {
    let got = sandbox.run(&format!("stock-img check {image}"));
    assert_eq!(got.code, Some(0), "{image}: {}", got.text);
}

/// A guest that never stops writes numbers in turn: a snapshot that is of no single moment would show.
#[test]
fn snapshots_come_and_go_under_load_and_are_of_one_moment() {
    let (sandbox, got) = served(
        "cat > guest.py <<'END'
import os, random
number = 0
while not os.path.exists('over'):
    number += 1
    h.pwrite(number.to_bytes(8, 'big') * 64, (number % 256) << 12)
    h.pwrite(bytes([random.randrange(256)]) * 5000, random.randrange(1 << 20, 60 << 20))
END
         nbdsh -u \"$a\" -c - < guest.py & guest=$!
         fio --name=v --ioengine=nbd --uri=\"$a\" --rw=randwrite --bs=16k --size=3M --offset=61M \
             --io_size=12M --iodepth=16 --verify=crc32c --randseed=1 >fio.log 2>&1 & fio=$!
         ctl compact a --now --background > /dev/null
         for n in 1 2 3 4 5 6 7 8; do
             ctl snapshot a --create s$n || exit 1
             [ $n -gt 3 ] && { ctl snapshot a --delete s$((n - 3)) || exit 1; }
             sleep 0.05
         done
         wait $fio; echo fio ended with $?; touch over; wait $guest; echo guest ended with $?
         ctl snapshot a --output=json | grep -c '\"name\"'
         ctl jobs | grep -c failed",
    );
    assert!(got.text.contains("fio ended with 0\nguest ended with 0\n3\n0\n"), "{}", got.text);
    assert!(got.text.contains("server ended with 0\n"), "{}", got.text);
    clean(&sandbox, "disk.qcow2");
    for name in ["s6", "s7", "s8"] {
        sandbox.prepare(&format!("stock-img convert -l {name} -O raw disk.qcow2 {name}.raw"));
        let bytes = sandbox.bytes(&format!("{name}.raw"));
        let numbers: Vec<u64> = (0..256)
            .map(|block| u64::from_be_bytes(bytes[block << 12..][..8].try_into().unwrap()))
            .collect();
        let last = *numbers.iter().max().unwrap();
        assert!(last > 0, "{name}");
        for (block, number) in (0..).zip(&numbers) {
            // Before the guest came there were zeros.
            let behind = (last + 256 - block) % 256;
            assert_eq!(*number, last.saturating_sub(behind), "{name}, block {block} of {last}");
        }
    }
}

#[test]
fn one_is_applied_where_no_client_and_no_point_sees_it() {
    let (sandbox, got) = served(
        "ctl snapshot a --create before
         cat > guest.py <<'END'
import os
def ctl(words):
    import sys; sys.stdout.flush()
    return os.waitstatus_to_exitcode(os.system('lacuna ctl --control ctl.sock ' + words))
h.pwrite(b'x' * 4096, 2 << 20)
print(ctl('resize a 65M'))
print(ctl('snapshot a --apply before'))
h.shutdown()
END
         nbdsh -u \"$a\" -c - < guest.py 2>&1
         until ctl list | grep -q 'read-write  0'; do sleep 0.01; done
         ctl point a --add p; ctl snapshot a --apply before; ctl point a --remove p
         ctl snapshot a --apply none; ctl snapshot a --apply before
         stock-io -f raw -c 'read -P 7 2M 4k' \"$a\"; nbdinfo --size \"$a\"
         ctl snapshot a | cut -c 1-18
         ctl add b flat.raw -f raw; ctl snapshot b --create x; ctl snapshot b; ctl add c flat.raw -r -f raw -U
         ctl snapshot c --create x; ctl snapshot a --create x --delete y",
    );
    let expected = "\
68157440 bytes, before 67108864
0
lacuna: Could not apply 'before': Export 'a' has 1 clients, whose disk would change under them
1
'a@p': 68157440 bytes
lacuna: Could not apply 'before': Export 'a' has point p, which needs its disk
hint: `lacuna ctl point --remove` takes it away
lacuna: Could not apply 'none': The image has no snapshot with identifier or name 'none'
read 4096/4096 bytes at offset 2097152
4 KiB, 1 ops; ...
67108864
Snapshot list:
";
    assert!(got.text.starts_with(expected), "{}", got.text);
    for line in [
        "lacuna: Could not create 'x': Only images of the format qcow2 have internal snapshots\n",
        "lacuna: Could not create 'x': Export 'c' is read-only\n",
        "lacuna: One of 'create', 'apply' and 'delete' is enough\n",
        "server ended with 0\n",
    ] {
        assert!(got.text.contains(line), "{line}: {}", got.text);
    }
    clean(&sandbox, "disk.qcow2");
}
