//! What a run saved, or would save.

use std::os::unix::fs::MetadataExt as _;

use lacuna::qcow2::CompactExtents;
use serde_json::{Value, json};

use super::guest::Guest;
use crate::output::{short_size, tame};
use crate::verbs::dedup::HAZARD;
use crate::verbs::open::Request;

/// The step that frees what nothing refers to.
pub(super) const LEAKS: &str = "leaks";

/// What a step did, or would do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Step {
    pub(super) name: &'static str,
    /// Bytes of the image file that nothing uses any more.
    pub(super) freed_bytes: u64,
    /// By how much the file got shorter.
    pub(super) shortened_bytes: u64,
    /// Clusters that share a place now.
    pub(super) shared_clusters: u64,
    /// Guest bytes that were stored and are zeros by the map.
    pub(super) zeroed_bytes: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) seconds: f64,
}

impl Step {
    pub(super) const fn nothing(name: &'static str) -> Self {
        Self {
            name,
            freed_bytes: 0,
            shortened_bytes: 0,
            shared_clusters: 0,
            zeroed_bytes: 0,
            read_bytes: 0,
            written_bytes: 0,
            seconds: 0.0,
        }
    }

    fn json(&self) -> Value {
        json!({
            "step": self.name,
            "freed-bytes": self.freed_bytes,
            "shortened-bytes": self.shortened_bytes,
            "zeroed-bytes": self.zeroed_bytes,
            "shared-clusters": self.shared_clusters,
            "read-bytes": self.read_bytes,
            "written-bytes": self.written_bytes,
            "seconds": (self.seconds * 1000.0).round() / 1000.0,
        })
    }
}

/// How large an image file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Size {
    file_bytes: u64,
    /// What the host allocated for it.
    host_bytes: u64,
}

impl Size {
    /// Asks the host; zeros for what is no file of it.
    fn of(request: &Request) -> Self {
        let found = std::fs::metadata(request.image.path());
        found.map_or_else(
            |_| Self::default(),
            |found| Self { file_bytes: found.len(), host_bytes: found.blocks() * 512 },
        )
    }

    fn json(self) -> Value {
        json!({ "file-bytes": self.file_bytes, "host-bytes": self.host_bytes })
    }
}

/// All that a run has to tell.
pub(super) struct Report {
    name: String,
    is_dry: bool,
    before: Size,
    after: Size,
    pub(super) steps: Vec<Step>,
    pub(super) guests: Vec<Guest>,
    /// In how many runs the data lies, where it was to be put in order.
    pub(super) extents: Option<CompactExtents>,
}

impl Report {
    /// Begins one, before anything changes.
    pub(super) fn begin(request: &Request, is_dry: bool) -> Self {
        let before = Size::of(request);
        let name = request.image.shown.clone();
        let (steps, guests) = (Vec::new(), Vec::new());
        Self { name, is_dry, before, after: before, steps, guests, extents: None }
    }

    /// Looks at what the file has become. A dry run estimates the length from what the steps would
    /// free.
    pub(super) fn end(&mut self, request: &Request) {
        self.after = match self.is_dry {
            true => self.estimate(),
            false => Size::of(request),
        };
    }

    fn estimate(&self) -> Size {
        let less = |bytes: u64, saved: u64| bytes.saturating_sub(saved);
        Size {
            file_bytes: less(self.before.file_bytes, self.sum(|step| step.shortened_bytes)),
            host_bytes: less(self.before.host_bytes, self.freed_bytes()),
        }
    }

    /// Returns what the steps so far have freed, or would, of what was in use before.
    pub(super) fn freed_use_bytes(&self) -> u64 {
        self.sum(|step| if step.name == LEAKS { 0 } else { step.freed_bytes })
    }

    /// Returns what the steps so far have freed, or would.
    fn freed_bytes(&self) -> u64 {
        self.sum(|step| step.freed_bytes)
    }

    /// Returns how long moving bytes takes by what the steps so far have measured.
    pub(super) fn seconds_for(&self, bytes: u64) -> f64 {
        let read = self.sum(|step| step.read_bytes);
        let measured = self.steps.iter().filter(|step| step.read_bytes > 0);
        let seconds: f64 = measured.map(|step| step.seconds).sum();
        if read == 0 { 0.0 } else { bytes as f64 * seconds / read as f64 }
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "filename": self.name,
            "dry-run": self.is_dry,
            "before": self.before.json(),
            "after": self.after.json(),
            "steps": self.steps.iter().map(Step::json).collect::<Vec<_>>(),
            "read-bytes": self.sum(|step| step.read_bytes),
            "written-bytes": self.sum(|step| step.written_bytes),
            "seconds": self.steps.iter().map(|step| step.seconds).sum::<f64>(),
            "extents": self.extents.map(|it| json!({ "before": it.before, "after": it.after })),
            "guest": self.guests.iter().map(Guest::json).collect::<Vec<_>>(),
        })
    }

    fn sum(&self, figure: impl Fn(&Step) -> u64) -> u64 {
        self.steps.iter().map(figure).sum()
    }

    /// Returns the report for people.
    pub(super) fn text(&self) -> String {
        let after = if self.is_dry { "would be" } else { "is" };
        let mut text = row("step", ["frees", "shortens", "reads", "writes"].map(str::to_owned));
        text += "   seconds\n";
        for step in &self.steps {
            let Step { freed_bytes, shortened_bytes, read_bytes, written_bytes, .. } = *step;
            let sizes = [freed_bytes, shortened_bytes, read_bytes, written_bytes];
            text += &row(step.name, sizes.map(short_size));
            text += &format!("{:>10.1}\n", step.seconds);
        }
        let sizes = |size: Size| {
            format!("{} ({} on the host)", short_size(size.file_bytes), short_size(size.host_bytes))
        };
        let (name, before, now) = (tame(&self.name), sizes(self.before), sizes(self.after));
        text += &format!("{name} was {before}, {after} {now}\n");
        if let Some(extents) = self.extents {
            let (before, now) = (extents.before, extents.after);
            text += &format!("Extents of data in the file: {before}, {after} {now}\n");
        }
        if self.sum(|step| step.shared_clusters) > 0 {
            text += HAZARD;
        }
        for advice in self.guests.iter().filter_map(Guest::advice) {
            text += &format!("note: {advice}\n");
        }
        text
    }
}

fn row(name: &str, columns: [String; 4]) -> String {
    let [first, second, third, fourth] = columns;
    format!("{name:<8}{first:>12}{second:>12}{third:>12}{fourth:>12}")
}
