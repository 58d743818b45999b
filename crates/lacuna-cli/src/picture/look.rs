//! Which character stands for a region.

use super::cells::Cell;
use super::content::Content;

/// How a region looks. A region of mixed content shows what there is most of, and whether there is
/// any data beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    Data,
    MostlyData,
    ZerosWithData,
    UnallocatedWithData,
    Compressed,
    MostlyCompressed,
    ReservedZero,
    MostlyReservedZero,
    Zero,
    MostlyZero,
    Unallocated,
    UnallocatedWithZeros,
    /// A file above decides all of it, or the file is too short.
    Hidden,
}

/// What characters there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Charset {
    /// Works on every terminal.
    Ascii,
    /// Block elements.
    Unicode,
}

/// A colour of the terminal's own palette, as SGR has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Colour(pub(crate) &'static str);

impl Look {
    /// All of them, in the order of the legend: first those of one content.
    pub(crate) const ALL: [Self; 13] = [
        Self::Data,
        Self::Compressed,
        Self::ReservedZero,
        Self::Zero,
        Self::Unallocated,
        Self::MostlyData,
        Self::MostlyCompressed,
        Self::ZerosWithData,
        Self::UnallocatedWithData,
        Self::MostlyReservedZero,
        Self::MostlyZero,
        Self::UnallocatedWithZeros,
        Self::Hidden,
    ];

    /// Returns the look of a region that is all of one kind.
    pub(crate) const fn pure(content: Content) -> Self {
        match content {
            Content::Data => Self::Data,
            Content::Compressed => Self::Compressed,
            Content::ReservedZero => Self::ReservedZero,
            Content::Zero => Self::Zero,
            Content::Unallocated => Self::Unallocated,
        }
    }

    /// Decides how a region looks.
    pub(crate) fn of(cell: &Cell) -> Self {
        let bytes = |content| cell.shares.bytes(content);
        let is_all = |content: &Content| {
            let bytes = bytes(*content);
            bytes > 0 && bytes == cell.shares.total() + cell.hidden_bytes
        };
        if let Some(content) = Content::ALL.into_iter().find(is_all) {
            return Self::pure(content);
        }
        let data = bytes(Content::Data) + bytes(Content::Compressed);
        let zeros = bytes(Content::ReservedZero) + bytes(Content::Zero);
        let elsewhere = bytes(Content::Unallocated) + cell.hidden_bytes;
        match () {
            () if cell.shares.total() == 0 => Self::Hidden,
            () if data > 0 && data >= zeros.max(elsewhere) => Self::of_data(cell),
            () if data > 0 && zeros >= elsewhere => Self::ZerosWithData,
            () if data > 0 => Self::UnallocatedWithData,
            () if zeros > 0 && zeros >= elsewhere => Self::of_zeros(cell),
            () if zeros > 0 => Self::UnallocatedWithZeros,
            () => Self::Unallocated,
        }
    }

    fn of_data(cell: &Cell) -> Self {
        let [plain, compressed] =
            [Content::Data, Content::Compressed].map(|c| cell.shares.bytes(c));
        if plain >= compressed { Self::MostlyData } else { Self::MostlyCompressed }
    }

    fn of_zeros(cell: &Cell) -> Self {
        let [taken, none] = [Content::ReservedZero, Content::Zero].map(|c| cell.shares.bytes(c));
        if taken >= none { Self::MostlyReservedZero } else { Self::MostlyZero }
    }

    /// Returns the character.
    pub(crate) const fn character(self, charset: Charset) -> char {
        let [ascii, unicode] = match self {
            Self::Data => ['#', '█'],
            Self::MostlyData => ['+', '▓'],
            Self::ZerosWithData => ['=', '▒'],
            Self::UnallocatedWithData => ['-', '░'],
            Self::Compressed => ['C', '▚'],
            Self::MostlyCompressed => ['c', '▞'],
            Self::ReservedZero => ['Z', '□'],
            Self::MostlyReservedZero => ['z', '▫'],
            Self::Zero => ['0', '0'],
            Self::MostlyZero => ['o', 'o'],
            Self::Unallocated => ['.', '·'],
            Self::UnallocatedWithZeros => [',', ','],
            Self::Hidden => [' ', ' '],
        };
        match charset {
            Charset::Ascii => ascii,
            Charset::Unicode => unicode,
        }
    }

