//! What the engine asks of a storage, in the server's terms: pieces of what it takes at once,
//! whole blocks, zeros told rather than sent.

use std::sync::Arc;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{
    Capabilities, Capability, HostExtent, HostStatus, Storage, Transfer, ZeroMode,
};
use lacuna::units::{HostOffset, HostRange};
use lacuna::{Error, ErrorKind, Result};
use lacuna_nbd::Replies;
use lacuna_nbd::Uri;
use lacuna_nbd::client::{Command, ExportInfo};
use lacuna_nbd::wire::{CommandFlags, TransmissionFlags};

use crate::options::NbdOptions;
use crate::request::{Kept, Wanted};
use crate::runtime::{Runtime, Surroundings};
use crate::session::Session;
use crate::status::{ContextRun, cut, extents};

/// What is zeroed or discarded by one request where lengths have 32 bits, and by one where they
/// have more: nothing in between could be interrupted.
const MAX_COMPACT_BYTES: u64 = 1 << 30;
const MAX_EXTENDED_BYTES: u64 = 1 << 40;
/// What is sent at once of zeros where they have to be.
const ZEROS_BYTES: u64 = 1 << 20;
/// Requests without payload in flight for one call.
const PIECES_AT_ONCE: usize = 8;
/// An export that is written past its end grows by this part of its size at least,
const GROWTH_SHARE: u64 = 16;
/// and to a multiple of this.
const LEAST_GROWTH_BYTES: u64 = 1 << 20;
/// The unit in which disks are measured: one may end in the midst of it.
const SECTOR_BYTES: u64 = 512;

/// An export of an NBD server.
///
/// All that a [`Storage`] promises holds. Where the server offers `RESIZE`, a write past the end has
/// it grow the export, in steps. Elsewhere the length is fixed: such a write fails with `NoSpace`,
/// but for zeros that fill the last sector. With [`NbdOptions::status_context`] that context's
/// lowest bit stands for [`is_hole`](lacuna::storage::HostStatus::is_hole), and nothing is known to
/// read as zeros. What was lost with a connection, after it was
/// acknowledged, fails the next flush. Closing says goodbye.
///
/// ```no_run
/// use lacuna::raw::Raw;
/// use lacuna_remote::{NbdOptions, NbdStorage, Uri};
///
/// # pollster::block_on(async {
/// let uri = Uri::parse("nbd+unix:///disk?socket=/run/nbd.sock").unwrap();
/// let disk = Raw::open(NbdStorage::open(&uri, &NbdOptions::default()).await?).await?;
/// # drop(disk);
/// # Ok::<_, lacuna::Error>(())
/// # });
/// ```
pub struct NbdStorage {
    session: Arc<Session>,
    writes: bool,
}

impl NbdStorage {
    /// Connects to an export.
    ///
    /// # Errors
    /// `NotFound` where nobody listens or there is no such export, `ReadOnly` where changes are
    /// wanted and the export takes none, `Unsupported` for servers that know nothing of what is
    /// needed, `Io` for all else that happens to connections.
    pub async fn open(uri: &Uri, options: &NbdOptions) -> Result<Self> {
        Self::open_on(uri, options, Runtime::sockets()?).await
    }

