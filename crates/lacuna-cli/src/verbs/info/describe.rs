//! An image as a JSON object, with the members of QEMU's in their order.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lacuna::buffer::Buffer;
use lacuna::chain::LevelInfo;
use lacuna::qcow2::format::{
    AutoclearFeatures, BitmapEntry, BitmapFlags, CompatibleFeatures, CompressionType, Encryption,
    EntryWidth, Header, IncompatibleFeatures, Snapshot, SnapshotTableDecoder, Version,
};
use lacuna::storage::Storage;
use lacuna::units::HostOffset;
use pollster::block_on;
use serde_json::{Map, Value, json};

use super::luks;
use crate::error::{CliError, CliResult};
use crate::nodes::AnyStorage;
use crate::verbs::spec::tree::{DiskSpec, StorageSpec, Window};

/// Largest part of an image that is read to describe it.
const MOST_BYTES: u64 = 64 << 20;

/// Describes one level of a chain; `spec` is what the command line says of it.
pub(super) fn node(level: &LevelInfo<AnyStorage>, spec: Option<&DiskSpec>) -> CliResult<Value> {
    let file = spec.map_or_else(|| level.path.display().to_string(), DiskSpec::shown);
    let named = StorageSpec::named(&level.path)?;
    let storage = spec.map_or(&named, |spec| &spec.file);
    let whole = spec.is_none_or(|spec| spec.window == Window::default());
    let len = if whole { Some(block_on(level.storage.len())?) } else { None };
    let stands_alone = spec.and_then(|spec| spec.storage_name);
    let mut members = Map::new();
    let children = match stands_alone {
        None => json!([{"name": "file", "info": storage_info(storage, len)?}]),
        Some(_) => json!([]),
    };
    members.insert("children".into(), children);
    let header = level.header.as_ref();
    if let Some(format) = header.and_then(|header| header.extensions.backing_format.as_ref()) {
        members.insert("backing-filename-format".into(), text(format.as_bytes()));
    }
    if let Some(header) = header {
        let snapshots = snapshots(header, &level.storage)?;
        if !snapshots.is_empty() {
            members.insert("snapshots".into(), Value::Array(snapshots));
        }
    }
    members.insert("virtual-size".into(), level.size_bytes.into());
    members.insert("filename".into(), file.into());
    if let Some(header) = header {
        members.insert("cluster-size".into(), header.geometry.cluster_bytes().into());
    }
    let format = stands_alone.unwrap_or_else(|| level.format.name());
    members.insert("format".into(), format.into());
    if let Some(actual) = actual_bytes(storage)? {
        members.insert("actual-size".into(), actual.into());
    }
    if let Some(header) = header {
        let data = specifics(header, &level.storage)?;
        members.insert("format-specific".into(), json!({"type": "qcow2", "data": data}));
        names(&mut members, header, &level.path);
    }
    // Nobody asks a server whether it is in order.
    if header.is_some() || !matches!(storage, StorageSpec::Nbd(_)) {
        members.insert("dirty-flag".into(), header.is_some_and(is_dirty).into());
    }
    Ok(Value::Object(members))
}

/// Returns what the file takes on the host, where there is a file.
fn actual_bytes(storage: &StorageSpec) -> CliResult<Option<u64>> {
    match storage {
        // Nobody asks a test driver.
        StorageSpec::Debug(_) | StorageSpec::Nbd(_) => Ok(None),
        StorageSpec::Disk(disk) => actual_bytes(&disk.file),
        StorageSpec::File(file) => facts(&file.path).map(|facts| Some(facts.blocks() * 512)),
        StorageSpec::Null(_) => Ok(Some(0)),
    }
}

fn facts(path: &Path) -> CliResult<Metadata> {
    std::fs::metadata(path)
        .map_err(|error| CliError::new(format!("Could not stat '{}': {error}", path.display())))
}

