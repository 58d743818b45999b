//! QEMU's words for what keeps an image from being opened.

/// Returns what QEMU says where the engine says `message`, where the two differ.
pub(super) fn of_opening(message: &str) -> Option<String> {
    features(message).or_else(|| size(message))
}

/// Unknown features: those with a name by it, the others as one word of bits.
fn features(message: &str) -> Option<String> {
    let (_, list) = message.split_once("features that are not known here: ")?;
    let (mut named, mut nameless) = (Vec::new(), 0u64);
    for item in list.split("incompatible bit ").skip(1) {
        let item = item.strip_suffix(", ").unwrap_or(item);
        match item.split_once(" (") {
            Some((_, name)) => named.push(name.strip_suffix(')').unwrap_or(name).to_owned()),
            None => nameless |= 1u64.checked_shl(item.parse().ok()?)?,
        }
    }
    if nameless != 0 {
        named.push(format!("Unknown incompatible feature: {nameless:x}"));
    }
    Some(format!("Unsupported qcow2 feature(s): {}", named.join(", ")))
}

/// A disk that no table of QEMU could cover.
fn size(message: &str) -> Option<String> {
    const MOST_ENTRIES: u64 = (32 << 20) / 8;
    let (_, rest) = message.split_once("Active L1 table has ")?;
    let (_, needed) = rest.rsplit_once(" bytes needs ")?;
    let needed: u64 = needed.parse().ok()?;
    let text = if needed > MOST_ENTRIES { "Image is too big" } else { "L1 table is too small" };
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_without_a_name_are_one_word() {
        let words = |list: &str| {
            of_opening(&format!("Image needs features that are not known here: {list}"))
        };
        assert_eq!(
            words("incompatible bit 61, incompatible bit 62 (a (b), c), incompatible bit 63")
                .unwrap(),
            "Unsupported qcow2 feature(s): a (b), c, Unknown incompatible feature: a000000000000000"
        );
        assert_eq!(
            words("incompatible bit 63 (Test feature)").unwrap(),
            "Unsupported qcow2 feature(s): Test feature"
        );
        assert_eq!(of_opening("Something else"), None);
    }
}
