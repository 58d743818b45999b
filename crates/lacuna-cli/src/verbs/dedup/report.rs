//! What was counted, for people and for programs.

use lacuna::job::{ClusterCounts, Duplicates, SizeDuplicates, SourceFacts};
use lacuna::qcow2::{Image, Worth};
use pollster::block_on;
use serde_json::{Value, json};

use super::{FileChain, Form, cluster_bytes};
use crate::error::CliResult;
use crate::nodes::AnyStorage;
use crate::output::{self, short_size};

/// A conversion is suggested where it makes the files smaller than sharing in place by this part.
const WORTH_A_CONVERSION: f64 = 0.1;

/// A report about some images.
pub(super) struct Report<'a> {
    chains: &'a [FileChain],
    names: &'a [String],
    found: &'a Duplicates,
    /// What sharing in place would save in each image that has clusters, on top of what is shared
    /// already, and at most take.
    in_place: Vec<Worth>,
}

impl<'a> Report<'a> {
    pub(super) fn new(
        chains: &'a [FileChain],
        names: &'a [String],
        found: &'a Duplicates,
    ) -> CliResult<Self> {
        let images = chains.iter().enumerate();
        let images = images.filter_map(|(index, chain)| Some((index, chain.disk().as_qcow2()?)));
        let in_place = images.map(|(index, image)| in_place(found, index, image));
        Ok(Self { chains, names, found, in_place: in_place.collect::<CliResult<_>>()? })
    }

    pub(super) fn text(&self, form: Form) -> String {
        match form {
            Form::Human => self.human(),
            Form::Json => output::pretty(&self.json()) + "\n",
        }
    }

    // ---- for people ------------------------------------------------------------------------

    fn human(&self) -> String {
        let images = self.names.iter().zip(self.chains).zip(&self.found.sources);
        let mut text: String =
            images.map(|((name, chain), facts)| image_line(name, chain, facts)).collect();
        text += &self.table();
        if self.found.sizes.iter().any(|size| size.one_in > 1) {
            text +=
                "~ estimated from a sample of the fingerprints; more --memory counts them all\n";
        }
        text += "\n";
        text += &self.advice();
        text
    }

    fn table(&self) -> String {
        let several = self.chains.len() > 1;
        let mut text = format!("\n{:<10}{:>10}{:>10}{:>10}", "cluster", "data", "zeros", "saved");
        if several {
            text += &format!("{:>10}", "across");
        }
        text += &format!("{:>11}{:>13}\n", "copy", "shared copy");
        for size in &self.found.sizes {
            let bytes = size.cluster_bytes;
            let about = if size.one_in > 1 { "~" } else { "" };
            let column = |clusters: u64| short_size(clusters * bytes);
            let estimate = |bytes: u64| format!("{about}{}", short_size(bytes));
            let own = if self.is_own_size(bytes) { "*" } else { "" };
            let name = format!("{}{own}", short_size(bytes));
            let (data, zero) = (column(size.total.data), column(size.total.zero));
            text += &format!("{name:<10}{data:>10}{zero:>10}{:>10}", estimate(size.inside_bytes()));
            if several {
                text += &format!("{:>10}", estimate(size.across_bytes()));
            }
            let (copied, shared) = (self.copied_bytes(size), self.shared_bytes(size));
            text += &format!("{:>11}{:>13}\n", short_size(copied), estimate(shared));
        }
        if self.chains.iter().any(|chain| cluster_bytes(chain).is_some()) {
            text += "* the size that clusters have now\n";
        }
        text
    }

    fn advice(&self) -> String {
        let mut text = String::new();
        let pins = short_size(self.pin_bytes());
        text += &match self.in_place_bytes() {
            None => String::new(),
            Some(0) => "Sharing clusters in place would save nothing.\n".to_owned(),
            Some(saved) => {
                let saved = short_size(saved);
                let (so, then) = match self.freed_bytes() {
                    0 => (", but", ": `dedup` shares nothing"),
                    _ => (";", ""),
                };
                format!(
                    "Sharing clusters in place would save about {saved}{so} its pins take {pins}{then}.\n"
                )
            }
        };
        if let Some((size, bytes)) = self.better_size() {
            let what = if self.chains.len() > 1 {
                "new images that take"
            } else {
                "a new image that takes"
            };
            text += &format!(
                "`convert --dedup -O qcow2 -o cluster_size={size}` makes {what} about {}.\n",
                short_size(bytes)
            );
        }
        text += "Between independent disks, duplicates are rare in clusters of 64 KiB and more\n\
                 frequent in small ones, which take larger tables.\n";
        text
    }

    // ---- for programs ----------------------------------------------------------------------

