//! Lines of a client: bounded in length and in the time that one takes.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longest line in bytes.
pub(super) const MAX_LINE_BYTES: usize = 64 << 10;
/// How long a client may take from the first byte of a line to its last.
const LINE: Duration = Duration::from_secs(10);
/// How long a client may say nothing.
const IDLE: Duration = Duration::from_secs(600);
const PIECE_BYTES: usize = 4096;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Whole(Vec<u8>),
    /// What follows cannot be understood any more.
    TooLong,
}

/// Takes a socket apart into lines.
pub(super) struct Lines<'a> {
    socket: &'a UnixStream,
    received: Vec<u8>,
    begun: Instant,
}

impl<'a> Lines<'a> {
    pub(super) fn new(socket: &'a UnixStream) -> Self {
        Self { socket, received: Vec::new(), begun: Instant::now() }
    }

    /// Returns the next line without its end; nothing at the end of the stream, where half a line
    /// does not count.
    pub(super) fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.received, rest);
                line.pop();
                self.begun = Instant::now();
                return Ok(Some(Line::Whole(line)));
            }
            if self.received.len() > MAX_LINE_BYTES {
                return Ok(Some(Line::TooLong));
            }
            if !self.receive()? {
                return Ok(None);
            }
        }
    }

    fn receive(&mut self) -> io::Result<bool> {
        let patience = match self.received.is_empty() {
            true => IDLE,
            false => LINE.saturating_sub(self.begun.elapsed()),
        };
        if patience.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(patience))?;
        let mut piece = [0; PIECE_BYTES];
        let len = (&mut &*self.socket).read(&mut piece)?;
        if self.received.is_empty() {
            self.begun = Instant::now();
        }
        self.received.extend_from_slice(&piece[..len]);
        Ok(len > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn lines(sent: &[u8]) -> Vec<Line> {
        let (mut client, server) = UnixStream::pair().unwrap();
        let sent = sent.to_vec();
        let sender = std::thread::spawn(move || {
            // It may be hung up on.
            drop(sent.chunks(7).try_for_each(|piece| client.write_all(piece)));
        });
        let mut lines = Lines::new(&server);
        let mut all = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            all.push(line);
            if all.last() == Some(&Line::TooLong) {
                break;
            }
        }
        drop(server);
        sender.join().unwrap();
        all
    }

    #[test]
    fn lines_come_whole_and_half_a_line_is_none() {
        let whole = |text: &str| Line::Whole(text.as_bytes().to_vec());
        assert_eq!(
            lines(b"one\n\ntwo two two two\nhal"),
            [whole("one"), whole(""), whole("two two two two")]
        );
        assert_eq!(lines(b""), []);
    }

    #[test]
    fn a_line_has_an_end() {
        let mut sent = vec![b'x'; MAX_LINE_BYTES];
        sent.push(b'\n');
        assert!(matches!(&lines(&sent)[..], [Line::Whole(line)] if line.len() == MAX_LINE_BYTES));
        assert_eq!(lines(&vec![b'x'; 4 * MAX_LINE_BYTES]), [Line::TooLong]);
    }
}
