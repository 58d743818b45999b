//! Looks at what a power loss left: it is sound, reads as it may, and can be used.

use std::cell::OnceCell;
use std::sync::Arc;

use lacuna::block::{DynLayer, Layer, WriteFlags, is_zero};
use lacuna::buffer::Buffer;
use lacuna::qcow2::check::{CheckOptions, Repair, check};
use lacuna::qcow2::format::{Header, IncompatibleFeatures, StoredName};
use lacuna::qcow2::{Access, Image, OpenOptions, Parts, Shrink, SnapshotChoice};
use lacuna::units::{GuestOffset, GuestRange};
use pollster::block_on;
use testkit::SparseBytes;
use testkit::sim::{Pace, SimHost, SimStorage};

use crate::stage::Stage;
use crate::truth::{Allowed, Claim, Kept, Life, Marked};

/// One in so many states is opened once more after it was written to.
const AGAIN: u64 = 8;

/// The files that a power loss left.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    header: OnceCell<Header>,
    pub(crate) image: SparseBytes,
    pub(crate) data: Option<SparseBytes>,
    pub(crate) base: Option<SparseBytes>,
}

impl Left {
    pub(crate) fn of(stage: &Stage, mut files: Vec<SparseBytes>) -> Self {
        let base = if stage.has_base { files.pop() } else { None };
        let data = if stage.case.data.is_some() { files.pop() } else { None };
        Self::new(files.pop().expect("the image is the first file"), data, base)
    }

    const fn new(image: SparseBytes, data: Option<SparseBytes>, base: Option<SparseBytes>) -> Self {
        Self { header: OnceCell::new(), image, data, base }
    }

    pub(crate) fn header(&self) -> Result<&Header, String> {
        if let Some(header) = self.header.get() {
            return Ok(header);
        }
        let first = self.image.read_vec(0, self.image.len().min(4096) as usize);
        let header = Header::decode(&first).map_err(|error| format!("The header: {error}"))?;
        Ok(self.header.get_or_init(|| header))
    }

    /// Says whether refcounts are not to be believed before a repair.
    pub(crate) fn is_dirty(&self) -> Result<bool, String> {
        let features = self.header()?.features.incompatible;
        Ok(features.contains(IncompatibleFeatures::DIRTY))
    }

    /// Returns what the image names as what it stands on.
    fn below(&self, stage: &Stage) -> Result<Option<Arc<dyn DynLayer>>, String> {
        let Some(name) = &self.header()?.backing_name else { return Ok(None) };
        let name = name.to_string();
        if let Some(base) = &self.base {
            let file = host().add_file(base.clone());
            let options = OpenOptions::new(Access::ReadOnly);
            let image = block_on(Image::open(Parts::alone(file), options));
            let image = image.map_err(|error| format!("Opening the base: {error}"))?;
            return Ok(Some(Arc::new(image)));
        }
        let beside = stage.beside.iter().find(|beside| beside.name == name);
        match beside {
            Some(beside) => Ok(Some(Arc::clone(&beside.layer))),
            None => Err(format!("It stands on {name:?}, which there is not")),
        }
    }

    fn open(
        &self,
        stage: &Stage,
        host: &SimHost,
        options: OpenOptions,
    ) -> Result<Image<SimStorage>, String> {
        let storage = host.add_file(self.image.clone());
        let data = self.data.as_ref().map(|data| host.add_file(data.clone()));
        let parts = Parts { storage, data, backing: self.below(stage)? };
        block_on(Image::open(parts, options)).map_err(|error| format!("Opening: {error}"))
    }

    /// What there is on a host that it was opened on.
    fn again(&self, host: &SimHost) -> Self {
        let data = self.data.as_ref().map(|_| host.content(1));
        Self::new(host.content(0), data, self.base.clone())
    }
}

fn host() -> SimHost {
    SimHost::without_record(Pace::AtOnce, 1)
}

/// Opens what was left as somebody would who knows of no power loss, and goes on with it.
///
/// # Errors
/// What must not be.
pub(crate) fn judge(
    stage: &Stage,
    allowed: &Allowed<'_>,
    left: &Left,
    number: u64,
) -> Result<(), String> {
    if allowed.moment < stage.made && left.header().is_err() {
        return Ok(());
    }
    if allowed.moment < stage.sound_from {
        let (image, moment) = (repaired(&left.image)?, stage.sound_from);
        let left = Left::new(image, left.data.clone(), left.base.clone());
        return judge(stage, &allowed.as_if_at(moment), &left, number);
    }
    if !left.is_dirty()? {
        sound(&left.image).map_err(|error| format!("As it was left: {error}"))?;
    }
    if let Some(base) = &left.base {
        sound(base).map_err(|error| format!("The base as it was left: {error}"))?;
    }
    let host = host();
    let image = left.open(stage, &host, options_for(stage, left)?)?;
    let seen = look(&image, allowed)?;
    let wanted = go_on(&image, stage, seen, number)?;
    block_on(image.close()).map_err(|error| format!("Closing: {error}"))?;
    let after = left.again(&host);
    if after.is_dirty()? {
        return Err("It is dirty after a close".into());
    }
    sound(&after.image).map_err(|error| format!("After a close: {error}"))?;
    match number.is_multiple_of(AGAIN) {
        true => opened_again(stage, &after, &wanted),
        false => Ok(()),
    }
}

