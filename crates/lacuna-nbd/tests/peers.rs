//! Clients that others wrote, against the example server.

#[path = "../examples/serve_zeros.rs"]
#[allow(dead_code, reason = "its main is for the command line")]
mod serve_zeros;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

const SIZE_BYTES: usize = 8 << 20;

/// Serves a fresh disk while `with` runs.
fn served(with: impl FnOnce(&str, &Path)) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let disk = Arc::new(Mutex::new(vec![0; SIZE_BYTES]));
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let (socket, disk) = (socket.unwrap(), Arc::clone(&disk));
            // A client may leave without a word.
            thread::spawn(move || serve_zeros::serve(socket, &disk));
        }
    });
    with(&format!("nbd+unix:///?socket={}", path.display()), folder.path());
}

/// Runs a foreign tool; a missing one is a failure.
fn tool(words: &[&str]) -> String {
    let output = Command::new("timeout")
        .arg("60")
        .args(words)
        // The bindings belong to the system's Python, which need not be the first one.
        .env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()))
        .output()
        .unwrap_or_else(|error| panic!("timeout: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let install = "apt-get install qemu-utils libnbd-bin python3-libnbd";
    assert!(output.status.code() != Some(127), "{} is missing: {install}", words[0]);
    assert!(
        output.status.success(),
        "{words:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[test]
fn qemu_reads_writes_zeroes_and_maps() {
    served(|uri, folder| {
        let commands = [
            "write -P 7 1M 64k",
            "read -P 7 1M 64k",
            "write -f -P 8 3M 4k",
            "write -z 1M 4k",
            "read -P 0 1M 4k",
            "discard 2M 1M",
            "flush",
        ];
        let mut words = vec!["qemu-io", "-f", "raw", uri];
        words.extend(commands.iter().flat_map(|command| ["-c", command]));
        let said = tool(&words);
        assert!(!said.contains("failed"), "{said}");
        let map = tool(&["qemu-img", "map", "--output=json", "-f", "raw", uri]);
        assert_eq!(map.matches("\"data\": true").count(), 2, "{map}");
        let copy = folder.join("copy");
        let copy = copy.to_str().unwrap();
        tool(&["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy]);
        let said = tool(&["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, copy]);
        assert_eq!(said, "Images are identical.\n");
    });
}

#[test]
fn libnbd_sees_what_is_offered() {
    served(|uri, _| {
        let said = tool(&["nbdinfo", uri]);
        for line in [
            "export-size: 8388608",
            "base:allocation",
            "can_df: true",
            "can_fast_zero: true",
            "can_multi_conn: true",
            "block_size_preferred: 4096",
            "A disk in memory",
        ] {
            assert!(said.contains(line), "{line:?} is missing in {said}");
        }
        assert_eq!(tool(&["nbdinfo", "--map", uri]).lines().count(), 1);
        assert!(tool(&["nbdinfo", "--list", uri]).contains("export=\"\""));
    });
}

#[test]
fn libnbd_can_use_every_command_and_flag() {
    served(|uri, _| {
        let script = format!(
            "import nbd\n\
             h.add_meta_context('base:allocation')\n\
             h.connect_uri('{uri}')\n\
             h.pwrite(b'x' * 4096, 8192, nbd.CMD_FLAG_FUA)\n\
             assert h.pread(4096, 8192) == b'x' * 4096\n\
             h.zero(4096, 12288, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)\n\
             h.trim(4096, 8192, nbd.CMD_FLAG_FUA)\n\
             h.cache(4096, 0)\n\
             h.flush()\n\
             seen = []\n\
             h.block_status(1 << 20, 0, lambda c, o, e, r: seen.append(e), nbd.CMD_FLAG_REQ_ONE)\n\
             assert seen == [[1 << 20, 3]], seen\n\
             h.pread_structured(65536, 0, lambda b, o, s, e: 0, nbd.CMD_FLAG_DF)\n\
             h.set_strict_mode(0)\n\
             def fails(number, call):\n\
             \x20   try: call()\n\
             \x20   except nbd.Error as error: assert error.errnum == number, error\n\
             \x20   else: assert False, 'no error'\n\
             import errno\n\
             fails(errno.EINVAL, lambda: h.pread(4096, {SIZE_BYTES}))\n\
             fails(errno.ENOSPC, lambda: h.pwrite(b'x', {SIZE_BYTES}))\n\
             fails(errno.EINVAL, lambda: h.trim(1, {SIZE_BYTES}))\n\
             fails(errno.EINVAL, lambda: h.flush(nbd.CMD_FLAG_DF))\n\
             assert h.pread(1, 0) == b'\\0'\n\
             h.shutdown()\n"
        );
        tool(&["nbdsh", "-c", &script]);
    });
}

#[test]
fn nbdcopy_copies_both_ways() {
    served(|uri, folder| {
        let source = folder.join("source");
        let bytes: Vec<u8> = (0..SIZE_BYTES).map(|n| (n / 70_001) as u8).collect();
        std::fs::write(&source, &bytes).unwrap();
        let target = folder.join("target");
        tool(&["nbdcopy", source.to_str().unwrap(), uri]);
        tool(&["nbdcopy", uri, target.to_str().unwrap()]);
        assert!(std::fs::read(&target).unwrap() == bytes);
    });
}
