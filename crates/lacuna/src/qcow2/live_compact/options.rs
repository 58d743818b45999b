//! What a live compaction is told, and what it tells.

/// How an image that is in use is compacted.
///
/// ```
/// assert_eq!(lacuna::qcow2::LiveCompactOptions::default().slice_bytes, 8 << 20);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct LiveCompactOptions {
    /// About how many bytes a step reads, of tables or of what moves. Each step is made durable, so
    /// that small ones cost more.
    pub slice_bytes: u64,
    /// Bytes for what is known of clusters that several entries show: about 100 for each, and 32 for
    /// each entry. What does not fit waits for the next pass.
    pub memory_bytes: u64,
}

impl Default for LiveCompactOptions {
    fn default() -> Self {
        Self { slice_bytes: 8 << 20, memory_bytes: 64 << 20 }
    }
}

/// What was done so far.
///
/// ```
/// assert_eq!(lacuna::qcow2::LiveCompacted::default().moved_bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveCompacted {
    /// Bytes of clusters that were given another place: data, streams and tables.
    pub moved_bytes: u64,
    /// Bytes by which the file was cut, all cuts together. It may have grown in between.
    pub shortened_bytes: u64,
    /// Bytes in use that lie behind what all that is in use needs, at the end: they could not be moved
    /// while the image is open, or were written meanwhile.
    pub left_bytes: u64,
}

/// What is being done.
///
/// ```
/// assert_ne!(lacuna::qcow2::LiveCompactPhase::Count, lacuna::qcow2::LiveCompactPhase::Move);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LiveCompactPhase {
    /// Counting what is in use. The unit is a byte of the file.
    Count,
    /// Moving. The unit is a byte that lies behind what all that is in use needs.
    Move,
    /// Cutting the file. There is no unit.
    Cut,
}

/// How far it is.
///
/// See [`LiveCompaction`](super::LiveCompaction) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveCompactProgress {
    /// What is being done.
    pub phase: LiveCompactPhase,
    /// How much of the phase is done.
    pub done_bytes: u64,
    /// How much there is, as far as is known.
    pub total_bytes: u64,
    /// Bytes that the last step read.
    pub step_bytes: u64,
    /// What was done so far.
    pub so_far: LiveCompacted,
}
