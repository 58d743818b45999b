//! QEMU's words for what keeps an image from being opened.

/// Returns what QEMU says where the engine says `message`, where the two differ.
pub(super) fn of_opening(message: &str) -> Option<String> {
    let known = [export, features, size, header];
    known.iter().find_map(|words| words(message))
}

/// What a server says of an export that it does not have.
fn export(message: &str) -> Option<String> {
    let (_, said) = message.split_once(": there is no such export")?;
    let said = said.strip_prefix("; it says '").and_then(|said| said.strip_suffix('\''));
    let reported = said.map_or_else(String::new, |said| format!("\nserver reported: {said}"));
    Some(format!("Requested export not available{reported}"))
}

/// What of the header is wrong, by how the engine begins to say it and what else it names.
const HEADER: [(&str, &str, &str); 13] = [
    ("Active L1 table has ", " bytes; at most", "Active L1 table too large"),
    ("Active L1 table offset ", "is not a multiple", "Active L1 table offset invalid"),
    ("Backing file name has ", " bytes", "Backing file name too long"),
    ("Backing file name lies at ", "", "Invalid backing file offset"),
    ("Header extension 0x", " claims ", "Header extension too large"),
    ("Header extensions end with ", "", "Header extension too large"),
    ("Header length is ", "", "qcow2 header exceeds cluster size"),
    ("Refcount table has ", " bytes; at most", "Reference count table too large"),
    ("Refcount table has ", " clusters", "Image does not contain a reference count table"),
    ("Refcount table offset ", "", "Reference count table offset invalid"),
    ("Snapshot table has ", " entries", "Snapshot table too large"),
    ("Snapshot table offset ", "", "Snapshot table offset invalid"),
    ("Snapshot table of ", "passes the end", "Could not read snapshots"),
];

/// A header field outside of its limits: QEMU says which, and neither value nor limit.
fn header(message: &str) -> Option<String> {
    // Where the error came up stands in front.
    let said = message.rsplit(": ").next()?;
    if let Some(rest) = said.strip_prefix("Cluster size is ") {
        return rest.split(' ').next().map(|size| format!("Unsupported cluster size: {size}"));
    }
    let is_it = |(start, rest, _): &&(&str, &str, &str)| {
        said.strip_prefix(start).is_some_and(|found| found.contains(rest))
    };
    HEADER.iter().find(is_it).map(|(_, _, words)| (*words).to_owned())
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

    #[test]
    fn header_fields_are_named_without_their_values() {
        let words = |message: &str| of_opening(message).unwrap();
        assert_eq!(
            words("Image a: b: Cluster size is 2^40 bytes; 2^9 to 2^21 are allowed"),
            "Unsupported cluster size: 2^40"
        );
        assert_eq!(
            words("Refcount table has 8590000128 bytes; at most 8388608 are allowed"),
            "Reference count table too large"
        );
        assert_eq!(
            words("Refcount table has 0 clusters at offset 0x10000; at least 1 would be right"),
            "Image does not contain a reference count table"
        );
    }
}
