//! What reached the file, counted by strace.
//!
//! io_uring would hide it, so strace refuses it to the program, which then calls from threads. A run
//! that is traced is not timed.

use crate::Outcome;

/// Options of strace, but for where its log goes.
pub(super) const OPTIONS: [&str; 8] = [
    "-f",
    "-qq",
    "-s",
    "0",
    "-e",
    "inject=io_uring_setup:error=ENOSYS",
    "-e",
    "trace=io_uring_setup,io_submit,pwrite64,pwritev,pwritev2,fallocate,fdatasync,fsync,sync_file_range",
];

/// System calls of a wipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Calls {
    /// Writes that begin where no guest data was.
    pub(super) metadata_writes: u64,
    pub(super) data_writes: u64,
    pub(super) syncs: u64,
    /// Changes of what the host has allocated.
    pub(super) punches: u64,
}

/// Counts the calls of a log; `is_data` says of a byte of the file whether it was guest data before.
pub(super) fn count(log: &str, is_data: impl Fn(u64) -> bool) -> Outcome<Calls> {
    let mut calls = Calls::default();
    for line in log.lines() {
        // A call that another thread interrupted has a second line, which begins otherwise.
        let Some((name, arguments)) =
            line.split_once(' ').and_then(|(_, call)| call.trim_start().split_once('('))
        else {
            continue;
        };
        match name {
            "pwrite64" | "pwritev" | "pwritev2" => match offset(name, arguments) {
                Some(at) if is_data(at) => calls.data_writes += 1,
                Some(_) => calls.metadata_writes += 1,
                None => return Err(format!("a line of strace that nobody understands: {line}")),
            },
            "fallocate" => calls.punches += 1,
            "fdatasync" | "fsync" | "sync_file_range" => calls.syncs += 1,
            "io_submit" => return Err("writes went by io_submit, which is not counted".into()),
            _ => {}
        }
    }
    Ok(calls)
}

/// Returns where a write begins: the last argument, or the one before the flags.
fn offset(name: &str, arguments: &str) -> Option<u64> {
    let call = arguments.split(" <unfinished").next()?;
    // What it returned stands in a column of its own.
    let call = call.rsplit_once(" = ").map_or(call, |(call, _)| call.trim_end());
    let mut words = call.strip_suffix(')').unwrap_or(call).rsplit(", ");
    words.nth(usize::from(name == "pwritev2"))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_told_apart_by_where_they_begin() {
        let log = "\
6491  pwrite64(9, \"\"..., 4096, 262144)  = 4096
6491  pwritev(9, [{iov_base=\"\"..., iov_len=65536}], 1, 1048576 <unfinished ...>
6490  fdatasync(9 <unfinished ...>
6491  <... pwritev resumed>) = 65536
6490  <... fdatasync resumed>) = 0
6491  pwritev2(9, [{iov_base=\"\"..., iov_len=512}, {iov_base=\"\"..., iov_len=512}], 2, 4096, RWF_NOWAIT) = 1024
6491  fallocate(9, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 1048576, 65536) = 0
6491  io_uring_setup(8, {flags=0}) = -1 ENOSYS (Function not implemented) (INJECTED)
";
        let found = count(log, |at| at >= 1 << 20);
        let expected = Calls { metadata_writes: 2, data_writes: 1, syncs: 1, punches: 1 };
        assert_eq!(found, Ok(expected));
    }

    #[test]
    fn what_cannot_be_counted_is_no_zero() {
        assert!(count("1 io_submit(0x7f, 1, []) = 1", |_| false).is_err());
        assert!(count("1 pwrite64(9, what) = 3", |_| false).is_err());
    }
}