    /// Connects to an export over what somebody gives instead of sockets: the URI says which export, and
    /// nothing of where it is. Dropped, it does not wait for goodbyes to leave. See
    /// [`Surroundings`] for an example.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_in(
        uri: &Uri,
        options: &NbdOptions,
        surroundings: Arc<dyn Surroundings>,
    ) -> Result<Self> {
        Self::open_on(uri, options, Runtime::Given(surroundings)).await
    }

    async fn open_on(uri: &Uri, options: &NbdOptions, runtime: Runtime) -> Result<Self> {
        let session = Session::open(uri, options, runtime).await?;
        Ok(Self { session, writes: options.writes })
    }

    /// Returns what the server said of the export when it was opened.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        self.session.info()
    }

    /// Says whether the server changes the size of the export when it is asked.
    #[must_use]
    pub fn can_resize(&self) -> bool {
        self.writes && self.session.offers(TransmissionFlags::SEND_RESIZE)
    }

    fn size_bytes(&self) -> u64 {
        self.session.common.size_bytes()
    }

    /// Returns what the server says of the leading part of `range`, which lies in the export and is
    /// not empty: in the words of [`NbdOptions::status_context`], else of `base:allocation`.
    ///
    /// # Errors
    /// `Unsupported` where the server offers no such context; else what asking gives.
    ///
    /// ```no_run
    /// use lacuna::units::{HostOffset, HostRange};
    /// use lacuna_remote::{NbdOptions, NbdStorage, Uri};
    ///
    /// # pollster::block_on(async {
    /// let uri = Uri::parse("nbd+unix:///disk?socket=/run/nbd.sock").unwrap();
    /// let context = Some("qemu:dirty-bitmap:monday".to_owned());
    /// let options = NbdOptions { status_context: context, ..NbdOptions::default() };
    /// let export = NbdStorage::open(&uri, &options).await?;
    /// for run in export.statuses(HostRange::new(HostOffset(0), 1 << 30)).await? {
    ///     println!("{} bytes: dirty is {}", run.len, run.status & 1);
    /// }
    /// # Ok::<_, lacuna::Error>(())
    /// # });
    /// ```
    pub async fn statuses(&self, range: HostRange) -> Result<Vec<ContextRun>> {
        if self.info().contexts.is_empty() {
            return Err(Error::unsupported("The server tells nothing of block status")
                .context(&self.session.common.endpoint.uri));
        }
        let (unit, most) = (self.unit(), self.most_without_payload());
        let (start, lead) = (range.start.0 - range.start.0 % unit, range.start.0 % unit);
        let len = (range.len + lead).next_multiple_of(unit).min(most);
        let wanted = Wanted::new(Command::BlockStatus, start, len);
        let answer = self.session.ask(wanted, Buffer::new(0), Kept::default()).await;
        answer.result?;
        let found = cut(&answer.runs, lead, range.len);
        match found.is_empty() {
            // One block at least is known, and it is the one that was asked about.
            true => Err(Error::corrupt("The server says nothing of a range")),
            false => Ok(found),
        }
    }

    /// Has the export grow for a range that passes its end, where the server does that.
    async fn make_room(&self, range: HostRange) -> Result<()> {
        let (size, end) = (self.size_bytes(), range.start.0.saturating_add(range.len));
        if end <= size.next_multiple_of(SECTOR_BYTES) || !self.can_resize() {
            return Ok(());
        }
        // Steps that grow with the export: a file that gets longer cluster by cluster asks seldom.
        let step = (size / GROWTH_SHARE).max(end - size);
        let room = (size + step).checked_next_multiple_of(LEAST_GROWTH_BYTES);
        let room = room.filter(|room| i64::try_from(*room).is_ok());
        let room = room.ok_or_else(|| self.past_end(range))?;
        self.session.resize(room, Kept::default(), |now| now < end).await
    }

    fn unit(&self) -> u64 {
        self.info().block_sizes.minimum().into()
    }

    fn is_aligned(&self, start: u64, len: u64) -> bool {
        (start | len).is_multiple_of(self.unit())
    }

    /// The longest payload, in whole blocks.
    fn most_payload(&self) -> u64 {
        let most = u64::from(self.info().block_sizes.max_payload());
        (most - most % self.unit()).max(self.unit())
    }

    fn most_without_payload(&self) -> u64 {
        match self.info().replies {
            Replies::Extended => MAX_EXTENDED_BYTES,
            _ => MAX_COMPACT_BYTES,
        }
    }

    /// Returns how many of the bytes lie in the export.
    fn within(&self, start: HostOffset, len: u64) -> u64 {
        len.min(self.size_bytes().saturating_sub(start.0))
    }

    /// Cuts a range that is to read as zeros at the end of the last sector; refuses a longer one.
    fn within_sector(&self, range: HostRange) -> Result<HostRange> {
        let end = range.start.0.checked_add(range.len);
        match end.filter(|end| *end <= self.size_bytes().next_multiple_of(SECTOR_BYTES)) {
            Some(_) => Ok(HostRange::new(range.start, self.within(range.start, range.len))),
            None => Err(self.past_end(range)),
        }
    }

    fn past_end(&self, range: HostRange) -> Error {
        let (start, len, size) = (range.start, range.len, self.size_bytes());
        let text = format!(
            "{len} bytes at {start} pass the end of the export at {size:#x}, which cannot grow"
        );
        Error::new(ErrorKind::NoSpace, text).context(&self.session.common.endpoint.uri)
    }

    /// Reads or writes whole blocks, in as many pieces as it takes.
    async fn transfer(&self, how: How, start: u64, buffer: Buffer, kept: Kept) -> Transfer {
        transfer(&self.session, how, start, buffer, kept, self.most_payload()).await
    }

    /// Reads more than is asked for, to the ends of blocks.
    async fn read_around(&self, start: u64, mut buffer: Buffer) -> Transfer {
        let (unit, len) = (self.unit(), buffer.len() as u64);
        let from = start - start % unit;
        let to = (start + len).next_multiple_of(unit);
        let whole = Buffer::new((to - from) as usize);
        let (result, whole) = self.transfer(How::READ, from, whole, Kept::default()).await;
        let lead = (start - from) as usize;
        buffer.copy_from_slice(&whole[lead..lead + len as usize]);
        (result, buffer)
    }

    /// Keeps the edges of blocks as they are while something changes whole ones.
    async fn kept(&self, hold: Arc<Hold>) -> Kept {
        let edges = match self.unit() {
            1 => None,
            _ => Some(Arc::new(Arc::clone(&self.session.edges).read_owned().await)),
        };
        Kept { hold: Some(hold), edges, turn: None }
    }

    /// Writes to parts of blocks: reads what is around, alone with it. Goes on when the caller has
    /// gone, since what was read must not be written later than what others write then.
    async fn write_around(
        &self,
        start: u64,
        buffer: Buffer,
        flags: CommandFlags,
        hold: Arc<Hold>,
    ) -> Transfer {
        let (session, most) = (Arc::clone(&self.session), self.most_payload());
        let len = buffer.len();
        let written = self.session.runtime.run(async move {
            let written = rewrite(session, start, buffer, flags, most).await;
            drop(hold);
            written
        });
        written.await.unwrap_or_else(|error| {
            let error = std::io::Error::other(error);
            (Err(Error::io(error, "Writing to a part of a block")), Buffer::new(len))
        })
    }

    /// Writes what lies in the export, and refuses what is not zeros behind it.
    async fn write(&self, offset: HostOffset, mut buffer: Buffer, flags: CommandFlags) -> Transfer {
        let range = HostRange::new(offset, buffer.len() as u64);
        if let Err(error) = self.make_room(range).await {
            return (Err(error), buffer);
        }
        let there = self.within(offset, range.len) as usize;
        let is_zero_behind = buffer[there..].iter().all(|byte| *byte == 0);
        if let Err(error) = self.within_sector(range).and_then(|_| match is_zero_behind {
            true => Ok(()),
            false => Err(self.past_end(range)),
        }) {
            return (Err(error), buffer);
        }
        let beyond = buffer.split_off(there);
        let (result, mut buffer) = match there {
            0 => (Ok(()), buffer),
            _ if self.is_aligned(offset.0, there as u64) => {
                let kept = self.kept(Arc::default()).await;
                let how = How { command: Command::Write, flags };
                self.transfer(how, offset.0, buffer, kept).await
            }
            _ => self.write_around(offset.0, buffer, flags, Arc::default()).await,
        };
        buffer.unsplit(beyond);
        (result, buffer)
    }

    /// Does something to a range without payload, in as many pieces as it takes.
    async fn tell(&self, wanted: Wanted, kept: &Kept) -> Result<()> {
        let (start, len) = (wanted.range.start, wanted.range.len);
        let most = self.most_without_payload();
        let pieces = (0..len.div_ceil(most)).map(|piece| {
            let at = piece * most;
            let wanted =
                Wanted::new(wanted.command, start + at, most.min(len - at)).with(wanted.flags);
            let (kept, none) = (kept.clone(), Buffer::new(0));
            async move { self.session.ask(wanted, none, kept).await.result }
        });
        stream::iter(pieces).buffer_unordered(PIECES_AT_ONCE).try_collect().await
    }

    /// Makes a range read as zeros; `flags` go with every request.
    async fn write_zeroes(
        &self,
        range: HostRange,
        mode: ZeroMode,
        flags: CommandFlags,
        hold: Hold,
    ) -> Result<()> {
        self.make_room(range).await?;
        let (range, unit, hold) = (self.within_sector(range)?, self.unit(), Arc::new(hold));
        let (start, end) = (range.start.0, range.end().0);
        let (inner, outer) = (start.next_multiple_of(unit), end - end % unit);
        // Parts of blocks at both ends are written.
        let parts = match inner > outer {
            true => [(start, end), (end, end)],
            false => [(start, inner), (outer, end)],
        };
        for (from, to) in parts.into_iter().filter(|(from, to)| from < to) {
            let zeros = Buffer::zeroed((to - from) as usize);
            self.write_around(from, zeros, flags, Arc::clone(&hold)).await.0?;
        }
        let whole = HostRange::new(HostOffset(inner), outer.saturating_sub(inner));
        let kept = self.kept(hold).await;
        self.zero(whole, mode, flags, &kept).await
    }

    /// Zeros whole blocks.
    async fn zero(
        &self,
        range: HostRange,
        mode: ZeroMode,
        mut flags: CommandFlags,
        kept: &Kept,
    ) -> Result<()> {
        if !self.session.offers(TransmissionFlags::SEND_WRITE_ZEROES) {
            return self.send_zeros(range, flags, kept).await;
        }
        flags.set(CommandFlags::NO_HOLE, mode == ZeroMode::Allocate);
        let wanted = Wanted::new(Command::WriteZeroes, range.start.0, range.len);
        self.tell(wanted.with(flags), kept).await
    }

    /// Zeros whole blocks of a server that has to be sent every one of them.
    async fn send_zeros(&self, range: HostRange, flags: CommandFlags, kept: &Kept) -> Result<()> {
        let how = How { command: Command::Write, flags };
        let most = ZEROS_BYTES.min(self.most_payload());
        let pieces = (0..range.len.div_ceil(most)).map(|piece| {
            let at = piece * most;
            let zeros = Buffer::zeroed(most.min(range.len - at) as usize);
            let kept = kept.clone();
            async move { self.transfer(how, range.start.0 + at, zeros, kept).await.0 }
        });
        stream::iter(pieces).buffer_unordered(PIECES_AT_ONCE).try_collect().await
    }
}