/// Describes what plays the file below a format.
///
/// `len` is the number of bytes in it, where that is known.
fn storage_info(storage: &StorageSpec, len: Option<u64>) -> CliResult<Value> {
    Ok(match storage {
        StorageSpec::Debug(debug) => json!({
            "children": [{"name": "image", "info": storage_info(&debug.1, len)?}],
            "virtual-size": len,
            "filename": storage.shown(),
            "format": "blkdebug",
        }),
        StorageSpec::Disk(disk) => json!({
            "children": [{"name": "file", "info": storage_info(&disk.file, None)?}],
            "filename": disk.shown(),
            "format": disk.format.map(crate::format::Format::name),
            "actual-size": actual_bytes(storage)?,
        }),
        StorageSpec::File(file) => {
            let facts = facts(&file.path)?;
            json!({
                "children": [],
                "virtual-size": len.unwrap_or(facts.len()).next_multiple_of(512),
                "filename": file.path.to_string_lossy(),
                "format": file.kind.name(),
                "actual-size": facts.blocks() * 512,
                "format-specific": {"type": file.kind.name(), "data": {}},
                "dirty-flag": false,
            })
        }
        StorageSpec::Nbd(_) => json!({
            "children": [],
            "virtual-size": len.map(|len| len.next_multiple_of(512)),
            "filename": storage.shown(),
            "format": "nbd",
        }),
        StorageSpec::Null(empty) => json!({
            "children": [],
            "virtual-size": empty.size_bytes(),
            "filename": empty.shown(),
            "format": empty.name,
            "actual-size": 0,
        }),
    })
}

/// Names come from the image, in whatever bytes.
fn text(bytes: &[u8]) -> Value {
    String::from_utf8_lossy(bytes).into_owned().into()
}

fn names(members: &mut Map<String, Value>, header: &Header, image: &Path) {
    let backing = header.backing_name.as_ref().map(|name| name.to_string_lossy().into_owned());
    if let Some(name) = &backing {
        members.insert("full-backing-filename".into(), full_name(name, image).into());
    }
    if header.encryption.is_some() {
        members.insert("encrypted".into(), true.into());
    }
    if let Some(name) = backing {
        members.insert("backing-filename".into(), name.into());
    }
}

/// A relative name is seen from where the image is; a protocol is no path.
fn full_name(name: &str, image: &Path) -> String {
    let has_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    match image.parent() {
        Some(folder) if !has_protocol => folder.join(name).display().to_string(),
        _ => name.to_owned(),
    }
}

fn is_dirty(header: &Header) -> bool {
    header.features.incompatible.contains(IncompatibleFeatures::DIRTY)
}

/// Adds what an image says of its whole disk and of its places in private bits and extensions, where
/// it does (000-13, 002-6, 004-8).
pub(super) fn add_claims(node: &mut Value, header: &Header) {
    let claims = [
        ("all-zero", AutoclearFeatures::ALL_ZERO),
        ("all-unallocated", AutoclearFeatures::ALL_UNALLOCATED),
    ];
    let Some(Value::Object(data)) = node.pointer_mut("/format-specific/data") else { return };
    for (key, claim) in claims {
        if header.zero_claims().contains(claim) {
            data.insert(key.into(), true.into());
        }
    }
    if header.keeps_mapping() {
        // Kept so far: no program wrote that would take a discarded cluster's place.
        let kept = header.features.autoclear.contains(AutoclearFeatures::MAPPING_KEPT);
        data.insert("keep-mapping".into(), true.into());
        data.insert("mapping-kept".into(), kept.into());
    }
    if header.extensions.zero_cluster.is_some() {
        data.insert("shared-zero-cluster".into(), true.into());
    }
}

/// Describes what only qcow2 images have.
pub(crate) fn specifics(header: &Header, storage: &AnyStorage) -> CliResult<Value> {
    let is_new = header.geometry.version() == Version::V3;
    let compatible = header.features.compatible;
    let incompatible = header.features.incompatible;
    let mut data = Map::new();
    data.insert("compat".into(), if is_new { "1.1" } else { "0.10" }.into());
    let compression = match header.compression {
        CompressionType::Zstd => "zstd",
        CompressionType::Deflate => "zlib",
    };
    data.insert("compression-type".into(), compression.into());
    if is_new {
        let lazy = compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS);
        data.insert("lazy-refcounts".into(), lazy.into());
    }
    let bitmaps = bitmaps(header, storage)?;
    if !bitmaps.is_empty() {
        data.insert("bitmaps".into(), bitmaps.iter().map(bitmap).collect());
    }
    data.insert("refcount-bits".into(), header.geometry.refcount_bits().into());
    if let Some(encrypt) = encrypt(header, storage)? {
        data.insert("encrypt".into(), encrypt);
    }
    if let Some(name) = &header.extensions.data_file_name {
        let raw = header.features.autoclear.contains(AutoclearFeatures::RAW_EXTERNAL_DATA);
        data.insert("data-file".into(), text(name.as_bytes()));
        data.insert("data-file-raw".into(), raw.into());
    }
    if is_new {
        let extended = header.geometry.entry_width() == EntryWidth::Extended;
        let corrupt = incompatible.contains(IncompatibleFeatures::CORRUPT);
        data.insert("corrupt".into(), corrupt.into());
        data.insert("extended-l2".into(), extended.into());
    }
    Ok(Value::Object(data))
}

