//! Layers and test drivers that options put on and under a disk: `blkdebug`, `compress`,
//! `copy-on-read`, as qemu-io has them.

mod common;

use common::{Sandbox, both_in};

/// Images, and files with rules: right ones (`c5`) and wrong ones.
const PREPARE: &str = r#"
    stock-img create -q -f qcow2 a.qcow2 64M
    stock-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
    stock-img create -q -f qcow2 c.qcow2 64M
    stock-img create -q r.raw 1M
    stock-io -f qcow2 -c 'write -P 5 0 192k' -c 'write -P 6 1M 64k' a.qcow2
    printf '[inject-error]\nevent = "foo"\n' > c1
    printf '[foo]\nevent = "read_aio"\n' > c2
    printf '[inject-error]\nevent = "read_aio"\nfoo = "1"\n' > c3
    printf '[inject-error]\nerrno = "5"\n' > c4
    printf '# comment\n[inject-error]\nevent = "read_aio"\nstate = "1"\nerrno = "28"\n' > c5
    printf 'once = "on"\n\n[set-state]\nevent = "read_aio"\nstate = "1"\nnew_state = "2"\n' >> c5
    printf 'garbage\n' > c6"#;

fn prepared() -> (Sandbox, Sandbox) {
    let folders = (Sandbox::stock(), Sandbox::ours());
    folders.0.prepare(PREPARE);
    folders.1.prepare(PREPARE);
    folders
}

#[test]
fn layers_and_test_drivers_behave_as_with_qemu_io() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        r#"
        qemu-io -C -c 'read -P 5 0 64k' -c map b.qcow2
        qemu-io -C -r -c 'read -P 5 0 64k' b.qcow2
        qemu-io -C -c 'read 4M 1M' -c 'read 192k 64k' -c map b.qcow2
        qemu-io -C -c 'read 1M 512' -c 'read 0 0' -c map b.qcow2
        qemu-io -C -c 'read 0 4M' -c map a.qcow2
        qemu-io -C -c 'read 63M 2M' a.qcow2
        qemu-io -c 'open -C b.qcow2' -c 'aio_read 8M 64k' -c 'aio_flush' -c map
        qemu-io -c 'open -o driver=copy-on-read,file.driver=qcow2,file.file.filename=b.qcow2' -c 'read 10M 512' -c map
        qemu-img check b.qcow2
        qemu-io -c 'open -o driver=compress' 
        qemu-io -c 'open -o driver=compress,file.driver=raw,file.file.filename=r.raw' -c 'write 0 512'
        qemu-io -c 'open -o driver=compress,file.driver=qcow2,file.file.filename=c.qcow2' -c 'write -P 1 0 100k' -c 'write -P 2 128k 300k' -c 'read -P 1 0 100k' -c 'read -P 2 128k 300k' -c 'write 63M 2M'
        qemu-img check --output=json c.qcow2
        qemu-img map --output=json c.qcow2
        qemu-io -c 'break write_aio A' -c 'resume A' -c 'remove_break A' a.qcow2
        qemu-io -c 'break' -c 'break x' -c 'resume' -c wait_break -c remove_break a.qcow2 2>&1 | sort
        qemu-io -f qcow2 -c 'read 0 512' blkdebug:c1:a.qcow2
        qemu-io -f qcow2 -c 'read 0 512' blkdebug:c2:a.qcow2
        qemu-io -f qcow2 -c 'read 0 512' blkdebug:c3:a.qcow2
        qemu-io -f qcow2 -c 'read 0 512' blkdebug:c4:a.qcow2
        qemu-io -f qcow2 -c 'read 0 512' -c 'read 0 512' -c 'read 0 512' blkdebug:c5:a.qcow2
        qemu-io -f qcow2 -c 'read 0 512' blkdebug:c6:a.qcow2
        qemu-io -f qcow2 -c 'read 0 512' blkdebug:nope:a.qcow2
        qemu-io -c 'open -o file.driver=blkdebug,file.image.filename=a.qcow2,file.align=5'
        qemu-io -c 'open -o file.driver=blkdebug,file.image.filename=a.qcow2,file.align=4k,file.max-transfer=5000'
        qemu-io -c 'open -o file.driver=blkdebug,file.image.filename=a.qcow2,file.foo=5'
        qemu-io -c 'open -o file.driver=blkdebug,file.image.filename=a.qcow2,file.inject-error.0.event=foo'
        qemu-io -c 'open -o file.driver=blkdebug,file.image.filename=a.qcow2,file.inject-error.0.errno=5'
        qemu-io -c 'open -o file.driver=blkdebug,file.image.filename=a.qcow2,file.inject-error.0.event=read_aio,file.inject-error.0.foo=5'
        qemu-io -c 'open -o file.driver=blkdebug,file.image.filename=a.qcow2,file.inject-error.0.event=read_aio,file.inject-error.0.sector=x'
        qemu-io -c 'open -o driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,file.inject-error.0.event=read_aio,file.inject-error.0.errno=28,file.inject-error.0.once=on' -c 'read 0 512' -c 'read 0 512'
        qemu-io -c 'open -o driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,file.inject-error.0.event=write_aio,file.inject-error.0.iotype=write' -c 'read 0 512' -c 'write 0 512' 2>/dev/null
        qemu-io -c 'open -o driver=blkdebug,image.driver=qcow2,inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.errno=28 a.qcow2' -c 'write 0 512' -c 'read 0 512' -c 'write -z 0 512'
        qemu-io -c 'open -o driver=blkdebug,image.driver=qcow2,inject-error.0.event=none,inject-error.0.sector=4 a.qcow2' -c 'read 0 512' -c 'read 1k 2k' -c 'flush'
        qemu-io -c 'open -C -o driver=blkdebug,image.driver=qcow2,inject-error.0.event=cor_write,inject-error.0.iotype=write a.qcow2' -c 'read 0 512' -c 'read 0 512'
        qemu-io -c 'open blkdebug:'
        qemu-io -c 'open blkdebug::nope'
        qemu-io -c 'open blkdebug:x'
        qemu-io -c 'open -o driver=blkdebug'
        qemu-img info blkdebug:c5:a.qcow2 | head -4
        qemu-img compare blkdebug::a.qcow2 a.qcow2
        qemu-io -c 'open -o driver=blkdebug,image.driver=qcow2,align=4k,max-transfer=64k blkdebug::c.qcow2' -c 'write -P 33 1000 128k' -c 'read -P 33 1000 128k' -c 'discard 1M 1M' -c 'write -z 2M 1M' -c 'read -P 0 2M 1M' -c length
        qemu-io -c 'read 0 64k' --image-opts driver=blkdebug,image.filename=a.qcow2
        qemu-io -c 'read 0 64k' --image-opts driver=blkdebug,image=a.qcow2
        "#,
    );
}

