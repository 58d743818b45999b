//! What a LUKS header of version 1 says without a key. All of it is big-endian.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 6 | magic |
//! | 6 | 2 | version |
//! | 8, 40, 72 | 32 each | cipher, mode (with its IV), hash, ended by NUL |
//! | 104, 108 | 4 each | payload offset in sectors, key length in bytes |
//! | 164 | 4 | iterations for the master key's digest |
//! | 168 | 40 | UUID as text |
//! | 208 | 8 × 48 | key slots: state, iterations, salt (32), offset in sectors, stripes |

use serde_json::{Map, Value, json};

/// Size of the header.
pub(super) const HEADER_BYTES: usize = 592;
const SLOTS: usize = 8;
const SLOT_BYTES: usize = 48;
/// State of a slot that holds a key.
const ACTIVE: u32 = 0x00ac_71f3;
const SECTOR_BYTES: u64 = 512;

/// Describes the header; what is no such header is described by its kind alone.
pub(super) fn describe(header: &[u8]) -> Value {
    if header.len() < HEADER_BYTES || !header.starts_with(b"LUKS\xba\xbe\0\x01") {
        return json!({"format": "luks"});
    }
    let (cipher, mode, hash) = (name(header, 8), name(header, 40), name(header, 72));
    // `cbc-essiv:sha256` is a mode, the making of its IV and a hash for that.
    let (mode, iv) = mode.split_once('-').unwrap_or((&mode, ""));
    let (iv, iv_hash) = iv.split_once(':').map_or((iv, None), |(iv, hash)| (iv, Some(hash)));
    let mut members = Map::new();
    members.insert("ivgen-alg".into(), iv.into());
    members.insert("detached-header".into(), false.into());
    if let Some(hash) = iv_hash {
        members.insert("ivgen-hash-alg".into(), hash.into());
    }
    members.insert("hash-alg".into(), hash.into());
    members.insert("cipher-alg".into(), cipher_name(&cipher, mode, number(header, 108)).into());
    members.insert("uuid".into(), name(header, 168).into());
    members.insert("format".into(), "luks".into());
    members.insert("cipher-mode".into(), mode.into());
    let slots = (0..SLOTS).map(|index| slot(&header[208 + index * SLOT_BYTES..]));
    members.insert("slots".into(), slots.collect());
    let payload = u64::from(number(header, 104)) * SECTOR_BYTES;
    members.insert("payload-offset".into(), payload.into());
    members.insert("master-key-iters".into(), number(header, 164).into());
    Value::Object(members)
}

fn slot(bytes: &[u8]) -> Value {
    let offset = u64::from(number(bytes, 40)) * SECTOR_BYTES;
    if number(bytes, 0) != ACTIVE {
        return json!({"active": false, "key-offset": offset});
    }
    let (iters, stripes) = (number(bytes, 4), number(bytes, 44));
    json!({"active": true, "iters": iters, "key-offset": offset, "stripes": stripes})
}

/// The mode xts takes a key of twice the length for each cipher.
fn cipher_name(cipher: &str, mode: &str, key_bytes: u32) -> String {
    let bits = u64::from(key_bytes) * if mode == "xts" { 4 } else { 8 };
    match cipher {
        "cast5" => "cast5-128".to_owned(),
        cipher => format!("{cipher}-{bits}"),
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn name(bytes: &[u8], at: usize) -> String {
    let field = &bytes[at..];
    let len = if at == 168 { 40 } else { 32 };
    let field = &field[..len.min(field.len())];
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_else_is_only_named() {
        for bytes in [&b""[..], b"LUKS", &[0xff; HEADER_BYTES]] {
            assert_eq!(describe(bytes), json!({"format": "luks"}));
        }
    }

    #[test]
    fn every_byte_may_be_hostile() {
        let mut header = vec![0xff; HEADER_BYTES];
        header[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
        assert_eq!(describe(&header)["slots"].as_array().map(Vec::len), Some(SLOTS));
    }
}
