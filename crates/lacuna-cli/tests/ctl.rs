//! A running server that is asked and changed, while clients use it.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{Outcome, Sandbox};
use serde_json::{Value, json};

const IMAGES: &str = "
    set -e
    stock-img create -q -f qcow2 disk.qcow2 64M
    stock-img create -q -f qcow2 other.qcow2 16M
    stock-io -f qcow2 -c 'write -P 5 0 1M' other.qcow2 >&2";

fn prepared() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(IMAGES);
    sandbox
}

/// Runs lines beside a server, and ends it by `stop` if it is there still.
fn served(lines: &str) -> (Sandbox, Outcome) {
    let sandbox = prepared();
    let got = common::served(&sandbox, "a=disk.qcow2", lines);
    (sandbox, got)
}

/// Passes `python` to nbdsh with `ctl(WORDS)` defined, which returns the exit code.
fn nbdsh(python: &str) -> String {
    let ctl = "import os\ndef ctl(words): return os.waitstatus_to_exitcode(os.system('lacuna ctl \
               --control ctl.sock ' + words + ' 2>/dev/null'))\n";
    format!("cat > script.py <<'END'\n{ctl}{python}\nEND\nnbdsh -u \"$a\" -c - < script.py 2>&1\n")
}

fn clean(sandbox: &Sandbox, image: &str) {
    let got = sandbox.run(&format!("stock-img check {image}"));
    assert_eq!(got.code, Some(0), "{image}: {}", got.text);
}

#[test]
fn exports_come_and_go_while_a_client_is_busy() {
    let (sandbox, got) = served(
        "fio --name=v --ioengine=nbd --uri=\"$a\" --rw=randwrite --bs=16k --size=32M --iodepth=16 \
             --verify=crc32c --randseed=1 >fio.log 2>&1 & fio=$!
         for round in 1 2 3 4 5; do
             ctl add b other.qcow2 -f qcow2 || exit 1
             nbdcopy \"$b\" copy.raw && ctl remove b || exit 1
             cmp -n 1048576 copy.raw <(head -c 1M /dev/zero | tr '\\0' '\\5') || exit 1
         done
         wait $fio; echo fio ended with $?
         ctl list; ctl statistics --output=json > statistics.json",
    );
    assert!(got.text.contains("fio ended with 0\n"), "{}", got.text);
    assert!(got.text.contains("server ended with 0\n"), "{}", got.text);
    assert!(got.text.contains("'a'   67108864  read-write  0\n"), "{}", got.text);
    assert!(!got.text.contains("'b'   16777216"), "{}", got.text.replace("'b': ", ""));
    let statistics: Value = serde_json::from_slice(&sandbox.bytes("statistics.json")).unwrap();
    let (total, of_a) = (&statistics["total"], &statistics["exports"][0]);
    assert!(of_a["written_bytes"].as_u64().unwrap() >= 32 << 20, "{statistics}");
    // What was read through b counts, though it is gone.
    let more = total["read_bytes"].as_u64().unwrap() - of_a["read_bytes"].as_u64().unwrap();
    assert!(more >= 5 << 20, "{statistics}");
    clean(&sandbox, "disk.qcow2");
    clean(&sandbox, "other.qcow2");
}

