//! Somebody else has an image: says who, and what can be done about it.
//!
//! Under QEMU's names its own words; under ours the process, which QEMU's programs cannot name.

use lacuna::ErrorKind;
use lacuna::qcow2::Access;
use lacuna::storage::{Holder, Holders, LockConflict, Obstacle, Permissions};

use crate::error::CliError;
use crate::persona::Tool;

/// How many processes are named.
const MOST_NAMED: usize = 3;

/// Says that a file cannot be had; `access` is what was wanted of the image.
pub(crate) fn refusal(tool: &Tool, conflict: &LockConflict, access: Access) -> CliError {
    let refusal = match tool.is_own() {
        true => own_words(conflict, access),
        false => CliError::new(qemu_words(conflict)),
    };
    let file = conflict.path().to_string_lossy().into_owned();
    refusal.with_class(ErrorKind::Busy).with_fact("file", file)
}

/// What QEMU's programs say of a target that is one of the sources: they lock it as well.
pub(crate) fn own_source(target: &str) -> CliError {
    CliError::new(format!("Failed to get \"write\" lock\n{}", question(target)))
}

fn question(file: impl std::fmt::Display) -> String {
    format!("Is another process using the image [{file}]?")
}

/// Says whom QEMU's programs would suspect.
fn qemu_words(conflict: &LockConflict) -> String {
    let question = question(conflict.path().display());
    match conflict.obstacle() {
        Obstacle::Byte(byte) => format!("Failed to lock byte {byte}"),
        Obstacle::Denied(one) => format!("Failed to get \"{one}\" lock\n{question}"),
        Obstacle::Held(one) => format!("Failed to get shared \"{one}\" lock\n{question}"),
    }
}

fn own_words(conflict: &LockConflict, access: Access) -> CliError {
    let holders = conflict.holders();
    let text = format!("{} is in use: {}", conflict.path().display(), who(&holders));
    let may_force = access == Access::ReadOnly && matches!(conflict.obstacle(), Obstacle::Held(_));
    let refusal = CliError::new(text).with_hint(match may_force {
        true => "--force-share (-U) reads it all the same; what is read may be half changed",
        false => {
            "close it there first; to look at it meanwhile, use a verb that only reads (or `io -r`), \
             with --force-share (-U) if it is being written"
        }
    });
    match holders.found.first() {
        Some(holder) => refusal
            .with_fact("holder_pid", holder.pid)
            .with_fact("holder_command", holder.command.clone()),
        None => refusal,
    }
}

fn who(holders: &Holders) -> String {
    let named: Vec<String> = holders.found.iter().take(MOST_NAMED).map(deed).collect();
    match (holders.found.len().saturating_sub(MOST_NAMED), holders.unseen) {
        (0, 0) if named.is_empty() => "by a process that cannot be seen from here: in another \
                                       container, on another host, or just gone"
            .to_owned(),
        (0, unseen) if named.is_empty() => format!(
            "by a process that cannot be seen: {unseen} processes, mostly of other users, may not \
             be looked into"
        ),
        (0, _) => named.join(", "),
        (more, _) => format!("{}, and {more} more", named.join(", ")),
    }
}

/// What a holder does with the file.
fn deed(holder: &Holder) -> String {
    let does = match holder.claim.held {
        held if held.intersects(Permissions::CHANGE) => "writes to it",
        held if held.contains(Permissions::CONSISTENT_READ) => "reads it",
        _ => "looks at it",
    };
    match holder.pid == std::process::id() {
        true => format!("this command itself {does}"),
        false => format!("{holder} {does}"),
    }
}
