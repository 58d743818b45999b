//! A client by hand: words of the protocol, and TLS from rustls, on a blocking socket.

use std::io::{Read, Write};
use std::net::TcpStream;

use tokio_rustls::rustls::{ClientConnection, StreamOwned};

use crate::served::Served;

pub(crate) const STARTTLS: u32 = 5;
pub(crate) const LIST: u32 = 3;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const LIST_META_CONTEXT: u32 = 9;
pub(crate) const SET_META_CONTEXT: u32 = 10;
pub(crate) const ACK: u32 = 1;
pub(crate) const SERVER: u32 = 2;
pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;

/// Connects and says hello, without TLS.
pub(crate) fn greeted(served: &Served) -> TcpStream {
    let mut socket = TcpStream::connect(("127.0.0.1", served.port)).unwrap();
    socket.set_nodelay(true).unwrap();
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    socket.write_all(&3_u32.to_be_bytes()).unwrap();
    socket
}

/// Spells an option.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [b"IHAVEOPT", &code.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

/// Reads a reply: which option it is for, its code, its data.
pub(crate) fn reply(stream: &mut impl Read) -> (u32, u32, Vec<u8>) {
    let mut head = [0; 20];
    stream.read_exact(&mut head).unwrap();
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut data = vec![0; word(16) as usize];
    stream.read_exact(&mut data).unwrap();
    (word(8), word(12), data)
}

/// Sends an option and reads the first reply.
pub(crate) fn ask(stream: &mut (impl Read + Write), code: u32, data: &[u8]) -> (u32, Vec<u8>) {
    stream.write_all(&option(code, data)).unwrap();
    let (answered, code_of_reply, data) = reply(stream);
    assert_eq!(answered, code);
    (code_of_reply, data)
}

/// Asks for TLS, and is told to go on.
pub(crate) fn starts(served: &Served) -> TcpStream {
    let mut socket = greeted(served);
    assert_eq!(ask(&mut socket, STARTTLS, &[]).0, ACK);
    socket
}

pub(crate) type Secure = StreamOwned<ClientConnection, TcpStream>;

/// Puts TLS on a socket.
pub(crate) fn secured(served: &Served, socket: TcpStream) -> Secure {
    let target = served.client().toward(Some("localhost")).unwrap();
    let connection = ClientConnection::new(target.config, target.name).unwrap();
    StreamOwned::new(connection, socket)
}

/// Goes as far as transmission, under TLS.
pub(crate) fn transmitting(served: &Served) -> Secure {
    let mut stream = secured(served, starts(served));
    stream.write_all(&option(GO, &[0; 6])).unwrap();
    while reply(&mut stream).1 != ACK {}
    stream
}

/// Spells a request to read.
pub(crate) fn read_request(cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let head = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
    [&head[..], &cookie.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}
