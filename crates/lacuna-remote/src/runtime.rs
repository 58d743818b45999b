//! The thread on which all sockets live.

use std::sync::OnceLock;

use lacuna::{Error, Result};
use tokio::runtime::{Builder, Handle};

static RUNTIME: OnceLock<Result<Handle>> = OnceLock::new();

/// Returns the runtime, which is started with the first call and lives as long as the process.
pub(crate) fn handle() -> Result<Handle> {
    RUNTIME.get_or_init(start).clone()
}

fn start() -> Result<Handle> {
    let failed = |error| Error::io(error, "Starting the thread for sockets");
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let handle = runtime.handle().clone();
    let forever = move || runtime.block_on(std::future::pending::<()>());
    std::thread::Builder::new().name("lacuna-remote".into()).spawn(forever).map_err(failed)?;
    Ok(handle)
}
