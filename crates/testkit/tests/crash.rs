//! The crash enumerator can fail: wrong write orders are caught, right ones are not.

use std::collections::BTreeSet;

use lacuna::buffer::{Buffer, Hold};
use lacuna::storage::{Storage, ZeroMode};
use lacuna::units::{HostOffset, HostRange};
use testkit::sim::crash::{self, CrashState};
use testkit::sim::{Fault, OperationKind, Pace, SimHost, SimStorage};

const NEW: [u8; 512] = [7; 512];

async fn write(file: &SimStorage, offset: u64, bytes: &[u8]) {
    file.write_at(HostOffset(offset), Buffer::from(bytes)).await.0.unwrap();
}

/// All states of all moments after `run` on a file of eight zero sectors.
fn states<F: Future<Output = ()>>(run: impl FnOnce(SimStorage) -> F) -> Vec<CrashState> {
    let host = SimHost::new(Pace::AtOnce, 1);
    let file = host.add_file([0; 4096][..].into());
    pollster::block_on(run(file));
    crash::points(&host).iter().flat_map(|point| point.states(1, 50)).collect()
}

/// A pointer in sector 0 names a sector, which must hold what was written there.
fn dangles(state: &CrashState) -> bool {
    let pointer = u64::from(state.files[0].read_vec(0, 1)[0]);
    pointer != 0 && state.files[0].read_vec(pointer * 512, 512) != NEW
}

#[test]
fn pointer_without_flush_before_it_is_caught() {
    let states = states(|file| async move {
        write(&file, 512, &NEW).await;
        write(&file, 0, &[1]).await;
    });
    assert!(states.iter().any(dangles));
}

#[test]
fn pointer_written_first_is_caught() {
    let states = states(|file| async move {
        write(&file, 0, &[1]).await;
        file.flush().await.unwrap();
        write(&file, 512, &NEW).await;
    });
    assert!(states.iter().any(dangles));
}

#[test]
fn pointer_after_flush_never_dangles() {
    let states = states(|file| async move {
        write(&file, 512, &NEW).await;
        file.flush().await.unwrap();
        write(&file, 0, &[1]).await;
    });
    assert!(!states.iter().any(dangles));
    assert!(states.iter().any(|state| state.files[0].read_vec(0, 1) == [1]));
}

#[test]
fn write_over_two_sectors_is_torn_between_them() {
    let states = states(|file| async move { write(&file, 256, &[7; 512]).await });
    let seen: BTreeSet<_> = states
        .iter()
        .map(|state| (state.files[0].read_vec(256, 1), state.files[0].read_vec(512, 1)))
        .collect();
    assert!(seen.contains(&(vec![7], vec![0])) || seen.contains(&(vec![0], vec![7])), "{seen:?}");
}

#[test]
fn twelve_bytes_within_a_sector_are_never_torn() {
    let states = states(|file| async move { write(&file, 36, &[7; 12]).await });
    let seen: BTreeSet<_> = states.iter().map(|state| state.files[0].read_vec(36, 12)).collect();
    assert!(seen.iter().all(|bytes| *bytes == [7; 12] || *bytes == [0; 12]));
}

#[test]
fn failed_flush_loses_what_it_should_have_kept_even_after_a_good_one() {
    let host = SimHost::new(Pace::AtOnce, 1);
    let file = host.add_file([0; 65536][..].into());
    host.order(Fault::io(OperationKind::Flush, 0));
    pollster::block_on(async {
        write(&file, 0, &[7; 65536]).await;
        assert!(file.flush().await.is_err());
        file.flush().await.unwrap();
    });
    let last = crash::points(&host).pop().unwrap();
    assert_eq!(last.unflushed_len(), 0);
    let state = last.states(1, 10).next().unwrap();
    assert_ne!(state.files[0].to_vec(), [7; 65536]);
}

#[test]
fn newest_write_in_a_long_list_may_be_the_only_survivor_and_the_only_loss() {
    let states = states(|file| async move {
        for sector in 0..8 {
            write(&file, sector * 512, &NEW).await;
        }
    });
    let survivors = |state: &CrashState| {
        (0..8).filter(|sector| state.files[0].read_vec(sector * 512, 1) == [7]).collect::<Vec<_>>()
    };
    let seen: BTreeSet<_> = states.iter().map(survivors).collect();
    assert!(seen.contains(&vec![7]) && seen.contains(&vec![0, 1, 2, 4, 5, 6, 7]));
}

#[test]
fn lost_extension_leaves_a_short_file() {
    let states = states(|file| async move {
        write(&file, 8192, &NEW).await;
        file.set_len(100, Hold::none()).await.unwrap();
    });
    let lengths: BTreeSet<_> = states.iter().map(|state| state.files[0].len()).collect();
    assert!(lengths.is_superset(&[4096, 8704, 100].into()), "{lengths:?}");
}

#[test]
fn short_failure_leaves_a_part_behind() {
    let host = SimHost::new(Pace::AtOnce, 3);
    let file = host.add_file([0; 65536][..].into());
    host.order(Fault::no_space(OperationKind::Write, 0).short());
    let (result, _) =
        pollster::block_on(file.write_at(HostOffset(0), Buffer::from(&[7; 65536][..])));
    assert_eq!(result.unwrap_err().kind(), lacuna::ErrorKind::NoSpace);
    let left = host.content(0).to_vec().iter().filter(|byte| **byte == 7).count();
    assert!(left > 0 && left < 65536, "{left}");
}

#[test]
fn zeroing_and_holes_are_told_apart_by_status() {
    let host = SimHost::new(Pace::AtOnce, 1);
    let file = host.add_file([7; 65536][..].into());
    pollster::block_on(async {
        let range = |start, len| HostRange::new(HostOffset(start), len);
        file.write_zeroes_at(range(0, 8192), ZeroMode::Allocate, Hold::none()).await.unwrap();
        file.punch_hole_at(range(8192, 10000), Hold::none()).await.unwrap();
        let mut seen = Vec::new();
        let mut at = 0;
        while at < 70000 {
            let extent = file.status_at(range(at, 70000 - at)).await.unwrap();
            seen.push((at, extent.status));
            at += extent.len;
        }
        use lacuna::storage::HostStatus::{Data, Hole, Unwritten};
        assert_eq!(seen, [(0, Unwritten), (8192, Hole), (16384, Data), (65536, Hole)]);
        assert_eq!(host.content(0).read_vec(16384, 4096)[1807..1809], [0, 7]);
    });
}
