//! The files of the host, by what they are there for, and how they are opened and checked.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use lacuna::block::{Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::{Buffer, Hold};
use lacuna::chain::{self, Allow, Chain, ChainOptions, Disk, Format, Identity, Opener};
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::format::{Header, IncompatibleFeatures};
use lacuna::qcow2::{Access, BackingName, CreateOptions, OpenOptions, create, read_header};
use lacuna::storage::{Claim, Storage};
use lacuna::units::{GuestOffset, GuestRange};
use lacuna::{Error, ErrorKind, Result};
use pollster::block_on;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Random, SparseBytes};

use crate::history::Fill;
use crate::scenario::{BelowForm, BelowSpec, DataSpec, DiskSpec, ImageSpec};

/// The image that guests write to.
pub(crate) const TOP: usize = 0;
/// Its data file, where it has one.
pub(crate) const DATA: usize = 1;
/// What it stands on: one of two, as it can be put onto another.
pub(crate) const BELOW: [usize; 2] = [2, 3];
/// What that stands on, where the chain has three images.
pub(crate) const BASE: usize = 4;
/// What images call them.
pub(crate) const NAMES: [&str; 5] = ["top", "data", "below-0", "below-1", "base"];
/// Clusters past the end of a file that a crash can have left with refcounts.
const MOST_LOST: u64 = 1 << 12;

/// What the files hold, in the order of [`NAMES`].
pub(crate) type Files = Vec<SparseBytes>;

/// Opens the files of a host by name.
pub(crate) struct HostOpener(pub(crate) SimHost);

impl Opener for HostOpener {
    type Storage = SimStorage;

    async fn open(&self, path: &Path, _: Access) -> Result<SimStorage> {
        let index = NAMES.iter().position(|name| Path::new(name) == path);
        let missing = || Error::new(ErrorKind::NotFound, path.display().to_string());
        index.map(|index| self.0.open_file(index)).ok_or_else(missing)
    }

    async fn claim(&self, _: &SimStorage, _: Claim) -> Result<()> {
        Ok(())
    }

    async fn identify(&self, path: &Path) -> Result<Identity> {
        Ok(Identity::Path(PathBuf::from(path)))
    }
}

/// Puts files on a host.
pub(crate) fn put(host: &SimHost, files: &Files) {
    files.iter().for_each(|file| drop(host.add_file(file.clone())));
}

/// Returns what the files of a host hold.
pub(crate) fn contents(host: &SimHost) -> Files {
    (0..NAMES.len()).map(|index| host.content(index)).collect()
}

/// Returns a host that does as it is told, with files.
pub(crate) fn calm_host(files: &Files) -> SimHost {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    put(&host, files);
    host
}

/// Says how a file is opened with all that it names.
pub(crate) fn chain_options(format: Format, image: OpenOptions, access: Access) -> ChainOptions {
    let (backing, data_file) = (Allow::Named, Allow::Named);
    ChainOptions { backing, data_file, image, ..ChainOptions::new(format, access) }
}

/// Opens one of the files of a host to be read, with all that it names.
pub(crate) async fn open_to_read(
    host: SimHost,
    file: usize,
    format: Format,
) -> Result<Chain<SimStorage>> {
    let image = OpenOptions::new(Access::ReadOnly);
    let options = chain_options(format, image, Access::ReadOnly);
    chain::open(&HostOpener(host), Path::new(NAMES[file]), &options).await
}

/// Reads a whole disk.
pub(crate) async fn whole(layer: &impl Layer) -> Result<Vec<u8>> {
    let len = layer.size_bytes() as usize;
    let (result, bytes) = layer.read(GuestOffset(0), Buffer::new(len)).await;
    result.map(|()| bytes.to_vec())
}

/// Returns the header of the image that guests write to.
pub(crate) fn header(files: &Files) -> std::result::Result<Header, String> {
    header_of(files, TOP)
}

