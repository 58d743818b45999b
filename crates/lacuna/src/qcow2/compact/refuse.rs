//! What is not compacted, and why.

use super::{CompactOptions, KeptMapping};
use crate::qcow2::check::Survey;
use crate::qcow2::format::Header;
use crate::{Error, Result};

/// Refuses what cannot be compacted by what its header says.
pub(in crate::qcow2) fn refuse_header(header: &Header, options: &CompactOptions) -> Result<()> {
    if header.has_external_data_file() {
        return Err(Error::unsupported(
            "The image has an external data file: where data lies in it is the guest's business",
        ));
    }
    if header.encryption().is_some() {
        return Err(Error::unsupported(
            "The image is encrypted, and its data can be read only where it lies",
        ));
    }
    if let Some(magic) = header.extensions.stranger() {
        return Err(Error::unsupported(format!(
            "The image has a header extension {magic:#010x} that is not known here and might name a \
             place in the file"
        )));
    }
    if header.unknown_fields.iter().any(|byte| *byte != 0) {
        return Err(Error::unsupported(
            "The image has header fields that are not known here and might name a place in the file",
        ));
    }
    if header.keeps_mapping() && options.kept_mapping == KeptMapping::Refuse {
        return Err(Error::invalid(
            "The image is to keep the places of clusters (keep_mapping); ask for them to move",
        ));
    }
    Ok(())
}

/// What is thought of clusters that nothing refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaks {
    /// They count as free.
    Ignored,
    /// They are to be repaired first.
    Refused,
}

/// Refuses what a check does not find clean.
pub(super) fn refuse_findings(survey: &Survey, leaks: Leaks) -> Result<()> {
    let report = &survey.report;
    let is_sound = report.check_errors == 0 && report.corruptions == 0;
    if is_sound && survey.is_complete && (report.leaks == 0 || leaks == Leaks::Ignored) {
        return Ok(());
    }
    let first =
        report.findings.first().map(|it| format!("; first: {}", it.kind)).unwrap_or_default();
    Err(Error::corrupt(format!(
        "The image has {} corruptions, {} leaks and {} errors of a check{first}; repair it first",
        report.corruptions, report.leaks, report.check_errors
    )))
}
