//! All exports of a server.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use lacuna::{Error, Result};
use lacuna_nbd::ExportName;
use lacuna_nbd::server::ListedExport;
use parking_lot::RwLock;

use crate::{Export, ServedDisk};

/// Exports by name; they may come and go while clients are served.
///
/// ```
/// use std::sync::Arc;
/// use lacuna::{raw::Raw, storage::MemoryStorage};
/// use lacuna_export::{Export, ExportOptions, Exports, Plain};
/// let disk = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20))?;
/// let exports = Exports::default();
/// let export = Export::new("root", Plain(disk), ExportOptions::default()).unwrap();
/// assert!(exports.add(export).is_ok());
/// assert_eq!(exports.all().len(), 1);
/// # Ok::<_, lacuna::Error>(())
/// ```
#[derive(Debug)]
pub struct Exports<D> {
    by_name: RwLock<BTreeMap<String, Arc<Export<D>>>>,
    /// The only export answers to the empty name as well.
    only_is_default: bool,
}

impl<D> Default for Exports<D> {
    fn default() -> Self {
        Self { by_name: RwLock::default(), only_is_default: false }
    }
}

impl<D: ServedDisk> Exports<D> {
    /// Makes an empty set in which an export that is alone is the default one too.
    #[must_use]
    pub fn with_only_as_default() -> Self {
        Self { only_is_default: true, ..Self::default() }
    }

    /// Adds an export.
    ///
    /// # Errors
    /// `InvalidRequest` where there is one of that name.
    pub fn add(&self, export: Export<D>) -> Result<Arc<Export<D>>> {
        match self.by_name.write().entry(export.name().as_str().to_owned()) {
            Entry::Occupied(_) => {
                Err(Error::invalid(format!("There is an export {} already", export.name())))
            }
            Entry::Vacant(place) => Ok(Arc::clone(place.insert(Arc::new(export)))),
        }
    }

    /// Removes an export: no client gets it any more, those that have it keep it.
    pub fn remove(&self, name: &str) -> Option<Arc<Export<D>>> {
        self.by_name.write().remove(name)
    }

    /// Returns all exports in order of their names.
    pub fn all(&self) -> Vec<Arc<Export<D>>> {
        self.by_name.read().values().map(Arc::clone).collect()
    }

    /// Returns the export that a client means.
    pub fn find(&self, name: &ExportName) -> Option<Arc<Export<D>>> {
        let by_name = self.by_name.read();
        let mut alone = by_name.values().filter(|export| !export.options().is_companion);
        let only = match (alone.next(), alone.next()) {
            (Some(only), None) if self.only_is_default && name.as_str().is_empty() => Some(only),
            _ => None,
        };
        by_name.get(name.as_str()).or(only).map(Arc::clone)
    }

    pub(crate) fn list(&self) -> Vec<ListedExport> {
        let line = |export: &Arc<Export<D>>| ListedExport {
            name: export.name().clone(),
            description: export.options().description.clone().unwrap_or_default(),
        };
        self.by_name.read().values().map(line).collect()
    }
}
