//! Exit signals and next tokens from rows of logits, in one sweep. The sweep may process the vocabulary in parts, so
//! that not all logits are in memory at once.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use traces::Signals;
use traces::hash::mix;

use super::simd::{LANES, exp, greater, multiversion};
use super::slice;

/// Logits below which a second thread does not pay.
const PARALLEL_LOGITS: usize = 1 << 13;
/// Numbers per row that the sweep returns.
const NUMBERS: usize = 7;

/// Results of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Probability of the most likely token; NaN if a logit is not finite.
    pub top1: f32,
    /// `top1` less the probability of the second most likely token.
    pub margin: f32,
    /// Entropy of the distribution in nats.
    pub entropy: f32,
    /// The sampled token.
    pub token: u32,
}

impl Verdict {
    /// The exit signals of the head; other signals are 0.
    pub fn signals(&self) -> Signals {
        Signals { top1: self.top1, margin: self.margin, entropy: self.entropy, ..Signals::default() }
    }
}

/// Reads rows of logits and samples a token from each.
///
/// At temperature 0, that is the most likely token. Above, it is the token with the greatest `logit / temperature +
/// noise`. The Gumbel noise depends only on the row's key and the token, so equal keys give equal noise for any pass
/// and depth.
pub struct Reader<'a> {
    temperature: f32,
    keys: &'a [u64],
    rows: Vec<Seen>,
    /// Number of tokens read so far.
    tokens: usize,
}

impl<'a> Reader<'a> {
    /// A reader of one row for each key.
    pub fn new(temperature: f32, keys: &'a [u64]) -> Self {
        Self { temperature, keys, rows: vec![Seen::NOTHING; keys.len()], tokens: 0 }
    }

    /// Reads the logits `[rows, part]` of the next tokens of the vocabulary.
    ///
    /// # Errors
    /// If `logits` has another shape.
    pub fn read(&mut self, logits: &Tensor) -> Result<()> {
        let sweep = Sweep { temperature: self.temperature, keys: self.keys, first_token: self.tokens };
        let numbers = logits.apply_op1_no_bwd(&sweep)?.flatten_all()?.to_vec1::<f32>()?;
        for (seen, part) in self.rows.iter_mut().zip(numbers.chunks_exact(NUMBERS)) {
            *seen = seen.and(Seen::new(part, self.tokens));
        }
        self.tokens += logits.dim(1)?;
        Ok(())
    }

    /// Results of the rows.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.rows.iter().map(Seen::verdict).collect()
    }
}

/// Reads complete rows of logits `[rows, vocab]`; see [`Reader`].
///
/// # Errors
/// If `logits` has another shape.
pub fn read(logits: &Tensor, temperature: f32, keys: &[u64]) -> Result<Vec<Verdict>> {
    let mut reader = Reader::new(temperature, keys);
    reader.read(logits)?;
    Ok(reader.verdicts())
}

/// State of a row.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// The greatest logit, and the second.
    first: f32,
    second: f32,
    /// Sums over logits of `e^below` and `below e^below`, where `below` is the logit less the greatest.
    sum: f32,
    weighted: f32,
    /// The first token with the greatest logit.
    token: u32,
    /// The greatest logit with noise, and the first token with it; unused at temperature 0.
    drawn: (f32, u32),
}

impl Seen {
    const NOTHING: Self = Self {
        first: f32::NEG_INFINITY,
        second: f32::NEG_INFINITY,
        sum: 0.0,
        weighted: 0.0,
        token: 0,
        drawn: (f32::NEG_INFINITY, 0),
    };

    /// State after a part of the vocabulary whose first token is `first_token`.
    fn new(numbers: &[f32], first_token: usize) -> Self {
        let &[first, second, sum, weighted, token, score, drawn] = numbers else {
            unreachable!("the sweep gives {NUMBERS} numbers a row");
        };
        let of_vocab = |place: f32| first_token as u32 + place as u32;
        Self { first, second, sum, weighted, token: of_vocab(token), drawn: (score, of_vocab(drawn)) }
    }

