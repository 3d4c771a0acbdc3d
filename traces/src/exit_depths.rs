//! Exit traces of tokens whose exit depth is known, or is drawn from a distribution, and nothing else.

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use crate::error::{Result, TraceError};
use crate::exit_trace::{ExitTrace, ExitTraceMeta, SignalSet, Signals};

impl ExitTrace {
    /// A trace of tokens that exit at known depths: `depths` by generation, then by token; depths beyond the last
    /// count as the last.
    ///
    /// Every signal is [sure](Signals::certain) from the exit depth on and unsure before. Any measure at a threshold of 0.5
    /// therefore exits there, and costs what reading it costs. (Similarity and difference are not read at depth 0.)
    /// The prediction of the exit depth and of every deeper one is that of the last depth, so the oracle exits there
    /// too. What the model would have predicted is not known: agreement and quality of such a trace mean nothing.
    pub fn from_depths(meta: ExitTraceMeta, depths: &[Vec<u8>]) -> Self {
        let num_loops = meta.num_loops;
        let mut trace = Self { recorded: SignalSet::ALL, ..Self::new(meta) };
        let token = |&exit: &u8| {
            let exit = u32::from(exit).min(num_loops - 1);
            (0..num_loops).map(move |depth| {
                let exits = depth >= exit;
                (Signals::certain(exits), u32::from(exits))
            })
        };
        for generation in depths {
            trace.push_generation(&generation.iter().flat_map(token).collect::<Vec<_>>());
        }
        trace
    }
}

/// Which share of tokens runs how many loops.
#[derive(Clone, Debug, PartialEq)]
pub struct LoopShares(Vec<f64>);

impl LoopShares {
    /// The most loops.
    pub const MOST: usize = 64;

    /// Shares of tokens that run 1, 2, ... loops, in any unit.
    ///
    /// # Errors
    /// If there are none or too many, one is not a number of at least 0, or all are 0.
    pub fn new(shares: &[f64]) -> Result<Self> {
        let expected = || format!("1 to {} numbers of at least 0, one of them above 0", Self::MOST);
        let sum: f64 = shares.iter().sum();
        let counts = (1..=Self::MOST).contains(&shares.len());
        let proportions = shares.iter().all(|share| *share >= 0.0) && sum.is_finite() && sum > 0.0;
        if !(counts && proportions) {
            return Err(TraceError::spec("shares", format!("{shares:?}"), expected()));
        }
        Ok(Self(shares.iter().map(|share| share / sum).collect()))
    }

    /// The distribution of greatest entropy between `fewest` and `loops` loops with this mean: k loops with a probability
    /// in proportion to r^k.
    ///
    /// # Errors
    /// If there is no such distribution.
    pub fn of_mean(loops: u8, fewest: u8, mean: f64) -> Result<Self> {
        if !(1..=Self::MOST).contains(&usize::from(loops)) || fewest < 1 || fewest > loops {
            let expected = format!("at least 1 and at most the number of loops, which is at most {}", Self::MOST);
            return Err(TraceError::spec("fewest", format!("{fewest} of {loops}"), expected));
        }
        if !(f64::from(fewest)..=f64::from(loops)).contains(&mean) {
            return Err(TraceError::spec("mean", mean, format!("{fewest} to {loops} loops")));
        }
        let at = |ratio: f64| -> Vec<f64> {
            let weights = (1..=loops).map(|k| if k < fewest { 0.0 } else { ratio.powi(i32::from(k)) });
            let weights: Vec<f64> = weights.collect();
            let sum: f64 = weights.iter().sum();
            weights.into_iter().map(|weight| weight / sum).collect()
        };
        let (mut low, mut high) = (1e-3, 1e3);
        for _ in 0..200 {
            let middle = f64::sqrt(low * high);
            if Self(at(middle)).mean() < mean { low = middle } else { high = middle }
        }
        Ok(Self(at(low)))
    }

    /// Loops of a model with these shares.
    pub fn num_loops(&self) -> u32 {
        self.0.len() as u32
    }

    /// Mean number of loops.
    pub fn mean(&self) -> f64 {
        self.0.iter().zip(1..).map(|(share, loops)| share * f64::from(loops)).sum()
    }

    /// Shares of tokens that run at least 1, 2, ... loops.
    pub fn survivors(&self) -> Vec<f64> {
        (0..self.0.len()).map(|loops| self.0[loops..].iter().sum()).collect()
    }

