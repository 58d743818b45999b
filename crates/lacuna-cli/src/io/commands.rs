//! The commands of the shell: their names, how many words they take, and what executes them.

use super::session::Session;
use super::{access, allocation, breaks, image, reopen, transfer};
use crate::args::Flag;

/// How a command ended, apart from success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// What was wrong has been said.
    Said,
    /// The words make no sense: the one-line help is to be shown.
    Usage,
}

pub(super) type Done = Result<(), Failure>;

/// What a command needs before it can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    Image,
    WritableImage,
}

/// A command of the shell.
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) short: &'static str,
    /// How few and how many words may follow; `usize::MAX` is any number.
    pub(super) words: (usize, usize),
    pub(super) needs: Needs,
    /// What follows the name in the help.
    pub(super) usage: &'static str,
    pub(super) summary: &'static str,
    pub(super) flags: &'static [Flag],
    pub(super) run: fn(&mut Session<'_>, &Self, &[String]) -> Done,
}

impl Command {
    /// One line: name, words, purpose.
    pub(super) fn line(&self) -> String {
        // What takes words that are not named has a space for them.
        let space = if self.usage.is_empty() && self.name != "map" { "" } else { " " };
        format!("{}{space}{} -- {}\n", self.name, self.usage, self.summary)
    }

    /// Says whether the command is about requests that wait: it must not wait for them.
    pub(super) fn is_about_breaks(&self) -> bool {
        ["break", "remove_break", "resume", "wait_break"].contains(&self.name)
    }
}

const MANY: usize = usize::MAX;

const fn flag(letter: char, name: &'static str) -> Flag {
    Flag::switch(letter, name, "")
}

const fn value(letter: char, name: &'static str) -> Flag {
    Flag::valued(letter, name, "", "")
}

const C: Flag = flag('C', "C");
const F: Flag = flag('f', "f");
const I: Flag = flag('i', "i");
const P: Flag = value('P', "P");
const Q: Flag = flag('q', "q");
const R: Flag = flag('r', "r");
const U: Flag = flag('u', "u");
const V: Flag = flag('v', "v");
const Z: Flag = flag('z', "z");
/// Was once something; still accepted.
const OLD_P: Flag = flag('p', "p");

