//! Conversations between our own machines, for the corpus to begin with.

use lacuna_nbd::client::{self, Event};
use lacuna_nbd::server::{self, Last, StatusExtent, TlsMode, TransmissionEvent, WantedContexts};
use lacuna_nbd::{ByteRange, Command};

use super::nbd::{asks, export, wish};

/// Both sides of a conversation, each with the bytes of choice in front that its target wants.
#[derive(Debug)]
pub struct NbdSeed {
    /// What it is about.
    pub name: String,
    /// For [`nbd_server`](super::nbd_server).
    pub client: Vec<u8>,
    /// For [`nbd_client`](super::nbd_client).
    pub server: Vec<u8>,
}

/// Returns a conversation for every goal and every form of headers.
///
/// # Panics
/// If the machines do not understand each other.
#[must_use]
pub fn nbd_seeds() -> Vec<NbdSeed> {
    (0..16).map(seed).collect()
}

fn seed(start: u8) -> NbdSeed {
    let mut client = client::Handshake::new(wish(start));
    let mut server = server::Handshake::new(TlsMode::Off);
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let mut transmission = None;
    let (mut read_up, mut read_down) = (0, 0);
    let ready = loop {
        let mut input = &up[read_up..];
        match server.advance(&mut input).expect("our own client") {
            server::Event::FindExport(question) => server.answer_export(export(&question.name)),
            server::Event::ListExports => server.answer_list(&[]),
            server::Event::Transmission(ready) => transmission = Some(*ready),
            _ => {}
        }
        read_up = up.len() - input.len();
        down.extend(server.take_output());
        let mut input = &down[read_down..];
        let event = client.advance(&mut input).expect("our own server");
        read_down = down.len() - input.len();
        up.extend(client.take_output());
        match event {
            Event::NeedInput => {}
            Event::Transmission(ready) if transmission.is_some() => break Some(*ready),
            _ => break None,
        }
        if transmission.is_some() {
            break client_of(client, &down[read_down..]);
        }
    };
    if let (Some(mut ready), Some(mut transmission)) = (ready, transmission) {
        let requests: Vec<u8> = asks()
            .iter()
            .filter_map(|ask| ready.request(ask).ok())
            .flat_map(|(_, header)| header.to_vec())
            .collect();
        down.extend(replies(&mut transmission, &requests));
        up.extend(requests);
    }
    let name = format!("conversation-{start:02}");
    let with = |start: u8, bytes: &[u8]| [&[start, 7], bytes].concat();
    NbdSeed { name, client: with(0, &up), server: with(start, &down) }
}

/// Lets the client hear the last words of the handshake.
fn client_of(mut client: client::Handshake, mut input: &[u8]) -> Option<client::Transmission> {
    match client.advance(&mut input) {
        Ok(Event::Transmission(ready)) => Some(*ready),
        _ => None,
    }
}

fn replies(transmission: &mut server::Transmission, mut requests: &[u8]) -> Vec<u8> {
    let replies = transmission.replies();
    let mut output = Vec::new();
    loop {
        let event = transmission.advance(&mut requests).expect("our own client");
        match event {
            TransmissionEvent::Request(request) if request.command == Command::Read => {
                let (tag, range) = (request.tag, request.range);
                let half = range.len / 2;
                if replies.has_chunks() && request.flags.is_empty() {
                    let hole = ByteRange { len: half, ..range };
                    let data = ByteRange { start: range.start + half, len: half };
                    output.extend_from_slice(&replies.hole(tag, hole, Last::No));
                    output.extend_from_slice(&replies.data(tag, data, Last::Yes));
                    output.extend(vec![7; half as usize]);
                } else {
                    output.extend_from_slice(&replies.whole_read(tag, range));
                    output.extend(vec![7; range.len as usize]);
                }
            }
            TransmissionEvent::Request(request) if request.command == Command::Flush => {
                let code = lacuna_nbd::wire::ErrorCode::EIO;
                replies.error(request.tag, code, "no", &mut output);
            }
            TransmissionEvent::Request(request) => {
                output.extend_from_slice(&replies.success(request.tag));
            }
            TransmissionEvent::BlockStatus(request, WantedContexts::All) => {
                let ids: Vec<_> = transmission.contexts().iter().map(|one| one.id).collect();
                for (index, id) in ids.iter().enumerate() {
                    let last = if index + 1 == ids.len() { Last::Yes } else { Last::No };
                    let extents = [3, 0, 1].map(|flags| StatusExtent { len: 4096, flags });
                    replies.block_status(&request, *id, extents, 1, last, &mut output);
                }
            }
            _ => return output,
        }
    }
}
