//! The engine proved against a model, crashes, cancellation, failing hosts and QEMU.
//!
//! `LACUNA_SEED=n` replays one seed, `LACUNA_SEEDS=n` runs more of them, `LACUNA_LONG=1` goes
//! through every combination instead of a spread of them.

mod amend;
mod anchors;
mod bitmap_edits;
mod bitmaps;
mod cancellation;
mod claims;
mod commit;
mod compacting;
mod compacting_crash;
mod compaction_bounds;
mod crash;
mod crash_random;
mod dedup_writes;
mod detection;
mod faults;
mod guest_order;
mod history;
mod kept_mapping;
mod live_compacting;
mod live_extents;
mod live_history;
mod live_tables;
mod point_crash;
mod points;
mod qemu_differential;
mod random_operations;
mod rebase;
mod scene;
mod sharing;
mod sharing_rules;
mod sharing_stock;
mod shorter_table;
mod sweeping;
mod uniting;

use testkit::{case, drive};
