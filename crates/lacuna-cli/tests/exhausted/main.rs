//! A host that has no more to give: space, length of files, open files, leave to write, and files that
//! an image stands on.
//!
//! * Always: the error says what is missing and what to do, and its exit code is 1.
//! * Always: nothing that was there is lost or becomes worse, and the same command succeeds when the
//!   host has again what it lacked.

#[path = "../common/mod.rs"]
mod common;
mod full_disk;
mod limits;
