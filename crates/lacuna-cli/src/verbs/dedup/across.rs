//! `dedup --across`: what several images hold at the same places goes into a base that they stand on.
//!
//! * Always: an image is replaced by its overlay when that is complete, durable, and reads the same; by
//!   one renaming. Until then it is not touched. A run that ended half-way is gone on with by another: a
//!   base is read-only once it is complete, and images that stand on it are passed by.
//! * Never: a base is removed, or changed, once an image stands on it.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lacuna::block::Layer;
use lacuna::chain::Sharing;
use lacuna::job::{self, CompareOptions};
use lacuna::qcow2::format::{CompatibleFeatures, Header, Version};
use lacuna::qcow2::{self, Access, BackingName, CreateOptions};
use lacuna::storage::{Create, FileOptions, FileStorage};
use lacuna::{Error, ErrorKind};
use pollster::block_on;
use serde_json::{Value, json};

use super::{FileChain, Form, Meter, Request, cluster_bytes, form, open};
use crate::args::Parsed;
use crate::error::{CliError, CliResult};
use crate::interrupt::{remove_half, whole_or_gone};
use crate::output::{self, short_size};
use crate::persona::Tool;
use crate::verbs::spec::ImageSpec;

/// What the name of an overlay ends with until it is complete.
const UNFINISHED: &str = ".lacuna-overlay";

/// An image that is to stand on the base.
struct Member<'a> {
    name: &'a str,
    chain: FileChain,
    /// Which file that was when it was opened.
    file: (u64, u64),
}

/// Whether the base is there already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Base {
    /// An earlier run completed it.
    Made,
    Missing,
}

pub(super) fn run(tool: &Tool, parsed: &Parsed) -> CliResult<u8> {
    let form = form(parsed)?;
    let (base, is_there) = check(parsed)?;
    let mut members = members(tool, parsed)?;
    if is_there == Base::Made {
        members.retain(|member| !stands_on(member, base));
    }
    let cluster = check_members(&members, base)?;
    if is_there == Base::Made {
        check_base(tool, base, cluster)?;
    }
    // Where none is left to move, nothing has clusters.
    let cluster = cluster.unwrap_or(1 << 16);
    let mut meter = Meter::new(tool, parsed, "dedup")?;
    let make = || make_base(tool, base, &members, cluster, &mut meter);
    let common_bytes = match is_there {
        Base::Missing => Some(whole_or_gone(base, make)?),
        Base::Made => None,
    };
    let mut told = Vec::new();
    for member in members {
        told.push(switch(tool, base, member, cluster, &mut meter)?);
    }
    meter.finish(true);
    if !parsed.has("quiet") {
        output::print(&text(form, base, common_bytes, &told))?;
    }
    Ok(0)
}

/// Returns the name of the base, and whether it is there.
fn check(parsed: &Parsed) -> CliResult<(&str, Base)> {
    let Some(base) = parsed.last("base") else {
        return Err(CliError::usage(
            "--across needs --base: the file that the images will stand on",
        ));
    };
    let others = ["report", "dry-run", "bandwidth", "image-opts", "force-share"];
    if let Some(flag) = others.into_iter().find(|flag| parsed.has(flag)) {
        return Err(CliError::usage(format!("--{flag} and --across are mutually exclusive")));
    }
    if parsed.operands.len() < 2 {
        return Err(CliError::usage("Expecting at least two image file names"));
    }
    match std::fs::symlink_metadata(base) {
        Ok(found) if found.is_file() && found.permissions().readonly() => Ok((base, Base::Made)),
        Ok(_) => {
            let text = format!("'{}' exists, and is not written over", output::tame(base));
            let hint =
                "a base that a run left incomplete can be written; if this is one, remove it";
            Err(CliError::new(text).with_fact("file", base).with_hint(hint))
        }
        Err(_) => Ok((base, Base::Missing)),
    }
}

