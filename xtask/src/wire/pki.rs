//! Certificates for a benchmark: an authority, and a server of this machine, by GnuTLS's `certtool`.

use std::fs;
use std::path::Path;

use crate::Outcome;
use crate::run::{command, output};

const AUTHORITY: &str = "cn = bench\nca\ncert_signing_key\nexpiration_days = 2\n";
const SERVER: &str = "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\n\
                      signing_key\nencryption_key\ntls_www_server\nexpiration_days = 2\n";

/// Makes a folder as QEMU's programs, libnbd and ours expect it.
pub(super) fn make(folder: &Path) -> Outcome {
    fs::create_dir_all(folder).map_err(|error| format!("cannot make a folder: {error}"))?;
    let file = |name: &str| folder.join(name).display().to_string();
    for (name, text) in [("ca.info", AUTHORITY), ("server.info", SERVER)] {
        fs::write(file(name), text).map_err(|error| format!("cannot write {name}: {error}"))?;
    }
    let certtool = |words: &[&str]| output(command("certtool", words)).map(drop);
    for name in ["ca-key.pem", "server-key.pem"] {
        certtool(&[
            "--generate-privkey",
            "--key-type=rsa",
            "--bits=2048",
            "--outfile",
            &file(name),
        ])?;
    }
    let of_authority = ["--load-privkey", &file("ca-key.pem"), "--template", &file("ca.info")];
    let outfile = ["--outfile", &file("ca-cert.pem")];
    certtool(&[&["--generate-self-signed"][..], &of_authority, &outfile].concat())?;
    let of_server = ["--load-privkey", &file("server-key.pem"), "--template", &file("server.info")];
    let signer = ["--load-ca-certificate", &file("ca-cert.pem")];
    let key = ["--load-ca-privkey", &file("ca-key.pem"), "--outfile", &file("server-cert.pem")];
    certtool(&[&["--generate-certificate"][..], &of_server, &signer, &key].concat())
}
