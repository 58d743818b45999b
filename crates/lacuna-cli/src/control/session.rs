//! One client of the control socket.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use lacuna::ErrorKind;
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::lines::{Line, Lines, MAX_LINE_BYTES};
use super::{Control, VERSION, commands};
use crate::error::{CliError, CliResult};

/// How long a client may take to take an answer.
const SEND: Duration = Duration::from_secs(10);

/// Greets, and answers line by line until the client leaves or breaks the bounds.
pub(super) fn serve(control: &Control, socket: &UnixStream) -> io::Result<()> {
    socket.set_write_timeout(Some(SEND))?;
    send(socket, &greeting())?;
    let mut lines = Lines::new(socket);
    while let Some(line) = lines.next()? {
        match line {
            Line::Whole(line) if line.iter().all(u8::is_ascii_whitespace) => {}
            Line::Whole(line) => {
                send(socket, &answer(control, &line))?;
                control.stop_if_asked();
            }
            Line::TooLong => {
                let text = format!("A line has at most {MAX_LINE_BYTES} bytes");
                return send(socket, &failed(&Value::Null, &invalid(text)));
            }
        }
    }
    Ok(())
}

/// Says that there are too many clients.
pub(super) fn refuse(socket: &UnixStream, most: usize) -> io::Result<()> {
    socket.set_write_timeout(Some(Duration::from_millis(100)))?;
    let error = CliError::new(format!("The control socket has its {most} clients already"));
    send(socket, &failed(&Value::Null, &error.with_class(ErrorKind::Busy)))
}

fn send(mut socket: &UnixStream, value: &Value) -> io::Result<()> {
    socket.write_all(format!("{value}\n").as_bytes())
}

fn greeting() -> Value {
    let names: Vec<&str> = commands::ALL.iter().map(|command| command.name).collect();
    json!({ "lacuna": env!("CARGO_PKG_VERSION"), "control": VERSION, "commands": names })
}

/// For the fuzzer: every line is answered in one line, which repeats what the request called itself.
/// No command acts.
pub(crate) fn parse_hostile(line: &[u8]) {
    let answer = answer_by(line, |command, arguments| {
        arguments.switch("force")?;
        arguments.optional_number("size")?;
        arguments.optional_text("name")?;
        Ok(Value::from(command.name))
    });
    assert!(!answer.to_string().contains('\n'), "{answer}");
    assert!(answer.get("result").is_some() != answer.get("error").is_some(), "{answer}");
    let asked: Value = serde_json::from_slice(line).unwrap_or_default();
    assert_eq!(answer.get("id"), Some(asked.get("id").unwrap_or(&Value::Null)));
}

fn answer(control: &Control, line: &[u8]) -> Value {
    answer_by(line, |command, arguments| (command.run)(control, arguments))
}

/// Reads a request, and has its command done by `act`.
fn answer_by(
    line: &[u8],
    act: impl FnOnce(&commands::Command, &Arguments) -> CliResult<Value>,
) -> Value {
    let request = match serde_json::from_slice(line) {
        Ok(Value::Object(members)) => members,
        Ok(_) => return failed(&Value::Null, &invalid("A request is an object".into())),
        Err(error) => {
            let text = format!("A request is an object of JSON on one line: {error}");
            return failed(&Value::Null, &invalid(text));
        }
    };
    let id = request.get("id").cloned().unwrap_or_default();
    match run(&Arguments(request), act) {
        Ok(result) => json!({ "id": id, "result": result }),
        Err(error) => failed(&id, &error),
    }
}

fn run(
    request: &Arguments,
    act: impl FnOnce(&commands::Command, &Arguments) -> CliResult<Value>,
) -> CliResult<Value> {
    request.only(&["id", "command", "arguments"])?;
    let name = request.text("command")?;
    let command = commands::find(name)?;
    act(command, &request.members("arguments")?)
}

fn failed(id: &Value, error: &CliError) -> Value {
    json!({ "id": id, "error": error.value() })
}

fn invalid(text: String) -> CliError {
    CliError::new(text).with_class(ErrorKind::InvalidRequest)
}
