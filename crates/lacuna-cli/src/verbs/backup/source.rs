//! What is copied, and what tells by the next run that it is still the same.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lacuna::block::Layer;
use lacuna::chain::Sharing;
use lacuna::qcow2::format::Snapshot;
use lacuna::qcow2::{Access, Image, SnapshotChoice};
use lacuna::{Error, ErrorKind};
use lacuna_backup::SnapshotFacts;
use lacuna_remote::ExportName;
use pollster::block_on;

use super::super::open::{self, FileChain, Request};
use super::super::snapshot;
use super::super::spec::nbd::NbdSpec;
use super::super::spec::tree::StorageSpec;
use super::asked::{By, Wish};
use super::served::Moment;
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::nodes::{AnyStorage, ToolDisk};
use crate::output;
use crate::persona::Tool;

/// An opened source.
pub(super) struct Source {
    pub(super) chain: FileChain,
    /// The snapshot that it is, where it is one.
    pub(super) snapshot: Option<SnapshotFacts>,
    /// The export that it is, where it is a raw one.
    pub(super) export: Option<Box<NbdSpec>>,
    /// The moment at which it is kept, where a server does that.
    pub(super) moment: Option<Moment>,
    /// What the user called it.
    pub(super) shown: String,
}

impl Source {
    /// Opens what `name` describes. Nobody changes it while it is open, unless `-U` allows that; and
    /// where the bitmap is to begin anew, nobody else opens it either.
    pub(super) fn open(tool: &Tool, parsed: &Parsed, name: &str, wish: &Wish) -> CliResult<Self> {
        Self::open_request(tool, Request::reading(name, parsed, "format")?, name, wish)
    }

    /// Opens the export of a moment, where `name` is the one of the disk.
    pub(super) fn open_moment(
        tool: &Tool,
        mut request: Request,
        name: &str,
        wish: &Wish,
        moment: &Moment,
    ) -> CliResult<Self> {
        let wrong = || CliError::new("The server names an export that cannot be one");
        nbd(&mut request)?.uri.export = ExportName::new(&moment.export).ok_or_else(wrong)?;
        let source = Self::open_request(tool, request, name, wish)?;
        Ok(Self { moment: Some(moment.clone()), ..source })
    }

    fn open_request(tool: &Tool, mut request: Request, name: &str, wish: &Wish) -> CliResult<Self> {
        if request.sharing == Sharing::Format {
            request.sharing = Sharing::Readers;
        }
        let export = match &request.image.disk.file {
            StorageSpec::Nbd(export) => Some(export.clone()),
            _ => None,
        };
        if export.is_none() && matches!(wish.by, By::Bitmap { is_kept: false, .. }) {
            request.access = Access::ReadWrite;
        }
        let chain = open::open_for_content(tool, &request)?;
        // A qcow2 image in an export has bitmaps and levels of its own.
        let export = export.filter(|_| chain.disk().as_qcow2().is_none());
        let shown = name.to_owned();
        let mut source = Self { chain, snapshot: None, export, moment: None, shown };
        if let Some(choice) = &wish.at {
            source.snapshot = Some(source.snapshot_facts(choice)?);
            source.chain = snapshot::at(tool, source.chain, choice)?;
        }
        Ok(source)
    }

    pub(super) const fn disk(&self) -> &ToolDisk {
        self.chain.disk()
    }

    /// Returns the image, which is to be one that has bitmaps and snapshots.
    pub(super) fn image(&self) -> CliResult<&Image<AnyStorage>> {
        let image = self.disk().as_qcow2();
        let missing = || Error::unsupported("Only qcow2 images have bitmaps and snapshots");
        image.ok_or_else(|| CliError::from(missing()))
    }

    /// Returns what tells a snapshot of the image apart.
    pub(super) fn snapshot_facts(&self, choice: &SnapshotChoice) -> CliResult<SnapshotFacts> {
        let snapshots = block_on(self.image()?.snapshots())?;
        choice.find(&snapshots).map(facts).ok_or_else(|| {
            let text = format!("The image has no snapshot with {choice}");
            CliError::from(Error::new(ErrorKind::NotFound, text))
                .with_hint("`lacuna snapshot -l FILE` lists the snapshots of an image")
        })
    }

    /// Returns what is the same by the next run if nothing has changed the source; nothing where that
    /// cannot be told: for exports and devices.
    pub(super) fn identity(&self) -> Option<String> {
        if let Some(moment) = &self.moment {
            return Some(moment.identity.clone());
        }
        let mut identity = Vec::new();
        for (number, level) in self.chain.levels().iter().enumerate() {
            // What a snapshot holds stays, whatever happens to its image.
            let is_snapshot = number == 0 && self.snapshot.is_some();
            for path in std::iter::once(&level.path).chain(&level.data_path) {
                identity.push(file_identity(path, is_snapshot)?);
            }
        }
        Some(identity.join(" "))
    }

    /// Says whether a bitmap begins anew with a point: those of other servers are for others to see to.
    pub(super) const fn begins_bitmaps(&self) -> bool {
        self.export.is_none() || self.moment.is_some()
    }

    /// Returns the size in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.disk().size_bytes()
    }

    /// Leaves the image as it should be left.
    pub(super) fn close(self) -> CliResult<()> {
        block_on(self.chain.into_disk().close()).map_err(CliError::from)
    }
}

/// Returns the export that is asked for.
pub(super) fn nbd(request: &mut Request) -> CliResult<&mut NbdSpec> {
    match &mut request.image.disk.file {
        StorageSpec::Nbd(export) => Ok(export),
        _ => Err(CliError::usage("With --control, SOURCE is the URI of an export of that server")),
    }
}

fn file_identity(path: &Path, is_snapshot: bool) -> Option<String> {
    let found: Metadata = std::fs::metadata(path).ok().filter(Metadata::is_file)?;
    let file = format!("{}:{}", found.dev(), found.ino());
    let state = format!("{}:{}.{:09}", found.len(), found.mtime(), found.mtime_nsec());
    Some(if is_snapshot { file } else { format!("{file}:{state}") })
}

fn facts(snapshot: &Snapshot) -> SnapshotFacts {
    SnapshotFacts {
        id: output::tame(&snapshot.id.to_string()),
        name: output::tame(&snapshot.name.to_string()),
        seconds: snapshot.created_seconds.into(),
        nanoseconds: snapshot.created_nanoseconds,
        guest_nanoseconds: snapshot.guest_clock_nanoseconds,
    }
}
