//! How many files may be open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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
