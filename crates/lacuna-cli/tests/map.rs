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
