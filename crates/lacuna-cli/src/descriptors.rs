//! How many files may be open, and how long one may be.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::SIGXFSZ;

/// More than any chain takes, its data files and clients included.
const ENOUGH: u64 = 8192;

/// Lets the process open files enough, where the host allows it: a chain of a thousand images is a
/// thousand open files, and what shells hand on is mostly 1024.
pub(crate) fn allow_enough() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(ENOUGH, |most| most.min(ENOUGH));
    if limit.current.is_some_and(|now| now < wanted) {
        // Where it stays as it is, opening says so in time.
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit }).ok();
    }
}

/// Makes a file that would be longer than may be an error of the write, which says which file that is
/// and leaves the rest to be cleaned up; by default the kernel ends the process.
pub(crate) fn survive_long_files() {
    // Without it the process ends at such a write, as others do.
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).ok();
}
