//! Requests from a seeded random process: their arrivals and lengths.

use std::path::{Path, PathBuf};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, RngExt, SeedableRng};
use rand_distr::{Distribution, Exp, Gamma, LogNormal, Normal, Uniform};
use serde::{Deserialize, Serialize};
use serde_yaml::with::singleton_map_recursive;

use crate::error::{Result, TraceError};
use crate::request::{Request, RequestTrace};
use crate::request_file::ReadOptions;
use crate::units::Nanos;

/// When requests arrive. The first arrives at time 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Arrivals {
    /// All at time 0, as in an offline batch.
    AllAtOnce,
    /// At equal intervals.
    Constant {
        /// Requests per second.
        rate_per_s: f64,
    },
    /// As a Poisson process: exponential intervals.
    Poisson {
        /// Mean requests per second.
        rate_per_s: f64,
    },
    /// With gamma-distributed intervals.
    Gamma {
        /// Mean requests per second.
        rate_per_s: f64,
        /// Coefficient of variation of the intervals: 1 is a Poisson process, larger values are burstier.
        cv: f64,
    },
}

impl Arrivals {
    /// This process at another mean rate; `None` for requests that arrive at once.
    pub fn at_rate(self, rate_per_s: f64) -> Option<Self> {
        match self {
            Self::AllAtOnce => None,
            Self::Constant { .. } => Some(Self::Constant { rate_per_s }),
            Self::Poisson { .. } => Some(Self::Poisson { rate_per_s }),
            Self::Gamma { cv, .. } => Some(Self::Gamma { rate_per_s, cv }),
        }
    }
}

/// Lengths of prompts or outputs, in tokens. Drawn values are rounded and limited to 1 to [`Request::MAX_TOKENS`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Length {
    /// A constant length.
    Fixed(u32),
    /// Every length from `min` to `max`, both included, with equal probability.
    Uniform {
        /// Smallest length.
        min: u32,
        /// Largest length.
        max: u32,
    },
    /// Normal.
    Normal {
        /// Mean in tokens.
        mean: f64,
        /// Standard deviation in tokens.
        std: f64,
    },
    /// Log-normal: many short, few very long.
    LogNormal {
        /// Median in tokens.
        median: f64,
        /// Standard deviation of the length's natural logarithm.
        sigma: f64,
    },
}

/// A random process that generates requests. Equal seeds generate equal requests.
///
/// Arrivals and lengths draw from separate random streams, so that another rate does not change the lengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generate {
    /// Number of requests.
    pub count: u32,
    /// Seed of the random numbers.
    #[serde(default)]
    pub seed: u64,
    /// When they arrive.
    #[serde(with = "singleton_map_recursive")]
    pub arrivals: Arrivals,
    /// Length of prompts; required with `output_tokens`.
    #[serde(default, with = "singleton_map_recursive", skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<Length>,
    /// Length of outputs; required with `prompt_tokens`.
    #[serde(default, with = "singleton_map_recursive", skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<Length>,
    /// In place of both lengths: a request trace whose pairs of prompt and output length are drawn with equal
    /// probability.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lengths_from: Option<PathBuf>,
}

impl Generate {
    /// Maximum number of requests.
    pub const MOST: u32 = 100_000_000;

    /// The requests, generated one at a time. Paths are relative to `base_dir`.
    ///
    /// # Errors
    /// If a parameter is out of range, or the trace of lengths cannot be read.
    pub fn requests(&self, base_dir: &Path) -> Result<Generated> {
        self.requests_with(base_dir, &ReadOptions::default())
    }

    /// As [`Self::requests`], with options for the trace of lengths.
    ///
    /// # Errors
    /// As [`Self::requests`].
    pub fn requests_with(&self, base_dir: &Path, options: &ReadOptions<'_>) -> Result<Generated> {
        if self.count == 0 {
            return Err(TraceError::spec("count", 0, "at least 1"));
        }
        if self.count > Self::MOST {
            return Err(TraceError::spec("count", self.count, format!("at most {}", Self::MOST)));
        }
        let mut seeds = Xoshiro256PlusPlus::seed_from_u64(self.seed);
        let mut warnings = Vec::new();
        Ok(Generated {
            ids: 0..self.count,
            arrival_s: 0.0,
            gaps: Gaps::new(self.arrivals)?,
            lengths: self.lengths(base_dir, options, &mut warnings)?,
            arrival_rng: Xoshiro256PlusPlus::from_rng(&mut seeds),
            length_rng: Xoshiro256PlusPlus::from_rng(&mut seeds),
            warnings,
        })
    }