#[test]
fn a_request_waits_at_a_breakpoint_while_others_go_on() {
    let (_, ours) = prepared();
    let got = ours.run(
        r"printf 'break write_aio A\naio_write -P 4 0 4k\nwait_break A\nread -P 5 64k 64k\n\
resume A\naio_flush\nread -P 4 0 4k\nwait_break A\n' | qemu-io -f qcow2 blkdebug::a.qcow2",
    );
    let text: Vec<&str> = got.text.split("qemu-io> ").flat_map(str::lines).collect();
    let at = |wanted: &str| {
        let found = text.iter().position(|line| line.starts_with(wanted));
        found.unwrap_or_else(|| panic!("{wanted}: {got:?}"))
    };
    assert!(at("blkdebug: Suspended request 'A'") < at("read 65536/65536"));
    assert!(at("read 65536/65536") < at("blkdebug: Resuming request 'A'"));
    assert!(at("blkdebug: Resuming request 'A'") < at("wrote 4096/4096"));
    assert!(at("wrote 4096/4096") < at("read 4096/4096"));
    // Nothing is in flight that could ever come there.
    assert!(got.text.contains("No request in flight can come to breakpoint A"), "{got:?}");
}

/// The first has read the block that the second changes; the third, of whole blocks, is in nobody's way.
#[test]
fn writes_of_parts_of_one_block_do_not_undo_each_other() {
    let (_, ours) = prepared();
    ours.prepare(
        "stock-img create -q -f raw blocks 1M; stock-io -f raw -c 'write -P 9 0 64k' blocks",
    );
    let got = ours.run(
        r"printf 'open -o driver=raw,file.align=4k blkdebug::blocks\nbreak pwritev_rmw_after_tail A\n\
aio_write -P 1 512 512\nwait_break A\naio_write -P 2 1024 3584\naio_write -P 3 8k 4k\n\
resume A\naio_flush\nbreak pwritev A\naio_write -P 4 20k 1k\nsleep 1\nresume A\n' | qemu-io",
    );
    assert!(!got.text.contains("Could not"), "{got:?}");
    let got = ours.run(
        "stock-io -f raw -c 'read -P 9 0 512' -c 'read -P 1 512 512' -c 'read -P 2 1k 3584' \
         -c 'read -P 9 4608 3584' -c 'read -P 3 8k 4k' -c 'read -P 9 12k 8k' -c 'read -P 4 20k 1k' \
         -c 'read -P 9 21k 43k' blocks",
    );
    assert!(got.code == Some(0) && !got.text.contains("failed"), "{got:?}");
}

#[test]
fn a_session_ends_though_a_request_waits() {
    let (_, ours) = prepared();
    let got =
        ours.run("lacuna io -f qcow2 -c 'break write_aio A' -c 'aio_write 0 4k' blkdebug::a.qcow2");
    assert!(got.text.contains("wrote 4096/4096"), "{got:?}");
}

#[test]
fn what_is_written_through_is_there_after_a_kill() {
    let (_, ours) = prepared();
    for (mode, write) in [("writethrough", "write"), ("directsync", "aio_write")] {
        let line = format!(
            "qemu-io -t {mode} -c '{write} -P 9 0 64k' -c aio_flush -c 'sigraise 9' b.qcow2; true"
        );
        ours.prepare(&line);
        let got = ours.run("stock-io -f qcow2 -c 'read -P 9 0 64k' b.qcow2");
        assert!(got.code == Some(0) && !got.text.contains("failed"), "{mode}: {got:?}");
        ours.prepare("stock-io -f qcow2 -c 'write -P 5 0 64k' b.qcow2");
    }
}
