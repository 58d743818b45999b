//! Commands that need no image: help, sleep, quit.

use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use super::commands::{self, COMMANDS, Command, Done, Failure};
use super::session::Session;

pub(super) fn help(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let Some(name) = words.first() else {
        let lines: String = COMMANDS.iter().map(Command::line).collect();
        return session.say(&format!("{lines}\nUse 'help commandname' for extended help.\n"));
    };
    match commands::find(name) {
        Some(command) => session.say(&command.line()),
        None => session.fail(&format!("command {name} not found\n")),
    }
}

pub(super) fn quit(session: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    session.end();
    Ok(())
}

pub(super) fn sleep(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let [text] = words else { return Err(Failure::Usage) };
    match text.parse() {
        Ok(milliseconds) => {
            // The point of the command; nothing else waits for it.
            std::thread::sleep(Duration::from_millis(milliseconds));
            Ok(())
        }
        Err(_) => session.fail(&format!("{text} is not a valid number\n")),
    }
}

/// Ends the program as a crash would.
pub(super) fn abort(_: &mut Session<'_>, _: &Command, _: &[String]) -> Done {
    std::process::abort()
}

/// Sends a signal to the program itself: what a crash at this point leaves can be looked at then.
pub(super) fn sigraise(session: &mut Session<'_>, _: &Command, words: &[String]) -> Done {
    let [text] = words else { return Err(Failure::Usage) };
    let Some(signal) = text.parse().ok().and_then(Signal::from_named_raw) else {
        return session.fail(&format!("{text} is not a valid signal number\n"));
    };
    match kill_process(getpid(), signal) {
        Ok(()) => Ok(()),
        Err(error) => session.report(&error.to_string()),
    }
}
