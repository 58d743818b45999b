//! The same operations by the engine and by qemu-io, then each reads what the other wrote.

use std::path::Path;

use lacuna::block::{DiscardMode, ZeroFlags};
use testkit::foreign::{qemu_img_check, qemu_img_read, qemu_io};
use testkit::{ModelDisk, Operation, Operations, SparseBytes, content, seeds};

use crate::case::{Case, Kind};
use crate::drive::{assert_qemu_agrees, perform, settle};

/// Operations each does in its turn.
const STEPS: usize = 25;

/// Returns what qemu-io is told for an operation; the bytes of a write lie in a file.
fn command(operation: &Operation, folder: &Path, index: usize) -> Option<String> {
    let text = match *operation {
        Operation::Read(range) => format!("read -q {} {}", range.start.0, range.len),
        Operation::Write { range, seed, flags } => {
            let path = folder.join(format!("bytes{index}"));
            std::fs::write(&path, content(seed, range)).unwrap();
            let fua = if flags.is_empty() { "" } else { "-f " };
            format!("write -q {fua}-s {} {} {}", path.display(), range.start.0, range.len)
        }
        Operation::WriteZeroes { range, flags } => {
            let unmap = if flags.contains(ZeroFlags::MAY_UNMAP) { "-u " } else { "" };
            format!("write -q -z {unmap}{} {}", range.start.0, range.len)
        }
        Operation::Discard { range, .. } => {
            format!("discard -q {} {}", range.start.0, range.len)
        }
        Operation::Flush => "flush".into(),
        _ => return None,
    };
    Some(text)
}

fn operations(case: &Case, seed: u64, size_bytes: u64) -> Vec<Operation> {
    let menu = testkit::Menu {
        resize_up_to: None,
        compressed: false,
        reopen: false,
        full_discard: false,
        ..case.kind.menu()
    };
    let mut operations = Operations::new(seed, menu);
    let steps = (0..STEPS).map(|_| operations.next(size_bytes));
    // QEMU ignores discards where the engine shares zeros.
    let is_alike =
        |it: &Operation| !case.kind.shared_zero || !matches!(it, Operation::Discard { .. });
    steps.filter(is_alike).collect()
}

/// qemu-io does the operations; its discards are judged through its own conversion to raw.
fn by_qemu(case: &Case, model: &mut ModelDisk, todo: &[Operation]) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let path = case.save(folder.path());
    let mut commands = Vec::new();
    for (index, operation) in todo.iter().enumerate() {
        commands.extend(command(operation, folder.path(), index));
        if !matches!(operation, Operation::Discard { .. }) {
            model.apply(operation);
            continue;
        }
        qemu_io(&path, commands.drain(..));
        let range = operation.range().unwrap();
        let seen = qemu_img_read(&path).read_vec(range.start.0, range.len as usize);
        model.settle_discard(range, DiscardMode::Guest, &seen).unwrap();
        model.apply(operation);
    }
    if !commands.is_empty() {
        qemu_io(&path, commands);
    }
    let found = qemu_img_check(&path);
    assert!(found.is_clean(), "QEMU against itself: {}", found.text);
    let mut files = vec![SparseBytes::load(&path)];
    files.extend(case.data.as_ref().map(|_| SparseBytes::load(&folder.path().join("data.raw"))));
    case.with_content(files)
}

/// The engine does the operations after it has read what was there.
fn by_engine(case: &Case, model: &mut ModelDisk, todo: &[Operation]) -> Result<Case, String> {
    let files = case.in_memory();
    pollster::block_on(async {
        let image = files.open().await.map_err(|error| error.to_string())?;
        model.verify(&image).await.map_err(|error| format!("what QEMU wrote: {error}"))?;
        for operation in todo {
            let result = perform(&image, *operation).await;
            result.map_err(|error| format!("{operation:x?}: {error}"))?;
            settle(&image, model, operation).await?;
        }
        model.verify(&image).await?;
        image.close().await.map_err(|error| error.to_string())
    })?;
    Ok(case.with_content(files.content()))
}

#[test]
fn engine_and_qemu_take_turns_on_one_image() {
    for seed in seeds(1) {
        for (number, kind) in Kind::for_this_run() {
            let story = format!("LACUNA_SEED={seed} LACUNA_KIND={number}, {kind:?}");
            let seed = seed * 1000 + number;
            let mut case = kind.build(seed);
            let mut model = case.model();
            for turn in 0..2 {
                let todo = operations(&case, seed * 4 + turn, model.size_bytes());
                case = by_qemu(&case, &mut model, &todo);
                let todo = operations(&case, seed * 4 + turn + 2, model.size_bytes());
                case = by_engine(&case, &mut model, &todo)
                    .unwrap_or_else(|error| panic!("{story}, turn {turn}: {error}"));
                assert_qemu_agrees(&case, &model, &story);
            }
        }
    }
}
