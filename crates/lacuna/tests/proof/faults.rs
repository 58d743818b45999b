//! A host that fails at each of its calls once, or from then on.

use lacuna::block::{DiscardMode, WriteFlags, ZeroFlags};
use lacuna::units::{GuestOffset, GuestRange};
use testkit::sim::{Fault, OperationKind, Pace, SimHost, crash};
use testkit::{ModelDisk, Operation};

use crate::case::{Backing, Case, Kind, Store};
use crate::drive::{Candidates, assert_safe, is_dirty, perform, settle, whole_content};

fn script(kind: &Kind) -> Vec<Operation> {
    let cluster = kind.cluster_bytes();
    let range = |start, len| GuestRange::new(GuestOffset(start), len);
    let write = |start, len, seed| Operation::Write {
        range: range(start, len),
        seed,
        flags: WriteFlags::empty(),
    };
    vec![
        write(0, 6 * cluster, 1),
        write(8 * cluster + 9, 99, 2),
        Operation::Flush,
        write(2 * cluster + 1, 2, 3),
        Operation::WriteZeroes { range: range(cluster, cluster), flags: ZeroFlags::MAY_UNMAP },
        Operation::Discard { range: range(4 * cluster, cluster), mode: DiscardMode::Guest },
        write(11 * cluster, cluster, 4),
        Operation::Flush,
        write(12 * cluster, 2 * cluster, 5),
        Operation::Flush,
    ]
}

/// What a run under a fault came to.
struct Outcome {
    failed: bool,
    struck: bool,
    allowed: Candidates,
    host: SimHost,
}

/// Does the script while the host fails; what was acknowledged must hold afterwards.
async fn run(case: &Case, fault: Fault) -> Result<Outcome, String> {
    let host = SimHost::new(Pace::AtOnce, 5);
    let files = case.on(&host);
    let image = files.open().await.map_err(|error| error.to_string())?;
    host.order(fault);
    let mut model = case.model();
    let (mut allowed, mut failed) = (Candidates(vec![model.content().clone()]), false);
    for operation in script(&case.kind) {
        foresee(&mut allowed, &model, &operation, case);
        match perform(&image, operation).await {
            Ok(_) if operation == Operation::Flush => {
                // Everything acknowledged is durable now; what failed before stays open.
                if !failed {
                    allowed = Candidates(vec![model.content().clone()]);
                }
            }
            Ok(_) if !failed => {
                // A discard may be partly done by a failing host: its result is taken as seen.
                if settle(&image, &mut model, &operation).await.is_err() {
                    failed = true;
                }
            }
            Ok(_) => {}
            Err(_) => failed = true,
        }
    }
    failed |= image.close().await.is_err();
    let struck = host.struck();
    host.heal();
    Ok(Outcome { failed, struck, allowed, host })
}

fn foresee(allowed: &mut Candidates, model: &ModelDisk, operation: &Operation, case: &Case) {
    allowed.add(model);
    if let Operation::Discard { range, mode } = *operation {
        allowed.add_discard(range, mode, case);
    }
    let mut after = model.clone();
    after.apply(operation);
    allowed.add(&after);
}

/// After the failure: power cut or not, acknowledged bytes are there and the image is sound.
async fn examine(case: &Case, outcome: &Outcome, ask_qemu: bool) -> Result<(), String> {
    let last = crash::points(&outcome.host).pop().ok_or("Nothing was recorded")?;
    let mut states: Vec<_> = last.states(3, 6).map(|state| state.files).collect();
    let mut now = vec![outcome.host.content(0)];
    now.extend(case.data.as_ref().map(|_| outcome.host.content(1)));
    states.push(now);
    for files in states {
        let after = case.with_content(files);
        if !is_dirty(&after) {
            assert_safe(&after, ask_qemu).await?;
        }
        let host = SimHost::without_record(Pace::AtOnce, 1);
        let image = after.on(&host).open().await.map_err(|error| format!("Opening: {error}"))?;
        let seen = whole_content(&image).await.map_err(|error| format!("Reading: {error}"))?;
        outcome.allowed.judge(&seen)?;
    }
    Ok(())
}

fn fail_everywhere(kind: Kind, order: impl Fn(usize) -> Fault) -> usize {
    let case = kind.build(1);
    for after in 0.. {
        let fault = order(after);
        let story = format!("{kind:?}, {fault:?}");
        let outcome =
            pollster::block_on(run(&case, fault)).unwrap_or_else(|e| panic!("{story}: {e}"));
        if !outcome.struck {
            return after;
        }
        // A hole that was not punched, or space that was not reserved, costs nobody anything.
        let matters =
            !matches!(fault.kind, None | Some(OperationKind::Punch | OperationKind::Allocate));
        assert!(outcome.failed || !matters, "{story}: nobody was told");
        let judged = pollster::block_on(examine(&case, &outcome, after % 16 == 3));
        judged.unwrap_or_else(|error| panic!("{story}: {error}"));
    }
    unreachable!("the script ends")
}

fn kinds() -> [Kind; 6] {
    let plain = Kind::plain(9);
    [
        plain,
        Kind { version: 2, backing: Backing::RawShorter, ..plain },
        Kind { lazy: true, ..plain },
        Kind { store: Store::DataFile, ..plain },
        Kind { extended: true, ..Kind::plain(14) },
        Kind { backing: Backing::Qcow2Longer, ..Kind::plain(14) },
    ]
}

#[test]
fn failing_writes_are_reported_and_lose_nothing_acknowledged() {
    for kind in kinds() {
        let writes = fail_everywhere(kind, |after| Fault::io(OperationKind::Write, after));
        assert!(writes > 5, "only {writes} writes failed");
        fail_everywhere(kind, |after| Fault::no_space(OperationKind::Write, after).short());
        fail_everywhere(kind, |after| Fault::no_space(OperationKind::Write, after).forever());
    }
}

#[test]
fn failing_flushes_are_reported_and_never_believed_afterwards() {
    for kind in kinds() {
        let flushes = fail_everywhere(kind, |after| Fault::io(OperationKind::Flush, after));
        assert!(flushes > 2, "only {flushes} flushes failed");
        fail_everywhere(kind, |after| Fault::io(OperationKind::Flush, after).forever());
    }
}

#[test]
fn failing_reads_are_reported() {
    for kind in kinds() {
        fail_everywhere(kind, |after| Fault::io(OperationKind::Read, after));
    }
}

#[test]
fn any_failing_change_leaves_a_sound_image() {
    for kind in kinds() {
        fail_everywhere(kind, Fault::any);
        fail_everywhere(kind, |after| Fault::any(after).forever());
    }
}