fn header_of(files: &Files, file: usize) -> std::result::Result<Header, String> {
    let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(files[file].clone());
    block_on(read_header(&storage)).map_err(|error| error.to_string())
}

/// Returns all that the image that guests write to stands on, from its backing file to the lowest.
pub(crate) fn all_below(files: &Files) -> std::result::Result<Vec<(usize, Format)>, String> {
    let mut found = Vec::new();
    let mut next = below(&header(files)?);
    while let Some((file, format)) = next {
        found.push((file, format));
        next = match format {
            Format::Qcow2 => below(&header_of(files, file)?),
            _ => None,
        };
    }
    Ok(found)
}

/// Returns which file an image stands on, with its format.
pub(crate) fn below(header: &Header) -> Option<(usize, Format)> {
    let name = header.backing_name.as_ref()?.to_string();
    let file = NAMES.iter().position(|known| **known == name)?;
    let format = header.extensions.backing_format.as_ref()?.to_string();
    Some((file, format.parse().ok()?))
}

/// Returns the file that an image does not stand on.
pub(crate) fn other_below(below: &[(usize, Format)]) -> usize {
    match below.first() {
        Some((file, _)) if *file == BELOW[0] => BELOW[1],
        _ => BELOW[0],
    }
}

/// Makes the image that guests write to, and its data file.
pub(crate) async fn make_top(host: &SimHost, spec: &ImageSpec) -> Result<()> {
    let options = spec.create_options(NAMES[BELOW[0]]);
    create(&host.open_file(TOP), &options).await?;
    match spec.data {
        Some(DataSpec::Raw) => {
            let size_bytes = spec.size_bytes.next_multiple_of(512);
            host.open_file(DATA).set_len(size_bytes, Hold::none()).await
        }
        Some(DataSpec::Plain) | None => Ok(()),
    }
}

/// Makes a disk to stand on in a file of a host, and what that stands on; returns what it reads as.
pub(crate) async fn make_below(host: &SimHost, file: usize, spec: &BelowSpec) -> Result<Vec<u8>> {
    if let Some(base) = &spec.base {
        make_disk(host, BASE, base, None).await?;
    }
    let backing = spec.base.map(|base| base.named(NAMES[BASE]));
    make_disk(host, file, &spec.own, backing).await
}

async fn make_disk(
    host: &SimHost,
    file: usize,
    spec: &DiskSpec,
    backing: Option<BackingName>,
) -> Result<Vec<u8>> {
    let storage = host.open_file(file);
    match spec.form {
        BelowForm::Raw => storage.set_len(spec.size_bytes, Hold::none()).await?,
        BelowForm::Qcow2 { version, cluster_bits } => {
            let (size_bytes, cluster_bytes) = (spec.size_bytes, 1 << cluster_bits);
            let options = CreateOptions {
                size_bytes,
                version,
                cluster_bytes,
                backing,
                ..CreateOptions::default()
            };
            create(&storage, &options).await?;
        }
    }
    let image = OpenOptions::new(Access::ReadWrite);
    let options = chain_options(spec.format(), image, Access::ReadWrite);
    let chain = chain::open(&HostOpener(host.clone()), Path::new(NAMES[file]), &options).await?;
    let disk = chain.into_disk();
    fill(&disk, &mut Random::new(spec.content)).await?;
    let content = whole(&disk).await?;
    disk.close().await?;
    Ok(content)
}

/// Writes data, zeros and nothing, in pieces.
async fn fill(disk: &Disk<SimStorage>, random: &mut Random) -> Result<()> {
    let size = disk.size_bytes();
    let piece = size.div_ceil(8).next_multiple_of(512);
    let mut at = 0;
    while at < size {
        let len = (512 * (1 + random.below(piece / 512))).min(size - at);
        let range = GuestRange::new(GuestOffset(at), len);
        let fill = Fill::Pattern { seed: 90 + random.below(4), cluster_bytes: 4096 };
        match random.below(4) {
            0 => {}
            1 => disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).await?,
            _ => {
                let bytes = Buffer::from(&fill.bytes(range)[..]);
                disk.write(range.start, bytes, WriteFlags::empty()).await.0?;
            }
        }
        at += len;
    }
    Ok(())
}

