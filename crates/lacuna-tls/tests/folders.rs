//! Folders of certificates, right and wrong, and what either end makes of the other.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use lacuna_tls::{ClientTls, ErrorKind, ServerTls, VerifyPeer, explain};
use proptest::prelude::*;
use rustls::{ClientConnection, ServerConnection};
use tempfile::TempDir;
use testkit::certificates::{Authority, End, LOCAL, Valid};

/// A folder for both ends.
fn folder(authority: &Authority) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    authority.trusted_in(folder.path());
    authority.server_in(folder.path(), &LOCAL);
    authority.client_in(folder.path());
    folder
}

fn server(folder: &Path) -> ServerTls {
    ServerTls::from_folder(folder, VerifyPeer::On).unwrap()
}

fn client(folder: &Path) -> ClientTls {
    ClientTls::from_folder(folder, VerifyPeer::On).unwrap()
}

/// Shakes hands; what the first end says that refuses.
fn shake(server: &ServerTls, client: &ClientTls, host: Option<&str>) -> Result<(), String> {
    let target = client.toward(host).unwrap();
    let mut server = ServerConnection::new(Arc::clone(server.config())).unwrap();
    let mut client = ClientConnection::new(target.config, target.name).unwrap();
    let told = |error| explain(&std::io::Error::other(error)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut &wire[..]).unwrap();
        server.process_new_packets().map_err(told)?;
        wire.clear();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut &wire[..]).unwrap();
        client.process_new_packets().map_err(told)?;
    }
    Ok(())
}

#[test]
fn ends_of_one_authority_believe_each_other() {
    let folder = folder(&Authority::new("ours"));
    let (server, client) = (server(folder.path()), client(folder.path()));
    for host in [Some("localhost"), Some("127.0.0.1"), Some("[::1]"), None] {
        assert_eq!(shake(&server, &client, host), Ok(()), "{host:?}");
    }
}

/// Made by GnuTLS 3.7.9: numbers of 33 and 31 bytes on P-256, and one of 49 on P-384 in PKCS#8.
#[test]
fn keys_with_numbers_of_other_lengths_are_read_as_certtool_writes_them() {
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/certtool");
    let client = client(&made);
    assert_eq!(shake(&server(&made), &client, Some("localhost")), Ok(()));

    let short = tempfile::tempdir().unwrap();
    for (name, file) in
        [("ca-cert", "ca-cert"), ("server-cert", "short-cert"), ("server-key", "short-key")]
    {
        let (from, to) = (format!("{file}.pem"), format!("{name}.pem"));
        fs::copy(made.join(from), short.path().join(to)).unwrap();
    }
    assert_eq!(shake(&server(short.path()), &client, Some("127.0.0.1")), Ok(()));
}

#[test]
fn another_host_name_is_refused_with_the_names_there_are() {
    let folder = folder(&Authority::new("ours"));
    let refused = shake(&server(folder.path()), &client(folder.path()), Some("disks.example"));
    let text = refused.unwrap_err();
    assert!(text.contains("it is not for disks.example, but for localhost, "), "{text}");
}

#[test]
fn another_authority_is_refused_with_a_name_or_without() {
    let (ours, theirs) = (folder(&Authority::new("ours")), folder(&Authority::new("theirs")));
    for host in [Some("localhost"), Some("disks.example"), None] {
        let refused = shake(&server(theirs.path()), &client(ours.path()), host);
        let text = refused.unwrap_err();
        assert!(text.contains("ca-cert.pem does not stand behind it"), "{host:?}: {text}");
    }
}

#[test]
fn a_client_that_does_not_verify_takes_any_server() {
    let (ours, theirs) = (folder(&Authority::new("ours")), tempfile::tempdir().unwrap());
    let open = ServerTls::from_folder(ours.path(), VerifyPeer::Off).unwrap();
    let client = ClientTls::from_folder(theirs.path(), VerifyPeer::Off).unwrap();
    assert_eq!(shake(&open, &client, Some("disks.example")), Ok(()));
    assert_eq!(shake(&open, &client, None), Ok(()));
}

