//! Pass times drawn from the measured spread around the median, so that simulated tails are not too thin.
//!
//! A time is log-normal with the measured median `m` and half distance between quartiles `h`. Its quartiles are `m
//! exp(-q s)` and `m exp(q s)`, where `q` is the upper quartile of the normal distribution. Half their distance is `m
//! sinh(q s)`, so `s = asinh(h / m) / q`. Like latencies, the distribution is right-skewed and positive.

use crate::exits::hash;

/// Upper quartile of the standard normal distribution.
const QUARTILE: f64 = 0.674_489_750_196_081_7;

/// A seeded source of times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    seed: u64,
    draws: u64,
}

impl Spread {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, draws: 0 }
    }

    /// Draws a time with this median and this squared half distance between quartiles.
    pub(crate) fn draw(&mut self, median_ns: f64, squared_spread: f64) -> f64 {
        if median_ns <= 0.0 || squared_spread <= 0.0 {
            return median_ns;
        }
        let sigma = (squared_spread.sqrt() / median_ns).asinh() / QUARTILE;
        median_ns * (sigma * self.normal()).exp()
    }

    /// A standard normal number (Box and Muller's transform).
    fn normal(&mut self) -> f64 {
        let mut unit = || {
            self.draws += 1;
            ((hash(self.seed, self.draws) >> 11) + 1) as f64 / (1u64 << 53) as f64
        };
        let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), std::f64::consts::TAU * unit());
        radius * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(seed: u64, median: f64, spread: f64) -> Vec<f64> {
        let mut stream = Spread::new(seed);
        (0..100_000).map(|_| stream.draw(median, spread * spread)).collect()
    }

    #[test]
    fn draws_have_the_median_and_the_quartiles_that_were_measured() {
        for spread in [1.0, 20.0, 300.0] {
            let mut times = drawn(7, 100.0, spread);
            times.sort_by(f64::total_cmp);
            let quantile = |share: f64| times[(share * times.len() as f64) as usize];
            let half = (quantile(0.75) - quantile(0.25)) / 2.0;
            assert!((quantile(0.5) / 100.0 - 1.0).abs() < 0.04, "median {}", quantile(0.5));
            assert!((half / spread - 1.0).abs() < 0.02, "half distance {half} for {spread}");
            assert!(times[0] > 0.0);
        }
    }

    #[test]
    fn draws_depend_only_on_the_seed() {
        assert_eq!(drawn(7, 100.0, 5.0), drawn(7, 100.0, 5.0));
        assert_ne!(drawn(7, 100.0, 5.0), drawn(8, 100.0, 5.0));
        assert!(drawn(7, 100.0, 0.0).iter().all(|&time| time == 100.0));
    }
}
