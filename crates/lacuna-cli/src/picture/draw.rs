//! A picture as lines of text: rows of characters, and below them a legend with totals.

use super::cells::Picture;
use super::content::{Content, Shares};
use super::look::{Charset, Look};
use super::terminal::Terminal;
use crate::output::short_size;

/// Columns of an offset in front of a row.
const OFFSET_COLUMNS: usize = 9;
/// Units of offsets, from the largest on.
const UNITS: [(u64, &str); 6] = [
    (1 << 50, "PiB"),
    (1 << 40, "TiB"),
    (1 << 30, "GiB"),
    (1 << 20, "MiB"),
    (1 << 10, "KiB"),
    (1, "B"),
];

/// Draws the lanes one above the other, each below its title, then the legend.
pub(crate) fn draw(picture: &Picture, titles: &[String], terminal: Terminal) -> String {
    let looks: Vec<Vec<Look>> = (0..picture.lanes())
        .map(|lane| picture.lane(lane).map(|cell| Look::of(&cell)).collect())
        .collect();
    let mut text = String::new();
    for (title, looks) in titles.iter().zip(&looks) {
        text += title;
        text += "\n";
        text += &rows(picture, looks, terminal);
    }
    text + &legend(picture, &looks, terminal)
}

/// Draws the rows of one lane.
fn rows(picture: &Picture, looks: &[Look], terminal: Terminal) -> String {
    let row_bytes = picture.shape.row_bytes();
    let start = picture.range.start.0;
    let (unit_bytes, unit) = unit_of(start, row_bytes);
    let frame = if terminal.charset == Charset::Unicode { '│' } else { '|' };
    let row = |(index, looks): (usize, &[Look])| {
        let at = start + index as u64 * row_bytes;
        let offset = if at == 0 { "0".to_owned() } else { format!("{} {unit}", at / unit_bytes) };
        let cells = painted(looks, terminal);
        format!("{offset:>OFFSET_COLUMNS$} {frame}{cells}{frame}\n")
    };
    looks.chunks(picture.shape.columns).enumerate().map(row).collect()
}

/// The largest unit in which every row begins at a whole number.
fn unit_of(start: u64, row_bytes: u64) -> (u64, &'static str) {
    let fits =
        |&(bytes, _): &(u64, &str)| start.is_multiple_of(bytes) && row_bytes.is_multiple_of(bytes);
    UNITS.into_iter().find(fits).unwrap_or((1, "B"))
}

/// Writes neighbours of one colour with one change of colour.
fn painted(looks: &[Look], terminal: Terminal) -> String {
    let characters = |looks: &[Look]| -> String {
        looks.iter().map(|look| look.character(terminal.charset)).collect()
    };
    if !terminal.has_colours {
        return characters(looks);
    }
    let runs = looks.chunk_by(|one, next| one.colour() == next.colour());
    runs.map(|run| format!("\x1b[{}m{}\x1b[m", run[0].colour().0, characters(run))).collect()
}

/// Explains the characters that occur, with totals of what there is.
fn legend(picture: &Picture, looks: &[Vec<Look>], terminal: Terminal) -> String {
    let occurs = |look: Look| looks.iter().flatten().any(|&other| other == look);
    let all = (0..picture.lanes())
        .map(|lane| picture.decided(lane))
        .fold(Shares::default(), |sum, next| sum.plus(&next));
    let line = |look: Look| {
        let sign = if occurs(look) { painted(&[look], terminal) } else { " ".to_owned() };
        let content = Content::ALL.into_iter().find(|content| Look::pure(*content) == look);
        let bytes = content.map(|content| all.bytes(content));
        let words = look.words(picture.lanes());
        match bytes {
            Some(bytes) if bytes > 0 => Some(format!(
                "  {sign} {words:<52}{:>10} {:>7}\n",
                short_size(bytes),
                per_cent(bytes, all.total())
            )),
            _ if occurs(look) => Some(format!("  {sign} {words}\n")),
            _ => None,
        }
    };
    let lines: String = Look::ALL.into_iter().filter_map(line).collect();
    format!("\n{lines}")
}

/// Returns a part in per cent; never 0 or 100 where that is not exact.
fn per_cent(part: u64, whole: u64) -> String {
    let tenths = u128::from(part) * 1000 / u128::from(whole.max(1));
    match tenths {
        0 if part > 0 => "< 0.1 %".to_owned(),
        tenths => format!("{}.{} %", tenths / 10, tenths % 10),
    }
}
