//! Rules about which request fails, and which waits.
//!
//! * A rule is woken by an event. Those that let requests fail stay in force until another event
//!   wakes such rules again.
//! * A request that waits holds no lock.

use std::future::poll_fn;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use lacuna::{Error, Result};

use crate::output;
use crate::verbs::spec::debug::{ALWAYS, Action, Fault, Rule, event};

/// What came of a wish about breakpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    Something,
}

/// How the errors that rules make begin.
const BY_A_RULE: &str = "By a rule of blkdebug";

/// Says whether an error was made by a rule.
pub(crate) fn is_by_rule(error: &Error) -> bool {
    error.message().contains(BY_A_RULE)
}

/// The rules of one storage.
pub(crate) struct Rules(Mutex<State>);

struct State {
    number: u64,
    rules: Vec<Rule>,
    in_force: Vec<Fault>,
    waiting: Vec<Waiting>,
    /// What the next request that waits is called here.
    next_id: u64,
}

struct Waiting {
    id: u64,
    tag: String,
    waker: Option<Waker>,
}

impl Rules {
    /// Starts in state 1, with the rules in force that need no event.
    pub(crate) fn new(rules: Vec<Rule>) -> Self {
        let mut state =
            State { number: 1, rules, in_force: Vec::new(), waiting: Vec::new(), next_id: 0 };
        state.wake(ALWAYS);
        Self(Mutex::new(state))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails where a rule in force says so.
    pub(in crate::nodes) fn check(&self, io_type: &str, start: u64, len: u64) -> Result<()> {
        let mut state = self.state();
        let applies = |fault: &Fault| {
            fault.io_type.is_none_or(|wanted| wanted == io_type)
                && fault.offset.is_none_or(|at| (start..start.saturating_add(len)).contains(&at))
        };
        let Some(at) = state.in_force.iter().position(applies) else { return Ok(()) };
        let fault = state.in_force[at].clone();
        if fault.once {
            state.in_force.remove(at);
            let action = Action::Fail(fault.clone());
            if let Some(rule) = state.rules.iter().position(|rule| rule.action == action) {
                state.rules.remove(rule);
            }
        }
        Err(Error::io(io::Error::from_raw_os_error(fault.errno), BY_A_RULE))
    }

    /// Wakes the rules of an event; waits where one says so.
    pub(in crate::nodes) async fn event(&self, name: &str) {
        let waiting = self.state().wake(name);
        for (id, tag) in waiting {
            // A reader of standard output that is gone is noticed with the next answer.
            drop(output::print(&format!("blkdebug: Suspended request '{tag}'\n")));
            poll_fn(|context| {
                let mut state = self.state();
                match state.waiting.iter_mut().find(|waiting| waiting.id == id) {
                    Some(waiting) => {
                        waiting.waker = Some(context.waker().clone());
                        Poll::Pending
                    }
                    None => Poll::Ready(()),
                }
            })
            .await;
        }
    }

    /// Lets the next request that comes to an event wait.
    pub(crate) fn set_break(&self, name: &str, tag: &str) -> Found {
        let Some(event) = event(name) else { return Found::Nothing };
        let action = Action::Suspend(tag.to_owned());
        self.state().rules.push(Rule { event, state: 0, action });
        Found::Something
    }

    /// Lets one request go on.
    pub(crate) fn resume(&self, tag: &str) -> Found {
        let mut state = self.state();
        let Some(at) = state.waiting.iter().position(|waiting| waiting.tag == tag) else {
            return Found::Nothing;
        };
        let waiting = state.waiting.remove(at);
        drop(state);
        drop(output::print(&format!("blkdebug: Resuming request '{tag}'\n")));
        waiting.waker.into_iter().for_each(Waker::wake);
        Found::Something
    }

    /// Takes back breakpoints of this tag, and lets requests go on that wait at one.
    pub(crate) fn remove_break(&self, tag: &str) -> Found {
        let mut state = self.state();
        let before = state.rules.len();
        let action = Action::Suspend(tag.to_owned());
        state.rules.retain(|rule| rule.action != action);
        let removed = state.rules.len() < before;
        drop(state);
        let mut found = if removed { Found::Something } else { Found::Nothing };
        while self.resume(tag) == Found::Something {
            found = Found::Something;
        }
        found
    }

    /// Says whether a request waits, by tag or at all.
    pub(crate) fn is_waiting(&self, tag: Option<&str>) -> bool {
        self.state().waiting.iter().any(|waiting| tag.is_none_or(|tag| waiting.tag == tag))
    }

    /// Lets all requests go on.
    pub(crate) fn resume_all(&self) {
        let waiting = std::mem::take(&mut self.state().waiting);
        waiting.into_iter().filter_map(|waiting| waiting.waker).for_each(Waker::wake);
    }
}

impl State {
    /// Takes note of an event; gives the requests that are to wait now.
    fn wake(&mut self, name: &str) -> Vec<(u64, String)> {
        let (now, mut next) = (self.number, self.number);
        let applies = |rule: &Rule| rule.event == name && (rule.state == 0 || rule.state == now);
        let mut faults: Option<Vec<Fault>> = None;
        let mut tags = Vec::new();
        for rule in self.rules.iter().filter(|rule| applies(rule)) {
            match &rule.action {
                Action::Fail(fault) => faults.get_or_insert_default().push(fault.clone()),
                Action::SetState(number) => next = *number,
                Action::Suspend(tag) => tags.push(tag.clone()),
            }
        }
        self.rules.retain(|rule| !(applies(rule) && matches!(rule.action, Action::Suspend(_))));
        self.number = next;
        if let Some(faults) = faults {
            self.in_force = faults;
        }
        tags.into_iter().map(|tag| self.wait(tag)).collect()
    }

