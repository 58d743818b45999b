//! Where everything is to go: pure, from what is in use.
//!
//! * The goal is the smallest length for which the clusters in use fit, with the refcount blocks that
//!   count just those.
//! * A table of several clusters needs a run. The one with the fewest clusters in use below the goal is
//!   its window; what is in the window moves out first, into holes, like the tail.

use super::bits::Bits;

/// Neighbouring clusters that move together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) clusters: u64,
}

impl Run {
    pub(super) const fn end(self) -> u64 {
        self.first + self.clusters
    }

    pub(super) fn iter(self) -> impl Iterator<Item = u64> {
        self.first..self.end()
    }
}

/// What the plan is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    /// Clusters in use.
    pub(super) used: &'a Bits,
    /// The refcount blocks among them.
    pub(super) blocks: u64,
    /// Clusters that one block counts.
    pub(super) per_block: u64,
    /// Everything of several clusters.
    pub(super) tables: &'a [Run],
}

/// What is to move, and where there is room.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The length to reach, in clusters.
    pub(super) goal: u64,
    /// Free clusters below the goal that are not in a window.
    pub(super) holes: Bits,
    /// Tables of several clusters that are to move, with the first cluster of where to.
    pub(super) windows: Vec<(Run, u64)>,
}

/// Returns the smallest number of clusters that holds `others` clusters and the blocks that count
/// them all.
pub(in crate::qcow2) fn goal(others: u64, per_block: u64) -> u64 {
    let mut goal = others;
    // Each step adds the blocks of what the last one added: a geometric series.
    loop {
        let next = others + goal.div_ceil(per_block);
        if next <= goal {
            return goal;
        }
        goal = next;
    }
}

impl Plan {
    pub(super) fn new(facts: &Facts<'_>) -> Self {
        let used = facts.used.iter().count() as u64;
        let goal = goal(used - facts.blocks, facts.per_block);
        let windows = windows(facts, goal);
        let mut holes = Bits::new(goal);
        (0..goal).filter(|cluster| !facts.used.contains(*cluster)).for_each(|it| holes.insert(it));
        for (run, first) in &windows {
            (*first..first + run.clusters).for_each(|cluster| holes.remove(cluster));
        }
        Self { goal, holes, windows }
    }

    /// Says whether a cluster is to be empty before a table comes there.
    pub(super) fn in_window(&self, cluster: u64) -> bool {
        self.windows.iter().any(|(run, to)| (*to..to + run.clusters).contains(&cluster))
    }

    /// Returns where the table is to go that lies there.
    pub(super) fn window(&self, table: Run) -> Option<u64> {
        self.windows.iter().find(|(run, _)| *run == table).map(|(_, to)| *to)
    }
}

/// Finds a window for each table that passes the goal.
fn windows(facts: &Facts<'_>, goal: u64) -> Vec<(Run, u64)> {
    let large = |run: &&Run| run.clusters > 1;
    let mut taken = Bits::new(goal);
    // The header stays; so do tables that lie well.
    taken.insert(0);
    let runs = facts.tables.iter().filter(large).flat_map(|run| run.iter());
    runs.for_each(|cluster| taken.insert(cluster));
    let mut windows = Vec::new();
    for table in facts.tables.iter().filter(large).filter(|run| run.end() > goal) {
        if let Some(first) = window(facts.used, &taken, table.clusters, goal) {
            (first..first + table.clusters).for_each(|cluster| taken.insert(cluster));
            windows.push((*table, first));
        }
    }
    windows
}

/// Finds the run below `goal` with the fewest clusters in use, the first of several.
fn window(used: &Bits, taken: &Bits, clusters: u64, goal: u64) -> Option<u64> {
    let mut best: Option<(u64, u64)> = None;
    let (mut in_use, mut in_way) = (0, 0);
    for last in 0..goal {
        in_use += u64::from(used.contains(last));
        in_way += u64::from(taken.contains(last));
        let Some(first) = (last + 1).checked_sub(clusters) else { continue };
        if in_way == 0 && best.is_none_or(|(least, _)| in_use < least) {
            best = Some((in_use, first));
            if in_use == 0 {
                break;
            }
        }
        in_use -= u64::from(used.contains(first));
        in_way -= u64::from(taken.contains(first));
    }
    best.map(|(_, first)| first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(clusters: impl IntoIterator<Item = u64>) -> Bits {
        let mut bits = Bits::new(1000);
        clusters.into_iter().for_each(|cluster| bits.insert(cluster));
        bits
    }

    #[test]
    fn the_goal_counts_the_blocks_that_count_it() {
        for per_block in [64, 256, 4096] {
            for others in 2..3000 {
                let goal = goal(others, per_block);
                assert_eq!(goal, others + goal.div_ceil(per_block), "{others} {per_block}");
                let less = goal - 1;
                assert!(others + less.div_ceil(per_block) > less, "{others} {per_block}");
            }
        }
    }

    #[test]
    fn holes_are_as_many_as_clusters_beyond_the_goal() {
        // Header, table of refcounts, block, and a tail.
        let used = bits([0, 1, 2, 5, 90, 91, 95, 99]);
        let facts = Facts { used: &used, blocks: 1, per_block: 4096, tables: &[] };
        let plan = Plan::new(&facts);
        assert_eq!(plan.goal, 8);
        assert_eq!(plan.holes.iter().collect::<Vec<_>>(), [3, 4, 6, 7]);
    }

    #[test]
    fn a_table_gets_the_window_that_costs_least() {
        let tables = [Run { first: 90, clusters: 3 }, Run { first: 4, clusters: 2 }];
        let used = bits([0, 1, 2, 4, 5, 7, 9, 90, 91, 92, 95, 96, 97]);
        let facts = Facts { used: &used, blocks: 1, per_block: 4096, tables: &tables };
        let plan = Plan::new(&facts);
        assert_eq!((plan.goal, plan.windows.as_slice()), (13, &[(tables[0], 10)][..]));
        assert_eq!(plan.window(tables[0]), Some(10));
        assert!(plan.in_window(12) && !plan.in_window(13));
        assert_eq!(plan.holes.iter().collect::<Vec<_>>(), [3, 6, 8]);
    }

    #[test]
    fn an_image_without_holes_needs_nothing() {
        let used = bits(0..9);
        let plan = Plan::new(&Facts { used: &used, blocks: 1, per_block: 64, tables: &[] });
        assert_eq!((plan.goal, plan.holes.next(0), plan.windows.len()), (9, None, 0));
    }
}
