//! Disks are kept as they were at one moment and copied, while guests go on writing them.

mod common;

use common::{Outcome, Sandbox};

const IMAGES: &str = "
    set -e
    stock-img create -q -f qcow2 disk.qcow2 64M
    stock-io -f qcow2 -c 'write -P 7 0 24M' disk.qcow2 >&2
    stock-img bitmap --add disk.qcow2 daily
    stock-img bitmap --add --disable disk.qcow2 off
    stock-img create -q -f raw flat.raw 1M";

fn prepared() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(IMAGES);
    sandbox.prepare(&format!("cat > common.py <<'END'\n{COMMON}\nEND"));
    sandbox
}

/// For scripts of nbdsh, beside a server.
const COMMON: &str = r#"
import json, os, subprocess, time
def ctl(words):
    run = subprocess.run('lacuna ctl --control ctl.sock --output=json ' + words, shell=True, capture_output=True)
    return run.returncode, json.loads(run.stdout or b'null'), run.stderr.decode().strip()
def uri(export): return 'nbd+unix:///' + export + '?socket=' + os.getcwd() + '/nbd.sock'
def connected(export, *contexts):
    h = nbd.NBD()
    for context in contexts: h.add_meta_context(context)
    h.connect_uri(uri(export))
    assert all(h.can_meta_context(context) for context in contexts)
    return h
def ranges(h, context):
    # Where a context has other flags than none.
    at, size, found = 0, h.get_size(), []
    while at < size:
        told = []
        h.block_status(min(size - at, 1 << 30), at, lambda name, offset, entries, err: told.extend(entries) if name == context else None)
        for length, flags in zip(told[::2], told[1::2]):
            if flags: found.append((at, min(length, size - at)))
            at += length
    return found
def whole(h):
    return b''.join(h.pread(min(1 << 20, h.get_size() - at), at) for at in range(0, h.get_size(), 1 << 20))
"#;

/// Runs a script of nbdsh that has [`COMMON`].
fn nbdsh(name: &str, python: &str) -> String {
    format!(
        "cat > {name}.py <<'END'\nexec(open('common.py').read())\n{python}\nEND
         nbdsh -c - < {name}.py > {name}.log 2>&1"
    )
}

fn served(sandbox: &Sandbox, exports: &str, lines: &str) -> Outcome {
    common::served(sandbox, exports, lines)
}

fn clean(sandbox: &Sandbox, image: &str) {
    let got = sandbox.run(&format!("stock-img check {image}"));
    assert_eq!(got.code, Some(0), "{image}: {}", got.text);
}

