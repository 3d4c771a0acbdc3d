//! The grid of a profile: shapes of passes that the scheduler could compose.

use std::collections::BTreeSet;

/// History of decode rows that represent rows without history: the shortest that a decode row can have.
pub(super) const SHORT: u32 = 1;
/// Number of prompt chunks in a pass with several: a first and a further one.
pub(super) const PROMPTS: u32 = 2;
/// Reading a signal is timed at depths that are neither the first, which embeds, nor the last, where none is read.
const FEWEST_LOOPS_OF_SIGNALS: u32 = 2;

/// The shapes to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Rows of a pass, without histories.
    pub(super) rows: Vec<u32>,
    /// Decode rows of a pass.
    pub(super) decodes: Vec<u32>,
    /// Histories of decode rows, and before prompt chunks.
    pub(super) histories: Vec<u32>,
    /// Tokens of a prompt chunk.
    pub(super) chunks: Vec<u32>,
}

/// Upper limits of the passes of a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a pass.
    pub rows: u32,
    /// Decode rows of a pass: sequences that run at once.
    pub decodes: u32,
    /// Tokens of a sequence.
    pub history: u32,
    /// Prompt tokens of one chunk.
    pub chunk: u32,
}

impl Grid {
    /// A grid up to the limits, denser for small passes.
    pub fn up_to(limits: Limits) -> Self {
        let up_to = |points: &[u32], limit: u32| {
            let mut points: Vec<u32> = points.iter().copied().filter(|&point| point < limit).collect();
            let mut next = 2 * points.last().copied().unwrap_or(1);
            while next < limit {
                points.push(next);
                next *= 2;
            }
            points.push(limit.max(1));
            points
        };
        Self {
            rows: up_to(
                &[1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256],
                limits.rows,
            ),
            decodes: up_to(&[1, 2, 4, 8, 16, 24, 32, 48, 64], limits.decodes.min(limits.rows)),
            histories: up_to(&[32, 64, 128, 256], limits.history),
            chunks: up_to(&[1, 8, 16, 32, 64, 128], limits.chunk.min(limits.rows)),
        }
    }

    pub(super) fn max(points: &[u32]) -> u32 {
        points.iter().copied().max().unwrap_or(1)
    }
}

/// Shape of a measured pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// Decode rows with a history, at one depth other than 0, without head and embedding.
    Decode { rows: u32, history: u32 },
    /// Decode rows with a history, after a pass with more such rows.
    AfterMore { rows: u32, before: u32, history: u32 },
    /// Rows at the last depth with a history, for which the exit head runs: after the pass, of which only the time of the exit
    /// counts, or `within` it, where its weights and launches are among others. `again` if the previous passes ran the head too.
    Head { rows: u32, history: u32, again: bool, within: bool },
    /// Decode rows with a history, of which an exit signal is read that does not need the head, and none exits.
    Signal { rows: u32, history: u32 },
    /// Rows that exit at the first depth, or at the last, after the head has run. Only the time of the exit counts.
    /// Each pass has another history, since exits write to memory that was not used for long and is in no cache.
    Exit { rows: u32, skips: bool },
    /// Rows with a history, spread over depths including the first, after a pass of the same kind.
    Mix { rows: u32, depths: u32, history: u32 },
    /// One prompt chunk.
    Prefill { tokens: u32, history: u32 },
    /// [`PROMPTS`] prompt chunks of `tokens` tokens each.
    Prefills { tokens: u32, history: u32 },
    /// One prompt chunk at a depth beside decode rows, which are spread over `depths` depths, all with a history. It is no
    /// component: it shows how far the sum of components is from such a pass.
    Beside { tokens: u32, rows: u32, depths: u32, history: u32 },
}

impl Shape {
    /// Number of all rows.
    pub(super) fn rows(self) -> u32 {
        match self {
            Self::Prefill { tokens, .. } => tokens,
            Self::Prefills { tokens, .. } => PROMPTS * tokens,
            Self::Beside { tokens, rows, .. } => tokens + rows,
            _ => self.decodes().unwrap_or_default(),
        }
    }

