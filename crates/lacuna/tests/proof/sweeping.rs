//! A sweep for zeros changes no byte: through power cuts, dropped at every await, among writers.

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::job::sweep;
use lacuna::qcow2::Image;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{ModelDisk, Operation, Random, content, seeds};

use crate::case::{Case, Kind};
use crate::crash::{Recorded, kinds};
use crate::drive::perform;
use crate::scene::Scene;

/// Clusters of data and of zeros, by turns, all of them stored.
async fn fill(image: &Image<SimStorage>, model: &mut ModelDisk, cluster: u64) {
    for index in 0..12 {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        let bytes = match index % 3 {
            0 => content(index, range),
            _ => vec![0; cluster as usize],
        };
        let buffer = Buffer::from(&bytes[..]);
        image.write(range.start, buffer, WriteFlags::empty()).await.0.unwrap();
        model.adopt(range, &bytes);
    }
    image.flush().await.unwrap();
}

async fn crashed(case: &Case, seed: u64) -> Result<usize, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let host = SimHost::new(Pace::AtOnce, seed);
    let files = case.on(&host);
    let mut model = case.model();
    let image = files.open().await.map_err(fail)?;
    fill(&image, &mut model, case.kind.cluster_bytes()).await;
    image.close().await.map_err(fail)?;
    let mut recorded = Recorded::from_now(case, host, &model);
    let image = files.open().await.map_err(fail)?;
    let report = sweep(&image, &mut |_| {}).await.map_err(fail)?;
    assert!(report.zeroed_bytes > 0, "{report:?}");
    // What became free is used again.
    let cluster = case.kind.cluster_bytes();
    let range = GuestRange::new(GuestOffset(14 * cluster), 3 * cluster);
    let reuse = Operation::Write { range, seed: 5, flags: WriteFlags::empty() };
    recorded.change(&image, &mut model, reuse).await.map_err(fail)?;
    image.close().await.map_err(fail)?;
    recorded.acknowledge();
    recorded.crash_at(seed, |random| random.one_in(2)).await
}

/// Says whether the map of such an image can tell of zeros.
fn can_say_zero(kind: &Kind) -> bool {
    kind.version == 3 || kind.shared_zero || kind.backing == crate::case::Backing::None
}

#[test]
fn sweeping_leaves_leaks_at_worst() {
    for seed in seeds(1) {
        for kind in kinds(9).into_iter().chain(kinds(14)).filter(can_say_zero) {
            let count = pollster::block_on(crashed(&kind.build(seed), seed));
            let count =
                count.unwrap_or_else(|error| panic!("LACUNA_SEED={seed} {kind:?}: {error}"));
            assert!(count > 5, "{kind:?}: only {count} states");
        }
    }
}

fn few() -> Vec<Kind> {
    let wanted = |kind: &Kind| kind.shared_zero || kind.extended || kind.has_data_file();
    let all = kinds(9).into_iter().chain(kinds(14));
    std::iter::once(Kind::plain(9)).chain(all.filter(wanted)).collect()
}

#[test]
fn a_sweep_dropped_at_any_await_changes_no_byte_and_leaks_nothing() {
    for kind in few() {
        let case = kind.build(1);
        Scene::drop_everywhere(&case, (3, 6), fill, |image| async move {
            sweep(&image, &mut |_| {}).await
        });
    }
}

#[test]
fn what_is_written_during_a_sweep_is_kept() {
    for seed in seeds(6) {
        for (number, kind) in (0..).zip(few()) {
            let case = kind.build(seed);
            let mut scene = Scene::set(&case, seed * 100 + number, fill);
            let mut random = Random::new(seed);
            let cluster = kind.cluster_bytes();
            let image = scene.image.clone();
            let sweeping = scene.executor.spawn(async move { sweep(&image, &mut |_| {}).await });
            let writes: Vec<_> = (0..12)
                .map(|index| {
                    let start = index * cluster + random.below(cluster / 512) * 512;
                    let range = GuestRange::new(GuestOffset(start), 512);
                    let seed = random.next();
                    Operation::Write { range, seed, flags: WriteFlags::empty() }
                })
                .collect();
            let tasks: Vec<_> = writes
                .iter()
                .map(|write| {
                    let (image, write) = (scene.image.clone(), *write);
                    scene.executor.spawn(async move { perform(&image, write).await })
                })
                .collect();
            scene.executor.settle().unwrap();
            sweeping.take().unwrap().unwrap();
            for (write, task) in writes.iter().zip(tasks) {
                task.take().unwrap().unwrap();
                scene.model.apply(write);
            }
            scene.judge(&case, &format!("LACUNA_SEED={seed} {kind:?}"));
        }
    }
}
