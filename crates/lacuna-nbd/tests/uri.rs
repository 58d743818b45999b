//! URIs: what they mean, and what is said about wrong ones.

use lacuna_nbd::{Address, ErrorKind, TlsKind, Uri};

fn tcp(host: &str, port: u16) -> Address {
    Address::Tcp { host: host.into(), port }
}

fn unix(path: &[u8]) -> Address {
    Address::Unix(path.to_vec())
}

#[test]
fn places_and_names() {
    let rows: [(&str, Address, &str, bool); 19] = [
        ("nbd://example.com/disk", tcp("example.com", 10809), "disk", false),
        ("nbd://example.com", tcp("example.com", 10809), "", false),
        ("nbd://example.com/", tcp("example.com", 10809), "", false),
        ("nbd://example.com//disk", tcp("example.com", 10809), "/disk", false),
        ("nbd://example.com/hello%20world", tcp("example.com", 10809), "hello world", false),
        ("nbd://example.com:1/a/b", tcp("example.com", 1), "a/b", false),
        ("nbd://example.com:/a", tcp("example.com", 10809), "a", false),
        ("NBDS://127.0.0.1:65535/x", tcp("127.0.0.1", 65535), "x", true),
        ("nbd://[::1]:99/x", tcp("::1", 99), "x", false),
        ("nbd://[fe80::1%25eth0]/x", tcp("fe80::1%eth0", 10809), "x", false),
        ("nbd:///x", tcp("localhost", 10809), "x", false),
        ("nbd://", tcp("localhost", 10809), "", false),
        ("nbd+unix:///disk?socket=sock", unix(b"sock"), "disk", false),
        ("nbd+unix:///?socket=/run/nbd.sock", unix(b"/run/nbd.sock"), "", false),
        ("nbds+unix:///?socket=/run/nbd.sock", unix(b"/run/nbd.sock"), "", true),
        ("nbd+unix:///?socket=%00/abstract", unix(b"\0/abstract"), "", false),
        ("nbd+unix:////top?socket=a%ff%26b", unix(b"a\xff&b"), "/top", false),
        ("nbd+vsock:///", Address::Vsock { cid: 2, port: 10809 }, "", false),
        ("nbds+vsock://3:1024/x", Address::Vsock { cid: 3, port: 1024 }, "x", true),
    ];
    for (text, address, export, requires_tls) in rows {
        let uri = Uri::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(uri.address, address, "{text}");
        assert_eq!(uri.export.as_str(), export, "{text}");
        assert_eq!(uri.requires_tls, requires_tls, "{text}");
        assert_eq!(Uri::parse(&uri.to_string()), Ok(uri.clone()), "{text} as {uri}");
        assert!(Uri::has_scheme(text));
    }
}

#[test]
fn queries_say_what_tls_is_like() {
    let text = "nbds://a@b@c/?tls-type=x509&tls-hostname=d&tls-verify-peer=0\
                &tls-certificates=/e%20f&tls-psk-file=g&x-h=i%3Dj";
    let uri = Uri::parse(text).unwrap();
    assert_eq!(uri.user.as_deref(), Some("a@b"));
    assert_eq!(uri.tls.kind, Some(TlsKind::X509));
    assert_eq!(uri.tls.hostname.as_deref(), Some("d"));
    assert_eq!(uri.tls.verifies_peer, Some(false));
    assert_eq!(uri.tls.certificates.as_deref(), Some("/e f"));
    assert_eq!(uri.tls.psk_file.as_deref(), Some("g"));
    assert_eq!(uri.experimental, [("x-h".to_owned(), "i=j".to_owned())]);
    assert_eq!(Uri::parse(&uri.to_string()), Ok(uri));
}

#[test]
fn wrong_uris_are_told_what_would_be_right() {
    let long = format!("nbd://h/{}", "x".repeat(4097));
    let rows = [
        ("", "it should begin with nbd://"),
        ("disk.qcow2", "it should begin with nbd://"),
        ("http://example.com", "it should begin with nbd://"),
        ("nbd+ssh://example.com", "it should begin with nbd://"),
        ("nbd:localhost:10809", "it should be nbd://HOST:PORT/EXPORT"),
        ("nbd:unix:/sock", "it should be nbd://HOST:PORT/EXPORT"),
        ("nbd+unix:/sock", "it should be nbd+unix:///EXPORT?socket=PATH"),
        ("nbd+unix:///disk", "it should be nbd+unix:///EXPORT?socket=PATH"),
        ("nbd+unix:///disk?socket=", "it should be nbd+unix:///EXPORT?socket=PATH"),
        ("nbd+unix://disk?socket=a", "with three slashes"),
        ("nbd+unix:///?socket=a%00b", "an abstract name"),
        ("nbd://h/?socket=a", "nbd+unix:///EXPORT?socket=PATH"),
        ("nbd://h:x/", "it should be nbd://HOST:PORT/EXPORT"),
        ("nbd://h:65536/", "it should be nbd://HOST:PORT/EXPORT"),
        ("nbd://h:-1/", "it should be nbd://HOST:PORT/EXPORT"),
        ("nbd://h:+1/", "it should be nbd://HOST:PORT/EXPORT"),
        ("nbd://::1/", "brackets around an IPv6 address"),
        ("nbd://[::1/", "brackets around an IPv6 address"),
        ("nbd://[::1]x/", "brackets around an IPv6 address"),
        ("nbd+vsock://x/", "it should be nbd+vsock://CID:PORT/EXPORT"),
        ("nbd+vsock://4294967296/", "it should be nbd+vsock://CID:PORT/EXPORT"),
        ("nbd://h/%", "the sign itself is %25"),
        ("nbd://h/%4", "the sign itself is %25"),
        ("nbd://h/%+1", "the sign itself is %25"),
        ("nbd://h/%gg", "the sign itself is %25"),
        ("nbd://h/%00", "no UTF-8 text without NUL"),
        ("nbd://h/%ff", "no UTF-8 text without NUL"),
        (&long, "at most 4096 bytes"),
        ("nbd://h/a b", "which is written %20"),
        ("nbd://h/a\u{7f}", "which is written %7F"),
        ("nbd://h/#x", "written %23"),
        ("nbd://h/?x", "it should be KEY=VALUE"),
        ("nbd://h/?tls-type=tls", "it should be anon, psk or x509"),
        ("nbd://h/?tls-verify-peer=yes", "it should be 0 or 1"),
        ("nbd://h/?tls-hostname=a&tls-hostname=b", "twice"),
        ("nbd://h/?export=a", "there are socket, tls-type"),
    ];
    for (text, expected) in rows {
        let error = Uri::parse(text).expect_err(text);
        assert_eq!(error.kind(), ErrorKind::InvalidRequest);
        assert!(error.to_string().contains(expected), "{text}: {error}");
    }
}
