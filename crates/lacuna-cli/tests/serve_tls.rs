//! `serve` under TLS: what its options ask for, and what is said where it cannot be had.

mod common;

use common::Sandbox;
use testkit::certificates::{Authority, LOCAL};

const OBJECT: &str = "--object tls-creds-x509,id=t,endpoint=server,dir";

/// A disk, and folders: `pki` for both ends, `guest` for a client without certificate.
fn prepared() -> Sandbox {
    prepared_with(Sandbox::ours())
}

fn prepared_with(sandbox: Sandbox) -> Sandbox {
    sandbox.prepare("stock-img create -q -f qcow2 disk.qcow2 8M; mkdir pki guest empty");
    let authority = Authority::new("ours");
    authority.trusted_in(&sandbox.path("pki"));
    authority.trusted_in(&sandbox.path("guest"));
    authority.server_in(&sandbox.path("pki"), &LOCAL);
    authority.client_in(&sandbox.path("pki"));
    sandbox
}

/// Runs clients beside a server: by the URI it gives, in plaintext, and without a certificate.
fn three_clients(sandbox: &Sandbox, options: &str) -> String {
    let clients = "nbdinfo --size \"$uri\" 2>&1; \
                   nbdinfo --size $(echo \"$uri\" | sed s/nbds/nbd/) >/dev/null 2>&1; echo $?; \
                   nbdinfo --size $(echo \"$uri\" | sed s/=pki/=guest/) >/dev/null 2>&1; echo $?";
    let line = format!("lacuna serve -t {options} -f qcow2 disk.qcow2 --run '{clients}'");
    let got = sandbox.run(&line);
    assert_eq!(got.code, Some(0), "{line}: {}", got.text);
    got.text
}

#[test]
fn a_folder_or_an_object_make_tls_a_must() {
    let sandbox = prepared();
    assert_eq!(three_clients(&sandbox, "--tls pki"), "8388608\n1\n0\n");
    let told = three_clients(&sandbox, "--tls pki --tls-verify-peer");
    let refused =
        "A client (unix) was not let in: The client has no certificate, and must have one";
    assert_eq!(told, format!("8388608\n1\n{refused}\n1\n"));
    let told = three_clients(&sandbox, &format!("{OBJECT}=pki --tls-creds t"));
    assert_eq!(told, format!("8388608\n1\n{refused}\n1\n"));
    let told = three_clients(&sandbox, &format!("{OBJECT}=pki,verify-peer=off --tls-creds t"));
    assert_eq!(told, "8388608\n1\n0\n");
}

#[test]
fn optional_tls_lets_plaintext_in() {
    let sandbox = prepared();
    assert_eq!(three_clients(&sandbox, "--tls pki --tls-optional"), "8388608\n0\n0\n");
}

#[test]
fn tls_goes_over_the_internet_under_the_name_of_this_machine() {
    let sandbox = prepared();
    for address in ["-p 0", "-p 0 -b 127.0.0.1", "-p 0 -b ::1"] {
        let told = three_clients(&sandbox, &format!("{address} --tls pki"));
        assert_eq!(told, "8388608\n1\n0\n", "{address}");
    }
}

/// Stock qemu-nbd on the same folder lets in and keeps out the same clients.
#[test]
fn a_stock_server_does_the_same() {
    let sandbox = prepared();
    let ask = |folder: &str| {
        let uri = format!("nbds+unix:///?socket=s&tls-certificates={folder}");
        format!("nbdinfo --size '{uri}' >/dev/null 2>&1; echo $?;")
    };
    let clients =
        [ask("pki"), ask("guest"), "nbdinfo nbd+unix:///?socket=s >/dev/null 2>&1".into()];
    let clients = clients.join(" ");
    for server in ["lacuna serve -k $PWD/s", "stock-nbd -k $PWD/s"] {
        let got = sandbox.run(&format!(
            "{server} -t {OBJECT}=pki --tls-creds t -f qcow2 disk.qcow2 >/dev/null 2>&1 & \
             awaited s; {clients}; echo $?; kill %1; wait; rm -f s"
        ));
        assert_eq!(got.text, "0\n1\n1\n", "{server}");
    }
}

