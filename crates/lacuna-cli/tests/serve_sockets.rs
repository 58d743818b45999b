//! `serve` on sockets that somebody else opened, on those of virtual machines, and in the
//! background.

mod common;

use common::Sandbox;

const SERVE: &str = "lacuna serve -f qcow2 disk.qcow2";

fn prepared() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(
        "systemd-socket-activate --version >&2 || { echo apt-get install systemd >&2; exit 1; }; \
         stock-img create -q -f qcow2 disk.qcow2 8M",
    );
    sandbox
}

/// A shell that starts a server as systemd would, for its own process.
fn activated(count: &str, line: &str) -> String {
    format!("sh -c 'LISTEN_FDS={count} LISTEN_PID=$$ exec {line}'")
}

#[test]
fn sockets_that_systemd_opened_are_served() {
    let sandbox = prepared();
    let got = sandbox.run(&format!(
        "systemd-socket-activate -l $PWD/a -l $PWD/b {SERVE} -t --pid-file pid >where 2>/dev/null & \
         awaited b; \
         for it in b a b; do nbdinfo --size nbd+unix:///?socket=$it; done; \
         kill -TERM $(cat pid); wait $!; echo ended with $?; cat where; ls a b"
    ));
    let folder = sandbox.path("");
    let folder = folder.display();
    assert_eq!(
        got.text,
        format!(
            "8388608\n8388608\n8388608\nended with 0\n\
             Listening on {folder}a\nListening on {folder}b\na\nb\n"
        ),
        "whoever opened the sockets removes them"
    );
}

/// The last client ends a server of systemd, which starts it again with the next one.
#[test]
fn a_socket_of_the_internet_may_be_inherited_too() {
    let sandbox = prepared();
    let port = free_port();
    let got = sandbox.run(&format!(
        "systemd-socket-activate -l [::1]:{port} {SERVE} >/dev/null 2>log & \
         while ! grep -q Listening log; do sleep 0.01; done; \
         nbdinfo --size nbd://[::1]:{port}; wait $!; echo ended with $?"
    ));
    assert_eq!(got.text, "8388608\nended with 0\n");
}

#[test]
fn what_is_meant_for_another_process_is_left_alone() {
    let sandbox = prepared();
    let got = sandbox
        .run(&format!("LISTEN_FDS=1 LISTEN_PID=1 {SERVE} --run 'nbdinfo --size $uri' 3</dev/null"));
    assert_eq!((got.code, &*got.text), (Some(0), "8388608\n"));
}

#[test]
fn contradictions_are_told_in_the_words_of_qemu_nbd() {
    let sandbox = prepared();
    for (options, what) in [
        ("-k $PWD/s", "Unix socket"),
        ("-b 127.0.0.1", "The interface"),
        ("-p 12345", "TCP port number"),
    ] {
        for program in ["lacuna serve", "stock-nbd"] {
            let line = activated("1", &format!("{program} {options} -f qcow2 disk.qcow2"));
            let line = line + " 3</dev/null";
            let got = sandbox.run(&line);
            let expected = format!("{what} can't be set when using socket activation\n");
            assert_eq!(got.code, Some(1), "{line}: {}", got.text);
            assert!(got.text.contains(&expected), "{line}: {}", got.text);
        }
    }
    for (line, expected) in [
        (activated("1", &format!("{SERVE} --run true")), "A command to run can't be set"),
        (activated("1", &format!("{SERVE} --vsock 5")), "The vsock address can't be set"),
        (activated("1", SERVE) + " 3</dev/null", "Descriptor 3 (LISTEN_FDS) is no socket"),
        (activated("4000000000", SERVE), "more than 256 sockets"),
        (format!("{SERVE} --vsock 5 -k s"), "--socket and --vsock are mutually exclusive"),
        (format!("{SERVE} --vsock x:5"), "Invalid CID of --vsock"),
        (format!("{SERVE} --fork --run true"), "--fork and --run are mutually exclusive"),
    ] {
        let got = sandbox.run(&line);
        assert_eq!(got.code, Some(1), "{line}: {}", got.text);
        assert!(got.text.contains(expected), "{line}: {}", got.text);
    }
}

