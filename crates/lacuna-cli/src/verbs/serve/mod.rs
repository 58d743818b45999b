//! `serve`: disks over NBD, until somebody ends it.
//!
//! * `asked.rs`: what the command line says
//! * `images.rs`: what each image becomes: all of it, a snapshot, a part, an overlay on it
//! * `bitmaps.rs`: which dirty bitmaps are offered
//! * `disk.rs`: an opened chain as a server sees it; `content.rs`: the way of its writes
//! * `point.rs`: a point in time of one, as clients see it
//! * `served.rs`: either of them
//! * `sockets.rs`: sockets that systemd opened, or that virtual machines reach
//! * `tls.rs`: certificates, and who must have one
//! * `sparing.rs`: how many lines clients may cause
//! * `command.rs`: a command to serve for
//! * `fork.rs`: serving in the background
//!
//! Exit codes: 0 ended as asked, with everything written; that of the command with `--run`.

mod asked;
mod bitmaps;
mod command;
mod disk;
pub(crate) mod fork;
mod images;
pub(crate) mod point;
mod served;
pub(crate) mod sockets;
mod sparing;
pub(crate) mod tls;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use lacuna_export::{Address, Export, Exports, Listener, Server, ServerOptions};
use pollster::block_on;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub(crate) use self::asked::{Named, Serving};
pub(crate) use self::bitmaps::BITMAP;
pub(crate) use self::bitmaps::Wish as BitmapWish;
pub(crate) use self::disk::ChainDisk;
use self::fork::Role;
pub(crate) use self::images::{Becomes, disk};
pub(crate) use self::served::Served;
use super::{Example, Task, Verb, common, open, snapshot};
use crate::args::{Flag, Parsed};
use crate::control::{self, Control};
use crate::error::{CliError, CliResult};
use crate::interrupt::Requests;
use crate::output;
use crate::persona::Tool;

/// The verb.
pub(super) const VERB: Verb = Verb {
    name: "serve",
    task: Task::Serve,
    summary: "Serve disks to NBD clients; ctl talks to the server",
    operands: "[NAME=]FILENAME...",
    flags: &[
        Flag::valued('k', "socket", "PATH", "listen on a socket file"),
        Flag::valued('b', "bind", "ADDRESS", "listen on this address (all)"),
        Flag::valued('p', "port", "PORT", "listen on this TCP port (10809)"),
        sockets::VSOCK,
        common::FORMAT,
        common::IMAGE_OPTS,
        READ_ONLY,
        images::LOAD_SNAPSHOT,
        images::SNAPSHOT,
        images::OFFSET,
        images::SIZE,
        BITMAP,
        bitmaps::LAYERS_BITMAP,
        Flag::switch('t', "persistent", "go on when the last client has left"),
        SHARED,
        DESCRIPTION,
        CACHE,
        DISCARD,
        DETECT_ZEROES,
        DEDUP,
        common::DEDUP_MEMORY,
        RESIZE,
        CONTROL,
        Flag::valued('\0', "pid-file", "PATH", "holds the process id while clients can come")
            .long_only(),
        Flag::valued('\0', "max-connections", "NUM", "connections at once (4096)").long_only(),
        Flag::valued('\0', "handshake-timeout", "SECONDS", "how long a handshake may take (10)")
            .long_only(),
        tls::TLS,
        tls::TLS_VERIFY_PEER,
        tls::TLS_OPTIONAL,
        tls::TLS_CREDS,
        tls::TLS_AUTHZ,
        fork::FORK,
        Flag::valued('\0', "run", "COMMAND", "serve only while a shell runs it; $uri is where")
            .long_only(),
        common::FORCE_SHARE,
        common::OBJECT,
        common::PROBE_BACKING,
    ],
    examples: &[
        Example {
            shows: "ask stock tools what they see, with nothing left behind",
            line: "disk.qcow2 --run 'nbdinfo --map $uri'",
        },
        Example {
            shows: "let a guest try something: what it writes is gone at the end",
            line: "-s disk.qcow2 --run 'nbdinfo $uri'",
        },
        Example {
            shows: "more of the server while it runs",
            line: "disk.qcow2 --control c --run 'lacuna ctl --control c connections'",
        },
        Example {
            shows: "two exports for as long as a command runs, changes refused",
            line: "-r a=disk.qcow2 b=disk.raw --run 'nbdinfo --list $uri'",
        },
        Example {
            shows: "encrypted, for clients with a certificate of the same authority",
            line: "--tls pki --tls-verify-peer disk.qcow2 --run 'nbdinfo $uri'",
        },
    ],
    codes: &[],
    run,
};

