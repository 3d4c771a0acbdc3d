//! P-values of the hypothesis that a risk exceeds a tolerance: the probability of losses this low if it does.

use statrs::distribution::{Binomial, DiscreteCDF};

/// P-value of `errors` among `trials` independent trials with equal error probabilities: the exact binomial tail.
///
/// # Panics
/// If `tolerance` is not between 0 and 1.
pub fn binomial(errors: u64, trials: u64, tolerance: f64) -> f64 {
    Binomial::new(tolerance, trials).expect("a tolerance is a probability").cdf(errors)
}

/// P-value of independent losses between 0 and 1 of any distribution: the better of the Hoeffding and Bentkus
/// inequalities (arXiv 2110.01052, proposition 1).
///
/// # Panics
/// If `tolerance` is not between 0 and 1.
pub fn hoeffding_bentkus(losses: &[f64], tolerance: f64) -> f64 {
    let sum: f64 = losses.iter().sum();
    let trials = losses.len() as f64;
    let mean = (sum / trials).min(tolerance);
    let term = |share: f64, of: f64| if share > 0.0 { share * (share / of).ln() } else { 0.0 };
    let divergence = term(mean, tolerance) + term(1.0 - mean, 1.0 - tolerance);
    let hoeffding = (-trials * divergence).exp();
    let bentkus = std::f64::consts::E * binomial(sum.ceil() as u64, losses.len() as u64, tolerance);
    hoeffding.min(bentkus).min(1.0)
}

/// P-value of independent losses between 0 and 1 of any distribution, taken one after the other: the reciprocal of the
/// largest capital of a gambler who bets against the hypothesis. The power grows as the variance of the losses shrinks
/// (arXiv 2010.15110; the bets are those of arXiv 2101.02703, section 3.1.3, for tests at `level`).
pub fn betting(losses: &[f64], tolerance: f64, level: f64) -> f64 {
    let (mut wealth, mut most) = (1.0_f64, 1.0_f64);
    // Mean and variance of the losses so far, with one prior loss of 1/2 and variance 1/4.
    let (mut sum, mut squares) = (0.5, 0.25);
    for (index, loss) in losses.iter().enumerate() {
        let variance = squares / (index + 1) as f64;
        let bet = (2.0 * (1.0 / level).ln() / (losses.len() as f64 * variance)).sqrt().min(1.0);
        wealth *= 1.0 - bet * (loss - tolerance);
        most = most.max(wealth);
        sum += loss;
        squares += (loss - sum / (index + 2) as f64).powi(2);
    }
    1.0 / most
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn p_values_equal_their_definitions() {
        assert!((binomial(0, 20, 0.1) - 0.9_f64.powi(20)).abs() < 1e-12);
        assert!((binomial(1, 2, 0.1) - 0.99).abs() < 1e-12);
        // No losses: Hoeffding's (1 - 0.1)^20 is below e times Bentkus' equal bound.
        assert!((hoeffding_bentkus(&[0.0; 20], 0.1) - 0.9_f64.powi(20)).abs() < 1e-12);
        assert_eq!(hoeffding_bentkus(&[0.5; 20], 0.1), 1.0);
        // Bets are 1 while losses vary little, since ln(1/level) is large enough.
        let (first, second) = (1.0 - (0.0 - 0.5), 1.0 - (0.25 - 0.5));
        assert!((betting(&[0.0, 0.25], 0.5, 1e-9) - 1.0 / (first * second)).abs() < 1e-12);
        // A bet below 1: the prior variance of 1/4 and 2 ln(2) / (100 / 4).
        let bet = (8.0 * 2.0_f64.ln() / 100.0).sqrt();
        let losses: Vec<f64> = std::iter::once(0.0).chain([1.0; 99]).collect();
        assert!((betting(&losses, 0.5, 0.5) - 1.0 / (1.0 + 0.5 * bet)).abs() < 1e-12);
    }

    #[test]
    fn losses_as_bad_as_the_hypothesis_seldom_reject_it() {
        const DRAWS: usize = 4000;
        let mut random = StdRng::seed_from_u64(1);
        let (tolerance, level) = (0.1, 0.1);
        let mut rejected = [0; 3];
        for _ in 0..DRAWS {
            // Mostly 0, in one of five cases 1/2: 0.1 on average.
            let losses: Vec<f64> = (0..100).map(|_| if random.random_range(0..5) == 0 { 0.5 } else { 0.0 }).collect();
            let errors = (0..100).filter(|_| random.random_range(0.0..1.0) < tolerance).count();
            let found = [
                binomial(errors as u64, 100, tolerance),
                hoeffding_bentkus(&losses, tolerance),
                betting(&losses, tolerance, level),
            ];
            for (count, p_value) in rejected.iter_mut().zip(found) {
                *count += usize::from(p_value <= level);
            }
        }
        let shares = rejected.map(|count| count as f64 / DRAWS as f64);
        assert!(shares.iter().all(|&share| share <= level), "{shares:?}");
        assert!(shares[0] > 0.4 * level, "the binomial tail is exact: {shares:?}");
        assert!(shares[2] > shares[1], "bets make use of a low variance: {shares:?}");
    }

    #[test]
    fn the_binomial_tail_holds_for_millions_of_tokens() {
        let (trials, tolerance) = (2_000_000_u64, 0.05_f64);
        let errors = 99_506;
        // Downwards from the last term, each from its ratio to the one above.
        let log_odds = (tolerance / (1.0 - tolerance)).ln();
        let log_choose: f64 = (1..=errors).map(|i| ((trials - errors + i) as f64 / i as f64).ln()).sum();
        let last = (log_choose + errors as f64 * log_odds + trials as f64 * (1.0 - tolerance).ln()).exp();
        let (mut term, mut sum) = (last, 0.0);
        for i in (0..=errors).rev() {
            sum += term;
            term *= i as f64 * (1.0 - tolerance) / ((trials - i + 1) as f64 * tolerance);
        }
        assert!((binomial(errors, trials, tolerance) / sum - 1.0).abs() < 1e-4, "{sum}");
    }
}
