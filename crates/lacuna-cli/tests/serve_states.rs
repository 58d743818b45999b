//! What is true when a connection is made, and what changes while it lasts.

mod client;
mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use client::{Client, Served, range};
use common::Sandbox;
use lacuna_nbd::Command;
use lacuna_nbd::client::Headers;
use lacuna_nbd::wire::{ErrorCode, InitState, TransmissionFlags};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// What a client hears that comes now.
fn state(served: &Served<'_>, export: &str) -> InitState {
    Client::new(&served.socket(), export, &[]).info().init_state
}

/// Serves `words` and returns what a client hears.
fn state_of(sandbox: &Sandbox, words: &str) -> InitState {
    state(&Served::start(sandbox, words), "")
}

#[test]
fn a_new_disk_is_zeros_until_somebody_writes_and_again_when_it_is_zeroed() {
    let sandbox = Sandbox::ours();
    sandbox.prepare("stock-img create -q -f qcow2 new 8M; stock-img create -q -f raw raw 8M");
    let all = InitState::ZERO | InitState::SPARSE;
    for words in ["-f qcow2 new", "-f raw raw"] {
        let served = Served::start(&sandbox, words);
        assert_eq!(state(&served, ""), all, "{words}");
        let mut writer = Client::new(&served.socket(), "", &[]);
        let mut held = Client::new(&served.socket(), "", &[]);
        writer.write(5 * MIB, &[1; 512]);
        assert!(!state(&served, "").contains(InitState::ZERO), "{words}: never stale");
        assert_eq!(held.info().init_state, all, "what was true when it came");
        assert_eq!(held.ask(Command::WriteZeroes, range(0, 8 * MIB)).error, None);
        assert_eq!(state(&served, ""), all, "{words}: zeroed");
    }
}

/// A handshake byte by byte: nobody's library is between.
struct Haggler(UnixStream);

impl Haggler {
    const IHAVEOPT: &[u8] = b"IHAVEOPT";
    const INFO: u32 = 6;

    fn new(served: &Served<'_>) -> Self {
        let mut socket = UnixStream::connect(served.socket()).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting[..16], *b"NBDMAGICIHAVEOPT");
        socket.write_all(&1_u32.to_be_bytes()).unwrap();
        Self(socket)
    }

    /// Asks what the default export is like, and returns the payloads of the answers.
    fn info(&mut self, wanted: &[u16]) -> Vec<Vec<u8>> {
        let mut data = vec![0; 4];
        data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
        data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
        let header = [Self::INFO, u32::try_from(data.len()).unwrap()].map(u32::to_be_bytes);
        self.0.write_all(&[Self::IHAVEOPT, &header.concat(), &data].concat()).unwrap();
        let mut payloads = Vec::new();
        loop {
            let mut reply = [0; 20];
            self.0.read_exact(&mut reply).unwrap();
            let word = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
            let mut payload = vec![0; word(16) as usize];
            self.0.read_exact(&mut payload).unwrap();
            match word(12) {
                1 => return payloads,
                3 => payloads.push(payload),
                other => panic!("reply {other:#x}"),
            }
        }
    }
}

#[test]
fn on_the_wire_the_state_is_two_words_for_who_asks_and_never_stale() {
    let sandbox = Sandbox::ours();
    sandbox.prepare("stock-img create -q -f qcow2 new 8M");
    let served = Served::start(&sandbox, "-f qcow2 new");
    let mut haggler = Haggler::new(&served);
    let is_state = |payload: &&Vec<u8>| payload[..2] == [0, 4];
    let mut state = |wanted: &[u16]| haggler.info(wanted).iter().find(is_state).cloned();
    assert_eq!(state(&[]), None);
    assert_eq!(state(&[3, 4]), Some(vec![0, 4, 0, 0b11]));
    Client::new(&served.socket(), "", &[]).write(MIB, &[1; 512]);
    assert_eq!(state(&[4]), Some(vec![0, 4, 0, 0b01]), "somebody wrote in between");
}

