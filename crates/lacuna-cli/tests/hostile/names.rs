//! Images that name files of the host, so that somebody reads or writes those: what is opened, and
//! what is not (reference D.1-40, D.1-41 and the CVEs about disclosure).
//!
//! What an image names is a plain name of a file or nothing; it is opened where whoever runs a verb
//! that needs the guest's data has named the image. What only describes or checks opens nothing.

use testkit::ImageBuilder;

use crate::bounded::lacuna;
use crate::common::Sandbox;
use crate::trap::{DeafSocket, Trap};

const DATA_FILE: u32 = 0x4441_5441;
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// An image whose data file, or whose backing file, has this name.
fn with_data_file(name: &str) -> ImageBuilder {
    ImageBuilder::new(3, 16, 1 << 20).features(1 << 2, 0, 0).extension(DATA_FILE, name.as_bytes())
}

fn with_backing_file(name: &str, format: &str) -> ImageBuilder {
    ImageBuilder::new(3, 16, 1 << 20).extension(BACKING_FORMAT, format.as_bytes()).backing(name)
}

/// A folder with a secret in it that is watched, and a socket.
struct Host {
    sandbox: Sandbox,
    trap: Trap,
    socket: DeafSocket,
}

impl Host {
    fn new() -> Self {
        let sandbox = Sandbox::ours();
        std::fs::write(sandbox.path("secret"), vec![b's'; 1 << 20]).unwrap();
        let trap = Trap::on(&sandbox.path("secret"));
        let socket = DeafSocket::at(&sandbox.path("socket"));
        Self { sandbox, trap, socket }
    }

    fn put(&self, image: &ImageBuilder) {
        image.build().bytes.save(&self.sandbox.path("IMAGE"));
    }

    /// Runs a verb and expects that neither file nor socket were opened, whatever was before.
    fn assert_nothing_opened(&self, words: &str) {
        self.trap.was_touched();
        let got = lacuna(&self.sandbox, words);
        assert!(!self.trap.was_touched(), "{words} opens the secret: {got:?}");
        assert!(!self.socket.was_called(), "{words} calls the socket: {got:?}");
        assert!(!got.text.contains("ssss"), "{words}: {got:?}");
    }
}

/// What only looks at the image file itself.
const LOOKS: [&str; 4] =
    ["info IMAGE", "info --output=json IMAGE", "check IMAGE", "check -r all IMAGE"];

/// What needs the guest's data.
const USES: [&str; 7] = [
    "map IMAGE",
    "snapshot -l IMAGE",
    "convert -f qcow2 -O raw IMAGE out",
    "io -f qcow2 -c 'read -v 0 512' IMAGE",
    "io -f qcow2 -c 'write 0 512' IMAGE",
    "resize -f qcow2 IMAGE 2M",
    "serve -f qcow2 IMAGE --run true",
];

#[test]
fn cve_2024_4467_cve_2015_5163_describing_and_checking_open_no_named_file() {
    let host = Host::new();
    for image in [
        with_data_file("secret"),
        with_backing_file("secret", "raw"),
        with_backing_file("secret", "qcow2"),
    ] {
        for words in LOOKS {
            host.put(&image);
            host.assert_nothing_opened(words);
        }
    }
}

#[test]
fn cve_2024_4467_names_that_are_descriptions_are_opened_by_no_verb() {
    let host = Host::new();
    // `file:` in front is a part of a plain name (QEMU takes it off), and not here.
    let names = [
        r#"json:{"driver":"file","filename":"secret"}"#.to_owned(),
        r#"json:{"driver":"raw","file":{"driver":"file","filename":"secret"}}"#.to_owned(),
        "blkdebug::secret".to_owned(),
        "fat:rw:.".to_owned(),
    ];
    for name in names {
        for image in [with_data_file(&name), with_backing_file(&name, "raw")] {
            for words in LOOKS.iter().chain(&USES) {
                println!("{name}");
                host.put(&image);
                host.assert_nothing_opened(words);
            }
        }
    }
}

/// A backing file may be on a server (docs/remote.md), what the guest writes may not.
#[test]
fn cve_2024_32498_a_data_file_is_no_export() {
    let host = Host::new();
    let socket = host.sandbox.path("socket").display().to_string();
    for name in [format!("nbd+unix:///?socket={socket}"), format!("nbd:unix:{socket}")] {
        for words in LOOKS.iter().chain(&USES) {
            host.put(&with_data_file(&name));
            host.assert_nothing_opened(words);
        }
    }
}

