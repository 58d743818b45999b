//! Clients that mean harm, or have bad luck: none of them ends the server, or keeps it from others.
//!
//! What a client may say wrong, byte by byte, is tested where the protocol is (`lacuna-nbd`); this is
//! about sockets, memory and time.

mod talk;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lacuna_export::Limits;

use self::talk::{
    DISCONNECT, EINVAL, FLUSH, READ, RESIZE, SIZE_BYTES, Served, WRITE, hello, option, request,
};

/// Held by tests that measure memory, and by those that take much: they are threads of one process.
static MEASURED: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    MEASURED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns how many bytes of memory this process has.
fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn patient() -> Limits {
    Limits { handshake: Duration::from_secs(60), ..Limits::default() }
}

#[test]
fn a_thousand_idle_connections_take_little_and_keep_nobody_out() {
    let _alone = alone();
    let served = Served::start(patient());
    served.assert_serves();
    let before = resident_bytes();
    let mut idle: Vec<_> = (0..1000).map(|_| served.ready()).collect();
    served.assert_serves();
    // The test's own ends are in it as well; the goal is 64 KiB for each.
    let each = resident_bytes().saturating_sub(before) / idle.len();
    assert!(each <= 64 << 10, "{each} bytes for each connection");
    // They are not forgotten.
    let last = idle.last_mut().unwrap();
    last.send(&request(FLUSH, 5, 0, 0));
    assert_eq!(last.answer(), (0, 5));
}

#[test]
fn connections_that_were_busy_give_their_memory_back() {
    let _alone = alone();
    let served = Served::start(patient());
    served.assert_serves();
    let before = resident_bytes();
    let mut clients: Vec<_> = (0..200).map(|_| served.ready()).collect();
    for client in &mut clients {
        (0..16).for_each(|cookie| client.send(&request(READ, cookie, 0, 64 << 10)));
        client.receive(16 * (16 + (64 << 10)));
    }
    served.assert_serves();
    let each = resident_bytes().saturating_sub(before) / clients.len();
    assert!(each <= 64 << 10, "{each} bytes for each connection");
}

#[test]
fn a_client_that_never_reads_stops_only_itself() {
    let _alone = alone();
    let served = Served::start(Limits { bytes: 1 << 20, ..patient() });
    let mut deaf = served.ready();
    deaf.0.set_nonblocking(true).unwrap();
    let wanted = request(READ, 1, 0, 256 << 10);
    let before = resident_bytes();
    let mut sent = 0;
    // Until the server takes no more; what it took it may not answer without end.
    while sent < 1 << 20 {
        match deaf.0.write(&wanted) {
            Ok(len) => sent += len,
            Err(_) => break,
        }
        if sent % (wanted.len() * 64) == 0 {
            served.assert_serves();
        }
    }
    assert!(sent < 1 << 20, "the server took {sent} bytes of requests");
    served.assert_serves();
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes for a client that does not read");
}

#[test]
fn a_client_that_sends_without_end_leaves_time_for_others() {
    let _alone = alone();
    let served = Served::start(patient());
    let mut greedy = served.ready();
    let mut reader = talk::Client(greedy.0.try_clone().unwrap());
    let requests: Vec<u8> = (0..200_000).flat_map(|it| request(READ, it, 0, 1)).collect();
    let flood = std::thread::spawn(move || greedy.send(&requests));
    let answers = std::thread::spawn(move || drop(reader.receive(200_000 * 17)));
    (0..20).for_each(|_| served.assert_serves());
    flood.join().unwrap();
    answers.join().unwrap();
}

#[test]
fn a_client_that_sends_no_more_gets_the_answers_to_what_it_sent() {
    let served = Served::start(patient());
    let mut client = served.ready();
    let requests: Vec<u8> = (0..100).flat_map(|it| request(READ, it, it * 512, 512)).collect();
    client.send(&requests);
    client.0.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.rest().len(), 100 * (16 + 512));
    served.assert_serves();
}

#[test]
fn a_client_that_reads_no_more_ends_its_own_connection() {
    let served = Served::start(patient());
    let mut client = served.ready();
    client.0.shutdown(Shutdown::Read).unwrap();
    // The server meets a broken pipe.
    let _may_be_too_late = client.0.write_all(&request(READ, 1, 0, 1 << 20));
    served.assert_serves();
    drop(client);
    served.server.stop();
    assert!(served.server.connections().is_empty());
}

#[test]
fn cve_2013_7441_a_client_may_leave_at_any_byte() {
    let served = Served::start(patient());
    let mut conversation = hello();
    conversation.extend(request(WRITE, 1, 0, 8));
    conversation.extend(b"12345678");
    conversation.extend(request(READ, 2, 0, 8));
    conversation.extend(request(DISCONNECT, 0, 0, 0));
    for len in 0..conversation.len() {
        let mut client = served.connect();
        client.send(&conversation[..len]);
        match len % 3 {
            0 => drop(client),
            1 => client.0.shutdown(Shutdown::Both).unwrap(),
            _ => {
                client.0.shutdown(Shutdown::Write).unwrap();
                client.rest();
            }
        }
    }
    served.assert_serves();
}

