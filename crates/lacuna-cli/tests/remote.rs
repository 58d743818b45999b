//! Disks that are exports of NBD servers: qemu-nbd's, nbdkit's and our own.

mod common;

use common::{Outcome, Sandbox};
use testkit::certificates::{Authority, LOCAL};

/// What to do where it is missing.
const NBDKIT: &str = "nbdkit is missing: apt-get install nbdkit";

const IMAGES: &str = "
    set -e
    stock-img create -q -f raw disk.raw 4M
    stock-io -f raw -c 'write -P 5 64k 64k' -c 'write -P 6 1M 4k' disk.raw >&2
    stock-img create -q -f qcow2 base.qcow2 4M
    stock-io -f qcow2 -c 'write -P 5 0 1M' base.qcow2 >&2
    stock-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2 8M
    stock-io -f qcow2 -c 'write -P 7 1M 64k' -c 'write -z 2M 1M' disk.qcow2 >&2";

fn prepared(sandbox: Sandbox) -> Sandbox {
    sandbox.prepare(IMAGES);
    sandbox
}

fn ours() -> Sandbox {
    prepared(Sandbox::ours())
}

/// Runs lines while qemu-nbd serves one image, which it takes as it is for `raw`.
fn served(sandbox: &Sandbox, server: &str, lines: &str) -> Outcome {
    let start = format!("stock-nbd -t --pid-file $PWD/pid -k $PWD/s {server} & nbd=$!");
    let ready = "while ! [ -s pid ]; do kill -0 $nbd || exit 99; sleep 0.01; done";
    let end = "code=$?; kill $nbd; wait $nbd 2>/dev/null; exit $code";
    sandbox.run(&format!("rm -f pid s; {start}\n{ready}\n(\n{lines}\n)\n{end}"))
}

/// Runs a line while nbdkit serves; the line finds the URI in `$uri`.
fn nbdkit(sandbox: &Sandbox, server: &str, line: &str) -> Outcome {
    assert!(std::path::Path::new("/usr/bin/nbdkit").exists(), "{NBDKIT}");
    sandbox.run(&format!("nbdkit -U - {server} --run {}", quoted(line)))
}

fn quoted(line: &str) -> String {
    format!("'{}'", line.replace('\'', r"'\''"))
}

fn fine(outcome: &Outcome) {
    assert_eq!(outcome.code, Some(0), "{}", outcome.text);
}

#[test]
fn every_verb_says_of_an_export_what_stock_says() {
    let (stock, ours) = (prepared(Sandbox::stock()), ours());
    let json = r#"'json:{"driver":"nbd","server":{"type":"unix","path":"s"},"export":"x"}'"#;
    let lines = [
        "qemu-img info nbd+unix:///x?socket=s",
        "qemu-img info --output=json nbd+unix:///x?socket=s",
        "qemu-img info -f raw nbd:unix:s:exportname=x",
        "qemu-img info --image-opts driver=nbd,path=s,export=x",
        "qemu-img info --image-opts driver=nbd,server.type=unix,server.path=s,export=x,reconnect-delay=3",
        "qemu-img info --image-opts driver=raw,file.driver=nbd,file.path=s,file.export=x",
        &format!("qemu-img info {json}"),
        "qemu-img map --output=json nbd+unix:///x?socket=s",
        "qemu-img map nbd+unix:///x?socket=s",
        "qemu-img measure -O qcow2 nbd+unix:///x?socket=s",
        "qemu-img check nbd+unix:///x?socket=s",
        "qemu-img compare -f raw -F raw nbd+unix:///x?socket=s disk.raw",
        "qemu-img dd -f raw -O raw if=nbd+unix:///x?socket=s of=part bs=64k count=3",
        "qemu-img resize -f raw nbd+unix:///x?socket=s 8M",
        "qemu-img create -f raw nbd+unix:///x?socket=s 8M",
        "qemu-img create -f raw nbd+unix:///x?socket=s 4M",
        "qemu-img create -f qcow2 nbd+unix:///x?socket=s 1M",
        "qemu-img info nbd+unix:///y?socket=s",
        "qemu-img info nbd+unix:///x?socket=nobody",
        "qemu-img info nbd:",
        "qemu-img info --image-opts driver=nbd",
        "qemu-img info --image-opts driver=nbd,host=a,path=b",
        "qemu-io -f raw -c 'write -P 3 3M 64k' -c 'write -z 3M 4k' -c 'discard 0 64k' \
         -c 'read -P 3 3076k 32k' nbd+unix:///x?socket=s",
        "qemu-img map --output=json nbd+unix:///x?socket=s",
    ];
    for image in ["-f raw disk.raw", "-f raw base.qcow2", "-f qcow2 disk.qcow2"] {
        for line in lines {
            let run = |sandbox| served(sandbox, &format!("-x x {image}"), line);
            let (theirs, own) = (run(&stock), run(&ours));
            assert_eq!(own, theirs, "{image}: {line}");
        }
    }
}

