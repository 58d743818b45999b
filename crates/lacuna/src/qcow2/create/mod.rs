//! Makes empty images, laid out byte by byte as `qemu-img create` does unless asked otherwise.
//!
//! * Always: the header is written when all else is durable, so that a half-made image is no image, after a
//!   power loss neither.
//! * Always: options are checked before the first write.
//! * Never: a backing file or data file is opened or made here; only their names are stored.

mod layout;
mod options;
mod preallocate;

use zerocopy::IntoBytes;
use zerocopy::big_endian::U64;

pub(super) use options::raw_excludes_backing;
pub use options::{BackingName, CreateOptions, DataFileName, PreallocationLayout};

use self::layout::{Layout, OldTable};
use self::preallocate::Allocated;
use super::format::{Geometry, Header, L1Entry, L1Location, RefcountTableLocation};
use crate::block::Preallocation;
use crate::buffer::{Buffer, Hold};
use crate::storage::{Capability, Reserve, Storage, ZeroMode, reserve};
use crate::units::{HostOffset, HostRange};
use crate::{Error, Result};

/// Makes an empty image in `storage`; whatever was there is gone. Durable when it returns.
///
/// The bytes are those of `qemu-img create -f qcow2` with the same options, where it has them. The disk's size is
/// rounded up to a multiple of 512 bytes, as QEMU does. With a raw data file, or a preallocated
/// one, every cluster is mapped to its own offset in that file; the caller makes the file, gives
/// it the disk's size and reserves its space ([`Raw::grow`](crate::raw::Raw::grow)).
///
/// Dropped half-way, it leaves something that is no image.
///
/// # Errors
/// `InvalidRequest` where options are out of their limits or exclude each other, `NoSpace` where
/// names do not fit into the first cluster or preallocated data not onto the host, otherwise what
/// the storage says.
///
/// ```
/// use lacuna::qcow2::format::Header;
/// use lacuna::qcow2::{CreateOptions, create};
/// use lacuna::storage::MemoryStorage;
///
/// let storage = MemoryStorage::new();
/// let options = CreateOptions { size_bytes: 1 << 30, ..CreateOptions::default() };
/// pollster::block_on(create(&storage, &options))?;
/// assert_eq!(Header::decode(&storage.to_vec())?.size_bytes, 1 << 30);
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn create<S: Storage>(storage: &S, options: &CreateOptions) -> Result<()> {
    let image = EmptyImage::plan(options)?;
    let header = image.header.encode()?;
    empty(storage, image.layout.end()).await?;
    image.reserve_data(storage).await?;
    image.write_tables(storage).await?;
    // What the header points to comes first: a power loss between the two leaves no image.
    storage.flush().await?;
    // The rest of the first cluster must be zeros too: no stray extension may follow.
    let mut cluster = Buffer::zeroed(bytes_of(image.layout.geometry()));
    cluster[..header.len()].copy_from_slice(&header);
    write(storage, HostOffset(0), cluster).await?;
    storage.flush().await
}

/// Cluster sizes are at most 2 MiB.
fn bytes_of(geometry: &Geometry) -> usize {
    geometry.cluster_bytes() as usize
}

async fn write<S: Storage>(storage: &S, at: HostOffset, bytes: impl Into<Buffer>) -> Result<()> {
    let (result, _buffer) = storage.write_at(at, bytes.into()).await;
    result
}

/// Makes the storage read as zeros up to `end` at least.
async fn empty<S: Storage>(storage: &S, end: HostOffset) -> Result<()> {
    if storage.is_empty().await? {
        return Ok(());
    }
    if storage.capabilities().set_len != Capability::Unsupported {
        return storage.set_len(0, Hold::none()).await;
    }
    let used = HostRange::new(HostOffset(0), end.0);
    storage.write_zeroes_at(used, ZeroMode::MayUnmap, Hold::none()).await
}

/// Everything an empty image consists of, before any of it is written.
struct EmptyImage {
    layout: Layout,
    header: Header,
    allocated: Allocated,
    preallocation: Preallocation,
}