/// Full, then incremental copies, some of which fail, each compared with a whole copy of its point.
/// A guest writes numbers in turn, so that a point which is of no single moment would show.
#[test]
fn copies_made_by_points_and_bitmaps_are_of_one_moment_and_miss_nothing() {
    let sandbox = prepared();
    sandbox.prepare("stock-io -f qcow2 -c 'write -z 0 1M' disk.qcow2 >&2");
    let guest = nbdsh(
        "guest",
        "import random
h = connected('a')
h.set_strict_mode(0)
random.seed(1)
number = 0
while not os.path.exists('over'):
    number += 1
    h.pwrite(number.to_bytes(8, 'big') * 64, (number % 256) << 12)
    at = random.randrange(1 << 20, 60 << 20)
    kind = random.randrange(6)
    if kind == 0: h.zero(random.randrange(1, 200000), at)
    elif kind == 1: h.trim(random.randrange(1, 200000), at)
    else: h.pwrite(bytes([random.randrange(256)]) * random.randrange(1, 50000), at)
print('wrote', number)",
    );
    let copies = nbdsh(
        "copies",
        "def moment(h):
    numbers = [int.from_bytes(h.pread(8, block << 12), 'big') for block in range(256)]
    last = max(numbers)
    for block, number in enumerate(numbers):
        # Before the guest came there were zeros.
        assert number == max(0, last - (last - block) % 256), (block, number, last)
    return last
backup, before = None, 0
live = connected('a')
for turn in range(9):
    # The guest has written since, however busy the machine is.
    while max(int.from_bytes(live.pread(8, block << 12), 'big') for block in range(256)) <= before:
        time.sleep(0.01)
    first = turn == 0
    words = '--new-bitmap kept' if first else '--bitmap kept'
    code, told, error = ctl(f'point a --add p{turn} {words} --directory .')
    assert code == 0, error
    h = connected(told['point_export'], *([] if first else ['qemu:dirty-bitmap:kept']))
    assert h.is_read_only() and h.get_size() == 64 << 20
    now = moment(h)
    assert now > before
    before = now
    copied = bytearray(backup or b'')
    if first: copied = bytearray(whole(h))
    else:
        for at, length in ranges(h, 'qemu:dirty-bitmap:kept'):
            while length:
                part = min(length, 1 << 20)
                copied[at:at + part] = h.pread(part, at)
                at, length = at + part, length - part
    right = whole(h)
    assert copied == right, f'turn {turn}'
    assert moment(h) == now
    if turn % 3 == 2:
        assert ctl(f'point a --remove p{turn}')[0] == 0
    else:
        backup = copied
        assert ctl(f'point a --remove p{turn} --done')[0] == 0
print('copied')",
    );
    let got = served(
        &sandbox,
        "a=disk.qcow2",
        &format!(
            "({guest}) & guest=$!
             {copies}; echo copies ended with $?; touch over; wait $guest
             cat copies.log guest.log; ctl point | wc -l"
        ),
    );
    assert!(got.text.contains("copies ended with 0\n"), "{}", got.text);
    assert!(got.text.contains("copied\n") && got.text.contains("wrote "), "{}", got.text);
    assert!(got.text.contains("server ended with 0\n"), "{}", got.text);
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn what_fio_verifies_is_untouched_and_status_tells_zeros_as_they_were() {
    let sandbox = prepared();
    let got = served(
        &sandbox,
        "a=disk.qcow2",
        "stock-img convert -f raw -O raw \"$a\" before.raw
         ctl point a --add now || exit 1; p=nbd+unix:///a@now?socket=$PWD/nbd.sock
         fio --name=v --ioengine=nbd --uri=\"$a\" --rw=randwrite --bs=4k --size=48M --iodepth=16 \
             --io_size=24M --verify=crc32c --randseed=1 >fio.log 2>&1; echo fio ended with $?
         stock-io -f raw -c 'discard 20M 8M' -c 'write -P 3 40M 1M' \"$a\" >&2
         nbdinfo --map \"$p\" | awk '{ print $1, $2, $3 }'
         stock-img compare -f raw -F raw \"$p\" before.raw
         nbdcopy \"$p\" copy.raw; cmp copy.raw before.raw && stock-img map -f raw copy.raw | tail -1
         ctl point --output=json > points.json",
    );
    // The whole tail was zeros at that moment, whatever was written there since.
    let map = "0 25165824 0\n25165824 41943040 3\n";
    assert!(got.text.contains("fio ended with 0\n"), "{}", got.text);
    assert!(got.text.contains(map), "{}", got.text);
    assert!(got.text.contains("Images are identical.\n"), "{}", got.text);
    let points: serde_json::Value = serde_json::from_slice(&sandbox.bytes("points.json")).unwrap();
    let saved = points["points"][0]["saved_bytes"].as_u64().unwrap();
    // Of 24 MiB of data, and nothing else.
    assert!((1 << 20..=24 << 20).contains(&saved), "{points}");
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn sizes_change_under_a_point_and_it_keeps_its_own() {
    let sandbox = prepared();
    let got = served(
        &sandbox,
        "a=disk.qcow2",
        "stock-img convert -f raw -O raw \"$a\" before.raw
         ctl point a --add now --bitmap daily || exit 1; p=nbd+unix:///a@now?socket=$PWD/nbd.sock
         ctl resize a 1M --shrink; ctl resize a 80M
         stock-io -f raw -c 'write -P 3 2M 70M' \"$a\" >&2
         stock-img compare -f raw -F raw \"$p\" before.raw
         ctl resize a@now 1M; echo resizing ended with $?
         ctl point a --remove now --done
         nbdinfo --map=qemu:dirty-bitmap:daily --totals \"$a\"",
    );
    // What was added counts as changed.
    let lines =
        ["Images are identical.\n", "resizing ended with 1\n", " 1048576   1.2%   0 clean\n"];
    for line in lines {
        assert!(got.text.contains(line), "{line}: {}", got.text);
    }
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn a_point_that_is_full_breaks_or_has_guests_wait() {
    let sandbox = prepared();
    let script = nbdsh(
        "full",
        "a = connected('a')
assert ctl('point a --add small --space 64k')[0] == 0
small = connected('a@small')
a.pwrite(b'x' * 65536, 0)
assert small.pread(4, 0) == b'\\7' * 4
a.pwrite(b'x' * 65536, 65536)
try: small.pread(4, 0); print('it reads')
except nbd.Error as error: print(error.errno)
point, = ctl('point a')[1]['points']
print(point['state'], point['error']['error'])
code, _, error = ctl('point a --remove small --done')
print(code, error.split('\\n')[0])
assert ctl('point a --remove small')[0] == 0
assert ctl('point a --add patient --space 64k --when-full wait')[0] == 0
cookie = a.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b'y' * 131072)), 1 << 20)
def waiting(): return ctl('point a')[1]['points'][0]['waiting']
while waiting() == 0: a.poll(0)
print('waits', a.aio_command_completed(cookie))
# Others go on, a second point too.
assert ctl('point a --add other')[0] == 0
other = connected('a')
other.pwrite(b'z' * 512, 40 << 20)
patient = connected('a@patient')
assert patient.pread(4, 1 << 20) == b'\\7' * 4
assert ctl('point a --change patient --space 1M')[0] == 0
while not a.aio_command_completed(cookie): a.poll(-1)
print('went on', patient.pread(4, 1 << 20) == b'\\7' * 4, other.pread(2, 1 << 20))
cookie = a.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b'y' * (2 << 20))), 2 << 20)
while waiting() == 0: a.poll(0)
assert ctl('point a --remove patient')[0] == 0
while not a.aio_command_completed(cookie): a.poll(-1)
print('went on')",
    );
    let got = served(&sandbox, "a=disk.qcow2", &format!("{script}; cat full.log"));
    let expected = "EIO\nbroken no_space\n1 lacuna: Point small broke, so that what it was for is not \
                    done: Saving what a point is to keep: The point may take 65536 bytes, and no more\n\
                    waits False\nwent on True bytearray(b'yy')\nwent on\n";
    assert!(got.text.starts_with(expected), "{}", got.text);
    assert!(got.text.contains("server ended with 0\n"), "{}", got.text);
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn bitmaps_go_on_as_the_end_of_a_point_says() {
    let dirty = |name: &str| {
        format!("lacuna bitmap --dump disk.qcow2 {name} | tail -n +2 | tr '\\n' ' '; echo")
    };
    let write = |at: &str| format!("stock-io -f raw -c 'write -P 1 {at} 64k' \"$a\" >&2; ");
    let around = |end: &str| {
        let (before, after) = (write("1M"), write("2M"));
        format!("{before} ctl point a --add p --bitmap daily --new-bitmap n >&2; {after} {end}")
    };
    let cases = [
        ("ctl point a --remove p --done >&2", "0x200000 0x10000 \n", Some("0x200000 0x10000 \n")),
        ("ctl point a --remove p >&2", "0x100000 0x10000 0x200000 0x10000 \n", None),
        // The end of the server gives up.
        ("ctl stop", "0x100000 0x10000 0x200000 0x10000 \n", None),
    ];
    for (end, daily, new) in cases {
        let sandbox = prepared();
        let got = served(&sandbox, "a=disk.qcow2", &around(end));
        assert!(got.text.ends_with("server ended with 0\n"), "{end}: {}", got.text);
        let tidy = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let got = sandbox.run(&dirty("daily"));
        assert_eq!(tidy(&got.text), tidy(daily), "{end}");
        let got = sandbox.run("lacuna bitmap --dump disk.qcow2 n | tail -n +2");
        match new {
            Some(new) => assert_eq!(tidy(&got.text), tidy(new), "{end}"),
            None => assert!(got.text.contains("no bitmap 'n'"), "{end}: {}", got.text),
        }
        clean(&sandbox, "disk.qcow2");
    }
}

