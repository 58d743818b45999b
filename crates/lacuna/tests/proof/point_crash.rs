//! Power cuts while bitmaps are frozen, and when that is finished: the image never misses a change.

use std::collections::BTreeSet;

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Image, NewBitmap};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage, crash};
use testkit::{Random, SparseBytes, seeds};

use crate::case::{Case, Kind};
use crate::drive::{assert_safe, is_dirty, whole_content};

/// States for each moment at which the power goes.
const STATES: usize = 6;
/// Writes between two steps.
const WRITES: usize = 6;
const GRAIN: u64 = 1024;

/// How far the story is, as the record of the host has it.
const FROZEN: u64 = 1;
const FINISHED: u64 = 2;

/// The disk when the bitmap "old" was made, and at the moment.
struct Story {
    first: SparseBytes,
    moment: SparseBytes,
}

async fn write(image: &Image<SimStorage>, random: &mut Random) -> lacuna::Result<()> {
    for _ in 0..WRITES {
        let start = random.below(image.size_bytes() / 512 - 8) * 512;
        let bytes = vec![1 + random.below(255) as u8; (1 + random.below(8) as usize) * 512];
        let bytes = Buffer::from(&bytes[..]);
        image.write(GuestOffset(start), bytes, WriteFlags::empty()).await.0?;
        if random.one_in(4) {
            image.flush().await?;
        }
    }
    Ok(())
}

async fn tell(case: &Case, host: &SimHost, seed: u64) -> lacuna::Result<Story> {
    let mut random = Random::new(seed);
    let image = case.on(host).open().await?;
    let first = whole_content(&image).await?;
    write(&image, &mut random).await?;
    let new = NewBitmap { granularity_bytes: Some(GRAIN), ..NewBitmap::new("new") };
    let frozen = image.freeze_bitmaps(&["old".into()], &[new]).await?;
    let moment = whole_content(&image).await?;
    host.mark(FROZEN);
    write(&image, &mut random).await?;
    frozen.finish().await?;
    host.mark(FINISHED);
    write(&image, &mut random).await?;
    image.close().await?;
    Ok(Story { first, moment })
}

async fn named(image: &Image<SimStorage>, name: &str) -> lacuna::Result<BTreeSet<u64>> {
    let mut ranges = image.bitmap(&name.into()).await?.ranges();
    let mut grains = BTreeSet::new();
    while let Some(range) = ranges.next().await? {
        grains.extend(range.start.0 / GRAIN..range.end().0.div_ceil(GRAIN));
    }
    Ok(grains)
}

/// Says which grain differs and is not named.
fn missed(named: &BTreeSet<u64>, before: &SparseBytes, now: &SparseBytes) -> Option<u64> {
    let part = |of: &SparseBytes, grain: u64| of.read_vec(grain * GRAIN, GRAIN as usize);
    let grains = 0..now.len() / GRAIN;
    grains.into_iter().find(|it| part(before, *it) != part(now, *it) && !named.contains(it))
}

async fn examine(left: &Case, story: &Story, mark: Option<u64>, ask: bool) -> Result<(), String> {
    if !is_dirty(left) {
        assert_safe(left, ask).await?;
    }
    let said = |what: &str, error: lacuna::Error| format!("{what}: {error}");
    let host = SimHost::without_record(Pace::AtOnce, 1);
    let image = left.on(&host).open().await.map_err(|error| said("Opening", error))?;
    let now = whole_content(&image).await.map_err(|error| said("Reading", error))?;
    let old = named(&image, "old").await.map_err(|error| said("old", error))?;
    // While it is being finished, either is right, and what changed since is in both.
    let since = if mark.is_some() { &story.moment } else { &story.first };
    if let Some(grain) = missed(&old, since, &now) {
        return Err(format!("'old' misses grain {grain}"));
    }
    let names = image.bitmaps().await.map_err(|error| said("Bitmaps", error))?;
    match (names.len(), mark) {
        // The moment is when nothing changed: what it names may still be told from before.
        (1, None) => Ok(()),
        (1, Some(mark)) => Err(format!("'new' is not there at {mark}")),
        _ => {
            let new = named(&image, "new").await.map_err(|error| said("new", error))?;
            match missed(&new, &story.moment, &now) {
                Some(grain) if mark.is_some() => Err(format!("'new' misses grain {grain}")),
                _ => Ok(()),
            }
        }
    }
}