impl Drop for NbdStorage {
    fn drop(&mut self) {
        self.session.close();
    }
}

impl std::fmt::Debug for NbdStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let uri = self.session.common.endpoint.uri.to_string();
        f.debug_struct("NbdStorage").field("uri", &uri).finish_non_exhaustive()
    }
}

/// A command with a payload or data, and its flags.
#[derive(Clone, Copy)]
struct How {
    command: Command,
    flags: CommandFlags,
}

impl How {
    const READ: Self = Self { command: Command::Read, flags: CommandFlags::empty() };
}

async fn transfer(
    session: &Arc<Session>,
    how: How,
    start: u64,
    mut buffer: Buffer,
    kept: Kept,
    most: u64,
) -> Transfer {
    let ask = |at: u64, buffer: Buffer, kept: Kept| {
        let wanted = Wanted::new(how.command, at, buffer.len() as u64).with(how.flags);
        async move {
            let answer = session.ask(wanted, buffer, kept).await;
            (answer.result, answer.buffer)
        }
    };
    if buffer.len() as u64 <= most {
        return ask(start, buffer, kept).await;
    }
    let mut pieces = Vec::new();
    let mut at = start;
    // The locks of the caller stay until the last piece is done.
    let hold = Arc::new(buffer.take_hold());
    while !buffer.is_empty() {
        let rest = buffer.split_off((most as usize).min(buffer.len()));
        let (len, kept) = (buffer.len() as u64, kept.clone());
        let hold = Arc::clone(&hold);
        let piece = std::mem::replace(&mut buffer, rest);
        pieces.push(ask(at, piece, Kept { hold: Some(hold), ..kept }));
        at += len;
    }
    join(join_all(pieces).await, buffer, hold)
}