fn encrypt(header: &Header, storage: &AnyStorage) -> CliResult<Option<Value>> {
    match (header.encryption, header.extensions.encryption_header) {
        (None, _) => Ok(None),
        (Some(Encryption::Luks), Some(place)) => {
            let len = place.len_bytes.min(luks::HEADER_BYTES as u64) as usize;
            let (read, bytes) = block_on(storage.read_at(place.offset, Buffer::zeroed(len)));
            read?;
            Ok(Some(luks::describe(&bytes)))
        }
        (Some(Encryption::Luks), None) => Ok(Some(json!({"format": "luks"}))),
        (Some(Encryption::Aes), _) => Ok(Some(json!({"format": "aes"}))),
    }
}

fn read(storage: &AnyStorage, offset: HostOffset, len: u64) -> CliResult<Buffer> {
    let too_long = || CliError::new(format!("A table of {len} bytes at {offset} is too long"));
    let len = usize::try_from(len.min(MOST_BYTES + 1)).map_err(|_| too_long())?;
    if len as u64 > MOST_BYTES {
        return Err(too_long());
    }
    let (result, bytes) = block_on(storage.read_at(offset, Buffer::zeroed(len)));
    result?;
    Ok(bytes)
}

fn snapshots(header: &Header, storage: &AnyStorage) -> CliResult<Vec<Value>> {
    let mut decoder = SnapshotTableDecoder::new(header.snapshots);
    while let Some(wanted) = decoder.wanted() {
        let bytes = read(storage, wanted.start, wanted.len)?;
        decoder.feed(&bytes)?;
    }
    Ok(decoder.into_snapshots().iter().map(snapshot).collect())
}

/// Describes a snapshot as QEMU does.
pub(crate) fn snapshot(snapshot: &Snapshot) -> Value {
    let mut members = Map::new();
    if let Some(count) = snapshot.instruction_count.filter(|count| *count != u64::MAX) {
        members.insert("icount".into(), count.into());
    }
    let clock = snapshot.guest_clock_nanoseconds;
    members.insert("vm-clock-nsec".into(), (clock % 1_000_000_000).into());
    members.insert("name".into(), text(snapshot.name.as_bytes()));
    members.insert("date-sec".into(), snapshot.created_seconds.into());
    members.insert("date-nsec".into(), snapshot.created_nanoseconds.into());
    members.insert("vm-clock-sec".into(), (clock / 1_000_000_000).into());
    members.insert("id".into(), text(snapshot.id.as_bytes()));
    members.insert("vm-state-size".into(), snapshot.vm_state_bytes.into());
    Value::Object(members)
}

/// Reads the directory of the bitmaps.
pub(crate) fn bitmaps(header: &Header, storage: &AnyStorage) -> CliResult<Vec<BitmapEntry>> {
    let Some(extension) = header.extensions.bitmaps else { return Ok(Vec::new()) };
    if !header.features.autoclear.contains(AutoclearFeatures::BITMAPS) {
        // Somebody wrote to the image without regard to them: they mean nothing.
        return Ok(Vec::new());
    }
    let bytes = read(storage, extension.directory_offset, extension.directory_bytes)?;
    Ok(BitmapEntry::decode_directory(&bytes, &extension)?)
}

fn bitmap(entry: &BitmapEntry) -> Value {
    let named = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
    let flags: Vec<&str> = named
        .into_iter()
        .filter(|(flag, _)| entry.flags.contains(*flag))
        .map(|(_, name)| name)
        .collect();
    json!({
        "flags": flags,
        "name": text(entry.name.as_bytes()),
        "granularity": 1u64.checked_shl(entry.granularity_bits.into()).unwrap_or(0),
    })
}
