//! Who noticed a failure, told by its words: runs that fail by the same checker fail in the same way.

/// What says that something must not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checker {
    Bitmaps,
    Bytes,
    DataFile,
    /// What the image stands on.
    Below,
    Points,
    Qemu,
    Refcounts,
    /// A restore point, or the folder of them.
    Restores,
    Size,
    Snapshots,
    Waiting,
    /// A client, of what the server says.
    Wire,
    Zeros,
}

/// What its messages have in them. Of two in one message the first here counts: a snapshot that has
/// other bytes is a failure of snapshots.
const WORDS: [(&str, Checker); 28] = [
    ("qemu-img", Checker::Qemu),
    ("the raw data file: ", Checker::DataFile),
    ("what it stands on: ", Checker::Below),
    ("What it stands on is other", Checker::Below),
    ("The check finds", Checker::Refcounts),
    ("Checking: ", Checker::Refcounts),
    ("Freeing leaks: ", Checker::Refcounts),
    ("Snapshot", Checker::Snapshots),
    (" snapshots, expected", Checker::Snapshots),
    ("a point: ", Checker::Points),
    ("a point reads", Checker::Points),
    ("a point calls", Checker::Points),
    ("Making a point", Checker::Points),
    ("Reading a point", Checker::Points),
    ("Point p", Checker::Restores),
    ("Opening the folder", Checker::Restores),
    ("Bitmap ", Checker::Bitmaps),
    ("said to be zeros", Checker::Zeros),
    (" bytes; it had ", Checker::Size),
    ("; changes there:", Checker::Bytes),
    (" bytes, expected ", Checker::Bytes),
    ("wait for ever", Checker::Waiting),
    ("no end after", Checker::Waiting),
    ("shown out after", Checker::Waiting),
    ("The server said", Checker::Wire),
    ("cut the wire", Checker::Wire),
    ("Shaking hands: ", Checker::Wire),
    ("Receiving: ", Checker::Wire),
];

/// In which way a run failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Found(Checker),
    /// A panic, or a call that failed with nobody to blame: the words, without numbers.
    Said(String),
}

impl Kind {
    /// Tells the kind of a failure by what it says.
    pub(crate) fn of(error: &str) -> Self {
        let is_panic = error.starts_with("panic: ");
        let known = WORDS.iter().find(|(words, _)| error.contains(words));
        match known.filter(|_| !is_panic) {
            Some((_, checker)) => Self::Found(*checker),
            None => Self::Said(words(error)),
        }
    }
}

/// Returns the last thing that the first line says, without what has digits in it: where it was, and in
/// which request, may differ.
fn words(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    let last = match line.strip_prefix("panic: ") {
        Some(panic) => panic,
        None => line.rsplit("}: ").next().unwrap_or_default(),
    };
    let words = last.split(|c: char| !c.is_alphanumeric());
    let words =
        words.filter(|word| !word.is_empty() && !word.contains(|c: char| c.is_ascii_digit()));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_checker_is_the_same_kind_wherever_it_was() {
        let bytes =
            "phase 0, which ends by Close: byte 0x5 is 0x01, expected 0x02 (R); changes there:";
        let later =
            "phase 3, which ends by Crash(7): byte 0x9 is 0x00, expected 0x03 (A); changes there:";
        let snapshot = "phase 0, which ends by Close: Snapshot at-3: byte 0x5 is 0x01, expected 0x02 \
                        (R); changes there:";
        assert_eq!(Kind::of(bytes), Kind::of(later));
        assert_ne!(Kind::of(bytes), Kind::of(snapshot));
        let check = "phase 1, which ends by Close: The check finds CheckReport { leaks: 1 }";
        assert_eq!(Kind::of(check), Kind::Found(Checker::Refcounts));
    }

    #[test]
    fn panics_and_calls_that_fail_are_told_apart_by_their_words() {
        let panic = |text: &str| Kind::of(&format!("panic: {text}"));
        assert_eq!(panic("index 5 is past 7"), panic("index 9 is past 12"));
        assert_ne!(panic("index 5 is past 7"), panic("Snapshot 5 is missing"));
        let read =
            "phase 0, which ends by Close: Request { what: Read, start: 1f }: No space is left";
        let write =
            "phase 2, which ends by Rest: Request { what: Flush, start: 0 }: No space is left";
        assert_eq!(Kind::of(read), Kind::of(write));
        assert_ne!(Kind::of(read), Kind::of("phase 0, which ends by Close: Opening: Corrupt"));
    }
}
