//! An image as a JSON object, with the members of QEMU's in their order.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lacuna::buffer::Buffer;
use lacuna::chain::LevelInfo;
use lacuna::qcow2::format::{
    AutoclearFeatures, BitmapEntry, BitmapFlags, CompatibleFeatures, CompressionType, Encryption,
    EntryWidth, Header, IncompatibleFeatures, Snapshot, SnapshotTableDecoder, Version,
};
use lacuna::storage::{FileStorage, Storage};
use lacuna::units::HostOffset;
use pollster::block_on;
use serde_json::{Map, Value, json};

use super::luks;
use crate::error::{CliError, CliResult};

/// Largest part of an image that is read to describe it.
const MOST_BYTES: u64 = 64 << 20;

/// Describes one level of a chain.
pub(super) fn node(level: &LevelInfo<FileStorage>) -> CliResult<Value> {
    let file = level.path.display().to_string();
    let on_disk = std::fs::metadata(&level.path)
        .map_err(|error| CliError::new(format!("Could not stat '{file}': {error}")))?;
    let actual = on_disk.blocks() * 512;
    let len = block_on(level.storage.len())?;
    let mut members = Map::new();
    members.insert("children".into(), children(&file, len, actual));
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
    members.insert("format".into(), level.format.name().into());
    members.insert("actual-size".into(), actual.into());
    if let Some(header) = header {
        let data = specifics(header, &level.storage)?;
        members.insert("format-specific".into(), json!({"type": "qcow2", "data": data}));
        names(&mut members, header, &level.path);
    }
    members.insert("dirty-flag".into(), header.is_some_and(is_dirty).into());
    Ok(Value::Object(members))
}

/// The image file below the format.
fn children(file: &str, len: u64, actual: u64) -> Value {
    json!([{
        "name": "file",
        "info": {
            "children": [],
            "virtual-size": len.next_multiple_of(512),
            "filename": file,
            "format": "file",
            "actual-size": actual,
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": false,
        },
    }])
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

/// Describes what only qcow2 images have.
pub(crate) fn specifics(header: &Header, storage: &FileStorage) -> CliResult<Value> {
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
        data.insert("bitmaps".into(), Value::Array(bitmaps));
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

fn encrypt(header: &Header, storage: &FileStorage) -> CliResult<Option<Value>> {
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

fn read(storage: &FileStorage, offset: HostOffset, len: u64) -> CliResult<Buffer> {
    let too_long = || CliError::new(format!("A table of {len} bytes at {offset} is too long"));
    let len = usize::try_from(len.min(MOST_BYTES + 1)).map_err(|_| too_long())?;
    if len as u64 > MOST_BYTES {
        return Err(too_long());
    }
    let (result, bytes) = block_on(storage.read_at(offset, Buffer::zeroed(len)));
    result?;
    Ok(bytes)
}

fn snapshots(header: &Header, storage: &FileStorage) -> CliResult<Vec<Value>> {
    let mut decoder = SnapshotTableDecoder::new(header.snapshots);
    while let Some(wanted) = decoder.wanted() {
        let bytes = read(storage, wanted.start, wanted.len)?;
        decoder.feed(&bytes)?;
    }
    Ok(decoder.into_snapshots().iter().map(snapshot).collect())
}

fn snapshot(snapshot: &Snapshot) -> Value {
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

fn bitmaps(header: &Header, storage: &FileStorage) -> CliResult<Vec<Value>> {
    let Some(extension) = header.extensions.bitmaps else { return Ok(Vec::new()) };
    if !header.features.autoclear.contains(AutoclearFeatures::BITMAPS) {
        // Somebody wrote to the image without regard to them: they mean nothing.
        return Ok(Vec::new());
    }
    let bytes = read(storage, extension.directory_offset, extension.directory_bytes)?;
    let entries = BitmapEntry::decode_directory(&bytes, &extension)?;
    Ok(entries.iter().map(bitmap).collect())
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
