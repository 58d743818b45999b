//! The options of qemu-nbd 10.0.2.

use crate::args::Flag;

/// The options, in the order of that program's own table.
pub(super) const FLAGS: [Flag; 35] = [
    Flag::switch('h', "help", "show this help"),
    Flag::switch('V', "version", "show the version"),
    Flag::valued('b', "bind", "IFACE", "listen on this address (0.0.0.0)"),
    Flag::valued('p', "port", "PORT", "listen on this TCP port (10809)"),
    Flag::valued('k', "socket", "PATH", "listen on this socket file"),
    Flag::valued('o', "offset", "OFFSET", "serve what lies behind this byte of the disk"),
    Flag::switch('r', "read-only", "refuse changes"),
    Flag::switch('A', "allocation-depth", "offer the meta context qemu:allocation-depth"),
    Flag::valued('B', "bitmap", "NAME", "offer a dirty bitmap as a meta context; may be repeated"),
    Flag::valued('c', "connect", "DEV", "not supported: the kernel's own client"),
    Flag::switch('d', "disconnect", "not supported: the kernel's own client"),
    Flag::switch('L', "list", "ask another server what it has"),
    Flag::switch('s', "snapshot", "write to a file of its own, gone at the end"),
    Flag::valued('l', "load-snapshot", "SNAPSHOT", "serve an internal snapshot, read-only"),
    Flag::switch('n', "nocache", "go past the page cache, short for --cache=none"),
    Flag::valued('\0', "cache", "MODE", "cache mode of the host (writeback)").long_only(),
    Flag::valued('\0', "aio", "MODE", "threads, native or io_uring: accepted and ignored")
        .long_only(),
    Flag::valued('\0', "discard", "MODE", "ignore or unmap (ignore)").long_only(),
    Flag::valued('\0', "detect-zeroes", "MODE", "off, on or unmap (off)").long_only(),
    Flag::valued('e', "shared", "NUM", "clients at once; more wait (1; 0: any number)"),
    Flag::valued('f', "format", "FORMAT", "format of the image; probed where not given"),
    Flag::switch('t', "persistent", "go on when the last client has left"),
    Flag::switch('v', "verbose", "accepted and ignored"),
    Flag::valued('\0', "object", "OBJDEF", "an object that other options refer to").long_only(),
    Flag::valued('x', "export-name", "NAME", "name of the export (the empty one)"),
    Flag::valued('D', "description", "TEXT", "a text about the export, for people"),
    Flag::valued('\0', "tls-creds", "ID", "turn to TLS with the credentials of this object")
        .long_only(),
    Flag::valued('\0', "tls-hostname", "NAME", "with -L: the name in the server's certificate")
        .long_only(),
    Flag::valued('\0', "tls-authz", "ID", "let in whom this object allows").long_only(),
    Flag::switch('\0', "image-opts", "FILE is a list of options").long_only(),
    Flag::valued('T', "trace", "TRACE", "accepted and ignored"),
    Flag::switch('\0', "fork", "return when clients can come").long_only(),
    Flag::valued('\0', "pid-file", "PATH", "holds the process id while clients can come")
        .long_only(),
    Flag::valued('\0', "selinux-label", "LABEL", "not supported").long_only(),
    Flag::valued('\0', "handshake-limit", "SECONDS", "how long a handshake may take (10; 0: any)")
        .long_only(),
];
