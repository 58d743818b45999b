//! Commands that let requests wait at events of a test driver (`blkdebug:`).

use std::sync::Arc;

use super::commands::{Command, Done, Failure};
use super::session::Session;
use crate::nodes::{Found, Rules};

/// What C says for ENOENT and ENOTSUP.
const NO_ENTRY: &str = "No such file or directory";
const NOT_SUPPORTED: &str = "Operation not supported";

pub(super) fn set(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let [event, tag] = words else { return Err(Failure::Usage) };
    let rules = rules(session, "Could not set breakpoint")?;
    said(session, rules.set_break(event, tag), "Could not set breakpoint")
}

pub(super) fn remove(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let [tag] = words else { return Err(Failure::Usage) };
    let failure = format!("Could not remove breakpoint {tag}");
    let rules = rules(session, &failure)?;
    said(session, rules.remove_break(tag), &failure)
}

pub(super) fn resume(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let [tag] = words else { return Err(Failure::Usage) };
    let rules = rules(session, "Could not resume request")?;
    said(session, rules.resume(tag), "Could not resume request")
}

pub(super) fn wait(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let [tag] = words else { return Err(Failure::Usage) };
    let rules = rules(session, "Could not wait for breakpoint")?;
    session.wait_for_break(&rules, tag)
}

fn rules(session: &mut Session<'_>, failure: &str) -> Result<Arc<Rules>, Failure> {
    if let Some(rules) = session.disk()?.rules() {
        return Ok(Arc::clone(rules));
    }
    session.fail(&format!("{failure}: {NOT_SUPPORTED}\n"))?;
    Err(Failure::Said)
}

fn said(session: &mut Session<'_>, found: Found, failure: &str) -> Done {
    match found {
        Found::Something => Ok(()),
        Found::Nothing => session.fail(&format!("{failure}: {NO_ENTRY}\n")),
    }
}