// ---- checks --------------------------------------------------------------------------------

/// Whether leaks are no surprise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaks {
    Expected,
    Wrong,
}

/// Says whether the next opener is to repair an image.
pub(crate) fn is_dirty(file: &SparseBytes) -> std::result::Result<bool, String> {
    let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(file.clone());
    let header = block_on(read_header(&storage)).map_err(|error| error.to_string())?;
    Ok(header.features.incompatible.contains(IncompatibleFeatures::DIRTY))
}

/// Images that were found sound of late: a check of the same bytes would find nothing again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sound(VecDeque<(SparseBytes, Leaks)>);

/// How many of them are kept: of the image, and of what it stands on, before a crash and after it.
const MOST_SOUND: usize = 6;

impl Sound {
    /// Checks an image, and frees what leaks where that is no surprise.
    pub(crate) fn assert(
        &mut self,
        file: &mut SparseBytes,
        leaks: Leaks,
    ) -> std::result::Result<(), String> {
        // What was looked at past the end has been looked at before it, too.
        let is_known = |(known, looked): &(SparseBytes, Leaks)| {
            (*looked == leaks || leaks == Leaks::Wrong) && known == file
        };
        if self.0.iter().any(is_known) {
            return Ok(());
        }
        let before = file.clone();
        if assert_sound(file, leaks)? == Found::Nothing && before == *file {
            self.0.truncate(MOST_SOUND - 1);
            self.0.push_front((before, leaks));
        }
        Ok(())
    }
}

/// What a check has found in an image that is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Leaks,
    Nothing,
}

fn assert_sound(file: &mut SparseBytes, leaks: Leaks) -> std::result::Result<Found, String> {
    let storage = SimHost::without_record(Pace::AtOnce, 1).add_file(file.clone());
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {}));
    let report = report.map_err(|error| format!("Checking: {error}"))?;
    let leaked = if leaks == Leaks::Expected { 0 } else { report.leaks };
    if report.corruptions + report.check_errors + leaked > 0 || is_dirty(file)? {
        return Err(format!("The check finds {report:x?}"));
    }
    if leaks == Leaks::Expected {
        // Refcounts of clusters past the end are seen by no check, until the file grows.
        let len = file.len();
        let header = block_on(read_header(&storage)).map_err(|error| error.to_string())?;
        let mut longer = file.clone();
        longer.set_len(len + (MOST_LOST << header.geometry.cluster_bits()));
        *file = repaired(longer)?;
        file.set_len(len);
    }
    Ok(if report.leaks > 0 { Found::Leaks } else { Found::Nothing })
}

/// Returns the files after one of them was opened to be written: whoever does that repairs it.
pub(crate) fn repaired_by_opening(
    files: &Files,
    file: usize,
) -> std::result::Result<Files, String> {
    let host = calm_host(files);
    let image = OpenOptions::new(Access::ReadWrite);
    let options = chain_options(Format::Qcow2, image, Access::ReadWrite);
    let opener = HostOpener(host.clone());
    let repaired = block_on(async {
        let chain = chain::open(&opener, Path::new(NAMES[file]), &options).await?;
        chain.into_disk().close().await
    });
    repaired.map_err(|error| format!("Opening {}: {error}", NAMES[file]))?;
    Ok(contents(&host))
}

/// Frees what leaks.
fn repaired(file: SparseBytes) -> std::result::Result<SparseBytes, String> {
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let storage = host.add_file(file);
    let options = CheckOptions { repair: Repair::Leaks };
    let report = block_on(check(&storage, &options, &mut |_| {}));
    report.map_err(|error| format!("Freeing leaks: {error}"))?;
    Ok(host.content(0))
}
