//! `io` against qemu-io: the same commands on copies of one image give the same words and bytes.

mod common;

use common::{Sandbox, both, both_in};

/// Commands that need an image, right and wrong.
const COMMANDS: [&str; 100] = [
    "write 0 64k",
    "write -P 5 64k 64k",
    "read -P 5 64k 64k",
    "read -P 6 64k 64k",
    "read -P 5 -s 512 -l 512 64k 64k",
    "read -P 5 -s 512k -l 512 64k 64k",
    "read -P 5 -l 0 64k 64k",
    "read -s 512 64k 64k",
    "read -v 64k 40",
    "read 1 1",
    "read 8M 512",
    "read 7M 4M",
    "read -1 5",
    "write -z 128k 64k",
    "write -z -u 128k 64k",
    "write -zn 128k 64k",
    "write -n 0 1k",
    "write -u 0 1k",
    "write -c 256k 64k",
    "write -c 256k 100",
    "write -c -P 7 320k 64k",
    "write -c 321k 64k",
    "write -f 0 1k",
    "write -q 0 1k",
    "write -z -P 4 0 1k",
    "write -s pattern 0 4k",
    "write -s missing 0 4k",
    "write -s pattern -P 4 0 4k",
    "write -p 0 1k",
    "write 0",
    "write",
    "write x 1k",
    "write 0 x",
    "write 0 1k 4",
    "write -Z 0 1k",
    "write -P x 0 1k",
    "write -P 300 0 1k",
    "write -P 0x41 0 1k",
    "read -P 0x41 0 1k",
    "write -P",
    "write -f -c 0 64k",
    "readv 0 1k 2k",
    "readv -P 0x41 0 512 512",
    "readv -P 0x42 0 512 512",
    "readv -v 0 16 16",
    "writev 0 1k 2k",
    "writev -P 9 0 1k 2k",
    "writev 0 1k x",
    "writev 0",
    "writev 1 1",
    "aio_write 0 1k",
    "aio_read 0 1k",
    "aio_read -i 0 1k",
    "aio_write -i 0 1k",
    "rv 0 1k",
    "wv 0 1k",
    "aio_flush",
    "aio_write -P 3 0 512 512",
    "aio_read -P 3 0 1k",
    "aio_read -P 4 0 1k",
    "aio_write -z 0 1k 2k",
    "aio_write -u 0 1k",
    "aio_read 9M 1k",
    "aio_write -q 0 1k",
    "discard 0 64k",
    "discard 0 1",
    "discard 9M 1k",
    "discard 0",
    "discard 0 x",
    "discard -q 0 64k",
    "flush",
    "alloc 0",
    "alloc 0 128k",
    "alloc 64k 64k",
    "alloc 1 64k",
    "alloc 9M",
    "alloc x",
    "alloc 0 x",
    "alloc 1 2 3",
    "map",
    "length",
    "info",
    "foo",
    "help foo",
    "sleep",
    "read 0 1.5k",
    "read 0 0",
    "write 0 3G",
    "write -b -P 5 64k 4k",
    "write -b 100 512",
    "write -b 0 100",
    "write -b -z 0 512",
    "write -b -f 0 512",
    "read -b -P 5 64k 4k",
    "read -b -P 0 60k 4k",
    "read -b -P 5 60k 8k",
    "read -b -v 65024 1k",
    "read -b 100 512",
    "read -b 0 100",
    "read -b -P 0 1G 1M",
];

#[test]
fn each_command_says_what_qemu_io_says() {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    for sandbox in [&stock, &ours] {
        sandbox.prepare("stock-img create -q -f qcow2 image 8M; printf 'some pattern' > pattern");
    }
    let lines: Vec<String> =
        COMMANDS.iter().map(|command| format!("qemu-io -c '{command}' image")).collect();
    both_in(&stock, &ours, &lines.join("\n"));
    ours.prepare("stock-img check image");
    ours.prepare("stock-img check image && stock-img convert image raw");
    stock.prepare("stock-img convert image raw");
    assert!(stock.bytes("raw") == ours.bytes("raw"), "the guest sees other bytes");
}

#[test]
fn a_script_on_standard_input_gets_prompts() {
    both(
        "stock-img create -q -f qcow2 image 8M
         printf 'write -P 1 0 64k\\nread -P 1 0 64k\\nlength\\n' | qemu-io image
         printf 'write -P 1 0 64k\\nfoo\\n  alloc   0   128k\\n\\nquit\\nlength\\n' | qemu-io image
         printf 'length' | qemu-io -f qcow2 image
         printf '' | qemu-io -f qcow2 image
         printf 'length\\nopen image\\nlength\\nclose\\nmap\\nopen -r image\\nwrite 0 1k\\n' | qemu-io",
    );
}