const READ_ONLY: Flag = Flag::switch('r', "read-only", "refuse changes");
const SHARED: Flag =
    Flag::valued('e', "shared", "NUM", "clients of an export at once (0: any number)");
const DESCRIPTION: Flag =
    Flag::valued('D', "description", "TEXT", "a text about the exports, for people");
const CACHE: Flag = Flag::valued('T', "cache", "MODE", "cache mode of the host (writeback)");
const DISCARD: Flag = Flag::valued('\0', "discard", "MODE", "ignore or unmap (unmap)").long_only();
const DETECT_ZEROES: Flag =
    Flag::valued('\0', "detect-zeroes", "MODE", "off, on, unmap or thorough (off)").long_only();
const DEDUP: Flag = Flag::valued(
    '\0',
    "dedup",
    "off|online",
    "store equal clusters once as they are written (off)",
)
.long_only();
const RESIZE: Flag = Flag::switch('\0', "resize", "let clients change the size").long_only();
const CONTROL: Flag =
    Flag::valued('\0', "control", "PATH", "listen for `lacuna ctl` on a socket file").long_only();

/// The options that are about an export, not about the server.
pub(crate) const OF_EXPORTS: [Flag; 17] = [
    common::FORMAT,
    common::IMAGE_OPTS,
    READ_ONLY,
    images::LOAD_SNAPSHOT,
    images::SNAPSHOT,
    images::OFFSET,
    images::SIZE,
    BITMAP,
    bitmaps::LAYERS_BITMAP,
    SHARED,
    DESCRIPTION,
    CACHE,
    DISCARD,
    DETECT_ZEROES,
    RESIZE,
    common::FORCE_SHARE,
    common::PROBE_BACKING,
];

/// Opens one more image and names it, as [`OF_EXPORTS`] say.
pub(crate) fn export(
    tool: &Tool,
    name: &str,
    file: &str,
    parsed: &Parsed,
) -> CliResult<Export<Served>> {
    let options = asked::export(parsed)?;
    let disks = images::open_all(tool, &[Named::new(name, file)], parsed)?;
    let disk = disks.into_iter().next().ok_or_else(|| CliError::new("No image was opened"))?;
    Ok(Export::new(name, disk.into(), options)?)
}

fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let ready = match parsed.has(fork::FORK.long).then(fork::role).transpose()? {
        Some(Role::Caller(code)) => return Ok(code),
        Some(Role::Child(ready)) => Some(ready),
        None => None,
    };
    let asked = Serving::new(parsed, ready)?;
    let disks = images::open_all(tool, &asked.images, parsed)?;
    until_the_end(tool, asked, disks)
}

/// Serves the disks of the images, in their order, until it is time to end; returns the exit code.
pub(crate) fn until_the_end(tool: &Tool, asked: Serving, disks: Vec<ChainDisk>) -> CliResult<u8> {
    let exports = Arc::new(match asked.only_is_default {
        true => Exports::with_only_as_default(),
        false => Exports::default(),
    });
    for (named, disk) in asked.images.iter().zip(disks) {
        exports.add(Export::new(&named.name, disk.into(), asked.export.clone())?)?;
    }
    let options = ServerOptions {
        limits: asked.limits,
        tls: asked.secured.tls.clone(),
        report: Some(tls::report),
        ..ServerOptions::default()
    };
    let server = Server::start(Arc::clone(&exports), options);
    let server = server.map_err(|error| lacuna::Error::io(error, "Starting the server"))?;
    let server = Arc::new(server);
    let (end, ended) = mpsc::channel();
    let stop = asked.run.is_none().then(|| end.clone());
    let control = Control::new(tool, Arc::clone(&server), stop);
    let served = serve(&server, asked, &control, end, &ended);
    control.release_points();
    server.stop();
    let removed = control.shut_down();
    let closed = close_all(&exports).and(removed);
    match (served, closed) {
        (Ok(code), closed) => closed.map(|()| code),
        (Err(error), closed) => {
            if let Err(other) = closed {
                output::warn(&format!("Closing the disks: {}", other.text()));
            }
            Err(error)
        }
    }
}

