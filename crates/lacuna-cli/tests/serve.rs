//! Disks over NBD, seen by stock clients.

mod common;

use common::Sandbox;

const IMAGES: &str = "
    set -e
    stock-img create -q -f qcow2 base.qcow2 4M
    stock-io -f qcow2 -c 'write -P 5 0 1M' base.qcow2 >&2
    stock-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2 8M
    stock-io -f qcow2 -c 'write -P 7 1M 64k' -c 'write -z 2M 1M' disk.qcow2 >&2
    stock-img create -q -f raw disk.raw 1M";

fn prepared() -> Sandbox {
    let sandbox = Sandbox::ours();
    sandbox.prepare(IMAGES);
    sandbox
}

#[test]
fn a_command_gets_the_uri_and_its_exit_code_is_ours() {
    let sandbox = prepared();
    let got = sandbox.run("lacuna serve -f qcow2 disk.qcow2 --run 'nbdinfo --size $uri; exit 7'");
    assert_eq!((got.code, &*got.text), (Some(7), "8388608\n"));
    let got = sandbox.run("lacuna serve a=disk.qcow2 b=disk.raw --run 'nbdinfo --list $uri'");
    assert_eq!(got.code, Some(0), "{}", got.text);
    for export in ["export=\"a\"", "export=\"b\""] {
        assert!(got.text.contains(export), "{}", got.text);
    }
}

#[test]
fn a_server_that_is_to_end_ends_its_command_and_writes_everything() {
    let sandbox = prepared();
    let command = "stock-io -f raw -c \"write -P 9 0 64k\" $uri >out; : >up; exec sleep 20";
    let got = sandbox.run(&format!(
        "lacuna serve -f qcow2 disk.qcow2 --run '{command}' & server=$!
         while ! [ -e up ]; do sleep 0.01; done; kill $server; wait $server"
    ));
    assert_eq!((got.code, &*got.text), (Some(1), ""));
    let got = sandbox.run("stock-io -c 'read -P 9 0 64k' disk.qcow2 && stock-img check disk.qcow2");
    assert!(got.code == Some(0) && !got.text.contains("failed"), "{}", got.text);
}

#[test]
fn a_command_that_hears_no_signal_is_killed_by_the_second_with_all_that_it_started() {
    let sandbox = prepared();
    let command = "trap \"\" TERM; sleep 1000 & echo $! >child; : >up; \
                   while :; do sleep 1; done";
    let got = sandbox.run(&format!(
        "lacuna serve -f qcow2 disk.qcow2 --run '{command}' & server=$!
         while ! [ -e up ]; do sleep 0.01; done
         while kill $server 2>/dev/null; do sleep 0.1; done; wait $server; code=$?
         ! grep -q '^State:.[RSD]' /proc/$(cat child)/status 2>/dev/null || echo it runs
         stock-img check -q disk.qcow2; exit $code"
    ));
    assert_eq!(got.code, Some(1));
    assert_eq!(got.text.matches("it is killed").count(), 1, "{}", got.text);
    assert!(!got.text.contains("it runs"), "{}", got.text);
}

#[test]
fn a_close_that_fails_is_told_also_where_serving_failed() {
    let sandbox = prepared();
    let got = sandbox.run(
        "lacuna serve -k nowhere/sock --image-opts driver=raw,file.driver=blkdebug,\
         file.image.driver=file,file.image.filename=disk.raw,file.inject-error.0.event=none,\
         file.inject-error.0.iotype=flush,file.inject-error.0.once=off",
    );
    assert_eq!(got.code, Some(1));
    for part in ["Closing the disks: By a rule of blkdebug", "Listening on nowhere/sock: No such"] {
        assert!(got.text.contains(part), "{}", got.text);
    }
}

