//! A guest: what it asks, what it must see.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use lacuna::ErrorKind;
use lacuna::block::{Change, DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::qcow2::Image;
use lacuna::units::GuestRange;
use testkit::sim::{SimHost, SimStorage};

use crate::front::Disk;
use crate::history::{ChangeId, Eyes, Fill, History, Tick};
use crate::scenario::{Request, What};

/// What all guests know of the disk.
#[derive(Clone)]
pub(crate) struct Truth {
    pub(crate) history: Rc<RefCell<History>>,
    /// Whether some storage call was made to fail: then errors are no surprise.
    pub(crate) host: SimHost,
    /// Requests that were acknowledged.
    answered: Rc<Cell<u64>>,
}

/// A request that was asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) request: Request,
    at: Tick,
    change: Option<ChangeId>,
}

/// What an answer carries.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    /// Bytes of a read.
    pub(crate) bytes: Vec<u8>,
    /// Ranges that were said to be zeros.
    pub(crate) zeros: Vec<GuestRange>,
    /// Whether zeroing was declined, as it would not have been fast.
    pub(crate) is_refused: bool,
}

impl Truth {
    pub(crate) fn new(history: &Rc<RefCell<History>>, host: &SimHost) -> Self {
        Self { history: Rc::clone(history), host: host.clone(), answered: Rc::default() }
    }

    /// Returns how many requests were answered.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.get()
    }

    /// Notes that something is asked, before it is.
    pub(crate) fn ask(&self, request: Request) -> Asked {
        let mut history = self.history.borrow_mut();
        let at = history.tick();
        let fill = match request.what {
            What::Write { fill, .. } | What::Compress { fill } => Some(fill),
            What::Zero { .. } | What::Discard => Some(Fill::Zeros),
            What::Read | What::Flush | What::Extents => None,
        };
        let change = fill.map(|fill| history.begin(request.range(), fill));
        Asked { request, at, change }
    }

    /// Judges an answer.
    ///
    /// # Errors
    /// What cannot be, in words.
    pub(crate) fn answer(
        &self,
        asked: &Asked,
        answer: Result<Answer, String>,
    ) -> Result<(), String> {
        let Asked { request, at, change } = *asked;
        let answer = match answer {
            Ok(answer) => answer,
            Err(_by_order) if self.host.struck() => return Ok(()),
            Err(error) => return Err(format!("{request:x?}: {error}")),
        };
        self.answered.set(self.answered.get() + 1);
        let mut history = self.history.borrow_mut();
        let eyes = Eyes::Reader(at, history.tick());
        let judged = match (request.what, change) {
            (What::Read, _) => history.judge(request.range(), &answer.bytes, eyes),
            (What::Extents, _) => answer.zeros.iter().try_for_each(|range| {
                let zeros = vec![0; range.len as usize];
                let judged = history.judge(*range, &zeros, eyes);
                judged.map_err(|error| format!("said to be zeros: {error}"))
            }),
            (What::Flush, _) => {
                history.flushed(at);
                Ok(())
            }
            (What::Write { fua, .. }, Some(change)) => {
                history.acknowledge(change, fua);
                Ok(())
            }
            // Nothing was done where that would not have been fast.
            (What::Zero { .. }, Some(change)) if answer.is_refused => {
                history.forget(change);
                Ok(())
            }
            (What::Zero { flags }, Some(change)) => {
                history.acknowledge(change, flags.contains(ZeroFlags::FUA));
                Ok(())
            }
            (What::Compress { .. }, Some(change)) => {
                history.acknowledge(change, false);
                Ok(())
            }
            // A discard promises nothing of single bytes.
            _ => Ok(()),
        };
        judged.map_err(|error| format!("{request:x?}: {error}"))
    }
}

/// Asks by the library; some requests are dropped on the way.
pub(crate) async fn by_library(
    disk: Disk,
    image: Image<SimStorage>,
    request: Request,
    truth: Truth,
) -> Result<(), String> {
    let asked = truth.ask(request);
    let work = perform(&disk, &image, request);
    match dropped_after(request.dropped_after, work).await {
        Some(answer) => truth.answer(&asked, answer.map_err(|error| error.to_string())),
        None => Ok(()),
    }
}

async fn perform(
    disk: &Disk,
    image: &Image<SimStorage>,
    request: Request,
) -> lacuna::Result<Answer> {
    let range = request.range();
    let mut answer = Answer::default();
    match request.what {
        What::Read => {
            let (result, bytes) = disk.read(range.start, Buffer::new(range.len as usize)).await;
            result?;
            answer.bytes = bytes.to_vec();
        }
        What::Write { fill, fua } => {
            let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
            disk.write(range.start, Buffer::from(&fill.bytes(range)[..]), flags).await.0?;
        }
        What::Compress { fill } => {
            let change = disk.before_change(range).await;
            let hold = change.as_ref().map_or(Hold::none(), Change::hold);
            compress(image, range, fill, hold).await?;
        }
        What::Zero { flags } => match disk.write_zeroes(range, flags).await {
            Err(error) if flags.contains(ZeroFlags::FAST) && is_refusal(&error) => {
                answer.is_refused = true;
            }
            done => done?,
        },
        What::Discard => disk.discard(range, DiscardMode::Guest).await?,
        What::Flush => disk.flush().await?,
        What::Extents => {
            let extents = disk.extents(range).await?;
            let zeros = extents.iter().filter(|extent| extent.status.reads_zero);
            answer.zeros = zeros.map(|extent| within(extent.range, range)).collect();
        }
    }
    Ok(answer)
}

fn is_refusal(error: &lacuna::Error) -> bool {
    error.kind() == ErrorKind::Unsupported
}

/// Compresses what is a whole cluster, and writes anything else as it is.
async fn compress(
    image: &Image<SimStorage>,
    range: GuestRange,
    fill: Fill,
    hold: Hold,
) -> lacuna::Result<()> {
    let cluster = image.geometry().cluster_bytes();
    let mut bytes = Buffer::from(&fill.bytes(range)[..]);
    bytes.set_hold(hold);
    let is_whole = range.start.0.is_multiple_of(cluster) && range.len == cluster;
    match is_whole && !image.header().has_external_data_file() {
        true => image.write_compressed(range.start, bytes).await.0,
        false => image.write(range.start, bytes, WriteFlags::empty()).await.0,
    }
}

/// Returns the part of a range that lies within another.
pub(crate) fn within(range: GuestRange, whole: GuestRange) -> GuestRange {
    let start = range.start.max(whole.start);
    let end = range.end().min(whole.end());
    GuestRange::new(start, end.0.saturating_sub(start.0))
}

/// Polls a future so often at most, once at least, and drops it then.
pub(crate) async fn dropped_after<T>(
    polls: Option<usize>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = pin!(work);
    let mut left = polls;
    std::future::poll_fn(move |cx| match work.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => {
            left = left.map(|left| left - 1);
            if left == Some(0) { Poll::Ready(None) } else { Poll::Pending }
        }
    })
    .await
}
