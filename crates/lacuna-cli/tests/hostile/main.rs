//! Images that mean harm, by the row of what is known to go wrong ([docs/hostile.md]): what each verb
//! does with them.
//!
//! * Always: every run is bounded in CPU time and memory, and what it took is looked at.
//! * Always: what only looks changes no byte; a repair leaves no more wrong than there was, and what
//!   the guest could read before, it reads afterwards.
//! * Never: a file is opened that nobody but the image named.
//!
//! [docs/hostile.md]: ../../../../docs/hostile.md

mod bounded;
mod case;
mod claims;
#[path = "../common/mod.rs"]
mod common;
mod damage;
mod huge;
mod names;
mod trap;
