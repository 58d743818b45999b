//! The simulated host's files as the engine sees them.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{
    Capabilities, Capability, HostExtent, HostStatus, Storage, Transfer, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use lacuna::{Error, Result};

use super::SimHost;
use super::effect::Effect;
use super::host::{OperationKind, Reply, Request};

/// One file of a [`SimHost`].
///
/// See [`SimHost`] for an example.
#[derive(Clone, Debug)]
pub struct SimStorage {
    host: SimHost,
    file: usize,
    capabilities: Capabilities,
}

impl SimStorage {
    pub(super) const fn new(host: SimHost, file: usize) -> Self {
        let capabilities = Capabilities {
            write_zeroes: Capability::Native,
            punch_hole: Capability::Native,
            set_len: Capability::Native,
            writable: true,
            preferred_alignment_bytes: 1,
        };
        Self { host, file, capabilities }
    }

    /// Returns the same file with less (or more) that it claims to be able to do.
    ///
    /// Zeroing that is `Emulated` still works; what is `Unsupported` fails.
    #[must_use]
    pub fn with_capabilities(self, capabilities: Capabilities) -> Self {
        Self { capabilities, ..self }
    }

    /// Returns the host that the file is on.
    #[must_use]
    pub const fn host(&self) -> &SimHost {
        &self.host
    }

    /// Returns which file of the host it is.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.file
    }

    async fn submit(&self, request: Request) -> Reply {
        Call { host: &self.host, file: self.file, state: State::New(request) }.await
    }

    async fn change(&self, kind: OperationKind, effect: Effect, hold: Hold) -> Result<()> {
        let offset = effect.span().0;
        let reply = self.submit(Request::Change { kind, effect, buffer: None, hold }).await;
        result(&reply, kind, offset)
    }

    fn offers(&self, capability: Capability, what: &str) -> Result<()> {
        match capability {
            Capability::Unsupported => Err(Error::unsupported(format!("No {what} here"))),
            Capability::Native | Capability::Emulated => Ok(()),
        }
    }
}

fn result(reply: &Reply, kind: OperationKind, offset: u64) -> Result<()> {
    match reply.errno {
        None => Ok(()),
        Some(errno) => Err(Error::io(
            std::io::Error::from_raw_os_error(errno),
            format!("Simulated {kind:?} at {offset:#x}"),
        )),
    }
}

fn transfer(reply: Reply, kind: OperationKind, offset: HostOffset) -> Transfer {
    let result = result(&reply, kind, offset.0);
    (result, reply.buffer.expect("a transfer gives its buffer back"))
}

/// A call to the host: issued at the first poll, abandoned when dropped before its answer.
struct Call<'a> {
    host: &'a SimHost,
    file: usize,
    state: State,
}

enum State {
    New(Request),
    Issued(u64),
    Over,
}

impl Future for Call<'_> {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Reply> {
        let call = match std::mem::replace(&mut self.state, State::Over) {
            State::New(request) => self.host.issue(self.file, request),
            State::Issued(call) => call,
            State::Over => unreachable!("polled after it had returned"),
        };
        match self.host.reply(call, context.waker()) {
            Some(reply) => Poll::Ready(reply),
            None => {
                self.state = State::Issued(call);
                Poll::Pending
            }
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if let State::Issued(call) = self.state {
            self.host.abandon(call);
        }
    }
}

impl Storage for SimStorage {
    async fn read_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        let reply = self.submit(Request::Read { offset: offset.0, buffer }).await;
        transfer(reply, OperationKind::Read, offset)
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        let effect = Effect::Write { offset: offset.0, bytes: buffer[..].into() };
        let (kind, hold) = (OperationKind::Write, Hold::none());
        let reply = self.submit(Request::Change { kind, effect, buffer: Some(buffer), hold }).await;
        transfer(reply, kind, offset)
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        self.offers(self.capabilities.write_zeroes, "zeroing")?;
        let effect = Effect::Zero { start: range.start.0, end: range.end().0, mode };
        self.change(OperationKind::Zero, effect, hold).await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        self.offers(self.capabilities.punch_hole, "punching of holes")?;
        let effect = Effect::Punch { start: range.start.0, end: range.end().0 };
        self.change(OperationKind::Punch, effect, hold).await
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        let effect = Effect::Allocate { start: range.start.0, end: range.end().0 };
        self.change(OperationKind::Allocate, effect, Hold::none()).await
    }

    async fn flush(&self) -> Result<()> {
        let reply = self.submit(Request::Flush).await;
        result(&reply, OperationKind::Flush, 0)
    }

    async fn len(&self) -> Result<u64> {
        Ok(self.host.with_content(self.file, crate::SparseBytes::len))
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        self.offers(self.capabilities.set_len, "change of length")?;
        self.change(OperationKind::SetLen, Effect::SetLen { len }, hold).await
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        let (status, end) =
            self.host.with_content(self.file, |content| match range.start.0 < content.len() {
                true => content.status(range.start.0),
                false => (HostStatus::Hole, u64::MAX),
            });
        Ok(HostExtent { len: end.min(range.end().0) - range.start.0, status })
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
}
