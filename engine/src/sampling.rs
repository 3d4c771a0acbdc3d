//! Tokens that a request chooses by rules of its own: on the host, from the logits of its rows.
//!
//! The head of a pass chooses all tokens by one rule ([`Sampling`](crate::Sampling)), on the device. A request with other
//! wishes has its logits read when its token exits, and chooses from them. The random numbers of a token depend on the
//! request's seed and the index of the token only, so the same request gets the same text in any batch.

use std::sync::Arc;

use traces::hash::{mix, uniform};

use crate::kernels::signals::log_probability;

/// How the tokens of one request are chosen, and what is kept of their distributions.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoding {
    /// Softmax temperature, at least 0; 0 chooses the most likely token.
    pub temperature: f32,
    /// Tokens are drawn from the fewest most likely ones whose probabilities add up to this share, above 0 and at most 1.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Number of tokens before which none of [`withheld`](Self::withheld) is chosen.
    pub min_tokens: u32,
    /// Tokens that would end the text.
    pub withheld: Arc<[u32]>,
    /// Number of most likely tokens to keep with each chosen token; `None` to keep no log-probabilities.
    pub alternatives: Option<u8>,
}

impl Default for Decoding {
    /// The most likely tokens, of which nothing is kept.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0, min_tokens: 0, withheld: Arc::from([]), alternatives: None }
    }
}

/// A chosen token and the most likely ones, each with the natural logarithm of its probability at temperature 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The chosen token.
    pub token: u32,
    /// Its log-probability; NaN where none is kept.
    pub log_probability: f32,
    /// As many of the most likely tokens as the request keeps, in order of falling probability.
    pub alternatives: Vec<(u32, f32)>,
}

impl Decoding {
    /// Whether the token at this index of the output needs the logits. If not, it is the most likely one.
    pub(crate) fn reads_logits(&self, index: usize) -> bool {
        self.temperature > 0.0 || self.alternatives.is_some() || self.withholds(index)
    }

    fn withholds(&self, index: usize) -> bool {
        index < self.min_tokens as usize && !self.withheld.is_empty()
    }

    /// Chooses the token at this index of the output from its logits, which are finite.
    pub(crate) fn choose(&self, logits: &[f32], index: usize) -> Chosen {
        let is_allowed = |token: u32| !(self.withholds(index) && self.withheld.contains(&token));
        let token = match self.temperature > 0.0 {
            true => self.draw(logits, index, is_allowed),
            false => greatest(logits, is_allowed),
        };
        let Some(number) = self.alternatives else {
            return Chosen { token, log_probability: f32::NAN, alternatives: Vec::new() };
        };
        let log_probability = |token: u32| log_probability(logits, token as usize) as f32;
        let alternatives = most_likely(logits, number.into()).into_iter().map(|token| (token, log_probability(token)));
        Chosen { token, log_probability: log_probability(token), alternatives: alternatives.collect() }
    }

    /// Draws a token: the first, from the most likely one on, at which the sum of the probabilities exceeds a random
    /// share.
    fn draw(&self, logits: &[f32], index: usize, is_allowed: impl Fn(u32) -> bool) -> u32 {
        let greatest = greatest(logits, &is_allowed);
        let weight =
            |token: u32| f64::exp(f64::from((logits[token as usize] - logits[greatest as usize]) / self.temperature));
        let mut weights: Vec<(u32, f64)> =
            (0..logits.len() as u32).filter(|&token| is_allowed(token)).map(|token| (token, weight(token))).collect();
        if self.top_p < 1.0 {
            weights.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            weights.truncate(number_within(&weights, f64::from(self.top_p)));
        }
        let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let mut left = sum * uniform(mix(self.seed ^ mix(index as u64)));
        let found = weights.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        found.map_or(greatest, |&(token, _)| token)
    }
}

/// The first of the allowed tokens with the greatest logit.
fn greatest(logits: &[f32], is_allowed: impl Fn(u32) -> bool) -> u32 {
    let allowed = (0..).zip(logits).filter(|(token, _)| is_allowed(*token));
    let first_greatest = allowed.reduce(|found, other| if other.1 > found.1 { other } else { found });
    first_greatest.map_or(0, |(token, _)| token)
}

