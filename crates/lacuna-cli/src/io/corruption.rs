//! QEMU's words for an image that contradicts itself.

/// Returns what QEMU says where the engine says `message`; without a counterpart, the message.
pub(super) fn words(message: &str) -> String {
    refcount_block(message).or_else(|| allocation(message)).unwrap_or_else(|| message.to_owned())
}

fn refcount_block(message: &str) -> Option<String> {
    let rest = message.strip_prefix("Refcount block offset ")?;
    let (offset, rest) = rest.split_once(" (table entry ")?;
    let (index, rest) = rest.split_once(')')?;
    let index: u64 = index.parse().ok()?;
    let is_unaligned = rest.contains("multiple of the cluster size");
    is_unaligned.then(|| format!("Refblock offset {offset} unaligned (reftable index: {index:#x})"))
}

/// The header's own cluster was free, and so was about to be handed out.
fn allocation(message: &str) -> Option<String> {
    let what = match message.strip_prefix("Allocating: ") {
        Some(rest) => rest.split_once(": ")?.0,
        None => "data cluster",
    };
    message
        .contains("The header's cluster has refcount 0")
        .then(|| format!("Preventing invalid allocation of {what} at offset 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_have_the_words_that_scripts_know() {
        for (message, expected) in [
            (
                "Refcount block offset 0x20600 (table entry 1) is not a multiple of the cluster size",
                "Refblock offset 0x20600 unaligned (reftable index: 0x1)",
            ),
            (
                "Allocating: L2 table: The header's cluster has refcount 0: run check",
                "Preventing invalid allocation of L2 table at offset 0",
            ),
            (
                "The header's cluster has refcount 0: run check",
                "Preventing invalid allocation of data cluster at offset 0",
            ),
            ("Something else", "Something else"),
        ] {
            assert_eq!(words(message), expected);
        }
    }
}
