//! Quality of the text that a run served, beside that of full depth.

use std::collections::HashMap;

use anyhow::Result;
use engine::{Engine, FullDepth, Generation, Tokenizer};
use scheduler::{Batching, KvFill};
use serde::{Deserialize, Serialize};
use simulator::Summary;
use traces::{ExitTrace, Request};

use crate::bootstrap;
use crate::exact_match::{ALL_CLASSES, order_classes};
use crate::named_engine::NamedEngine;

/// Share of the served tokens that full depth gives after the same prefix.
pub const TOKEN_AGREEMENT: &str = "token_agreement";
/// Share of the served tokens that full depth's own text has at the same position.
pub const EQUAL_SHARE: &str = "equal_share";
/// Negative log-likelihood of the served text under full depth, per token.
pub const NATS_PER_TOKEN: &str = "nats_per_token";
/// Negative log-likelihood of full depth's own text under full depth, per token.
pub const NATS_PER_TOKEN_FULL_DEPTH: &str = "nats_per_token_full_depth";
/// Share of the graded requests whose text begins with the answer.
pub const EXACT_MATCH: &str = "exact_match";
/// The same of full depth's own texts.
pub const EXACT_MATCH_FULL_DEPTH: &str = "exact_match_full_depth";

/// Full depth's own texts of some requests, with the random numbers of the runs that are compared with them.
#[derive(Clone, Debug, Default)]
pub struct FullDepthTexts(HashMap<u32, OwnText>);

#[derive(Clone, Debug)]
struct OwnText {
    tokens: Vec<u32>,
    /// What full depth makes of them.
    full_depth: FullDepth,
}

impl FullDepthTexts {
    /// The texts that a run without early exits generated.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn of_run(engine: &Engine, generations: &HashMap<u32, Generation>) -> Result<Self> {
        let text = |(&request, generation): (&u32, &Generation)| {
            let full_depth = engine.full_depth(request, generation)?;
            Ok((request, OwnText { tokens: generation.tokens.clone(), full_depth }))
        };
        Ok(Self(generations.iter().map(text).collect::<Result<_>>()?))
    }

    /// The texts in a recording of these requests.
    ///
    /// # Errors
    /// If a request has no prompt, or the engine fails.
    pub fn of_recording(engine: &Engine, recorded: &ExitTrace, requests: &[Request]) -> Result<Self> {
        let num_loops = recorded.num_loops();
        let last = |token: usize| recorded.predictions[(token + 1) * num_loops - 1];
        let generation = |(index, request): (usize, &Request)| {
            let tokens = recorded.generation(index).map(last).collect();
            let prompt = engine.prompts.get(request)?;
            Ok((request.id, Generation { prompt, tokens, ..Generation::default() }))
        };
        let generations = requests.iter().enumerate().map(generation).collect::<Result<_>>()?;
        Self::of_run(engine, &generations)
    }
}

/// What one request was served.
#[derive(Clone, Debug, Default, PartialEq)]
struct Served {
    tokens: usize,
    /// Tokens that full depth gives after the same prefix.
    agreeing: usize,
    /// Tokens that are those of full depth's own text, at the same position.
    equal: usize,
    /// Negative log-likelihood of the served text, and of full depth's own.
    nats: f64,
    nats_full_depth: f64,
    tokens_full_depth: usize,
    /// Whether the served text, and full depth's own, begin with the answer; `None` if they are not graded.
    right: Option<[bool; 2]>,
    class: Option<String>,
}

impl Served {
    fn new(
        engine: &Engine,
        tokenizer: Option<&Tokenizer>,
        request: u32,
        generation: &Generation,
        own: &OwnText,
    ) -> Result<Self> {
        // Texts that are equal need no second pass of the model.
        let full_depth = match generation.tokens == own.tokens {
            true => own.full_depth.clone(),
            false => engine.full_depth(request, generation)?,
        };
        let same =
            |other: &[u32]| generation.tokens.iter().zip(other).filter(|(served, other)| served == other).count();
        let line = engine.prompts.line(request);
        let right = match (line, tokenizer) {
            (Some(line), Some(tokenizer)) => {
                let grade = |tokens| line.grade(tokenizer, tokens);
                grade(&generation.tokens)?.zip(grade(&own.tokens)?).map(|(served, own)| [served, own])
            }
            _ => None,
        };
        Ok(Self {
            tokens: generation.tokens.len(),
            agreeing: same(&full_depth.tokens),
            equal: same(&own.tokens),
            nats: full_depth.nats(),
            nats_full_depth: own.full_depth.nats(),
            tokens_full_depth: own.tokens.len(),
            right,
            class: line.and_then(|line| line.class.clone()),
        })
    }
}

