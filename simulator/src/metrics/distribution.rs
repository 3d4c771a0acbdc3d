//! Distribution of latencies: exact for few values, in bounded memory for many.

use hdrhistogram::Histogram;
use traces::Nanos;

/// Durations and their quantiles.
///
/// Up to [`EXACT`](Self::EXACT) values are stored. Beyond that, values go into a high-dynamic-range histogram whose
/// quantiles are at most 0.1% too high. The mean is exact in both cases.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    exact: Vec<u64>,
    sketch: Option<Box<Sketch>>,
}

/// The histogram of many values.
#[derive(Clone, Debug)]
struct Sketch {
    histogram: Histogram<u64>,
    sum: u128,
    /// By key: the last value and its count, not yet in the histogram. Counting repeats is faster than finding a
    /// bucket.
    recent: [(u64, u64); Distribution::KEYS],
}

const RESIZES: &str = "a histogram that resizes itself holds any value";

impl Sketch {
    fn new() -> Self {
        let histogram = Histogram::new(3).expect("3 significant digits are in range");
        Self { histogram, sum: 0, recent: [(0, 0); Distribution::KEYS] }
    }

    #[inline]
    fn record(&mut self, value: u64, key: usize) {
        let recent = &mut self.recent[key % Distribution::KEYS];
        match recent.0 == value {
            true => recent.1 += 1,
            false => self.settle_recent(value, key),
        }
    }

    #[inline(never)]
    fn settle_recent(&mut self, value: u64, key: usize) {
        let evicted = std::mem::replace(&mut self.recent[key % Distribution::KEYS], (value, 1));
        self.settle(evicted);
    }

    fn settle(&mut self, (value, count): (u64, u64)) {
        self.histogram.record_n(value, count).expect(RESIZES);
        self.sum += u128::from(value) * u128::from(count);
    }

    fn settled(&self) -> Self {
        let mut settled = self.clone();
        for recent in std::mem::take(&mut settled.recent) {
            settled.settle(recent);
        }
        settled
    }

    fn merge(&mut self, other: &Self) {
        let other = other.settled();
        self.histogram.add(&other.histogram).expect(RESIZES);
        self.sum += other.sum;
    }
}

impl Distribution {
    /// Largest number of values whose quantiles are exact.
    pub const EXACT: usize = 100_000;

    /// Number of keys that [`record_by_key`](Self::record_by_key) distinguishes.
    pub const KEYS: usize = 8;

    /// Adds a value.
    #[inline]
    pub fn record(&mut self, value: Nanos) {
        self.record_by_key(value, 0);
    }

    /// Adds a value. Values that repeat under one `key` are counted fastest.
    #[inline]
    pub fn record_by_key(&mut self, value: Nanos, key: usize) {
        match &mut self.sketch {
            Some(sketch) => sketch.record(value.0, key),
            None => self.record_exact(value.0),
        }
    }

    #[inline(never)]
    fn record_exact(&mut self, value: u64) {
        self.exact.push(value);
        if self.exact.len() > Self::EXACT {
            self.sketch_exact();
        }
    }

    fn sketch_exact(&mut self) -> &mut Sketch {
        let sketch = self.sketch.get_or_insert_with(|| Box::new(Sketch::new()));
        for value in std::mem::take(&mut self.exact) {
            sketch.record(value, 0);
        }
        sketch
    }

    /// Adds the values of another distribution.
    pub fn merge(&mut self, other: Self) {
        if self.sketch.is_none() && other.sketch.is_none() && self.exact.len() + other.exact.len() <= Self::EXACT {
            self.exact.extend(other.exact);
            return;
        }
        let sketch = self.sketch_exact();
        for value in other.exact {
            sketch.record(value, 0);
        }
        if let Some(other) = other.sketch {
            sketch.merge(&other);
        }
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        match &self.sketch {
            Some(sketch) => sketch.settled().histogram.len(),
            None => self.exact.len() as u64,
        }
    }

    /// Mean in milliseconds; NaN without values.
    pub fn mean_ms(&self) -> f64 {
        let sum = match &self.sketch {
            Some(sketch) => sketch.settled().sum,
            None => self.exact.iter().map(|&value| u128::from(value)).sum(),
        };
        sum as f64 / self.count() as f64 / 1e6
    }

