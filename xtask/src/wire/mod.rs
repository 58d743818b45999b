//! Benchmarks of our own: what crosses a socket, in plaintext and under TLS.
//!
//! * `ends.rs` is how each server and client is called
//! * `pki.rs` makes certificates
//!
//! One end is measured and changes from run to run, the other one stays: nbdcopy for servers, nbdkit
//! for clients. Sides take turns; what counts is CPU time of the measured end, since
//! the wall depends on both ends and on who else is on the machine. The ratios are of medians.

mod ends;
mod pki;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::{fs, thread};

use self::ends::{Client, Job, Server, Wrapped};
use crate::run::awaited;
use crate::scratch::Scratch;
use crate::watched::{Cost, median, watch};
use crate::{Outcome, setup};

/// Runs of each side.
const RUNS: usize = 3;
/// What is served: in the page cache after the first run.
const DISK_BYTES: usize = 512 << 20;

const HEADER: &str = "\
| {} | | CPU: ours | peer ÷ ours: CPU | wall: ours | peer ÷ ours: wall |
|---|---|---|---|---|---|";

/// Measures servers, each with and without TLS, and prints a row for each job and wrapping.
pub(crate) fn servers(ours: &Path) -> Outcome {
    let place = Place::make()?;
    println!("{}", HEADER.replace("{}", "server of"));
    for job in Job::OF_SERVERS {
        for wrapped in Wrapped::BOTH {
            let sides = [Server::Ours(ours), Server::Stock, Server::Nbdkit];
            let run =
                |side: &Server<'_>| place.serve(side, &Client::Libnbd, job, wrapped, End::Server);
            print_row(job, wrapped, &sides.map(|side| side.name()), &by_turns(&sides, run)?);
        }
    }
    Ok(())
}

/// Measures clients, each with and without TLS, and prints a row for each job and wrapping.
pub(crate) fn clients(ours: &Path) -> Outcome {
    let place = Place::make()?;
    println!("{}", HEADER.replace("{}", "client that does"));
    for job in Job::OF_CLIENTS {
        for wrapped in Wrapped::BOTH {
            let all = [Client::Ours(ours), Client::Stock, Client::Libnbd];
            let sides: Vec<Client<'_>> =
                all.into_iter().filter(|side| side.does(job, wrapped)).collect();
            let run =
                |side: &Client<'_>| place.serve(&Server::Nbdkit, side, job, wrapped, End::Client);
            let names: Vec<&str> = sides.iter().map(Client::name).collect();
            print_row(job, wrapped, &names, &by_turns(&sides, run)?);
        }
    }
    Ok(())
}

/// Which end is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Client,
    Server,
}

/// A folder with a disk of random bytes, and certificates.
struct Place {
    scratch: Scratch,
    disk: String,
    /// The same bytes, which a server has.
    served: String,
    certificates: String,
}

impl Place {
    fn make() -> Outcome<Self> {
        setup::peers_of_wires()?;
        let scratch = Scratch::new("wire")?;
        scratch.require(3 * DISK_BYTES as u64)?;
        let (disk, certificates) = (scratch.file("disk"), scratch.file("pki"));
        let (served, noise) = (scratch.file("served"), noise());
        for file in [&disk, &served] {
            fs::write(file, &noise).map_err(|error| format!("cannot write {file}: {error}"))?;
        }
        pki::make(Path::new(&certificates))?;
        Ok(Self { scratch, disk, served, certificates })
    }

    /// Has a client do its job at a server; returns what the measured end took.
    fn serve(
        &self,
        server: &Server<'_>,
        client: &Client<'_>,
        job: Job,
        wrapped: Wrapped,
        measured: End,
    ) -> Outcome<Cost> {
        let socket = self.scratch.file("socket");
        let certificates = wrapped.choose(&self.certificates);
        // What is written is what is there already.
        let mut serving = server.command(job, &self.served, &socket, certificates);
        let mut asking = client.command(job, &self.disk, &socket, certificates);
        let cost = match measured {
            End::Client => {
                let server = started(&mut serving)?;
                awaited(&socket)?;
                let cost = watch(&mut asking, self.scratch.path());
                // It ends with its last client.
                finished(server, &serving)?;
                cost
            }
            End::Server => thread::scope(|scope| {
                let client = scope.spawn(|| {
                    awaited(&socket)?;
                    finished(started(&mut asking)?, &asking)
                });
                let cost = watch(&mut serving, self.scratch.path());
                match client.join().unwrap_or_else(|_| Err("the client panicked".into())) {
                    Ok(()) => cost,
                    Err(client) => Err(match cost {
                        Ok(_) => client,
                        Err(server) => format!("{server}; {client}"),
                    }),
                }
            }),
        };
        // Not every server takes its socket with it.
        drop(fs::remove_file(&socket));
        cost.map(|(cost, _)| cost)
    }
}

fn started(command: &mut Command) -> Outcome<Child> {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    quiet.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))
}

fn finished(child: Child, command: &Command) -> Outcome {
    let output = child.wait_with_output().map_err(|error| format!("lost {command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// Runs all sides by turns.
fn by_turns<S>(sides: &[S], run: impl Fn(&S) -> Outcome<Cost>) -> Outcome<Vec<Vec<Cost>>> {
    let mut runs: Vec<Vec<Cost>> = sides.iter().map(|_| Vec::new()).collect();
    for _ in 0..RUNS {
        for (side, runs) in sides.iter().zip(&mut runs) {
            runs.push(run(side)?);
        }
    }
    Ok(runs)
}

fn print_row(job: Job, wrapped: Wrapped, names: &[&str], runs: &[Vec<Cost>]) {
    println!("{}", row(job.words(), wrapped.words(), names, runs));
}

/// Ours come first.
fn row(job: &str, wrapped: &str, names: &[&str], runs: &[Vec<Cost>]) -> String {
    let of = |value: fn(&Cost) -> f64| -> Vec<f64> {
        runs.iter().map(|runs| median(runs.iter().map(value))).collect()
    };
    let (cpu, wall) = (of(|cost| cost.cpu), of(|cost| cost.wall));
    let ratios = |values: &[f64]| {
        let peers = names.iter().zip(values).skip(1);
        let ratio = |(name, value): (&&str, &f64)| format!("{name} {:.2}", value / values[0]);
        peers.map(ratio).collect::<Vec<_>>().join(", ")
    };
    format!(
        "| {job} | {wrapped} | {:.0} ms | {} | {:.0} ms | {} |",
        cpu[0] * 1000.0,
        ratios(&cpu),
        wall[0] * 1000.0,
        ratios(&wall)
    )
}

/// Bytes that nothing makes smaller.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(DISK_BYTES);
    while bytes.len() < DISK_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_compared_by_medians_with_what_comes_first() {
        let side = |cpu: f64| {
            let run = |add: f64| Cost { cpu: cpu + add, wall: 2.0 * cpu, ..Cost::default() };
            vec![run(0.0), run(-0.1), run(9.0)]
        };
        assert_eq!(
            row("job", "TLS", &["ours", "a", "b"], &[side(0.5), side(1.0), side(0.25)]),
            "| job | TLS | 500 ms | a 2.00, b 0.50 | 1000 ms | a 2.00, b 0.50 |"
        );
    }
}
