//! Clients that mean harm, or have bad luck, around the start of TLS.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use lacuna_export::Limits;
use lacuna_tls::VerifyPeer;
use testkit::certificates::LOCAL;
use testkit::foreign::NBDINFO;

use crate::served::{Served, Wish};
use crate::wire::{
    ACK, ERR_INVALID, LIST, LIST_META_CONTEXT, SERVER, SET_META_CONTEXT, STARTTLS,
    STRUCTURED_REPLY, ask, greeted, option, read_request, reply, secured, starts, transmitting,
};

/// Reads until the server has closed; how is its own business.
fn read_until_closed(mut stream: impl Read) {
    let mut rest = Vec::new();
    if let Err(error) = stream.read_to_end(&mut rest) {
        assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof));
    }
}

fn still_serves(served: &Served) {
    NBDINFO.succeed(["--size", &*served.uri(served.path())]);
}

/// CVE-2021-3716 and its kin: what somebody puts into the plaintext behind STARTTLS is not obeyed
/// once TLS is there.
#[test]
fn plaintext_behind_starttls_never_reaches_tls() {
    let served = Served::start(Wish::Optional, VerifyPeer::On);
    // What does not fit into one receive is not there yet when TLS begins, and spoils it.
    for (injected, spoils) in
        [(option(STRUCTURED_REPLY, &[]), false), (option(LIST, &[]), false), (vec![85; 5000], true)]
    {
        let mut socket = greeted(&served);
        socket.write_all(&[option(STARTTLS, &[]), injected].concat()).unwrap();
        let (answered, code, _) = reply(&mut socket);
        assert_eq!((answered, code), (STARTTLS, ACK));
        // A client that never saw the injection shakes hands, and is answered what it asks.
        let mut stream = secured(&served, socket);
        assert_eq!(stream.write_all(&option(LIST, &[])).is_err(), spoils);
        if !spoils {
            let (answered, code, _) = reply(&mut stream);
            assert_eq!((answered, code), (LIST, SERVER));
        }
    }
    still_serves(&served);
}

#[test]
fn what_was_negotiated_in_plaintext_is_forgotten() {
    let served = Served::start(Wish::Optional, VerifyPeer::On);
    let allocation = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15][..], b"base:allocation"].concat();
    let mut socket = greeted(&served);
    assert_eq!(ask(&mut socket, STRUCTURED_REPLY, &[]).0, ACK);
    assert_eq!(ask(&mut socket, STARTTLS, &[]).0, ACK);
    let mut stream = secured(&served, socket);
    assert_eq!(ask(&mut stream, SET_META_CONTEXT, &allocation).0, ERR_INVALID);
    assert_eq!(ask(&mut stream, STRUCTURED_REPLY, &[]).0, ACK);
    assert_eq!(ask(&mut stream, STARTTLS, &[]).0, ERR_INVALID);
    assert_ne!(ask(&mut stream, LIST_META_CONTEXT, &[0; 8]).0, ERR_INVALID);
}

#[test]
fn garbage_in_place_of_a_client_hello_ends_that_connection_only() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    for garbage in [&[0; 64][..], &[0xff; 4096], b"GET / HTTP/1.0\r\n\r\n", &[22, 3, 1, 255, 255]] {
        let mut socket = starts(&served);
        socket.write_all(garbage).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        read_until_closed(socket);
    }
    still_serves(&served);
}

#[test]
fn plaintext_in_place_of_tls_is_not_answered() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    let mut socket = starts(&served);
    socket.write_all(&option(LIST, &[])).unwrap();
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    assert!(!rest.windows(8).any(|bytes| bytes == magic), "{rest:?}");
}

#[test]
fn who_stalls_inside_the_handshake_is_let_go_and_holds_nobody_up() {
    // Enough for a client that goes on, on a machine that is busy.
    let limits = Limits { handshake: Duration::from_secs(2), ..Limits::default() };
    let served = Served::with(Wish::Required, VerifyPeer::On, limits, &LOCAL);
    let silent = starts(&served);
    let mut halfway = starts(&served);
    // The beginning of a record that announces more.
    halfway.write_all(&[22, 3, 1, 2, 0, 1, 0]).unwrap();
    still_serves(&served);
    read_until_closed(silent);
    read_until_closed(halfway);
}

#[test]
fn a_client_that_closed_its_half_gets_its_replies_and_a_clean_end() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    let mut stream = transmitting(&served);
    const LEN: u32 = 2 << 20;
    for cookie in 0..3 {
        stream.write_all(&read_request(cookie, 0, LEN)).unwrap();
    }
    // Without a word of TLS that would say so.
    stream.sock.shutdown(Shutdown::Write).unwrap();
    let mut replies = Vec::new();
    // An end without a word of TLS would be an error here.
    stream.read_to_end(&mut replies).unwrap();
    assert_eq!(replies.len(), 3 * (16 + LEN as usize));
}

#[test]
fn a_server_that_stops_says_so_under_tls() {
    let served = Served::start(Wish::Required, VerifyPeer::On);
    let mut idle: Vec<_> = (0..5).map(|_| transmitting(&served)).collect();
    served.stop();
    for stream in &mut idle {
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    assert_eq!(served.clients(), 0);
}