    /// Quantiles in milliseconds, in the given order; NaN without values.
    ///
    /// Quantiles between two values are interpolated linearly, as by default in NumPy.
    pub fn quantiles_ms<const N: usize>(&self, quantiles: [f64; N]) -> [f64; N] {
        if let Some(sketch) = &self.sketch {
            let histogram = sketch.settled().histogram;
            return quantiles.map(|quantile| histogram.value_at_quantile(quantile) as f64 / 1e6);
        }
        let mut sorted = self.exact.clone();
        sorted.sort_unstable();
        quantiles.map(|quantile| {
            let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
            let place = quantile * last as f64;
            let below = sorted[place as usize] as f64;
            let above = sorted[(place as usize + 1).min(last)] as f64;
            (below + place.fract() * (above - below)) / 1e6
        })
    }

    /// The values in milliseconds, in ascending order, each with the share of values up to it: about `points` of them
    /// at most.
    pub fn cdf_ms(&self, points: usize) -> Vec<(f64, f64)> {
        let count = self.count();
        let mut sorted: Vec<(u64, u64)> = match &self.sketch {
            Some(sketch) => {
                let counts = sketch.settled().histogram;
                counts.iter_recorded().map(|v| (v.value_iterated_to(), v.count_since_last_iteration())).collect()
            }
            None => self.exact.iter().map(|&value| (value, 1)).collect(),
        };
        sorted.sort_unstable();
        let step = count.div_ceil(points as u64);
        let mut cdf = Vec::new();
        let (mut seen, mut next) = (0, 0);
        for (value, times) in sorted {
            seen += times;
            if seen > next || seen == count {
                cdf.push((value as f64 / 1e6, seen as f64 / count as f64));
                next = seen + step - 1;
            }
        }
        cdf
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn distribution(values: impl IntoIterator<Item = u64>) -> Distribution {
        let mut distribution = Distribution::default();
        values.into_iter().for_each(|value| distribution.record(Nanos(value)));
        distribution
    }

    #[test]
    fn quantiles_of_few_values_are_interpolated_between_them() {
        let distribution = distribution([4_000_000, 1_000_000, 3_000_000, 2_000_000]);
        let found = distribution.quantiles_ms([0.0, 0.5, 0.9, 1.0]);
        assert!(
            found.iter().zip([1.0, 2.5, 3.7, 4.0]).all(|(found, expected)| (found - expected).abs() < 1e-12),
            "{found:?}"
        );
        assert_eq!(distribution.mean_ms(), 2.5);
    }

    #[test]
    fn without_values_there_is_no_mean_and_no_quantile() {
        let empty = Distribution::default();
        assert!(empty.mean_ms().is_nan() && empty.quantiles_ms([0.5])[0].is_nan() && empty.cdf_ms(10).is_empty());
    }

    #[test]
    fn quantiles_of_many_values_are_within_a_thousandth() {
        let values: Vec<u64> = (0..3 * Distribution::EXACT as u64).map(|i| 1000 + i * i).collect();
        let sketched = distribution(values.iter().copied());
        for quantile in [0.01, 0.5, 0.9, 0.99, 0.999] {
            let exact = values[(quantile * values.len() as f64).ceil() as usize - 1] as f64 / 1e6;
            let [found] = sketched.quantiles_ms([quantile]);
            assert!((found / exact - 1.0).abs() <= 1e-3, "{quantile}: {found} for {exact}");
        }
        let mean = values.iter().sum::<u64>() as f64 / values.len() as f64 / 1e6;
        assert!((sketched.mean_ms() / mean - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_cdf_rises_to_one() {
        for count in [1, 7, 1000, 2 * Distribution::EXACT as u64] {
            let cdf = distribution((0..count).map(|i| i * 1000)).cdf_ms(100);
            assert!(cdf.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1) && cdf.len() <= 101, "{count}: {}", cdf.len());
            assert_eq!(cdf.last().unwrap().1, 1.0);
        }
    }

    proptest! {
        #[test]
        fn merged_parts_equal_the_whole(values in prop::collection::vec(0u64..10_000_000_000, 0..200), split in 0usize..200) {
            let split = split.min(values.len());
            let mut merged = distribution(values[..split].iter().copied());
            merged.merge(distribution(values[split..].iter().copied()));
            let whole = distribution(values.iter().copied());
            prop_assert_eq!(merged.count(), whole.count());
            if whole.count() > 0 {
                prop_assert_eq!(merged.mean_ms(), whole.mean_ms());
                prop_assert_eq!(merged.quantiles_ms([0.5, 0.99]), whole.quantiles_ms([0.5, 0.99]));
            }
        }
    }
}
