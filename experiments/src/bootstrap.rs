//! Confidence intervals by the percentile bootstrap.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Samples that an interval is of.
const SAMPLES: usize = 2000;

/// The interval that holds the middle 95% of the values of samples, each of as many items as there are, drawn from them with
/// replacement; none of fewer than two items. A sample is given by the indices of its items. The random numbers are
/// always the same.
pub fn interval(items: usize, value: impl Fn(&[usize]) -> f64) -> Option<(f64, f64)> {
    if items < 2 {
        return None;
    }
    let mut rng = StdRng::seed_from_u64(1);
    let mut sample = vec![0; items];
    let mut of_sample = |_| {
        sample.fill_with(|| rng.random_range(0..items));
        value(&sample)
    };
    let mut values: Vec<f64> = (0..SAMPLES).map(&mut of_sample).collect();
    values.sort_unstable_by(f64::total_cmp);
    let tail = SAMPLES / 40;
    Some((values[tail], values[SAMPLES - 1 - tail]))
}