/// A metric of a run with its 95% confidence interval over requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Name of the metric.
    pub metric: &'static str,
    /// Class of the prompts that it is of, `all` for all of them.
    pub class: String,
    /// Requests that it is of.
    pub requests: usize,
    /// The value.
    pub value: f64,
    /// Ends of the interval; `None` of a single request.
    pub interval: Option<(f64, f64)>,
}

/// Quality of the text that a run served, request by request.
#[derive(Clone, Debug, PartialEq)]
pub struct Quality {
    estimates: Vec<Estimate>,
}

/// A ratio of sums over requests: numerator and denominator of one.
type Ratio = fn(&Served) -> (f64, f64);

const OF_TOKENS: [(&str, Ratio); 4] = [
    (TOKEN_AGREEMENT, |served| (served.agreeing as f64, served.tokens as f64)),
    (EQUAL_SHARE, |served| (served.equal as f64, served.tokens as f64)),
    (NATS_PER_TOKEN, |served| (served.nats, served.tokens as f64)),
    (NATS_PER_TOKEN_FULL_DEPTH, |served| (served.nats_full_depth, served.tokens_full_depth as f64)),
];
const OF_ANSWERS: [(&str, Ratio); 2] = [
    (EXACT_MATCH, |served| (served.right.map_or(0.0, |[right, _]| f64::from(u8::from(right))), 1.0)),
    (EXACT_MATCH_FULL_DEPTH, |served| (served.right.map_or(0.0, |[_, right]| f64::from(u8::from(right))), 1.0)),
];

impl Quality {
    /// Compares what a run generated with full depth. `own` are full depth's texts of the same requests.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn measure(
        NamedEngine { engine, tokenizer, .. }: &NamedEngine,
        generations: &HashMap<u32, Generation>,
        own: &FullDepthTexts,
    ) -> Result<Self> {
        let mut requests: Vec<u32> = generations.keys().copied().collect();
        requests.sort_unstable();
        let served =
            |request: &u32| Served::new(engine, tokenizer.as_ref(), *request, &generations[request], &own.0[request]);
        Ok(Self::new(&requests.iter().map(served).collect::<Result<Vec<_>>>()?))
    }

    fn new(served: &[Served]) -> Self {
        let all: Vec<&Served> = served.iter().collect();
        let graded: Vec<&Served> = served.iter().filter(|served| served.right.is_some()).collect();
        let mut estimates = estimates(&OF_TOKENS, ALL_CLASSES, &all);
        estimates.extend(estimates_of_graded(ALL_CLASSES, &graded));
        let mut classes: Vec<&str> = graded.iter().filter_map(|served| served.class.as_deref()).collect();
        order_classes(&mut classes);
        for class in classes {
            let members: Vec<&Served> =
                graded.iter().copied().filter(|served| served.class.as_deref() == Some(class)).collect();
            estimates.extend(estimates_of_graded(class, &members));
        }
        Self { estimates }
    }

    /// A metric over all requests; `None` if it has no value.
    pub fn value(&self, metric: &str) -> Option<f64> {
        self.of_all(metric).map(|estimate| estimate.value)
    }

    fn of_all(&self, metric: &str) -> Option<&Estimate> {
        self.estimates.iter().find(|estimate| estimate.metric == metric && estimate.class == ALL_CLASSES)
    }

    /// Every metric, over all requests and by class.
    pub fn estimates(&self) -> &[Estimate] {
        &self.estimates
    }

    /// The summary with the metrics over all requests.
    pub fn add_to(&self, summary: Summary) -> Summary {
        Summary {
            token_agreement: self.value(TOKEN_AGREEMENT),
            equal_share: self.value(EQUAL_SHARE),
            nats_per_token: self.value(NATS_PER_TOKEN),
            nats_per_token_full_depth: self.value(NATS_PER_TOKEN_FULL_DEPTH),
            exact_match: self.value(EXACT_MATCH),
            ..summary
        }
    }
}

fn estimates_of_graded(class: &str, graded: &[&Served]) -> Vec<Estimate> {
    if graded.is_empty() { Vec::new() } else { estimates(&OF_ANSWERS, class, graded) }
}

