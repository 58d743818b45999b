//! What belongs in one place only.

use super::Finding;
use super::source::{Source, Token, starts_with};

/// Something in the code, and where it may stand.
struct Place {
    /// The tokens that are looked for.
    code: &'static [&'static str],
    /// The files the rule is about: those whose path begins with this.
    within: &'static str,
    /// Beginnings of the paths where it may stand.
    allowed: &'static [&'static str],
    /// What to tell who wrote it elsewhere.
    reason: &'static str,
}

const ENGINE: &str = "crates/lacuna/src/";
const FORMAT: &str = "crates/lacuna/src/qcow2/format/";
const PROTOCOL: &str = "crates/lacuna-nbd/src/";
/// The only modules of the engine that open files.
const OPENERS: &[&str] = &["crates/lacuna/src/storage/", "crates/lacuna/src/chain"];

const PLACES: [Place; 19] = [
    Place {
        code: &["unsafe"],
        within: "",
        allowed: &["crates/lacuna/src/storage/sys", "crates/lacuna/src/buffer.rs"],
        reason: "unsafe code lives in storage/sys and buffer.rs only",
    },
    Place { code: &["println", "!"], within: ENGINE, allowed: &[], reason: PRINTS },
    Place { code: &["eprintln", "!"], within: ENGINE, allowed: &[], reason: PRINTS },
    Place { code: &["print", "!"], within: ENGINE, allowed: &[], reason: PRINTS },
    Place { code: &["eprint", "!"], within: ENGINE, allowed: &[], reason: PRINTS },
    Place {
        code: &["std", "::", "env"],
        within: ENGINE,
        allowed: &[],
        reason: "only lacuna-cli reads arguments and the environment",
    },
    Place {
        code: &["std", "::", "process"],
        within: ENGINE,
        allowed: &[],
        reason: "only lacuna-cli ends the program or starts another",
    },
    Place { code: &["std", "::", "fs"], within: ENGINE, allowed: OPENERS, reason: OPENS },
    Place { code: &["rustix", "::", "fs"], within: ENGINE, allowed: OPENERS, reason: OPENS },
    Place { code: &["File", "::", "open"], within: ENGINE, allowed: OPENERS, reason: OPENS },
    Place { code: &["async"], within: FORMAT, allowed: &[], reason: PURE },
    Place { code: &["await"], within: FORMAT, allowed: &[], reason: PURE },
    Place { code: &["async"], within: PROTOCOL, allowed: &[], reason: SANS_IO },
    Place { code: &["await"], within: PROTOCOL, allowed: &[], reason: SANS_IO },
    Place { code: &["std", "::", "io"], within: PROTOCOL, allowed: &[], reason: SANS_IO },
    Place { code: &["std", "::", "net"], within: PROTOCOL, allowed: &[], reason: SANS_IO },
    Place { code: &["std", "::", "os"], within: PROTOCOL, allowed: &[], reason: SANS_IO },
    Place { code: &["std", "::", "fs"], within: PROTOCOL, allowed: &[], reason: SANS_IO },
    Place { code: &["std", "::", "time"], within: PROTOCOL, allowed: &[], reason: SANS_IO },
];

const PRINTS: &str = "only lacuna-cli prints";
const OPENS: &str = "only storage and chain open files";
const SANS_IO: &str = "the NBD protocol does no I/O, waits for nothing and knows no clock";
const PURE: &str = "qcow2/format does no I/O and waits for nothing";

pub(super) fn check(source: &Source, findings: &mut Vec<Finding>) {
    // Unsafe code is no better for being a test; the other rules are about the product.
    let product = source.product();
    for place in &PLACES {
        let tokens = if place.code == ["unsafe"] { &source.tokens } else { &product };
        let is_allowed = place.allowed.iter().any(|prefix| source.path.starts_with(prefix));
        if source.path.starts_with(place.within) && !is_allowed {
            report(source, tokens, place, findings);
        }
    }
}

fn report(source: &Source, tokens: &[Token], place: &Place, findings: &mut Vec<Finding>) {
    for at in 0..tokens.len() {
        if starts_with(&tokens[at..], place.code) {
            let text = place.reason.to_owned();
            findings.push(Finding { path: source.path.clone(), line: tokens[at].line, text });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> usize {
        super::super::found(check, path, text).len()
    }

    #[test]
    fn unsafe_code_stays_in_its_place() {
        let text = "fn f() { unsafe { g() } }";
        assert_eq!(found("crates/lacuna/src/buffer.rs", text), 0);
        assert_eq!(found("crates/lacuna/src/storage/sys/uring.rs", text), 0);
        assert_eq!(found("crates/lacuna/src/storage/file.rs", text), 1);
        assert_eq!(found("crates/testkit/src/lib.rs", text), 1);
        assert_eq!(found("crates/lacuna/tests/x.rs", text), 1);
        assert_eq!(found("crates/lacuna/src/raw.rs", "#![deny(unsafe_op_in_unsafe_fn)]"), 0);
    }

    #[test]
    fn the_engine_neither_prints_nor_reads_the_environment() {
        let text = "fn f() { println!(\"x\"); eprint!(\"y\"); std::env::var(\"Z\"); }";
        assert_eq!(found("crates/lacuna/src/raw.rs", text), 3);
        assert_eq!(found("crates/lacuna-cli/src/main.rs", text), 0);
    }

    #[test]
    fn qcow2_opens_no_files() {
        let text = "use std::fs::File;";
        assert_eq!(found("crates/lacuna/src/qcow2/open.rs", text), 1);
        assert_eq!(found("crates/lacuna/src/chain/open.rs", text), 0);
        assert_eq!(found("crates/lacuna/src/storage/file.rs", text), 0);
    }

    #[test]
    fn the_protocol_does_no_io() {
        let text = "use std::net::TcpStream; async fn f() {}";
        assert_eq!(found("crates/lacuna-nbd/src/server/mod.rs", text), 2);
        assert_eq!(found("crates/lacuna-nbd/tests/peers.rs", text), 0);
    }

    #[test]
    fn format_waits_for_nothing() {
        assert_eq!(found("crates/lacuna/src/qcow2/format/header.rs", "async fn f() {}"), 1);
        assert_eq!(found("crates/lacuna/src/qcow2/open.rs", "async fn f() {}"), 0);
    }
}
