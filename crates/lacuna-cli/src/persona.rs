//! Under which name the program runs, and what that changes.
//!
//! | called as | wording | verbs | hints | layout of new clusters |
//! |---|---|---|---|---|
//! | `qemu-img` | of that program | its verbs | no | QEMU's allocator |
//! | `qemu-io` | of that program | is the verb `io` | no | QEMU's allocator |
//! | `qemu-nbd` | of that program | is the verb `serve`, with that program's options | no | QEMU's allocator |
//! | anything else | ours where it says more | all | yes | two cursors |

use std::path::Path;

use lacuna::qcow2::{DiscardUnit, Placement};

/// Whose ways the program follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Persona {
    Lacuna,
    QemuImg,
    QemuIo,
    QemuNbd,
}

/// What is wrong with a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// An option that does not exist or lacks its value.
    Option,
    /// It makes no sense.
    Usage,
}

/// The name the program was called by.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    pub(crate) persona: Persona,
    /// The last part of argv[0].
    pub(crate) name: String,
    /// All of argv[0].
    path: String,
}

impl Tool {
    /// Takes the persona from argv[0].
    pub(crate) fn from_argv0(argv0: &str) -> Self {
        let name =
            Path::new(argv0).file_name().map_or("lacuna", |name| name.to_str().unwrap_or("lacuna"));
        let persona = match name {
            "qemu-img" => Persona::QemuImg,
            "qemu-io" => Persona::QemuIo,
            "qemu-nbd" => Persona::QemuNbd,
            _ => Persona::Lacuna,
        };
        Self { persona, name: name.to_owned(), path: argv0.to_owned() }
    }

    /// Says whether the program goes by its own name.
    pub(crate) fn is_own(&self) -> bool {
        self.persona == Persona::Lacuna
    }

    /// Returns how the verb is called, for messages about the command line.
    pub(crate) fn invocation(&self, verb: &str) -> String {
        let program = if self.is_own() { &self.name } else { &self.path };
        match verb {
            "" => program.clone(),
            _ if [Persona::QemuIo, Persona::QemuNbd].contains(&self.persona) => program.clone(),
            verb => format!("{program} {verb}"),
        }
    }

    /// Returns the line that follows a command line that was wrong.
    pub(crate) fn way_to_help(&self, verb: &str, fault: Fault) -> String {
        let call = self.invocation(verb);
        match (self.persona, fault) {
            (Persona::QemuNbd, Fault::Option) => {
                format!("{}: Try `{call} --help' for more information.\n", self.name)
            }
            (Persona::QemuNbd, Fault::Usage) => {
                format!("Try `{call} --help' for more information.\n")
            }
            _ => format!("Try '{call} --help' for more info\n"),
        }
    }

    /// Returns the smallest unit of a discard.
    pub(crate) fn discard_unit(&self) -> DiscardUnit {
        match self.persona {
            Persona::Lacuna => DiscardUnit::Subcluster,
            _ => DiscardUnit::Cluster,
        }
    }

    /// Returns where new clusters go.
    pub(crate) fn placement(&self) -> Placement {
        match self.persona {
            Persona::Lacuna => Placement::TwoCursors,
            _ => Placement::QemuCompatible,
        }
    }
}