/// The library refuses all names by default; the command follows plain ones, as whoever typed it named
/// the image. Then they are opened for what they are: a backing file is never written.
#[test]
fn cve_2024_32498_a_backing_file_is_never_written_and_a_data_file_only_by_who_writes() {
    let host = Host::new();
    let before = host.sandbox.bytes("secret");
    for image in [with_backing_file("secret", "raw"), with_data_file("secret")] {
        for words in ["map IMAGE", "convert -f qcow2 -O raw IMAGE out", "serve -r IMAGE --run true"]
        {
            host.put(&image);
            host.trap.was_touched();
            lacuna(&host.sandbox, words);
            assert!(host.trap.was_touched(), "{words} follows the name, or this tests nothing");
            assert!(host.sandbox.bytes("secret") == before, "{words} writes");
        }
    }
    host.put(&with_backing_file("secret", "raw"));
    let got = lacuna(&host.sandbox, "io -f qcow2 -c 'write 0 64k' -c 'discard 64k 64k' IMAGE");
    assert_eq!(got.code, Some(0), "{got:?}");
    assert!(host.sandbox.bytes("secret") == before);
}

/// A guest writes the header of an image into its raw disk (D.1-40).
#[test]
fn cve_2008_2004_cve_2013_1922_cve_2026_27211_a_raw_disk_stays_raw_whatever_the_guest_writes() {
    let host = Host::new();
    host.put(&with_backing_file("secret", "raw"));
    let sandbox = &host.sandbox;
    sandbox.prepare("truncate -s 1M disk && mkfifo pipe");
    // Opened by guessing, a first sector that would change the guess is refused.
    let got = lacuna(sandbox, "io -c 'write -s IMAGE 0 64k' disk");
    assert!(got.code == Some(1) && got.text.contains("write failed"), "{got:?}");
    assert!(sandbox.bytes("disk").iter().all(|byte| *byte == 0));
    // Told to be raw, it is written, and is a raw disk to all who say so.
    sandbox.prepare("lacuna io -f raw -c 'write -s IMAGE 0 64k' disk");
    for words in [
        "convert -f raw -O raw disk out",
        "resize -f raw disk 2M",
        "io -f raw -c 'read 0 512' disk",
        "serve -f raw disk --run true",
    ] {
        host.assert_nothing_opened(words);
    }
}

/// The same, one level down: the overlay does not say what its backing file is.
#[test]
fn cve_2011_3147_cve_2015_1851_an_unnamed_format_is_not_guessed() {
    let host = Host::new();
    let inner = with_backing_file("secret", "raw").build();
    inner.bytes.save(&host.sandbox.path("disk"));
    host.put(&ImageBuilder::new(3, 16, 1 << 20).backing("disk"));
    for words in LOOKS.iter().chain(&USES) {
        host.assert_nothing_opened(words);
    }
}

/// A disk that became an image by its guest's doing is resized as what it is said to be.
#[test]
fn cve_2026_24708_resizing_a_raw_disk_ignores_the_header_in_it() {
    let host = Host::new();
    let inner = with_data_file("secret").build();
    inner.bytes.save(&host.sandbox.path("disk"));
    let before = host.sandbox.bytes("secret");
    host.assert_nothing_opened("resize -f raw disk 4M");
    assert_eq!(host.sandbox.bytes("disk").len(), 4 << 20);
    assert!(host.sandbox.bytes("secret") == before);
}

#[test]
fn names_of_things_that_are_no_files_are_refused_and_nobody_waits() {
    let host = Host::new();
    host.sandbox.prepare("mkfifo pipe; mkdir folder");
    for name in ["pipe", "folder", "socket", "/dev/zero", "/dev/tty", "/proc/self/mem", ""] {
        for image in [with_data_file(name), with_backing_file(name, "raw")] {
            host.put(&image);
            for words in USES {
                let got = lacuna(&host.sandbox, words);
                assert!(!host.socket.was_called(), "{words} calls {name}: {got:?}");
            }
        }
    }
}

#[test]
fn a_chain_without_an_end_is_refused() {
    let host = Host::new();
    host.put(&with_backing_file("IMAGE", "qcow2"));
    for words in USES {
        let got = lacuna(&host.sandbox, words);
        assert_eq!(got.code, Some(1), "{words}: {got:?}");
        assert!(got.text.contains("chain is a loop"), "{words}: {got:?}");
    }
    assert_eq!(lacuna(&host.sandbox, "info IMAGE").code, Some(0));
}
