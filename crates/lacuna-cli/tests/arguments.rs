//! Command lines that make no sense: exit code and message, and hints under our own name.

mod common;

use common::{Sandbox, both, both_in};

#[test]
fn wrong_command_lines_are_answered_like_the_stock_tool_does() {
    both(
        "qemu-img
         qemu-img foo
         qemu-img io
         qemu-img help
         qemu-img info --error-format=json x
         qemu-img --error-format=json info x
         qemu-img --foo
         qemu-img -Z create
         qemu-img create -f qcow2 -q=4 a 1M
         qemu-img create -f qcow2 --quiet=4 a 1M
         qemu-img create --opt
         qemu-img info --output
         qemu-img map -f",
    );
}

#[test]
fn messages_and_exit_codes_of_our_own_name() {
    let ours = Sandbox::ours();
    ours.prepare("stock-img create -q -f qcow2 image 1M; stock-img create -q raw 1M");
    let table = [
        ("lacuna bogus", 1, "lacuna: Command not found: bogus\nTry 'lacuna --help'"),
        ("lacuna creat", 1, "for more info\nhint: create is the nearest\n"),
        (
            "lacuna help inof",
            1,
            "Command not found: inof\nTry 'lacuna help --help' for more info\nhint: info is",
        ),
        (
            "lacuna map --formt=raw a",
            1,
            "'--formt=raw'\nTry 'lacuna map --help' for more info\nhint: --format",
        ),
        ("lacuna --error-format=xml map", 1, "--error-format expects 'human' or 'json' not 'xml'"),
        ("lacuna create -Z", 1, "lacuna create: invalid option -- 'Z'\nTry 'lacuna create --help'"),
        ("lacuna create a 1x", 1, "Invalid image size specified: '1x'.\nhint: sizes are like"),
        ("lacuna create -f foo a 1M", 1, "Unknown file format 'foo'\nhint: formats are"),
        (
            "lacuna create -f qcow2 -o foo a 1M",
            1,
            "Invalid parameter 'foo'\nhint: `create -f qcow2",
        ),
        ("lacuna create -f qcow2 -b image a", 1, "Detected format of qcow2.\nhint: give -F qcow2"),
        ("lacuna check raw", 63, "lacuna: This image format does not support checks"),
        ("lacuna compare image missing", 2, "Could not open 'missing'"),
        (
            "lacuna convert --progress=x image a",
            1,
            "--progress expects nothing, 'json' or 'none' not 'x'",
        ),
        ("lacuna convert -n -o size=1M image raw", 1, "-o has no effect when skipping image"),
        (
            "lacuna convert -l snap image a",
            1,
            "Failed to load snapshot: The image has no snapshot with identifier or name 'snap'\n\
             hint: `lacuna snapshot -l FILE`",
        ),
        (
            "lacuna convert -l snapshot.foo=1 image a",
            1,
            "Invalid parameter 'snapshot.foo'\nhint: -l takes",
        ),
        (
            "lacuna snapshot -a nope image",
            1,
            "Could not apply snapshot 'nope': The image has no snapshot with identifier or name 'nope'\n\
             hint: `lacuna snapshot -l FILE`",
        ),
        ("lacuna info --object secret,id=x image", 1, "--object is not supported for 'secret'"),
        ("lacuna map -f qcow2 raw", 1, "Could not open 'raw'"),
        ("lacuna io a b", 1, "Expecting one image file name"),
    ];
    for (line, code, message) in table {
        let got = ours.run(line);
        assert_eq!(got.code, Some(code), "{line}: {}", got.text);
        assert!(got.text.contains(message), "{line}: {}", got.text);
    }
}

#[test]
fn hints_are_ours_alone() {
    let ours = Sandbox::ours();
    let line = "create -f foo a 1M";
    assert!(ours.run(&format!("lacuna {line}")).text.contains("hint:"));
    assert!(!ours.run(&format!("qemu-img {line}")).text.contains("hint:"));
}

#[test]
fn a_reader_that_goes_away_is_no_disaster() {
    let ours = Sandbox::ours();
    let got = ours.run("lacuna info --help | true; lacuna --help >/dev/full; echo done");
    assert!(got.text.contains("Writing to standard output"), "{}", got.text);
    assert!(got.text.ends_with("done\n") && !got.text.contains("panicked"), "{}", got.text);
}

#[test]
fn backing_formats_are_guessed_only_where_the_user_says_so() {
    let ours = Sandbox::ours();
    // The extension with the backing format becomes one that nobody knows.
    ours.prepare(
        "stock-img create -q -f qcow2 base 1M; stock-img create -q -f qcow2 -b base -F qcow2 top
         printf '\\x12' | dd of=top bs=1 seek=$((0x70)) conv=notrunc status=none",
    );
    for line in ["map top", "convert top raw", "compare top base", "io top -c map"] {
        let refused = ours.run(&format!("lacuna {line}"));
        assert_ne!(refused.code, Some(0), "{line}");
        assert!(refused.text.contains("hint: --probe-backing"), "{line}: {}", refused.text);
        let line = line.replacen(' ', " --probe-backing ", 1);
        let allowed = ours.run(&format!("lacuna {line}"));
        assert_eq!(allowed.code, Some(0), "{line}: {}", allowed.text);
    }
    ours.prepare("qemu-img map top");
}

#[test]
fn a_name_that_is_no_text_is_refused_and_no_other_file_is_made() {
    let ours = Sandbox::ours();
    let got = ours.run(r"lacuna create -q -f qcow2 $'bad\xff.q' 1M; ls");
    assert_eq!(
        got.text,
        "lacuna: The argument 'bad\u{fffd}.q' is not UTF-8 text\n\
         hint: such a file can be had by another name (`ln -s`), or as /dev/fd/3 with 3<FILE at the \
         end\n"
    );
    assert_eq!(got.code, Some(0), "ls comes last");
}

#[test]
fn errors_name_the_file_of_the_chain_that_is_missing() {
    let (stock, ours) = (Sandbox::stock(), Sandbox::ours());
    for sandbox in [&stock, &ours] {
        sandbox.prepare(
            "mkdir sub; stock-img create -q -f qcow2 base 1M; cp base sub;
             stock-img create -q -f qcow2 -b base -F qcow2 sub/over; rm base sub/base;
             stock-img create -q -f qcow2 -o data_file=data image 1M; rm data",
        );
    }
    both_in(
        &stock,
        &ours,
        "qemu-img map sub/over
         qemu-io -c 'read 0 1' sub/over
         qemu-img map image
         qemu-img convert -O raw image raw
         qemu-img compare image sub/over
         qemu-img map missing",
    );
}

#[test]
fn encrypted_images_are_refused_by_the_name_of_their_cipher() {
    let ours = Sandbox::ours();
    let options = "encrypt.key-secret=s";
    for (method, name) in [("aes", "AES"), ("luks,encrypt.iter-time=10", "LUKS")] {
        ours.prepare(&format!(
            "stock-img create -q --object secret,id=s,data=x -f qcow2 \
             -o {options},encrypt.format={method} image 1M"
        ));
        for line in ["map image", "convert -O raw image raw", "compare image image", "io image"] {
            let got = ours.run(&format!("lacuna {line} </dev/null"));
            assert!(!ours.path("raw").exists(), "{line}");
            assert_ne!(got.code, Some(0), "{line}: {}", got.text);
            assert!(got.text.contains(&format!("encrypted ({name})")), "{line}: {}", got.text);
        }
    }
}
