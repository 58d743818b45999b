//! Requests in flight together, whose storage calls take effect in any order.

use std::sync::Arc;

use lacuna::qcow2::Image;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::case::Kind;
use testkit::drive::perform;
use testkit::sim::{Pace, SimStorage};
use testkit::{Executor, Operation};

use crate::stage::Stage;

/// Clusters that a request has for itself.
const SLOT: u64 = 3;

/// A request within a part of the disk that no other touches.
fn request(stage: &mut Stage, slot: u64) -> Operation {
    let cluster = stage.cluster();
    let whole = GuestRange::new(GuestOffset(slot * SLOT * cluster), SLOT * cluster);
    let whole = whole.intersection(&GuestRange::new(GuestOffset(0), stage.model.size_bytes()));
    let whole = whole.expect("slots begin within the disk");
    let start = whole.start + stage.random.below(whole.len);
    let rest = whole.end() - start;
    let len = 1 + stage.random.below(rest);
    let part = GuestRange::new(start, len);
    match stage.random.below(6) {
        0 => stage.zero(part),
        1 => stage.discard(whole),
        2 => stage.write(whole),
        3 if stage.kind().allows_compression() && whole.len >= cluster => {
            let range = GuestRange::new(whole.start, cluster);
            Operation::WriteCompressed { range, seed: stage.random.next() >> 32 }
        }
        _ => stage.write(part),
    }
}

pub(super) async fn in_flight(kind: &Kind, seed: u64) -> Result<Stage, String> {
    let mut stage = Stage::new(kind, seed, Pace::Executor);
    let mut executor = Executor::new(seed);
    executor.attach(Arc::new(stage.host.clone()));
    stage.begin();
    let opened = {
        let (host, options) = (stage.host.clone(), stage.options.clone());
        let data = stage.case.data.as_ref().map(|_| host.open_file(1));
        let backing = stage.case.backing_layer();
        let parts = lacuna::qcow2::Parts { storage: host.open_file(0), data, backing };
        executor.block_on(Image::open(parts, options))
    };
    let image = opened.map_err(|error| error.to_string())?;
    for _ in 0..2 + stage.random.below(3) {
        round(&mut stage, &mut executor, &image)?;
    }
    let closing = executor.block_on(image.close());
    closing.map_err(|error| format!("Closing: {error}"))?;
    stage.flushed();
    Ok(stage)
}

/// Some requests at once, and perhaps a flush behind them.
fn round(
    stage: &mut Stage,
    executor: &mut Executor<'static>,
    image: &Image<SimStorage>,
) -> Result<(), String> {
    let slots = stage.model.size_bytes().div_ceil(SLOT * stage.cluster());
    let first = stage.random.below(slots);
    let count = 1 + stage.random.below(slots.min(4));
    let requests: Vec<Operation> =
        (0..count).map(|at| request(stage, (first + at) % slots)).collect();
    requests.iter().for_each(|request| stage.foresee(request));
    let started = requests.iter().map(|request| {
        let (image, request) = (image.clone(), *request);
        executor.spawn(async move { perform(&image, request).await })
    });
    let tasks: Vec<_> = started.collect();
    executor.settle().map_err(|stalled| stalled.to_string())?;
    for (request, task) in requests.iter().zip(tasks) {
        let done = task.take().expect("no task is dropped");
        done.map_err(|error| format!("{request:x?}: {error}"))?;
        let (image, request, mut model) = (image.clone(), *request, stage.model.clone());
        stage.model = executor.block_on(async move {
            testkit::drive::settle(&image, &mut model, &request).await.map(|()| model)
        })?;
        stage.seen();
        stage.kept(&request);
    }
    if stage.random.one_in(2) {
        let flushed = image.clone();
        let flushed = executor.block_on(async move {
            use lacuna::block::Layer;
            flushed.flush().await
        });
        flushed.map_err(|error| error.to_string())?;
        stage.flushed();
    }
    Ok(())
}
