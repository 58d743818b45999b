//! From a description to an opened disk.
//!
//! * What an image names is a plain file or, by its URI, an export of a server; only what the
//!   command line describes becomes anything else.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use lacuna::block::{BoxFuture, ZeroDetection};
use lacuna::chain::{
    self, ChainOptions, Disk, FileOpener, FormatChoice, Identity, Instead, LevelInfo, Levels,
    Opener, StandIn,
};
use lacuna::qcow2::{Access, DiscardPolicy, GuestDiscard, OpenOptions};
use lacuna::storage::{CacheMode, Claim, FileAccess, FileOptions, FileStorage, Locking};
use lacuna::{Error, Result};

use lacuna_remote::NbdStorage;

use super::any::AnyStorage;
use super::chain::{FileChain, FileChainParts};
use super::debug::{Debug, Rules};
use super::disk::{Discards, ToolDisk};
use super::nested::Nested;
use super::null::Null;
use super::window::Window;
use crate::format::Format;
use crate::verbs::spec::debug::DebugSpec;
use crate::verbs::spec::nbd::NbdSpec;
use crate::verbs::spec::runtime::Locking as Locked;
use crate::verbs::spec::tree::{
    BelowSpec, DiskSpec, FileKind, FileSpec, StorageSpec, TopSpec, Window as Part,
};

/// The smallest table cache that is passed on: a few slices.
const LEAST_CACHE_BYTES: u64 = 64 << 10;

/// What holds for all of a disk unless its description says otherwise.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    /// How files are opened.
    pub(crate) files: FileOptions,
    /// How chains are opened; format, access and what the description says are replaced.
    pub(crate) chain: ChainOptions,
}

/// A disk that is about to be opened.
pub(crate) struct Opening {
    path: PathBuf,
    options: ChainOptions,
    opener: SpecOpener,
    discards: Discards,
    detection: ZeroDetection,
    tops: Vec<TopSpec>,
}

impl Opening {
    /// Prepares to open what `disk` describes.
    pub(crate) fn new(disk: &DiskSpec, base: &Base, access: Access) -> Self {
        let access = match disk.common.read_only {
            Some(true) => Access::ReadOnly,
            _ => access,
        };
        let mut base = base.clone();
        base.files.cache = cache(disk.common.direct, base.files.cache);
        let mut options = ChainOptions { access, ..base.chain.clone() };
        options.format = choice(disk.format);
        options.image = image_options(disk, options.image.access(access));
        let mut opener = SpecOpener::new(base);
        let path = opener.add(&disk.file, disk.window, "");
        options.data_path = disk.data_file.as_ref().map(|data| opener.add_whole(data, "data"));
        options.instead = instead(&disk.below, &mut opener);
        let discards = match disk.common.discard {
            Some(false) => Discards::Ignored,
            _ => Discards::Passed,
        };
        let (detection, tops) = (disk.common.detect_zeroes, disk.tops.clone());
        Self { path, options, opener, discards, detection, tops }
    }

    /// Opens it with its backing chain.
    pub(crate) async fn open(self) -> Result<FileChain> {
        let chain = chain::open(&self.opener, &self.path, &self.options).await?;
        let rules = self.opener.rules();
        let nested = self.opener.into_nested();
        let disk = ToolDisk::new(chain.disk().clone(), self.detection, nested, self.discards);
        let disk = disk.with_rules(rules).topped(&self.tops)?;
        Ok(FileChain::new(chain, disk))
    }

    /// Opens it in two parts, so that the image at `level` is written as the top is.
    pub(crate) async fn open_split(self, level: usize) -> Result<FileChainParts> {
        let chain = chain::open_split(&self.opener, &self.path, &self.options, level).await?;
        Ok(FileChainParts::new(chain, self.opener.into_nested()))
    }

    /// Describes it without opening data files.
    pub(crate) async fn inspect(self, levels: Levels) -> Result<Vec<LevelInfo<AnyStorage>>> {
        chain::inspect(&self.opener, &self.path, &self.options, levels).await
    }

    /// Opens the storage of its image alone.
    pub(crate) async fn storage(self) -> Result<AnyStorage> {
        self.opener.open(&self.path, self.options.access).await
    }
}

