//! A guest's disk whose storage is recorded, and what a power loss at any moment leaves of it.
//!
//! * Always: a mark stands in the record behind everything that was flushed when the guest said so.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;

use lacuna::qcow2::format::{EntryWidth, Version};
use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, create};
use lacuna_export::{
    Address, Export, ExportOptions, Exports, Listener, Plain, Server, ServerOptions,
};
use pollster::block_on;
use testkit::sim::{Event, Pace, SimHost, SimStorage, crash};
use testkit::{Random, SparseBytes};

use crate::judge;

/// What to serve, and what to leave of it.
///
/// ```
/// let asked = powerloss::Recording {
///     size_bytes: 1 << 30, seed: 7, states: 8, socket: "/tmp/s".into(), into: "/tmp".into(),
///     without_flushes: false,
/// };
/// assert_eq!(asked.states, 8);
/// ```
#[derive(Clone, Debug)]
pub struct Recording {
    /// The size of the disk.
    pub size_bytes: u64,
    /// Decides the kind of image, and what is left.
    pub seed: u64,
    /// How many states of the medium are wanted.
    pub states: usize,
    /// Where the disk is served.
    pub socket: PathBuf,
    /// The folder for the states.
    pub into: PathBuf,
    /// Flushes do nothing, to see whether that is noticed.
    pub without_flushes: bool,
}

/// Serves a new disk as the export `disk` while lines come in: `mark N` for what the guest said is
/// durable, `end` when it is over. Then writes states of the medium, and tells of each:
/// `state FILE acked N ...`.
///
/// # Errors
/// What failed, or which state is not sound.
///
/// ```no_run
/// # fn record(asked: &powerloss::Recording) -> Result<(), String> {
/// let lines = std::io::stdin().lock();
/// powerloss::record(asked, lines, &mut |line| println!("{line}"))
/// # }
/// ```
pub fn record(
    asked: &Recording,
    input: impl BufRead,
    tell: &mut impl FnMut(&str),
) -> Result<(), String> {
    let host = SimHost::new(Pace::AtOnce, asked.seed);
    let server = served(asked, &host)?;
    tell("ready");
    for line in input.lines() {
        let line = line.map_err(|error| format!("Reading: {error}"))?;
        match line.split_once(' ') {
            Some(("mark", number)) => {
                let number = number.parse().map_err(|_| format!("{line} has no number"))?;
                host.mark(number);
            }
            _ => break,
        }
    }
    server.stop();
    leave(asked, &host, tell)
}

fn served(asked: &Recording, host: &SimHost) -> Result<Server<Plain<Image<SimStorage>>>, String> {
    let told = |error: lacuna::Error| error.to_string();
    let storage = host.add_file(SparseBytes::default());
    block_on(create(&storage, &options(asked))).map_err(told)?;
    host.start_record();
    let options = OpenOptions::new(Access::ReadWrite);
    let image = block_on(Image::open(Parts::alone(storage), options)).map_err(told)?;
    let exports = Arc::new(Exports::default());
    let export = Export::new("disk", Plain(image), ExportOptions::default()).map_err(told)?;
    exports.add(export).map_err(told)?;
    let failed = |error: std::io::Error| format!("Serving: {error}");
    let server = Server::start(exports, ServerOptions::default()).map_err(failed)?;
    for listener in Listener::bind(&Address::Unix(asked.socket.clone())).map_err(failed)? {
        server.listen(listener);
    }
    Ok(server)
}

/// One of a few kinds of images.
fn options(asked: &Recording) -> CreateOptions {
    let plain = CreateOptions { size_bytes: asked.size_bytes, ..CreateOptions::default() };
    match asked.seed % 5 {
        0 => plain,
        1 => CreateOptions { lazy_refcounts: true, ..plain },
        2 => CreateOptions { entry_width: EntryWidth::Extended, ..plain },
        3 => CreateOptions { cluster_bytes: 4096, ..plain },
        _ => CreateOptions { version: Version::V2, ..plain },
    }
}

/// Chooses moments, in order: most often such with much that was not flushed.
fn moments(events: &[Event], first: usize, count: usize, random: &mut Random) -> Vec<usize> {
    let since_flush: Vec<usize> = events
        .iter()
        .scan(0, |since, event| {
            *since = if matches!(event, Event::Flushed { .. }) { 0 } else { *since + 1 };
            Some(*since)
        })
        .collect();
    let among = (events.len() - first) as u64;
    let mut one = || first + random.below(among) as usize;
    let mut moments: Vec<usize> = (0..count)
        .filter_map(|number| {
            let candidates = 1 << (2 * (number % 4));
            (0..candidates).map(|_| one()).max_by_key(|at| since_flush[*at])
        })
        .collect();
    moments.sort_unstable();
    moments
}

/// Writes what random power losses leave.
fn leave(asked: &Recording, host: &SimHost, tell: &mut impl FnMut(&str)) -> Result<(), String> {
    let (_, events) = host.record();
    let first = events.iter().position(|event| matches!(event, Event::Mark(_)));
    let first = first.ok_or("The guest said nothing that could be looked for")?;
    let mut random = Random::new(asked.seed ^ 0x10_55);
    let moments = moments(&events, first, asked.states, &mut random);
    for (number, point) in crash::at(host, &moments, asked.without_flushes).enumerate() {
        let choice = point.random_choice(&mut random);
        let left = point.files_with(&choice).pop().expect("the host has one file");
        judge::sound_unless_dirty(&left).map_err(|error| {
            let story = point.story_of(&choice).join("\n    ");
            format!("seed {}, event {}: {error}\n    {story}", asked.seed, point.event)
        })?;
        let name = format!("state-{number}.qcow2");
        left.save(&asked.into.join(&name));
        let acked = point.mark.unwrap_or(0);
        let (event, unflushed) = (point.event, point.unflushed_len());
        tell(&format!(
            "state {name} acked {acked} event {event} of {} unflushed {unflushed} kept {}",
            events.len(),
            choice.len()
        ));
    }
    tell("done");
    Ok(())
}