/// Makes one of the pieces again; the first error counts.
fn join(pieces: Vec<Transfer>, empty: Buffer, hold: Arc<Hold>) -> Transfer {
    let mut whole: Option<Transfer> = None;
    for (result, piece) in pieces {
        whole = Some(match whole {
            None => (result, piece),
            Some((so_far, mut front)) => {
                front.unsplit(piece);
                (so_far.and(result), front)
            }
        });
    }
    let (result, mut buffer) = whole.unwrap_or((Ok(()), empty));
    if let Some(hold) = Arc::into_inner(hold) {
        buffer.set_hold(hold);
    }
    (result, buffer)
}

/// Writes to parts of blocks, alone.
async fn rewrite(
    session: Arc<Session>,
    start: u64,
    buffer: Buffer,
    flags: CommandFlags,
    most: u64,
) -> Transfer {
    let _alone = session.edges.write().await;
    let unit = u64::from(session.info().block_sizes.minimum());
    let end = start + buffer.len() as u64;
    let (from, to) = (start - start % unit, end.next_multiple_of(unit));
    let mut whole = Buffer::new((to - from) as usize);
    for block in edges(from, to, unit, (start, end)) {
        let wanted = Wanted::new(Command::Read, block, unit);
        let answer = session.ask(wanted, Buffer::new(unit as usize), Kept::default()).await;
        if let Err(error) = answer.result {
            return (Err(error), buffer);
        }
        let at = (block - from) as usize;
        whole[at..at + unit as usize].copy_from_slice(&answer.buffer);
    }
    let lead = (start - from) as usize;
    whole[lead..lead + buffer.len()].copy_from_slice(&buffer);
    let how = How { command: Command::Write, flags };
    let written = transfer(&session, how, from, whole, Kept::default(), most).await;
    (written.0, buffer)
}