impl EmptyImage {
    fn plan(options: &CreateOptions) -> Result<Self> {
        let mut header = options.header()?;
        let preallocation = options.effective_preallocation();
        let entries = header.geometry.l1_entries_for(header.size_bytes);
        let clusters = header.geometry.clusters_for(header.size_bytes);
        let in_front = options.preallocation_layout == PreallocationLayout::Contiguous;
        let mut layout = match (in_front, &options.data_file) {
            (true, None) => Layout::sized_for(header.geometry, clusters)?,
            _ => Layout::new(header.geometry),
        };
        header.l1 = place_l1(&mut layout, entries)?;
        let allocated = match (&options.data_file, preallocation) {
            (None, _) if in_front => Allocated::behind_tables(&mut layout, clusters)?,
            (None, mode) => Allocated::in_image(&mut layout, clusters, mode)?,
            (Some(_), Preallocation::Off) => Allocated::default(),
            (Some(_), _) => Allocated::in_data_file(&mut layout, clusters)?,
        };
        header.refcount_table = RefcountTableLocation {
            offset: header.geometry.host_offset(layout.table_at()),
            clusters: u32::try_from(layout.table_clusters()).map_err(|_| too_large())?,
        };
        Ok(Self { layout, header, allocated, preallocation })
    }

    async fn write_tables<S: Storage>(&self, storage: &S) -> Result<()> {
        let geometry = self.layout.geometry();
        // QEMU leaves these bytes behind, and identical means identical.
        for OldTable { at, entries } in self.layout.old_tables() {
            write_words(storage, geometry.host_offset(*at), entries.iter().copied()).await?;
        }
        for (at, block) in self.layout.refcount_blocks() {
            write(storage, geometry.host_offset(at), &*block).await?;
        }
        let table = self.layout.table_words();
        write_words(storage, self.header.refcount_table.offset, table).await?;
        for (index, at) in self.allocated.l2_tables.iter().enumerate() {
            let words = self.allocated.table_words(geometry, index as u64);
            write_words(storage, geometry.host_offset(*at), words).await?;
        }
        let tables = self.allocated.l2_tables.iter();
        let entries = tables.map(|at| L1Entry::new(geometry.host_offset(*at)).0);
        let entries = entries.chain(std::iter::repeat(0));
        let count = self.header.l1.entries as usize;
        write_words(storage, self.header.l1.offset, entries.take(count)).await
    }

    /// Makes the image file hold its data clusters, as firmly as was asked for.
    async fn reserve_data<S: Storage>(&self, storage: &S) -> Result<()> {
        let range = self.allocated.data_range(self.layout.geometry());
        if self.header.has_external_data_file() {
            return Ok(());
        }
        match self.preallocation {
            Preallocation::Metadata => self.show_data(storage, range).await,
            mode => reserve(storage, range, mode.of_data(), Hold::none()).await.map(drop),
        }
    }

    /// A mapped cluster past the end of the file would look like a lost one. QEMU writes the part
    /// of the last unit that lies behind the end of the disk.
    async fn show_data<S: Storage>(&self, storage: &S, range: HostRange) -> Result<()> {
        let geometry = self.layout.geometry();
        let used = geometry.within_cluster(self.header.size_bytes);
        let unused = if used == 0 { 0 } else { geometry.cluster_bytes() - used };
        let disk = HostRange::new(range.start, range.len - unused);
        let rest = used.next_multiple_of(geometry.subcluster_bytes()) - used;
        match rest {
            0 => reserve(storage, disk, Reserve::Hole, Hold::none()).await.map(drop),
            rest => write(storage, disk.end(), Buffer::zeroed(rest as usize)).await,
        }
    }
}

async fn write_words<S: Storage>(
    storage: &S,
    at: HostOffset,
    words: impl IntoIterator<Item = u64>,
) -> Result<()> {
    let words: Vec<U64> = words.into_iter().map(U64::new).collect();
    if words.is_empty() {
        return Ok(());
    }
    write(storage, at, words.as_bytes()).await
}

fn place_l1(layout: &mut Layout, entries: u64) -> Result<L1Location> {
    if entries == 0 {
        return Ok(L1Location::default());
    }
    let clusters = layout.geometry().clusters_for(entries * 8);
    let at = layout.allocate(clusters)?;
    let entries = u32::try_from(entries).map_err(|_| too_large())?;
    Ok(L1Location { offset: layout.geometry().host_offset(at), entries })
}

fn too_large() -> Error {
    Error::invalid("The disk is too large for the format; larger clusters would help")
}
