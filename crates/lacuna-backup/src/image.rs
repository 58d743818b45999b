//! A point as a qcow2 image that stands on the one of the point below.
//!
//! * Always: the backing file is named without a folder, with its format: the folder can be moved,
//!   and stock tools follow the chain.
//! * Always: how far the copy came is noted when all up to there is durable.

use std::path::{Path, PathBuf};

use lacuna::block::{DetectZeroes, Layer, WriteFlags, ZeroDetection, ZeroFlags, is_zero};
use lacuna::buffer::Buffer;
use lacuna::chain::{self, Allow, ChainOptions, Disk, Format};
use lacuna::job::compute;
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::{Access, BackingName, CreateOptions, create};
use lacuna::storage::Storage;
use lacuna::units::{GuestOffset, GuestRange, HostOffset};
use lacuna::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::copy::{CopyOptions, Keeper};
use crate::durable;
use crate::folder::Folder;
use crate::place::{OpenAs, Place};
use crate::point::{Content, PointFacts, Totals};
use crate::sealed::{self, Sealed};

/// Read at a time where a whole file is.
const PIECE_BYTES: u64 = 1 << 20;

/// How far a copy came.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    end: u64,
    data_bytes: u64,
    zero_bytes: u64,
}

impl Sealed for Done {
    const MEMBER: &'static str = "lacuna-done";

    fn check(&self) -> Result<(), String> {
        match i64::try_from(self.end) {
            Ok(_) => Ok(()),
            Err(_) => Err("It passes the end of any disk".into()),
        }
    }
}

/// Keeps pieces in an image.
pub(crate) struct ImageKeeper<P: Place> {
    place: P,
    disk: DetectZeroes<Disk<P::Storage>>,
    known: GuestOffset,
    path: PathBuf,
    part: PathBuf,
    notes: PathBuf,
    done: Done,
    /// How much was copied since it was noted.
    unnoted: u64,
    is_resumed: bool,
}

impl<P: Place> ImageKeeper<P> {
    /// Goes on with the image of a point, or makes it.
    pub(crate) async fn open(
        folder: &Folder<P>,
        facts: &PointFacts,
        known: GuestOffset,
    ) -> Result<Self> {
        let place = folder.place().clone();
        let path = folder.image_path(&facts.point);
        let part = folder.file(&facts.point, "qcow2.part");
        let notes = folder.file(&facts.point, "done");
        if place.has(&path) {
            // The last step before the manifest; it is taken again.
            durable::rename(&place, &path, &part)?;
        }
        let done = match place.has(&notes) && place.has(&part) {
            true => sealed::read::<Done>(&place, &notes)?.0,
            false => make(&place, &part, &notes, facts).await?,
        };
        let disk = open_disk(&place, &part, Access::ReadWrite).await?;
        let disk = DetectZeroes::new(disk, ZeroDetection::Unmap);
        let is_resumed = done.end > 0;
        Ok(Self { place, disk, known, path, part, notes, done, unnoted: 0, is_resumed })
    }

    /// Returns up to where the copy is durable.
    pub(crate) fn position(&self) -> GuestOffset {
        GuestOffset(self.done.end)
    }

    async fn note(&mut self) -> Result<()> {
        self.disk.flush().await?;
        self.unnoted = 0;
        write_done(&self.place, &self.notes, self.done).await
    }

    /// Leaves the image as it should be left, reads it once more, and gives it its name.
    pub(crate) async fn finish(self) -> Result<(Totals, Content)> {
        self.disk.into_below().close().await?;
        let storage = self.place.open(&self.part, OpenAs::Changing)?;
        if self.is_resumed {
            // What a cut left behind; a check finds nothing else.
            check(&storage, &CheckOptions { repair: Repair::Leaks }, &mut |_| ()).await?;
        }
        // What closing did last, the length of the file, is under the checksum too.
        storage.flush().await?;
        drop(storage);
        let (bytes, checksum) = checksum_of(&self.place, &self.part).await?;
        durable::rename(&self.place, &self.part, &self.path)?;
        let Done { data_bytes, zero_bytes, .. } = self.done;
        let totals = Totals { data_bytes, zero_bytes, stored_bytes: bytes };
        Ok((totals, Content::Qcow2 { bytes, checksum }))
    }
}

