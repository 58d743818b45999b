//! Sharing equal clusters changes no byte: through power cuts, dropped at every await, among writers.

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::qcow2::{Image, OnDiscard};
use lacuna::units::{GuestCluster, GuestOffset, GuestRange};
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage, crash};
use testkit::{ModelDisk, Operation, Random, content, seeds};

use crate::case::{Case, Kind};
use crate::crash::{Recorded, kinds};
use crate::drive::{assert_qemu_agrees, assert_safe, is_dirty, perform, whole_content};
use crate::scene::Scene;

/// Guest clusters that are filled, and groups of which are alike.
const FILLED: u64 = 14;
const GROUPS: u64 = 3;

fn is_long() -> bool {
    std::env::var_os("LACUNA_LONG").is_some()
}

/// Every kind of image in which clusters can share.
fn sharing_kinds() -> Vec<Kind> {
    let plain = Kind::plain(9);
    let bytes = Kind { refcount_order: 3, ..plain };
    let can = |kind: &Kind| kind.refcount_order > 2 && !kind.has_data_file();
    kinds(9).into_iter().chain(kinds(14)).chain([bytes]).filter(can).collect()
}

fn few() -> Vec<Kind> {
    let wanted = |kind: &Kind| kind.shared_zero || kind.extended || kind.lazy || kind.version == 2;
    let all = sharing_kinds().into_iter();
    std::iter::once(Kind::plain(9)).chain(all.filter(wanted)).collect()
}

/// An image of this kind that need not keep its clusters where they are.
fn build(kind: &Kind, seed: u64) -> Case {
    let mut case = kind.build(seed);
    case.options = case.options.on_discard(OnDiscard::Free);
    case
}

/// The bytes of the clusters of a group.
fn bytes_of(group: u64, cluster: u64) -> Vec<u8> {
    content(group + 100, GuestRange::new(GuestOffset(0), cluster))
}

/// Fills clusters with what is alike in groups, each fourth compressed.
async fn fill(image: &Image<SimStorage>, model: &mut ModelDisk, cluster: u64) {
    for index in 0..FILLED {
        let range = GuestRange::new(GuestOffset(index * cluster), cluster);
        let mut bytes = bytes_of(index % GROUPS, cluster);
        let is_compressed = index % 4 == 3;
        if is_compressed {
            bytes[100..].fill(9);
        }
        let buffer = Buffer::from(&bytes[..]);
        let (result, _) = match is_compressed {
            true => image.write_compressed(range.start, buffer).await,
            false => image.write(range.start, buffer, WriteFlags::empty()).await,
        };
        result.unwrap();
        model.adopt(range, &bytes);
    }
    image.flush().await.unwrap();
}

/// What is believed to be equal: some of it is not.
fn groups() -> Vec<Vec<GuestCluster>> {
    let group = |group: u64| (0..FILLED + 3).filter(move |index| index % GROUPS == group);
    (0..GROUPS).map(|index| group(index).map(GuestCluster).collect()).collect()
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
    let shared = image.share(&groups()).await.map_err(fail)?;
    assert!(shared.shared > 5 && shared.freed_bytes > 0, "{shared:?}");
    // What became free is used again, what is shared is written, all sharers of one group go.
    let cluster = case.kind.cluster_bytes();
    let write = |start: u64, len: u64, seed| {
        let range = GuestRange::new(GuestOffset(start), len);
        Operation::Write { range, seed, flags: WriteFlags::empty() }
    };
    let mut script = vec![write(14 * cluster, 3 * cluster, 5), write(100, 50, 6)];
    script.extend((0..FILLED).filter(|at| at % GROUPS == 1).map(|at| write(at * cluster, 9, at)));
    for operation in script {
        recorded.change(&image, &mut model, operation).await.map_err(fail)?;
    }
    image.flush().await.map_err(fail)?;
    recorded.acknowledge();
    image.share(&groups()).await.map_err(fail)?;
    assert!(image.drop_unused_pins().await.map_err(fail)? > 0);
    image.close().await.map_err(fail)?;
    recorded.acknowledge();
    let one_in = if is_long() { 1 } else { 8 };
    recorded.crash_at(seed, |random| random.one_in(one_in)).await
}

#[test]
fn sharing_leaves_leaks_at_worst() {
    for seed in seeds(1) {
        for kind in sharing_kinds() {
            let count = pollster::block_on(crashed(&build(&kind, seed), seed));
            let count =
                count.unwrap_or_else(|error| panic!("LACUNA_SEED={seed} {kind:?}: {error}"));
            assert!(count > 5, "{kind:?}: only {count} states");
        }
    }
}

/// Takes the pins off, or makes them again where they are gone, and cuts the power meanwhile.
async fn crashed_without_pins(case: &Case, seed: u64, gone: bool) -> Result<usize, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let host = SimHost::new(Pace::AtOnce, seed);
    let files = case.on(&host);
    let mut model = case.model();
    let image = files.open().await.map_err(fail)?;
    fill(&image, &mut model, case.kind.cluster_bytes()).await;
    image.share(&groups()).await.map_err(fail)?;
    // One sharer of the first group is left.
    for index in (0..9).step_by(3) {
        let range = GuestRange::new(GuestOffset(index * case.kind.cluster_bytes()), 512);
        let write = Operation::Write { range, seed: 5, flags: WriteFlags::empty() };
        perform(&image, write).await.map_err(fail)?;
        model.apply(&write);
    }
    match gone {
        true => image.unpin().await.map_err(fail)?,
        false => image.close().await.map_err(fail)?,
    }
    let recorded = Recorded::from_now(case, host, &model);
    let image = files.open().await.map_err(fail)?;
    match gone {
        true => assert!(image.repin().await.map_err(fail)? > 0),
        false => image.unpin().await.map_err(fail)?,
    }
    recorded.crash_at(seed, |_| true).await
}