/// The tokens with the greatest logits, the greatest first; of equal ones, the first.
fn most_likely(logits: &[f32], number: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |token: u32| logits[token as usize];
    let order = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
    if number > 0 && number < tokens.len() {
        tokens.select_nth_unstable_by(number - 1, order);
    }
    tokens.truncate(number);
    tokens.sort_unstable_by(order);
    tokens
}

/// The fewest weights, in descending order, whose sum is at least this share of all.
fn number_within(weights: &[(u32, f64)], share: f64) -> usize {
    let mut left = share * weights.iter().map(|(_, weight)| weight).sum::<f64>();
    let reaching = weights.iter().position(|(_, weight)| {
        left -= weight;
        left <= 0.0
    });
    reaching.map_or(weights.len(), |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of these probabilities.
    fn logits(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|probability| probability.ln() + 3.0).collect()
    }

    fn shares(decoding: &Decoding, probabilities: &[f32]) -> Vec<f64> {
        let logits = logits(probabilities);
        let mut counts = vec![0.0; probabilities.len()];
        (0..20_000).for_each(|index| counts[decoding.choose(&logits, index).token as usize] += 1.0 / 20_000.0);
        counts
    }

    #[test]
    fn tokens_are_drawn_with_their_probabilities_at_the_temperature_within_the_share() {
        let decoding = Decoding { temperature: 1.0, seed: 7, ..Decoding::default() };
        let squares = [0.25_f64, 0.01, 0.16].map(|square| square / 0.42);
        for (decoding, expected) in [
            (decoding.clone(), [0.5, 0.1, 0.4]),
            (Decoding { temperature: 0.5, ..decoding.clone() }, squares),
            (Decoding { top_p: 0.8, ..decoding.clone() }, [5.0 / 9.0, 0.0, 4.0 / 9.0]),
            (Decoding { top_p: 0.3, ..decoding.clone() }, [1.0, 0.0, 0.0]),
        ] {
            let found = shares(&decoding, &[0.5, 0.1, 0.4]);
            assert!(found.iter().zip(expected).all(|(found, share)| (found - share).abs() < 0.015), "{found:?}");
        }
        assert_eq!(shares(&decoding, &[0.5, 0.5]), shares(&decoding, &[0.5, 0.5]));
        assert_ne!(shares(&Decoding { seed: 8, ..decoding.clone() }, &[0.5, 0.5]), shares(&decoding, &[0.5, 0.5]));
    }

    #[test]
    fn tokens_that_would_end_the_text_are_withheld_until_it_is_long_enough() {
        let decoding = Decoding { min_tokens: 2, withheld: Arc::from([1]), ..Decoding::default() };
        assert!(decoding.reads_logits(1) && !decoding.reads_logits(2));
        let token = |decoding: &Decoding, index| decoding.choose(&logits(&[0.2, 0.7, 0.1]), index).token;
        assert_eq!([0, 1, 2].map(|index| token(&decoding, index)), [0, 0, 1]);
        let drawn = Decoding { temperature: 1.0, min_tokens: u32::MAX, ..decoding };
        assert!((0..200).all(|index| token(&drawn, index) != 1));
    }

    #[test]
    fn alternatives_are_the_most_likely_tokens_with_their_log_probabilities() {
        let decoding = Decoding { alternatives: Some(2), ..Decoding::default() };
        let chosen = decoding.choose(&logits(&[0.1, 0.4, 0.1, 0.4]), 0);
        assert_eq!(
            (chosen.token, chosen.alternatives.iter().map(|(token, _)| *token).collect::<Vec<_>>()),
            (1, vec![1, 3])
        );
        assert!(
            (chosen.log_probability.exp() - 0.4).abs() < 1e-6 && (chosen.alternatives[1].1.exp() - 0.4).abs() < 1e-6
        );
        let all = Decoding { alternatives: Some(9), ..Decoding::default() }.choose(&logits(&[0.1, 0.9]), 0);
        assert_eq!(all.alternatives.len(), 2);
    }
}