    /// Baseline shape whose time is subtracted; `None` where the whole time is the component's.
    pub(super) fn baseline(self) -> Option<Self> {
        let decode = |rows, history| Some(Self::Decode { rows, history });
        match self {
            Self::Decode { history: SHORT, .. }
            | Self::Head { within: false, .. }
            | Self::Exit { skips: false, .. }
            | Self::Beside { .. } => None,
            Self::Decode { rows, .. } | Self::Prefill { tokens: rows, .. } => decode(rows, SHORT),
            Self::Prefills { tokens, .. } => decode(PROMPTS * tokens, SHORT),
            Self::AfterMore { rows, history, .. }
            | Self::Head { rows, history, within: true, .. }
            | Self::Mix { rows, history, .. }
            | Self::Signal { rows, history } => decode(rows, history),
            Self::Exit { rows, skips: true } => Some(Self::Exit { rows, skips: false }),
        }
    }

    /// Number of decode rows; `None` for prompt chunks alone.
    pub(super) fn decodes(self) -> Option<u32> {
        match self {
            Self::Decode { rows, .. }
            | Self::AfterMore { rows, .. }
            | Self::Head { rows, .. }
            | Self::Exit { rows, .. }
            | Self::Signal { rows, .. }
            | Self::Mix { rows, .. }
            | Self::Beside { rows, .. } => Some(rows),
            Self::Prefill { .. } | Self::Prefills { .. } => None,
        }
    }
}

/// What decides which shapes are measured, beside the grid.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measurable {
    pub num_loops: u32,
    pub has_gate: bool,
    /// Whether a head after a pass is a trip of its own to a device, so that it takes longer than one within.
    pub heads_are_trips: bool,
}

/// The shapes of a grid.
pub(super) fn shapes(grid: &Grid, measurable: Measurable) -> Vec<Shape> {
    let Measurable { num_loops, has_gate, heads_are_trips } = measurable;
    let mut shapes = Vec::new();
    let mut rows_of_differences: Vec<u32> =
        grid.rows.iter().chain(&grid.decodes).chain(&grid.chunks).copied().collect();
    let twice = grid.chunks.iter().copied().filter(|tokens| PROMPTS * tokens <= Grid::max(&grid.rows));
    let twice: Vec<u32> = twice.collect();
    rows_of_differences.extend(twice.iter().map(|tokens| PROMPTS * tokens));
    rows_of_differences.sort_unstable();
    rows_of_differences.dedup();
    for rows in rows_of_differences {
        shapes.push(Shape::Decode { rows, history: SHORT });
    }
    let typical = grid.histories[grid.histories.len() / 2];
    for &rows in &grid.decodes {
        let head = |again, within| Shape::Head { rows, history: typical, again, within };
        shapes.push(head(false, false));
        if heads_are_trips {
            shapes.push(head(false, true));
        }
        if has_gate && num_loops > FEWEST_LOOPS_OF_SIGNALS {
            shapes.push(Shape::Signal { rows, history: typical });
        }
        // With one loop, every pass runs the head.
        if num_loops > 1 {
            shapes.push(head(true, heads_are_trips));
            shapes.extend([true, false].map(|skips| Shape::Exit { rows, skips }));
        }
        shapes.extend(grid.histories.iter().map(|&history| Shape::Decode { rows, history }));
    }
    let largest = Grid::max(&grid.rows);
    for &rows in &grid.decodes {
        let befores = BTreeSet::from([2 * rows, Grid::max(&grid.decodes), largest]);
        let more = befores.into_iter().filter(|before| (rows + 1..=largest).contains(before));
        shapes.extend(more.map(|before| Shape::AfterMore { rows, before, history: typical }));
    }
    for rows in grid.decodes.iter().copied().filter(|&rows| rows < largest).chain([largest]) {
        let history = if grid.decodes.contains(&rows) { typical } else { SHORT };
        shapes.extend((2..=num_loops.min(rows)).map(|depths| Shape::Mix { rows, depths, history }));
    }
    for &tokens in &grid.chunks {
        let histories = [0].into_iter().chain(grid.histories.iter().copied());
        shapes.extend(histories.map(|history| Shape::Prefill { tokens, history }));
    }
    let ends = |points: &[u32]| BTreeSet::from([points[points.len() / 2], Grid::max(points)]);
    for tokens in ends(&grid.chunks) {
        for rows in ends(&grid.decodes).into_iter().filter(|rows| rows + tokens <= largest) {
            let depths = BTreeSet::from([1, num_loops.min(rows)]);
            shapes.extend(depths.into_iter().map(|depths| Shape::Beside { tokens, rows, depths, history: typical }));
        }
    }
    // Little is added beside a chunk, so the shortest and the longest history are enough.
    for tokens in twice {
        shapes.extend([0, Grid::max(&grid.histories)].map(|history| Shape::Prefills { tokens, history }));
    }
    shapes
}