    fn lengths(&self, base_dir: &Path, options: &ReadOptions<'_>, warnings: &mut Vec<String>) -> Result<Lengths> {
        match (self.prompt_tokens, self.output_tokens, &self.lengths_from) {
            (Some(prompt), Some(output), None) => Ok(Lengths::Separate {
                prompt: TokenCount::new("prompt_tokens", prompt)?,
                output: TokenCount::new("output_tokens", output)?,
            }),
            (None, None, Some(file)) => {
                let (lengths, found) = RequestTrace::read_lengths(&base_dir.join(file), options)?;
                warnings.extend(found);
                Ok(Lengths::Pairs(lengths))
            }
            (prompt, output, from) => {
                let keys = ["prompt_tokens", "output_tokens", "lengths_from"];
                let given = keys.into_iter().zip([prompt.is_some(), output.is_some(), from.is_some()]);
                let given: Vec<_> = given.filter(|key| key.1).map(|key| key.0).collect();
                let found = if given.is_empty() { "no lengths".into() } else { given.join(", ") };
                Err(TraceError::spec("generate", found, "prompt_tokens and output_tokens, or lengths_from alone"))
            }
        }
    }
}

/// An iterator over generated requests; see [`Generate::requests`].
#[derive(Clone, Debug)]
pub struct Generated {
    ids: std::ops::Range<u32>,
    arrival_s: f64,
    gaps: Gaps,
    lengths: Lengths,
    arrival_rng: Xoshiro256PlusPlus,
    length_rng: Xoshiro256PlusPlus,
    warnings: Vec<String>,
}

impl Generated {
    /// Warnings about the trace that lengths are drawn from.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl Iterator for Generated {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        let id = self.ids.next()?;
        let arrival = Nanos::from_secs_f64(self.arrival_s).min(Request::MAX_ARRIVAL);
        self.arrival_s += self.gaps.sample_s(&mut self.arrival_rng);
        let (prompt_tokens, output_tokens) = self.lengths.sample(&mut self.length_rng);
        Some(Request { id, arrival, prompt_tokens, output_tokens })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.ids.size_hint()
    }
}

impl ExactSizeIterator for Generated {}

/// Time from one arrival to the next.
#[derive(Clone, Copy, Debug)]
enum Gaps {
    Fixed(f64),
    Exponential(Exp<f64>),
    Gamma(Gamma<f64>),
}

impl Gaps {
    fn new(arrivals: Arrivals) -> Result<Self> {
        let rate = |rate_per_s: f64| match (1e-6..=1e9).contains(&rate_per_s) {
            true => Ok(rate_per_s),
            false => Err(TraceError::spec("rate_per_s", rate_per_s, "requests per second from 1e-6 to 1e9")),
        };
        Ok(match arrivals {
            Arrivals::AllAtOnce => Self::Fixed(0.0),
            Arrivals::Constant { rate_per_s } => Self::Fixed(1.0 / rate(rate_per_s)?),
            Arrivals::Poisson { rate_per_s } => {
                let gaps = Exp::new(rate(rate_per_s)?);
                Self::Exponential(gaps.map_err(|error| TraceError::spec("rate_per_s", rate_per_s, error.to_string()))?)
            }
            Arrivals::Gamma { rate_per_s, cv } => {
                let expected = "a coefficient of variation from 0.01 to 100";
                let out_of_range = || TraceError::spec("cv", cv, expected);
                let rate = rate(rate_per_s)?;
                if !(0.01..=100.0).contains(&cv) {
                    return Err(out_of_range());
                }
                Self::Gamma(Gamma::new(1.0 / (cv * cv), cv * cv / rate).map_err(|_| out_of_range())?)
            }
        })
    }

    fn sample_s(&self, rng: &mut impl Rng) -> f64 {
        match self {
            Self::Fixed(seconds) => *seconds,
            Self::Exponential(gaps) => gaps.sample(rng),
            Self::Gamma(gaps) => gaps.sample(rng),
        }
    }
}

/// Prompt and output length of the next request.
#[derive(Clone, Debug)]
enum Lengths {
    Separate { prompt: TokenCount, output: TokenCount },
    Pairs(Vec<(u32, u32)>),
}

