//! What the meta contexts of an export tell.

use std::collections::{BTreeMap, BTreeSet};

use lacuna_nbd::ContextId;
use lacuna_nbd::context::{self, Context};

use crate::{ExportOptions, ServedDisk};

/// Which bitmap `x-lacuna:layers` means, level by level. Without any, nothing is dirty there.
///
/// ```
/// use lacuna_export::LayerBitmaps;
/// let mut chosen = LayerBitmaps { everywhere: Some("monday".into()), ..Default::default() };
/// chosen.at.insert(1, "sunday".into());
/// assert_eq!((chosen.of(0), chosen.of(1)), (Some("monday"), Some("sunday")));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerBitmaps {
    /// The bitmap of each level that has one of this name.
    pub everywhere: Option<String>,
    /// The bitmaps of single levels (0 is the top), which go before.
    pub at: BTreeMap<usize, String>,
}

impl LayerBitmaps {
    /// Chooses the bitmap of one name on all levels.
    fn named(name: &str) -> Self {
        Self { everywhere: Some(name.to_owned()), at: BTreeMap::new() }
    }

    /// Returns the bitmap that is meant on a level.
    #[must_use]
    pub fn of(&self, level: usize) -> Option<&str> {
        self.at.get(&level).or(self.everywhere.as_ref()).map(String::as_str)
    }
}

/// What a meta context of an export tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fact {
    Allocation,
    Depth,
    Dirty(String),
    Layers(Layers),
}

/// What one of the contexts about layers tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layers {
    /// The bitmap that the name of the context has in it.
    named: Option<String>,
    /// The bitmap of each level, where it has one.
    pub(crate) bitmaps: Vec<Option<String>>,
}

impl Layers {
    fn new(named: Option<String>, chosen: &LayerBitmaps, levels: &[Vec<String>]) -> Self {
        let of_level = |(level, names): (usize, &Vec<String>)| {
            let chosen = chosen.of(level)?;
            names.iter().find(|name| *name == chosen).cloned()
        };
        Self { named, bitmaps: levels.iter().enumerate().map(of_level).collect() }
    }
}

/// Returns the contexts of an export with ids that never change.
pub(crate) fn facts<D: ServedDisk>(disk: &D, options: &ExportOptions) -> Vec<(Context, Fact)> {
    let mut facts = vec![Fact::Allocation];
    facts.extend(options.allocation_depth.then_some(Fact::Depth));
    let bitmaps = options.bitmaps.clone().unwrap_or_else(|| disk.bitmaps());
    facts.extend(bitmaps.into_iter().map(Fact::Dirty));
    if let Some(chosen) = &options.layers {
        facts.extend(layers(disk, chosen).into_iter().map(Fact::Layers));
    }
    let numbered = (0..).map(ContextId).zip(facts);
    numbered.map(|(id, fact)| (Context::new(fact.context_name(), id), fact)).collect()
}

/// Returns what was chosen first, then each bitmap that there is.
fn layers<D: ServedDisk>(disk: &D, chosen: &LayerBitmaps) -> Vec<Layers> {
    let levels: Vec<Vec<String>> =
        (0..disk.level_sizes().len()).map(|level| disk.level_bitmaps(level)).collect();
    let names: BTreeSet<&String> = levels.iter().flatten().collect();
    let named =
        |name: &String| Layers::new(Some(name.clone()), &LayerBitmaps::named(name), &levels);
    std::iter::once(Layers::new(None, chosen, &levels))
        .chain(names.into_iter().map(named))
        .collect()
}

impl Fact {
    fn context_name(&self) -> String {
        match self {
            Self::Allocation => context::BASE_ALLOCATION.to_owned(),
            Self::Depth => context::QEMU_ALLOCATION_DEPTH.to_owned(),
            Self::Dirty(name) => format!("{}{name}", context::QEMU_DIRTY_BITMAP),
            Self::Layers(Layers { named: None, .. }) => context::LAYERS.to_owned(),
            Self::Layers(Layers { named: Some(name), .. }) => {
                format!("{}{name}", context::LAYERS_OF_BITMAP)
            }
        }
    }
}
