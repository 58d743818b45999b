//! Writes that share as they come: through power cuts.

use lacuna::block::{Layer, WriteFlags};
use lacuna::buffer::Buffer;
use lacuna::job::{DedupWrites, DedupWritesOptions};
use lacuna::qcow2::OnDiscard;
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Pace, SimHost};
use testkit::{ModelDisk, Random, content, seeds};

use crate::case::{Case, Kind};
use crate::crash::{Recorded, kinds};

/// Clusters that are written to, and how many contents there are.
const CLUSTERS: u64 = 12;
const KINDS: u64 = 3;

/// A write of one or two whole clusters, or of less.
fn next(random: &mut Random, model: &mut ModelDisk, cluster: u64) -> (GuestOffset, Vec<u8>) {
    let whole = |random: &mut Random| {
        let seed = 100 + random.below(KINDS);
        content(seed, GuestRange::new(GuestOffset(0), cluster))
    };
    let mut bytes = whole(random);
    bytes.extend(whole(random));
    let len = *random.pick(&[2 * cluster, cluster, cluster, cluster, 512]);
    bytes.truncate(len as usize);
    let start = GuestOffset(random.below(CLUSTERS) * cluster);
    model.adopt(GuestRange::new(start, len), &bytes);
    (start, bytes)
}

async fn crashed(case: &Case, seed: u64) -> Result<usize, String> {
    let fail = |error: lacuna::Error| error.to_string();
    let host = SimHost::new(Pace::AtOnce, seed);
    let files = case.on(&host);
    let mut model = case.model();
    let mut random = Random::new(seed + 5);
    let mut recorded = Recorded::from_now(case, host, &model);
    let cluster = case.kind.cluster_bytes();
    let image = files.open().await.map_err(fail)?;
    let options = DedupWritesOptions { batch_bytes: 4 * cluster, ..Default::default() };
    let disk = DedupWrites::new(image.clone(), options).map_err(fail)?;
    for step in 0..40 {
        let (start, bytes) = next(&mut random, &mut model, cluster);
        // From now on it may be there.
        recorded.see(&model);
        disk.write(start, Buffer::from(&bytes[..]), WriteFlags::empty()).await.0.map_err(fail)?;
        if step % 9 == 8 {
            disk.flush().await.map_err(fail)?;
            recorded.acknowledge();
        }
    }
    disk.finish().await.map_err(fail)?;
    let shared = disk.shared();
    assert!(shared.shared > 10 && shared.keepers > 0, "{shared:?}");
    image.close().await.map_err(fail)?;
    recorded.acknowledge();
    let one_in = if std::env::var_os("LACUNA_LONG").is_some() { 1 } else { 8 };
    recorded.crash_at(seed, |random| random.one_in(one_in)).await
}

#[test]
fn a_power_cut_while_writes_share_leaves_leaks_at_worst() {
    let can = |kind: &Kind| kind.refcount_order > 2 && !kind.has_data_file();
    for seed in seeds(1) {
        for kind in kinds(9).into_iter().filter(can) {
            let mut case = kind.build(seed);
            case.options = case.options.on_discard(OnDiscard::Free);
            let count = pollster::block_on(crashed(&case, seed));
            let count =
                count.unwrap_or_else(|error| panic!("LACUNA_SEED={seed} {kind:?}: {error}"));
            assert!(count > 5, "{kind:?}: only {count} states");
        }
    }
}
