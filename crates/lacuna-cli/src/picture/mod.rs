//! A disk as a picture of characters: one for each region, with a legend and totals.
//!
//! * `content.rs` says what a run of a disk is, and adds such runs up
//! * `cells.rs` puts runs into regions, with a lane for each file of a chain
//! * `look.rs` decides which character stands for a region
//! * `draw.rs` makes lines of it
//! * `terminal.rs` finds out what the output can show
//!
//! * Always: all but `terminal.rs` is pure, and takes memory for the regions only, whatever the disk.
//! * Always: a region with any data in it looks different from one without.

mod cells;
mod content;
mod draw;
mod look;
mod terminal;

pub(crate) use cells::{Picture, Shape};
pub(crate) use content::{Content, Shares};
pub(crate) use draw::draw;
pub(crate) use terminal::Terminal;