/// After a kill the bitmap names all that differs from before it was made, and nothing is left behind.
#[test]
fn a_server_killed_with_a_point_leaves_bitmaps_that_miss_nothing() {
    for after in ["0.05", "0.3"] {
        let sandbox = prepared();
        sandbox.prepare("mkdir scratch; stock-img convert -O raw disk.qcow2 before.raw");
        let guest = nbdsh(
            "guest",
            "import random
h = connected('a')
while True: h.pwrite(bytes([random.randrange(256)]) * 5000, random.randrange(0, 60 << 20))",
        );
        let serving = common::serving("a=disk.qcow2");
        let got = sandbox.run(&format!(
            "{serving} ({guest}) & sleep 0.2
             ctl point a --add p --bitmap daily --new-bitmap n --directory scratch || exit 1
             sleep {after}; ctl point a --add q --bitmap daily; echo another ended with $?
             kill -9 $server; wait $server 2>/dev/null; ls -A scratch
             rm -f nbd.sock ctl.sock
             stock-img check -q disk.qcow2 || [ $? = 3 ] || exit 1
             lacuna convert -O raw disk.qcow2 after.raw
             for name in daily n; do lacuna bitmap --dump disk.qcow2 $name --output=json > $name.json || exit 1; done"
        ));
        assert_eq!(got.code, Some(0), "{}", got.text);
        assert!(got.text.ends_with("another ended with 1\n"), "{}", got.text);
        let (before, now) = (sandbox.bytes("before.raw"), sandbox.bytes("after.raw"));
        let named: serde_json::Value =
            serde_json::from_slice(&sandbox.bytes("daily.json")).unwrap();
        let number = |range: &serde_json::Value, member: &str| {
            usize::try_from(range[member].as_u64().unwrap()).unwrap()
        };
        let mut left = before;
        for range in named.as_array().unwrap() {
            let (start, len) = (number(range, "start"), number(range, "length"));
            left[start..start + len].copy_from_slice(&now[start..start + len]);
        }
        assert!(left == now, "a change is missed");
    }
}