    fn wait(&mut self, tag: String) -> (u64, String) {
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push(Waiting { id, tag: tag.clone(), waker: None });
        (id, tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;
    use pollster::block_on;

    fn fail(event: &'static str, state: u64, once: bool) -> Rule {
        let fault = Fault { errno: 28, offset: Some(512), once, io_type: Some("read") };
        Rule { event, state, action: Action::Fail(fault) }
    }

    #[test]
    fn requests_fail_from_the_event_on_where_the_rule_says() {
        let rules = Rules::new(vec![fail("l2_load", 0, false)]);
        assert!(rules.check("read", 0, 4096).is_ok());
        block_on(rules.event("l2_load"));
        assert_eq!(rules.check("read", 0, 4096).unwrap_err().raw_os_error(), Some(28));
        assert!(rules.check("read", 0, 512).is_ok());
        assert!(rules.check("write", 0, 4096).is_ok());
        assert!(rules.check("read", 512, 1).is_err());
    }

    #[test]
    fn once_is_once() {
        let rules = Rules::new(vec![fail("l2_load", 0, true)]);
        for is_fine in [false, true] {
            block_on(rules.event("l2_load"));
            assert_eq!(rules.check("read", 512, 1).is_ok(), is_fine);
        }
    }

    #[test]
    fn states_decide_which_rules_apply() {
        let set = Rule { event: "read_aio", state: 1, action: Action::SetState(2) };
        let rules = Rules::new(vec![set, fail("read_aio", 2, false)]);
        block_on(rules.event("read_aio"));
        assert!(rules.check("read", 512, 1).is_ok());
        block_on(rules.event("read_aio"));
        assert!(rules.check("read", 512, 1).is_err());
    }

    #[test]
    fn a_request_waits_until_its_tag_is_resumed() {
        let rules = Rules::new(Vec::new());
        assert_eq!(rules.set_break("foo", "A"), Found::Nothing);
        assert_eq!(rules.set_break("write_aio", "A"), Found::Something);
        let mut request = Box::pin(rules.event("write_aio"));
        assert!(request.as_mut().now_or_never().is_none());
        assert!(rules.is_waiting(Some("A")) && !rules.is_waiting(Some("B")));
        assert_eq!(rules.resume("B"), Found::Nothing);
        assert_eq!(rules.resume("A"), Found::Something);
        assert!(request.now_or_never().is_some());
        // The breakpoint is gone.
        assert!(rules.event("write_aio").now_or_never().is_some());
    }
}
