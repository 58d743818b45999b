//! `check` against the stock tool: texts, JSON and exit codes.

mod common;

use common::{Sandbox, both};

const TOP: &str = "stock-img create -q -f qcow2 image 8M
     stock-io -f qcow2 -c 'write -P 2 512k 64k' -c 'write -c 1M 64k' -c 'write 3M 64k' image";

#[test]
fn sound_images_are_reported_alike() {
    both(&format!(
        "{TOP}
         qemu-img check image
         qemu-img check -q image
         qemu-img check -q --output=json image
         qemu-img check --output=json image
         qemu-img check -f qcow2 -T none image
         qemu-img check -r all image
         qemu-img create -q -f qcow2 nothing 0
         qemu-img check --output=json nothing"
    ));
}

#[test]
fn leaks_are_found_and_repaired_with_exit_code_three() {
    both(&format!(
        "{TOP}
         dd if=/dev/zero of=image bs=8 count=1 seek=$((0x30000/8)) conv=notrunc status=none
         cp image copy
         qemu-img check image
         qemu-img check -q image
         qemu-img check --output=json image
         qemu-img check -r leaks image
         qemu-img check -r leaks image
         qemu-img check -r all --output=json copy"
    ));
}

#[test]
fn corruptions_give_exit_code_two() {
    both(&format!(
        "{TOP}
         dd if=/dev/zero of=image bs=64k count=1 seek=2 conv=notrunc status=none
         qemu-img check image
         qemu-img check --output=json image"
    ));
}

#[test]
fn repaired_images_are_sound_for_the_stock_tool() {
    let ours = Sandbox::ours();
    ours.prepare(TOP);
    ours.prepare("dd if=/dev/zero of=image bs=64k count=1 seek=2 conv=notrunc status=none");
    let repaired = ours.run("lacuna check -r all image");
    assert_eq!(repaired.code, Some(0), "{}", repaired.text);
    assert!(repaired.text.contains("The following inconsistencies were found and repaired"));
    ours.prepare("stock-img check image");
    ours.prepare("stock-io -r -f qcow2 -c 'read -P 2 512k 64k' image");
}

#[test]
fn findings_are_called_harmless_or_harmful_under_our_own_name() {
    let ours = Sandbox::ours();
    ours.prepare(TOP);
    ours.prepare(
        "dd if=/dev/zero of=image bs=8 count=1 seek=$((0x30000/8)) conv=notrunc status=none",
    );
    let found = ours.run("lacuna check image");
    assert_eq!(found.code, Some(3));
    assert!(found.text.contains("Leaked cluster 4 refcount=1 reference=0 (harmless)"), "{found:?}");
}

#[test]
fn what_cannot_be_checked_is_refused_in_the_same_words() {
    both(
        "stock-img create -q raw 1M
         stock-img create -q -f qcow2 image 1M
         qemu-img check
         qemu-img check image image
         qemu-img check raw
         qemu-img check -f raw raw
         qemu-img check --output=json raw
         qemu-img check -f qcow2 raw
         qemu-img check missing
         qemu-img check -r
         qemu-img check -r foo image
         qemu-img check --output=x image
         qemu-img check -T foo image
         qemu-img check -U -r all image",
    );
}