#[test]
fn an_export_that_is_alone_goes_without_a_name_beside_its_points() {
    let sandbox = prepared();
    let got = served(
        &sandbox,
        "disk.qcow2",
        "ctl point --add one; ctl point --add two
         nbdinfo --size nbd+unix:///?socket=$PWD/nbd.sock
         nbdinfo --size nbd+unix:///@two?socket=$PWD/nbd.sock
         nbdinfo --can multi-conn nbd+unix:///@two?socket=$PWD/nbd.sock && echo many
         ctl list; ctl remove --timeout 0; ctl point --remove one; ctl point --remove two
         ctl remove && ctl list",
    );
    let expected = "'@one': 67108864 bytes\n'@two': 67108864 bytes\n67108864\n67108864\nmany\n\
                    NAME    SIZE      ACCESS      CLIENTS\n\
                    ''      67108864  read-write  0\n\
                    '@one'  67108864  read-only   0\n\
                    '@two'  67108864  read-only   0\n\
                    lacuna: Export '' has point one, which needs its disk\n\
                    hint: `lacuna ctl point --remove` takes it away\n\
                    NAME  SIZE  ACCESS  CLIENTS\nserver ended with 0\n";
    assert_eq!(got.text, expected);
}

#[test]
fn what_cannot_be_is_said_and_leaves_nothing() {
    let sandbox = prepared();
    let script = nbdsh(
        "errors",
        r#"import socket
control = socket.socket(socket.AF_UNIX)
control.connect('ctl.sock')
lines = control.makefile('rw')
lines.readline()
def ask(**arguments):
    lines.write(json.dumps({'command': 'point', 'arguments': arguments}) + '\n')
    lines.flush()
    answer = json.loads(lines.readline())
    error = answer.get('error')
    print(error['error'] + ': ' + error['message'] if error else 'done')
ask(export='a', add='p', bitmaps=['none'])
ask(export='a', add='p', bitmaps=['off'])
ask(export='a', add='p', new_bitmaps=['daily'])
ask(export='a', add='p', new_bitmaps=['new'], granularity=1000)
ask(export='a', add='p', bitmaps=['daily', 'daily'])
ask(export='a', add='p', bitmaps='daily')
ask(export='b', add='p', bitmaps=['daily'])
ask(export='b', add='p')
ask(export='c', add='p')
ask(add='p')
ask(export='a', add='a b')
ask(export='a', add='')
ask(export='a', add='p', directory='.')
ask(export='a', add='p', directory='/none')
ask(export='a', add='p', when_full='later')
ask(export='a', add='p', done=True)
ask(export='a', add='p', remove='q')
ask(export='a', add='p', bitmaps=['daily'])
ask(export='a', add='p')
ask(export='a', add='q', bitmaps=['daily'])
ask(export='a@p', add='q')
ask(export='a', remove='q')
ask(export='a', change='p')
ask(export='a', remove='p', done=True)
ask(export='b', remove='p', done=True)
print(len(ctl('point')[1]['points']))"#,
    );
    let got = served(
        &sandbox,
        "a=disk.qcow2",
        &format!(
            "ctl add b flat.raw -f raw >&2; {script}; cat errors.log; stock-img info -U disk.qcow2 | grep -c 'name: new'"
        ),
    );
    let expected = "\
'b': 1048576 bytes
not_found: The image has no bitmap 'none'
invalid_request: Bitmap 'off' is disabled: it does not record what changes
invalid_request: Bitmap already exists: daily
invalid_request: Granularity is 1000 bytes; a power of two from 512 to 2147483648 would be right
invalid_request: Bitmap 'daily' is named twice
invalid_request: The member 'bitmaps' should be a list of texts
unsupported: Only the bitmaps of a qcow2 image can be frozen or made
done
not_found: There is no export 'c'
invalid_request: There are 2 exports; the command needs the name of one
invalid_request: The name of a point has 1 to 64 of letters, digits, '-', '_' and '.'
invalid_request: The name of a point has 1 to 64 of letters, digits, '-', '_' and '.'
invalid_request: The member 'directory' is an absolute path
not_found: Asking what is free in /none: No such file or directory
invalid_request: The member 'when_full' is break or wait
invalid_request: There is no member 'done' here; there are: export, add, bitmaps, new_bitmaps, granularity, directory, space, when_full
invalid_request: One of 'add', 'change' and 'remove' is enough
done
invalid_request: There is an export 'a@p' already
busy: Bitmap 'daily' is frozen already
invalid_request: Export 'a@p' is a point in time
not_found: Export 'a' has no point 'q'
invalid_request: The member 'space' is missing
done
done
0
0
server ended with 0
";
    assert_eq!(got.text, expected);
    clean(&sandbox, "disk.qcow2");
}
