//! Whether clients leave an export alone: no request is in flight, and none was answered for a while.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lacuna_export::{Server, Statistics};

use super::Exported;
use crate::verbs::serve::Served;

/// How long nothing was asked where an export is idle.
const QUIET: Duration = Duration::from_millis(100);

/// What was seen of an export.
pub(super) struct Idle {
    server: Arc<Server<Served>>,
    export: Exported,
    last: Statistics,
    since: Instant,
}

impl Idle {
    pub(super) fn new(server: &Arc<Server<Served>>, export: &Exported) -> Self {
        let (last, since) = (export.statistics(), Instant::now());
        Self { server: Arc::clone(server), export: Arc::clone(export), last, since }
    }

    /// Says whether it is idle now. To be asked often: what it does not see it cannot know of.
    pub(super) fn is_so(&mut self) -> bool {
        let now = self.export.statistics();
        if now != self.last || self.is_busy() {
            (self.last, self.since) = (now, Instant::now());
        }
        self.since.elapsed() >= QUIET
    }

    fn is_busy(&self) -> bool {
        let name = self.export.name().as_str();
        let connections = self.server.connections();
        connections.iter().any(|it| it.in_flight > 0 && it.export.as_deref() == Some(name))
    }
}
