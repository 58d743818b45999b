//! Serves disks to NBD clients.
//!
//! ```text
//!  listener ─ accepted socket ─▶ worker (one thread, one runtime, many connections)
//!                                  │
//!                                  ▼
//!                     Connection: handshake, then transmission
//!                       receive ─▶ lacuna_nbd (pure) ─▶ requests
//!                                                          │ polled once where they arrive,
//!                                                          │ kept only where they must wait
//!                       send   ◀─ headers and bytes ◀──────┘
//!                                  │
//!                                  ▼
//!                     ServedDisk (a Layer of the engine, and what its format knows beyond)
//! ```
//!
//! * `disk.rs`: what a disk must tell to be served
//! * `export.rs`: a disk under a name, for some clients, in some way
//! * `facts.rs`: what its meta contexts tell
//! * `exports.rs`: all exports of a server
//! * `address.rs`, `stream.rs`: where clients come from, and their sockets
//! * `tls.rs`: whether those are under TLS
//! * `server.rs`: listeners, workers, and a stop that loses nothing
//! * `population.rs`: who is connected
//! * `connection/`: one client
//!
//! Always and never:
//!
//! * All connections share one engine, so that what one client wrote and flushed is what all see:
//!   `CAN_MULTI_CONN` is honest.
//! * One client never stalls another: each has bounds of its own on requests, bytes and time, and
//!   what it does not read stays its own queue.
//! * A request is never handed to another thread: it is polled where it arrived. A read from the
//!   page cache costs no wake-up, no lock beyond the engine's, and no allocation of its own.
//! * An idle connection keeps no buffer; one under TLS keeps what rustls needs, some kilobytes.
//! * Under TLS the same bytes go the same way: a plain connection pays for it with one branch.

mod address;
mod connection;
mod disk;
mod export;
mod exports;
mod facts;
mod population;
mod server;
mod stream;
mod tls;

pub use address::{Address, Listener, remove_stale};
pub use disk::{DirtyRun, Plain, ServedDisk};
pub use export::{Clients, Empty, Export, ExportOptions, Statistics};
pub use exports::Exports;
pub use facts::LayerBitmaps;
pub use population::Connection;
pub use server::{AllLeft, Limits, Server, ServerOptions, WhenFull, serve_stream};
pub use tls::Tls;
