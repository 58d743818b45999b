//! Files that nobody may open, and who did.

use std::mem::MaybeUninit;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fd::OwnedFd;
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;

/// A file under watch: the kernel tells of everybody who opens it.
pub(crate) struct Trap(OwnedFd);

impl Trap {
    /// Watches a file that is there.
    pub(crate) fn on(path: &Path) -> Self {
        let queue = init(CreateFlags::NONBLOCK).unwrap();
        let flags = WatchFlags::OPEN | WatchFlags::ACCESS | WatchFlags::MODIFY | WatchFlags::ATTRIB;
        add_watch(&queue, path, flags).unwrap();
        Self(queue)
    }

    /// Says whether anybody opened or changed the file since the last question.
    pub(crate) fn was_touched(&self) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.0, &mut buffer);
        let mut touched = false;
        loop {
            match reader.next() {
                Ok(event) => touched |= !event.events().contains(ReadFlags::IGNORED),
                Err(Errno::WOULDBLOCK) => return touched,
                Err(error) => panic!("the watch ended: {error}"),
            }
        }
    }
}

/// A socket that nobody may connect to.
pub(crate) struct DeafSocket(UnixListener);

impl DeafSocket {
    /// Listens at `path`.
    pub(crate) fn at(path: &Path) -> Self {
        let socket = UnixListener::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    /// Says whether somebody connected.
    pub(crate) fn was_called(&self) -> bool {
        self.0.accept().is_ok()
    }
}

#[test]
fn a_trap_notices_who_opens_or_connects() {
    let folder = tempfile::tempdir().unwrap();
    let (file, socket) = (folder.path().join("file"), folder.path().join("socket"));
    std::fs::write(&file, b"secret").unwrap();
    let (trap, deaf) = (Trap::on(&file), DeafSocket::at(&socket));
    assert!(!trap.was_touched() && !deaf.was_called());
    std::fs::metadata(&file).unwrap();
    assert!(!trap.was_touched(), "to look at its name is no harm");
    drop(std::fs::File::open(&file).unwrap());
    let _connection = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    assert!(trap.was_touched() && deaf.was_called());
    assert!(!trap.was_touched(), "each is told once");
}