#[test]
fn a_server_in_the_background_is_there_when_the_command_returns() {
    let sandbox = prepared();
    // Nobody holds the pipe that this waits for, and no loop waits for the socket.
    let got = sandbox.run(&format!(
        "said=$({SERVE} --fork -t -k s --pid-file pid 2>&1); echo $? $said; \
         nbdinfo --size nbd+unix:///?socket=s; \
         kill -TERM $(cat pid); while [ -e pid ]; do sleep 0.01; done; ls s 2>/dev/null"
    ));
    assert_eq!(got.text, "0 Listening on s\n8388608\n");
}

#[test]
fn a_server_that_cannot_serve_says_so_before_the_command_returns() {
    let sandbox = prepared();
    for (line, expected) in [
        ("lacuna serve --fork -k s -f qcow2 missing", "missing"),
        ("lacuna serve --fork -k none/s -f qcow2 disk.qcow2", "Listening on none/s"),
        ("lacuna serve --fork -k s -e x -f qcow2 disk.qcow2", "Invalid shared specified"),
        ("lacuna serve --fork -k s --bogus disk.qcow2", "unrecognized option"),
    ] {
        let got = sandbox.run(&format!("said=$({line} 2>&1); echo $? \"$said\""));
        assert!(got.text.starts_with("1 lacuna") && got.text.contains(expected), "{}", got.text);
    }
}

#[test]
fn sockets_of_systemd_reach_a_server_in_the_background() {
    let sandbox = prepared();
    let got = sandbox.run(&format!(
        "systemd-socket-activate -l $PWD/a {SERVE} --fork --pid-file pid >/dev/null 2>&1 & \
         awaited a; \
         nbdinfo --size nbd+unix:///?socket=a; wait $!; echo returned $?; \
         while [ -e pid ]; do sleep 0.01; done"
    ));
    assert_eq!(got.text, "8388608\nreturned 0\n");
}

/// A machine without such sockets cannot listen, and says where it tried.
#[test]
fn virtual_machines_are_listened_for() {
    let sandbox = prepared();
    let port = 20_000 + std::process::id() % 10_000;
    let got = sandbox.run(&format!("{SERVE} --vsock {port} --run 'echo $uri'"));
    match got.code {
        Some(0) => assert_eq!(got.text, format!("nbd+vsock://1:{port}/\n")),
        _ => {
            assert!(got.text.contains(&format!("Listening on vsock:any:{port}: ")), "{}", got.text);
        }
    }
}

#[test]
fn version_6_of_the_internet_is_served() {
    let sandbox = prepared();
    let got = sandbox.run(&format!("{SERVE} -b ::1 -p 0 --run 'echo $uri; nbdinfo --size $uri'"));
    assert!(
        got.text.starts_with("nbd://[::1]:") && got.text.ends_with("\n8388608\n"),
        "{}",
        got.text
    );
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("[::1]:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn qemu_nbd_in_the_background_and_on_sockets_of_systemd() {
    let (stock, ours) = (Sandbox::stock(), prepared());
    stock.prepare("stock-img create -q -f qcow2 disk.qcow2 8M");
    // The first server may take a moment to end, and holds its disk.
    stock.prepare("cp disk.qcow2 first.qcow2");
    ours.prepare("cp disk.qcow2 first.qcow2");
    let script = "qemu-nbd --fork -k $PWD/s -t --pid-file=pid -f qcow2 first.qcow2
         nbdinfo --size nbd+unix:///?socket=s
         kill $(cat pid)
         qemu-nbd --fork -k $PWD/s missing.qcow2
         qemu-nbd --fork -k $PWD/none/s -f qcow2 disk.qcow2 2>&1 | sed s,$PWD,,
         systemd-socket-activate -l $PWD/a qemu-nbd -f qcow2 disk.qcow2 >/dev/null 2>&1 & \
         awaited a; nbdinfo --size nbd+unix:///?socket=a; wait $!
         sh -c 'LISTEN_FDS=2 LISTEN_PID=$$ exec qemu-nbd disk.qcow2' 3</dev/null 4</dev/null
         sh -c 'LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd -k $PWD/s disk.qcow2' 3</dev/null
         sh -c 'LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd -b ::1 disk.qcow2' 3</dev/null
         sh -c 'LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd -p 5 disk.qcow2' 3</dev/null
         sh -c 'LISTEN_FDS=1 LISTEN_PID=$$ exec qemu-nbd -L' 3</dev/null";
    common::both_in(&stock, &ours, script);
}