/// A distinct number for each shape.
pub(super) fn key(shape: Shape) -> u64 {
    let (kind, a, b) = match shape {
        Shape::Decode { rows, history } => (0, rows, history),
        Shape::Head { rows, again, within, .. } => (if within { 8 } else { 2 }, rows, u32::from(again)),
        Shape::AfterMore { rows, before, .. } => (1, rows, before),
        Shape::Mix { rows, depths, .. } => (3, rows, depths),
        Shape::Prefill { tokens, history } => (4, tokens, history),
        Shape::Prefills { tokens, history } => (6, tokens, history),
        Shape::Signal { rows, history } => (7, rows, history),
        Shape::Exit { rows, skips } => (5, rows, u32::from(skips)),
        Shape::Beside { tokens, rows, depths, .. } => (9, rows, tokens << 8 | depths),
    };
    (kind << 60) | (u64::from(a) << 30) | u64::from(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_rises_to_its_limits() {
        for (rows, decodes, history, chunk) in [(1, 1, 1, 1), (320, 64, 700, 256), (600, 600, 33, 600), (7, 64, 40, 9)]
        {
            let grid = Grid::up_to(Limits { rows, decodes, history, chunk });
            for points in [&grid.rows, &grid.decodes, &grid.histories, &grid.chunks] {
                assert!(points.is_sorted() && points.windows(2).all(|pair| pair[0] < pair[1]), "{points:?}");
            }
            assert_eq!((Grid::max(&grid.rows), Grid::max(&grid.histories)), (rows, history));
            assert_eq!((Grid::max(&grid.decodes), Grid::max(&grid.chunks)), (decodes.min(rows), chunk.min(rows)));
        }
    }

    #[test]
    fn the_baseline_of_a_shape_is_measured_and_has_the_same_number_of_rows() {
        for (rows, decodes, num_loops, has_gate, heads_are_trips) in
            [(20, 5, 3, true, false), (64, 64, 4, false, true), (3, 1, 1, true, true)]
        {
            let grid = Grid::up_to(Limits { rows, decodes, history: 40, chunk: 12 });
            let shapes = shapes(&grid, Measurable { num_loops, has_gate, heads_are_trips });
            for shape in &shapes {
                let Some(baseline) = shape.baseline() else { continue };
                assert!(shapes.contains(&baseline) && baseline.rows() == shape.rows(), "{shape:?} less {baseline:?}");
                assert_eq!(baseline.baseline().and_then(Shape::baseline), None, "{shape:?}");
            }
            let reads_signals = shapes.iter().any(|shape| matches!(shape, Shape::Signal { .. }));
            assert_eq!(reads_signals, has_gate && num_loops > 2, "{shapes:?}");
            let within = shapes.iter().any(|shape| matches!(shape, Shape::Head { within: true, .. }));
            assert_eq!(within, heads_are_trips, "{shapes:?}");
            let beside = |shape: &&Shape| matches!(shape, Shape::Beside { depths: 1, .. });
            assert_eq!(shapes.iter().any(|shape| beside(&shape)), rows > 1, "{shapes:?}");
            assert!(shapes.iter().all(|shape| shape.rows() <= rows), "{shapes:?}");
            let more = shapes.iter().filter(|shape| matches!(shape, Shape::AfterMore { .. })).count();
            assert_eq!(more > 0, rows > 1, "{shapes:?}");
        }
    }
}