impl Lengths {
    fn sample(&self, rng: &mut impl Rng) -> (u32, u32) {
        match self {
            Self::Separate { prompt, output } => (prompt.sample(rng), output.sample(rng)),
            Self::Pairs(pairs) => pairs[rng.random_range(0..pairs.len())],
        }
    }
}

/// A checked [`Length`].
#[derive(Clone, Copy, Debug)]
enum TokenCount {
    Fixed(u32),
    Uniform(Uniform<u32>),
    Normal(Normal<f64>),
    LogNormal(LogNormal<f64>),
}

impl TokenCount {
    fn new(key: &'static str, length: Length) -> Result<Self> {
        let tokens = |tokens: u32| (1..=Request::MAX_TOKENS).contains(&tokens);
        let positive = |mean: f64| (1.0..=f64::from(Request::MAX_TOKENS)).contains(&mean);
        let sound = match length {
            Length::Fixed(count) => tokens(count).then_some(Self::Fixed(count)),
            Length::Uniform { min, max } if tokens(min) && tokens(max) => {
                Uniform::new_inclusive(min, max).ok().map(Self::Uniform)
            }
            Length::Normal { mean, std } if positive(mean) && std >= 0.0 => {
                Normal::new(mean, std).ok().map(Self::Normal)
            }
            Length::LogNormal { median, sigma } if positive(median) && sigma >= 0.0 => {
                LogNormal::new(median.ln(), sigma).ok().map(Self::LogNormal)
            }
            _ => None,
        };
        let expected = "lengths from 1 to 1073741824, min no more than max, a finite std or sigma of at least 0";
        sound.ok_or_else(|| TraceError::spec(key, format!("{length:?}"), expected))
    }