/// Looks at an image alone, which may be large.
pub(crate) fn sound_unless_dirty(image: &SparseBytes) -> Result<(), String> {
    let left = Left::new(image.clone(), None, None);
    if left.is_dirty()? { Ok(()) } else { sound(image) }
}

/// As the run had it, but for what another version of the format cannot do.
fn options_for(stage: &Stage, left: &Left) -> Result<OpenOptions, String> {
    let version = left.header()?.geometry.version();
    Ok(match version as u32 == stage.kind().version {
        true => stage.options.clone(),
        false => OpenOptions::new(Access::ReadWrite),
    })
}

/// What the repair of a state leaves.
fn repaired(file: &SparseBytes) -> Result<SparseBytes, String> {
    let host = host();
    let options = CheckOptions { repair: Repair::All };
    let done = block_on(check(&host.add_file(file.clone()), &options, &mut |_| {}));
    done.map_err(|error| format!("Repairing once more: {error}"))?;
    Ok(host.content(0))
}

/// Leaks at worst.
fn sound(file: &SparseBytes) -> Result<(), String> {
    let storage = host().add_file(file.clone());
    let report = block_on(check(&storage, &CheckOptions::default(), &mut |_| {}));
    let report = report.map_err(|error| format!("Checking: {error}"))?;
    match report.corruptions + report.check_errors {
        0 => Ok(()),
        _ => Err(format!("The check finds {report:x?}")),
    }
}

/// Compares all that can be read with what may be; returns what the disk reads as.
fn look(image: &Image<SimStorage>, allowed: &Allowed<'_>) -> Result<Buffer, String> {
    let seen = whole(image)?;
    allowed.disk.judge(&seen)?;
    assert_zeros(image, &seen)?;
    look_at_machine(image, allowed)?;
    look_at_snapshots(image, allowed)?;
    look_at_bitmaps(image, allowed, &seen)?;
    Ok(seen)
}

fn whole(layer: &impl Layer) -> Result<Buffer, String> {
    let buffer = Buffer::new(layer.size_bytes() as usize);
    let (result, bytes) = block_on(layer.read(GuestOffset(0), buffer));
    result.map(|()| bytes).map_err(|error| format!("Reading: {error}"))
}

/// What is said to be zeros is.
fn assert_zeros(image: &Image<SimStorage>, seen: &[u8]) -> Result<(), String> {
    let mut rest = GuestRange::new(GuestOffset(0), seen.len() as u64);
    while !rest.is_empty() {
        let extents = block_on(image.extents(rest));
        let extents = extents.map_err(|error| format!("Extents: {error}"))?;
        for extent in &extents {
            let bytes = &seen[extent.range.start.0 as usize..extent.range.end().0 as usize];
            if extent.status.reads_zero && !is_zero(bytes) {
                return Err(format!("Said to be zeros, and is not: {extent:x?}"));
            }
        }
        let end = extents.last().ok_or("There is no extent")?.range.end();
        rest = GuestRange::new(end, rest.end() - end);
    }
    Ok(())
}

/// The state of a virtual machine, in images that may have one.
fn look_at_machine(image: &Image<SimStorage>, allowed: &Allowed<'_>) -> Result<(), String> {
    if allowed.machine.len() == 0 {
        return Ok(());
    }
    let (result, bytes) = block_on(image.read_vm_state(0, Buffer::new(allowed.machine.len())));
    result.map_err(|error| format!("The state of the machine: {error}"))?;
    allowed.machine.judge(&bytes).map_err(|error| format!("The state of the machine: {error}"))
}

fn look_at_snapshots(image: &Image<SimStorage>, allowed: &Allowed<'_>) -> Result<(), String> {
    let fail = |error: lacuna::Error| format!("Snapshots: {error}");
    let there = block_on(image.snapshots()).map_err(fail)?;
    let mut found = 0;
    for (kept, must_be) in allowed.snapshots() {
        let is_there = there.iter().any(|snapshot| snapshot.name.to_string() == kept.name);
        match (is_there, must_be) {
            (false, true) => return Err(format!("Snapshot {} is gone", kept.name)),
            (false, false) => continue,
            (true, _) => found += 1,
        }
        let choice = SnapshotChoice::Name(kept.name.as_str().into());
        let layer = block_on(image.snapshot(&choice)).map_err(fail)?;
        if whole(&layer)?[..] != kept.disk[..] {
            return Err(format!("Snapshot {} reads otherwise", kept.name));
        }
    }
    let own = there.iter().filter(|snapshot| !snapshot.is_pin()).count();
    match own == found {
        true => Ok(()),
        false => Err(format!("There are {own} snapshots, and {found} may be there")),
    }
}

