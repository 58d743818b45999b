//! Disks that are elsewhere: an export of an NBD server as a [`Storage`](lacuna::storage::Storage).
//!
//! ```text
//!   storage.rs     what the engine asks, in the server's terms: pieces, alignment, zeros
//!      │
//!   session.rs     which connection a request takes, what a flush promises
//!      │
//!   keeper.rs      a connection that is made again when it is lost
//!      │
//!   link.rs        requests out and replies in, on one connection
//!      │
//!   connect.rs, stream.rs     sockets and TLS; the handshake
//! ```
//!
//! * Always: sockets live on one thread of their own (`runtime.rs`), so that whoever waits for a
//!   storage may do so on any executor, or on none; or where a caller gives connections, and does the work.
//! * Always: a request whose future was dropped is finished all the same. Its buffer stays with
//!   the connection until the server is done with it.
//! * Always bounded: requests in flight, what is kept of a block status, time for a handshake, time
//!   for making a lost connection again.
//! * Never: zeros cross the wire where the server can be told of them instead.
//! * Never: an export that came back with another size or fewer abilities is taken for the same.
//! * Never: a flush succeeds after a connection was lost with writes on it that were acknowledged
//!   and not flushed. The server may have forgotten them.

mod connect;
mod keeper;
mod link;
mod options;
mod request;
mod runtime;
mod session;
mod status;
mod storage;
mod stream;
mod wording;

pub use lacuna_nbd::{Address, ExportName, Uri};
pub use options::{MAX_CONNECTIONS, NbdOptions, Tls};
pub use runtime::{Duplex, Surroundings, Work};
pub use status::ContextRun;
pub use storage::NbdStorage;