#[test]
fn zeros_do_not_cross_the_wire_in_either_direction() {
    let sandbox = ours();
    let line = "lacuna convert -f raw -O qcow2 $uri copy.qcow2 && cp log log.read && \
                stock-img compare -f raw -F qcow2 $uri copy.qcow2";
    fine(&nbdkit(
        &sandbox,
        "--filter=log sparse-random 64M seed=1 percent=5 runlength=65536 logfile=log",
        line,
    ));
    // Into an export that has something else where the source has zeros.
    let line = "stock-io -f raw -c \"write -P 9 0 64M\" $uri >/dev/null && : >log && \
                lacuna convert -n -f qcow2 -O raw copy.qcow2 $uri && cp log log.convert && \
                stock-img compare -f raw -F qcow2 $uri copy.qcow2";
    fine(&nbdkit(&sandbox, "--filter=log memory 64M logfile=log", line));
    let sum = |kind: &str, log: &str| {
        let found = sandbox.run(&format!(
            "grep -a ' {kind} ' {log} | sed -n 's/.*count=\\(0x[0-9a-f]*\\).*/\\1/p' | \
             while read n; do echo $((n)); done | awk '{{ s += $1 }} END {{ print s + 0 }}'"
        ));
        found.text.trim().parse::<u64>().unwrap_or_else(|_| panic!("{}", found.text))
    };
    let (written, zeroed) = (sum("Write", "log.convert"), sum("Zero", "log.convert"));
    let read = sum("Read", "log.read");
    assert!(read > 0 && read < 8 << 20, "{read} bytes were read");
    assert!(written > 0 && written < 8 << 20, "{written} bytes were written");
    assert!(zeroed > 48 << 20, "{zeroed} bytes were zeroed");
    assert_eq!(written + zeroed, 64 << 20);
}

#[test]
fn servers_that_offer_less_get_the_same_content() {
    let sandbox = ours();
    sandbox.prepare("stock-img convert -O raw disk.qcow2 expected.raw");
    for server in [
        "memory 8M",
        "--no-sr memory 8M",
        "--filter=nozero memory 8M",
        "--filter=noextents memory 8M",
        "--no-sr --filter=nozero --filter=noextents memory 8M",
        "--filter=nozero --filter=blocksize-policy memory 8M blocksize-minimum=4096 \
         blocksize-preferred=4096 blocksize-maximum=64k blocksize-error-policy=error",
        "--filter=blocksize-policy memory 8M blocksize-minimum=64k blocksize-preferred=64k \
         blocksize-maximum=1M blocksize-error-policy=error",
        "--filter=delay memory 8M delay-read=1ms delay-write=1ms",
    ] {
        let line = "stock-io -f raw -c \"write -P 9 0 8M\" $uri >/dev/null; \
                    lacuna convert -n -f qcow2 -O raw disk.qcow2 $uri && \
                    lacuna compare -f raw -F raw $uri expected.raw && \
                    lacuna io -f raw -c \"write -P 8 5000 3000\" -c \"read -P 8 5000 3000\" \
                        -c \"write -P 8 1000 200000\" -c \"write -z 4097 9000\" $uri >/dev/null && \
                    stock-io -f raw -c \"read -P 8 1000 3097\" -c \"read -P 0 4097 9000\" \
                        -c \"read -P 8 13097 187903\" $uri && \
                    lacuna convert -f raw -O raw $uri back.raw && cmp -n 1000 back.raw expected.raw";
        let got = nbdkit(&sandbox, server, line);
        fine(&got);
        assert!(!got.text.contains("failed"), "{server}: {}", got.text);
    }
}