    /// Merges the state with that of a later part.
    fn and(self, later: Self) -> Self {
        if self.sum == 0.0 {
            return later;
        }
        let first = greater(self.first, later.first);
        let lowered = |part: Self| {
            let below = part.first - first;
            (part.sum * exp(below), exp(below) * (part.weighted + below * part.sum))
        };
        let ((sum_a, weighted_a), (sum_b, weighted_b)) = (lowered(self), lowered(later));
        Self {
            first,
            second: self.first.min(later.first).max(self.second).max(later.second),
            sum: sum_a + sum_b,
            weighted: weighted_a + weighted_b,
            token: if later.first > self.first { later.token } else { self.token },
            drawn: if later.drawn.0 > self.drawn.0 { later.drawn } else { self.drawn },
        }
    }

    fn verdict(&self) -> Verdict {
        let top1 = self.sum.recip();
        Verdict {
            top1,
            margin: top1 - exp(self.second - self.first) / self.sum,
            entropy: (self.sum.ln() - self.weighted / self.sum).max(0.0),
            token: if self.drawn.0 > f32::NEG_INFINITY { self.drawn.1 } else { self.token },
        }
    }
}

/// `[rows, part]` to `[rows, 7]`: the fields of [`Seen`], with tokens relative to the part's first; `f32` is exact for
/// them below 2^24.
struct Sweep<'a> {
    temperature: f32,
    keys: &'a [u64],
    first_token: usize,
}

impl CustomOp1 for Sweep<'_> {
    fn name(&self) -> &'static str {
        "signals"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = layout.shape().dims2()?;
        let logits = slice(logits, layout)?;
        let mut out = vec![0.0; rows * NUMBERS];
        let sweep = |((logits, key), out): ((&[f32], &u64), &mut [f32])| {
            read_row(logits, out);
            let drawn = match self.temperature > 0.0 {
                true => sample(logits, self.temperature, *key, self.first_token as u64),
                false => (f32::NEG_INFINITY, 0.0),
            };
            [out[NUMBERS - 2], out[NUMBERS - 1]] = [drawn.0, drawn.1];
        };
        if logits.len() < PARALLEL_LOGITS {
            logits.chunks_exact(vocab).zip(self.keys).zip(out.chunks_exact_mut(NUMBERS)).for_each(sweep);
        } else {
            let rows = logits.par_chunks_exact(vocab).zip(self.keys).zip(out.par_chunks_exact_mut(NUMBERS));
            rows.for_each(sweep);
        }
        Ok((CpuStorage::F32(out), (rows, NUMBERS).into()))
    }
}

multiversion! {
    /// The greatest logit, the second, the sums and the token of [`Seen`] for a row.
    fn read_row(logits: &[f32], out: &mut [f32]) {
        let (first, second) = two_greatest(logits);
        let token = logits.iter().position(|&logit| logit == first).unwrap_or(0);
        let (mut sums, mut weighted) = ([0.0; LANES], [0.0; LANES]);
        let chunks = logits.chunks_exact(LANES);
        for (lane, &logit) in chunks.remainder().iter().enumerate() {
            let below = logit - first;
            sums[lane] += exp(below);
            weighted[lane] += exp(below) * below;
        }
        for chunk in chunks {
            for (lane, &logit) in chunk.iter().enumerate() {
                let below = logit - first;
                let e = exp(below);
                sums[lane] += e;
                weighted[lane] += e * below;
            }
        }
        let (sum, weighted) = (sums.iter().sum::<f32>(), weighted.iter().sum::<f32>());
        out[..5].copy_from_slice(&[first, second, sum, weighted, token as f32]);
    }
}

