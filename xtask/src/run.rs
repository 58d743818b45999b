//! Starting programs, always without a shell and with the command shown.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;

/// How long a server may take to open its socket.
const PATIENCE: Duration = Duration::from_secs(20);

/// Returns the folder of the workspace, wherever the command was called.
pub(crate) fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Starts a command line of `program` and its arguments.
pub(crate) fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Returns cargo, the one that started us, with `arguments`.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    command(&std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()), arguments)
}

/// Builds our binary in a profile of cargo's; returns where it is.
pub(crate) fn built(profile: &str) -> Outcome<PathBuf> {
    built_of("lacuna-cli", "lacuna", profile)
}

/// Builds a binary of a package.
pub(crate) fn built_of(package: &str, binary: &str, profile: &str) -> Outcome<PathBuf> {
    let package = ["--locked", "--package", package];
    run(cargo(&[&["build", "--profile", profile][..], &package].concat()))?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(workspace().join(target).join(folder).join(binary))
}

/// Shows and runs a command; anything but success is an error with the command in it.
pub(crate) fn run(mut command: Command) -> Outcome {
    let line = shown(&command);
    eprintln!("+ {line}");
    let status = command.status().map_err(|error| format!("cannot start `{line}`: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` ended with {status}")) }
}

/// Runs a command and returns what it wrote to its standard output.
pub(crate) fn output(mut command: Command) -> Outcome<String> {
    let line = shown(&command);
    let output = command.output().map_err(|error| format!("cannot start `{line}`: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("`{line}` ended with {}: {}", output.status, said.trim_end()))
    }
}

/// Reads what a program told programs.
pub(crate) fn json(text: &str) -> Outcome<Value> {
    serde_json::from_str(text).map_err(|error| format!("no report: {error}: {text}"))
}

/// Waits until a server has its socket.
pub(crate) fn awaited(socket: impl AsRef<Path>) -> Outcome {
    let start = Instant::now();
    while !socket.as_ref().exists() {
        if start.elapsed() > PATIENCE {
            return Err("the server opens no socket".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Finds a program in PATH or where distributions put what administrators use.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(administrators)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_command_names_itself() {
        let reason = run(command("false", &["now"])).unwrap_err();
        assert!(reason.contains("`false now`"), "{reason}");
        assert!(run(command("true", &[])).is_ok());
    }

    #[test]
    fn programs_outside_of_path_are_found() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }
}
