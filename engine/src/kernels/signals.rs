//! How sure the model is: exit signals and the next token from rows of logits, in one sweep.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use traces::Signals;

use super::simd::{LANES, exp, greater, multiversion};
use super::slice;

/// Logits below which a second thread costs more than it saves.
const PARALLEL_LOGITS: usize = 1 << 13;
/// Numbers that the sweep gives for a row.
const NUMBERS: usize = 4;

/// What a row of logits says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Probability of the most likely token; NaN if a logit is not finite.
    pub top1: f32,
    /// That less the probability of the second.
    pub margin: f32,
    /// Entropy of the distribution in nats.
    pub entropy: f32,
    /// The token drawn.
    pub token: u32,
}

impl Verdict {
    /// The exit signals that the head gives; the others are 0.
    pub fn signals(&self) -> Signals {
        Signals { top1: self.top1, margin: self.margin, entropy: self.entropy, ..Signals::default() }
    }
}

/// Reads rows of logits `[rows, vocab]` and draws a token from each: at temperature 0 the most likely one.
///
/// Above, it is the greatest of `logit / temperature + noise` with Gumbel noise that depends on the row's key and the
/// token alone: so whichever pass and depth the logits come from, the same dice are thrown under the same key.
///
/// # Errors
/// If `logits` is not such a tensor.
pub fn read(logits: &Tensor, temperature: f32, keys: &[u64]) -> Result<Vec<Verdict>> {
    let numbers = logits.apply_op1_no_bwd(&Sweep { temperature, keys })?.flatten_all()?.to_vec1::<f32>()?;
    let verdict = |row: &[f32]| Verdict { top1: row[0], margin: row[1], entropy: row[2], token: row[3] as u32 };
    Ok(numbers.chunks_exact(NUMBERS).map(verdict).collect())
}

/// `[rows, vocab]` to `[rows, 4]`: top-1, margin, entropy, and the token, which `f32` holds exactly below 2^24.
struct Sweep<'a> {
    temperature: f32,
    keys: &'a [u64],
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
            if self.temperature > 0.0 {
                out[NUMBERS - 1] = sample(logits, self.temperature, *key) as f32;
            }
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
    /// Top-1 probability, margin, entropy and the most likely token (the first of equals) of one row.
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
        let top1 = sum.recip();
        let entropy = (sum.ln() - weighted / sum).max(0.0);
        out.copy_from_slice(&[top1, top1 - exp(second - first) / sum, entropy, token as f32]);
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

/// Draws a token by the Gumbel-max trick; of equals the first.
fn sample(logits: &[f32], temperature: f32, key: u64) -> usize {
    let score = |(token, logit): (usize, &f32)| (token, f64::from(logit / temperature) + gumbel(key, token as u64));
    let better = |best: (usize, f64), next: (usize, f64)| if next.1 > best.1 { next } else { best };
    logits.iter().enumerate().map(score).fold((0, f64::NEG_INFINITY), better).0
}

/// Standard Gumbel noise of a token under a key.
fn gumbel(key: u64, token: u64) -> f64 {
    let bits = mix(key ^ mix(token));
    // 53 random bits in the open interval from 0 to 1.
    let uniform = ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -(-uniform.ln()).ln()
}

/// A bijection that scatters neighbours (the finalizer of SplitMix64, after a step).
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
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
    fn equal_logits_have_no_margin_and_the_first_token_wins() {
        let found = verdict(&[0.0, 2.0, 2.0, 1.0]);
        assert_eq!((found.token, found.margin), (1, 0.0));
        assert_eq!(verdict(&[3.0]), Verdict { top1: 1.0, margin: 1.0, entropy: 0.0, token: 0 });
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
            counts[sample(&logits, 2.0, mix(key))] += 1.0 / 20_000.0;
        }
        let total: f64 = logits.iter().map(|&logit| f64::from(logit / 2.0).exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let expected = f64::from(logit / 2.0).exp() / total;
            assert!((count - expected).abs() < 0.02, "{count} is not {expected}");
        }
    }
}