/// All commands, by name.
pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "abort",
        short: "",
        words: (0, 0),
        needs: Needs::Nothing,
        usage: "",
        summary: "simulate a program crash using abort(3)",
        flags: &[],
        run: access::abort,
    },
    Command {
        name: "aio_flush",
        short: "",
        words: (0, 0),
        needs: Needs::Image,
        usage: "",
        summary: "completes all outstanding aio requests",
        flags: &[],
        run: transfer::aio_flush,
    },
    Command {
        name: "aio_read",
        short: "",
        words: (2, MANY),
        needs: Needs::Image,
        usage: "[-Ciqrv] [-P pattern] off len [len..]",
        summary: "asynchronously reads a number of bytes",
        flags: &[C, I, Q, R, V, P],
        run: transfer::aio_read,
    },
    Command {
        name: "aio_write",
        short: "",
        words: (2, MANY),
        needs: Needs::WritableImage,
        usage: "[-Cfiqruz] [-P pattern] off len [len..]",
        summary: "asynchronously writes a number of bytes",
        flags: &[C, F, I, Q, R, U, Z, P],
        run: transfer::aio_write,
    },
    Command {
        name: "alloc",
        short: "a",
        words: (1, 2),
        needs: Needs::Image,
        usage: "offset [count]",
        summary: "checks if offset is allocated in the file",
        flags: &[],
        run: allocation::alloc,
    },
    Command {
        name: "break",
        short: "",
        words: (2, 2),
        needs: Needs::Image,
        usage: "event tag",
        summary: "sets a breakpoint on event and tags the stopped request as tag",
        flags: &[],
        run: breaks::set,
    },
    Command {
        name: "close",
        short: "c",
        words: (0, 0),
        needs: Needs::Image,
        usage: "",
        summary: "close the current open file",
        flags: &[],
        run: image::close,
    },
    Command {
        name: "discard",
        short: "d",
        words: (2, MANY),
        needs: Needs::WritableImage,
        usage: "[-Cq] off len",
        summary: "discards a number of bytes at a specified offset",
        flags: &[C, Q],
        run: transfer::discard,
    },
    Command {
        name: "flush",
        short: "f",
        words: (0, 0),
        needs: Needs::Image,
        usage: "",
        summary: "flush all in-core file state to disk",
        flags: &[],
        run: transfer::flush,
    },
    Command {
        name: "help",
        short: "?",
        words: (0, 1),
        needs: Needs::Nothing,
        usage: "[command]",
        summary: "help for one or all commands",
        flags: &[],
        run: access::help,
    },
    Command {
        name: "info",
        short: "i",
        words: (0, 0),
        needs: Needs::Image,
        usage: "",
        summary: "prints information about the current file",
        flags: &[],
        run: image::info,
    },
    Command {
        name: "length",
        short: "l",
        words: (0, 0),
        needs: Needs::Image,
        usage: "",
        summary: "gets the length of the current file",
        flags: &[],
        run: image::length,
    },
    Command {
        name: "map",
        short: "m",
        words: (0, 0),
        needs: Needs::Image,
        usage: "",
        summary: "prints the allocated areas of a file",
        flags: &[],
        run: allocation::map,
    },
    Command {
        name: "open",
        short: "o",
        words: (1, MANY),
        needs: Needs::Nothing,
        usage: "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        summary: "open the file specified by path",
        flags: &[
            flag('r', "read-only"),
            flag('s', "snapshot"),
            flag('C', "copy-on-read"),
            flag('n', "nocache"),
            flag('k', "native-aio"),
            flag('U', "force-share"),
            value('i', "aio"),
            value('t', "cache"),
            value('d', "discard"),
            value('o', "o"),
        ],
        run: image::open,
    },
    Command {
        name: "quit",
        short: "q",
        words: (0, 0),
        needs: Needs::Nothing,
        usage: "",
        summary: "exit the program",
        flags: &[],
        run: access::quit,
    },
    Command {
        name: "read",
        short: "r",
        words: (2, MANY),
        needs: Needs::Image,
        usage: "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        summary: "reads a number of bytes at a specified offset",
        flags: &[
            flag('a', "a"),
            flag('b', "b"),
            C,
            OLD_P,
            Q,
            R,
            V,
            P,
            value('s', "s"),
            value('l', "l"),
        ],
        run: transfer::read,
    },
    Command {
        name: "readv",
        short: "",
        words: (2, MANY),
        needs: Needs::Image,
        usage: "[-Cqrv] [-P pattern] off len [len..]",
        summary: "reads a number of bytes at a specified offset",
        flags: &[C, Q, R, V, P],
        run: transfer::readv,
    },
    Command {
        name: "remove_break",
        short: "",
        words: (1, 1),
        needs: Needs::Image,
        usage: "tag",
        summary: "remove a breakpoint by tag",
        flags: &[],
        run: breaks::remove,
    },
    Command {
        name: "reopen",
        short: "",
        words: (0, MANY),
        needs: Needs::Image,
        usage: "[(-r|-w)] [-c cache] [-o options]",
        summary: "reopens an image with new options",
        flags: &[R, flag('w', "w"), value('c', "c"), value('o', "o")],
        run: reopen::reopen,
    },
    Command {
        name: "resume",
        short: "",
        words: (1, 1),
        needs: Needs::Image,
        usage: "tag",
        summary: "resumes the request tagged as tag",
        flags: &[],
        run: breaks::resume,
    },
    Command {
        name: "sigraise",
        short: "",
        words: (1, 1),
        needs: Needs::Nothing,
        usage: "signal",
        summary: "raises a signal",
        flags: &[],
        run: access::sigraise,
    },
    Command {
        name: "sleep",
        short: "",
        words: (1, 1),
        needs: Needs::Nothing,
        usage: "",
        summary: "waits for the given value in milliseconds",
        flags: &[],
        run: access::sleep,
    },
    Command {
        name: "truncate",
        short: "t",
        words: (1, 3),
        needs: Needs::WritableImage,
        usage: "[-m prealloc_mode] off",
        summary: "truncates the current file at the given offset",
        flags: &[value('m', "m")],
        run: image::truncate,
    },
    Command {
        name: "wait_break",
        short: "",
        words: (1, 1),
        needs: Needs::Image,
        usage: "tag",
        summary: "waits for the suspension of a request",
        flags: &[],
        run: breaks::wait,
    },
    Command {
        name: "write",
        short: "w",
        words: (2, MANY),
        needs: Needs::WritableImage,
        usage: "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        summary: "writes a number of bytes at a specified offset",
        flags: &[
            flag('b', "b"),
            flag('c', "c"),
            C,
            F,
            flag('n', "n"),
            OLD_P,
            Q,
            R,
            U,
            Z,
            P,
            value('s', "s"),
        ],
        run: transfer::write,
    },
    Command {
        name: "writev",
        short: "",
        words: (2, MANY),
        needs: Needs::WritableImage,
        usage: "[-Cfqr] [-P pattern] off len [len..]",
        summary: "writes a number of bytes at a specified offset",
        flags: &[C, F, Q, R, P],
        run: transfer::writev,
    },
];

/// Finds a command by its name or short name.
pub(super) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .find(|command| command.name == name || (!name.is_empty() && command.short == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_stand_in_order_and_names_are_unique() {
        assert!(COMMANDS.is_sorted_by_key(|command| command.name));
        for command in COMMANDS {
            assert_eq!(find(command.name).map(|found| found.name), Some(command.name));
            let same = COMMANDS.iter().filter(|other| other.short == command.short).count();
            assert!(command.short.is_empty() || same == 1, "{}", command.name);
        }
        assert!(find("").is_none());
    }
}