fn choice(format: Option<Format>) -> FormatChoice {
    match format {
        None => FormatChoice::Probe,
        Some(Format::Qcow2) => FormatChoice::Known(chain::Format::Qcow2),
        Some(Format::Raw) => FormatChoice::Known(chain::Format::Raw),
    }
}

const fn cache(direct: Option<bool>, otherwise: CacheMode) -> CacheMode {
    match direct {
        None => otherwise,
        Some(true) => CacheMode::Direct,
        Some(false) => CacheMode::Buffered,
    }
}

fn image_options(disk: &DiskSpec, options: OpenOptions) -> OpenOptions {
    let runtime = &disk.runtime;
    let usual = DiscardPolicy::default();
    let discard = DiscardPolicy {
        guest: match disk.common.discard {
            Some(false) => GuestDiscard::Ignore,
            _ => GuestDiscard::Unmap,
        },
        request: runtime.pass_discard_request.unwrap_or(usual.request),
        snapshot: runtime.pass_discard_snapshot.unwrap_or(usual.snapshot),
        other: runtime.pass_discard_other.unwrap_or(usual.other),
    };
    let options = options
        .discard(discard)
        .zero_unmap(runtime.zero_unmap)
        .shared_zero_cluster(runtime.shared_zero)
        .lazy_refcounts(runtime.lazy_refcounts);
    let options = match runtime.on_discard {
        Some(on_discard) => options.on_discard(on_discard),
        None => options,
    };
    match runtime.table_cache_bytes() {
        Some(bytes) => options.cache_bytes(bytes.max(LEAST_CACHE_BYTES)),
        None => options,
    }
}

/// What stands in for the backing files, from the top down.
fn instead(below: &BelowSpec, opener: &mut SpecOpener) -> Vec<Instead> {
    let mut all = Vec::new();
    let mut below = below;
    loop {
        match below {
            BelowSpec::Named => return all,
            BelowSpec::Nothing => {
                all.push(Instead { backing: StandIn::Nothing, format: None });
                return all;
            }
            BelowSpec::Changed(changed) => {
                let level = all.len().to_string();
                let backing = match &changed.file {
                    Some(file) => StandIn::At(opener.add_whole(file, &level)),
                    None => StandIn::Named,
                };
                let format = changed.format.map(|format| choice(Some(format)));
                all.push(Instead { backing, format });
                below = &changed.below;
            }
        }
    }
}

/// Opens what was described under the path by which the chain knows it; else a plain file.
struct SpecOpener {
    base: Base,
    specs: BTreeMap<PathBuf, (StorageSpec, Part)>,
    nested: Mutex<Vec<Disk<AnyStorage>>>,
    /// Those of the outermost test driver.
    rules: Mutex<Option<Arc<Rules>>>,
}

impl SpecOpener {
    const fn new(base: Base) -> Self {
        Self {
            base,
            specs: BTreeMap::new(),
            nested: Mutex::new(Vec::new()),
            rules: Mutex::new(None),
        }
    }

    fn add_whole(&mut self, spec: &StorageSpec, role: &str) -> PathBuf {
        self.add(spec, Part::default(), role)
    }

    /// Remembers a part of a storage, and returns its path; `role` tells those without one apart.
    fn add(&mut self, spec: &StorageSpec, part: Part, role: &str) -> PathBuf {
        let mut path = spec.path().to_owned();
        if !spec.has_path() {
            path.push(role);
        }
        self.specs.insert(path.clone(), (spec.clone(), part));
        path
    }