/// The greatest number and the second greatest, which may be equal.
#[inline(always)]
fn two_greatest(numbers: &[f32]) -> (f32, f32) {
    let (mut first, mut second) = ([f32::NEG_INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let mut insert = |lane: usize, number: f32| {
        let lesser = if number < first[lane] { number } else { first[lane] };
        second[lane] = greater(lesser, second[lane]);
        first[lane] = greater(number, first[lane]);
    };
    let chunks = numbers.chunks_exact(LANES);
    for (lane, &number) in chunks.remainder().iter().enumerate() {
        insert(lane, number);
    }
    for chunk in chunks {
        for (lane, &number) in chunk.iter().enumerate() {
            insert(lane, number);
        }
    }
    let (mut best, mut next) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for number in first.into_iter().chain(second) {
        next = next.max(best.min(number));
        best = best.max(number);
    }
    (best, next)
}

/// The divergence `KL(before, after)` in nats, at least 0, of the distributions of two rows of logits; `None` is the uniform
/// distribution. NaN if a logit is not finite.
pub fn divergence(before: Option<&[f32]>, after: &[f32]) -> f32 {
    let log_sum = |logits: &[f32]| {
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(greatest) + logits.iter().map(|logit| f64::from(logit - greatest).exp()).sum::<f64>().ln()
    };
    let (vocab, after_sum) = (after.len() as f64, log_sum(after));
    let divergence = match before {
        None => after_sum - vocab.ln() - after.iter().map(|&logit| f64::from(logit)).sum::<f64>() / vocab,
        Some(before) => {
            let before_sum = log_sum(before);
            let term = |(&before, &after): (&f32, &f32)| {
                let log = f64::from(before) - before_sum;
                log.exp() * (log - (f64::from(after) - after_sum))
            };
            before.iter().zip(after).map(term).sum()
        }
    };
    // Rounding may leave less than nothing; NaN stays.
    if divergence < 0.0 { 0.0 } else { divergence as f32 }
}

/// Natural logarithm of the probability of a token under the softmax of a row of logits; NaN if a logit is not finite.
pub fn log_probability(logits: &[f32], token: usize) -> f64 {
    let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - greatest).exp()).sum();
    f64::from(logits[token]) - greatest - sum.ln()
}

/// Samples one of the tokens from `first_token` on by the Gumbel-max trick, the first one of equals: its score, and its
/// index.
fn sample(logits: &[f32], temperature: f32, key: u64, first_token: u64) -> (f32, f32) {
    let score = |(place, logit): (usize, &f32)| {
        (place, f64::from(logit / temperature) + gumbel(key, first_token + place as u64))
    };
    let better = |best: (usize, f64), next: (usize, f64)| if next.1 > best.1 { next } else { best };
    let (place, score) = logits.iter().enumerate().map(score).fold((0, f64::NEG_INFINITY), better);
    (score as f32, place as f32)
}

