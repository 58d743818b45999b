//! TLS: the server against stock clients, and against clients that mean harm.

mod hostile;
mod peers;
mod served;
mod wire;
