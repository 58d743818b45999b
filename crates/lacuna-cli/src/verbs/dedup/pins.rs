//! `dedup --repin`, `--unpin`: what holds shared clusters is made again, or taken off.

use lacuna::qcow2::{Access, Image};
use pollster::block_on;

use super::{Request, open};
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::output;
use crate::persona::Tool;
use crate::verbs::one_image;

/// What is to become of the pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pins {
    /// All clusters that are shared get theirs.
    Made,
    /// They go.
    TakenOff,
}

impl Pins {
    /// Reads the options, which stand alone.
    pub(super) fn read(parsed: &Parsed) -> CliResult<Option<Self>> {
        let asked = match (parsed.has("repin"), parsed.has("unpin")) {
            (false, false) => return Ok(None),
            (true, false) => Self::Made,
            (false, true) => Self::TakenOff,
            (true, true) => {
                return Err(CliError::usage("--repin and --unpin are mutually exclusive"));
            }
        };
        let others = ["report", "dry-run", "across", "base", "bandwidth", "memory", "output"];
        match others.into_iter().find(|other| parsed.has(other)) {
            Some(other) => {
                Err(CliError::usage(format!("--{other} does not go with --repin or --unpin")))
            }
            None => Ok(Some(asked)),
        }
    }

    pub(super) fn run(self, tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
        let name = one_image(parsed)?;
        let request =
            Request { access: Access::ReadWrite, ..Request::reading(name, parsed, "format")? };
        let chain = open::open(tool, &request)?;
        let Some(image) = chain.disk().as_qcow2() else { return Err(super::in_place::raw(name)) };
        // Both close the image, whose file has other tables then than those in memory.
        let text = self.carry_out(image.clone())?;
        match parsed.has("quiet") {
            true => Ok(0),
            false => output::print(&format!("{}: {text}\n", output::tame(name))).map(|()| 0),
        }
    }

    fn carry_out(self, image: Image<AnyStorage>) -> CliResult<String> {
        Ok(match self {
            Self::Made => match block_on(image.repin())? {
                0 => "no shared cluster lacked a pin".to_owned(),
                count => format!("{count} shared clusters are pinned now and were not before"),
            },
            Self::TakenOff => {
                block_on(image.unpin())?;
                "no pins any more; after stock QEMU overwrites sharers, `check -r all` or --repin \
                 puts flags right"
                    .to_owned()
            }
        })
    }
}
