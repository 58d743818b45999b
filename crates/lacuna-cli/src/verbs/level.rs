//! Which image of a chain a name on the command line means.

use std::path::{Path, PathBuf};

use super::open::{self, Request};
use super::spec::nbd::NbdSpec;
use crate::error::{CliError, CliResult};
use crate::persona::Tool;
use lacuna::chain::Sharing;
use lacuna::qcow2::Access;

/// The images of a chain, top first, as they are named.
pub(super) struct Levels(Vec<PathBuf>);

impl Levels {
    /// Looks at what `request` is about, without keeping anybody out.
    pub(super) fn look(tool: &Tool, request: &Request) -> CliResult<Self> {
        let mut request = request.clone();
        (request.access, request.sharing) = (Access::ReadOnly, Sharing::All);
        let chain = open::open(tool, &request)?;
        let paths = chain.levels().iter().map(|level| level.path.clone()).collect();
        Ok(Self(paths))
    }

    /// Says whether there is nothing below the top.
    pub(super) fn is_alone(&self) -> bool {
        self.0.len() == 1
    }

    /// Returns which level below the top `name` means: as seen from the image that stands on it, as
    /// QEMU's programs take it, or under our own name also from here.
    pub(super) fn find(&self, tool: &Tool, name: &str, image: &str) -> CliResult<usize> {
        let means = |above: &Path, level: &Path| {
            let from_above = match NbdSpec::is_name(name) {
                true => PathBuf::from(name),
                false => above.parent().unwrap_or_else(|| Path::new("")).join(name),
            };
            open::same_file(&from_above, level)
                || from_above == level
                || (tool.is_own() && open::same_file(Path::new(name), level))
        };
        let mut pairs = self.0.iter().zip(self.0.iter().skip(1));
        let found = pairs.position(|(above, level)| !name.is_empty() && means(above, level));
        found.map(|index| index + 1).ok_or_else(|| {
            CliError::new(format!("Did not find '{name}' in the backing chain of '{image}'"))
                .with_hint(format!("`{} info --backing-chain {image}` lists it", tool.name))
        })
    }
}
