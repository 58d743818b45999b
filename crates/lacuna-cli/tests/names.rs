//! Where the name the program is called by makes a difference: a row each, run under both names,
//! and the table in `docs/qemu-differences.md`, which has to say the same.

mod common;

use common::Sandbox;

/// One difference.
struct Row {
    /// The three cells in the document.
    matter: &'static str,
    qemu: &'static str,
    lacuna: &'static str,
    /// What is run before, with stock tools.
    prepare: &'static str,
    /// What is run; `IMG` is `qemu-img` or `lacuna`, `IO` is `qemu-io` or `lacuna io`.
    line: &'static str,
    /// All that it prints under our own name; under the other one it is what stock prints.
    ours: &'static str,
}

const ROWS: &[Row] = &[
    Row {
        matter: "`convert -n`: zeros where the target itself reads as zeros already",
        qemu: "written again, with tables for them",
        lacuna: "left alone, unless it has a backing file",
        prepare: "stock-img create -q -f qcow2 a 1M; stock-img create -q -f qcow2 b 1M",
        line: "IMG convert -n -O qcow2 a b && stock-img map --output=json b",
        ours: r#"[{ "start": 0, "length": 1048576, "depth": 0, "present": false, "zero": true, "data": false, "compressed": false}]
"#,
    },
    Row {
        matter: "`convert --salvage`: what cannot be read",
        qemu: "a line for each sector",
        lacuna: "a line for each run of them",
        prepare: "stock-img create -q -f qcow2 image 128k
                  stock-io -c 'write -c -P 3 0 64k' image
                  dd if=/dev/zero of=image bs=512 seek=640 count=1 conv=notrunc status=none",
        line: "IMG convert --salvage -f qcow2 image raw",
        ours: "lacuna: warning: 65536 bytes at 0 are lost and read as zeros: Compressed cluster at \
               host offset 0x50000: Compressed stream is invalid: deflate decompression error: \
               invalid stored block lengths\n",
    },
    Row {
        matter: "`map --output=json`: zeros with space reserved for them",
        qemu: "`data` is false, as where there is no space",
        lacuna: "the same, and `hole` says whether there is space",
        prepare: "stock-img create -q -f qcow2 image 256k
                  stock-io -c 'write 0 128k' -c 'write -z 0 64k' -c 'write -zu 64k 64k' image",
        line: "IMG map --output=json image",
        ours: r#"[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false, "compressed": false, "hole": false, "offset": 327680},
{ "start": 65536, "length": 65536, "depth": 0, "present": true, "zero": true, "data": false, "compressed": false, "hole": true},
{ "start": 131072, "length": 131072, "depth": 0, "present": false, "zero": true, "data": false, "compressed": false, "hole": true}]
"#,
    },
    Row {
        matter: "`map --output=json` of extended L2: reserved subclusters that hold nothing",
        qemu: "`present` is false, and there is an `offset` all the same",
        lacuna: "the same, and `hole` is false: the space is taken",
        prepare: "stock-img create -q -f qcow2 -o extended_l2=on image 64k
                  stock-io -c 'write -P 1 0 4k' image",
        line: "IMG map --output=json image",
        ours: r#"[{ "start": 0, "length": 4096, "depth": 0, "present": true, "zero": false, "data": true, "compressed": false, "hole": false, "offset": 327680},
{ "start": 4096, "length": 61440, "depth": 0, "present": false, "zero": true, "data": false, "compressed": false, "hole": false, "offset": 331776}]
"#,
    },
    Row {
        matter: "`map` for people",
        qemu: "a line for what lies in files as it is; an error where something is compressed",
        lacuna: "a line for every run, with depth, content and space in columns of their own; \
                 `--picture` draws the disk",
        prepare: "stock-img create -q -f qcow2 image 256k
                  stock-io -c 'write 0 128k' -c 'write -z 0 64k' -c 'write -c 128k 64k' image",
        line: "IMG map image",
        ours: "Offset          Length          Mapped to       Depth  Content     Space  File\n\
               0               0x10000         0x50000         0      zeros       taken  image\n\
               0x10000         0x10000         0x60000         0      data        taken  image\n\
               0x20000         0x10000         -               0      compressed  taken  image\n\
               0x30000         0x10000         -               -      zeros       none   -\n",
    },
    Row {
        matter: "a discard of less than a cluster, with extended L2 entries",
        qemu: "ignored",
        lacuna: "zeroes the subclusters, and frees a cluster whose last data goes",
        prepare: "stock-img create -q -f qcow2 -o extended_l2=on image 64k
                  stock-io -c 'write -P 1 0 4k' image",
        line: "IO -c 'discard -q 0 4k' image && IMG map --output=json image",
        ours: r#"[{ "start": 0, "length": 4096, "depth": 0, "present": true, "zero": true, "data": false, "compressed": false, "hole": true},
{ "start": 4096, "length": 61440, "depth": 0, "present": false, "zero": true, "data": false, "compressed": false, "hole": true}]
"#,
    },
    Row {
        matter: "an image that says in private bits that it is all zeros",
        qemu: "`info` says nothing of it",
        lacuna: "`info` says so",
        prepare: "stock-img create -q -f qcow2 image 64k
                  printf '\\x0c' | dd of=image bs=1 seek=95 conv=notrunc status=none",
        line: "IMG info image | grep -c '^    all zero: true$\\|^    all unallocated: true$'; true",
        ours: "2\n",
    },
    Row {
        matter: "how much of an image is data, zeros, unallocated, shared",
        qemu: "`info` says nothing of it",
        lacuna: "`info` says so of images with small tables, `info --totals` of any",
        prepare: "stock-img create -q -f qcow2 image 256k; stock-io -c 'write 0 64k' image",
        line: "IMG info image | grep -A 2 ^totals; true",
        ours: "totals of the image's own tables:\n    data: 64 KiB (65536 bytes)\n    compressed: 0 B \
               (0 bytes)\n",
    },
    Row {
        matter: "a backing file whose format the image does not name",
        qemu: "probed",
        lacuna: "refused without `--probe-backing`: a guest could have written a header",
        // The extension with the backing format becomes one that nobody knows.
        prepare: "stock-img create -q -f qcow2 base 1M
                  stock-img create -q -f qcow2 -b base -F qcow2 image
                  printf '\\x12' | dd of=image bs=1 seek=$((0x70)) conv=notrunc status=none",
        line: "IMG map image",
        ours: "lacuna: Could not open 'image': The image does not say of which format \
               its backing file is, and guessing is not allowed\n\
               hint: --probe-backing looks at its content; do that only where no guest could write \
               it\n",
    },
    Row {
        matter: "where new clusters go",
        qemu: "behind the last ones, by one cursor, as QEMU does",
        lacuna: "into gaps that larger allocations skip: files stay shorter",
        prepare: "stock-img create -q -f qcow2 image 8M
                  stock-io -c 'write -P 1 0 1M' -c 'discard 64k 64k' image",
        line: "IO -c 'write -q -P 2 2M 128k' -c 'write -q -P 3 4M 64k' image; stock-img map image",
        ours: "Offset          Length          Mapped to       File\n\
               0               0x10000         0x50000         image\n\
               0x20000         0xe0000         0x70000         image\n\
               0x200000        0x20000         0x150000        image\n\
               0x400000        0x10000         0x60000         image\n",
    },
    Row {
        matter: "names in images that would steer a terminal",
        qemu: "printed as they are",
        lacuna: "spelt out: `\\x1b[31m`",
        prepare: r"stock-img create -q -f qcow2 -u -b $'b\e[31m' -F raw image 1M",
        line: "IMG info image | grep -a 'backing file:'",
        ours: "backing file: b\\x1b[31m\n",
    },
    Row {
        matter: "`rebase`: zeros of the old backing file, where the new one has data",
        qemu: "written into the image as bytes",
        lacuna: "zero clusters, which take no space",
        prepare: "stock-img create -q -f qcow2 old 64k; stock-img create -q -f qcow2 new 64k
                  stock-io -c 'write -P 1 0 64k' new
                  stock-img create -q -f qcow2 -b old -F qcow2 image",
        line: "IMG rebase -b new -F qcow2 image; stock-img map image | wc -l",
        ours: "1\n",
    },
    Row {
        matter: "findings of `check`",
        qemu: "what was found",
        lacuna: "also whether it is harmful",
        // A reference to the last cluster, and the refcount of a cluster that nobody uses.
        prepare: "stock-img create -q -f qcow2 image 1M
                  stock-io -c 'write 0 64k' image
                  printf '\\x00\\x01' | dd of=image bs=1 seek=$((0x20000 + 2 * 8)) conv=notrunc status=none
                  truncate -s 640k image",
        line: "IMG check image",
        ours: "Leaked cluster 8 refcount=1 reference=0 (harmless)\n\
               \n\
               1 leaked clusters were found on the image.\n\
               This means waste of disk space, but no harm to data.\n\
               1/16 = 6.25% allocated, 0.00% fragmented, 0.00% compressed clusters\n\
               Image end offset: 589824\n",
    },
    Row {
        matter: "a conversion that fails or is interrupted",
        qemu: "leaves its half-made target",
        lacuna: "removes it",
        // A compressed cluster that is none.
        prepare: "stock-img create -q -f raw raw 1M; stock-io -f raw -c 'write -P 5 0 1M' raw >&2
                  stock-img convert -c -O qcow2 raw image
                  printf '\\xff\\xff\\xff\\xff' | dd of=image bs=1 seek=$((0x50000)) conv=notrunc \
                  status=none",
        line: "IMG convert -O raw image target 2>/dev/null; ls target 2>&1",
        ours: "ls: cannot access 'target': No such file or directory\n",
    },
    Row {
        matter: "an image that somebody else has",
        qemu: "asks whether another process is using it",
        lacuna: "names the process and says how to read it all the same",
        prepare: "stock-img create -q -f qcow2 image 1M",
        line: "held image
               timeout 60 IMG info image 2>&1 | sed 's/pid [0-9]*/pid PID/'; exec 3>&-; wait",
        ours: "lacuna: Could not open 'image': image is in use: stock-io (pid PID) writes to it\n\
               hint: --force-share (-U) reads it all the same; what is read may be half changed\n",
    },
    Row {
        matter: "errors",
        qemu: "in QEMU's words",
        lacuna: "also a hint, where there is something that helps",
        prepare: "",
        line: "IMG create -f foo image 1M",
        ours: "lacuna: image: Unknown file format 'foo'\nhint: formats are qcow2 and raw\n",
    },
    Row {
        matter: "a verb that does not exist",
        qemu: "not found",
        lacuna: "also the nearest one",
        prepare: "",
        line: "IMG inof image 2>&1 | sed 1q; IMG inof image 2>&1 | grep hint || true",
        ours: "lacuna: Command not found: inof\nhint: info is the nearest\n",
    },
    Row {
        matter: "the options `--error-format` and `--probe-backing`",
        qemu: "do not exist, so that they make no shortened name ambiguous",
        lacuna: "exist",
        prepare: "",
        line: "IMG info --error-format=json --probe-backing image 2>&1 | sed \"s/'[^']*IMG/'IMG/\"",
        ours: "{\"error\":\"not_found\",\"message\":\"Could not open 'image': No \
               such file or directory\",\"hint\":null,\"verb\":\"info\",\"exit_code\":1,\
               \"file\":\"image\"}\n",
    },
    Row {
        matter: "`-p`",
        qemu: "`(12.00/100%)` on standard output",
        lacuna: "a bar on a terminal, lines on standard error elsewhere, `--progress=json`",
        prepare: "stock-img create -q -f qcow2 image 1M; cp image other",
        line: "IMG compare -p image other 2>/dev/null | tr '\\r' '|'",
        ours: "Images are identical.\n",
    },
    Row {
        matter: "no verb at all",
        qemu: "an error",
        lacuna: "what there is, on one screen",
        prepare: "",
        line: "IMG 2>&1 | sed -n '1p'",
        ours: "lacuna: disk images made, described, checked, repaired and copied\n",
    },
    Row {
        matter: "verbs of our own: `completions`, `demo`, `help`, `io`, `man`",
        qemu: "do not exist",
        lacuna: "exist",
        prepare: "",
        line: "IMG help man 2>&1 | sed 1q",
        ours: "Print a manual page\n",
    },
    Row {
        matter: "the prompt of the shell",
        qemu: "`qemu-io> `",
        lacuna: "`lacuna> `",
        prepare: "",
        line: "echo quit | IO",
        ours: "lacuna> ",
    },
];

