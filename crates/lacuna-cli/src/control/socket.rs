//! The socket file: only its owner's, and a thread for each of a few clients.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

use super::{Control, session};
use crate::error::CliResult;
use crate::verbs::serve::remove_own;

/// Clients at once; more are told so.
const MOST_CLIENTS: usize = 16;
/// How long accepting rests where the host has no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket file that is gone when this is dropped.
pub(crate) struct Socket(PathBuf);

impl Socket {
    /// Listens. A socket file that nobody listens on any more is replaced.
    pub(crate) fn listen(control: Arc<Control>, path: &Path) -> CliResult<Self> {
        let listener = bound(path).map_err(|error| {
            lacuna::Error::io(error, format!("Listening for control on {}", path.display()))
        })?;
        let socket = Self(path.to_owned());
        thread::spawn(move || accept(&control, &listener));
        Ok(socket)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        remove_own(&self.0);
    }
}

fn bound(path: &Path) -> io::Result<UnixListener> {
    lacuna_export::remove_stale(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file gets the mode of the socket, so that there is no moment in which others may connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, MOST_CLIENTS as i32)?;
    Ok(UnixListener::from(socket))
}

fn accept(control: &Arc<Control>, listener: &UnixListener) {
    let clients = Arc::new(AtomicUsize::new(0));
    for socket in listener.incoming() {
        let Ok(socket) = socket else {
            thread::sleep(PAUSE);
            continue;
        };
        if clients.fetch_add(1, Ordering::SeqCst) >= MOST_CLIENTS {
            clients.fetch_sub(1, Ordering::SeqCst);
            // It may have left already.
            drop(session::refuse(&socket, MOST_CLIENTS));
            continue;
        }
        let place = Place(Arc::clone(&clients));
        let control = Arc::clone(control);
        // Without a thread the client sees the end of the stream.
        drop(thread::Builder::new().name("control".into()).spawn(move || {
            talk(&control, &socket);
            drop(place);
        }));
    }
}

fn talk(control: &Control, socket: &UnixStream) {
    // What a client did wrong, or that it left, ends its own session only.
    drop(session::serve(control, socket));
}

/// A client's place, given back however its thread ends.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
