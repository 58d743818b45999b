//! What `lacuna ctl` does: connects, asks once, and takes the answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::VERSION;
use crate::error::{CliError, CliResult};

/// Longest answer that is taken, in bytes.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// A conversation with the server behind a socket file.
pub(crate) struct Conversation<'a> {
    path: &'a Path,
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl<'a> Conversation<'a> {
    /// Connects.
    pub(crate) fn begin(path: &'a Path) -> CliResult<Self> {
        let doing = |error| lacuna::Error::io(error, format!("Connecting to {}", path.display()));
        let socket = UnixStream::connect(path).map_err(doing)?;
        let lines = BufReader::new(socket.try_clone().map_err(doing)?);
        let mut conversation = Self { path, socket, lines };
        check(&conversation.line()?)?;
        Ok(conversation)
    }

    /// Asks the server to do `command`; returns what came of it.
    pub(crate) fn ask(&mut self, command: &str, arguments: Map<String, Value>) -> CliResult<Value> {
        let request = json!({ "id": 1, "command": command, "arguments": arguments });
        self.socket
            .write_all(format!("{request}\n").as_bytes())
            .map_err(|error| lacuna::Error::io(error, format!("Asking {}", self.path.display())))?;
        let answer = outcome(self.line()?)?;
        if command == super::commands::STOP {
            // The end of the stream is the end of the server.
            let mut rest = Vec::new();
            drop(self.lines.read_to_end(&mut rest));
        }
        Ok(answer)
    }

    /// Asks how a job stands.
    pub(crate) fn job(&mut self, number: u64) -> CliResult<Value> {
        let arguments = Map::from_iter([("job".to_owned(), number.into())]);
        Ok(self.ask(super::commands::JOBS, arguments)?["jobs"][0].take())
    }

    fn line(&mut self) -> CliResult<Value> {
        line(&mut (&mut self.lines).take(MAX_ANSWER_BYTES), self.path)
    }
}

fn line(lines: &mut impl BufRead, path: &Path) -> CliResult<Value> {
    let mut line = String::new();
    let doing = || format!("Reading from {}", path.display());
    lines.read_line(&mut line).map_err(|error| lacuna::Error::io(error, doing()))?;
    serde_json::from_str(&line).map_err(|_| {
        CliError::new(format!("{} answers what is no control protocol", path.display()))
            .with_hint("the socket is the one of `lacuna serve --control`")
    })
}

fn check(greeting: &Value) -> CliResult<()> {
    if greeting.get("error").is_some() {
        return outcome(greeting.clone()).map(drop);
    }
    match greeting.get("control").and_then(Value::as_u64) {
        Some(VERSION) => Ok(()),
        Some(other) => Err(CliError::new(format!(
            "The server speaks version {other} of the control protocol, we speak {VERSION}"
        ))),
        None => Err(CliError::new("The server does not greet as a control socket does")),
    }
}

fn outcome(mut answer: Value) -> CliResult<Value> {
    match answer.get("error") {
        Some(error) => Err(CliError::from_value(error)),
        None => Ok(answer["result"].take()),
    }
}
