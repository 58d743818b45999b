//! Images named by options and by `json:`: the same disk, the same shown name, and the same words for
//! what is wrong as with the stock tools.

mod common;

use common::{Sandbox, both, both_in};

/// Makes an image with a backing file, a raw one, and one whose content is an image again.
const PREPARE: &str = "
    stock-img create -q -f qcow2 a.qcow2 64M
    stock-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
    stock-img create -q r.raw 1M
    stock-img create -q -f qcow2 in.qcow2 16M
    stock-img convert -f raw -O qcow2 in.qcow2 nest.qcow2
    stock-io -f qcow2 -c 'write -P 5 0 192k' -c 'write -P 6 1M 64k' a.qcow2
    stock-io -f raw -c 'write -P 9 0 4k' r.raw
    mkdir dir";

fn prepared() -> (Sandbox, Sandbox) {
    let folders = (Sandbox::stock(), Sandbox::ours());
    folders.0.prepare(PREPARE);
    folders.1.prepare(PREPARE);
    folders
}

#[test]
fn options_and_json_name_images_as_with_the_stock_tools() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        r#"
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,foo=bar
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,file.foo=bar
        qemu-io -c info --image-opts driver=file,filename=a.qcow2,foo=bar
        qemu-io -c info --image-opts driver=foo,filename=a.qcow2,foo=bar
        qemu-io -c info --image-opts driver=qcow2,file.driver=foo,file.filename=a.qcow2
        qemu-io -c info --image-opts driver=qcow2
        qemu-io -c info --image-opts driver=file
        qemu-io -c info --image-opts driver=host_device
        qemu-io -c info --image-opts driver=raw
        qemu-io -c info --image-opts filename=a.qcow2
        qemu-io -c info --image-opts file.filename=a.qcow2
        qemu-io -c info --image-opts driver=qcow2,filename=a.qcow2
        qemu-io -c info --image-opts driver=qcow2,file=a.qcow2
        qemu-io -c info --image-opts driver=qcow2,file.filename=nope
        qemu-io -c info --image-opts driver=qcow2,file.filename=r.raw
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,read-only=foo
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,file.locking=foo
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,discard=foo
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=foo
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap,discard=ignore
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,lazy-refcounts=foo
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,cache-size=foo
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,cache-size=1M,l2-cache-size=2M
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,l2-cache-entry-size=33k
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,overlap-check=foo
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,backing=foo
        qemu-io -c 'read -P 5 0 64k' --image-opts driver=qcow2,file.filename=b.qcow2
        qemu-io -c info --image-opts driver=qcow2,file.filename=b.qcow2,backing.foo=bar
        qemu-io -c info --image-opts driver=qcow2,file.filename=a.qcow2,backing.node-name=bar
        qemu-io -c 'read -v 0 512' --image-opts driver=qcow2,file.filename=b.qcow2,backing.driver=raw
        qemu-io -c info --image-opts driver=qcow2,file.filename=b.qcow2,backing.file.filename=nope
        qemu-io -c 'read -P 9 0 4k' --image-opts driver=qcow2,file.filename=b.qcow2,backing.driver=raw,backing.file.filename=r.raw
        qemu-io -c info --image-opts driver=raw,file.filename=r.raw,size=foo
        qemu-io -c info --image-opts driver=raw,file.filename=r.raw,offset=5
        qemu-io -c info -c length --image-opts driver=raw,file.filename=r.raw,offset=512,size=1k
        qemu-io -c info -c length --image-opts driver=raw,file.filename=r.raw,offset=512,size=1000
        qemu-io -c info -c length --image-opts driver=raw,file.filename=r.raw,offset=512,size=2M
        qemu-io -c info -c length --image-opts driver=raw,file.filename=r.raw,offset=2M
        qemu-io -c info -f qcow2 --image-opts driver=raw,file.filename=r.raw,offset=2M
        qemu-io -c info -f raw 'json:{"driver":"qcow2","file.filename":"a.qcow2"}'
        qemu-io -c info -f foo 'json:{"driver":"qcow2","file.filename":"a.qcow2"}'
        qemu-io -c info 'json:{"driver":"qcow2","file":"a.qcow2"}'
        qemu-io -c info 'json:{"driver":"qcow2","filename":"a.qcow2"}'
        qemu-io -c info 'json:{"driver":"qcow2","file":{"filename":"a.qcow2"}'
        qemu-io -c info 'json:{"driver":"qcow2","file":[]}'
        qemu-io -c info 'json:5'
        qemu-io -c info 'json:{"driver":"qcow2","file":{"filename":"a.qcow2"},"lazy-refcounts":5}'
        qemu-io -c info 'json:{"driver":"qcow2","file":{"filename":"a.qcow2"},"lazy-refcounts":true}'
        qemu-io -c info 'json:{"file":{"filename":"a.qcow2"},"foo":null}'
        qemu-io -c 'read -P 5 0 64k' 'json:{"driver":"qcow2","file":{"driver":"file","filename":"b.qcow2"}}'
        qemu-io -c 'read -P 0 0 64k' "json:{'driver':'qcow2','file':{'driver':'file','filename':'b.qcow2'},'backing':null}"
        qemu-io -c 'length' --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=nest.qcow2
        qemu-io -c 'write -P 7 1M 64k' -c 'read -P 7 1M 64k' --image-opts driver=qcow2,file.driver=qcow2,file.file.filename=nest.qcow2
        qemu-io -c 'open -o driver=qcow2 json:{"file.filename":"a.qcow2"}' -c info
        qemu-io -c 'open -o driver=qcow2 json:{"driver":"raw","file.filename":"a.qcow2"}' -c info
        qemu-io -c 'open -o driver=file,filename=dir'
        qemu-io -c 'open -r -o driver=file,filename=dir'
        qemu-io -c 'open -o driver=file,filename=/dev/null'
        qemu-io -c 'open -r -o driver=host_device,filename=dir'
        qemu-io -c 'open -o driver=host_device,filename=dir'
        qemu-io -c 'open -o driver=host_device,filename=/dev/null'
        qemu-io -c 'open -o driver=host_cdrom,filename=dir'
        qemu-io -c 'open -r -o driver=host_cdrom,filename=dir'
        qemu-io -c 'open -o driver=host_cdrom,filename=/dev/null'
        qemu-io -f raw -c length null-co://
        qemu-img info --image-opts driver=qcow2,file.filename=a.qcow2
        qemu-img map --image-opts driver=qcow2,file.filename=b.qcow2
        qemu-img check --image-opts driver=qcow2,file.filename=a.qcow2 --output=json
        qemu-img info 'json:{"driver":"qcow2","file":{"filename":"nope"}}'
        qemu-img info 'json:{"driver":"qcow2","file":{"filename":"r.raw"}}'
        qemu-img info 'json:{"driver":"qcow2","file":{"filename":"a.qcow2"},"foo":1}'
        qemu-img compare 'json:{"driver":"qcow2","file":{"filename":"a.qcow2"}}' 'json:{"driver":"qcow2","file":{"filename":"nope"}}'
        qemu-img compare 'json:{"driver":"qcow2","file":{"filename":"a.qcow2"}}' b.qcow2
        qemu-img info --image-opts driver=qcow2,file.filename=a.qcow2,file.aio=native
        qemu-img info --image-opts driver=qcow2,file.filename=a.qcow2,node-name=5
        qemu-img info --image-opts driver=qcow2,file.filename=a.qcow2,auto-read-only=on,force-share=on
        qemu-img info --image-opts driver=qcow2,file.filename=a.qcow2,force-share=foo
        qemu-img info --image-opts ''
        qemu-img info 'json:{}'
        qemu-img info json:
        qemu-img info 'json:{"driver":"qcow2",}'
        qemu-img info "json:{'driver':'qcow2' 'file':5}"
        qemu-img info 'foo:bar'
        qemu-img info 'host_device:/dev/null'
        qemu-img info 'host_device:a.qcow2'
        qemu-img info 'file:a.qcow2'
        qemu-img convert -O raw 'json:{"driver":"qcow2","file":{"filename":"b.qcow2"},"backing":null}' out.raw; cmp -n 64k out.raw /dev/zero
        qemu-img convert -f foo a.qcow2 out.raw
        qemu-img convert -n --target-image-opts a.qcow2 driver=qcow2,file.filename=nope
        "#,
    );
}

