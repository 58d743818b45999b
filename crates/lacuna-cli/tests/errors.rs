//! The table of errors: what is wrong on a command line or on the host, the exit code, and the text.
//!
//! Every row runs under the names of QEMU's programs, where text and exit code are those of the
//! stock tools, and under our own, where the text says what, where, and what would have been right.

mod common;

use common::Sandbox;

/// What is compared with the stock tool.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stock {
    /// Exit code and every word.
    Whole,
    /// The exit code.
    Code,
}

/// A block of the table.
struct Row {
    stock: Stock,
    line: &'static str,
    /// All that is printed under our own name, without the last line end.
    ours: String,
    code: i32,
}

/// The table, in blocks with an empty line between.
///
/// * `$ LINE` or `~ LINE` is a line of shell: `IMG` is `qemu-img` or `lacuna`, `IO` is `qemu-io` or
///   `lacuna io`, `AS_USER` makes somebody of the user who is not root. After `~` only the exit
///   codes are compared with stock: the words are of the host, of the engine or of a lock.
/// * Then what is printed under our own name, and `= CODE`, its exit code.
const TABLE: &str = include_str!("errors.txt");

fn rows() -> Vec<Row> {
    let rows: Vec<Row> = TABLE.split("\n\n").map(row).collect();
    assert!(rows.len() > 90, "the table is not read whole");
    rows
}

fn row(block: &'static str) -> Row {
    let lines: Vec<&str> = block.trim_end().lines().collect();
    let [first, ours @ .., last] = &lines[..] else { panic!("{block}") };
    let (mark, line) = first.split_once(' ').unwrap();
    let stock = match mark {
        "$" => Stock::Whole,
        "~" => Stock::Code,
        _ => panic!("{block}"),
    };
    let code = last.strip_prefix("= ").and_then(|code| code.parse().ok());
    Row { stock, line, ours: ours.join("\n"), code: code.unwrap_or_else(|| panic!("{block}")) }
}

/// What the rows are about; no row changes it.
const CAST: &str = "
    stock-img create -q -f qcow2 image 1M; stock-io -f qcow2 -c 'write -P 1 0 64k' image >&2
    stock-img create -q -f raw raw 1M; head -c 4M /dev/urandom > big; : > empty
    head -c 100 image > short; head -c 70000 image > cut
    { printf 'QFI\\xfb\\0\\0\\0\\7'; head -c 1M /dev/zero; } > v7
    stock-img create -q -f qcow2 gone 1M; stock-img create -q -f qcow2 -b gone -F qcow2 lost; rm gone
    mkdir dir closed; cp image secret; cp image readable
    chmod 000 secret; chmod 444 readable; chmod 555 closed";

/// Runs a row's line; what it made goes again.
fn run(sandbox: &Sandbox, line: &str, img: &str, io: &str) -> common::Outcome {
    let user = match rustix::process::geteuid().is_root() {
        true => "setpriv --reuid=65534 --regid=65534 --clear-groups",
        false => "",
    };
    let line = line.replace("IMG", img).replace("IO", io).replace("AS_USER", user);
    let got = sandbox.run(&line);
    sandbox.prepare("rm -rf out");
    got
}

#[test]
fn errors_say_what_and_where_and_what_would_have_been_right() {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    for sandbox in [&stock, &ours] {
        sandbox.prepare(&format!("set -e; {CAST}"));
        sandbox.open_to_everybody();
    }
    let mut wrong = String::new();
    for row in &rows() {
        let expected = run(&stock, row.line, "qemu-img", "qemu-io");
        let got = run(&ours, row.line, "qemu-img", "qemu-io");
        if expected.code != got.code || (row.stock == Stock::Whole && expected.text != got.text) {
            let line = row.line;
            wrong += &format!("\n$ {line}\nstock: {expected:#?}\nunder its name: {got:#?}\n");
        }
        let own = run(&ours, row.line, "lacuna", "lacuna io");
        if (own.code, own.text.trim_end_matches('\n')) != (Some(row.code), &*row.ours) {
            let (line, text) = (row.line, &row.ours);
            wrong += &format!("\n$ {line}\nexpected: {:?} {text}\nours: {own:#?}\n", row.code);
        }
    }
    // Nothing of the cast was touched.
    let left = ours.run("ls; stock-img check -q image").text;
    assert_eq!(left, stock.run("ls; stock-img check -q image").text);
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn no_error_ends_without_a_word_or_with_a_panic() {
    for row in rows().iter().filter(|row| row.code != 0) {
        assert!(!row.ours.is_empty() && !row.ours.contains("panicked"), "{}", row.line);
    }
}