#[test]
fn preallocated_disks_are_zeros_where_that_is_known() {
    let sandbox = Sandbox::ours();
    for mode in ["off", "metadata", "falloc", "full"] {
        sandbox.prepare(&format!(
            "stock-img create -q -f qcow2 -o preallocation={mode} {mode} 4M
             lacuna create -q -f qcow2 -o preallocation={mode},zero_claims=on {mode}-claims 4M"
        ));
        let told = state_of(&sandbox, &format!("-f qcow2 {mode}"));
        // Bytes that were written are not looked at; a claim is enough.
        assert_eq!(told.contains(InitState::ZERO), mode != "full", "{mode}: {told:?}");
        let claimed = Served::start(&sandbox, &format!("-f qcow2 {mode}-claims"));
        assert!(state(&claimed, "").contains(InitState::ZERO), "{mode}");
        Client::new(&claimed.socket(), "", &[]).write(0, &[1; 512]);
        assert!(!state(&claimed, "").contains(InitState::ZERO), "{mode}: the claim is gone");
    }
}

#[test]
fn snapshots_overlays_and_read_only_disks_tell_of_themselves() {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e
        stock-img create -q -f qcow2 disk 8M; stock-img snapshot -c empty disk
        stock-io -f qcow2 -c 'write 0 64k' disk >&2; stock-img snapshot -c full disk
        stock-img create -q -f qcow2 zeros 4M
        stock-img create -q -f qcow2 -b zeros -F qcow2 over-zeros 8M
        stock-img create -q -f qcow2 -b disk -F qcow2 over-data",
    );
    for (words, is_zero) in [
        ("-l empty disk", true),
        ("-l full disk", false),
        ("-r disk", false),
        ("-r zeros", true),
        ("over-zeros", true),
        ("over-data", false),
        ("-s zeros", true),
        ("-s disk", false),
    ] {
        let told = state_of(&sandbox, words);
        assert_eq!(told.contains(InitState::ZERO), is_zero, "{words}: {told:?}");
    }
    let served = Served::start(&sandbox, "-r a=zeros b=disk c=over-zeros");
    let told = ["a", "b", "c"].map(|name| state(&served, name).contains(InitState::ZERO));
    assert_eq!(told, [true, false, true]);
}

#[test]
fn a_disk_of_zeros_is_one_extent() {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "set -e
        stock-img create -q -f qcow2 new 8T; truncate -s 8T raw
        lacuna create -q -f qcow2 -o preallocation=metadata,zero_claims=on,cluster_size=2M claims 64G
        stock-img create -q -f qcow2 -b new -F qcow2 over",
    );
    for (words, size) in [
        ("-f qcow2 new", 8 * TIB),
        ("-f raw raw", 8 * TIB),
        ("over", 8 * TIB),
        ("claims", TIB / 16),
    ] {
        let served = Served::start(&sandbox, words);
        let contexts = ["base:allocation"];
        let extents = Client::new(&served.socket(), "", &contexts).status(range(0, size));
        assert_eq!((extents.len(), extents[0].0, extents[0].1 & 2), (1, size, 2), "{words}");
        // 32 bits cannot say more.
        let most = (1 << 32) - 64 * KIB;
        let short = Client::with(&served.socket(), "", Headers::Structured, &contexts)
            .status(range(0, most));
        assert_eq!((short.len(), short[0].0), (1, most), "{words}");
    }
}

#[test]
fn one_client_grows_the_disk_and_another_uses_it() {
    let sandbox = Sandbox::ours();
    sandbox.prepare("stock-img create -q -f qcow2 disk 4M");
    let served = Served::start(&sandbox, "--resize -f qcow2 disk");
    let connect = || Client::new(&served.socket(), "", &["base:allocation"]);
    let (mut one, mut other) = (connect(), connect());
    assert!(one.info().flags.contains(TransmissionFlags::SEND_RESIZE));
    one.write(0, &[1; 512]);
    assert_eq!(one.ask(Command::Resize, range(64 * MIB, 0)).error, None);
    assert_eq!(one.info().size_bytes, 64 * MIB);
    one.write(63 * MIB, &[7; 4096]);
    // Who did not ask learns by asking for that size, which changes nothing.
    assert_eq!(other.info().size_bytes, 4 * MIB);
    assert_eq!(other.ask(Command::Resize, range(64 * MIB, 0)).error, None);
    assert_eq!(other.ask(Command::Read, range(63 * MIB, 4096)).bytes, [7; 4096]);
    assert_eq!(connect().info().size_bytes, 64 * MIB);
    // Smaller again: what is cut off is gone, whoever asks.
    assert_eq!(other.ask(Command::Resize, range(MIB, 0)).error, None);
    assert_eq!(one.ask(Command::Read, range(63 * MIB, 512)).error, Some(ErrorCode::EINVAL));
    assert_eq!(one.ask(Command::Resize, range(64 * MIB, 0)).error, None);
    assert_eq!(one.ask(Command::Read, range(63 * MIB, 4096)).bytes, [0; 4096]);
    drop((one, other));
    drop(served);
    let got = sandbox.run("stock-img check disk; stock-img info disk | grep 'virtual size'");
    assert!(
        got.text.contains("No errors") && got.text.contains("(67108864 bytes)"),
        "{}",
        got.text
    );
}