#[test]
fn what_cannot_be_is_told_with_what_would_be_right() {
    let sandbox = prepared();
    for (options, expected) in [
        ("--tls empty", "There is no server-cert.pem in empty: it holds who the server is"),
        ("--tls nowhere", "nowhere is no folder"),
        ("--tls empty --tls-verify-peer", "There is no ca-cert.pem in empty"),
        ("--tls pki --tls-creds t", "--tls and --tls-creds are mutually exclusive"),
        ("--tls-optional", "--tls-optional needs --tls"),
        ("--tls-verify-peer", "--tls-verify-peer needs --tls"),
        ("--tls-creds t", "Failed to get TLS creds: No TLS credentials with id 't'"),
        ("--tls-authz a --tls pki", "--tls-authz is not supported: a client is let in by"),
        (
            "--object tls-creds-psk,id=t,dir=pki --tls-creds t",
            "pre-shared keys is not supported: rustls",
        ),
        (
            "--object tls-creds-x509,id=t,dir=pki --tls-creds t",
            "Failed to get TLS creds: Expected TLS credentials for a server endpoint",
        ),
    ] {
        let got = sandbox.run(&format!("lacuna serve {options} -k s disk.qcow2"));
        assert_eq!(got.code, Some(1), "{options}: {}", got.text);
        assert!(got.text.contains(expected), "{options}: {}", got.text);
    }
}

/// By that name the words are that program's too.
#[test]
fn qemu_nbd_refuses_objects_in_the_same_words() {
    let (stock, ours) = (prepared_with(Sandbox::stock()), prepared_with(Sandbox::ours()));
    common::both_in(
        &stock,
        &ours,
        "qemu-nbd --object tls-creds-x509,id=t,endpoint=server --tls-creds t disk.qcow2
         qemu-nbd --object tls-creds-x509,endpoint=server,dir=pki --tls-creds t disk.qcow2
         qemu-nbd --object id=t,dir=pki --tls-creds t disk.qcow2
         qemu-nbd --object tls-creds-x509,id=t,endpoint=x,dir=pki disk.qcow2
         qemu-nbd --object tls-creds-x509,id=t,dir=pki,foo=1 disk.qcow2
         qemu-nbd --object tls-creds-x509,id=t,dir=pki,verify-peer=x disk.qcow2
         qemu-nbd --object tls-creds-x509,id=t,dir=nowhere,endpoint=server --tls-creds t disk.qcow2
         qemu-nbd --object tls-creds-x509,id=t,dir=pki --tls-creds t disk.qcow2
         qemu-nbd --object tls-creds-x509,id=t,dir=pki --tls-creds u disk.qcow2
         qemu-nbd --object {} disk.qcow2",
    );
}

#[test]
fn qemu_nbd_serves_under_tls() {
    let (stock, ours) = (prepared_with(Sandbox::stock()), prepared_with(Sandbox::ours()));
    common::both_in(
        &stock,
        &ours,
        "qemu-nbd --fork -t -k $PWD/s --pid-file=pid --object \
         tls-creds-x509,id=t,endpoint=server,dir=pki --tls-creds=t -f qcow2 disk.qcow2
         nbdinfo --size 'nbds+unix:///?socket=s&tls-certificates=pki'
         nbdinfo --size 'nbds+unix:///?socket=s&tls-certificates=guest' >/dev/null 2>&1
         nbdinfo --size 'nbd+unix:///?socket=s' >/dev/null 2>&1
         kill $(cat pid)",
    );
}

#[test]
fn exports_are_listed_under_tls_as_by_the_stock_program() {
    let lists = "
        qemu-nbd -L -k $PWD/s >/dev/null 2>&1; echo $?
        qemu-nbd -L -k $PWD/s --object tls-creds-x509,id=t,endpoint=client,dir=pki --tls-creds t
        qemu-nbd -L -k $PWD/s --object tls-creds-x509,id=t,endpoint=client,dir=pki --tls-creds t \
            --tls-hostname localhost
        qemu-nbd -L -k $PWD/s --object tls-creds-x509,id=t,endpoint=client,dir=pki --tls-creds t \
            --tls-hostname other.invalid >/dev/null 2>&1; echo $?
        qemu-nbd -L -k $PWD/s --object tls-creds-x509,id=t,endpoint=server,dir=pki --tls-creds t \
            --tls-hostname localhost
        qemu-nbd -L -k $PWD/s --tls-creds t";
    let told = |sandbox: Sandbox| {
        let sandbox = prepared_with(sandbox);
        let got = sandbox.run(&format!(
            "stock-nbd --fork -t -k $PWD/s --pid-file pid --object \
             tls-creds-x509,id=t,endpoint=server,dir=pki --tls-creds t -f qcow2 disk.qcow2; {lists}
             kill $(cat pid)"
        ));
        got.text
    };
    let (expected, got) = (told(Sandbox::stock()), told(Sandbox::ours()));
    assert!(expected.contains("exports available: 1\n"), "{expected}");
    assert_eq!(got, expected);
}