/// Makes an empty image of the size of the point, on that of the point below.
async fn make<P: Place>(place: &P, part: &Path, notes: &Path, facts: &PointFacts) -> Result<Done> {
    place.remove(notes)?;
    let storage = place.open(part, OpenAs::NewImage)?;
    let backing = facts.stands_on.as_ref().map(|below| BackingName {
        name: format!("{}.qcow2", below.point),
        format: Some("qcow2".into()),
    });
    create(&storage, &CreateOptions { size_bytes: facts.size, backing, ..Default::default() })
        .await?;
    drop(storage);
    let done = Done::default();
    write_done(place, notes, done).await?;
    Ok(done)
}

async fn write_done<P: Place>(place: &P, notes: &Path, done: Done) -> Result<()> {
    let (bytes, _) = sealed::encode(&done)?;
    durable::replace(place, notes, &bytes).await
}

/// Opens the image of a point with those below.
pub(crate) async fn open_disk<P: Place>(
    place: &P,
    path: &Path,
    access: Access,
) -> Result<Disk<P::Storage>> {
    let options =
        ChainOptions { backing: Allow::Named, ..ChainOptions::new(Format::Qcow2, access) };
    let chain = chain::open(&place.opener(), path, &options).await?;
    Ok(chain.into_disk())
}

/// Returns length and checksum of a file.
pub(crate) async fn checksum_of<P: Place>(place: &P, path: &Path) -> Result<(u64, Checksum)> {
    let storage = place.open(path, OpenAs::Unchanging)?;
    let (len, mut hasher, mut at) = (storage.len().await?, blake3::Hasher::new(), 0);
    while at < len {
        let piece = Buffer::new((len - at).min(PIECE_BYTES) as usize);
        let (read, bytes) = storage.read_at(HostOffset(at), piece).await;
        read?;
        at += bytes.len() as u64;
        hasher = compute(move || {
            hasher.update(&bytes);
            hasher
        })
        .await;
    }
    Ok((len, Checksum::finished(&hasher)))
}

/// A piece of a disk.
pub(crate) enum Packed {
    Bytes(GuestOffset, Buffer),
    Zeros(GuestRange),
}

impl<P: Place> Keeper for ImageKeeper<P> {
    type Packed = Packed;

    fn pack(start: GuestOffset, bytes: Buffer, _: CopyOptions) -> Result<Packed> {
        Ok(match is_zero(&bytes) {
            true => Packed::Zeros(GuestRange::new(start, bytes.len() as u64)),
            false => Packed::Bytes(start, bytes),
        })
    }

    fn zeros(range: GuestRange) -> Packed {
        Packed::Zeros(range)
    }

    async fn keep(&mut self, packed: Packed, options: CopyOptions) -> Result<GuestOffset> {
        let range = match packed {
            // Behind the end of the disk below everything reads as zeros as it is.
            Packed::Zeros(range) if range.start >= self.known => range,
            Packed::Zeros(range) => {
                self.disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).await?;
                self.done.zero_bytes += range.len;
                range
            }
            Packed::Bytes(start, bytes) => {
                let range = GuestRange::new(start, bytes.len() as u64);
                self.disk.write(start, bytes, WriteFlags::empty()).await.0?;
                self.done.data_bytes += range.len;
                self.unnoted += range.len;
                range
            }
        };
        self.done.end = range.end().0;
        if self.unnoted >= options.durable_every_bytes {
            self.note().await?;
        }
        Ok(range.end())
    }
}

/// Says that an image of a point is not what its manifest says.
pub(crate) fn changed(path: &Path) -> Error {
    Error::corrupt(format!("{} does not fit the checksum of its manifest", path.display()))
}
