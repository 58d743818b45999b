//! QEMU's image locking: a claim as locked bytes of the file.
//!
//! Byte `100 + i` is locked by whoever holds permission *i*, byte `200 + i` by whoever denies it to
//! others; both locks are shared ones. Whoever wants a permission takes his own bytes first and
//! then looks for somebody on the opposite ones: of two who come at once, one or both give way.
//!
//! * Always: bytes for more than before are taken and tested before any is given up.
//! * Never: a lock that is waited for.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::conflict::{LockConflict, Obstacle};
use crate::storage::sys::{Lock, OpenFile};
use crate::storage::{Claim, Locking, Permissions};
use crate::{Error, Result};

const HELD_BYTES: u16 = 100;
const DENIED_BYTES: u16 = 200;

/// The claim on a file.
#[derive(Debug)]
pub(super) struct FileLock {
    locking: Locking,
    /// The host has no such locks.
    is_refused: AtomicBool,
    /// Kept locked while the bytes change; the calls do not wait.
    claim: Mutex<Claim>,
}

impl FileLock {
    pub(super) const fn new(locking: Locking) -> Self {
        let is_refused = AtomicBool::new(false);
        Self { locking, is_refused, claim: Mutex::new(Claim::NONE) }
    }

    pub(super) fn claim(&self) -> Claim {
        *self.claim.lock()
    }

    /// Goes from the claim there was to `wanted`, or stays with it.
    pub(super) fn change(&self, file: &OpenFile, path: &Path, wanted: Claim) -> Result<()> {
        let mut claim = self.claim.lock();
        if self.locking != Locking::Off && !self.is_refused.load(Ordering::Relaxed) {
            self.move_bytes(file, path, *claim, wanted)?;
        }
        *claim = wanted;
        Ok(())
    }

    fn move_bytes(&self, file: &OpenFile, path: &Path, old: Claim, new: Claim) -> Result<()> {
        let more = difference(new, old);
        // Less than before is nobody's trouble.
        if more != Claim::NONE
            && let Err(obstacle) = take(file, more).and_then(|()| test(file, new))
        {
            // Named while a byte is locked: that is how the kernel's name of the file is seen.
            let error = self.error(file, path, obstacle);
            give_up(file, more);
            return error.map_or(Ok(()), Err);
        }
        give_up(file, difference(old, new));
        Ok(())
    }

    /// Makes an error of what is in the way; none where locks are wanted only if they can be had.
    fn error(&self, file: &OpenFile, path: &Path, obstacle: Failure) -> Option<Error> {
        match obstacle {
            Failure::Obstacle(obstacle) => {
                Some(LockConflict::new(file, path, obstacle).into_error())
            }
            Failure::Host(error) if !has_no_locks(&error) => {
                Some(Error::io(error, format!("Locking {}", path.display())))
            }
            Failure::Host(_) if self.locking == Locking::Auto => {
                self.is_refused.store(true, Ordering::Relaxed);
                None
            }
            Failure::Host(error) => Some(Error::unsupported(format!(
                "{} cannot be locked, as was asked for: {error}",
                path.display()
            ))),
        }
    }
}

/// Says whether the host has no such locks at all, as opposed to being in trouble. `NOLCK` is what
/// a network file system without a lock service says.
fn has_no_locks(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::INVAL, Errno::NOLCK, Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOTTY]
        .iter()
        .any(|code| error.raw_os_error() == Some(code.raw_os_error()))
}

/// Why bytes were not had.
enum Failure {
    Obstacle(Obstacle),
    /// Not somebody else's doing.
    Host(std::io::Error),
}

/// What `one` holds or denies and `other` does not.
fn difference(one: Claim, other: Claim) -> Claim {
    let held = one.held.difference(other.held);
    Claim { held, ..Claim::NONE }.denying(one.denied().difference(other.denied()))
}

/// Returns the bytes of a claim, those for what is held first.
fn bytes(claim: Claim) -> impl Iterator<Item = u16> {
    let held = claim.held.numbered().map(|(number, _)| HELD_BYTES + u16::from(number));
    let denied = claim.denied().numbered().map(|(number, _)| DENIED_BYTES + u16::from(number));
    held.chain(denied)
}

fn take(file: &OpenFile, more: Claim) -> Result<(), Failure> {
    for byte in bytes(more) {
        file.lock(byte, Lock::Shared).map_err(|error| {
            use rustix::io::Errno;
            let is = |errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
            match is(Errno::AGAIN) || is(Errno::ACCESS) {
                true => Failure::Obstacle(Obstacle::Byte(byte)),
                false => Failure::Host(error),
            }
        })?;
    }
    Ok(())
}

/// Looks for others on the bytes opposite to those of `claim`.
fn test(file: &OpenFile, claim: Claim) -> Result<(), Failure> {
    look(file, claim.held, DENIED_BYTES, Obstacle::Denied)?;
    look(file, claim.denied(), HELD_BYTES, Obstacle::Held)
}

fn look(
    file: &OpenFile,
    permissions: Permissions,
    bytes: u16,
    obstacle: fn(Permissions) -> Obstacle,
) -> Result<(), Failure> {
    for (number, one) in permissions.numbered() {
        match file.is_locked_elsewhere(bytes + u16::from(number)) {
            Ok(false) => {}
            Ok(true) => return Err(Failure::Obstacle(obstacle(one))),
            Err(error) => return Err(Failure::Host(error)),
        }
    }
    Ok(())
}

/// Unlocks; a byte that stays locked keeps others out for longer than needed, no worse.
fn give_up(file: &OpenFile, less: Claim) {
    for byte in bytes(less) {
        drop(file.lock(byte, Lock::None));
    }
}

/// Returns the byte that whoever causes the obstacle has locked.
pub(super) fn byte_of(obstacle: Obstacle) -> u16 {
    let number = |one: Permissions| one.bits().trailing_zeros() as u16;
    match obstacle {
        Obstacle::Byte(byte) => byte,
        Obstacle::Denied(one) => DENIED_BYTES + number(one),
        Obstacle::Held(one) => HELD_BYTES + number(one),
    }
}

/// Returns the claim that locked bytes stand for.
pub(super) fn claim_of(locked: impl Fn(u16) -> bool + Copy) -> Claim {
    let among = |bytes: u16| {
        let numbered = Permissions::all().numbered();
        numbered.filter(move |&(number, _)| locked(bytes + u16::from(number))).map(|(_, one)| one)
    };
    let held = among(HELD_BYTES).collect();
    Claim { held, ..Claim::NONE }.denying(among(DENIED_BYTES).collect())
}
