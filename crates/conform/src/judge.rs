//! What must hold of the files once the driver has gone.

use std::path::Path;
use std::process::{Command, Stdio};

use lacuna::qcow2::check::{Finding, FindingClass, Harm};

use crate::case::{Case, Expect, Fact};
use crate::folder::{Folder, Which};
use crate::image::SparseBytes;
use crate::layout::DATA_FILE;
use crate::model::Model;
use crate::read_back::{Header, ReadBack, checked};

/// The dirty bit among the incompatible ones.
const DIRTY: u64 = 1;
/// The bit that says that bitmaps are up to date, among the autoclear ones.
const BITMAPS: u64 = 1;
/// The bit that says that the data file is a raw image, among the autoclear ones.
const RAW_DATA: u64 = 2;

/// Names what is wrong with what a driver left.
pub(crate) fn judge(
    case: &Case,
    folder: &Folder,
    model: &Model,
    qemu_check: Option<&Path>,
) -> std::io::Result<Vec<String>> {
    let mut judge =
        Judge { case, folder, model, header: Header::read(&folder.image())?, faults: Vec::new() };
    judge.unchanged()?;
    for fact in &case.facts {
        judge.fact(fact)?;
    }
    match &case.expect {
        Expect::Refuses => {}
        Expect::Works => {
            judge.content();
            judge.sound();
            if let Some(program) = qemu_check {
                judge.checked_by(program)?;
            }
        }
        Expect::Survives(clusters) => judge.survived(clusters),
    }
    Ok(judge.faults)
}

struct Judge<'a> {
    case: &'a Case,
    folder: &'a Folder,
    model: &'a Model,
    header: Header,
    faults: Vec<String>,
}

impl Judge<'_> {
    fn fault(&mut self, text: impl Into<String>) {
        self.faults.push(text.into());
    }

    fn unchanged(&mut self) -> std::io::Result<()> {
        let all = self.case.expect == Expect::Refuses || self.case.facts.contains(&Fact::Unchanged);
        let which = if all { Which::All } else { Which::Beside };
        for name in self.folder.changed(which)? {
            self.fault(format!("the file {name} was changed"));
        }
        Ok(())
    }

    fn fact(&mut self, fact: &Fact) -> std::io::Result<()> {
        match fact {
            Fact::AutoclearGone(bits) if self.header.autoclear() & bits != 0 => {
                let left = self.header.autoclear() & bits;
                self.fault(format!("autoclear bits {left:#x} are still set"));
            }
            Fact::CompatibleKept(bits) if self.header.compatible() & bits != *bits => {
                let lost = bits & !self.header.compatible();
                self.fault(format!("compatible bits {lost:#x} are gone"));
            }
            Fact::ExtensionKept(magic, bytes)
                if self.header.extension(*magic) != Some(&bytes[..]) =>
            {
                self.fault(format!("header extension {magic:#x} is gone or changed"));
            }
            Fact::BitmapTrue { at } if self.header.autoclear() & BITMAPS != 0 => self.bitmap(*at),
            Fact::RawDataFile if self.header.autoclear() & RAW_DATA != 0 => {
                let bytes = std::fs::read(self.folder.path().join(DATA_FILE))?;
                let mut padded = SparseBytes::from(&bytes[..]);
                padded.set_len(self.model.size());
                if let Some(difference) = self.model.difference(0, &padded.to_vec()) {
                    self.fault(format!("the raw data file: {difference}"));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn bitmap(&mut self, at: u64) {
        let missed = ReadBack::open(&self.folder.image()).and_then(|image| image.bitmap_misses(at));
        match missed {
            Ok(false) => {}
            Ok(true) => self.fault("the bitmap is said to be up to date, and misses a write"),
            Err(error) => self.fault(format!("the bitmap cannot be read: {error}")),
        }
    }

    /// Disk and snapshots, as lacuna reads them.
    fn content(&mut self) {
        let image = match ReadBack::open(&self.folder.image()) {
            Ok(image) => image,
            Err(error) => return self.fault(format!("lacuna cannot open it afterwards: {error}")),
        };
        match image.compare(self.model) {
            Ok(None) => {}
            Ok(Some(difference)) => self.fault(format!("the disk afterwards: {difference}")),
            Err(error) => self.fault(format!("the disk afterwards: {error}")),
        }
        for (name, content) in &self.case.layout.snapshots {
            match image.compare_snapshot(name, &Model::new(content)) {
                Ok(None) => {}
                Ok(Some(difference)) => self.fault(format!("snapshot '{name}': {difference}")),
                Err(error) => self.fault(format!("snapshot '{name}': {error}")),
            }
        }
    }

    /// Refcounts, flags and tables.
    fn sound(&mut self) {
        if self.header.incompatible() & DIRTY != 0 {
            // Refcounts may be anything: whoever opens it next counts anew.
            let was_ended = self.case.facts.contains(&Fact::MayLeak);
            let is_asked = self.case.facts.contains(&Fact::DirtySettled);
            let is_unchanged = self.case.facts.contains(&Fact::Unchanged);
            if !was_ended && !is_asked && !is_unchanged {
                self.fault("the dirty bit was left set");
            }
            return;
        }
        let report = match checked(&self.folder.image()) {
            Ok(report) => report,
            Err(error) => return self.fault(format!("check: {error}")),
        };
        let may_miss = self.case.facts.contains(&Fact::CopiedMayMiss);
        let is_fault = |it: &&Finding| {
            it.class() != FindingClass::Leak && !(may_miss && it.harm() == Harm::Harmless)
        };
        let wrong: Vec<&Finding> = report.findings.iter().filter(is_fault).collect();
        if let Some(first) = wrong.first() {
            self.fault(format!("check: {} findings, {}", wrong.len(), first.kind));
        }
        if report.leaks > 0 && !self.case.facts.contains(&Fact::MayLeak) {
            self.fault(format!("check: {} clusters are leaked", report.leaks));
        }
    }

    fn checked_by(&mut self, program: &Path) -> std::io::Result<()> {
        let output = Command::new(program)
            .args(["check", "-q", "-f", "qcow2"])
            .arg(self.folder.image())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .output()?;
        let may_leak = self.case.facts.contains(&Fact::MayLeak);
        let is_dirty = self.header.incompatible() & DIRTY != 0;
        match output.status.code() {
            Some(0) => {}
            Some(3) if may_leak => {}
            Some(2 | 3) if is_dirty => {}
            Some(2) if self.case.facts.contains(&Fact::CopiedMayMiss) => {}
            code => {
                let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
                self.fault(format!("qemu-img check ends with {code:?}: {text}"));
            }
        }
        Ok(())
    }

    /// What was not damaged can be read as before.
    fn survived(&mut self, clusters: &[u64]) {
        if clusters.is_empty() {
            return;
        }
        let image = match ReadBack::open(&self.folder.image()) {
            Ok(image) => image,
            Err(error) => return self.fault(format!("cannot be opened any more: {error}")),
        };
        let bytes = self.case.layout.cluster_bytes();
        for cluster in clusters {
            match image.compare_part(self.model, cluster * bytes, bytes) {
                Ok(None) => {}
                Ok(Some(difference)) => self.fault(format!("cluster {cluster}: {difference}")),
                Err(error) => self.fault(format!("cluster {cluster}: {error}")),
            }
        }
    }
}
