//! A driver in a thread of this process.

use std::io::{self, BufReader};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::{Make, Running, Streams};
use crate::serve::serve;

/// How long an engine that was told to end may take to do so.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn start(make: Arc<Make>) -> io::Result<Streams> {
    let (ours, theirs) = UnixStream::pair()?;
    let (ended, end) = channel();
    let input = BufReader::new(theirs.try_clone()?);
    std::thread::spawn(move || {
        let mut engine = make();
        // A stream that was shut is how it ends.
        serve(engine.as_mut(), input, theirs).unwrap_or_default();
        drop(engine);
        ended.send(()).unwrap_or_default();
    });
    Ok(Streams {
        input: Box::new(ours.try_clone()?),
        output: Box::new(ours.try_clone()?),
        running: Box::new(Thread { stream: ours, end }),
    })
}

struct Thread {
    stream: UnixStream,
    end: Receiver<()>,
}

impl Running for Thread {
    fn kill(&mut self) {
        self.stream.shutdown(Shutdown::Both).unwrap_or_default();
        // Nothing more to be done with one that hangs: it has no image of anybody else.
        self.end.recv_timeout(PATIENCE).unwrap_or_default();
    }

    fn said(&mut self) -> String {
        String::new()
    }
}
