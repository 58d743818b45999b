//! Points in time of the disk: made, read and ended while guests go on.

use lacuna::block::{Layer, Point, PointOptions, WhenFull};
use lacuna::qcow2::Image;
use lacuna::raw::Raw;
use lacuna::units::GuestRange;
use testkit::SparseBytes;
use testkit::sim::SimStorage;

use crate::files::whole;
use crate::front::Disk;
use crate::guest::Truth;
use crate::history::{Eyes, History};

/// What points save to: a file that nobody looks at after a crash.
pub(crate) type Scratch = Raw<SimStorage>;
type DiskPoint = Point<Image<SimStorage>, Scratch>;

/// What the disk was at the moment of a point.
struct Moment {
    history: History,
    eyes: Eyes,
}

/// Makes a point, reads it so often, and ends it.
pub(crate) async fn point(
    disk: Disk,
    options: PointOptions,
    reads: usize,
    truth: Truth,
) -> Result<(), String> {
    let Disk::KeepsPoints(points) = &disk else { return Ok(()) };
    let storage = truth.host.add_file(SparseBytes::default());
    let size_bytes = points.size_bytes();
    let made = async {
        let target = Raw::create(storage, size_bytes).await?;
        points.add(target, options, async { Ok(Moment::now(&truth)) }).await
    };
    let (point, moment) = match made.await {
        Ok(made) => made,
        // The disk grew meanwhile: there would be no room for all of it.
        Err(_) if truth.host.struck() || points.size_bytes() > size_bytes => return Ok(()),
        Err(error) => return Err(format!("Making a point: {error}")),
    };
    let read = moment.read(&point, reads, &truth, options).await;
    point.end();
    read
}

impl Moment {
    fn now(truth: &Truth) -> Self {
        let mut history = truth.history.borrow_mut();
        let now = history.tick();
        Self { history: history.clone(), eyes: Eyes::Reader(now, now) }
    }

    /// Reads all of a point again and again: it is what the disk was, and stays so.
    async fn read(
        &self,
        point: &DiskPoint,
        reads: usize,
        truth: &Truth,
        options: PointOptions,
    ) -> Result<(), String> {
        let mut first: Option<Vec<u8>> = None;
        for _ in 0..reads {
            let seen = match look(point).await {
                Ok(seen) => seen,
                Err(_) if truth.host.struck() || may_break(options) => return Ok(()),
                Err(error) => return Err(format!("Reading a point: {error}")),
            };
            let (bytes, zeros) = seen;
            let judged = self.history.judge_all(&bytes, self.eyes);
            judged.map_err(|error| format!("a point: {error}"))?;
            if first.as_ref().is_some_and(|first| *first != bytes) {
                return Err("a point reads otherwise than before".to_owned());
            }
            for range in zeros {
                let part = &bytes[range.start.0 as usize..range.end().0 as usize];
                if part.iter().any(|byte| *byte != 0) {
                    return Err(format!("a point calls {range:x?} zeros"));
                }
            }
            first = Some(bytes);
        }
        Ok(())
    }
}

fn may_break(options: PointOptions) -> bool {
    options.when_full == WhenFull::Break && options.space_bytes != u64::MAX
}

/// Returns the bytes of a point, and what its extents call zeros.
async fn look(point: &DiskPoint) -> lacuna::Result<(Vec<u8>, Vec<GuestRange>)> {
    let (mut zeros, mut rest) = (Vec::new(), point.whole());
    while !rest.is_empty() {
        let extents = point.extents(rest).await?;
        let end = extents.last().map_or_else(|| rest.end(), |last| last.range.end());
        rest = GuestRange::new(end, rest.end() - end);
        zeros.extend(extents.iter().filter(|it| it.status.reads_zero).map(|it| it.range));
    }
    Ok((whole(point).await?, zeros))
}
