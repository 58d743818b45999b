//! The name `qemu-nbd`, beside the stock program.

mod common;

use common::{Sandbox, both_in};

const IMAGES: &str = "
    set -e
    stock-img create -q -f qcow2 disk.qcow2 4M
    stock-io -f qcow2 -c 'write -P 5 1M 64k' disk.qcow2 >&2
    cp disk.qcow2 plain.qcow2
    stock-img snapshot -c s1 disk.qcow2
    stock-img bitmap --add disk.qcow2 b0
    stock-img create -q -f raw disk.raw 1M
    stock-img create -q -f raw odd.raw 1000";

/// `served OPTIONS -- COMMAND` serves while a command runs that uses the export, which ends the
/// server; after `ended OPTIONS -- COMMAND` a signal does. `$uri` is where.
///
/// Not both at once: the stock server hangs when a signal comes while it ends.
const SERVED: &str = "
    start() {
        words=(); while [ \"$1\" != -- ]; do words+=(\"$1\"); shift; done; command=$2
        rm -f s; qemu-nbd -k $PWD/s \"${words[@]}\" & server=$!
        while ! listens s && kill -0 $server 2>/dev/null; do sleep 0.01; done
        uri=nbd+unix:///?socket=$PWD/s; eval \"$command\"
    }
    served() { start \"$@\"; wait $server; echo server ended with $?; }
    ended() { start \"$@\"; kill $server; wait $server; echo server ended with $?; };";

fn prepared() -> (Sandbox, Sandbox) {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    stock.prepare(IMAGES);
    ours.prepare(IMAGES);
    (stock, ours)
}

/// As `both_in`, with the shell function `served` in each line.
fn both_served(script: &str) {
    let (stock, ours) = prepared();
    let mut differences = String::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let line = format!("{SERVED} {line}");
        let (expected, got) = (stock.run(&line), ours.run(&line));
        let here = |sandbox: &Sandbox, text: &str| {
            text.replace(&*sandbox.path("").to_string_lossy(), "HERE/")
        };
        let (expected_text, text) = (here(&stock, &expected.text), here(&ours, &got.text));
        if (expected.code, &expected_text) != (got.code, &text) {
            differences += &format!("$ {line}\n--- stock\n{expected_text}--- ours\n{text}\n");
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn command_lines_that_are_wrong_are_refused_in_its_words() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        "
        qemu-nbd
        qemu-nbd a b
        qemu-nbd --bogus
        qemu-nbd -Z disk.raw
        qemu-nbd -p
        qemu-nbd --port
        qemu-nbd --sn
        qemu-nbd --tls disk.raw
        qemu-nbd --s disk.raw
        qemu-nbd --d disk.raw
        qemu-nbd --p disk.raw
        qemu-nbd --help=3
        qemu-nbd -k rel disk.raw
        qemu-nbd -o x disk.raw
        qemu-nbd -o 1k disk.raw
        qemu-nbd -e x disk.raw
        qemu-nbd -e -1 disk.raw
        qemu-nbd -e 99999999999 disk.raw
        qemu-nbd --handshake-limit=x disk.raw
        qemu-nbd --cache=foo disk.raw
        qemu-nbd -n --cache=none disk.raw
        qemu-nbd --aio=foo disk.raw
        qemu-nbd --aio=native --aio=native disk.raw
        qemu-nbd --aio=native -k $PWD/s disk.qcow2
        qemu-nbd --discard=foo disk.raw
        qemu-nbd --discard=unmap --discard=unmap disk.raw
        qemu-nbd --detect-zeroes=foo disk.raw
        qemu-nbd --detect-zeroes=unmap disk.raw
        qemu-nbd --detect-zeroes=unmap --discard=unmap disk.raw
        qemu-nbd -x $(head -c 4097 /dev/zero | tr '\\0' x) disk.raw
        qemu-nbd -D $(head -c 4097 /dev/zero | tr '\\0' x) disk.raw
        qemu-nbd -k $PWD/s nofile
        qemu-nbd -k $PWD/s -f foo disk.raw
        qemu-nbd -k $PWD/s -f qcow2 disk.raw
        qemu-nbd -k $PWD/s --image-opts -f raw disk.raw
        qemu-nbd -k $PWD/s --image-opts driver=foo
        qemu-nbd -k /nonexistent/s disk.qcow2
        qemu-nbd -b host.invalid. disk.qcow2
        qemu-nbd -b 192.0.2.1 disk.qcow2
        qemu-nbd -p x disk.qcow2
        qemu-nbd -k $PWD/s -B nob disk.qcow2
        qemu-nbd -k $PWD/s -l nosuch disk.qcow2
        qemu-nbd -k $PWD/s -l snapshot.id=1,snapshot.foo=3 disk.qcow2
        qemu-nbd -k $PWD/s -l snapshot.id=1,snapshot.name=s2 disk.qcow2
        qemu-nbd -k $PWD/s -l x -f raw disk.raw
        qemu-nbd -k $PWD/s -s -l s1 disk.qcow2
        qemu-nbd -k $PWD/s -o -1 -f raw disk.raw
        qemu-nbd -d /dev/nbd0
        qemu-nbd -d nosuch
        qemu-nbd --tls-creds=foo disk.qcow2
        qemu-nbd --tls-authz=foo disk.qcow2
        qemu-nbd --tls-hostname=foo disk.qcow2
        qemu-nbd --tls-hostname=foo --tls-creds=f disk.qcow2
        qemu-nbd --tls-authz=foo --tls-creds=f -L
        qemu-nbd --tls-creds=foo -c /dev/nbd0 disk.qcow2
        qemu-nbd --selinux-label=foo disk.qcow2
        qemu-nbd --object foo,id=x disk.qcow2
        qemu-nbd --pid-file=/nonexistent/p -k $PWD/s disk.qcow2
        ",
    );
}

#[test]
fn lists_are_asked_for_in_its_way() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        "
        qemu-nbd -L a
        qemu-nbd -L -x foo
        qemu-nbd -L -D foo
        qemu-nbd -L --fork
        qemu-nbd -L -A
        qemu-nbd -L -f raw
        qemu-nbd -L -o 1
        qemu-nbd -L --cache=none
        qemu-nbd -L -n
        qemu-nbd -L -k /nonexistent/s
        qemu-nbd -L -o 0 -r -e 3 -k /nonexistent/s
        qemu-nbd -L -b 127.0.0.1 -p 1
        nbdkit -U s1 memory 1M --run 'qemu-nbd --list -k $PWD/s1'
        mkdir d; cp disk.raw d/a; cp disk.raw d/b
        nbdkit -U s2 file dir=d --run 'qemu-nbd --list -k $PWD/s2'
        nbdkit -U s3 --no-sr null --run 'qemu-nbd --list -k $PWD/s3'
        nbdkit -U s4 --filter=blocksize-policy memory 1M blocksize-minimum=512 blocksize-preferred=4k blocksize-maximum=1M blocksize-error-policy=error --run 'qemu-nbd --list -k $PWD/s4'
        nbdkit -U s5 --mask-handshake=0 null --run 'qemu-nbd --list -k $PWD/s5 >/dev/null 2>&1; echo $?'
        ",
    );
}

#[test]
fn exports_are_described_as_its_are() {
    both_served(
        "
        ended -f qcow2 disk.qcow2 -- 'qemu-nbd -L -k $PWD/s'
        ended -f qcow2 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -e 0 -f qcow2 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -r -f raw disk.raw -- 'stock-nbd -L -k $PWD/s'
        ended -A -t -D 'some text' -x nm -f qcow2 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -n -f raw disk.raw -- 'stock-nbd -L -k $PWD/s'
        ended -f raw odd.raw -- 'stock-nbd -L -k $PWD/s'
        ended --image-opts driver=qcow2,file.filename=disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -B b0 -A -f qcow2 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -s -f qcow2 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -l s1 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -l snapshot.name=s1 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -o 65536 -f qcow2 disk.qcow2 -- 'stock-nbd -L -k $PWD/s'
        ended -o 0x200 -f raw disk.raw -- 'stock-nbd -L -k $PWD/s'
        ended -x nm -f raw disk.raw -- 'nbdinfo --size \"$uri\" >/dev/null 2>&1 || echo no such export'
        ",
    );
}

#[test]
fn it_serves_one_client_after_the_other_and_ends_with_the_last() {
    both_served(
        "
        served -f raw disk.raw -- 'nbdinfo --size \"$uri\"'
        served -f raw disk.raw -- 'stock-nbd -L -k $PWD/s >/dev/null; nbdinfo --size \"$uri\"'
        ended -t -f raw disk.raw -- 'for i in 1 2 3 4 5; do nbdinfo --size \"$uri\"; done'
        served -f raw disk.raw -- 'nbdsh -u \"$uri\" -c \"import nbd; other = nbd.NBD(); print(other.aio_connect_uri(\\\"$uri\\\"))\" -c \"print(h.pread(4, 0)); h.shutdown()\"'
        ",
    );
}

#[test]
fn what_is_written_trimmed_and_zeroed_leaves_what_its_leaves() {
    let write = "stock-io -f raw -c \"write -P 9 2M 128k\" -c \"discard 1M 64k\" \
                 -c \"write -P 0 3M 64k\" -c \"write -zu 3584k 64k\" \"$uri\"";
    let modes = [
        "",
        "--discard=unmap",
        "--discard=unmap --detect-zeroes=unmap",
        "--detect-zeroes=on",
        "--cache=none",
        "--cache=writethrough",
        "--cache=unsafe --aio=threads",
        "--cache=directsync --aio=native",
        "--aio=io_uring",
    ];
    let mut script = String::new();
    for mode in modes {
        script += &format!(
            "cp plain.qcow2 w.qcow2; served {mode} -f qcow2 w.qcow2 -- '{write}'; \
             stock-img map --output=json w.qcow2; stock-img check w.qcow2\n"
        );
    }
    both_served(&script);
}

#[test]
fn help_and_version_say_which_program_it_is() {
    let (_, ours) = prepared();
    let got = ours.run("qemu-nbd -V");
    assert!(got.text.starts_with("qemu-nbd 10.0.2 (lacuna "), "{}", got.text);
    let got = ours.run("qemu-nbd --help");
    assert!(got.text.starts_with("Usage: qemu-nbd [OPTIONS] FILE\n"), "{}", got.text);
    for option in ["--persistent", "--detect-zeroes", "--pid-file", "--tls-creds"] {
        assert!(got.text.contains(option), "{option}: {}", got.text);
    }
}

#[test]
fn a_process_id_file_says_when_clients_can_come() {
    both_served(
        "
        ended -t --pid-file=pid -f raw disk.raw -- 'while ! [ -s pid ]; do sleep 0.01; done; [ $(cat pid) = $server ] && nbdinfo --size \"$uri\"'
        ",
    );
}