#[test]
fn bytes_that_come_one_by_one_are_understood() {
    let served = Served::start(patient());
    let mut client = served.connect();
    let mut conversation = hello();
    conversation.extend(request(WRITE, 1, 4096, 8));
    conversation.extend(b"12345678");
    conversation.extend(request(READ, 2, 4096, 8));
    conversation.extend(request(DISCONNECT, 0, 0, 0));
    conversation.iter().for_each(|byte| client.send(&[*byte]));
    let answers = client.rest();
    assert_eq!(answers[answers.len() - 8..], *b"12345678");
}

#[test]
fn what_is_no_handshake_ends_at_once() {
    let served = Served::start(patient());
    for nonsense in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 64], &[0; 64]] {
        let mut client = served.connect();
        client.receive(18);
        client.send(nonsense);
        client.rest();
    }
    served.assert_serves();
}

#[test]
fn a_handshake_that_takes_too_long_is_ended() {
    let served = Served::start(Limits { handshake: Duration::from_millis(50), ..patient() });
    let mut silent = served.connect();
    assert_eq!(silent.rest().len(), 18);
    // Options without end are no way around it.
    let mut talker = served.connect();
    talker.receive(18);
    talker.send(&[0, 0, 0, 3]);
    let unknown = option(0x1234, &[]);
    let mut reply = [0; 4096];
    while talker.0.write_all(&unknown).is_ok() && matches!(talker.0.read(&mut reply), Ok(1..)) {}
    served.server.stop();
    assert!(served.server.connections().is_empty());
}

#[test]
fn one_client_too_many_is_sent_away_and_the_next_one_let_in() {
    let served = Served::start(Limits { connections: 2, ..patient() });
    let (first, _second) = (served.ready(), served.ready());
    assert_eq!(served.connect().rest(), b"");
    drop(first);
    while served.server.connections().len() > 1 {
        std::thread::yield_now();
    }
    drop(served.ready());
}

#[test]
fn a_rejected_write_is_followed_by_what_comes_after_its_payload() {
    let _alone = alone();
    let served = Served::start(patient());
    let mut client = served.ready();
    // The payload looks like a request: to disconnect.
    let payload: Vec<u8> = request(DISCONNECT, 9, 0, 0).repeat(1000);
    for offset in [SIZE_BYTES, u64::MAX - 1, SIZE_BYTES - 1] {
        client.send(&request(WRITE, offset, offset, payload.len() as u32));
        client.send(&payload);
        let (error, cookie) = client.answer();
        assert!(error != 0 && cookie == offset, "{error} for {cookie}");
    }
    client.send(&request(READ, 3, SIZE_BYTES, 1));
    assert_eq!(client.answer(), (EINVAL, 3));
    client.send(&request(FLUSH, 4, 0, 0));
    assert_eq!(client.answer(), (0, 4));
}

#[test]
fn requests_longer_than_any_buffer_get_an_error_or_the_end() {
    let _alone = alone();
    let served = Served::start(patient());
    let before = resident_bytes();
    let mut client = served.ready();
    client.send(&request(READ, 1, 0, u32::MAX));
    assert_eq!(client.answer(), (EINVAL, 1));
    client.send(&request(WRITE, 2, 0, u32::MAX));
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes for what was only announced");
    served.assert_serves();
}

#[test]
fn cve_2024_7409_a_stop_waits_for_no_client_in_any_state() {
    let _alone = alone();
    let served = Served::start(Limits { stop: Duration::from_millis(100), ..patient() });
    let silent = served.connect();
    let mut in_options = served.connect();
    in_options.send(&[0, 0, 0, 3]);
    let mut in_payload = served.ready();
    in_payload.send(&request(WRITE, 1, 0, 1 << 20));
    let mut deaf = served.ready();
    (0..64).for_each(|cookie| deaf.send(&request(READ, cookie, 0, 1 << 20)));
    let idle = served.ready();
    served.server.stop();
    assert!(served.server.connections().is_empty());
    drop((silent, in_options, in_payload, deaf, idle));
}

#[test]
fn short_replies_that_nobody_reads_are_counted_with_what_they_take() {
    let _alone = alone();
    // An answer without data takes a part of a queue, one of a byte takes a page.
    for len in [0, 1] {
        let served = Served::start(Limits { bytes: 4 << 20, ..patient() });
        let mut deaf = served.ready();
        deaf.0.set_nonblocking(true).unwrap();
        let wanted: Vec<u8> = (0..100).flat_map(|cookie| request(READ, cookie, 0, len)).collect();
        let before = resident_bytes();
        let (mut at, mut refusals) = (0, 0);
        // The server takes no more where it took nothing while it served others for a while.
        while refusals < 20 {
            match deaf.0.write(&wanted[at..]) {
                Ok(sent) => (at, refusals) = ((at + sent) % wanted.len(), 0),
                Err(_) => {
                    refusals += 1;
                    served.assert_serves();
                }
            }
        }
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 12 << 20, "{grown} bytes for a client that may have 4 MiB");
    }
}

#[test]
fn what_a_disk_cannot_do_is_told_as_a_client_expects() {
    let served = Served::resizable();
    let mut client = served.ready();
    // A raw disk in memory has one size. ENOTSUP is for what was to be fast, and for nothing else.
    client.send(&request(RESIZE, 1, SIZE_BYTES * 2, 0));
    assert_eq!(client.answer(), (EINVAL, 1));
}
