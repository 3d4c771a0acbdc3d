//! A latency model that is fitted to logged passes: a sum of features of the work with coefficients of at least 0.

use traces::{ChunkWork, LoggedPass, PassWork};

use crate::nnls::Normal;

/// Times that the squares of the fit are reweighted: a pass that other work interrupts counts little in the end.
const REWEIGHTINGS: usize = 5;
/// Relative deviation above which a pass counts less.
const OUTLIER: f64 = 0.1;

/// What the time of a pass is a sum of.
#[derive(Clone, Debug)]
pub struct Features {
    /// Numbers of rows between which the time is linear in the rows.
    row_knots: Vec<u32>,
    /// The same for rows of the head.
    head_knots: Vec<u32>,
    num_loops: u32,
}

impl Features {
    /// Features with the knots of a grid.
    pub fn new<'p>(grid: impl Iterator<Item = &'p LoggedPass> + Clone, num_loops: u32) -> Self {
        let knots = |of: fn(&PassWork) -> u32| {
            let mut knots: Vec<u32> = grid.clone().map(|pass| of(&pass.work)).filter(|&rows| rows > 0).collect();
            knots.sort_unstable();
            knots.dedup();
            knots
        };
        Self { row_knots: knots(|work| work.rows), head_knots: knots(|work| work.exit_head_rows), num_loops }
    }

    /// The features of a pass.
    pub fn of(&self, work: &PassWork) -> Vec<f64> {
        let mut features = vec![1.0];
        ramps(&self.row_knots, work.rows, &mut features);
        features.extend([f64::from(work.decode_rows), work.decode_history as f64]);
        chunks(&work.chunks, &mut features);
        // The head takes longer where it has not just run: a feature of its own.
        let (in_pass, after) = (work.head_rows, work.exit_head_rows);
        for (rows, is_cold) in [(in_pass, !work.before.head), (after, !work.head_is_warm())] {
            features.extend([f64::from(u8::from(rows > 0)), f64::from(u8::from(rows > 0 && is_cold))]);
            ramps(&self.head_knots, rows, &mut features);
        }
        for rows in [work.signal_rows, work.decided_rows] {
            features.extend([f64::from(u8::from(rows > 0)), f64::from(rows)]);
        }
        features.extend([f64::from(u8::from(work.embed_rows > 0)), f64::from(work.embed_rows)]);
        let more_depths = |depths: u32| f64::from(u8::from(work.depths >= depths));
        features.extend((2..=self.num_loops).map(more_depths));
        features.push(f64::from(work.depths.saturating_sub(1)) * f64::from(work.rows));
        features.extend([f64::from(u8::from(work.filled_depths > 0)), f64::from(work.filled_depths)]);
        let fewer = work.before.rows.saturating_sub(work.rows);
        features.extend([f64::from(u8::from(fewer > 0)), f64::from(fewer)]);
        features
    }
}

/// A rising piecewise-linear function has slopes of at least 0: one feature for each distance between knots.
fn ramps(knots: &[u32], x: u32, features: &mut Vec<f64>) {
    let mut below = 0;
    for (place, &knot) in knots.iter().enumerate() {
        // The last slope goes on.
        let end = if place + 1 == knots.len() { u32::MAX } else { knot };
        features.push(f64::from(x.min(end).saturating_sub(below)));
        below = knot;
    }
}

/// Tokens, and tokens times their mean context: of the chunk with the most keys, and of all others.
fn chunks(chunks: &[ChunkWork], features: &mut Vec<f64>) {
    let longest = (0..chunks.len()).max_by_key(|&place| chunks[place].tokens + chunks[place].history);
    let mut sums = [[0.0; 3]; 2];
    for (place, chunk) in chunks.iter().enumerate() {
        let tokens = f64::from(chunk.tokens);
        let context = f64::from(chunk.history) + tokens / 2.0;
        let sums = &mut sums[usize::from(Some(place) != longest)];
        sums.iter_mut().zip([1.0, tokens, tokens * context]).for_each(|(sum, value)| *sum += value);
    }
    features.extend(sums.into_iter().flatten());
}

/// A fitted model.
#[derive(Clone, Debug)]
pub struct Fitted {
    features: Features,
    /// Nanoseconds of each feature.
    coefficients: Vec<f64>,
}

impl Fitted {
    /// Fits the relative errors of passes.
    pub fn new<'p>(features: Features, passes: impl Iterator<Item = &'p LoggedPass>) -> Self {
        let rows: Vec<(Vec<f64>, f64)> =
            passes.map(|pass| (features.of(&pass.work), pass.elapsed.0 as f64)).filter(|row| row.1 > 0.0).collect();
        let mut weights = vec![1.0; rows.len()];
        let mut coefficients = Vec::new();
        for _ in 0..REWEIGHTINGS {
            let mut normal = Normal::new(rows.first().map_or(0, |row| row.0.len()));
            for ((row, time), weight) in rows.iter().zip(&weights) {
                normal.add(row, *time, weight / (time * time));
            }
            coefficients = normal.solve();
            for ((row, time), weight) in rows.iter().zip(&mut weights) {
                let deviation = (sum(row, &coefficients) / time - 1.0).abs();
                *weight = (OUTLIER / deviation).min(1.0);
            }
        }
        Self { features, coefficients }
    }

    /// Time of a pass, in nanoseconds.
    pub fn pass_ns(&self, work: &PassWork) -> f64 {
        sum(&self.features.of(work), &self.coefficients)
    }

    /// Numbers of all features and of those that are used.
    pub fn sizes(&self) -> (usize, usize) {
        (self.coefficients.len(), self.coefficients.iter().filter(|coefficient| **coefficient > 0.0).count())
    }
}

fn sum(features: &[f64], coefficients: &[f64]) -> f64 {
    features.iter().zip(coefficients).map(|(feature, coefficient)| feature * coefficient).sum()
}
