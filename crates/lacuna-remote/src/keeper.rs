//! Keeps a connection: makes it again when it is lost, and asks again what was under way.
//!
//! Every command of NBD can be repeated: what a server did and could not say any more does no harm
//! when it is done once more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lacuna::{Error, Result};
use lacuna_nbd::client::ExportInfo;
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;

use crate::connect::{Connected, Endpoint};
use crate::link::{End, Link};
use crate::request::Request;

/// What the connections to one export share.
pub(crate) struct Common {
    pub(crate) endpoint: Endpoint,
    pub(crate) reconnect_delay: Duration,
    /// What the first connection was told.
    pub(crate) info: ExportInfo,
    pub(crate) durability: Mutex<Durability>,
    /// How large the export is now; only a resize of ours changes it.
    size_bytes: AtomicU64,
    /// The size that a resize under way asks for.
    resizing_to: Mutex<Option<u64>>,
    /// Why nothing can be asked any more.
    failure: Mutex<Option<Error>>,
}

/// What is known of changes that the server acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Durability {
    /// How many changes were acknowledged.
    pub(crate) acknowledged: u64,
    /// So many of them are durable.
    pub(crate) durable: u64,
    /// A connection was lost while the two differed.
    pub(crate) is_doubtful: bool,
}

impl Common {
    pub(crate) fn new(endpoint: Endpoint, reconnect_delay: Duration, info: ExportInfo) -> Self {
        let size_bytes = AtomicU64::new(info.size_bytes);
        Self {
            endpoint,
            reconnect_delay,
            info,
            durability: Mutex::default(),
            size_bytes,
            resizing_to: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    /// Returns how large the export is now.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Notes that a resize is about to be asked for; one at a time.
    pub(crate) fn resizing(&self, to: u64) {
        *self.resizing_to.lock() = Some(to);
    }

    /// Notes what became of a resize.
    pub(crate) fn resized(&self, to: u64, result: &Result<()>) {
        if result.is_ok() {
            self.size_bytes.store(to, Ordering::Release);
        }
        *self.resizing_to.lock() = None;
    }

    /// Says whether the export may be so large: a resize under way may be done, and its answer lost.
    fn may_have(&self, size_bytes: u64) -> bool {
        size_bytes == self.size_bytes() || *self.resizing_to.lock() == Some(size_bytes)
    }

    /// Returns why nothing can be asked any more, if so.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failure.lock().clone()
    }

    fn fail(&self, error: Error) {
        self.failure.lock().get_or_insert(error);
    }

    /// Notes that a server may have forgotten what it acknowledged.
    fn doubt(&self) {
        let mut durability = self.durability.lock();
        if durability.acknowledged > durability.durable {
            durability.is_doubtful = true;
        }
    }

    async fn connect_again(&self, deadline: Instant) -> Result<Connected> {
        let connected = self.endpoint.connect_until(deadline).await?;
        self.compare(connected.transmission.info())?;
        Ok(connected)
    }

    /// Refuses an export that is not what it was.
    pub(crate) fn compare(&self, now: &ExportInfo) -> Result<()> {
        let (was, sizes) = (&self.info, (self.info.block_sizes, now.block_sizes));
        let what = if !self.may_have(now.size_bytes) {
            format!("has {} bytes; it had {}", now.size_bytes, self.size_bytes())
        } else if !now.flags.contains(was.flags) {
            let (now, was) = (now.flags.bits(), was.flags.bits());
            format!("can do less (flags {now:#x}; they were {was:#x})")
        } else if sizes.1.minimum() > sizes.0.minimum()
            || sizes.1.max_payload() < sizes.0.max_payload()
            || now.replies != was.replies
            || now.contexts.len() < was.contexts.len()
        {
            "takes other requests than before".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::invalid(format!("The export is not the same after reconnecting: it {what}")))
    }
}

/// Serves a queue by one connection after the other, until nobody can ask any more.
pub(crate) async fn keep(
    connected: Connected,
    mut queue: UnboundedReceiver<Request>,
    common: Arc<Common>,
) {
    let mut link = Link::new(connected);
    let mut deadline = None;
    loop {
        let error = match link.run(&mut queue).await {
            End::Closed => return,
            End::Lost(error) if !common.reconnect_delay.is_zero() => error,
            End::Lost(error) | End::Broken(error) => {
                return give_up(link.into_requests(), queue, &common, error).await;
            }
        };
        common.doubt();
        // A server that never answers anything gets no second period of grace.
        let fresh = Instant::now() + common.reconnect_delay;
        let until = if link.answers() > 0 { fresh } else { *deadline.get_or_insert(fresh) };
        deadline = Some(until);
        let open = link.into_requests();
        link = match common.connect_again(until).await {
            Ok(connected) if Instant::now() <= until => Link::new(connected),
            Ok(_) => return give_up(open, queue, &common, error).await,
            Err(again) => {
                let error = error.context(format!("{again}, after this"));
                return give_up(open, queue, &common, error).await;
            }
        };
        open.into_iter().for_each(|request| link.start(request));
    }
}

/// Answers everything with an error, what is still to come as well.
async fn give_up(
    open: Vec<Request>,
    mut queue: UnboundedReceiver<Request>,
    common: &Common,
    error: Error,
) {
    common.doubt();
    common.fail(error.clone());
    for request in open {
        request.answer(Err(error.clone()), Vec::new());
    }
    while let Some(request) = queue.recv().await {
        request.answer(Err(error.clone()), Vec::new());
    }
}
