//! Opening an image: everything the header claims is checked before it is believed.

use super::bitmaps::Bitmaps;
use super::check::read::read_words;
use super::check::{self, BeyondRepair, CheckOptions, Repair};
use super::format::{
    AutoclearFeatures, CompatibleFeatures, Encryption, Header, IncompatibleFeatures, L1Entry,
    Version,
};
use super::header_change::write_features;
use super::history::Readers;
use super::image::Image;
use super::in_flight::InFlight;
use super::mapping::{DataPlace, Decoder};
use super::meta::{Gate, L1Table, Meta};
use super::options::{Access, OnDiscard, OpenOptions, Parts};
use super::overlap::{Structure, Structures};
use super::quarantine::Quarantine;
use super::refcounts::Refcounts;
use super::sharing::Pins;
use super::table_cache::{LEAST_TO_READ, LEAST_TO_WRITE, TableCache};
use super::zero_claims;
use super::zero_cluster::SharedZero;
use crate::buffer::Buffer;
use crate::storage::Storage;
use crate::units::{HostOffset, HostRange};
use crate::{Error, ErrorKind, Result};

/// Enough of the file to learn the cluster size.
const PEEK_BYTES: u64 = 512;

impl<S: Storage> Image<S> {
    /// Opens an image whose parts the caller opened.
    ///
    /// For writing, a dirty image is repaired first, autoclear bits that are not maintained here
    /// are cleared, and all of that is durable before the call returns. Opened read-only, nothing
    /// is written.
    ///
    /// # Errors
    /// `Corrupt` or `Unsupported` where the header or a table location is not one this engine can
    /// work with; `InvalidRequest` where a part is missing that the header names; `ReadOnly`
    /// where the storage cannot be written.
    pub async fn open(parts: Parts<S>, options: OpenOptions) -> Result<Self> {
        let mut header = read_header(&parts.storage).await?;
        check_parts(&header, &parts)?;
        check_options(&header, &options)?;
        let writable = options.access == Access::ReadWrite;
        if writable {
            prepare_for_writing(&parts.storage, &mut header, &options).await?;
        }
        if options.lazy_refcounts == Some(true) && header.geometry.version() == Version::V2 {
            return Err(Error::invalid(
                "Lazy refcounts need version 3 of the format; the image is of version 2",
            ));
        }
        let meta = load_meta(&parts, &header, &options).await?;
        let image = Self::from_parts(parts, header, meta, &options);
        image.recall_zero_cluster(options.shared_zero).await;
        image.recover_bitmaps().await?;
        Ok(image)
    }
}

/// Whether refcounts may be written late.
pub(super) fn is_lazy(header: &Header, options: &OpenOptions) -> bool {
    let by_header = header.features.compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS);
    options.lazy_refcounts.unwrap_or(by_header)
}

/// What a discard leaves of a mapping: as whoever opens the image says, else as the image does.
fn on_discard(header: &Header, options: &OpenOptions) -> OnDiscard {
    let remembered = match header.keeps_mapping() {
        true => OnDiscard::KeepMapping,
        false => OnDiscard::Free,
    };
    options.on_discard.unwrap_or(remembered)
}

/// Reads and checks the header of the image in `storage`.
///
/// # Errors
/// `Corrupt` or `Unsupported` with the field that is wrong and what would be right.
///
/// ```
/// use lacuna::qcow2::{CreateOptions, create, read_header};
/// use lacuna::storage::MemoryStorage;
/// let storage = MemoryStorage::new();
/// pollster::block_on(create(&storage, &CreateOptions { size_bytes: 512, ..Default::default() }))?;
/// assert_eq!(pollster::block_on(read_header(&storage))?.size_bytes, 512);
/// # Ok::<_, lacuna::Error>(())
/// ```
pub async fn read_header<S: Storage>(storage: &S) -> Result<Header> {
    let file_bytes = storage.len().await?;
    let peek = read(storage, HostOffset(0), PEEK_BYTES.min(file_bytes)).await?;
    let cluster_bytes = Header::peek_cluster_bytes(&peek).map_err(BeyondRepair::mark)?;
    let bytes = read(storage, HostOffset(0), cluster_bytes.min(file_bytes)).await?;
    Header::decode(&bytes).map_err(|error| match Header::decode_for_check(&bytes) {
        Ok(_) => error,
        Err(_) => BeyondRepair::mark(error),
    })
}