    fn json(&self) -> Value {
        let images = self.names.iter().zip(self.chains).zip(&self.found.sources);
        let images: Vec<Value> = images
            .map(|((name, chain), facts)| {
                json!({
                    "filename": name,
                    "cluster-size": cluster_bytes(chain),
                    "data": facts.data_bytes,
                    "compressed": facts.compressed_bytes,
                    "shared-already": facts.shared_bytes,
                })
            })
            .collect();
        let sizes: Vec<Value> = self.found.sizes.iter().map(|size| self.size_json(size)).collect();
        json!({
            "images": images,
            "sizes": sizes,
            "saved-in-place": self.in_place_bytes(),
            "pins-in-place": self.in_place_bytes().map(|_| self.pin_bytes()),
            "suggested-cluster-size": self.better_size().map(|(bytes, _)| bytes),
        })
    }

    fn size_json(&self, size: &SizeDuplicates) -> Value {
        let counts = |counts: &ClusterCounts| {
            json!({
                "data-clusters": counts.data,
                "zero-clusters": counts.zero,
                "distinct-clusters": counts.distinct,
                "l2-tables": counts.l2_tables,
            })
        };
        json!({
            "cluster-size": size.cluster_bytes,
            "one-in": size.one_in,
            "images": size.sources.iter().map(counts).collect::<Vec<_>>(),
            "all": counts(&size.total),
            "saved-inside": size.inside_bytes(),
            "saved-across": size.across_bytes(),
            "copied": self.copied_bytes(size),
            "copied-and-shared": self.shared_bytes(size),
        })
    }

    // ---- figures ---------------------------------------------------------------------------

    fn is_own_size(&self, bytes: u64) -> bool {
        self.chains.iter().any(|chain| cluster_bytes(chain) == Some(bytes))
    }

    /// What new images of this cluster size would take.
    fn copied_bytes(&self, size: &SizeDuplicates) -> u64 {
        size.sources.iter().map(|counts| size.file_bytes(counts, counts.data)).sum()
    }

    /// What they would take if equal clusters of each shared a place.
    fn shared_bytes(&self, size: &SizeDuplicates) -> u64 {
        size.sources.iter().map(|counts| size.file_bytes(counts, counts.distinct)).sum()
    }

    /// What sharing in place would save; nothing is known where an image has no clusters.
    fn in_place_bytes(&self) -> Option<u64> {
        let all_have = self.in_place.len() == self.chains.len();
        all_have.then(|| self.in_place.iter().map(|worth| worth.saved_bytes).sum())
    }

    /// What sharing frees where it pays: nobody does it elsewhere.
    pub(super) fn freed_bytes(&self) -> u64 {
        let paying = self.in_place.iter().filter(|worth| worth.pays());
        paying.map(|worth| worth.saved_bytes).sum()
    }

    fn pin_bytes(&self) -> u64 {
        self.in_place.iter().map(|worth| worth.pin_bytes).sum()
    }

    /// The cluster size at which new images take least, where that is worth a copy.
    fn better_size(&self) -> Option<(u64, u64)> {
        let sizes =
            self.found.sizes.iter().map(|size| (size.cluster_bytes, self.shared_bytes(size)));
        let (size, bytes) = sizes.min_by_key(|(_, bytes)| *bytes)?;
        let now = self.bytes_in_place();
        let saved = now.saturating_sub(bytes) as f64;
        (saved > now as f64 * WORTH_A_CONVERSION).then_some((size, bytes))
    }

    /// What the data takes now, less what sharing in place would save.
    fn bytes_in_place(&self) -> u64 {
        let stored = |facts: &SourceFacts| facts.data_bytes - facts.shared_bytes;
        let stored: u64 = self.found.sources.iter().map(stored).sum();
        stored.saturating_sub(self.in_place_bytes().unwrap_or(0))
    }
}

fn in_place(found: &Duplicates, index: usize, image: &Image<AnyStorage>) -> CliResult<Worth> {
    let own = image.geometry().cluster_bytes();
    let size = found.sizes.iter().find(|size| size.cluster_bytes == own);
    let counts = size.and_then(|size| size.sources.get(index)).copied().unwrap_or_default();
    let shared = found.sources.get(index).map_or(0, |facts| facts.shared_bytes);
    let saved_bytes = (counts.duplicates() * own).saturating_sub(shared);
    // Each place that is shared anew has a pin, and saves a cluster at least.
    let pins = counts.distinct.min(saved_bytes / own);
    Ok(Worth { saved_bytes, pin_bytes: block_on(image.pin_bytes_for(pins))? })
}

fn image_line(name: &str, chain: &FileChain, facts: &SourceFacts) -> String {
    let mut text = format!("{}: {} of data", output::tame(name), short_size(facts.data_bytes));
    if let Some(bytes) = cluster_bytes(chain) {
        text += &format!(" in clusters of {}", short_size(bytes));
    }
    if facts.compressed_bytes > 0 {
        text += &format!(", {} of it compressed", short_size(facts.compressed_bytes));
    }
    if facts.shared_bytes > 0 {
        text += &format!(", {} of it shared already", short_size(facts.shared_bytes));
    }
    text + "\n"
}
