//! Memory of idle connections under TLS: a program of its own, since others would count.

#![allow(dead_code, reason = "each test program uses its part of these modules")]

#[path = "secure/served.rs"]
mod served;
#[path = "secure/wire.rs"]
mod wire;

use std::io::{Read, Write};

use lacuna_tls::VerifyPeer;

use crate::served::{Served, Wish};
use crate::wire::{read_request, transmitting};

/// Both ends are in this process, so that the bound holds for the server all the more.
#[test]
fn idle_connections_stay_small() {
    const CLIENTS: usize = 200;
    const BOUND: usize = 64 << 10;
    const LEN: u32 = 256 << 10;
    let served = Served::start(Wish::Required, VerifyPeer::On);
    let busy = |count: usize| -> Vec<_> {
        let one = |_| {
            let mut stream = transmitting(&served);
            stream.write_all(&read_request(1, 0, LEN)).unwrap();
            let mut text = vec![0; 16 + LEN as usize];
            stream.read_exact(&mut text).unwrap();
            stream
        };
        (0..count).map(one).collect()
    };
    let first = busy(10);
    let before = resident_bytes();
    let others = busy(CLIENTS);
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown / CLIENTS <= BOUND, "{} bytes for each connection", grown / CLIENTS);
    drop((first, others));
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
