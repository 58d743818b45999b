//! `map` against the stock tool.

mod common;

use common::both;

#[test]
fn chains_are_mapped_alike() {
    both(
        "stock-img create -q -f qcow2 base 8M
         stock-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -z 2M 128k' base
         stock-img create -q -f qcow2 -b base -F qcow2 top
         stock-io -f qcow2 -c 'write -P 2 512k 64k' -c 'write -z -u 4M 128k' top
         qemu-img map base
         qemu-img map top
         qemu-img map --output=json base
         qemu-img map --output=json top
         qemu-img map --output=json --start-offset 1M --max-length=1M top
         qemu-img map --output=json -s 500k -l 100k top
         qemu-img map -s 500k -l 100k top
         qemu-img map --start-offset=9M top
         qemu-img map --start-offset=9M --output=json top",
    );
}

#[test]
fn reserved_subclusters_keep_their_place_where_a_shorter_backing_file_ends() {
    both(
        "stock-img create -q -f qcow2 base 512k
         stock-io -f qcow2 -c 'write -P 3 0 200k' base
         stock-img create -q -f qcow2 -o extended_l2=on,preallocation=metadata -b base -F qcow2 \
             top 1M
         stock-io -f qcow2 -c 'write -z 598528 4096' -c 'write -zu 108032 65536' top
         qemu-img map --output=json top
         qemu-img map top",
    );
}

#[test]
fn compressed_clusters_have_no_line_of_their_own() {
    both(
        "stock-img create -q -f qcow2 image 8M
         stock-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -c -P 3 3M 64k' image
         qemu-img map image
         qemu-img map --output=json image",
    );
}

#[test]
fn data_lies_in_the_data_file() {
    both(
        "stock-img create -q -f qcow2 -o data_file=d image 8M
         stock-io -f qcow2 -c 'write -P 1 1M 1M' image
         qemu-img map image
         qemu-img map --output=json image",
    );
}

#[test]
fn wrong_ranges_are_refused_in_the_same_words() {
    both(
        "stock-img create -q -f qcow2 image 8M
         qemu-img map
         qemu-img map image image
         qemu-img map missing
         qemu-img map --output=foo image
         qemu-img map --start-offset=x image
         qemu-img map --start-offset=-1 image
         qemu-img map --o json image
         qemu-img map --f raw image",
    );
}

/// QEMU asks the file only where clearly more clusters are in use than the host has allocated.
#[test]
fn the_host_is_asked_where_an_image_looks_preallocated() {
    both(
        "stock-img create -q -f qcow2 -o preallocation=metadata empty 8M
         stock-img create -q -f qcow2 -o preallocation=metadata some 8M
         stock-io -f qcow2 -c 'write -P 1 1M 128k' -c 'write -P 1 3000k 4k' -c 'write -z 5M 64k' some
         stock-img create -q -f qcow2 -o preallocation=falloc,refcount_bits=1 reserved 8M
         stock-img create -q -f qcow2 -b some -F qcow2 top
         stock-io -f qcow2 -c 'write -P 2 0 64k' top
         stock-img create -q -f qcow2 -o preallocation=metadata,data_file=d external 8M
         stock-img create -q -f qcow2 -o preallocation=metadata,cluster_size=4k small 8M
         for image in empty some reserved top external small; do qemu-img map --output=json $image; done
         for image in empty some reserved top external small; do qemu-img map $image; done
         qemu-img map --output=json -s 1100k -l 1M some",
    );
}

/// The rule has a threshold: one cluster of a few that the host did not allocate is none of its business.
#[test]
fn one_hole_does_not_make_an_image_look_preallocated() {
    let holes = |count: usize| {
        let punch: String = (0..count)
            .map(|index| format!("fallocate -p -o $(((8 + {index}) * 65536)) -l 65536 image; "))
            .collect();
        format!(
            "stock-img create -q -f qcow2 image 8M; stock-io -f qcow2 -c 'write -P 1 0 2M' image; {punch} qemu-img map --output=json image"
        )
    };
    both(&(0..8).map(|count| holes(count) + "\n").collect::<String>());
}

#[test]
fn extended_entries_are_mapped_alike() {
    both(
        "stock-img create -q -f qcow2 -o extended_l2=on base 8M
         stock-io -f qcow2 -c 'write -P 1 1M 3k' -c 'write -z 1300k 8k' -c 'write -P 1 5M 2k' base
         stock-img create -q -f qcow2 -o extended_l2=on -b base -F qcow2 top
         stock-io -f qcow2 -c 'write -P 2 1026k 2k' -c 'write -z 5M 2k' -c 'discard 1M 64k' top
         stock-img create -q -f qcow2 -o extended_l2=on,preallocation=metadata full 8M
         stock-io -f qcow2 -c 'write -P 2 1026k 2k' full
         for image in base top full; do qemu-img map --output=json $image; qemu-img map $image; done",
    );
}

/// Under our own name the host is asked in any case: what it never wrote is zeros, and that is true
/// of one hole as well.
#[test]
fn our_own_map_knows_every_hole_of_the_host() {
    let ours = common::Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 image 8M");
    ours.prepare("stock-io -f qcow2 -c 'write -P 1 0 2M' image");
    ours.prepare("fallocate -p -o 524288 -l 65536 image");
    let qemu = ours.run("qemu-img map --output=json image");
    assert!(!qemu.text.contains("\"zero\": true, \"data\": true"), "{}", qemu.text);
    let own = ours.run("lacuna map --output=json image");
    let hole = "\"start\": 196608, \"length\": 65536, \"depth\": 0, \"present\": true, \
                \"zero\": true, \"data\": true, \"compressed\": false, \"hole\": true, \"offset\": 524288";
    assert!(own.text.contains(hole), "{}", own.text);
}