    /// Exit depths of `generations` of `tokens` each. Tokens are independent of each other.
    pub fn draw(&self, generations: usize, tokens: usize, seed: u64) -> Vec<Vec<u8>> {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut depth = || {
            let mut left: f64 = rng.random();
            let found = self.0.iter().position(|share| {
                left -= share;
                left < 0.0
            });
            found.unwrap_or(self.0.len() - 1) as u8
        };
        (0..generations).map(|_| (0..tokens).map(|_| depth()).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit_file::ExitTable;
    use crate::exit_trace::ExitSignal;

    #[test]
    fn tokens_of_known_depths_exit_there_by_any_measure_and_by_oracle() {
        let meta = ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "m".to_owned(),
            fingerprint: "f".to_owned(),
            num_loops: 4,
            source: "made up".to_owned(),
            recording: None,
        };
        let depths = [vec![3, 1, 0], vec![2, 9]];
        let trace = ExitTrace::from_depths(meta, &depths);
        for signal in ExitSignal::ALL {
            let exit = |token| trace.confident_depth(token, signal, 0.5);
            assert_eq!((0..5).map(exit).collect::<Vec<_>>(), [3, 1, 0, 2, 3], "{signal}");
        }
        assert_eq!((0..5).map(|token| trace.oracle_depth(token)).collect::<Vec<_>>(), [3, 1, 0, 2, 3]);
        assert_eq!(trace.mean_oracle_passes(), (4.0 + 2.0 + 1.0 + 3.0 + 4.0) / 5.0);
        assert_eq!(trace.generation(1), 3..5);
        let folder = tempfile::tempdir().unwrap();
        trace.write(folder.path(), ExitTable::Parquet).unwrap();
        assert_eq!(ExitTrace::read(folder.path()).unwrap(), trace);
    }
    #[test]
    fn depths_are_drawn_with_their_shares_or_their_mean() {
        let shares = LoopShares::new(&[4.0, 3.0, 0.0, 3.0]).unwrap();
        assert!((shares.mean() - 2.2).abs() < 1e-12);
        let survivors = shares.survivors();
        assert!(survivors.iter().zip([1.0, 0.6, 0.3, 0.3]).all(|(a, b)| (a - b).abs() < 1e-12), "{survivors:?}");
        assert!((survivors.iter().sum::<f64>() - shares.mean()).abs() < 1e-12);
        let drawn = shares.draw(100, 400, 3).concat();
        let share = |depth| drawn.iter().filter(|found| **found == depth).count() as f64 / drawn.len() as f64;
        for (depth, expected) in [(0, 0.4), (1, 0.3), (2, 0.0), (3, 0.3)] {
            assert!((share(depth) - expected).abs() < 0.01, "{depth}: {}", share(depth));
        }
        assert_eq!(shares.draw(2, 5, 9), shares.draw(2, 5, 9));
        assert_ne!(shares.draw(2, 50, 9), shares.draw(2, 50, 10));
        for (loops, fewest, mean) in [(4, 1, 2.5), (4, 2, 2.1), (32, 1, 12.7), (2, 1, 1.999), (3, 3, 3.0), (1, 1, 1.0)]
        {
            let found = LoopShares::of_mean(loops, fewest, mean).unwrap();
            assert!((found.mean() - mean).abs() < 2e-3, "{loops}, {fewest}, {mean}: {}", found.mean());
            assert!(found.0[..usize::from(fewest) - 1].iter().all(|share| *share == 0.0));
            let ratios: Vec<f64> =
                found.0[usize::from(fewest) - 1..].windows(2).map(|pair| pair[1] / pair[0]).collect();
            assert!(ratios.windows(2).all(|pair| (pair[0] / pair[1] - 1.0).abs() < 1e-9), "{ratios:?}");
        }
    }

    #[test]
    fn distributions_that_do_not_exist_are_refused() {
        for shares in [&[][..], &[0.0, 0.0], &[0.5, -0.1], &[f64::NAN], &[f64::INFINITY], &[1.0; 65]] {
            let error = LoopShares::new(shares).unwrap_err().to_string();
            assert!(error.contains("shares: found"), "{error}");
        }
        for (loops, fewest, mean, key) in [
            (0, 1, 1.0, "fewest"),
            (4, 5, 5.0, "fewest"),
            (4, 0, 2.0, "fewest"),
            (65, 1, 2.0, "fewest"),
            (4, 2, 1.5, "mean"),
            (4, 1, f64::NAN, "mean"),
        ] {
            let error = LoopShares::of_mean(loops, fewest, mean).unwrap_err().to_string();
            assert!(error.contains(&format!("{key}: found")), "{error}");
        }
    }
}