impl Row {
    fn line(&self, img: &str, io: &str) -> String {
        self.line.replace("IMG", img).replace("IO", io)
    }

    /// The row as the document has it.
    fn cells(&self) -> String {
        format!("| {} | {} | {} |", self.matter, self.qemu, self.lacuna)
    }

    /// Says how it differs from what the row claims.
    fn difference(&self) -> String {
        let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
        for sandbox in [&stock, &ours].into_iter().filter(|_| !self.prepare.is_empty()) {
            sandbox.prepare(&format!("set -e; {{ {}\n}} >&2", self.prepare));
        }
        // Our own name last: lines may change the image.
        let theirs = self.line("qemu-img", "qemu-io");
        let (expected, got) = (stock.run(&theirs), ours.run(&theirs));
        let (own, fresh) = (self.line("lacuna", "lacuna io"), Sandbox::ours());
        if !self.prepare.is_empty() {
            fresh.prepare(&format!("set -e; {{ {}\n}} >&2", self.prepare));
        }
        let own = fresh.run(&own);
        let mut text = String::new();
        if expected != got {
            text += &format!("stock: {expected:#?}\nunder its name: {got:#?}\n");
        }
        // Every line ends with a line end there.
        if own.text.trim_end_matches('\n') != self.ours.trim_end_matches('\n') {
            text += &format!("expected: {:?}\nunder our name: {:?}\n", self.ours, own.text);
        }
        if own.text == expected.text {
            text += "there is no difference\n";
        }
        text
    }
}

#[test]
fn each_name_behaves_as_the_table_says() {
    let mut all = String::new();
    for row in ROWS {
        let difference = row.difference();
        if !difference.is_empty() {
            all += &format!("\n{}: {}\n{difference}", row.matter, row.line);
        }
    }
    assert!(all.is_empty(), "{all}");
}

#[test]
fn the_document_has_the_same_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/qemu-differences.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (_, section) = document.split_once("\n## Where the names differ\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| ")).skip(1);
    let rows: Vec<&str> = rows.collect();
    let expected: Vec<String> = ROWS.iter().map(Row::cells).collect();
    assert_eq!(rows, expected, "the table should be:\n{}", expected.join("\n"));
}
