//! Who is connected: their places, what they moved, and how one of them is told to go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use lacuna_nbd::ExportName;
use tokio::sync::watch;

use crate::server::Shared;

/// A connection, for lists.
///
/// ```
/// fn line(connection: &lacuna_export::Connection) -> String {
///     format!("{} from {}", connection.number, connection.peer)
/// }
/// # let _ = line;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Counts from 1, in order of arrival.
    pub number: u64,
    /// Its address, or `unix`.
    pub peer: String,
    /// The export, once it is chosen.
    pub export: Option<String>,
    /// Whether it is under TLS.
    pub is_tls: bool,
    /// When it came.
    pub since: SystemTime,
    /// Bytes that came from it since it chose, without what TLS adds.
    pub received_bytes: u64,
    /// Bytes that went to it since it chose, without what TLS adds.
    pub sent_bytes: u64,
    /// Requests that it sent, also those that were rejected.
    pub requests: u64,
    /// Requests that run.
    pub in_flight: usize,
}

/// What a connection moved. Written by its own worker only, now and then read by others.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) received_bytes: Count,
    pub(crate) sent_bytes: Count,
    pub(crate) requests: Count,
    pub(crate) in_flight: Count,
}

/// A number that one thread writes: without a locked instruction.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: usize) {
        self.set(self.0.load(Ordering::Relaxed).wrapping_add(more as u64));
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The connections there are, and how many there ever were.
#[derive(Debug, Default)]
pub(crate) struct Population {
    now: BTreeMap<u64, Entry>,
    ever: u64,
    /// Whether any of them has chosen an export.
    was_used: bool,
    /// Whether somebody waits for the last one to leave, after which nobody comes in.
    ends: bool,
    is_over: bool,
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    /// The number of its export, which no other one ever has.
    export: Option<u64>,
    seat: Seat,
}

/// What a connection and the list of them share.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    traffic: Arc<Traffic>,
    end: watch::Sender<bool>,
}

impl Population {
    pub(crate) fn len(&self) -> usize {
        self.now.len()
    }

    /// Has the last one to leave shut the door.
    pub(crate) fn ends_with_the_last(&mut self) {
        self.ends = true;
        self.look_whether_over();
    }

    /// Says whether somebody used an export and nobody was left. It stays so: whoever knocks between
    /// that and the end of the server is too late.
    pub(crate) const fn is_over(&self) -> bool {
        self.is_over
    }

    fn leave(&mut self, number: u64) {
        self.now.remove(&number);
        self.look_whether_over();
    }

    fn look_whether_over(&mut self) {
        self.is_over |= self.ends && self.was_used && self.now.is_empty();
    }

    /// Counts a connection in; returns its number.
    pub(crate) fn enter(&mut self, peer: &str) -> (u64, Seat) {
        self.ever += 1;
        let connection = Connection {
            number: self.ever,
            peer: peer.to_owned(),
            export: None,
            is_tls: false,
            since: SystemTime::now(),
            received_bytes: 0,
            sent_bytes: 0,
            requests: 0,
            in_flight: 0,
        };
        let seat = Seat { traffic: Arc::default(), end: watch::Sender::new(false) };
        self.now.insert(self.ever, Entry { connection, export: None, seat: seat.clone() });
        (self.ever, seat)
    }

    pub(crate) fn list(&self) -> Vec<Connection> {
        self.now.values().map(Entry::describe).collect()
    }

    /// Tells the connections of an export to end; returns how many there are.
    pub(crate) fn end(&self, export: u64) -> usize {
        let of_export = self.now.values().filter(|entry| entry.export == Some(export));
        let mut count = 0;
        for entry in of_export {
            entry.seat.end.send_replace(true);
            count += 1;
        }
        count
    }
}

impl Entry {
    fn describe(&self) -> Connection {
        let traffic = &self.seat.traffic;
        Connection {
            received_bytes: traffic.received_bytes.value(),
            sent_bytes: traffic.sent_bytes.value(),
            requests: traffic.requests.value(),
            in_flight: usize::try_from(traffic.in_flight.value()).unwrap_or(usize::MAX),
            ..self.connection.clone()
        }
    }
}

/// The end of a server or of one connection, as the connection sees it.
#[derive(Clone, Debug)]
pub(crate) struct Stopping {
    server: watch::Receiver<bool>,
    own: Option<watch::Receiver<bool>>,
    patience: Duration,
}

impl Stopping {
    pub(crate) fn new(server: &watch::Sender<bool>, patience: Duration) -> Self {
        Self { server: server.subscribe(), own: None, patience }
    }

    /// Waits until the server stops, or wants the connection to end.
    pub(crate) async fn begun(&mut self) {
        // An error means that the server is gone altogether.
        let server = self.server.wait_for(|stop| *stop);
        match &mut self.own {
            None => drop(server.await),
            Some(own) => tokio::select! {
                stopped = server => drop(stopped),
                ended = own.wait_for(|end| *end) => drop(ended),
            },
        }
    }

    /// Waits as long as a stopping server does.
    pub(crate) async fn overdue(&mut self) {
        tokio::time::sleep(self.patience).await;
    }
}

/// A place among the connections, given back when the connection is over.
pub(crate) struct Place<D> {
    shared: Arc<Shared<D>>,
    number: u64,
    seat: Seat,
    on_worker: Arc<AtomicUsize>,
}

impl<D> Place<D> {
    pub(crate) fn new(
        shared: Arc<Shared<D>>,
        number: u64,
        seat: Seat,
        on_worker: Arc<AtomicUsize>,
    ) -> Self {
        on_worker.fetch_add(1, Ordering::SeqCst);
        Self { shared, number, seat, on_worker }
    }

    pub(crate) fn stopping(&self) -> Stopping {
        Stopping { own: Some(self.seat.end.subscribe()), ..self.shared.stopping() }
    }

    pub(crate) const fn traffic(&self) -> &Arc<Traffic> {
        &self.seat.traffic
    }

    pub(crate) const fn shared(&self) -> &Arc<Shared<D>> {
        &self.shared
    }

    /// Notes what the client has chosen, by name and by the export's number.
    pub(crate) fn chose(&self, name: &ExportName, export: u64, is_tls: bool) {
        let mut population = self.shared.population.lock();
        population.was_used = true;
        if let Some(entry) = population.now.get_mut(&self.number) {
            entry.connection.export = Some(name.as_str().to_owned());
            entry.connection.is_tls = is_tls;
            entry.export = Some(export);
        }
    }
}

impl<D> Drop for Place<D> {
    fn drop(&mut self) {
        self.on_worker.fetch_sub(1, Ordering::SeqCst);
        self.shared.population.lock().leave(self.number);
        self.shared.changed.notify_all();
        self.shared.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_when_the_last_one_has_left_changes_nothing() {
        let mut population = Population::default();
        population.ends_with_the_last();
        let (looked, _) = population.enter("a");
        population.leave(looked);
        assert!(!population.is_over(), "it only looked around");
        let (used, _) = population.enter("b");
        population.was_used = true;
        assert!(!population.is_over());
        population.leave(used);
        assert!(population.is_over());
        let (late, _) = population.enter("c");
        assert!(population.is_over());
        population.leave(late);
        assert!(population.is_over());
        // Nobody waits for an end here.
        let mut forever = Population { was_used: true, ..Population::default() };
        let (one, _) = forever.enter("d");
        forever.leave(one);
        assert!(!forever.is_over());
    }
}
