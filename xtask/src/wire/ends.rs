//! How each server and client is called.

use std::path::Path;
use std::process::Command;

use crate::run::command;

/// What ends a server whose client has failed, in seconds.
const LIMIT: &str = "120";
/// Connections that a server takes: clients make several where they may.
const CONNECTIONS: &str = "16";
/// What a copy moves: the size of QEMU's null disk.
const COPY_BYTES: &str = "1073741824";

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    ReadLarge,
    WriteLarge,
    ReadSmall,
    CopyFrom,
    CopyTo,
}

impl Job {
    pub(super) const OF_SERVERS: [Self; 3] = [Self::ReadLarge, Self::WriteLarge, Self::ReadSmall];
    pub(super) const OF_CLIENTS: [Self; 3] = [Self::CopyFrom, Self::CopyTo, Self::ReadSmall];

    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::CopyFrom => "a copy of 1 GiB from an export to nothing",
            Self::CopyTo => "a copy of 512 MiB to an export",
            Self::ReadLarge => "512 MiB read by 256 KiB",
            Self::ReadSmall => "512 MiB read by 4 KiB, 16 at once",
            Self::WriteLarge => "512 MiB written by 256 KiB",
        }
    }

    const fn writes(self) -> bool {
        matches!(self, Self::CopyTo | Self::WriteLarge)
    }
}

/// Whether a connection is under TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrapped {
    Plain,
    Tls,
}

impl Wrapped {
    pub(super) const BOTH: [Self; 2] = [Self::Plain, Self::Tls];

    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Plain => "plaintext",
            Self::Tls => "TLS",
        }
    }

    /// Gives the folder of certificates where there is TLS.
    pub(super) fn choose(self, certificates: &str) -> Option<&str> {
        (self == Self::Tls).then_some(certificates)
    }
}

/// A server, which ends with its last client.
#[derive(Clone, Copy)]
pub(super) enum Server<'a> {
    Nbdkit,
    Ours(&'a Path),
    Stock,
}

impl Server<'_> {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Nbdkit => "nbdkit",
            Self::Ours(_) => "lacuna",
            Self::Stock => "qemu-nbd",
        }
    }

    pub(super) fn command(
        &self,
        job: Job,
        disk: &str,
        socket: &str,
        certificates: Option<&str>,
    ) -> Command {
        match self {
            Self::Nbdkit => nbdkit(job, disk, socket, certificates),
            Self::Ours(program) => {
                let words = ["serve", "-f", "raw", "-e", CONNECTIONS, "-k", socket];
                let mut server = bounded(&program.to_string_lossy(), &words);
                if let Some(folder) = certificates {
                    server.args(["--tls", folder]);
                }
                server.arg(disk);
                server
            }
            Self::Stock => {
                let mut server =
                    bounded("qemu-nbd", &["-f", "raw", "-e", CONNECTIONS, "-k", socket]);
                if let Some(folder) = certificates {
                    server.args(["--object", &object(folder, "server"), "--tls-creds", "tls"]);
                }
                server.arg(disk);
                server
            }
        }
    }
}

/// A server that does not outlive a client that failed for long.
fn bounded(program: &str, arguments: &[&str]) -> Command {
    let mut bounded = command("timeout", &[LIMIT, program]);
    bounded.args(arguments);
    bounded
}

/// Without a disk of its own where a client is measured by copies: what it costs does not matter.
fn nbdkit(job: Job, disk: &str, socket: &str, certificates: Option<&str>) -> Command {
    let mut server = bounded("nbdkit", &["-f", "--filter=exitlast", "-U", socket]);
    if let Some(folder) = certificates {
        server.args(["--tls=require", &format!("--tls-certificates={folder}")]);
    }
    match job {
        Job::CopyFrom => server.args(["pattern", COPY_BYTES]),
        Job::CopyTo => server.args(["null", COPY_BYTES]),
        _ => server.args(["file", disk]),
    };
    server
}

/// A client.
#[derive(Clone, Copy)]
pub(super) enum Client<'a> {
    Libnbd,
    Ours(&'a Path),
    Stock,
}

impl Client<'_> {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Libnbd => "nbdcopy",
            Self::Ours(_) => "lacuna",
            Self::Stock => "qemu-img",
        }
    }

    /// The stock `bench` knows no certificates.
    pub(super) fn does(&self, job: Job, wrapped: Wrapped) -> bool {
        !matches!((self, job, wrapped), (Self::Stock, Job::ReadSmall, Wrapped::Tls))
    }

    pub(super) fn command(
        &self,
        job: Job,
        disk: &str,
        socket: &str,
        certificates: Option<&str>,
    ) -> Command {
        let program = match self {
            Self::Libnbd => return libnbd(job, disk, socket, certificates),
            Self::Ours(program) => program.to_string_lossy(),
            Self::Stock => "qemu-img".into(),
        };
        let export = export(socket, certificates);
        let object = certificates.map(|folder| ["--object".to_owned(), object(folder, "client")]);
        let target = "--target-image-opts";
        let (verb, options): (_, Vec<&str>) = match job {
            Job::ReadSmall => {
                let words = ["-c", "131072", "-d", "16", "-s", "4k", "-t", "writeback"];
                ("bench", [&words[..], &["--image-opts", &export]].concat())
            }
            job if job.writes() => {
                ("convert", vec!["-n", "-t", "writeback", "-f", "raw", target, disk, &export])
            }
            _ => ("convert", vec!["-n", "--image-opts", "-O", "raw", &export, "null-co://"]),
        };
        let mut client = command(&program, &[verb]);
        client.args(object.iter().flatten()).args(options);
        client
    }
}

fn libnbd(job: Job, disk: &str, socket: &str, certificates: Option<&str>) -> Command {
    let uri = match certificates {
        None => format!("nbd+unix:///?socket={socket}"),
        Some(folder) => format!(
            "nbds+unix:///?socket={socket}&tls-certificates={folder}&tls-hostname=localhost"
        ),
    };
    match job {
        Job::ReadSmall => {
            let small = ["--connections=1", "--requests=16", "--request-size=4096"];
            command("nbdcopy", &[&small[..], &[&uri, "null:"]].concat())
        }
        job if job.writes() => command("nbdcopy", &[disk, &uri]),
        _ => command("nbdcopy", &[&uri, "null:"]),
    }
}

/// Describes the export as QEMU's programs and ours take it.
fn export(socket: &str, certificates: Option<&str>) -> String {
    let tls = certificates.map_or("", |_| ",file.tls-creds=tls,file.tls-hostname=localhost");
    format!("driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket}{tls}")
}

fn object(folder: &str, endpoint: &str) -> String {
    let verify = if endpoint == "server" { ",verify-peer=off" } else { "" };
    format!("tls-creds-x509,id=tls,endpoint={endpoint},dir={folder}{verify}")
}
