//! One client, from its first byte to its last.
//!
//! * `shake.rs`: the handshake, one option after the other
//! * `transmit.rs`: requests in, replies out, as many at once as the limits allow
//! * `unread.rs`: what is not looked at yet
//! * `in_flight.rs`: requests that run
//! * `execute.rs`, `status.rs`: what a request does to the disk
//! * `reply.rs`, `output.rs`: what goes out, and the queue of it

mod execute;
mod in_flight;
mod output;
mod reply;
mod shake;
mod status;
mod transmit;
mod unread;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use crate::ServedDisk;
use crate::population::{Place, Stopping};
use crate::stream::Stream;

/// Memory that all connections of a worker receive into, one at a time.
pub(crate) type Scratch = Rc<RefCell<Vec<u8>>>;

/// How much is received at once.
const SCRATCH_BYTES: usize = 256 << 10;

/// Makes the memory of a worker.
pub(crate) fn scratch() -> Scratch {
    Rc::new(RefCell::new(vec![0; SCRATCH_BYTES]))
}

/// Serves a client until it leaves, breaks the protocol, or the server ends.
///
/// # Errors
/// What the socket gives, and what the client did wrong.
pub(crate) async fn serve<D: ServedDisk>(
    stream: Stream,
    place: &Place<D>,
    mut stopping: Stopping,
    scratch: Scratch,
) -> io::Result<()> {
    let limits = place.shared().limits();
    let shaken = shake::hands(stream, place.shared());
    let shaken = tokio::select! {
        shaken = tokio::time::timeout(limits.handshake, shaken) => shaken,
        () = stopping.begun() => return Ok(()),
    };
    let Ok(shaken) = shaken else {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "The handshake took too long"));
    };
    match shaken? {
        Some(ready) => {
            let export = ready.guest.export();
            place.chose(export.name(), export.number(), ready.stream.is_secure());
            let traffic = Arc::clone(place.traffic());
            transmit::until_the_end(ready, limits, stopping, scratch, traffic).await
        }
        None => Ok(()),
    }
}