    /// Returns the colour of what there is most of.
    pub(crate) const fn colour(self) -> Colour {
        Colour(match self {
            Self::Data | Self::MostlyData => "36",
            Self::Compressed | Self::MostlyCompressed => "35",
            Self::ReservedZero | Self::MostlyReservedZero => "33",
            Self::Zero | Self::MostlyZero | Self::ZerosWithData => "34",
            Self::Unallocated | Self::UnallocatedWithData | Self::UnallocatedWithZeros => "90",
            Self::Hidden => "39",
        })
    }

    /// Explains the character, for a picture of so many lanes.
    pub(crate) const fn words(self, lanes: usize) -> &'static str {
        match self {
            Self::Data => Content::Data.words(),
            Self::Compressed => Content::Compressed.words(),
            Self::ReservedZero => Content::ReservedZero.words(),
            Self::Zero => Content::Zero.words(),
            Self::Unallocated if lanes > 1 => "unallocated: the next file decides, below all zeros",
            Self::Unallocated => Content::Unallocated.words(),
            Self::MostlyData => "mostly data",
            Self::MostlyCompressed => "mostly compressed data",
            Self::ZerosWithData => "mostly zeros, with data",
            Self::UnallocatedWithData => "mostly unallocated, with data",
            Self::MostlyReservedZero => "mostly zeros, space reserved",
            Self::MostlyZero => "mostly zeros, no space",
            Self::UnallocatedWithZeros => "mostly unallocated, with zeros",
            Self::Hidden => "(blank) a file above decides, or this one is too short",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::Shares;

    fn look(parts: &[(Content, u64)], hidden_bytes: u64) -> Look {
        let mut shares = Shares::default();
        for (content, bytes) in parts {
            shares.add(*content, *bytes);
        }
        Look::of(&Cell { shares, hidden_bytes })
    }

    #[test]
    fn regions_show_what_there_is_most_of_and_any_data() {
        use Content::{Compressed, Data, ReservedZero, Unallocated, Zero};
        for content in Content::ALL {
            assert_eq!(look(&[(content, 5)], 0), Look::pure(content));
        }
        for (parts, hidden_bytes, expected) in [
            (&[(Data, 5), (Zero, 5)][..], 0, Look::MostlyData),
            (&[(Data, 1), (Zero, 500), (Unallocated, 400)], 0, Look::ZerosWithData),
            (&[(Data, 1), (Zero, 5), (Unallocated, 6)], 0, Look::UnallocatedWithData),
            (&[(Data, 2), (Compressed, 3), (Zero, 4)], 0, Look::MostlyCompressed),
            (&[(Compressed, 1), (Unallocated, 6)], 0, Look::UnallocatedWithData),
            (&[(ReservedZero, 2), (Zero, 2)], 0, Look::MostlyReservedZero),
            (&[(ReservedZero, 2), (Zero, 3)], 4, Look::MostlyZero),
            (&[(Zero, 2), (Unallocated, 3)], 0, Look::UnallocatedWithZeros),
            (&[(Unallocated, 3)], 3, Look::Unallocated),
            (&[(Data, 1)], 3, Look::UnallocatedWithData),
            (&[(Data, 1)], 1, Look::MostlyData),
            (&[], 3, Look::Hidden),
        ] {
            assert_eq!(look(parts, hidden_bytes), expected, "{parts:?} {hidden_bytes}");
        }
    }

    #[test]
    fn no_character_has_two_meanings() {
        for charset in [Charset::Ascii, Charset::Unicode] {
            let mut characters = Look::ALL.map(|look| look.character(charset));
            characters.sort_unstable();
            assert!(characters.windows(2).all(|pair| pair[0] != pair[1]), "{characters:?}");
            assert!(charset == Charset::Unicode || characters.iter().all(char::is_ascii));
        }
    }
}