#[test]
fn an_export_can_be_a_backing_file_and_its_format_is_never_guessed() {
    let sandbox = ours();
    let lines = "stock-img create -q -f qcow2 -u -b nbd+unix:///x?socket=$PWD/s -F raw top.qcow2 8M
        stock-io -f qcow2 -c 'write -P 1 0 64k' top.qcow2 >/dev/null
        stock-io -r -c 'read -P 1 0 64k' -c 'read -P 5 64k 64k' top.qcow2
        lacuna io -r -c 'read -P 1 0 64k' -c 'read -P 5 64k 64k' top.qcow2
        lacuna convert -O raw top.qcow2 ours.raw && stock-img convert -O raw top.qcow2 stock.raw
        cmp ours.raw stock.raw || exit 5
        lacuna info --backing-chain top.qcow2 || exit 6
        mkdir d && lacuna create -q -f qcow2 -b nbd+unix:///x?socket=s -F raw d/new.qcow2 || exit 8
        lacuna compare -U -F raw d/new.qcow2 disk.raw || exit 9
        lacuna convert -U -O qcow2 -B nbd+unix:///x?socket=s -F raw disk.raw d/thin.qcow2 || exit 10
        lacuna compare -U -F raw d/thin.qcow2 disk.raw || exit 11
        stock-img create -q -f qcow2 -u -b nbd+unix:///x?socket=$PWD/s none.qcow2 8M \
            2>/dev/null || python3 -c '
data = bytearray(open(\"top.qcow2\", \"rb\").read())
at = data.index(bytes.fromhex(\"e2792aca\")); data[at:at + 4] = bytes.fromhex(\"12345678\")
open(\"none.qcow2\", \"wb\").write(data)'
        lacuna convert --probe-backing -O raw none.qcow2 guessed.raw && exit 7
        true";
    let got = served(&sandbox, "-x x -f raw disk.raw", lines);
    fine(&got);
    assert!(!got.text.contains("failed"), "{}", got.text);
    assert!(got.text.contains("never guessed"), "{}", got.text);
}

#[test]
fn a_server_that_dies_half_way_is_told_with_its_name_and_a_place() {
    let sandbox = ours();
    // Without block status all of it has to be read, which takes a while.
    let server =
        "-P pid --no-sr --filter=log --filter=delay memory 1G logfile=log delay-read=200ms";
    let line = "while ! [ -s pid ]; do sleep 0.01; done; pid=$(cat pid); \
                (while ! grep -q ' Read ' log; do sleep 0.01; done; kill -9 $pid) & \
                lacuna convert -f raw -O qcow2 $uri half.qcow2; echo code $?; ls half.qcow2";
    let got = nbdkit(&sandbox, server, line);
    assert!(got.text.contains("nbd+unix://"), "{}", got.text);
    assert!(got.text.contains("code 1"), "{}", got.text);
    assert!(got.text.contains("The connection is lost"), "{}", got.text);
    assert!(!got.text.contains("\nhalf.qcow2"), "what is half made goes: {}", got.text);
}

#[test]
fn a_server_that_comes_back_is_read_on_from() {
    let sandbox = ours();
    sandbox.prepare(
        "stock-img create -q -f raw big.raw 64M; stock-io -f raw -c 'write -P 3 0 64M' big.raw",
    );
    let serve = "nbdkit -U $PWD/s -P $PWD/pid --filter=delay --no-sr file big.raw delay-read=20ms";
    let got = sandbox.run(&format!(
        "{serve}; (for i in 1 2 3; do sleep 0.3; kill -9 $(cat pid); rm -f s pid; {serve}; done) & \
         lacuna convert --image-opts -O raw -m 1 \
             driver=raw,file.driver=nbd,file.path=$PWD/s,file.reconnect-delay=20 copy.raw; code=$?; \
         wait; kill $(cat pid); cmp copy.raw big.raw && exit $code"
    ));
    fine(&got);
}

#[test]
fn our_own_server_and_client_understand_each_other() {
    let sandbox = ours();
    sandbox.prepare("stock-img convert -O raw disk.qcow2 expected.raw");
    let line = "lacuna compare -f raw -F raw \"$uri\" expected.raw && \
                lacuna io -f raw -c \"write -P 4 7M 64k\" \"$uri\" >/dev/null && \
                qemu-img map -f raw --output=json \"$uri\" >ours.json && \
                stock-img map -f raw --output=json \"$uri\" >stock.json && cmp ours.json stock.json";
    fine(&sandbox.run(&format!("lacuna serve -f qcow2 disk.qcow2 --run {}", quoted(line))));
    let got = sandbox.run("stock-io -c 'read -P 4 7M 64k' disk.qcow2");
    assert!(!got.text.contains("failed"), "{}", got.text);
}

#[test]
fn an_export_that_takes_no_changes_says_so() {
    let sandbox = ours();
    let got = served(
        &sandbox,
        "-r -f raw disk.raw",
        "lacuna io -f raw -c 'write 0 4k' nbd+unix:///?socket=s",
    );
    assert_ne!(got.code, Some(0));
    assert!(got.text.contains("read-only"), "{}", got.text);
}

#[test]
fn a_qcow2_image_can_live_on_an_export() {
    let sandbox = ours();
    let line = "lacuna create -f qcow2 $uri 16M && \
                lacuna convert -n -O qcow2 disk.qcow2 $uri && \
                stock-img check -f qcow2 $uri && stock-img compare -F qcow2 disk.qcow2 $uri && \
                lacuna compare -F qcow2 disk.qcow2 $uri";
    fine(&nbdkit(&sandbox, "memory 32M", line));
}

#[test]
fn a_server_that_never_answers_can_be_left() {
    let sandbox = ours();
    let listener = std::os::unix::net::UnixListener::bind(sandbox.path("s")).unwrap();
    let mut client = std::process::Command::new(sandbox.program("lacuna"))
        .args(["convert", "-O", "raw", "nbd+unix:///?socket=s", "copy.raw"])
        .current_dir(sandbox.path("."))
        .spawn()
        .unwrap();
    let (_socket, _) = listener.accept().unwrap();
    sandbox.prepare(&format!("kill -INT {}", client.id()));
    assert!(!client.wait().unwrap().success());
}

#[test]
fn an_image_elsewhere_may_stand_on_an_export() {
    let sandbox = ours();
    let line = "mkdir sub && lacuna create -q -f qcow2 -b \"$uri\" -F raw sub/a.qcow2 && \
                qemu-img create -q -f qcow2 -b nbd:unix:$unixsocket -F raw sub/b.qcow2 && \
                stock-img info sub/a.qcow2 | grep -c 1.MiB && \
                lacuna compare sub/a.qcow2 sub/b.qcow2 && qemu-io -r -f raw -c 'read 0 4k' \"$uri\"";
    fine(&nbdkit(&sandbox, "memory 1M", line));
}

#[test]
fn certificates_come_from_the_uri_or_an_object_and_strangers_are_refused() {
    let sandbox = ours();
    sandbox.prepare("mkdir pki strange");
    let (authority, stranger) = (Authority::new("ours"), Authority::new("strange"));
    authority.trusted_in(&sandbox.path("pki"));
    authority.server_in(&sandbox.path("pki"), &LOCAL);
    authority.client_in(&sandbox.path("pki"));
    stranger.trusted_in(&sandbox.path("strange"));
    let server = "--object tls-creds-x509,id=t,endpoint=server,dir=$PWD/pki --tls-creds t -x x \
                  -f raw disk.raw";
    let object = "--object tls-creds-x509,id=c,endpoint=client,dir";
    let lines = format!(
        "uri='nbds+unix:///x?socket=s&tls-certificates'
        lacuna compare -f raw -F raw \"$uri=pki\" disk.raw || exit 1
        lacuna compare -f raw -F raw \"$uri=pki&tls-hostname=localhost\" disk.raw || exit 2
        by=driver=raw,file.driver=nbd,file.path=s,file.export=x,file.tls-creds
        lacuna map {object}=pki --image-opts $by=c,file.tls-hostname=localhost || exit 3
        lacuna convert {object}=pki --image-opts -O qcow2 $by=c copy.qcow2 || exit 4
        lacuna compare -F raw copy.qcow2 disk.raw || exit 5
        lacuna map \"$uri=strange\" && exit 6
        lacuna map \"$uri=pki&tls-hostname=other.example\" && exit 7
        lacuna map 'nbds+unix:///x?socket=s' && exit 8
        lacuna map --image-opts $by=c && exit 9
        lacuna map 'nbd+unix:///x?socket=s' && exit 10
        true"
    );
    let got = served(&sandbox, server, &lines);
    fine(&got);
    for said in ["ca-cert.pem does not stand behind it", "it is not for other.example"] {
        assert!(got.text.contains(said), "{said}: {}", got.text);
    }
    assert!(
        got.text.contains("nbds+unix://"),
        "plaintext is told what would be right: {}",
        got.text
    );
}

/// Runs lines while our server offers `target.qcow2` with `RESIZE` as `$uri`.
fn growing(sandbox: &Sandbox, lines: &str) -> Outcome {
    let run = "--run 'bash lines'";
    std::fs::write(sandbox.path("lines"), lines).unwrap();
    sandbox.run(&format!("lacuna serve --resize -f qcow2 {run} target.qcow2"))
}

#[test]
fn a_target_grows_where_its_server_offers_that() {
    let sandbox = ours();
    let start = "rm -f target.qcow2; stock-img create -q -f qcow2 target.qcow2 1M";
    for (lines, size) in [
        ("lacuna resize -f raw $uri 6M", "6291456"),
        ("lacuna resize -f raw $uri +1M && lacuna resize --shrink -f raw $uri 512k", "524288"),
        ("lacuna create -f raw $uri 3M", "3145728"),
        (
            "lacuna convert -O raw disk.qcow2 $uri && lacuna compare -F raw disk.qcow2 $uri",
            "8388608",
        ),
        (
            "lacuna convert -O qcow2 disk.raw $uri && lacuna check -f qcow2 $uri && \
             lacuna compare -f raw -F qcow2 disk.raw $uri",
            "",
        ),
        // More than the export has is written to the image within, by many requests at once.
        (
            "lacuna create -f qcow2 $uri 64M && lacuna io -f qcow2 -c 'write -P 9 5M 40M' \
             -c 'write -z -u 50M 4M' $uri && lacuna check -f qcow2 $uri && \
             lacuna io -f qcow2 -c 'read -P 9 5M 40M' $uri",
            "",
        ),
    ] {
        sandbox.prepare(start);
        fine(&growing(&sandbox, lines));
        sandbox.prepare("stock-img check -q target.qcow2");
        let info = sandbox.run("stock-img info --output=json target.qcow2").text;
        assert!(info.contains(&format!("\"virtual-size\": {size}")), "{lines}: {info}");
    }
    sandbox.prepare(start);
    let refused = growing(&sandbox, "lacuna resize -f raw --preallocation=full $uri 6M");
    assert!(refused.text.contains("cannot be reserved in an export"), "{}", refused.text);
    // Nobody asked for another size here.
    let kept = growing(&sandbox, "lacuna convert -n -O raw disk.qcow2 $uri");
    assert!(kept.text.contains("is smaller (1048576 bytes)"), "{}", kept.text);
}

#[test]
fn a_zeroing_that_has_to_be_durable_is_one_request() {
    let sandbox = ours();
    for server in
        ["--filter=log memory 8M logfile=log", "--filter=log --filter=nozero memory 8M logfile=log"]
    {
        let line = "lacuna io -f raw -c \"write -f -P 9 0 64k\" -c \"write -z -f 64k 64k\" $uri && \
                    lacuna io -c \"write -f -P 9 0 64k\" -c \"write -z -f 64k 64k\" \
                    \"json:{'driver':'raw','file':{'driver':'blkdebug','image':{'driver':'nbd',\
                    'server':{'type':'unix','path':'$unixsocket'}}}}\" && cp log told";
        fine(&nbdkit(&sandbox, server, line));
        let log = sandbox.run("grep -ac 'fua=1' told; grep -ac ' Flush ' told").text;
        let counts: Vec<u32> = log.lines().map(|count| count.parse().unwrap()).collect();
        // One flush for each of the two when they close.
        assert!(counts[0] == 4 && counts[1] <= 2, "{server}: {counts:?}");
    }
}

#[test]
fn a_bitmap_is_seen_as_stock_sees_it() {
    let (stock, ours) = (prepared(Sandbox::stock()), ours());
    let bitmap = "stock-img bitmap --add disk.qcow2 b && \
                  stock-io -f qcow2 -c 'write -P 3 4M 64k' disk.qcow2 >&2";
    for sandbox in [&stock, &ours] {
        sandbox.prepare(bitmap);
    }
    let options = "driver=nbd,server.type=unix,server.path=s,export=x,x-dirty-bitmap=";
    for (context, verb) in
        [("qemu:dirty-bitmap:b", "map --output=json"), ("qemu:dirty-bitmap:b", "map")]
    {
        let line = format!("qemu-img {verb} --image-opts {options}{context}");
        let run = |sandbox| served(sandbox, "-B b -x x -f qcow2 disk.qcow2", &line);
        assert_eq!(run(&ours), run(&stock), "{line}");
    }
    let line = format!("qemu-img map --image-opts {options}qemu:dirty-bitmap:c");
    let missing = served(&ours, "-B b -x x -f qcow2 disk.qcow2", &line);
    assert!(missing.text.contains("has no meta context qemu:dirty-bitmap:c"), "{}", missing.text);
    // Nothing is taken for zeros by what another context says.
    ours.prepare("stock-img convert -O raw disk.qcow2 expected.raw");
    let line = format!(
        "lacuna convert --image-opts -O raw {options}qemu:allocation-depth copy.raw && \
         stock-img compare -f raw -F raw copy.raw expected.raw"
    );
    fine(&served(&ours, "-A -x x -f qcow2 disk.qcow2", &line));
}

#[test]
fn a_server_that_is_late_is_waited_for_when_opening() {
    let sandbox = ours();
    let options = "driver=nbd,server.type=unix,server.path=s,open-timeout";
    fine(&sandbox.run(&format!(
        "rm -f s; (sleep 0.3; exec stock-nbd -k $PWD/s -f raw disk.raw) & \
         qemu-io --image-opts -c 'read 0 4k' {options}=60"
    )));
    let line = format!("rm -f s; qemu-io --image-opts -c 'read 0 4k' {options}=0");
    let once = sandbox.run(&line).text;
    assert_eq!(once, "qemu-io: can't open: Failed to connect to 's': No such file or directory\n");
}

#[test]
fn create_finds_certificates_among_the_objects() {
    let sandbox = ours();
    sandbox.prepare("mkdir pki");
    let authority = Authority::new("ours");
    authority.trusted_in(&sandbox.path("pki"));
    authority.server_in(&sandbox.path("pki"), &LOCAL);
    authority.client_in(&sandbox.path("pki"));
    let server = "--object tls-creds-x509,id=t,endpoint=server,dir=$PWD/pki --tls-creds t -x x \
                  -f raw disk.raw";
    let target = "\"json:{'driver':'nbd','server':{'type':'unix','path':'s'},'export':'x',\
                  'tls-creds':'c','tls-hostname':'localhost'}\"";
    let object = "--object tls-creds-x509,id=c,endpoint=client,dir=$PWD/pki";
    let got = served(
        &sandbox,
        server,
        &format!(
            "lacuna create {object} -f raw {target} 4M || exit 1
            lacuna create {object} -f qcow2 {target} 4M || exit 2
            lacuna check {object} --image-opts driver=qcow2,file.driver=nbd,file.path=s,\
            file.export=x,file.tls-creds=c,file.tls-hostname=localhost || exit 3
            lacuna create -f raw {target} 4M && exit 4
            true"
        ),
    );
    fine(&got);
    assert!(got.text.contains("No TLS credentials with id 'c'"), "{}", got.text);
}