#[test]
fn a_part_of_a_file_is_a_disk() {
    let (stock, ours) = prepared();
    both_in(
        &stock,
        &ours,
        "
        qemu-io -c 'write -P 7 0 1k' --image-opts driver=raw,file.filename=r.raw,offset=512,size=1k
        qemu-io -c 'write 0 2k' --image-opts driver=raw,file.filename=r.raw,offset=512,size=1k
        qemu-io -f raw -c 'read -v 0 2k' r.raw
        ",
    );
}

#[test]
fn names_in_images_are_never_descriptions() {
    let ours = Sandbox::ours();
    ours.prepare(
        "stock-img create -q -u -f qcow2 -F raw -b 'json:{\"driver\":\"null-co\"}' x.qcow2 1M",
    );
    for tool in ["qemu-io", "lacuna io"] {
        let outcome = ours.run(&format!("{tool} -c 'read 0 512' x.qcow2"));
        assert!(
            outcome.code == Some(1) && outcome.text.contains("only plain names"),
            "{outcome:?}"
        );
    }
}

#[test]
fn disks_without_content_take_what_is_written() {
    both(
        "
        qemu-io -f raw -c length null-co://
        qemu-io -c length 'json:{\"driver\":\"null-co\",\"size\":65536}'
        qemu-io -f raw -c 'write -P 5 0 64k' null-co://
        qemu-img convert -n -O raw null-co:// null-co://
        ",
    );
}
