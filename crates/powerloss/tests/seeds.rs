//! A few seeds of each path, and storage that lies, which must be noticed.

use powerloss::{Ignored, Looks, PATHS, Path, explore};
use testkit::sim::Bounds;

/// Few states of many runs.
const BOUNDS: Bounds = Bounds { exhaustive: 4, sampled: 8 };

#[test]
fn no_power_loss_of_the_first_runs_leaves_what_must_not_be() {
    let looks = Looks { bounds: BOUNDS, qemu_every: Some(300), ..Looks::default() };
    let mut by_qemu = 0;
    for path in PATHS {
        let tally = explore(&path, 1, &looks).unwrap_or_else(|failure| panic!("{failure}"));
        assert!(tally.opened > 1, "{}: {tally:?}", path.name());
        by_qemu += tally.by_qemu;
    }
    assert!(by_qemu > 0, "stock tools saw nothing");
}

#[test]
fn storage_that_ignores_flushes_is_noticed() {
    let looks = Looks { bounds: BOUNDS, ignored: Ignored::All, ..Looks::default() };
    for name in ["write", "zero", "snapshot-create", "bitmap-write", "resize", "compact", "commit"]
    {
        let path = Path::named(name).unwrap();
        assert!((1..9).any(|seed| explore(&path, seed, &looks).is_err()), "{name}");
    }
}

/// All is in order on such a medium, but for what an answer promised.
#[test]
fn a_fua_that_is_ignored_is_noticed() {
    let looks = Looks { bounds: BOUNDS, ignored: Ignored::OfFua, ..Looks::default() };
    for name in ["write", "zero", "write-shared", "in-flight"] {
        let path = Path::named(name).unwrap();
        let found = |seed| explore(&path, seed, &looks).err();
        let is_old = |error: String| error.starts_with("Byte ") || error.contains(": Byte ");
        assert!((1..40).filter_map(found).any(|failure| is_old(failure.error)), "{name}");
    }
}
