//! Sockets that are not made by an address of the Internet or a path: those that somebody else
//! opened for us (systemd's socket activation), and those of virtual machines.

use std::env;
use std::os::fd::OwnedFd;
use std::process;

use lacuna::ErrorKind;
use lacuna_export::{Address, Listener};
use listenfd::ListenFd;
use rustix::net::{AddressFamily, SocketType};

use super::fork;
use crate::args::Flag;
use crate::error::{CliError, CliResult};
use crate::size::within;

pub(super) const VSOCK: Flag =
    Flag::valued('\0', "vsock", "[CID:]PORT", "listen for virtual machines (any CID)").long_only();

/// More descriptors than any service has; the environment is not to be believed blindly.
const MOST_DESCRIPTORS: usize = 256;
/// The first one, by systemd's rules.
const FIRST_DESCRIPTOR: usize = 3;

/// Returns how many sockets were opened for this very process.
///
/// What the environment says to another one, that of whoever started us, is not for us.
pub(crate) fn activated() -> usize {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    let is_ours = match env::var_os("LISTEN_PID") {
        Some(_) => number("LISTEN_PID") == usize::try_from(process::id()).ok(),
        // What forks us took it off, having looked at it.
        None => fork::is_child(),
    };
    number("LISTEN_FDS").filter(|_| is_ours).unwrap_or(0)
}

/// Takes the sockets that were opened for us; nothing, where there are none.
///
/// Before any thread starts: what the environment says of them is taken off, so that programs that
/// we run do not think it is meant for them.
pub(crate) fn inherited() -> CliResult<Option<Vec<Listener>>> {
    let count = activated();
    if count == 0 {
        return Ok(None);
    }
    if count > MOST_DESCRIPTORS {
        let text = format!("LISTEN_FDS is {count}: more than {MOST_DESCRIPTORS} sockets");
        return Err(CliError::new(text).with_class(ErrorKind::InvalidRequest));
    }
    let mut sockets = ListenFd::from_env();
    (0..count).map(|index| listener(&mut sockets, index)).collect::<CliResult<_>>().map(Some)
}

fn listener(sockets: &mut ListenFd, index: usize) -> CliResult<Listener> {
    let families = [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::VSOCK];
    let stream = SocketType::STREAM.as_raw() as i32;
    let taken = families.into_iter().find_map(|family| {
        let family = family.as_raw().into();
        sockets.take_custom::<OwnedFd>(index, family, stream, "stream socket").ok().flatten()
    });
    let descriptor = FIRST_DESCRIPTOR + index;
    let socket = taken.ok_or_else(|| {
        let text = format!("Descriptor {descriptor} (LISTEN_FDS) is no socket for streams");
        CliError::new(text).with_class(ErrorKind::InvalidRequest)
    })?;
    Listener::inherited(socket).map_err(|error| {
        CliError::new(format!("Descriptor {descriptor} (LISTEN_FDS): {error}"))
            .with_class(ErrorKind::InvalidRequest)
    })
}

/// What else says where to listen, or ends with a command.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AlsoGiven {
    pub(crate) socket: bool,
    pub(crate) bind: bool,
    pub(crate) port: bool,
    pub(crate) vsock: bool,
    pub(crate) run: bool,
}

impl AlsoGiven {
    /// Refuses what contradicts sockets that somebody else opened.
    pub(crate) fn refuse_beside_activation(self) -> CliResult<()> {
        let contradictions = [
            (self.socket, "Unix socket"),
            (self.bind, "The interface"),
            (self.port, "TCP port number"),
            (self.vsock, "The vsock address"),
            (self.run, "A command to run"),
        ];
        match contradictions.into_iter().find(|(given, _)| *given) {
            None => Ok(()),
            Some((_, what)) => {
                Err(CliError::new(format!("{what} can't be set when using socket activation"))
                    .with_hint("the environment has LISTEN_FDS: sockets were opened by systemd"))
            }
        }
    }
}

/// Reads `PORT`, `CID:PORT` or `vsock:CID:PORT`.
pub(super) fn vsock(text: &str) -> CliResult<Address> {
    let most = u32::MAX.into();
    let rest = text.strip_prefix("vsock:").unwrap_or(text);
    let (cid, port) = rest.rsplit_once(':').unwrap_or(("any", rest));
    let cid = match cid {
        "any" => u64::from(Address::ANY_CID),
        number => within("CID of --vsock", number, 0, most)?,
    };
    let port = within("port of --vsock", port, 0, most)?;
    let fits = |number| u32::try_from(number).unwrap_or(Address::ANY_CID);
    Ok(Address::Vsock(fits(cid), fits(port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_virtual_machines_are_read() {
        for (text, expected) in [
            ("10809", Ok("vsock:any:10809")),
            ("2:10809", Ok("vsock:2:10809")),
            ("vsock:1:5", Ok("vsock:1:5")),
            ("any:5", Ok("vsock:any:5")),
            ("vsock:5", Ok("vsock:any:5")),
            ("x:5", Err("Invalid CID of --vsock specified: 'x'.")),
            ("1:", Err("Invalid port of --vsock specified: ''.")),
            ("1:4294967296", Err("Must be between 0 and 4294967295")),
        ] {
            match (vsock(text), expected) {
                (Ok(address), Ok(shown)) => assert_eq!(address.to_string(), shown),
                (Err(error), Err(part)) => assert!(error.text().contains(part), "{}", error.text()),
                (got, expected) => panic!("{text}: {got:?} where {expected:?} was expected"),
            }
        }
    }
}