#[test]
fn a_disk_gets_another_size_under_a_client_that_writes() {
    let (sandbox, got) = served(&nbdsh(
        "h.set_strict_mode(0)
h.pwrite(b'x' * 4096, 0)
try: h.pwrite(b'y' * 4096, 64 << 20); print('too early')
except nbd.Error as error: print(error.errno)
print(ctl('resize a 65M'))
h.pwrite(b'y' * 4096, 64 << 20)
print(h.pread(2, 64 << 20))
print(ctl('resize a 64M'), ctl('resize a 64M --shrink'))
try: h.pread(4096, 64 << 20); print('too late')
except nbd.Error as error: print(error.errno)
h.shutdown()",
    ));
    let expected = "ENOSPC\n67108864\n0\nbytearray(b'yy')\n1 0\nEINVAL\n";
    let told = got.text.replace("68157440 bytes, before 67108864\n", "67108864\n");
    let told = told.replace("67108864 bytes, before 68157440\n", "");
    assert!(told.starts_with(expected), "{}", got.text);
    assert!(sandbox.run("stock-img info disk.qcow2").text.contains("(67108864 bytes)"));
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn a_soft_removal_waits_for_clients_and_lets_no_other_in() {
    let (sandbox, got) = served(
        &nbdsh(
            "print(ctl('remove a --timeout 0'))
h.pwrite(b'x' * 4096, 0)
try: nbd.NBD().connect_uri(os.environ['A']); print('let in')
except nbd.Error: print('refused')
print(ctl('flush a'))
h.shutdown()",
        )
        .replace("nbdsh -u", "export A=\"$a\"; nbdsh -u")
        .replace(
            "script.py 2>&1\n",
            // The image is free when the client has left: its lock says so.
            "script.py 2>&1\n\
             free() { stock-io -c 'read -P 0x78 0 4k' disk.qcow2 >/dev/null 2>&1; }\n\
             for ((i = 0; i < 2000; i++)); do free && break; sleep 0.01; done; free; ctl list\n",
        ),
    );
    assert!(got.text.starts_with("1\nrefused\n1\nNAME  SIZE  ACCESS  CLIENTS\n"), "{}", got.text);
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn a_hard_removal_ends_connections_after_what_is_in_flight() {
    let (sandbox, got) = served(&nbdsh(
        "buffers = [nbd.Buffer.from_bytearray(bytearray([n + 1] * 65536)) for n in range(32)]
cookies = [h.aio_pwrite(buffer, n << 16) for n, buffer in enumerate(buffers)]
while h.aio_in_flight() > 16: h.poll(-1)
print(ctl('remove a --hard'))
told = 0
for n, cookie in enumerate(cookies):
    try:
        while not h.aio_command_completed(cookie): h.poll(-1)
        told |= 1 << n
    except nbd.Error: pass
open('told', 'w').write(str(told))
try: h.pread(512, 0); print('still there')
except nbd.Error: print('gone')",
    ));
    assert!(got.text.starts_with("0\ngone\n"), "{}", got.text);
    let told: u64 = String::from_utf8(sandbox.bytes("told")).unwrap().parse().unwrap();
    assert!(told.count_ones() >= 16, "{told:x}");
    for n in (0..32).filter(|n| told >> n & 1 == 1) {
        let line = format!("stock-io -c 'read -P {} {}k 64k' disk.qcow2", n + 1, n * 64);
        let got = sandbox.run(&line);
        assert!(!got.text.contains("failed"), "what was acknowledged is there: {}", got.text);
    }
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn a_stop_keeps_what_was_acknowledged() {
    let (sandbox, got) = served(&nbdsh(
        "h.pwrite(b'z' * 65536, 1 << 20)
print(ctl('stop'))",
    ));
    assert!(got.text.starts_with("0\n"), "{}", got.text);
    assert!(got.text.ends_with("server ended with 0\n"), "{}", got.text);
    let got = sandbox.run("stock-io -c 'read -P 0x7a 1M 64k' disk.qcow2; ls nbd.sock ctl.sock");
    assert!(!got.text.contains("failed"), "{}", got.text);
    assert_eq!(got.text.matches("No such file").count(), 2, "{}", got.text);
    clean(&sandbox, "disk.qcow2");
}

#[test]
fn connections_are_described() {
    let (_, got) = served(&nbdsh(
        "import json, subprocess
h.pwrite(b'x' * 65536, 0)
h.pread(4096, 0)
words = ['lacuna', 'ctl', '--control', 'ctl.sock', 'connections', '--output=json']
one, = json.loads(subprocess.check_output(words))['connections']
print(one['peer'], one['export'], one['tls'], one['requests'], one['in_flight'])
print(one['received_bytes'] > 65536, one['sent_bytes'] > 4096, one['since'] > 1e9)
h.shutdown()",
    ));
    assert!(got.text.starts_with("unix a False 2 0\nTrue True True\n"), "{}", got.text);
}

/// A client that speaks the protocol itself.
struct Talk {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Talk {
    fn to(sandbox: &Sandbox) -> Self {
        let socket = UnixStream::connect(sandbox.path("ctl.sock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let lines = BufReader::new(socket.try_clone().unwrap());
        Self { socket, lines }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn ask(&mut self, line: &str) -> Value {
        self.socket.write_all(format!("{line}\n").as_bytes()).unwrap();
        self.line()
    }
}

/// Starts a server that ends with the sandbox's `stop`.
fn started(sandbox: &Sandbox) {
    sandbox.prepare(
        "lacuna serve -t -k nbd.sock --control ctl.sock -f qcow2 a=disk.qcow2 >where 2>log & \
         while ! [ -s where ]; do sleep 0.01; done",
    );
}

fn stop(sandbox: &Sandbox) {
    let got = sandbox.run("lacuna ctl --control ctl.sock stop");
    assert_eq!((got.code, &*got.text), (Some(0), ""));
    assert_eq!(sandbox.run("stock-img check -q disk.qcow2").code, Some(0));
}

#[test]
fn the_protocol_is_the_one_that_is_written_down() {
    let sandbox = prepared();
    started(&sandbox);
    let mode = std::fs::metadata(sandbox.path("ctl.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut talk = Talk::to(&sandbox);
    let greeting = talk.line();
    assert_eq!(greeting["control"], 1);
    assert!(greeting["commands"].as_array().unwrap().contains(&json!("statistics")));
    let answer = talk.ask(r#"{"id": "x1", "command": "list"}"#);
    assert_eq!(answer["id"], "x1");
    assert_eq!(answer["result"]["exports"][0]["name"], "a");
    let size = json!({"id": 2, "command": "resize", "arguments": {"size": 68157440}});
    let answer = talk.ask(&size.to_string());
    let expected = json!({"export": "a", "size": 68157440, "size_before": 67108864});
    assert_eq!(answer, json!({"id": 2, "result": expected}));
    for (request, class, word) in [
        ("{\"command\": \"lis\"}", "invalid_request", "no command 'lis'"),
        ("[]", "invalid_request", "an object"),
        ("nonsense", "invalid_request", "line 1 column"),
        ("{\"command\": \"list\", \"x\": 1}", "invalid_request", "no member 'x'"),
        ("{\"id\": 5}", "invalid_request", "'command' is missing"),
        ("{\"command\": 7}", "invalid_request", "should be a text"),
        ("{\"command\": \"flush\", \"arguments\": {\"export\": \"q\"}}", "not_found", "'q'"),
        (
            "{\"command\": \"resize\", \"arguments\": {\"size\": -1}}",
            "invalid_request",
            "from 0 to 2^63 - 1",
        ),
        (
            "{\"command\": \"add\", \"arguments\": {\"name\": \"n\", \"file\": \"/none\"}}",
            "not_found",
            "/none",
        ),
        (
            "{\"command\": \"add\", \"arguments\": {\"name\": \"n\", \"file\": \"/none\", \
             \"options\": {\"run\": \"x\"}}}",
            "invalid_request",
            "no member 'run'",
        ),
    ] {
        let answer = talk.ask(request);
        assert_eq!(answer["error"]["error"], class, "{request}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(word), "{request}: {answer}");
    }
    drop(talk);
    stop(&sandbox);
}

#[test]
fn clients_that_mean_harm_end_their_own_session_only() {
    let sandbox = prepared();
    started(&sandbox);
    // One that says nothing, and one that stops in the middle of a line, stay connected all along.
    let _silent = Talk::to(&sandbox);
    let mut half = Talk::to(&sandbox);
    half.socket.write_all(b"{\"command\": \"sto").unwrap();
    let mut deep = Talk::to(&sandbox);
    deep.line();
    let answer = deep.ask(&"[".repeat(60_000));
    assert_eq!(answer["error"]["error"], "invalid_request");
    assert_eq!(deep.ask("\u{0}\u{1}")["error"]["error"], "invalid_request");
    let mut long = Talk::to(&sandbox);
    long.line();
    // It may be hung up on before all is out.
    drop(long.socket.write_all(&vec![b'x'; 1 << 20]));
    let mut told = String::new();
    drop(long.lines.read_to_string(&mut told));
    assert!(told.is_empty() || told.contains("at most 65536 bytes"), "{told}");
    let mut gone = Talk::to(&sandbox);
    gone.line();
    gone.socket.write_all(b"{\"id\": 1, \"command\": \"list\"}\n{\"id\": 2, \"comm").unwrap();
    drop(gone);
    // Many at once: those that are too many are told so.
    let mut many: Vec<Talk> = (0..40).map(|_| Talk::to(&sandbox)).collect();
    let refused = many.iter_mut().map(Talk::line).filter(|line| line["error"]["error"] == "busy");
    assert!(refused.count() >= 20);
    drop(many);
    let mut last = (0..)
        .map(|_| Talk::to(&sandbox))
        .find_map(|mut talk| talk.line().get("control").is_some().then_some(talk));
    let answer = last.as_mut().unwrap().ask("{\"id\": 3, \"command\": \"list\"}");
    assert_eq!(answer["result"]["exports"][0]["name"], "a");
    drop(last);
    stop(&sandbox);
}

#[test]
fn a_socket_file_of_a_server_that_is_gone_is_replaced_and_a_live_one_is_not() {
    let sandbox = prepared();
    let got = sandbox.run(
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"ctl.sock\")'; \
         lacuna serve --control ctl.sock -f qcow2 disk.qcow2 --run \
         'lacuna ctl --control ctl.sock list; lacuna ctl --control ctl.sock stop; \
          lacuna serve --control ctl.sock -f qcow2 other.qcow2 --run true; echo $?'; ls ctl.sock; \
         echo text > file; lacuna serve --control file -f qcow2 disk.qcow2 --run true; cat file",
    );
    let expected = "NAME  SIZE      ACCESS      CLIENTS\n''    67108864  read-write  0\n\
                    lacuna: The server ends with the command of --run, not before\n\
                    lacuna: Listening for control on ctl.sock: Address already in use\n1\n\
                    ls: cannot access 'ctl.sock': No such file or directory\n\
                    lacuna: Listening for control on file: Address already in use\ntext\n";
    assert_eq!(got.text, expected);
}

#[test]
fn command_lines_that_are_wrong_say_what_would_be_right() {
    let sandbox = prepared();
    for (line, expected) in [
        ("lacuna ctl", "statistics            count"),
        ("lacuna ctl list", "--control says which server is meant"),
        ("lacuna ctl --control none list", "Connecting to none: No such file or directory"),
        ("lacuna ctl --control x lisst", "list is the nearest"),
        ("lacuna ctl --control x flush --hard", "--hard is no option of `ctl flush [EXPORT]`"),
        ("lacuna ctl --control x list a", "Unexpected argument: a"),
        ("lacuna ctl --control x resize a", "Invalid size 'a'"),
        ("lacuna ctl --control x add a", "Expecting the name of an export"),
    ] {
        let got = sandbox.run(line);
        assert_eq!(got.code, Some(1), "{line}: {}", got.text);
        assert!(got.text.contains(expected), "{line}: {}", got.text);
    }
}