async fn read<S: Storage>(storage: &S, offset: HostOffset, len: u64) -> Result<Buffer> {
    let (result, bytes) = storage.read_at(offset, Buffer::new(len as usize)).await;
    result.map(|()| bytes)
}

fn check_parts<S>(header: &Header, parts: &Parts<S>) -> Result<()> {
    if let Some(kind) = header.encryption() {
        let method = match kind {
            Encryption::Aes => "AES",
            Encryption::Luks => "LUKS",
        };
        return Err(Error::unsupported(format!(
            "The image is encrypted ({method}); encrypted images can be described but not opened"
        )));
    }
    match (header.has_external_data_file(), parts.data.is_some()) {
        (true, false) => {
            return Err(Error::invalid(
                "The image keeps its data in an external file, which was not given",
            ));
        }
        (false, true) => {
            return Err(Error::invalid("A data file was given, but the image has none"));
        }
        _ => {}
    }
    if header.backing_name.is_some() && parts.backing.is_none() {
        return Err(Error::invalid("The image has a backing file, which was not given"));
    }
    Ok(())
}

fn check_options(header: &Header, options: &OpenOptions) -> Result<()> {
    match (options.on_discard, header.geometry.version()) {
        // What is only read, as a backing file, is not asked to.
        (Some(OnDiscard::KeepMapping), Version::V2) if options.access == Access::ReadWrite => {
            Err(Error::unsupported(
                "Version 2 cannot mark a cluster as zeros and keep its place: discard-no-unref needs \
             version 3",
            ))
        }
        _ => Ok(()),
    }
}

/// Refuses what must not be written, repairs what may be, and clears foreign autoclear bits.
async fn prepare_for_writing<S: Storage>(
    storage: &S,
    header: &mut Header,
    options: &OpenOptions,
) -> Result<()> {
    if !storage.capabilities().writable {
        return Err(Error::new(ErrorKind::ReadOnly, "The image file was opened read-only"));
    }
    if header.features.incompatible.contains(IncompatibleFeatures::CORRUPT) {
        return Err(Error::corrupt(
            "The image is marked corrupt: open it read-only, or repair it with check -r all",
        ));
    }
    if header.features.incompatible.contains(IncompatibleFeatures::DIRTY) {
        repair_dirty(storage).await?;
        *header = read_header(storage).await?;
    }
    let mut known = AutoclearFeatures::BITMAPS
        | AutoclearFeatures::RAW_EXTERNAL_DATA
        | zero_claims::possible(header);
    // Whoever may take places is as a stranger to who says that they were kept.
    let keeps = header.keeps_mapping() && on_discard(header, options) == OnDiscard::KeepMapping;
    known.set(AutoclearFeatures::MAPPING_KEPT, keeps);
    known.set(AutoclearFeatures::BITMAP_INTENTS, header.keeps_bitmap_intents());
    let kept = header.features.autoclear & known;
    if kept != header.features.autoclear {
        header.features.autoclear = kept;
        write_features(storage, &header.features).await?;
    }
    Ok(())
}

/// Postponed refcounts are rebuilt before anything is allocated by them.
async fn repair_dirty<S: Storage>(storage: &S) -> Result<()> {
    let options = CheckOptions { repair: Repair::All };
    let report = check::check(storage, &options, &mut |_| {}).await?;
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(Error::corrupt(format!(
            "The image was not closed properly and its repair left {} errors; open it read-only",
            report.corruptions + report.check_errors
        )));
    }
    Ok(())
}

