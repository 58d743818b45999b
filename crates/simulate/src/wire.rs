//! Two ends of a connection; the executor decides when bytes arrive, and how many at a time.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use testkit::{Device, Random};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes on their way in one direction, at most.
const WINDOW_BYTES: usize = 8 << 10;

/// One direction.
#[derive(Debug, Default)]
struct Pipe {
    in_transit: VecDeque<u8>,
    arrived: VecDeque<u8>,
    /// Nothing more is sent.
    is_closed: bool,
    /// The end of the stream has arrived, too.
    is_over: bool,
    /// Nobody will read.
    is_unread: bool,
    is_cut: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    fn moves(&self) -> bool {
        !self.in_transit.is_empty() || (self.is_closed && !self.is_over)
    }

    /// Loses what has not arrived, in both directions; returns who is to know.
    fn cut(&mut self) -> [Option<Waker>; 2] {
        self.in_transit.clear();
        (self.is_closed, self.is_over, self.is_unread) = (true, true, true);
        self.is_cut = true;
        [self.reader.take(), self.writer.take()]
    }

    /// Lets some bytes arrive, or behind the last the end.
    fn deliver(&mut self, random: &mut Random, lies: &AtomicBool) -> Option<Waker> {
        match self.in_transit.len() {
            0 => self.is_over = true,
            len => {
                let most = if random.one_in(4) { len.min(7) } else { len };
                let count = 1 + random.index(most);
                let (first, rest) = slices(&self.in_transit, count);
                self.arrived.extend(first);
                self.arrived.extend(rest);
                self.in_transit.drain(..count);
                if count >= LARGE_BYTES && lies.swap(false, Ordering::Relaxed) {
                    let last = self.arrived.len() - 1;
                    self.arrived[last] ^= 1;
                }
            }
        }
        self.reader.take()
    }
}

/// Returns the first bytes of a queue, in two pieces.
fn slices(bytes: &VecDeque<u8>, count: usize) -> (&[u8], &[u8]) {
    let (first, rest) = bytes.as_slices();
    let len = count.min(first.len());
    (&first[..len], &rest[..count - len])
}

type Shared = Arc<Mutex<Pipe>>;

fn lock(pipe: &Shared) -> MutexGuard<'_, Pipe> {
    pipe.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection, as the executor sees it.
pub(crate) struct Wire {
    pipes: [Shared; 2],
    random: Mutex<Random>,
    /// Pieces that arrive yet before it is cut, where it is.
    left: AtomicUsize,
    /// Whether it may change what it carries.
    lies: AtomicBool,
}

/// More pieces than any wire carries.
const UNCUT: usize = usize::MAX;
/// Bytes of a piece in which a wire that lies changes one.
const LARGE_BYTES: usize = 400;

impl Wire {
    /// Orders that it is cut once so many pieces have arrived.
    pub(crate) fn cut_after(&self, pieces: usize) {
        self.left.store(pieces, Ordering::Relaxed);
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }

    /// Orders that a byte in a large piece is changed.
    pub(crate) fn lie(&self) {
        self.lies.store(true, Ordering::Relaxed);
    }

    /// Notes that a piece has arrived; the last but for those that are lost.
    fn has_delivered(&self) {
        let left = self.left.load(Ordering::Relaxed);
        if left == UNCUT {
            return;
        }
        self.left.store(left - 1, Ordering::Relaxed);
        if left == 1 {
            let wakers: Vec<_> = self.pipes.iter().flat_map(|pipe| lock(pipe).cut()).collect();
            wakers.into_iter().flatten().for_each(Waker::wake);
        }
    }
}

/// One end of a connection; dropped, it cuts it.
#[derive(Debug)]
pub(crate) struct End {
    incoming: Shared,
    outgoing: Shared,
}

/// Says of a wire whether it was cut.
#[derive(Clone, Debug)]
pub(crate) struct Watch(Shared);

impl Watch {
    pub(crate) fn is_cut(&self) -> bool {
        lock(&self.0).is_cut
    }
}

impl End {
    pub(crate) fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.incoming))
    }
}

/// Lays a wire and returns its ends.
pub(crate) fn wire(seed: u64) -> (Arc<Wire>, End, End) {
    let (up, down) = (Shared::default(), Shared::default());
    let pipes = [Arc::clone(&up), Arc::clone(&down)];
    let random = Mutex::new(Random::new(seed));
    let (left, lies) = (AtomicUsize::new(UNCUT), AtomicBool::new(false));
    let wire = Wire { pipes, random, left, lies };
    let client = End { incoming: Arc::clone(&down), outgoing: Arc::clone(&up) };
    (Arc::new(wire), client, End { incoming: up, outgoing: down })
}

impl Device for Wire {
    fn pending(&self) -> usize {
        self.pipes.iter().filter(|pipe| lock(pipe).moves()).count()
    }

    fn complete(&self, index: usize) {
        let moving = self.pipes.iter().filter(|pipe| lock(pipe).moves()).nth(index);
        let Some(pipe) = moving else { return };
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        let waker = lock(pipe).deliver(&mut random, &self.lies);
        drop(random);
        self.has_delivered();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut pipe = lock(&self.incoming);
        let count = pipe.arrived.len().min(buffer.remaining());
        if count == 0 && !pipe.is_over {
            pipe.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let (first, rest) = slices(&pipe.arrived, count);
        buffer.put_slice(first);
        buffer.put_slice(rest);
        pipe.arrived.drain(..count);
        let writer = pipe.writer.take();
        drop(pipe);
        if let Some(writer) = writer {
            writer.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut pipe = lock(&self.outgoing);
        if pipe.is_unread {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = WINDOW_BYTES.saturating_sub(pipe.in_transit.len() + pipe.arrived.len());
        let count = room.min(bytes.len());
        if count == 0 && !bytes.is_empty() {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        pipe.in_transit.extend(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.outgoing).is_closed = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        lock(&self.outgoing).is_closed = true;
        let mut incoming = lock(&self.incoming);
        incoming.is_unread = true;
        let writer = incoming.writer.take();
        drop(incoming);
        if let Some(writer) = writer {
            writer.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use testkit::Executor;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn bytes_arrive_in_order_in_pieces_and_the_end_behind_them() {
        let bytes: Vec<u8> = (0..50_000_u32).map(|it| it as u8).collect();
        for seed in 1..20 {
            let (wire, mut near, mut far) = wire(seed);
            let mut executor = Executor::new(seed);
            executor.attach(wire);
            let sent = bytes.clone();
            let sending = executor.spawn(async move { near.write_all(&sent).await });
            let receiving = executor.spawn(async move {
                let mut seen = Vec::new();
                far.read_to_end(&mut seen).await.map(|_| seen)
            });
            executor.run().unwrap();
            sending.take().unwrap().unwrap();
            assert!(receiving.take().unwrap().unwrap() == bytes);
        }
    }

    #[test]
    fn who_writes_to_nobody_is_told() {
        let (wire, mut near, far) = wire(1);
        let mut executor = Executor::new(1);
        executor.attach(wire);
        let writing = executor.spawn(async move { near.write_all(&[0; 50_000]).await });
        let leaving = executor.spawn(async move { drop(far) });
        executor.run().unwrap();
        leaving.take().unwrap();
        assert_eq!(writing.take().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