#[test]
fn taking_pins_off_and_making_them_again_leaves_leaks_at_worst_or_the_dirty_bit() {
    let all = || few().into_iter().chain([Kind { refcount_order: 6, ..Kind::plain(9) }]);
    let unpinned = all().filter(|kind| kind.version == 3).map(|kind| (kind, false));
    for (kind, gone) in unpinned.chain(all().map(|kind| (kind, true))) {
        let count = pollster::block_on(crashed_without_pins(&build(&kind, 1), 1, gone));
        let count = count.unwrap_or_else(|error| panic!("{kind:?} {gone}: {error}"));
        assert!(count > 5, "{kind:?}: only {count} states");
    }
}

#[test]
fn sharing_dropped_at_any_await_changes_no_byte_and_leaks_nothing() {
    for kind in few() {
        let case = build(&kind, 1);
        Scene::drop_everywhere(&case, (5, 15), fill, |image| async move {
            image.share(&groups()).await
        });
    }
}

#[test]
fn what_is_written_while_clusters_are_shared_is_kept() {
    for seed in seeds(6) {
        for (number, kind) in (0..).zip(few()) {
            let case = build(&kind, seed);
            let mut scene = Scene::set(&case, seed * 100 + number, fill);
            let mut random = Random::new(seed);
            let cluster = kind.cluster_bytes();
            let images = [scene.image.clone(), scene.image.clone()];
            // Two at once: one after the other then.
            let sharing = images
                .map(|image| scene.executor.spawn(async move { image.share(&groups()).await }));
            let chosen: Vec<u64> = (0..FILLED).filter(|_| random.one_in(2)).collect();
            let writes: Vec<_> = chosen
                .into_iter()
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
            for task in sharing {
                task.take().unwrap().unwrap();
            }
            for (write, task) in writes.iter().zip(tasks) {
                task.take().unwrap().unwrap();
                scene.model.apply(write);
            }
            scene.judge(&case, &format!("LACUNA_SEED={seed} {kind:?}"));
        }
    }
}

/// Shares while the host fails once, and again when it is well. Says whether it failed.
async fn failed(case: &Case, fault: Fault) -> Result<bool, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let host = SimHost::new(Pace::AtOnce, 5);
    let files = case.on(&host);
    let mut model = case.model();
    let image = files.open().await.map_err(fail)?;
    fill(&image, &mut model, case.kind.cluster_bytes()).await;
    host.start_record();
    host.order(fault);
    let first = image.share(&groups()).await;
    let struck = host.struck();
    host.heal();
    let matters = !matches!(fault.kind, Some(OperationKind::Punch));
    if struck && matters && first.is_ok() {
        return Err("nobody was told".into());
    }
    let again = image.share(&groups()).await;
    let closed = image.close().await;
    // After a failed flush nothing is acknowledged any more.
    if closed.is_ok() != again.is_ok() {
        return Err(format!("{again:?} {closed:?}"));
    }
    let last = crash::points(&host).pop().ok_or("nothing was recorded")?;
    let states = last.states(3, 6).map(|state| state.files);
    for files in states.chain([vec![host.content(0)]]) {
        let after = case.with_content(files);
        if !is_dirty(&after) {
            assert_safe(&after, false).await?;
        }
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let image = after.on(&host).open().await.map_err(fail)?;
        let seen = whole_content(&image).await.map_err(fail)?;
        if seen.to_vec() != model.content().to_vec() {
            return Err("the content has changed".into());
        }
    }
    if closed.is_ok() {
        assert_qemu_agrees(&case.with_content(vec![host.content(0)]), &model, "closed");
    }
    Ok(struck)
}

#[test]
fn a_host_that_fails_while_clusters_are_shared_leaves_a_sound_image() {
    type Order = fn(usize) -> Fault;
    let orders: [Order; 4] = [
        |after| Fault::io(OperationKind::Write, after),
        |after| Fault::io(OperationKind::Flush, after),
        |after| Fault::io(OperationKind::Read, after),
        |after| Fault::no_space(OperationKind::Write, after).short(),
    ];
    let plain = Kind::plain(9);
    let some = vec![plain, Kind { version: 2, ..plain }, Kind { lazy: true, ..plain }];
    for kind in if is_long() { few() } else { some } {
        let case = build(&kind, 1);
        for order in orders {
            let strikes = (0..).take_while(|after| {
                let fault = order(*after);
                let result = pollster::block_on(failed(&case, fault));
                result.unwrap_or_else(|error| panic!("{kind:?}, {fault:?}: {error}"))
            });
            assert!(strikes.count() > 1, "{kind:?}");
        }
    }
}

#[test]
fn a_disk_that_shrinks_while_its_clusters_are_shared_keeps_the_rest() {
    for seed in seeds(6) {
        for (number, kind) in (0..).zip(few()) {
            let case = build(&kind, seed);
            let mut scene = Scene::set(&case, seed * 100 + number, fill);
            let images = [scene.image.clone(), scene.image.clone()];
            let [first, second] = images;
            let sharing = scene.executor.spawn(async move { first.share(&groups()).await });
            let size_bytes = 7 * kind.cluster_bytes();
            let resize = Operation::Resize { size_bytes };
            let resizing = scene.executor.spawn(async move { perform(&second, resize).await });
            scene.executor.settle().unwrap();
            sharing.take().unwrap().unwrap();
            resizing.take().unwrap().unwrap();
            scene.model.apply(&resize);
            scene.judge(&case, &format!("LACUNA_SEED={seed} {kind:?}"));
        }
    }
}