/// Standard Gumbel noise of a token under a key.
fn gumbel(key: u64, token: u64) -> f64 {
    let bits = mix(key ^ mix(token));
    // 53 random bits in the open interval from 0 to 1.
    let uniform = ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -(-uniform.ln()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn verdict(logits: &[f32]) -> Verdict {
        let tensor = Tensor::from_slice(logits, (1, logits.len()), &Device::Cpu).unwrap();
        read(&tensor, 0.0, &[0]).unwrap()[0]
    }

    #[test]
    fn signals_equal_their_definitions() {
        let logits: Vec<f32> = (0..37).map(|i| ((i * 29) % 37) as f32 * 0.3 - 5.0).collect();
        let exps: Vec<f64> = logits.iter().map(|&logit| f64::from(logit).exp()).collect();
        let mut p: Vec<f64> = exps.iter().map(|e| e / exps.iter().sum::<f64>()).collect();
        let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
        let token = p.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        p.sort_by(|a, b| b.total_cmp(a));
        let found = verdict(&logits);
        assert_eq!(found.token as usize, token);
        for (found, expected) in [(found.top1, p[0]), (found.margin, p[0] - p[1]), (found.entropy, entropy)] {
            assert!((f64::from(found) - expected).abs() < 1e-5, "{found} is not {expected}");
        }
    }

    #[test]
    fn a_row_that_is_read_in_parts_says_the_same() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 29) % 97) as f32 * 0.1 - 5.0).collect();
        for (temperature, parts) in [(0.0, [1, 40, 59]), (1.0, [60, 30, 10]), (1.0, [10, 89, 1])] {
            let whole = Tensor::from_slice(&[&logits[..], &logits[..]].concat(), (2, 100), &Device::Cpu).unwrap();
            let keys = [3, 4];
            let mut reader = Reader::new(temperature, &keys);
            let mut start = 0;
            for part in parts {
                reader.read(&whole.narrow(1, start, part).unwrap().contiguous().unwrap()).unwrap();
                start += part;
            }
            for (found, expected) in reader.verdicts().iter().zip(read(&whole, temperature, &keys).unwrap()) {
                assert_eq!(found.token, expected.token);
                let close = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-5, "{found}, {expected}");
                close(found.top1, expected.top1);
                close(found.margin, expected.margin);
                close(found.entropy, expected.entropy);
            }
        }
    }

    #[test]
    fn equal_logits_have_no_margin_and_the_first_token_wins() {
        let found = verdict(&[0.0, 2.0, 2.0, 1.0]);
        assert_eq!((found.token, found.margin), (1, 0.0));
        assert_eq!(verdict(&[3.0]), Verdict { top1: 1.0, margin: 1.0, entropy: 0.0, token: 0 });
    }

    #[test]
    fn the_divergence_is_that_of_the_distribution_before_from_the_one_after() {
        // Probabilities 1/2, 1/4, 1/4, and 1/8, 1/8, 3/4; logits are not normalized.
        let before = [5.0 + 2_f32.ln(), 5.0, 5.0];
        let after = [-3.0, -3.0, -3.0 + 6_f32.ln()];
        let expected = 0.5 * 4_f64.ln() + 0.25 * 2_f64.ln() + 0.25 * (1.0_f64 / 3.0).ln();
        assert!((f64::from(divergence(Some(&before), &after)) - expected).abs() < 1e-6);
        let from_uniform = (8.0_f64 / 3.0).ln() * 2.0 / 3.0 + (4.0_f64 / 9.0).ln() / 3.0;
        assert!((f64::from(divergence(None, &after)) - from_uniform).abs() < 1e-6);
        assert!(divergence(Some(&before), &before) < 1e-7 && divergence(None, &[7.0; 9]) < 1e-6);
        assert!(divergence(Some(&before), &[f32::NAN, 0.0, 0.0]).is_nan());
    }

    #[test]
    fn the_log_probability_of_a_token_is_that_of_the_softmax() {
        // Probabilities 1/2, 1/4 and 1/4.
        let logits = [100.0 + 2_f32.ln(), 100.0, 100.0];
        for (token, expected) in [0.5_f64, 0.25, 0.25].into_iter().enumerate() {
            assert!((log_probability(&logits, token) - expected.ln()).abs() < 1e-5);
        }
        assert!(log_probability(&[0.0, f32::NAN], 0).is_nan() && log_probability(&[0.0, f32::INFINITY], 0).is_nan());
    }

    #[test]
    fn logits_that_are_not_finite_show_in_top1() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(verdict(&[0.0, bad, 1.0]).top1.is_nan(), "{bad}");
        }
    }

    #[test]
    fn draws_follow_the_softmax_at_the_temperature() {
        let logits = [0.0_f32, 1.0, 2.0];
        let mut counts = [0.0_f64; 3];
        for key in 0..20_000 {
            counts[sample(&logits, 2.0, mix(key), 0).1 as usize] += 1.0 / 20_000.0;
        }
        let total: f64 = logits.iter().map(|&logit| f64::from(logit / 2.0).exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let expected = f64::from(logit / 2.0).exp() / total;
            assert!((count - expected).abs() < 0.02, "{count} is not {expected}");
        }
    }
}