#[test]
fn a_client_without_certificate_is_let_in_only_where_nobody_asks() {
    let ours = folder(&Authority::new("ours"));
    fs::remove_file(ours.path().join("client-cert.pem")).unwrap();
    fs::remove_file(ours.path().join("client-key.pem")).unwrap();
    let nameless = client(ours.path());
    let refused = shake(&server(ours.path()), &nameless, None).unwrap_err();
    assert_eq!(refused, "The client has no certificate, and must have one");
    let open = ServerTls::from_folder(ours.path(), VerifyPeer::Off).unwrap();
    assert_eq!(shake(&open, &nameless, None), Ok(()));
}

#[test]
fn what_was_revoked_is_refused_by_either_end() {
    let authority = Authority::new("ours");
    let ours = folder(&authority);
    let untouched = folder(&authority);
    authority.revoke_in(ours.path(), &[3]);
    let refused = shake(&server(ours.path()), &client(untouched.path()), None).unwrap_err();
    assert!(refused.contains("it was revoked"), "{refused}");
    assert_eq!(shake(&server(untouched.path()), &client(ours.path()), None), Ok(()));
    authority.revoke_in(ours.path(), &[2]);
    let refused = shake(&server(untouched.path()), &client(ours.path()), None).unwrap_err();
    assert!(refused.contains("it was revoked"), "{refused}");
}

#[test]
fn missing_files_are_named_with_what_they_are_for() {
    for (gone, end, expected) in [
        ("ca-cert.pem", End::Server, "what the certificate of a client is verified by"),
        ("ca-cert.pem", End::Client, "what the certificate of a server is verified by"),
        ("server-cert.pem", End::Server, "who the server is"),
        ("server-key.pem", End::Server, "the key of server-cert.pem"),
        ("client-cert.pem", End::Client, "who the client is"),
        ("client-key.pem", End::Client, "the key of client-cert.pem"),
    ] {
        let ours = folder(&Authority::new("ours"));
        fs::remove_file(ours.path().join(gone)).unwrap();
        let error = refusal(ours.path(), end);
        assert_eq!(error.kind(), ErrorKind::NotFound, "{gone}");
        let text = error.to_string();
        let start = format!("There is no {gone} in {}: it holds ", ours.path().display());
        assert!(text.starts_with(&start) && text.ends_with(expected), "{text}");
    }
}

#[test]
fn wrong_certificates_are_refused_before_anybody_connects() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    type Spoil<'a> = &'a dyn Fn(&Path);
    let cases: [(Spoil<'_>, End, &str); 10] = [
        (
            &|it| ours.sign(it, End::Server, &LOCAL, Valid::Past, 2),
            End::Server,
            "server-cert.pem: it has expired",
        ),
        (
            &|it| ours.sign(it, End::Client, &[], Valid::Past, 3),
            End::Client,
            "client-cert.pem: it has expired",
        ),
        (
            &|it| ours.sign(it, End::Server, &LOCAL, Valid::Future, 2),
            End::Server,
            "it is not valid yet",
        ),
        (
            &|it| theirs.server_in(it, &LOCAL),
            End::Server,
            "ca-cert.pem beside it does not stand behind this certificate",
        ),
        (
            &|it| put(it, "client-cert.pem", "server-cert.pem", "client-key.pem", "server-key.pem"),
            End::Server,
            "server-cert.pem: it is for another purpose",
        ),
        (
            &|it| ours.sign(&it.join("other"), End::Server, &LOCAL, Valid::Now, 2),
            End::Server,
            "this is not the key of ",
        ),
        (
            &|it| fs::write(it.join("server-key.pem"), "no key\n").unwrap(),
            End::Server,
            "there is no `-----BEGIN PRIVATE KEY-----` in it",
        ),
        (
            &|it| fs::write(it.join("ca-cert.pem"), "").unwrap(),
            End::Client,
            "ca-cert.pem: there is no `-----BEGIN CERTIFICATE-----` in it",
        ),
        (&|it| cut(&it.join("server-cert.pem")), End::Server, "the file is cut short"),
        (
            &|it| fs::write(it.join("ca-crl.pem"), "").unwrap(),
            End::Server,
            "there is no `-----BEGIN X509 CRL-----` in it",
        ),
    ];
    for (spoil, end, expected) in cases {
        let folder = folder(&ours);
        fs::create_dir(folder.path().join("other")).unwrap();
        spoil(folder.path());
        if expected.contains("not the key") {
            let other = folder.path().join("other/server-key.pem");
            fs::copy(other, folder.path().join("server-key.pem")).unwrap();
        }
        let error = refusal(folder.path(), end);
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
}

#[test]
fn encrypted_keys_are_refused_with_the_way_out() {
    for text in [
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END RSA PRIVATE \
         KEY-----\n",
    ] {
        let ours = folder(&Authority::new("ours"));
        fs::write(ours.path().join("server-key.pem"), text).unwrap();
        let error = refusal(ours.path(), End::Server);
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("openssl pkey"), "{error}");
    }
}