    fn sample(&self, rng: &mut impl Rng) -> u32 {
        // Float conversion saturates, so values beyond u32 are limited like others above the maximum.
        let whole = |tokens: f64| (tokens.round() as u32).clamp(1, Request::MAX_TOKENS);
        match self {
            Self::Fixed(tokens) => *tokens,
            Self::Uniform(tokens) => tokens.sample(rng),
            Self::Normal(tokens) => whole(tokens.sample(rng)),
            Self::LogNormal(tokens) => whole(tokens.sample(rng)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(arrivals: Arrivals, length: Length) -> Vec<Request> {
        let lengths = Some(length);
        let generate = Generate {
            count: 20_000,
            seed: 7,
            arrivals,
            prompt_tokens: lengths,
            output_tokens: lengths,
            lengths_from: None,
        };
        generate.requests(Path::new("")).unwrap().collect()
    }

    /// Mean and standard deviation.
    fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
        let count = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / count;
        (mean, (values.map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt())
    }

    fn gap_moments(arrivals: Arrivals) -> (f64, f64) {
        let requests = made(arrivals, Length::Fixed(1));
        assert_eq!(arrivals.at_rate(20.0).unwrap_or(Arrivals::AllAtOnce), arrivals);
        assert_eq!(requests[0].arrival, Nanos::ZERO);
        assert!(requests.is_sorted_by_key(|request| request.arrival));
        moments(requests.windows(2).map(|pair| (pair[1].arrival - pair[0].arrival).as_secs_f64()))
    }

    #[track_caller]
    fn assert_near(found: f64, expected: f64, share: f64) {
        assert!((found / expected - 1.0).abs() < share, "found {found}, expected {expected}");
    }

    #[test]
    fn distances_of_arrivals_have_the_mean_and_variation_asked_for() {
        let (mean, std) = gap_moments(Arrivals::Constant { rate_per_s: 20.0 });
        assert_near(mean, 0.05, 1e-6);
        assert!(std < 1e-6);
        let (mean, std) = gap_moments(Arrivals::Poisson { rate_per_s: 20.0 });
        assert_near(mean, 0.05, 0.03);
        assert_near(std, 0.05, 0.03);
        let (mean, std) = gap_moments(Arrivals::Gamma { rate_per_s: 20.0, cv: 2.0 });
        assert_near(mean, 0.05, 0.05);
        assert_near(std, 0.1, 0.05);
        assert_eq!(gap_moments(Arrivals::AllAtOnce), (0.0, 0.0));
    }

    #[test]
    fn lengths_have_the_distribution_asked_for() {
        let lengths =
            |length| made(Arrivals::AllAtOnce, length).into_iter().map(|request| f64::from(request.output_tokens));
        assert!(lengths(Length::Fixed(48)).all(|tokens| tokens == 48.0));
        let (mean, _) = moments(lengths(Length::Uniform { min: 8, max: 64 }));
        assert_near(mean, 36.0, 0.02);
        assert_eq!(lengths(Length::Uniform { min: 8, max: 64 }).fold(f64::MAX, f64::min), 8.0);
        assert_eq!(lengths(Length::Uniform { min: 8, max: 64 }).fold(0.0, f64::max), 64.0);
        let (mean, std) = moments(lengths(Length::Normal { mean: 100.0, std: 10.0 }));
        assert_near(mean, 100.0, 0.01);
        assert_near(std, 10.0, 0.03);
        let (mean, std) = moments(lengths(Length::LogNormal { median: 100.0, sigma: 0.5 }).map(f64::ln));
        assert_near(mean, 100.0_f64.ln(), 0.01);
        assert_near(std, 0.5, 0.03);
        assert_eq!(lengths(Length::Normal { mean: 1.0, std: 50.0 }).fold(f64::MAX, f64::min), 1.0);
        assert!(lengths(Length::LogNormal { median: 1e9, sigma: 99.0 }).all(|tokens| tokens <= f64::from(1 << 30)));
    }

    #[test]
    fn another_rate_keeps_lengths_and_another_seed_does_not() {
        let length = Length::Uniform { min: 1, max: 1000 };
        let lengths = |requests: Vec<Request>| requests.into_iter().map(|of| of.prompt_tokens).collect::<Vec<_>>();
        let slow = made(Arrivals::Poisson { rate_per_s: 1.0 }, length);
        assert_eq!(slow, made(Arrivals::Poisson { rate_per_s: 1.0 }, length));
        assert_eq!(lengths(slow.clone()), lengths(made(Arrivals::Poisson { rate_per_s: 9.0 }, length)));
        let (seed, arrivals) = (8, Arrivals::Poisson { rate_per_s: 1.0 });
        let (prompt_tokens, output_tokens) = (Some(length), Some(length));
        let other = Generate { count: 20_000, seed, arrivals, prompt_tokens, output_tokens, lengths_from: None };
        let other: Vec<Request> = other.requests(Path::new("")).unwrap().collect();
        assert_ne!(
            slow.iter().map(|of| of.arrival).collect::<Vec<_>>(),
            other.iter().map(|of| of.arrival).collect::<Vec<_>>()
        );
        assert_ne!(lengths(slow), lengths(other));
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        let message = |yaml: &str| {
            let generate: Generate = serde_yaml::from_str(yaml).unwrap();
            generate.requests(Path::new("")).unwrap_err().to_string()
        };
        let lengths = "prompt_tokens: {fixed: 1}, output_tokens: {fixed: 1}";
        for (arrivals, key) in [
            ("poisson: {rate_per_s: 0}", "rate_per_s: found 0"),
            ("poisson: {rate_per_s: .nan}", "rate_per_s: found NaN"),
            ("constant: {rate_per_s: -1}", "rate_per_s: found -1"),
            ("gamma: {rate_per_s: 1, cv: 0}", "cv: found 0"),
        ] {
            let found = message(&format!("{{count: 1, arrivals: {{{arrivals}}}, {lengths}}}"));
            assert!(found.contains(key), "{found}");
        }
        for length in
            ["fixed: 0", "uniform: {min: 3, max: 2}", "normal: {mean: 5, std: -1}", "log_normal: {median: 0, sigma: 1}"]
        {
            let found = message(&format!(
                "{{count: 1, arrivals: all_at_once, prompt_tokens: {{fixed: 1}}, output_tokens: {{{length}}}}}"
            ));
            assert!(found.starts_with("requests: output_tokens: found "), "{found}");
        }
        assert!(message(&format!("{{count: 0, arrivals: all_at_once, {lengths}}}")).contains("count: found 0"));
        let most = message(&format!("{{count: 4294967295, arrivals: all_at_once, {lengths}}}"));
        assert!(most.contains("count: found 4294967295, expected at most 100000000"), "{most}");
        let found = message("{count: 1, arrivals: all_at_once, prompt_tokens: {fixed: 1}}");
        assert!(found.contains("generate: found prompt_tokens, expected prompt_tokens and output_tokens"), "{found}");
    }
}