async fn load_meta<S: Storage>(
    parts: &Parts<S>,
    header: &Header,
    options: &OpenOptions,
) -> Result<Meta> {
    let geometry = header.geometry;
    let file_bytes = parts.storage.len().await?;
    let l1 = words(&parts.storage, header.l1.range()).await?;
    let l1: Vec<L1Entry> = l1.into_iter().map(L1Entry).collect();
    let writable = options.access == Access::ReadWrite;
    let table_bytes = match writable {
        true => u64::from(header.refcount_table.clusters) * geometry.cluster_bytes(),
        false => 0,
    };
    let table =
        words(&parts.storage, HostRange::new(header.refcount_table.offset, table_bytes)).await?;
    if writable {
        refuse_outside(header, file_bytes)?;
    }
    let structures = match writable {
        true => structures(&parts.storage, header, &l1, &table).await?,
        false => Structures::new(geometry.cluster_bits()),
    };
    let bitmaps = match writable {
        true => Bitmaps::load(&parts.storage, header).await?,
        false => Bitmaps::left_in_use(&parts.storage, header).await,
    };
    let follows_bitmaps = writable && !bitmaps.is_empty();
    let place = if parts.data.is_some() { DataPlace::External } else { DataPlace::ImageFile };
    let lazy = is_lazy(header, options);
    Ok(Meta {
        decoder: Decoder { geometry, place, zero_cluster: None },
        size_bytes: header.size_bytes / 512 * 512,
        has_backing: parts.backing.is_some(),
        writable,
        l1: L1Table::new(l1, header.l1.offset),
        l2: TableCache::new(
            geometry.cluster_bytes(),
            options.cache_bytes,
            if writable { LEAST_TO_WRITE } else { LEAST_TO_READ },
        ),
        refcounts: Refcounts::new(
            geometry,
            table,
            header.refcount_table.offset,
            file_bytes,
            options.cache_bytes / 4,
            options.placement,
        ),
        quarantine: Quarantine::default(),
        in_flight: InFlight::default(),
        structures,
        bitmaps,
        gate: Gate { bitmaps: follows_bitmaps, dirty_bit: writable && lazy },
        size_dirty: false,
        grows_to: 0,
        needs_data_sync: false,
        zero_from: HostOffset(file_bytes.next_multiple_of(geometry.cluster_bytes())),
        loaded_table: None,
        loaded_block: None,
        paused: false,
        closed: false,
        failed: None,
        on_discard: on_discard(header, options),
        discard_unit: options.discard_unit,
        claims: header.zero_claims(),
        shared_zero: SharedZero::default(),
        pins: Pins::default(),
        moves_snapshots: false,
        snapshot_maps: Vec::new(),
        readers: Readers::default(),
        histories: 0,
    })
}

/// Refuses to write to an image whose tables would have to be written past the end of its file: what
/// they said is lost, and the file would become as long as the damaged header says.
fn refuse_outside(header: &Header, file_bytes: u64) -> Result<()> {
    let cluster_bytes = header.geometry.cluster_bytes();
    let end = file_bytes.next_multiple_of(cluster_bytes);
    let table = header.refcount_table;
    let table_bytes = u64::from(table.clusters).saturating_mul(cluster_bytes);
    let refcounts = HostRange::new(table.offset, table_bytes);
    let outside = |name: &str, range: HostRange| {
        let is_outside = range.start.0.saturating_add(range.len) > end;
        is_outside.then(|| {
            Error::corrupt(format!(
                "{name} at {} ({} bytes) lies beyond the end of the file at {file_bytes:#x}",
                range.start, range.len
            ))
        })
    };
    if let Some(error) = outside("Active L1 table", header.l1.range()) {
        return Err(BeyondRepair::mark(error));
    }
    outside("Refcount table", refcounts).map_or(Ok(()), Err)
}

/// Reads a table of big-endian words; the header was checked against the format's limits, so the
/// size is bounded.
async fn words<S: Storage>(storage: &S, range: HostRange) -> Result<Vec<u64>> {
    read_words(storage, range.start, range.len / 8).await
}

/// Finds where the metadata lies that no write may hit.
pub(super) async fn structures<S: Storage>(
    storage: &S,
    header: &Header,
    l1: &[L1Entry],
    table: &[u64],
) -> Result<Structures> {
    let geometry = &header.geometry;
    let cluster_bytes = geometry.cluster_bytes();
    let mut all = Structures::new(geometry.cluster_bits());
    all.add(HostRange::new(HostOffset(0), cluster_bytes), Structure::Header);
    all.add(HostRange::new(header.l1.offset, l1.len() as u64 * 8), Structure::ActiveL1);
    let table_bytes = table.len() as u64 * 8;
    all.add(HostRange::new(header.refcount_table.offset, table_bytes), Structure::RefcountTable);
    for table in l1.iter().filter_map(|entry| entry.table()) {
        all.add(HostRange::new(table, cluster_bytes), Structure::ActiveL2);
    }
    for block in table.iter().map(|entry| entry & !0x1ff).filter(|block| *block != 0) {
        all.add(HostRange::new(HostOffset(block), cluster_bytes), Structure::RefcountBlock);
    }
    if let Some(bitmaps) = header.valid_bitmaps() {
        let range = HostRange::new(bitmaps.directory_offset, bitmaps.directory_bytes);
        all.add(range, Structure::BitmapDirectory);
    }
    super::snapshots::add_structures(storage, header, &mut all).await?;
    Ok(all)
}
