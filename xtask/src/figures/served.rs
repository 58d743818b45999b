//! Cells of servers: CPU time of client and server together, for each operation.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Runs, is_one_of, least, not_run, shown, under};

/// What a cell is to reach, as so many times less CPU than each peer.
struct Goal {
    cell: &'static str,
    /// `qemu-nbd` as it is called.
    stock: f64,
    /// `qemu-nbd` with metadata caches that hold everything.
    tuned: Option<f64>,
    /// nbdkit with the raw file.
    nbdkit: Option<f64>,
}

const GOALS: [Goal; 11] = [
    goal("d-randread-4k-q1-c1", 1.5, None, Some(1.0)),
    goal("d-randread-4k-q16-c1", 4.0, None, None),
    goal("d-randread-4k-q16-1t", 6.0, Some(2.0), None),
    goal("d-randread-4k-q64-c1", 5.0, None, Some(1.5)),
    goal("d-randread-4k-q64-c4", 8.0, None, Some(1.5)),
    goal("d-randwrite-4k-q16-c1", 2.0, None, None),
    goal("d-randwrite-4k-q64-c4", 1.8, None, None),
    goal("d-alloc-4k-rand-q16", 2.0, None, None),
    goal("d-alloc-64k-q16", 1.5, None, None),
    goal("d-seqread-1m-q1-c1", 1.5, None, None),
    goal("d-seqread-1m-q16-c1", 2.5, None, None),
];

const HEADER: &str = "
| cell | CPU for each operation, ours | qemu-nbd ÷ ours: best (median) | target | \
qemu-nbd ÷ least | tuned ÷ ours | target | nbdkit ÷ ours | target | server memory: ours, qemu-nbd | |
|---|---|---|---|---|---|---|---|---|---|---|";

const fn goal(cell: &'static str, stock: f64, tuned: Option<f64>, nbdkit: Option<f64>) -> Goal {
    Goal { cell, stock, tuned, nbdkit }
}

pub(super) fn cells() -> impl Iterator<Item = &'static str> {
    GOALS.iter().map(|goal| goal.cell)
}

/// Returns the table of what servers took; nothing where no such cell ran.
pub(super) fn rows(cells: &BTreeMap<String, Value>) -> Vec<String> {
    let of = |goal: &Goal| {
        let mut ours = cells.iter().filter(|(name, _)| is_one_of(&[goal.cell], name));
        ours.next().map(|(_, cell)| goal.row(cell))
    };
    under(HEADER, GOALS.iter().filter_map(of).collect())
}

impl Goal {
    fn row(&self, cell: &Value) -> String {
        let runs = |side| Runs::of(cell, side, "cpu us/op", "server rss MiB");
        let (ours, stock, tuned) = (runs("ours"), runs("peer"), runs("tuned"));
        let (bound, nbdkit) = (runs("least"), runs("nbdkit"));
        if ours.cpu.is_empty() {
            return format!("| {} | not run: {} |||||||||| ", self.cell, not_run(cell));
        }
        let is_reached = ours.reaches(&stock, Some(self.stock))
            && (tuned.cpu.is_empty() || ours.reaches(&tuned, self.tuned))
            && (nbdkit.cpu.is_empty() || ours.reaches(&nbdkit, self.nbdkit));
        let target = |target: Option<f64>| target.map_or_else(|| "–".into(), |it| it.to_string());
        format!(
            "| {} | {} µs | {} | {} | {} | {} | {} | {} | {} | {}, {} MiB | {} |",
            self.cell,
            shown(least(&ours.cpu), 2),
            ours.beats(&stock),
            self.stock,
            shown(bound.best(&stock), 2),
            shown(ours.best(&tuned), 2),
            target(self.tuned),
            shown(ours.best(&nbdkit), 2),
            target(self.nbdkit),
            shown(ours.memory, 0),
            shown(stock.memory, 0),
            if is_reached { "reached" } else { "**missed**" },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::table;

    const RUN: &str = r#"{"cell": "d-randread-4k-q64-c1", "load": 2.5, "failed": {}, "runs": {
        "ours": [{"cpu us/op": [3.0, "low"], "server rss MiB": [8, "low"]}],
        "peer": [{"cpu us/op": [18.0, "low"], "server rss MiB": [9, "low"]}],
        "least": [{"cpu us/op": [2.0, "low"], "server rss MiB": [1, "low"]}],
        "nbdkit": [{"cpu us/op": [4.2, "low"], "server rss MiB": [5, "low"]}]}}"#;

    #[test]
    fn a_cell_is_judged_against_every_peer() {
        let line = RUN.replace('\n', " ");
        let row = "| d-randread-4k-q64-c1 | 3.00 µs | 6.00 (6.00) | 5 | 9.00 | – | – | 1.40 | 1.5 | 8, 9 MiB |";
        let text = table(&line).unwrap();
        assert!(text.contains(&format!("{row} **missed** |")), "{text}");
        let text = table(&line.replace("4.2", "4.5")).unwrap();
        assert!(text.contains("| reached |"), "{text}");
    }
}
