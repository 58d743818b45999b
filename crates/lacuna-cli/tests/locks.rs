//! Who keeps whom out: QEMU's programs and ours hold images for each other, in every combination.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use common::{Outcome, Sandbox, both};

/// A program that has an image open.
struct Holder {
    child: Child,
    /// Kept open: a program that cannot print ends.
    _output: BufReader<ChildStdout>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Make {
    Stock,
    Ours,
}

impl Holder {
    /// Opens an image, by the words of a command line of `qemu-io`, and returns when that is done.
    fn io(sandbox: &Sandbox, make: Make, words: &str) -> Self {
        let (program, verb) = match make {
            Make::Stock => ("stock-io", None),
            Make::Ours => ("lacuna", Some("io")),
        };
        let mut child = Command::new(sandbox.program(program))
            .args(verb)
            .args(words.split(' '))
            .current_dir(sandbox.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It reads commands when it has opened the image.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let (mut line, mut output) = (String::new(), BufReader::new(child.stdout.take().unwrap()));
        output.read_line(&mut line).unwrap();
        assert!(line.ends_with("MiB\n"), "{make:?} {words}: {line:?}");
        Self { child, _output: output }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the program without giving it a chance to tidy up.
    fn crash(mut self) {
        self.child.kill().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

/// A server that has an image open.
struct Server {
    pid: String,
}

impl Server {
    /// Starts `qemu-nbd`; returns when it serves.
    fn start(sandbox: &Sandbox, words: &str) -> Self {
        let socket = sandbox.path("socket");
        let line = format!(
            "qemu-nbd --fork --persistent --pid-file=pid --socket={} {words}",
            socket.display()
        );
        sandbox.prepare(&line);
        let pid = std::fs::read_to_string(sandbox.path("pid")).unwrap().trim().to_owned();
        Self { pid }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        Command::new("kill").arg(&self.pid).status().unwrap();
    }
}

const IMAGES: &str = "
    stock-img create -q -f qcow2 a.qcow2 1M
    stock-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
    stock-img create -q -f qcow2 -b o.qcow2 -F qcow2 o2.qcow2
    stock-img create -q -f raw r.raw 1M
    stock-img create -q -f qcow2 -b r.raw -F raw or.qcow2
    stock-img create -q -f qcow2 -o data_file=d.raw x.qcow2 1M
    stock-img create -q -f qcow2 -o data_file=d.raw x2.qcow2 1M
    stock-img create -q -f qcow2 n.qcow2 1M
";

const HOLDERS: [&str; 10] = [
    "a.qcow2",
    "-r a.qcow2",
    "-r -U a.qcow2",
    "o.qcow2",
    "-r o.qcow2",
    "-f raw r.raw",
    "-r -f raw r.raw",
    "or.qcow2",
    "x.qcow2",
    "-r x.qcow2",
];

const ACCESSES: [&str; 42] = [
    "qemu-img info a.qcow2",
    "qemu-img info -U a.qcow2",
    "qemu-img info -f raw a.qcow2",
    "qemu-img info --backing-chain o2.qcow2",
    "qemu-img check a.qcow2",
    "qemu-img check -U a.qcow2",
    "qemu-img check -r all a.qcow2",
    "qemu-img check -U -r all a.qcow2",
    "qemu-img map o2.qcow2",
    "qemu-img map -U o2.qcow2",
    "qemu-img compare a.qcow2 n.qcow2",
    "qemu-img compare -U n.qcow2 o.qcow2",
    "qemu-img create -f qcow2 a.qcow2 1M",
    "qemu-img create -f qcow2 -F qcow2 -b a.qcow2 new.qcow2",
    "qemu-img create -f raw -o preallocation=off r.raw 1M",
    "qemu-img convert -O raw a.qcow2 new.raw",
    "qemu-img convert -O raw -f raw r.raw new.raw",
    "qemu-img convert -O qcow2 n.qcow2 a.qcow2",
    "qemu-img convert -n --target-is-zero -O qcow2 n.qcow2 a.qcow2",
    "qemu-img convert -O qcow2 -B a.qcow2 -F qcow2 n.qcow2 new.qcow2",
    "qemu-img resize a.qcow2 1M",
    "qemu-img resize -f raw d.raw 1M",
    "qemu-img dd if=a.qcow2 of=new.raw",
    "qemu-img bench -c 1 o.qcow2 2>&1 | grep -v Run",
    "qemu-img bench -w -c 1 n.qcow2 2>&1 | grep -v Run",
    "qemu-io -c length a.qcow2",
    "qemu-io -U -c length a.qcow2",
    "qemu-io -r -c length a.qcow2",
    "qemu-io -r -U -c length a.qcow2",
    "qemu-io -c length ./o2.qcow2",
    "qemu-io -f raw -c length r.raw",
    "qemu-io -c length or.qcow2",
    "qemu-io -c length x2.qcow2",
    "qemu-io -r -c length x2.qcow2",
    "qemu-io -f raw -c 'truncate 1M' d.raw",
    "qemu-io -c length --image-opts driver=qcow2,file.filename=a.qcow2",
    "qemu-io -c length --image-opts driver=qcow2,file.filename=a.qcow2,file.locking=off",
    "qemu-io -c length --image-opts driver=qcow2,file.filename=a.qcow2,force-share=on",
    "qemu-img map -U --image-opts driver=qcow2,file.filename=a.qcow2,force-share=off",
    "qemu-img map json:'{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}'",
    "qemu-io -r -c 'open -U -o force-share=off a.qcow2' -c 'open -r -o force-share=on a.qcow2' -c length",
    "qemu-io -r -c 'reopen -w' -c length a.qcow2",
];

fn prepared(sandbox: Sandbox) -> Sandbox {
    IMAGES.lines().for_each(|line| sandbox.prepare(line));
    sandbox
}

fn outcomes(sandbox: &Sandbox, make: Make, holder: &str) -> Vec<Outcome> {
    let _holder = Holder::io(sandbox, make, holder);
    ACCESSES.iter().map(|line| sandbox.run(line)).collect()
}

/// Compares what `accesses` of the sandbox say with what is said among QEMU's programs.
fn compare(ours: impl Fn() -> Sandbox, make: Make, holders: &[&str]) {
    let (stock, ours) = (prepared(Sandbox::stock()), prepared(ours()));
    let mut differences = String::new();
    for holder in holders {
        let expected = outcomes(&stock, Make::Stock, holder);
        let got = outcomes(&ours, make, holder);
        for ((line, expected), got) in ACCESSES.iter().zip(expected).zip(got) {
            if expected != got {
                differences += &format!(
                    "held by {make:?} {holder}\n$ {line}\n--- expected, {:?}\n{}--- got, {:?}\n{}\n",
                    expected.code, expected.text, got.code, got.text
                );
            }
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn what_qemu_io_holds_is_refused_to_us_as_to_qemus_programs() {
    compare(Sandbox::ours, Make::Stock, &HOLDERS);
}

#[test]
fn what_we_hold_is_refused_to_qemus_programs_as_among_them() {
    compare(Sandbox::stock, Make::Ours, &HOLDERS);
}

#[test]
fn what_we_hold_is_refused_to_us_as_among_qemus_programs() {
    compare(Sandbox::ours, Make::Ours, &HOLDERS);
}

#[test]
fn servers_of_qemu_keep_us_out_as_they_keep_out_their_own_kind() {
    for words in ["a.qcow2", "--read-only a.qcow2", "-f raw r.raw"] {
        let (stock, ours) = (prepared(Sandbox::stock()), prepared(Sandbox::ours()));
        let outcomes = |sandbox: &Sandbox| {
            let _server = Server::start(sandbox, words);
            ACCESSES.map(|line| sandbox.run(line))
        };
        let (expected, got) = (outcomes(&stock), outcomes(&ours));
        for (line, (expected, got)) in ACCESSES.iter().zip(expected.iter().zip(got)) {
            assert_eq!(*expected, got, "served {words}: {line}");
        }
    }
}

#[test]
fn under_our_name_the_process_in_the_way_is_named() {
    let sandbox = prepared(Sandbox::ours());
    let writer = Holder::io(&sandbox, Make::Stock, "a.qcow2");
    let pid = writer.pid();
    let said = |line: &str| sandbox.run(line).text;
    assert_eq!(
        said("lacuna map o.qcow2"),
        format!(
            "lacuna: Could not open 'o.qcow2': a.qcow2 is in use: stock-io (pid {pid}) writes to \
             it\nhint: --force-share (-U) reads it all the same; what is read may be half \
             changed\n"
        )
    );
    assert_eq!(
        said("lacuna check -r all a.qcow2"),
        format!(
            "lacuna: Could not open 'a.qcow2': a.qcow2 is in use: stock-io (pid {pid}) writes to \
             it\nhint: close it there first; to look at it meanwhile, use a verb that only reads \
             (or `io -r`), with --force-share (-U) if it is being written\n"
        )
    );
    drop(writer);
    let reader = Holder::io(&sandbox, Make::Ours, "-r o.qcow2");
    let pid = reader.pid();
    let text = said("lacuna create a.qcow2 1M 2>&1 | grep -v Formatting");
    let expected = format!("lacuna: a.qcow2: a.qcow2 is in use: lacuna (pid {pid}) reads it\n");
    assert!(text.starts_with(&expected), "{text}");
}

#[test]
fn a_program_that_was_killed_holds_nothing_any_more() {
    for make in [Make::Stock, Make::Ours] {
        let sandbox = prepared(Sandbox::ours());
        let holder = Holder::io(&sandbox, make, "a.qcow2");
        assert_eq!(sandbox.run("qemu-img map a.qcow2").code, Some(1));
        holder.crash();
        sandbox.prepare("qemu-io -c 'write 0 64k' a.qcow2");
    }
}

#[test]
fn one_command_that_needs_a_file_twice_is_told_so() {
    both(
        "
        stock-img create -q -f qcow2 a.qcow2 1M
        stock-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
        stock-img create -q -f raw r.raw 1M
        stock-img create -q -f qcow2 -o data_file=d.raw x.qcow2 1M
        qemu-img compare a.qcow2 a.qcow2
        qemu-img compare a.qcow2 o.qcow2
        qemu-img compare --image-opts dr=1 driver=qcow2,file.filename=a.qcow2
        qemu-img convert -O qcow2 a.qcow2 a.qcow2
        qemu-img convert -n -O qcow2 a.qcow2 a.qcow2
        qemu-img convert -O qcow2 o.qcow2 a.qcow2
        qemu-img convert -O raw -f raw r.raw r.raw
        qemu-img convert -n -O raw -f raw r.raw r.raw
        qemu-img convert -O raw x.qcow2 d.raw
        qemu-io -c length a.qcow2
    ",
    );
}

#[test]
fn a_target_stays_as_it_was_where_somebody_uses_it() {
    let sandbox = prepared(Sandbox::ours());
    sandbox.prepare("stock-io -c 'write -P 7 0 64k' a.qcow2");
    let before = sandbox.bytes("a.qcow2");
    let _reader = Holder::io(&sandbox, Make::Stock, "-r a.qcow2");
    for line in ["lacuna convert -O qcow2 n.qcow2 a.qcow2", "lacuna create a.qcow2 1M"] {
        assert_eq!(sandbox.run(line).code, Some(1), "{line}");
        assert!(sandbox.bytes("a.qcow2") == before, "{line}");
    }
}

#[test]
fn programs_are_told_the_process_in_the_way() {
    let sandbox = prepared(Sandbox::ours());
    let holder = Holder::io(&sandbox, Make::Stock, "a.qcow2");
    let output = sandbox.command("lacuna --error-format=json map o.qcow2");
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    let facts = ["error", "file", "holder_pid", "holder_command"].map(|name| error[name].clone());
    let expected: [serde_json::Value; 4] =
        ["busy".into(), "a.qcow2".into(), holder.pid().into(), "stock-io".into()];
    assert_eq!(facts, expected, "{error}");
}