/// Returns where the blocks begin that `[start, end)` covers in part.
fn edges(from: u64, to: u64, unit: u64, (start, end): (u64, u64)) -> Vec<u64> {
    let mut blocks = Vec::new();
    if from < start {
        blocks.push(from);
    }
    if end < to && (blocks.is_empty() || to - unit != from) {
        blocks.push(to - unit);
    }
    blocks
}

impl Storage for NbdStorage {
    async fn read_at(&self, offset: HostOffset, mut buffer: Buffer) -> Transfer {
        let there = self.within(offset, buffer.len() as u64);
        let mut beyond = buffer.split_off(there as usize);
        beyond.fill(0);
        let (result, mut buffer) = match there {
            0 => (Ok(()), buffer),
            _ if self.is_aligned(offset.0, there) => {
                self.transfer(How::READ, offset.0, buffer, Kept::default()).await
            }
            _ => self.read_around(offset.0, buffer).await,
        };
        buffer.unsplit(beyond);
        (result, buffer)
    }

    async fn write_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        self.write(offset, buffer, CommandFlags::empty()).await
    }

    async fn write_durably_at(&self, offset: HostOffset, buffer: Buffer) -> Transfer {
        if self.session.offers(TransmissionFlags::SEND_FUA) {
            return self.write(offset, buffer, CommandFlags::FUA).await;
        }
        match self.write_at(offset, buffer).await {
            (Ok(()), buffer) => (self.flush().await, buffer),
            failed => failed,
        }
    }

    async fn write_zeroes_at(&self, range: HostRange, mode: ZeroMode, hold: Hold) -> Result<()> {
        self.write_zeroes(range, mode, CommandFlags::empty(), hold).await
    }

    async fn write_zeroes_durably_at(
        &self,
        range: HostRange,
        mode: ZeroMode,
        hold: Hold,
    ) -> Result<()> {
        if self.session.offers(TransmissionFlags::SEND_FUA) {
            return self.write_zeroes(range, mode, CommandFlags::FUA, hold).await;
        }
        self.write_zeroes_at(range, mode, hold).await?;
        self.flush().await
    }

    async fn punch_hole_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        match self.capabilities().punch_hole {
            Capability::Unsupported => {
                Err(Error::unsupported("The server cannot be told of zeros (no WRITE_ZEROES)"))
            }
            _ => {
                let within = HostRange::new(range.start, self.within(range.start, range.len));
                self.write_zeroes_at(within, ZeroMode::MayUnmap, hold).await
            }
        }
    }

    async fn discard_at(&self, range: HostRange, hold: Hold) -> Result<()> {
        if !self.session.offers(TransmissionFlags::SEND_TRIM) {
            return Err(Error::unsupported("The server takes no TRIM"));
        }
        let (unit, len) = (self.unit(), self.within(range.start, range.len));
        let end = range.start.0 + len;
        let (start, end) = (range.start.0.next_multiple_of(unit), end - end % unit);
        let kept = self.kept(Arc::new(hold)).await;
        let wanted = Wanted::new(Command::Trim, start, end.saturating_sub(start));
        self.tell(wanted, &kept).await
    }

    async fn allocate_at(&self, range: HostRange) -> Result<()> {
        self.within_sector(range)?;
        Err(Error::unsupported("Space cannot be reserved in an export"))
    }

    async fn flush(&self) -> Result<()> {
        self.session.flush().await
    }

    async fn len(&self) -> Result<u64> {
        Ok(self.size_bytes())
    }

    async fn set_len(&self, len: u64, hold: Hold) -> Result<()> {
        if len == self.size_bytes() {
            return Ok(());
        }
        if !self.can_resize() {
            return Err(Error::unsupported("The server keeps the export at its size (no RESIZE)"));
        }
        if !len.is_multiple_of(self.unit()) {
            let unit = self.unit();
            let text =
                format!("{len} bytes are no multiple of the export's smallest block, {unit}");
            return Err(Error::invalid(text));
        }
        let kept = Kept { hold: Some(Arc::new(hold)), ..Kept::default() };
        self.session.resize(len, kept, |now| now != len).await
    }

    async fn status_at(&self, range: HostRange) -> Result<HostExtent> {
        let found = self.extents_at(range).await?;
        found.first().copied().ok_or_else(|| Error::corrupt("The server says nothing of a range"))
    }

    async fn extents_at(&self, range: HostRange) -> Result<Vec<HostExtent>> {
        let there = self.within(range.start, range.len);
        if there == 0 {
            return Ok(vec![HostExtent { len: range.len, status: HostStatus::Hole }]);
        }
        if self.info().contexts.is_empty() {
            return Ok(vec![HostExtent { len: there, status: HostStatus::Data }]);
        }
        let runs = self.statuses(HostRange::new(range.start, there)).await?;
        Ok(extents(&runs, self.session.common.endpoint.context.as_deref()))
    }

    fn capabilities(&self) -> Capabilities {
        let zeroes = self.session.offers(TransmissionFlags::SEND_WRITE_ZEROES);
        Capabilities {
            // Whatever the server does, it is less than to send them.
            write_zeroes: if zeroes { Capability::Native } else { Capability::Emulated },
            punch_hole: if zeroes { Capability::Native } else { Capability::Unsupported },
            set_len: Capability::Unsupported,
            writable: self.writes,
            preferred_alignment_bytes: self.info().block_sizes.preferred(),
        }
    }
}
