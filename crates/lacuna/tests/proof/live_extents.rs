//! Extents while writers run: never zero over data that was acknowledged before the question.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{ExtentDetail, Image};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Executor, Random, seeds};

use crate::case::{Backing, Kind, Store};

const SECTOR: u64 = 512;
const WRITERS: u64 = 4;
const CHANGES: usize = 30;

/// What is certain of a sector.
#[derive(Clone, Copy, Debug, Default)]
struct Sector {
    /// How many changes of it have begun.
    changes: u64,
    /// The last change is over, and was a write of data.
    holds_data: bool,
}

/// The disk as its writers know it. Each unit belongs to one writer; in the first half they are
/// smaller than a cluster, so that neighbours in one cluster are changed at once.
struct Board {
    sectors: RefCell<Vec<Sector>>,
    size_bytes: u64,
    cluster_bytes: u64,
    questions: RefCell<usize>,
    writing: RefCell<u64>,
}

impl Board {
    fn new(kind: &Kind) -> Self {
        let sectors = vec![Sector::default(); (kind.size_bytes() / SECTOR) as usize];
        Self {
            sectors: RefCell::new(sectors),
            size_bytes: kind.size_bytes(),
            cluster_bytes: kind.cluster_bytes(),
            questions: RefCell::default(),
            writing: RefCell::new(WRITERS),
        }
    }

    fn unit(&self, writer: u64, random: &mut Random) -> GuestRange {
        let half = self.size_bytes / 2 / self.cluster_bytes * self.cluster_bytes;
        let (base, unit, room) = match random.one_in(2) {
            true => (0, 3 * SECTOR, half),
            false => (half, self.cluster_bytes, self.size_bytes - half),
        };
        let rounds = room / unit / WRITERS;
        let index = random.below(rounds) * WRITERS + writer;
        GuestRange::new(GuestOffset(base + index * unit), unit)
    }

    fn each(&self, range: GuestRange, mut change: impl FnMut(&mut Sector)) {
        let (from, to) = (range.start.0 / SECTOR, range.end().0 / SECTOR);
        self.sectors.borrow_mut()[from as usize..to as usize].iter_mut().for_each(&mut change);
    }

    /// Asserts that an answer calls nothing zero that held data when the question was asked, unless
    /// somebody has changed it since.
    fn judge(&self, before: &[Sector], extents: &[lacuna::block::Extent]) {
        let now = self.sectors.borrow();
        for extent in extents.iter().filter(|extent| extent.status.reads_zero) {
            let (from, to) = (extent.range.start.0 / SECTOR, extent.range.end().0.div_ceil(SECTOR));
            for sector in from as usize..to as usize {
                let (was, is) = (before[sector], now[sector]);
                let lies = was.holds_data && was.changes == is.changes;
                assert!(!lies, "sector {sector} holds data, but is called zero: {extent:?}");
            }
        }
    }
}

async fn write(image: &Image<SimStorage>, board: &Board, writer: u64, mut random: Random) {
    for _ in 0..CHANGES {
        let range = board.unit(writer, &mut random);
        board.each(range, |sector| {
            *sector = Sector { changes: sector.changes + 1, holds_data: false };
        });
        let flags = *random.pick(&[
            ZeroFlags::empty(),
            ZeroFlags::MAY_UNMAP,
            ZeroFlags::MAY_UNMAP.union(ZeroFlags::THOROUGH),
        ]);
        match random.below(8) {
            0 | 1 => image.write_zeroes(range, flags).await.unwrap(),
            2 => image.discard(range, DiscardMode::Guest).await.unwrap(),
            3 if random.one_in(2) => image.flush().await.unwrap(),
            _ => {
                let bytes = Buffer::from(&vec![7; range.len as usize][..]);
                image.write(range.start, bytes, WriteFlags::empty()).await.0.unwrap();
                board.each(range, |sector| sector.holds_data = true);
            }
        }
    }
    *board.writing.borrow_mut() -= 1;
}

async fn ask(image: &Image<SimStorage>, board: &Board) {
    while *board.writing.borrow() > 0 {
        let mut at = GuestOffset(0);
        while at.0 < board.size_bytes {
            let before = board.sectors.borrow().clone();
            let rest = GuestRange::new(at, board.size_bytes - at.0);
            let extents = image.extents(rest).await.unwrap();
            board.judge(&before, &extents);
            assert_eq!(extents[0].range.start, at);
            let gapless = |pair: &[lacuna::block::Extent]| {
                pair[0].range.end() == pair[1].range.start && !pair[0].is_continued_by(&pair[1])
            };
            assert!(extents.windows(2).all(gapless), "{extents:?}");
            at = extents.last().unwrap().range.end();
        }
        *board.questions.borrow_mut() += 1;
        yield_once().await;
    }
}

/// Lets the others go on: an answer out of cached tables waits for nothing.
async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        context.waker().wake_by_ref();
        if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

fn run(kind: &Kind, detail: ExtentDetail, seed: u64) {
    let host = SimHost::without_record(Pace::Executor, seed);
    let mut files = kind.build(seed).on(&host);
    files.options = files.options.extent_detail(detail);
    let board = Rc::new(Board::new(kind));
    let mut executor = Executor::new(seed);
    executor.attach(Arc::new(host));
    let image = executor.block_on(async move { files.open().await }).unwrap();
    let mut random = Random::new(seed);
    for writer in 0..WRITERS {
        let (image, board, random) = (image.clone(), Rc::clone(&board), random.split());
        executor.spawn(async move { write(&image, &board, writer, random).await });
    }
    let (asker, watched) = (image.clone(), Rc::clone(&board));
    executor.spawn(async move { ask(&asker, &watched).await });
    executor.run().unwrap_or_else(|stalled| panic!("{stalled}"));
    assert!(*board.questions.borrow() > 3, "hardly a question was asked");
}

#[test]
fn extents_never_call_zero_what_was_acknowledged_before_the_question() {
    let kinds = [
        Kind::plain(12),
        Kind { version: 2, ..Kind::plain(12) },
        Kind { backing: Backing::RawShorter, ..Kind::plain(12) },
        Kind { store: Store::DataFile, ..Kind::plain(12) },
        Kind { extended: true, ..Kind::plain(14) },
        Kind { extended: true, backing: Backing::Qcow2Longer, ..Kind::plain(14) },
    ];
    for seed in seeds(6) {
        for kind in &kinds {
            for detail in [ExtentDetail::Map, ExtentDetail::Host] {
                println!("LACUNA_SEED={seed}, {kind:?}, {detail:?}");
                run(kind, detail, seed);
            }
        }
    }
}