fn case(kind: Kind) -> Case {
    let case = kind.build(2);
    let host = SimHost::without_record(Pace::AtOnce, 1);
    pollster::block_on(async {
        let image = case.on(&host).open().await?;
        let bytes = Buffer::from(&vec![9; 16 << 10][..]);
        image.write(GuestOffset(8 << 10), bytes, WriteFlags::empty()).await.0?;
        let granularity_bytes = Some(GRAIN);
        image.add_bitmap(&NewBitmap { granularity_bytes, ..NewBitmap::new("old") }).await?;
        image.close().await
    })
    .unwrap();
    case.with_content(vec![host.content(0)])
}

#[test]
fn no_crash_makes_a_bitmap_miss_what_changed_while_it_was_frozen() {
    for seed in seeds(2) {
        for kind in [Kind::plain(9), Kind::plain(12)] {
            let case = case(kind);
            let host = SimHost::new(Pace::AtOnce, seed);
            let story = pollster::block_on(tell(&case, &host, seed)).unwrap();
            let mut count = 0;
            for point in crash::points(&host) {
                for state in point.states(seed, STATES) {
                    count += 1;
                    let left = case.with_content(state.files);
                    let examined = examine(&left, &story, point.mark, count % 100 == 1);
                    pollster::block_on(examined).unwrap_or_else(|error| {
                        panic!("LACUNA_SEED={seed}, {kind:?}, after {}: {error}", point.event)
                    });
                }
            }
            assert!(count > 100, "only {count} states");
        }
    }
}

/// What was frozen is known as long as it is not finished, and not a moment longer than it must be.
#[test]
fn a_bitmap_is_frozen_once_and_only_where_it_records() {
    let case = case(Kind::plain(12));
    let host = SimHost::without_record(Pace::AtOnce, 1);
    pollster::block_on(async {
        let image = case.on(&host).open().await.unwrap();
        let names = ["old".into()];
        let kind = |error: lacuna::Error| error.kind();
        let frozen = image.freeze_bitmaps(&names, &[]).await.unwrap();
        let busy = image.freeze_bitmaps(&names, &[]).await.map(drop).map_err(kind);
        assert_eq!(busy, Err(lacuna::ErrorKind::Busy));
        let range = GuestRange::new(GuestOffset(0), 512);
        let bytes = Buffer::from(&[3; 512][..]);
        image.write(range.start, bytes, WriteFlags::empty()).await.0.unwrap();
        frozen.end();
        assert_eq!(frozen.finish().await.map_err(kind), Err(lacuna::ErrorKind::InvalidRequest));
        let again = image.freeze_bitmaps(&names, &[]).await.unwrap();
        assert!(again.bitmap("old").unwrap().extents(range, 1)[0].is_dirty);
        drop(again);
        image.enable_bitmap(&names[0], false).await.unwrap();
        let disabled = image.freeze_bitmaps(&names, &[]).await.map(drop).map_err(kind);
        assert_eq!(disabled, Err(lacuna::ErrorKind::InvalidRequest));
        let none = image.freeze_bitmaps(&["none".into()], &[]).await.map(drop).map_err(kind);
        assert_eq!(none, Err(lacuna::ErrorKind::NotFound));
        let taken = image.freeze_bitmaps(&[], &[NewBitmap::new("old")]).await.map(drop);
        assert_eq!(taken.map_err(kind), Err(lacuna::ErrorKind::InvalidRequest));
        image.close().await.unwrap();
    });
}
