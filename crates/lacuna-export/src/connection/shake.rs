//! The handshake: bytes to and from the machine, and its questions answered.

use std::io;
use std::sync::Arc;

use lacuna_nbd::server::{
    Event, Export as Description, Handshake, Purpose, Question, Refusal, Transmission,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::ServedDisk;
use crate::export::Guest;
use crate::server::Shared;
use crate::stream::Stream;

/// Options are short; longer ones come in pieces.
const PIECE_BYTES: usize = 4096;

/// A client that has chosen.
pub(super) struct Ready<D> {
    pub(super) stream: Stream,
    pub(super) transmission: Transmission,
    pub(super) guest: Guest<D>,
    /// What came behind the last option.
    pub(super) early: Vec<u8>,
}

/// Goes through the handshake, that of TLS within it. Nothing, where the client leaves before it has chosen.
pub(super) async fn hands<D: ServedDisk>(
    mut stream: Stream,
    shared: &Arc<Shared<D>>,
) -> io::Result<Option<Ready<D>>> {
    let mut handshake = Handshake::new(shared.tls().mode());
    let (mut received, mut guest) = (Vec::new(), None);
    loop {
        let mut input = &received[..];
        let event = handshake.advance(&mut input);
        received.drain(..received.len() - input.len());
        stream.write_all(&handshake.take_output()).await?;
        stream.flush().await?;
        match event.map_err(io::Error::other)? {
            Event::Aborted => return Ok(None),
            Event::NeedInput if !receive(&mut stream, &mut received).await? => return Ok(None),
            Event::NeedInput => {}
            Event::ListExports => handshake.answer_list(&shared.exports().list()),
            Event::FindExport(question) => {
                let answer = find(shared, &question, &mut guest).await;
                handshake.answer_export(answer);
            }
            Event::StartTls => {
                let Some(tls) = shared.tls().settings() else { return Ok(None) };
                // What came behind the option came in plaintext, maybe from somebody else.
                (received, guest) = (Vec::new(), None);
                stream = stream.secure(tls).await?;
                handshake.tls_established();
            }
            Event::Transmission(transmission) => {
                let (transmission, early) = (*transmission, received);
                return Ok(guest.map(|guest| Ready { stream, transmission, guest, early }));
            }
        }
    }
}

/// Adds what comes next; false at the end of the stream.
async fn receive(stream: &mut Stream, received: &mut Vec<u8>) -> io::Result<bool> {
    let mut piece = [0; PIECE_BYTES];
    let len = stream.read(&mut piece).await?;
    received.extend_from_slice(&piece[..len]);
    Ok(len > 0)
}

/// Finds what the client means, and keeps its place there if it is about to use it.
async fn find<D: ServedDisk>(
    shared: &Shared<D>,
    question: &Question,
    guest: &mut Option<Guest<D>>,
) -> Result<Description, Refusal> {
    *guest = None;
    let export = shared.exports().find(&question.name).ok_or(Refusal::Unknown)?;
    if question.purpose == Purpose::Use {
        *guest = Some(export.admit()?);
    }
    Ok(export.describe(question.wants_init_state).await)
}