fn look_at_bitmaps(
    image: &Image<SimStorage>,
    allowed: &Allowed<'_>,
    seen: &[u8],
) -> Result<(), String> {
    let fail = |error: lacuna::Error| format!("Bitmaps: {error}");
    let there = block_on(image.bitmaps()).map_err(fail)?;
    let mut found = 0;
    for (marked, must_be) in allowed.bitmaps() {
        let facts = there.iter().find(|facts| facts.name.to_string() == marked.name);
        let Some(facts) = facts else {
            match must_be {
                true => return Err(format!("Bitmap {} is gone", marked.name)),
                false => continue,
            }
        };
        found += 1;
        allowed.judge_bitmap(marked, &named(image, &facts.name)?, seen)?;
    }
    match there.len() == found {
        true => Ok(()),
        false => Err(format!("There are {} bitmaps, and {found} may be there", there.len())),
    }
}

/// Returns the ranges that a bitmap names.
fn named(image: &Image<SimStorage>, name: &StoredName) -> Result<Vec<GuestRange>, String> {
    let named = block_on(async {
        let mut ranges = image.bitmap(name).await?.ranges();
        let mut named = Vec::new();
        while let Some(range) = ranges.next().await? {
            named.push(range);
        }
        Ok(named)
    });
    named.map_err(|error: lacuna::Error| format!("Bitmaps: {error}"))
}

/// What a loss left, for those who go on from there.
pub(crate) struct Found {
    pub(crate) disk: SparseBytes,
    pub(crate) snapshots: Vec<Kept>,
    pub(crate) bitmaps: Vec<Marked>,
}

/// Looks at a state for what it is, which must be what it may.
///
/// # Errors
/// What must not be.
pub(crate) fn find(stage: &Stage, moment: usize, files: &[SparseBytes]) -> Result<Found, String> {
    let (allowed, left) = (stage.truth.at(moment), Left::of(stage, files.to_vec()));
    let host = host();
    let image = left.open(stage, &host, options_for(stage, &left)?)?;
    let seen = look(&image, &allowed)?;
    let fail = |error: lacuna::Error| format!("Finding: {error}");
    let there = block_on(image.snapshots()).map_err(fail)?;
    let there: Vec<String> = there.iter().map(|snapshot| snapshot.name.to_string()).collect();
    let alive = |kept: &Kept| Kept { life: Life::since(0), ..kept.clone() };
    let snapshots = allowed.snapshots().filter(|(kept, _)| there.contains(&kept.name));
    let snapshots = snapshots.map(|(kept, _)| alive(kept)).collect();
    let there = block_on(image.bitmaps()).map_err(fail)?;
    let mut bitmaps = Vec::new();
    for (marked, _) in allowed.bitmaps() {
        if let Some(facts) = there.iter().find(|facts| facts.name.to_string() == marked.name) {
            let ranges = named(&image, &facts.name)?;
            let found = allowed.judge_bitmap(marked, &ranges, &seen)?;
            let mut claim = Claim { from: 0, until: None, changes: found.changes.clone() };
            if !facts.is_enabled {
                // Several claims may hold: one that it was to stop is as true as one that it had not yet.
                claim.end(&Arc::new(seen.to_vec()));
            }
            let claims = vec![claim];
            let (name, life) = (marked.name.clone(), Life::since(0));
            bitmaps.push(Marked { name, life, claims });
        }
    }
    Ok(Found { disk: SparseBytes::from(&seen[..]), snapshots, bitmaps })
}

/// Writes to the image, or makes it larger; returns what is to be read then.
fn go_on(
    image: &Image<SimStorage>,
    stage: &Stage,
    mut seen: Buffer,
    number: u64,
) -> Result<Buffer, String> {
    let cluster = stage.cluster();
    if stage.regrows {
        let old = seen.len();
        let size_bytes = (old as u64).next_multiple_of(512) + 40 * cluster;
        let grown = block_on(image.resize(size_bytes, Shrink::Refuse));
        grown.map_err(|error| format!("Growing: {error}"))?;
        let before = std::mem::replace(&mut seen, whole(image)?);
        if seen[..old] != before[..] || !is_zero(&seen[old..]) {
            return Err("Growing brought back what had been cut off".into());
        }
    }
    let len = (cluster + 77).min(seen.len() as u64);
    let start = number.wrapping_mul(0x9e37_79b9) % (seen.len() as u64 - len + 1);
    let bytes = vec![number as u8; len as usize];
    let written =
        block_on(image.write(GuestOffset(start), Buffer::from(&bytes[..]), WriteFlags::empty()));
    written.0.map_err(|error| format!("Writing: {error}"))?;
    seen[start as usize..][..bytes.len()].copy_from_slice(&bytes);
    Ok(seen)
}

fn opened_again(stage: &Stage, after: &Left, wanted: &[u8]) -> Result<(), String> {
    let image = after.open(stage, &host(), OpenOptions::new(Access::ReadOnly))?;
    match whole(&image)?[..] == *wanted {
        true => Ok(()),
        false => Err("What was written after the loss reads otherwise".into()),
    }
}