#[test]
fn what_clients_write_is_in_the_image_afterwards() {
    let sandbox = prepared();
    let write = "stock-io -f raw -c \"write -P 9 3M 100k\" -c \"discard 0 64k\" $uri";
    let got = sandbox.run(&format!("lacuna serve -f qcow2 disk.qcow2 --run '{write}'"));
    assert_eq!(got.code, Some(0), "{}", got.text);
    let got = sandbox.run("stock-io -c 'read -P 9 3M 100k' -c 'read -P 0 0 64k' disk.qcow2");
    assert!(got.code == Some(0) && !got.text.contains("failed"), "{}", got.text);
    assert_eq!(sandbox.run("stock-img check disk.qcow2").code, Some(0));
}

#[test]
fn a_read_only_export_refuses_changes() {
    let sandbox = prepared();
    let write = "stock-io -f raw -c \"write 0 64k\" $uri";
    let got = sandbox.run(&format!("lacuna serve -r -f qcow2 disk.qcow2 --run '{write}'"));
    assert_ne!(got.code, Some(0), "{}", got.text);
}

#[test]
fn depth_and_allocation_are_those_of_qemu_nbd() {
    let sandbox = prepared();
    for context in ["base:allocation", "qemu:allocation-depth"] {
        let ask = format!("nbdinfo --map={context} $uri");
        let ours = sandbox.run(&format!("lacuna serve -r -f qcow2 disk.qcow2 --run '{ask}'"));
        let theirs = sandbox.run(&format!(
            "stock-nbd -k $PWD/s -r -A -f qcow2 disk.qcow2 & \
             awaited s; uri=nbd+unix:///?socket=s; {ask}; wait"
        ));
        assert_eq!((ours.code, &ours.text), (Some(0), &theirs.text), "{context}");
    }
}

#[test]
fn a_signal_ends_the_server_and_nothing_is_lost() {
    let sandbox = prepared();
    let got = sandbox.run(
        "lacuna serve -t -k s --pid-file pid -f qcow2 disk.qcow2 & \
         while ! [ -s pid ]; do sleep 0.01; done; \
         stock-io -f raw -c 'write -P 3 5M 64k' 'nbd+unix:///?socket=s' >/dev/null; \
         kill -TERM $(cat pid); wait $!; echo ended with $?; ls s pid 2>&1 | wc -l",
    );
    assert!(got.text.contains("ended with 0\n2\n"), "{}", got.text);
    let got = sandbox.run("stock-io -c 'read -P 3 5M 64k' disk.qcow2");
    assert!(!got.text.contains("failed"), "{}", got.text);
}

#[test]
fn without_persistent_the_last_client_ends_the_server() {
    let sandbox = prepared();
    let got = sandbox.run(
        "lacuna serve -p 0 -b 127.0.0.1 -f qcow2 disk.qcow2 > where & \
         while ! [ -s where ]; do sleep 0.01; done; \
         nbdinfo --size nbd://$(sed 's/Listening on //' where); wait $!; echo ended with $?",
    );
    assert_eq!(got.text, "8388608\nended with 0\n");
}

#[test]
fn contradictions_are_refused_with_what_would_be_right() {
    let sandbox = prepared();
    for (line, expected) in [
        ("lacuna serve", "Expecting an image file name"),
        ("lacuna serve a.qcow2 b.qcow2", "name them: lacuna serve a=a.qcow2 b=b.raw"),
        ("lacuna serve -k s -p 1 disk.qcow2", "mutually exclusive"),
        ("lacuna serve -k s x=disk.qcow2 x=disk.raw", "There is an export 'x' already"),
        ("lacuna serve -k none/s disk.qcow2", "Listening on none/s"),
        ("lacuna serve --detect-zeroes=maybe disk.qcow2", "it is off, on, unmap or thorough"),
        ("lacuna serve -k s disk.qcow3", "disk.qcow2 is the nearest"),
    ] {
        let got = sandbox.run(line);
        assert_eq!(got.code, Some(1), "{line}: {}", got.text);
        assert!(got.text.contains(expected), "{line}: {}", got.text);
    }
}
