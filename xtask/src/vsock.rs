//! A server and clients of ours on a real socket of virtual machines: that of a guest's kernel, whose
//! loopback leads back to the guest. This machine's kernel may have none.

use std::path::Path;

use crate::harness::locate_in;
use crate::run::{built, command, run};
use crate::scratch::Scratch;
use crate::{Outcome, setup};

/// What the kernel needs, besides what a boot does.
const MODULES: &str = "virtio_pci virtio_blk vsock vsock_loopback";
/// The disk that every guest has; nobody uses it.
const UNUSED_DISK_BYTES: u64 = 1 << 20;

/// What the guest runs. CID 1 is where it runs.
const SCRIPT: &str = "\
modprobe vsock_loopback
cd /tmp
head -c 8m /dev/urandom > random
lacuna convert -q -f raw -O qcow2 random served.qcow2
lacuna serve -t --vsock 10809 disk=served.qcow2 -f qcow2 &
server=$!
uri=nbd+vsock://1:10809/disk
tries=0
until lacuna info -f raw $uri; do
    tries=$((tries + 1))
    [ $tries -lt 50 ]
    sleep 0.2
done
lacuna compare -q -f raw -F raw $uri random
lacuna convert -q -f raw -O raw $uri copy
cmp copy random
lacuna io -f raw -c 'write -P 7 1M 64k' -c 'write -z 2M 64k' -c flush $uri
lacuna io -f raw -c 'read -P 7 1M 64k' -c 'read -P 0 2M 64k' $uri
kill $server
wait $server
lacuna check served.qcow2
";

/// Boots a guest that serves a disk to itself.
pub(crate) fn boot(harness: &[String]) -> Outcome {
    let (program, _) = locate_in("guest", "run-guest", harness)?;
    setup::guest()?;
    let beside = |name: &str| program.with_file_name(name).to_string_lossy().into_owned();
    run(command(&beside("setup"), &[]))?;
    let scratch = Scratch::new("vsock")?;
    let (initramfs, disk, script) =
        (scratch.file("initramfs"), scratch.file("disk"), scratch.file("script"));
    std::fs::write(&script, SCRIPT).map_err(|error| format!("cannot write {script}: {error}"))?;
    let made = std::fs::File::create(&disk).and_then(|file| file.set_len(UNUSED_DISK_BYTES));
    made.map_err(|error| format!("cannot make {disk}: {error}"))?;
    let ours = stripped(&built("dev")?, &scratch)?;
    let ours = format!("{ours}:/bin/lacuna");
    let with = ["-o", &initramfs, "-m", MODULES, "-a", &ours];
    run(command(&beside("build-initramfs"), &with))?;
    let disk = format!("raw:{disk}");
    run(command(&program.to_string_lossy(), &["-m", "1024", "-i", &initramfs, &disk, &script]))
}

/// A copy of the binary that fits into a guest's memory.
fn stripped(binary: &Path, scratch: &Scratch) -> Outcome<String> {
    let copy = scratch.file("lacuna");
    run(command("strip", &["-o", &copy, &binary.to_string_lossy()]))?;
    Ok(copy)
}