/// Ratios of sums over requests, with intervals over requests: samples draw whole requests, whose tokens depend on each
/// other.
fn estimates(metrics: &[(&'static str, Ratio)], class: &str, served: &[&Served]) -> Vec<Estimate> {
    let all: Vec<usize> = (0..served.len()).collect();
    let estimate = |&(metric, terms): &(&'static str, Ratio)| {
        let ratio = |requests: &[usize]| {
            let terms = requests.iter().map(|&request| terms(served[request]));
            let (above, below) = terms.fold((0.0, 0.0), |sum, (above, below)| (sum.0 + above, sum.1 + below));
            above / below
        };
        let interval = bootstrap::interval(served.len(), ratio);
        Estimate { metric, class: class.to_owned(), requests: served.len(), value: ratio(&all), interval }
    };
    metrics.iter().map(estimate).collect()
}

/// A line of `quality.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QualityLine {
    /// Batching policy.
    pub batching: Batching,
    /// The whole exit policy.
    pub exit_policy: String,
    /// The KV fill.
    pub kv_fill: KvFill,
    /// Name of the metric.
    pub metric: String,
    /// Class of the prompts that it is of, `all` for all of them.
    pub class: String,
    /// Requests that it is of.
    pub requests: usize,
    /// The value.
    pub value: f64,
    /// Lower end of its 95% confidence interval.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
}

/// The lines of a run in `quality.csv`.
pub fn lines<'a>(summary: &'a Summary, quality: &'a Quality) -> impl Iterator<Item = QualityLine> + 'a {
    quality.estimates.iter().map(|estimate| QualityLine {
        batching: summary.batching,
        exit_policy: summary.exit_policy.clone(),
        kv_fill: summary.kv_fill,
        metric: estimate.metric.to_owned(),
        class: estimate.class.clone(),
        requests: estimate.requests,
        value: estimate.value,
        low: estimate.interval.map(|(low, _)| low),
        high: estimate.interval.map(|(_, high)| high),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(tokens: usize, agreeing: usize, equal: usize) -> Served {
        let nats = 0.5 * tokens as f64;
        Served {
            tokens,
            agreeing,
            equal,
            nats,
            nats_full_depth: 0.25 * tokens as f64,
            tokens_full_depth: tokens,
            ..Served::default()
        }
    }

    #[test]
    fn a_metric_is_a_ratio_of_sums_over_requests() {
        let quality = Quality::new(&[served(10, 9, 1), served(30, 27, 3), served(60, 60, 60)]);
        let value = |metric| quality.value(metric).unwrap();
        assert_eq!((value(TOKEN_AGREEMENT), value(EQUAL_SHARE)), (0.96, 0.64));
        assert_eq!((value(NATS_PER_TOKEN), value(NATS_PER_TOKEN_FULL_DEPTH)), (0.5, 0.25));
        assert_eq!(quality.value(EXACT_MATCH), None, "no prompt has an answer");
        let of_share = quality.of_all(EQUAL_SHARE).unwrap();
        assert_eq!(of_share.interval, Some((0.1, 1.0)), "three requests may all be the best or all be a bad one");
        assert_eq!(quality.of_all(NATS_PER_TOKEN).unwrap().interval, Some((0.5, 0.5)), "all requests are alike");
        assert_eq!(Quality::new(&[served(5, 5, 5)]).of_all(EQUAL_SHARE).unwrap().interval, None);
    }

    #[test]
    fn intervals_cover_the_truth_about_as_often_as_they_say() {
        // 40 requests of 10 to 49 tokens, each with a share of equal tokens of its own: 0.5 on average.
        let sample = |seed: u64| {
            let mut state = seed;
            let mut uniform = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as f64 / (1_u64 << 31) as f64
            };
            let one = |_| {
                let (tokens, share) = (10 + (40.0 * uniform()) as usize, uniform());
                served(tokens, tokens, (tokens as f64 * share).round() as usize)
            };
            Quality::new(&(0..40).map(one).collect::<Vec<_>>())
        };
        let covers = |seed: &u64| {
            let (low, high) = sample(*seed).of_all(EQUAL_SHARE).unwrap().interval.unwrap();
            low <= 0.5 && 0.5 <= high
        };
        let covered = (0..200).filter(covers).count();
        assert!((180..=199).contains(&covered), "{covered} of 200");
    }

    #[test]
    fn answers_are_counted_in_all_and_by_class() {
        let graded =
            |class: &str, right| Served { right: Some(right), class: Some(class.to_owned()), ..served(3, 3, 3) };
        let quality = Quality::new(&[
            graded("10", [false, true]),
            graded("9", [true, true]),
            graded("10", [true, false]),
            served(3, 3, 3),
            graded("9", [true, true]),
        ]);
        let found: Vec<_> = quality
            .estimates()
            .iter()
            .filter(|estimate| estimate.metric.starts_with(EXACT_MATCH))
            .map(|estimate| (estimate.metric, estimate.class.as_str(), estimate.requests, estimate.value))
            .collect();
        assert_eq!(
            found,
            [
                (EXACT_MATCH, "all", 4, 0.75),
                (EXACT_MATCH_FULL_DEPTH, "all", 4, 0.75),
                (EXACT_MATCH, "9", 2, 1.0),
                (EXACT_MATCH_FULL_DEPTH, "9", 2, 1.0),
                (EXACT_MATCH, "10", 2, 0.5),
                (EXACT_MATCH_FULL_DEPTH, "10", 2, 0.5),
            ]
        );
    }
}