#[test]
fn images_are_opened_and_reopened() {
    both(
        "stock-img create -q -f qcow2 image 8M
         stock-img create -q raw 8M
         qemu-io -c 'open missing'
         qemu-io missing -c 'read 0 1'
         qemu-io -c 'read 0 1k'
         qemu-io -c length -c flush -c close
         qemu-io -f qcow2 -c foo -c length image
         qemu-io -f qcow2 -c quit -c length image
         qemu-io -f foo image -c length
         qemu-io -r -f qcow2 -c 'write 0 1k' image
         qemu-io -c 'open image' image
         qemu-io -c 'reopen -r' -c 'write 0 1k' image
         qemu-io -r -c 'reopen -w' -c 'write 0 1k' image
         qemu-io -c 'reopen -c foo' image
         qemu-io -c 'reopen -o foo=bar' image
         qemu-io -c 'reopen x' image
         qemu-io -c 'open -o driver=qcow2 image' -c length
         qemu-io -c 'open -o driver=qcow2,foo=bar image' -c length
         qemu-io -c 'open -o driver=raw image' -c close
         qemu-io -c 'open -t foo image'
         qemu-io -c 'open -Z image'
         qemu-io -c 'open a b'
         qemu-io --image-opts driver=qcow2,file.filename=image -c length
         qemu-io -t foo image
         qemu-io -i foo image
         qemu-io -d foo image
         qemu-io raw -c 'read 0 1k'
         qemu-io -f raw -c 'write 0 1k' -c map -c info -c 'alloc 0 1M' -c 'write -c 0 64k' raw
         qemu-io -f raw -c 'write -b 0 1k' -c 'read -b 0 1k' raw",
    );
}

#[test]
fn images_change_their_length() {
    both(
        "stock-img create -q -f qcow2 image 8M
         stock-img create -q raw 8M
         qemu-io -c 'truncate 16M' -c length image
         qemu-io -c 'truncate 4M' -c length image
         qemu-io -c 'truncate 5000' image
         qemu-io -c 'truncate x' image
         qemu-io -c 'truncate -m foo 1M' image
         qemu-io -c 'truncate 99999E' image
         qemu-io -f raw -c 'truncate 1M' -c length raw
         qemu-io -f raw -c 'truncate 3M' -c length -c 'read -P 0 1M 2M' raw",
    );
}

#[test]
fn overlays_count_their_own_clusters_only() {
    both(
        "stock-img create -q -f qcow2 base 4M
         stock-io -c 'write 64k 64k' base
         stock-img create -q -f qcow2 -b base -F qcow2 top
         qemu-io -c 'alloc 0 256k' -c map top
         qemu-io -c 'write -z 128k 64k' -c 'alloc 128k 64k' -c map top
         qemu-io -c 'discard 128k 64k' -c map top
         qemu-io -c 'write -P 7 100k 1k' -c 'read -P 205 64k 36k' -c map top",
    );
}

#[test]
fn writes_to_a_snapshot_are_gone_at_the_end() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 image 8M; stock-io -c 'write -P 1 0 64k' image");
    let before = ours.bytes("image");
    ours.prepare(
        "mkdir temporary; TMPDIR=$PWD/temporary qemu-io -s -f qcow2 -c 'write -P 2 0 512' \
         -c 'read -P 2 0 512' -c 'read -P 1 512 63k' image && rmdir temporary",
    );
    assert!(before == ours.bytes("image"));
}

#[test]
fn a_killed_shell_leaves_a_sound_image() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 image 8M");
    let killed = ours.run("qemu-io -f qcow2 -c 'write -P 1 0 64k' -c flush -c 'sigraise 9' image");
    assert_eq!(killed.code, Some(128 + 9), "{}", killed.text);
    ours.prepare("stock-img check image && stock-io -r -f qcow2 -c 'read -P 1 0 64k' image");
}

#[test]
fn asynchronous_requests_are_in_flight_together() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 image 64M");
    let writes: String = (0..64)
        .map(|index| format!("aio_write -q -P {} {}k 64k\n", index + 1, index * 640))
        .collect();
    std::fs::write(ours.path("script"), writes + "aio_flush\n").unwrap();
    ours.prepare("lacuna io -f qcow2 image < script");
    ours.prepare("stock-img check image");
    for index in 0..64 {
        ours.prepare(&format!("stock-io -r -c 'read -P {} {}k 64k' image", index + 1, index * 640));
    }
}

#[test]
fn help_lists_every_command() {
    let ours = Sandbox::ours();
    let help = ours.run("lacuna io -c help").text;
    for command in ["aio_flush", "alloc", "discard", "map", "reopen", "truncate", "writev"] {
        assert!(help.lines().any(|line| line.starts_with(command)), "{command}: {help}");
    }
}

#[test]
fn zeros_over_part_of_a_cluster_zero_all_of_it_where_the_rest_reads_as_zeros() {
    // What the requests cover is not zero below, what they leave of the unit is; but for the last.
    let requests = "-c 'write -z 5k 2k' -c 'write -z 13k 2k' -c 'write -z 21k 2k' \
                    -c 'write -z 27k 2k' -c 'write -z 30k 1k'";
    let written = "-c 'write -P 17 5k 1k' -c 'write -P 17 14k 1k' -c 'write -P 17 21k 2k' \
                   -c 'write -P 17 29k 1k'";
    for unit in ["cluster_size=4k", "cluster_size=128k,extended_l2=on"] {
        both(&format!(
            "qemu-img create -q -f qcow2 -o cluster_size=512 base 64k
             qemu-io -f qcow2 {written} base
             qemu-img create -q -f qcow2 -o {unit} -b base -F qcow2 image
             qemu-io -f qcow2 {requests} image
             qemu-img map --output=json image
             stock-img check image"
        ));
    }
}