/// Says whether an image has the base below it and nothing else.
fn stands_on(member: &Member<'_>, base: &str) -> bool {
    let levels = member.chain.levels();
    levels.len() == 2 && open::same_file(&levels[1].path, Path::new(base))
}

/// Refuses to go on with what is no base for such images. What it holds counts for nothing: every overlay
/// is compared.
fn check_base(tool: &Tool, base: &str, cluster: Option<u64>) -> CliResult<()> {
    let chain = opened(tool, base, Access::ReadOnly)?;
    match cluster.is_none() || cluster == cluster_bytes(&chain) {
        true => Ok(()),
        false => {
            let text = format!("'{}' has clusters of another size", output::tame(base));
            Err(CliError::new(text).with_class(ErrorKind::Unsupported))
        }
    }
}

fn members<'a>(tool: &Tool, parsed: &'a Parsed) -> CliResult<Vec<Member<'a>>> {
    let opened = |name: &'a String| {
        let request = Request::reading(name, parsed, "format")?;
        // What is copied has to hold still.
        let request = Request { sharing: Sharing::Readers, ..request };
        let chain = open::open_for_content(tool, &request)?;
        Ok(Member { name, chain, file: identity(&facts(name)?) })
    };
    parsed.operands.iter().map(opened).collect()
}

fn identity(facts: &std::fs::Metadata) -> (u64, u64) {
    (facts.dev(), facts.ino())
}

