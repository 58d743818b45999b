//! Every command and flag, and whole disks, by clients of other makes.

mod common;

use common::Sandbox;
use testkit::foreign::{FIO, NBDCOPY, NBDINFO, NBDSH};

/// All that libnbd can send, with what must come back; `h` is connected, the disk is of 8 MiB.
const EVERY_COMMAND: &str = r#"
import errno, nbd
K, M = 1 << 10, 1 << 20
assert h.get_size() == 8 * M
for ability in (h.can_multi_conn, h.can_flush, h.can_fua, h.can_trim, h.can_zero,
                h.can_fast_zero, h.can_cache):
    assert ability(), ability
assert not h.is_read_only()

def fails(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum == code, error
    else:
        raise AssertionError("no error")

FUA, DF, NO_HOLE, FAST, ONE = (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_NO_HOLE,
                               nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_REQ_ONE)
h.pwrite(b"\x07" * (256 * K), 0)
h.pwrite(b"\x09" * (64 * K), 256 * K, FUA)
assert h.pread(320 * K, 0) == b"\x07" * (256 * K) + b"\x09" * (64 * K)

# Odd offsets and lengths.
h.pwrite(b"odd", 1001)
assert h.pread(5, 1000) == b"\x07odd\x07"

# Zeros: with and without a hole, in no time, durably, in part of a cluster.
h.zero(64 * K, 0)
h.zero(64 * K, 64 * K, NO_HOLE)
h.zero(64 * K, 128 * K, FAST)
h.zero(100, 192 * K + 50, FUA | NO_HOLE)
assert h.pread(192 * K, 0) == bytes(192 * K)
assert h.pread(200, 192 * K) == b"\x07" * 50 + bytes(100) + b"\x07" * 50

# What is known to be zeros is zeroed at once; a part of a cluster of data is not.
h.zero(64 * K, 4 * M, FAST)
fails(errno.ENOTSUP, h.zero, 100, 256 * K + 5, FAST)
assert h.pread(200, 256 * K) == b"\x09" * 200

h.trim(64 * K, 256 * K, FUA)
assert h.pread(64 * K, 256 * K) == bytes(64 * K)
h.cache(8 * M, 0)
h.flush()

# Past the end, and without a length.
h.set_strict_mode(0)
fails(errno.EINVAL, h.pread, 1, 8 * M)
fails(errno.ENOSPC, h.pwrite, b"x" * 512, 8 * M - 511)
fails(errno.ENOSPC, h.zero, 2, 8 * M - 1)
fails(errno.EINVAL, h.trim, 2, 8 * M - 1)
fails(errno.EINVAL, h.pread, 512, 1 << 62)
# Flags that a command does not have, and one that nobody has.
fails(errno.EINVAL, h.trim, 512, 0, NO_HOLE)
fails(errno.EINVAL, h.pread, 512, 0, FAST)
fails(errno.EINVAL, h.pwrite, b"x" * 512, 0, 1 << 15)
assert h.pread(3, 1001) == bytes(3)

if h.get_structured_replies_negotiated():
    def chunks(flags):
        seen = []
        def chunk(part, offset, kind, error):
            seen.append((offset, len(part), kind))
        h.pread_structured(256 * K, 128 * K, chunk, flags)
        return seen
    # A hole is said to be one, unless the answer must be in one piece.
    assert {kind for _, _, kind in chunks(0)} == {nbd.READ_DATA, nbd.READ_HOLE}, chunks(0)
    assert chunks(DF) == [(128 * K, 256 * K, nbd.READ_DATA)], chunks(DF)

    def extents(length, offset, flags=0):
        seen = {}
        def told(context, at, entries, error):
            seen[context] = list(zip(entries[::2], entries[1::2]))
        h.block_status(length, offset, told, flags)
        return seen
    known = extents(8 * M, 0)
    assert set(known) == {"base:allocation", "qemu:allocation-depth"}, known
    # 64 KiB without a place, 64 KiB of zeros with one, data at last.
    allocation = known["base:allocation"]
    assert sum(length for length, _ in allocation) == 8 * M, known
    assert allocation[0] == (64 * K, 3), allocation
    assert allocation[1][1] == 2, allocation
    one = extents(7 * M, 64 * K, ONE)
    assert all(len(runs) == 1 for runs in one.values()), one
else:
    fails(errno.EINVAL, h.block_status, 8 * M, 0, lambda *args: 0)
"#;

fn prepared() -> Sandbox {
    let sandbox = Sandbox::ours();
    for tool in [NBDSH, NBDCOPY, NBDINFO, FIO] {
        let got = sandbox.run(&format!("{} --version", tool.name));
        assert_eq!(got.code, Some(0), "apt-get install {}: {}", tool.package, got.text);
    }
    sandbox.prepare("stock-img create -q -f qcow2 disk.qcow2 8M");
    sandbox
}

/// Has nbdsh run `script` on a connection that `before` was said about.
fn nbdsh(sandbox: &Sandbox, before: &str, script: &str) {
    let contexts = ["base:allocation", "qemu:allocation-depth"];
    let asks: String =
        contexts.iter().map(|name| format!("h.add_meta_context('{name}')\n")).collect();
    let whole = format!("{before}\n{asks}import os\nh.connect_uri(os.environ['uri'])\n{script}");
    std::fs::write(sandbox.path("script.py"), whole).unwrap();
    let serve = "lacuna serve -f qcow2 --discard=unmap disk.qcow2 --run 'nbdsh -c \"exec(open(\\\"script.py\\\").read())\"'";
    let got = sandbox.run(serve);
    assert_eq!(got.code, Some(0), "{}", got.text);
    assert_eq!(sandbox.run("stock-img check disk.qcow2").code, Some(0));
}

#[test]
fn nbdsh_sends_every_command_with_every_flag() {
    nbdsh(&prepared(), "", EVERY_COMMAND);
}

#[test]
fn nbdsh_does_the_same_with_simple_replies() {
    nbdsh(&prepared(), "h.set_request_structured_replies(False)", EVERY_COMMAND);
}

#[test]
fn nbdsh_chooses_an_export_as_old_clients_do() {
    // Without fixed newstyle there is nothing but the name of the export.
    let script = "assert h.get_size() == 8 << 20 and h.get_protocol() == 'newstyle'\n\
                  h.pwrite(b'old', 77)\nassert h.pread(3, 77) == b'old'\nh.flush()";
    nbdsh(&prepared(), "h.set_handshake_flags(0)", script);
}

#[test]
fn nbdinfo_lists_sizes_texts_and_contexts_of_all_exports() {
    let sandbox = prepared();
    sandbox.prepare("stock-img create -q -f qcow2 other.qcow2 1M");
    let got = sandbox.run(
        "lacuna serve -D 'two disks' a=disk.qcow2 b=other.qcow2 --run 'nbdinfo --list --json $uri'",
    );
    let listed: serde_json::Value = serde_json::from_str(&got.text).expect(&got.text);
    let exports = listed["exports"].as_array().unwrap();
    let told: Vec<_> = exports
        .iter()
        .map(|it| (it["export-name"].as_str().unwrap(), it["export-size"].as_u64().unwrap()))
        .collect();
    assert_eq!(told, [("a", 8 << 20), ("b", 1 << 20)]);
    for export in exports {
        assert_eq!(export["description"], "two disks");
        let contexts = export["contexts"].as_array().unwrap();
        for name in ["base:allocation", "qemu:allocation-depth"] {
            assert!(contexts.iter().any(|context| context == name), "{name}: {export}");
        }
        assert_eq!(export["can_multi_conn"], true);
    }
}

#[test]
fn nbdinfo_totals_are_those_of_the_image() {
    let sandbox = prepared();
    sandbox.prepare("stock-io -f qcow2 -c 'write 1M 1M' -c 'write -z 4M 1M' disk.qcow2 >&2");
    let ask = "nbdinfo --map --totals $uri";
    let ours = sandbox.run(&format!("lacuna serve -r -f qcow2 disk.qcow2 --run '{ask}'"));
    let theirs = sandbox.run(&format!(
        "stock-nbd -k $PWD/s -r -f qcow2 disk.qcow2 & \
         awaited s; uri=nbd+unix:///?socket=s; {ask}; wait"
    ));
    assert_eq!((ours.code, ours.text), (Some(0), theirs.text));
}

#[test]
fn nbdcopy_copies_both_ways_and_keeps_holes() {
    let sandbox = prepared();
    sandbox.prepare(
        "stock-io -f qcow2 -c 'write -P 3 1M 1M' -c 'write -P 5 5M 100k' disk.qcow2 >&2
         stock-img create -q -f qcow2 copy.qcow2 8M",
    );
    let got = sandbox.run(
        "lacuna serve -r -f qcow2 disk.qcow2 --run 'nbdcopy $uri out.raw' && \
         lacuna serve -f qcow2 copy.qcow2 --run 'nbdcopy --allocated out.raw $uri && nbdcopy out.raw $uri' && \
         stock-img compare -f raw -F qcow2 out.raw disk.qcow2 && \
         stock-img compare -f qcow2 -F qcow2 copy.qcow2 disk.qcow2 && stock-img check copy.qcow2",
    );
    assert_eq!(got.code, Some(0), "{}", got.text);
    let allocated = std::os::unix::fs::MetadataExt::blocks(
        &std::fs::metadata(sandbox.path("out.raw")).unwrap(),
    );
    assert!(allocated * 512 < 2 << 20, "{allocated} blocks: holes were filled");
}

#[test]
fn nbdcopy_goes_from_one_of_our_servers_to_another() {
    let sandbox = prepared();
    sandbox.prepare(
        "stock-io -f qcow2 -c 'write -P 3 1M 1M' -c 'write -P 5 5M 100k' disk.qcow2 >&2
         stock-img create -q -f qcow2 copy.qcow2 8M",
    );
    let got = sandbox.run(
        "lacuna serve a=disk.qcow2 b=copy.qcow2 -f qcow2 -k $PWD/s -t & \
         awaited s; \
         nbdcopy 'nbd+unix:///a?socket=s' 'nbd+unix:///b?socket=s'; echo copied with $?; \
         kill %1; wait; stock-img compare -f qcow2 -F qcow2 disk.qcow2 copy.qcow2",
    );
    assert!(got.text.contains("copied with 0"), "{}", got.text);
    assert!(got.text.contains("Images are identical."), "{}", got.text);
}

#[test]
fn fio_verifies_what_it_wrote_with_many_requests_in_flight() {
    let sandbox = prepared();
    let job = "fio --name=job --ioengine=nbd --uri=$uri --rw=randrw --bsrange=512-64k --iodepth=16 \
               --size=8M --verify=crc32c --verify_fatal=1 --randseed=7 --output=fio.txt";
    let got = sandbox.run(&format!("lacuna serve -f qcow2 disk.qcow2 --run '{job}'"));
    assert_eq!(got.code, Some(0), "{}", got.text);
    assert_eq!(sandbox.run("stock-img check disk.qcow2").code, Some(0));
}

#[test]
fn qemu_img_works_over_the_socket() {
    let sandbox = prepared();
    sandbox.prepare(
        "stock-io -f qcow2 -c 'write -P 3 1M 1M' -c 'write -z 4M 64k' disk.qcow2 >&2
         stock-img create -q -f qcow2 copy.qcow2 8M",
    );
    let got = sandbox.run(
        "lacuna serve -r -f qcow2 disk.qcow2 --run 'stock-img convert -f raw -O qcow2 $uri out.qcow2 && \
         stock-img compare -f raw -F qcow2 $uri disk.qcow2 -U && stock-img info $uri' && \
         lacuna serve -f qcow2 copy.qcow2 --run 'stock-img convert -n -f qcow2 -O raw out.qcow2 $uri && \
         stock-img bench -q -f raw -w -c 100 -d 8 -s 4096 $uri >&2'; \
         stock-img check -q copy.qcow2; echo checked with $?",
    );
    assert!(got.text.contains("Images are identical."), "{}", got.text);
    assert!(got.text.contains("checked with 0"), "{}", got.text);
}

/// CVE-2015-0847: what a handler of signals does may not meet what it interrupts.
#[test]
fn signals_in_the_middle_of_everything_end_it_well() {
    let sandbox = prepared();
    for signal in ["TERM", "INT", "HUP"] {
        let got = sandbox.run(&format!(
            "rm -f s; lacuna serve -t -k $PWD/s -f qcow2 disk.qcow2 >&2 & server=$!; \
             awaited s; \
             for n in 1 2 3; do stock-img bench -f raw -w -c 100000 -d 16 -s 4096 'nbd+unix:///?socket=s' >&2 & done; \
             while ! [ $(stat -c %s disk.qcow2) -gt 1000000 ]; do sleep 0.01; done; \
             for n in $(seq 20); do kill -{signal} $server 2>/dev/null; done; \
             wait $server; echo ended with $?; stock-img check -q disk.qcow2; echo checked with $?; wait"
        ));
        assert!(got.text.contains("ended with 0"), "{signal}: {}", got.text);
        assert!(got.text.contains("checked with 0"), "{signal}: {}", got.text);
    }
}