    fn rules(&self) -> Option<Arc<Rules>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn into_nested(self) -> Vec<Disk<AnyStorage>> {
        self.nested.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Boxed, since a disk may stand on a disk.
    fn open_spec<'a>(
        &'a self,
        spec: &'a StorageSpec,
        access: Access,
    ) -> BoxFuture<'a, Result<AnyStorage>> {
        match spec {
            StorageSpec::Debug(debug) => Box::pin(self.open_debug(&debug.0, &debug.1, access)),
            StorageSpec::Disk(disk) => Box::pin(self.open_disk(disk, access)),
            StorageSpec::File(file) => Box::pin(std::future::ready(self.open_file(file, access))),
            StorageSpec::Nbd(nbd) => Box::pin(open_export(nbd, access)),
            StorageSpec::Null(null) => {
                let null = AnyStorage::other(Null { len: null.size_bytes() });
                Box::pin(std::future::ready(Ok(null)))
            }
        }
    }

    async fn open_debug(
        &self,
        debug: &DebugSpec,
        below: &StorageSpec,
        access: Access,
    ) -> Result<AnyStorage> {
        let below = self.open_spec(below, access).await?;
        let rules = Arc::new(Rules::new(debug.rules.clone()));
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(Arc::clone(&rules));
        Ok(AnyStorage::other(Debug::new(below, rules, debug.limits)))
    }

    async fn open_disk(&self, disk: &DiskSpec, access: Access) -> Result<AnyStorage> {
        let Opening { path, options, opener, .. } = Opening::new(disk, &self.base, access);
        let opened = chain::open(&opener, &path, &options).await?.into_disk();
        let mut nested = self.nested.lock().unwrap_or_else(PoisonError::into_inner);
        nested.extend(opener.into_nested());
        nested.push(opened.clone());
        Ok(AnyStorage::other(Nested(opened)))
    }

    fn open_file(&self, file: &FileSpec, access: Access) -> Result<AnyStorage> {
        // A character device has no bytes that could be asked for by offset.
        let is_character =
            std::fs::metadata(&file.path).is_ok_and(|facts| facts.file_type().is_char_device());
        if file.kind != FileKind::Regular && is_character {
            return Ok(AnyStorage::other(Null { len: 0 }));
        }
        let access = match (access, file.common.read_only) {
            (Access::ReadOnly, _) | (_, Some(true)) => FileAccess::ReadOnly,
            (Access::ReadWrite, _) => FileAccess::ReadWrite,
        };
        let cache = cache(file.common.direct, self.base.files.cache);
        // Claimed when its format is known.
        let claim = Some(Claim::NONE);
        let locking = match file.common.locking {
            None => self.base.files.locking,
            Some(Locked::Auto) => Locking::Auto,
            Some(Locked::Off) => Locking::Off,
            Some(Locked::On) => Locking::On,
        };
        let options = FileOptions { access, cache, claim, locking, ..self.base.files };
        FileStorage::open(&file.path, &options).map(AnyStorage::File)
    }
}

/// Opens an export of a server.
pub(crate) async fn open_export(nbd: &NbdSpec, access: Access) -> Result<AnyStorage> {
    let options = nbd.options(access == Access::ReadWrite)?;
    NbdStorage::open(&nbd.uri, &options).await.map(AnyStorage::export)
}

/// Opens what an image names by a URI.
async fn open_named(path: &Path, access: Access) -> Result<AnyStorage> {
    let name = path.to_string_lossy();
    let nbd = NbdSpec::from_name(&name).map_err(|error| Error::invalid(error.text()))?;
    open_export(&nbd, access).await
}

impl Opener for SpecOpener {
    type Storage = AnyStorage;

    fn is_remote(&self, name: &[u8]) -> bool {
        std::str::from_utf8(name).is_ok_and(NbdSpec::is_name)
    }

    async fn open(&self, path: &Path, access: Access) -> Result<AnyStorage> {
        match self.specs.get(path) {
            Some((spec, part)) => {
                let storage = self.open_spec(spec, access).await?;
                match *part == Part::default() {
                    true => Ok(storage),
                    false => {
                        let sharing = self.base.chain.sharing;
                        storage.claim(sharing.image_claim(chain::Format::Raw, access))?;
                        Ok(AnyStorage::other(Window::open(storage, *part).await?))
                    }
                }
            }
            None if self.is_remote(path.as_os_str().as_encoded_bytes()) => {
                open_named(path, access).await
            }
            None => FileOpener::new(self.base.files).open(path, access).await.map(AnyStorage::File),
        }
    }

    async fn claim(&self, storage: &AnyStorage, claim: Claim) -> Result<()> {
        storage.claim(claim)
    }

    async fn identify(&self, path: &Path) -> Result<Identity> {
        match self.specs.get(path) {
            Some((spec, _)) if spec.files().is_none() => Ok(Identity::Path(path.to_owned())),
            None if self.is_remote(path.as_os_str().as_encoded_bytes()) => {
                Ok(Identity::Path(path.to_owned()))
            }
            _ => FileOpener::new(self.base.files).identify(path).await,
        }
    }
}