/// Refuses what could not be moved as it is; returns the size of all clusters, if there are any.
fn check_members(members: &[Member<'_>], base: &str) -> CliResult<Option<u64>> {
    for (index, member) in members.iter().enumerate() {
        let refuse = |why: &str| {
            let text = format!("'{}' {why}", output::tame(member.name));
            CliError::new(text).with_class(ErrorKind::Unsupported)
        };
        let image = member.chain.disk().bare_image();
        let image = image.ok_or_else(|| refuse("is no qcow2 image"))?;
        let header = image.header();
        let why = match () {
            () if same(member.name, base) => "is the base itself",
            () if member.chain.levels().len() > 1 => "stands on a backing file already",
            () if header.has_external_data_file() => "has an external data file",
            () if header.snapshots.count > 0 => "has internal snapshots, which would be lost",
            () if header.extensions.bitmaps.is_some() => "has bitmaps, which would be lost",
            () if !Path::new(member.name).is_file() => "is no regular file, and is not replaced",
            () if members[..index].iter().any(|other| same(other.name, member.name)) => {
                "is named twice"
            }
            () if cluster_bytes(&member.chain) != cluster_bytes(&members[0].chain) => {
                "has clusters of another size than the first image"
            }
            () => continue,
        };
        return Err(refuse(why));
    }
    Ok(members.first().and_then(|member| cluster_bytes(&member.chain)))
}

fn same(one: &str, other: &str) -> bool {
    open::same_file(Path::new(one), Path::new(other))
}

/// Makes the base, durable and read-only; returns how many bytes it holds.
fn make_base(
    tool: &Tool,
    base: &str,
    members: &[Member<'_>],
    cluster: u64,
    meter: &mut Meter,
) -> CliResult<u64> {
    let disks: Vec<_> = members.iter().map(|member| member.chain.disk()).collect();
    let longest = disks.iter().map(|disk| disk.size_bytes()).max().unwrap_or(0);
    let size_bytes = longest.next_multiple_of(512);
    let options = CreateOptions { size_bytes, cluster_bytes: cluster, ..CreateOptions::default() };
    make(base, &options)?;
    let target = opened(tool, base, Access::ReadWrite)?;
    let mut update = |done, total| meter.update("base", done, total);
    let common = block_on(job::gather_common(&disks, target.disk(), cluster, &mut update))?;
    block_on(target.into_disk().close())?;
    if common == 0 {
        let text = "The images hold nothing in common at the same places";
        return Err(CliError::new(text).with_hint("--report tells of equal clusters elsewhere"));
    }
    let mut permissions = facts(base)?.permissions();
    permissions.set_readonly(true);
    host(std::fs::set_permissions(base, permissions), "Making read-only", base)?;
    host(std::fs::File::open(base).and_then(|file| file.sync_all()), "Writing", base)?;
    sync_folder(base)?;
    Ok(common)
}

fn make(file: &str, options: &CreateOptions) -> CliResult<()> {
    let files = FileOptions { create: Create::Exclusive, ..FileOptions::read_write() };
    let storage = FileStorage::open(file, &files)?;
    block_on(qcow2::create(&storage, options))?;
    Ok(())
}

fn opened(tool: &Tool, file: &str, access: Access) -> CliResult<FileChain> {
    let image = ImageSpec::from_name(file, Some("qcow2"))?;
    let request = Request {
        image,
        access,
        cache: lacuna::storage::CacheMode::Buffered,
        sharing: Sharing::Format,
        unnamed: lacuna::chain::UnnamedFormat::Refuse,
    };
    open::open_for_content(tool, &request)
}

/// What became of an image.
struct Switched {
    name: String,
    before_bytes: u64,
    after_bytes: u64,
}

/// Puts an overlay in the place of an image.
fn switch(
    tool: &Tool,
    base: &str,
    member: Member<'_>,
    cluster: u64,
    meter: &mut Meter,
) -> CliResult<Switched> {
    let name = member.name;
    // What a link leads to is replaced, not the link.
    let path = host(std::fs::canonicalize(name), "Looking for", name)?;
    let Some(path) = path.to_str() else {
        return Err(CliError::new(format!("The name of '{}' is no UTF-8", output::tame(name))));
    };
    let before = facts(path)?;
    let unfinished = format!("{path}{UNFINISHED}");
    remove_stale(tool, &unfinished)?;
    whole_or_gone(&unfinished, || {
        // Open until it has its name, so that nobody takes it for stale.
        let _overlay = fill(tool, base, &member, &unfinished, cluster, meter)?;
        // Before the mode, some bits of which another owner would clear.
        let owner = (Some(before.uid()), Some(before.gid()));
        host(std::os::unix::fs::chown(&unfinished, owner.0, owner.1), "Giving to its owner", path)?;
        host(std::fs::set_permissions(&unfinished, before.permissions()), "Changing", &unfinished)?;
        host(
            std::fs::File::open(&unfinished).and_then(|file| file.sync_all()),
            "Writing",
            &unfinished,
        )?;
        if identity(&facts(path)?) != member.file {
            let text =
                format!("'{}' was replaced meanwhile, and stays as it is", output::tame(name));
            return Err(CliError::new(text).with_class(ErrorKind::Busy));
        }
        host(std::fs::rename(&unfinished, path), "Replacing", path)
    })?;
    sync_folder(path)?;
    let allocated = |facts: &std::fs::Metadata| facts.blocks() * 512;
    let after_bytes = allocated(&facts(path)?);
    Ok(Switched { name: name.to_owned(), before_bytes: allocated(&before), after_bytes })
}

/// Removes the overlay of a run that was killed; one that is open is somebody's work.
fn remove_stale(tool: &Tool, unfinished: &str) -> CliResult<()> {
    if std::fs::symlink_metadata(unfinished).is_err() {
        return Ok(());
    }
    match opened(tool, unfinished, Access::ReadWrite) {
        Err(error) if error.class() == Some(ErrorKind::Busy) => Err(error),
        _ => host(remove_half(unfinished), "Removing", unfinished),
    }
}

/// Makes the overlay of an image, and sees that it reads the same; returns it open.
fn fill(
    tool: &Tool,
    base: &str,
    member: &Member<'_>,
    file: &str,
    cluster: u64,
    meter: &mut Meter,
) -> CliResult<FileChain> {
    let disk = member.chain.disk();
    let Some(image) = disk.bare_image() else { return Err(CliError::new("No qcow2 image")) };
    make(file, &options(&image.header(), disk.size_bytes(), backing_name(base, file)?))?;
    let below = opened(tool, base, Access::ReadOnly)?;
    let overlay = opened(tool, file, Access::ReadWrite)?;
    let mut update = |done, total| meter.update("overlay", done, total);
    block_on(job::write_difference(disk, below.disk(), overlay.disk(), cluster, &mut update))?;
    block_on(overlay.into_disk().close())?;
    let overlay = opened(tool, file, Access::ReadOnly)?;
    let mut update = |done, total| meter.update("compare", done, total);
    let found =
        block_on(job::compare(disk, overlay.disk(), CompareOptions::default(), &mut update))?;
    match found.is_identical() && !found.sizes_differ {
        true => Ok(overlay),
        false => Err(CliError::new(format!(
            "The overlay of '{}' does not read as the image does, which stays as it is",
            output::tame(member.name)
        ))),
    }
}

/// An overlay is as its image was.
fn options(header: &Header, size_bytes: u64, backing: BackingName) -> CreateOptions {
    let is_lazy = header.features.compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS);
    CreateOptions {
        size_bytes,
        version: header.geometry.version(),
        cluster_bytes: header.geometry.cluster_bytes(),
        entry_width: header.geometry.entry_width(),
        refcount_bits: 1 << header.geometry.refcount_order(),
        compression: header.compression,
        lazy_refcounts: is_lazy && header.geometry.version() == Version::V3,
        backing: Some(backing),
        ..CreateOptions::default()
    }
}

/// Beside the overlay the base is called by its name alone, so that both can be moved.
fn backing_name(base: &str, overlay: &str) -> CliResult<BackingName> {
    let path = host(std::fs::canonicalize(base), "Looking for", base)?;
    let is_beside = path.parent() == Path::new(overlay).parent();
    let name = if is_beside { path.file_name().map(PathBuf::from) } else { Some(path) };
    let name = name.and_then(|name| name.to_str().map(str::to_owned));
    let name = name.filter(|name| !name.contains(':'));
    let name = name.ok_or_else(|| {
        CliError::new("The name of the base is no UTF-8, or has a colon, which begins a protocol")
    })?;
    Ok(BackingName { name, format: Some("qcow2".to_owned()) })
}

fn facts(file: &str) -> CliResult<std::fs::Metadata> {
    host(std::fs::metadata(file), "Looking for", file)
}

/// Makes names durable.
fn sync_folder(file: &str) -> CliResult<()> {
    let folder = Path::new(file).parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let synced = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
    host(synced, "Making names durable in", &folder.to_string_lossy())
}

fn host<T>(result: std::io::Result<T>, doing: &str, file: &str) -> CliResult<T> {
    result.map_err(|error| {
        let doing = format!("{doing} {}", output::tame(file));
        CliError::from(Error::io(error, doing)).with_fact("file", file)
    })
}

fn text(form: Form, base: &str, common_bytes: Option<u64>, told: &[Switched]) -> String {
    match form {
        Form::Human => {
            let line = |it: &Switched| {
                let (before, after) = (short_size(it.before_bytes), short_size(it.after_bytes));
                format!("{}: {before} on the host before, {after} now\n", output::tame(&it.name))
            };
            let lines: String = told.iter().map(line).collect();
            let base = output::tame(base);
            let common = common_bytes.map_or_else(
                || "was there".to_owned(),
                |bytes| format!("{} in common", short_size(bytes)),
            );
            format!(
                "{lines}{base}: {common}, read-only. All images stand on it: it must neither change nor \
                 go\n"
            )
        }
        Form::Json => {
            let image = |it: &Switched| json!({ "filename": it.name, "before": it.before_bytes, "after": it.after_bytes });
            let images: Vec<Value> = told.iter().map(image).collect();
            let object = json!({ "base": base, "common": common_bytes, "images": images });
            output::pretty(&object) + "\n"
        }
    }
}
