//! The disk on a screen.

use lacuna::chain::LevelFacts;
use lacuna::units::GuestRange;
use pollster::block_on;

use crate::error::CliResult;
use crate::nodes::{FileChain, FileMap};
use crate::output::{self, short_size};
use crate::picture::{Content, Picture, Shape, Shares, Terminal, draw};

/// What a raw disk is divided into, as far as hosts tell its parts apart.
const HOST_BLOCK_BYTES: u64 = 4096;

/// Prints a picture of `range`, which `map` goes through.
pub(super) fn show(chain: &FileChain, mut map: FileMap<'_>, range: GuestRange) -> CliResult<u8> {
    let terminal = Terminal::of_stdout();
    let lanes = chain.levels().len();
    let shape = Shape::new(range.len, lanes, terminal.columns, granule_bytes(chain));
    let mut picture = Picture::new(range, lanes, shape);
    block_on(async {
        while let Some(run) = map.next().await? {
            picture.add(run.range, run.level, Content::of(&run.status));
        }
        Ok::<_, lacuna::Error>(())
    })?;
    let titles: Vec<String> = (0..lanes).map(|lane| title(chain, lane, &picture)).collect();
    let drawn = draw(&picture, &titles, terminal);
    output::print(&format!("{}\n{drawn}", summary(chain, &picture))).map(|()| 0)
}

/// The smallest part of a disk that can differ from its neighbours.
fn granule_bytes(chain: &FileChain) -> u64 {
    let of_level = |level: usize| match chain.level_image(level) {
        Some(image) if image.geometry().has_subclusters() => image.geometry().subcluster_bytes(),
        Some(image) => image.geometry().cluster_bytes(),
        None => HOST_BLOCK_BYTES,
    };
    (0..chain.levels().len()).map(of_level).min().unwrap_or(HOST_BLOCK_BYTES)
}

fn summary(chain: &FileChain, picture: &Picture) -> String {
    let files = match chain.levels().len() {
        1 => String::new(),
        count => format!(" in {count} files"),
    };
    let cell = short_size(picture.shape.cell_bytes);
    format!("{}{files}, {cell} for each character\n", short_size(picture.range.len))
}

fn title(chain: &FileChain, lane: usize, picture: &Picture) -> String {
    let level = &chain.levels()[lane];
    let on_host = match chain.level_allocated_bytes(lane) {
        Some(bytes) => format!(", {} on the host", short_size(bytes)),
        None => String::new(),
    };
    let data = match &level.data_path {
        Some(path) => format!(", data in {}", output::tame(&path.display().to_string())),
        None => String::new(),
    };
    let file = format!("{} ({}{on_host}{data})", name(level), level.format.name());
    match picture.lanes() {
        1 => file,
        _ => format!("{lane} {file}: {}", decided(&picture.decided(lane))),
    }
}

fn name(level: &LevelFacts) -> String {
    output::tame(&level.path.display().to_string())
}

/// Tells what a file of a chain contributes.
fn decided(shares: &Shares) -> String {
    let parts = Content::ALL.into_iter().filter(|content| *content != Content::Unallocated);
    let parts: Vec<String> = parts
        .filter(|content| shares.bytes(*content) > 0)
        .map(|content| format!("{} {}", content.words(), short_size(shares.bytes(content))))
        .collect();
    if parts.is_empty() { "nothing".to_owned() } else { parts.join("; ") }
}
