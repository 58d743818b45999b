//! Makes empty images, laid out byte by byte as `qemu-img create` does.
//!
//! * Always: the header is written last, so that a half-made image is no image.
//! * Always: options are checked before the first write.
//! * Never: a backing file or data file is opened or made here; only their names are stored.

mod layout;
mod options;

use zerocopy::IntoBytes;
use zerocopy::big_endian::U64;

pub use options::{BackingName, CreateOptions, DataFileName};

use self::layout::{Layout, OldTable};
use super::format::{
    EntryWidth, Geometry, Header, L1Entry, L1Location, L2Entry, RefcountTableLocation,
};
use crate::buffer::{Buffer, Hold};
use crate::storage::{Capability, Storage, ZeroMode};
use crate::units::{GuestOffset, HostCluster, HostOffset, HostRange};
use crate::{Error, Result};

/// Makes an empty image in `storage`; whatever was there is gone. Durable when it returns.
///
/// The bytes are those of `qemu-img create -f qcow2` with the same options. The disk's size is
/// rounded up to a multiple of 512 bytes, as QEMU does. With a raw data file every cluster is
/// mapped to its own offset in that file; the caller makes the file and gives it the disk's size.
///
/// # Errors
/// `InvalidRequest` where options are out of their limits or exclude each other, `NoSpace` where
/// names do not fit into the first cluster, otherwise what the storage says.
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
    image.write_tables(storage).await?;
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
        return storage.set_len(0).await;
    }
    let used = HostRange::new(HostOffset(0), end.0);
    storage.write_zeroes_at(used, ZeroMode::MayUnmap, Hold::none()).await
}

/// Everything an empty image consists of, before any of it is written.
struct EmptyImage {
    layout: Layout,
    header: Header,
    /// One per L1 entry where all clusters are mapped, otherwise none.
    l2_tables: Vec<HostCluster>,
}

impl EmptyImage {
    fn plan(options: &CreateOptions) -> Result<Self> {
        let mut header = options.header()?;
        let mut layout = Layout::new(header.geometry);
        let entries = header.geometry.l1_entries_for(header.size_bytes);
        header.l1 = place_l1(&mut layout, entries)?;
        let mut l2_tables = Vec::new();
        if header.has_raw_external_data() {
            for _ in 0..entries {
                l2_tables.push(layout.allocate(1)?);
            }
        }
        header.refcount_table = RefcountTableLocation {
            offset: header.geometry.host_offset(layout.table_at()),
            clusters: u32::try_from(layout.table_clusters()).map_err(|_| too_large())?,
        };
        Ok(Self { layout, header, l2_tables })
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
        for (index, at) in self.l2_tables.iter().enumerate() {
            let words = self.identity_l2(index as u64);
            write_words(storage, geometry.host_offset(*at), words).await?;
        }
        let entries = self.l2_tables.iter().map(|at| L1Entry::new(geometry.host_offset(*at)).0);
        let entries = entries.chain(std::iter::repeat(0));
        let count = self.header.l1.entries as usize;
        write_words(storage, self.header.l1.offset, entries.take(count)).await
    }

    /// The words of the L2 table that maps guest clusters to the same offsets of the data file.
    fn identity_l2(&self, index: u64) -> impl Iterator<Item = u64> {
        let geometry = *self.layout.geometry();
        let start = index * geometry.l2_coverage_bytes();
        let size_bytes = self.header.size_bytes;
        let entry = move |slot: u64| {
            let guest = GuestOffset(start + (slot << geometry.cluster_bits()));
            if guest.0 < size_bytes {
                L2Entry::standard(HostOffset(guest.0)).word
            } else {
                L2Entry::UNALLOCATED.word
            }
        };
        // Extended entries: no subcluster is allocated yet, so the second word stays zero.
        let words = match geometry.entry_width() {
            EntryWidth::Standard => 1,
            EntryWidth::Extended => 2,
        };
        (0..geometry.l2_entries()).flat_map(move |slot| [entry(slot), 0].into_iter().take(words))
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