#[test]
fn an_authority_is_no_server() {
    let ours = Authority::new("ours");
    let folder = folder(&ours);
    ours.serves_in(folder.path());
    let error = refusal(folder.path(), End::Server);
    assert!(error.to_string().contains("it is the certificate of an authority"), "{error}");
}

#[test]
fn names_that_no_certificate_has_are_refused() {
    let folder = folder(&Authority::new("ours"));
    let client = client(folder.path());
    for host in ["", "a b", "-", "..", "[::1", "x\0y"] {
        let error = client.toward(Some(host)).unwrap_err();
        assert!(error.to_string().contains("it is a DNS name or an address"), "{error}");
    }
}

fn refusal(folder: &Path, end: End) -> lacuna_tls::Error {
    match end {
        End::Client => ClientTls::from_folder(folder, VerifyPeer::On).unwrap_err(),
        End::Server => ServerTls::from_folder(folder, VerifyPeer::On).unwrap_err(),
    }
}

fn put(folder: &Path, certificate: &str, as_certificate: &str, key: &str, as_key: &str) {
    fs::copy(folder.join(certificate), folder.join(as_certificate)).unwrap();
    fs::copy(folder.join(key), folder.join(as_key)).unwrap();
}

fn cut(path: &Path) {
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, &text[..text.len() / 2]).unwrap();
}

/// What a hostile file changes of a right one.
#[derive(Clone, Debug)]
enum Harm {
    Cut(prop::sample::Index),
    Set(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Twice,
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        any::<prop::sample::Index>().prop_map(Harm::Cut),
        (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, byte)| Harm::Set(at, byte)),
        (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Harm::Insert(at, bytes)),
        Just(Harm::Twice),
    ]
}

fn harmed(mut bytes: Vec<u8>, harms: &[Harm]) -> Vec<u8> {
    for harm in harms {
        let len = bytes.len().max(1);
        match harm {
            Harm::Cut(at) => bytes.truncate(at.index(len)),
            Harm::Set(at, byte) => {
                if let Some(place) = bytes.get_mut(at.index(len)) {
                    *place = *byte;
                }
            }
            Harm::Insert(at, more) => {
                let at = at.index(len).min(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Harm::Twice => bytes.extend_from_within(..),
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever lies in the folder, settings are made or refused: nothing panics.
    #[test]
    fn hostile_files_are_refused_or_read(
        harms in prop::collection::vec(harm(), 1..4),
        name in prop::sample::select(vec![
            "ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem",
            "client-cert.pem", "client-key.pem",
        ]),
    ) {
        let authority = Authority::new("ours");
        let folder = folder(&authority);
        authority.revoke_in(folder.path(), &[9]);
        let path = folder.path().join(name);
        let bytes = harmed(fs::read(&path).unwrap(), &harms);
        fs::write(&path, bytes).unwrap();
        for verify in [VerifyPeer::On, VerifyPeer::Off] {
            let server = ServerTls::from_folder(folder.path(), verify);
            let client = ClientTls::from_folder(folder.path(), verify);
            if let (Ok(server), Ok(client)) = (server, client) {
                let _either_way = shake(&server, &client, None);
            }
        }
    }
}
