//! Stock clients: who gets in, who does not, and whether the bytes are right.

use lacuna_export::Limits;
use lacuna_tls::VerifyPeer;
use testkit::certificates::{Authority, End, Valid};
use testkit::foreign::{Finished, NBDCOPY, NBDINFO, QEMU_IMG, QEMU_IO};

use crate::served::{SIZE, Served, Wish};

fn size_seen(uri: &str) -> Finished {
    NBDINFO.run(["--size", uri])
}

fn gets_in(uri: &str) -> bool {
    let seen = size_seen(uri);
    assert!(seen.code == 0 || !seen.stderr.is_empty(), "{seen:?}");
    seen.code == 0 && seen.stdout.trim() == SIZE.to_string()
}

#[test]
fn libnbd_gets_in_by_tcp_and_by_a_socket_file() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    assert!(gets_in(&served.uri(served.path())));
    assert!(gets_in(&served.unix_uri()));
    let told = NBDINFO.succeed([&*served.uri(served.path())]);
    assert!(told.contains("with TLS") && told.contains("base:allocation"), "{told}");
}

#[test]
fn version_6_of_the_internet_serves_as_well() {
    let served = Served::start(Wish::Optional, VerifyPeer::On);
    let port = served.also_on_version_6();
    assert!(gets_in(&format!("nbd://[::1]:{port}")));
    let certificates = served.path().display();
    assert!(gets_in(&format!("nbds://[::1]:{port}/?tls-certificates={certificates}")));
}

#[test]
fn bytes_are_the_same_on_both_ends() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    let (source, back) = (served.path().join("source"), served.path().join("back"));
    let bytes: Vec<u8> = (0..SIZE as u32).map(|at| (at / 509) as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    let uri = served.uri(served.path());
    NBDCOPY.succeed([source.to_str().unwrap(), &uri]);
    NBDCOPY.succeed([&uri, back.to_str().unwrap()]);
    assert!(std::fs::read(&back).unwrap() == bytes);
    // A client of another make, with another library of TLS settings.
    let qemu = served.qemu(served.path(), "localhost");
    let convert = ["convert", "-O", "raw"].map(String::from).into_iter();
    let target = back.to_str().unwrap().to_owned();
    QEMU_IMG.succeed(convert.chain(qemu).chain([target]));
    assert!(std::fs::read(&back).unwrap() == bytes);
}

#[test]
fn qemu_io_writes_and_reads() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    let script = ["write -P 7 1M 3M", "write -z 2M 64k", "flush", "read -P 7 3M 1M"];
    let words = script.into_iter().flat_map(|line| ["-c".to_owned(), line.to_owned()]);
    let told = QEMU_IO.succeed(words.chain(served.qemu(served.path(), "localhost")));
    assert!(!told.contains("failed"), "{told}");
}

#[test]
fn where_tls_is_required_plaintext_gets_nothing() {
    let served = Served::start(Wish::Required, VerifyPeer::Off);
    assert!(!gets_in(&served.plain_uri()));
    let told = QEMU_IMG.run(["info", "-f", "raw", &served.plain_uri()]);
    assert!(told.code != 0 && told.stderr.contains("TLS"), "{told:?}");
    // The names of exports are nobody's business either.
    assert_ne!(NBDINFO.run(["--list", &*served.plain_uri()]).code, 0);
    assert!(gets_in(&served.uri(served.believer().path())));
}

#[test]
fn where_tls_is_optional_both_get_in() {
    let served = Served::start(Wish::Optional, VerifyPeer::Off);
    assert!(gets_in(&served.plain_uri()));
    assert!(gets_in(&served.uri(served.believer().path())));
}

#[test]
fn where_there_is_no_tls_a_client_that_insists_leaves() {
    let served = Served::start(Wish::Off, VerifyPeer::Off);
    assert!(gets_in(&served.plain_uri()));
    assert!(!gets_in(&served.uri(served.path())));
    let told = QEMU_IMG
        .run(["info".to_owned()].into_iter().chain(served.qemu(served.path(), "localhost")));
    assert!(told.code != 0 && told.stderr.contains("TLS is not configured"), "{told:?}");
}

#[test]
fn clients_without_a_certificate_or_with_a_wrong_one_stay_out() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    let believer = served.believer();
    assert!(!gets_in(&served.uri(believer.path())), "no certificate");
    Authority::new("theirs").client_in(believer.path());
    assert!(!gets_in(&served.uri(believer.path())), "another authority");
    served.authority.sign(believer.path(), End::Client, &[], Valid::Past, 4);
    assert!(!gets_in(&served.uri(believer.path())), "expired");
    served.authority.client_in(believer.path());
    assert!(gets_in(&served.uri(believer.path())), "a right one");
}

#[test]
fn clients_refuse_a_server_of_another_name() {
    let limits = Limits::default();
    let served = Served::with(Wish::Required, VerifyPeer::On, limits, &["disks.example"]);
    assert!(!gets_in(&served.uri(served.path())), "libnbd");
    let mut words = served.qemu(served.path(), "localhost").to_vec();
    let asked = |words: &[String]| QEMU_IMG.run([&["info".to_owned()], words].concat());
    let told = asked(&words);
    assert!(told.code != 0 && told.stderr.contains("localhost"), "{told:?}");
    words[3] += ",file.tls-hostname=disks.example";
    assert_eq!(asked(&words).code, 0);
}