/// Listens, and returns when it is time to end.
fn serve(
    server: &Server<Served>,
    mut asked: Serving,
    control: &Arc<Control>,
    end: mpsc::Sender<()>,
    ended: &mpsc::Receiver<()>,
) -> CliResult<u8> {
    let scratch = asked.needs_own_socket().then(tempfile::tempdir).transpose();
    let scratch = scratch.map_err(|error| lacuna::Error::io(error, "Making a socket's folder"))?;
    let own = scratch.as_ref().map(|folder| Address::Unix(folder.path().join("nbd.sock")));
    // Signals count from here on: whoever sees the socket may end the server.
    let signals = watch_signals(end.clone(), asked.run.is_some())?;
    let listen_for = |path: &PathBuf| control::Socket::listen(Arc::clone(control), path);
    let control_socket = asked.control.as_ref().map(listen_for).transpose()?;
    let address = own.as_ref().unwrap_or(&asked.address);
    let listeners = match asked.inherited.take() {
        Some(listeners) => listeners,
        None => bound(address)?,
    };
    let names = listen(server, listeners);
    let pid_file = asked.pid_file.as_deref().map(PidFile::new).transpose()?;
    let code = match &asked.run {
        Some(command) => command::run(command, &asked.uri(address, &names), end, ended),
        None => {
            if asked.says_where {
                say_where(&names)?;
            }
            asked.ready.as_ref().map_or(Ok(()), fork::Ready::tell)?;
            if !asked.is_persistent {
                watch_clients(server, end);
            }
            // The senders live as long as the process.
            let _signal_or_last_client = ended.recv();
            Ok(0)
        }
    };
    signals.close();
    drop((pid_file, control_socket));
    code
}

fn bound(address: &Address) -> CliResult<Vec<Listener>> {
    Listener::bind(address).map_err(|error| cannot_listen(address, error))
}

/// Returns what clients call the sockets.
fn listen(server: &Server<Served>, listeners: Vec<Listener>) -> Vec<String> {
    let names = listeners.iter().map(Listener::name).collect();
    listeners.into_iter().for_each(|listener| server.listen(listener));
    names
}

fn cannot_listen(address: &Address, error: io::Error) -> CliError {
    const NO_ADDRESS: &str = "failed to lookup address information: ";
    let words = open::of_host(&error);
    let text = match (address, words.strip_prefix(NO_ADDRESS)) {
        (Address::Unix(path), _) => format!("Failed to bind socket to {}: {words}", path.display()),
        (Address::Tcp(host, port), Some(words)) => {
            format!("address resolution failed for {host}:{port}: {words}")
        }
        _ if error.kind() == io::ErrorKind::AddrInUse => {
            format!("Failed to find an available port: {words}")
        }
        _ => format!("Failed to bind socket: {words}"),
    };
    CliError::new(text)
        .in_our_words(format!("Listening on {address}: {words}"))
        .with_class(lacuna::Error::io(error, "").kind())
}

fn say_where(names: &[String]) -> CliResult<()> {
    output::print(&names.iter().map(|name| format!("Listening on {name}\n")).collect::<String>())
}

/// Has a signal end the server, unless it is the command's to decide about.
fn watch_signals(
    end: mpsc::Sender<()>,
    has_command: bool,
) -> CliResult<signal_hook::iterator::Handle> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])
        .map_err(|error| lacuna::Error::io(error, "Catching signals"))?;
    let handle = signals.handle();
    thread::spawn(move || {
        let mut requests = Requests::default();
        let is_ours = |signal| !has_command || !command::hears_by_itself(signal);
        let counts = |signal: &i32| is_ours(*signal) && requests.is_new();
        for _signal in signals.forever().filter(counts) {
            // Nobody waits where the server ends anyway.
            let _nobody_waits = end.send(());
        }
    });
    Ok(handle)
}

fn watch_clients(server: &Server<Served>, end: mpsc::Sender<()>) {
    let left = server.all_left();
    thread::spawn(move || {
        left.wait();
        let _nobody_waits = end.send(());
    });
}

/// Leaves all images as they should be left; the first failure is told.
fn close_all(exports: &Exports<Served>) -> CliResult<()> {
    let mut result = Ok(());
    for export in exports.all() {
        let closed = block_on(export.disk().close());
        result = result.and(closed);
    }
    Ok(result?)
}

/// A file that holds our process id, and is gone when clients can come no more.
struct PidFile<'a>(&'a Path);

impl<'a> PidFile<'a> {
    fn new(path: &'a Path) -> CliResult<Self> {
        let written = fs::write(path, format!("{}\n", std::process::id()));
        written.map_err(|error| {
            let (shown, words) = (path.display(), open::of_host(&error));
            CliError::new(format!("Could not create '{shown}': {words}"))
                .in_our_words(format!("Writing {shown}: {words}"))
                .with_class(lacuna::Error::io(error, "").kind())
        })?;
        Ok(Self(path))
    }
}

impl Drop for PidFile<'_> {
    fn drop(&mut self) {
        remove_own(self.0);
    }
}

/// Removes a file that we made; somebody who ends us may have been faster.
pub(crate) fn remove_own(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            output::warn(&format!("{} could not be removed: {error}", path.display()));
        }
        _ => {}
    }
}