#[test]
fn bitmaps_of_a_disk_that_grows_cover_it() {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "stock-img create -q -f qcow2 disk 4M; stock-img bitmap --add disk b
         stock-img create -q -f qcow2 other 4M; stock-img bitmap --add other b",
    );
    let served = Served::start(&sandbox, "--resize a=disk b=other");
    let context = "qemu:dirty-bitmap:b";
    let connect = |export| Client::new(&served.socket(), export, &[context]);
    let (mut one, mut other) = (connect("a"), connect("b"));
    assert_eq!(one.ask(Command::Resize, range(64 * MIB, 0)).error, None);
    one.write(MIB, &[1; 512]);
    let grain = 64 * KIB;
    // What a disk grows by counts as changed.
    let expected = [(MIB, 0), (grain, 1), (3 * MIB - grain, 0), (60 * MIB, 1)];
    assert_eq!(one.status(range(0, 64 * MIB)), expected);
    assert_eq!(other.status(range(0, 4 * MIB)), [(4 * MIB, 0)], "the other export is as it was");
    assert_eq!(connect("b").info().size_bytes, 4 * MIB);
    drop((one, other));
    drop(served);
    let told = sandbox.run(
        "stock-nbd -k $PWD/s -r -f qcow2 -B b disk & awaited s
         nbdinfo --map=qemu:dirty-bitmap:b nbd+unix:///?socket=s; wait",
    );
    assert!(told.text.contains("   1048576       65536    1  dirty\n"), "{}", told.text);
    assert!(told.text.contains("   4194304    62914560    1  dirty\n"), "{}", told.text);
}

#[test]
fn sizes_stay_where_nobody_allowed_more() {
    let sandbox = Sandbox::ours();
    sandbox.prepare("stock-img create -q -f qcow2 disk 4M; stock-img create -q -f raw raw 4M");
    for words in ["-f qcow2 disk", "--resize -r -f qcow2 disk"] {
        let served = Served::start(&sandbox, words);
        let client = Client::new(&served.socket(), "", &[]);
        assert!(!client.info().flags.contains(TransmissionFlags::SEND_RESIZE), "{words}");
    }
    let served = Served::start(&sandbox, "--resize -f raw raw");
    let refused = Client::new(&served.socket(), "", &[]).ask(Command::Resize, range(MIB, 0)).error;
    assert_eq!(refused, Some(ErrorCode::EINVAL), "ENOTSUP is an answer to FAST_ZERO only");
    drop(served);
    let served = Served::start(&sandbox, "--resize -f qcow2 disk");
    let mut client = Client::new(&served.socket(), "", &[]);
    assert!(client.ask(Command::Resize, range(1 << 62, 0)).error.is_some(), "past what L1 can map");
    assert_eq!(client.ask(Command::Resize, range(8 * MIB, 0)).error, None);
}

#[test]
fn a_disk_turns_where_the_kernel_says_that_the_device_below_does() {
    let sandbox = Sandbox::ours();
    sandbox.prepare("stock-img create -q -f qcow2 disk 4M");
    let kernel = sandbox.run(
        "device=/sys/dev/block/$((0x$(stat -c %D disk) >> 8)):$((0x$(stat -c %D disk) & 255))
         cat $device/queue/rotational $device/../queue/rotational 2>/dev/null | head -1",
    );
    let served = Served::start(&sandbox, "disk");
    let flags = Client::new(&served.socket(), "", &[]).info().flags;
    assert_eq!(flags.contains(TransmissionFlags::ROTATIONAL), kernel.text == "1\n");
}
