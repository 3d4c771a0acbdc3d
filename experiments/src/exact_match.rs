//! Exact-match accuracy of prompts with answers, by exit depth.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use engine::{Engine, Idle, PromptLine, Prompts};
use scheduler::{Batching, ExitPolicy, Settings};
use serde::Serialize;
use traces::{Nanos, Request};

use crate::named_engine::NamedEngine;
use crate::reporter::Reporter;

/// Rows of a pass, and sequences of a batch. Nothing is timed.
const TOKEN_BUDGET: u32 = 256;
const MAX_BATCH: u32 = 64;
/// Quantile of the normal distribution for intervals of 95% confidence.
const Z: f64 = 1.959_963_984_540_054;
/// Name of the class of all prompts together.
pub const ALL_CLASSES: &str = "all";

/// How many prompts of a class are answered right if every token of the answer exits at one depth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExactMatch {
    /// Class of the prompts, as in the file of prompts; `all` for all of them.
    pub class: String,
    /// Passes of every token of the answer: 1 is the first depth.
    pub passes: u8,
    /// Prompts with an answer.
    pub prompts: usize,
    /// Prompts whose continuation begins with the answer.
    pub right: usize,
    /// Share of those, 0 to 1.
    pub exact_match: f64,
    /// Lower end of its 95% confidence interval (Wilson).
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl ExactMatch {
    fn new(class: &str, passes: u8, prompts: usize, right: usize) -> Self {
        let (low, high) = wilson(right, prompts);
        let exact_match = right as f64 / prompts as f64;
        Self { class: class.to_owned(), passes, prompts, right, exact_match, low, high }
    }
}

/// Completes the prompts of the engine that have an answer, with every token exiting at the same depth, for each depth
/// in turn; prompts run every depth. Returns the accuracy of all, then of each class, by depth.
///
/// # Errors
/// If the prompts are not lines of a file, none has an answer, one is too long for the model, or the engine fails.
pub fn exact_match(named: &NamedEngine, reporter: &mut dyn Reporter) -> Result<Vec<ExactMatch>> {
    let (engine, tokenizer) = (&named.engine, named.tokenizer.as_ref().context("the model has no tokenizer")?);
    let Prompts::Lines(lines) = &*engine.prompts else { anyhow::bail!("expected a file of prompts in JSON lines") };
    let lines: Vec<&PromptLine> = lines.iter().filter(|line| line.answer.is_some()).collect();
    ensure!(!lines.is_empty(), "no prompt has an `answer`: expected at least one");
    let classes = classes(&lines);
    let requests: Vec<Request> = (0..).zip(&lines).map(|(id, line)| request(engine, id, line)).collect();
    let engine =
        &Engine { prompts: Arc::new(Prompts::Lines(lines.iter().copied().cloned().collect())), ..engine.clone() };
    reporter.start(usize::from(engine.num_loops()), 0);
    let mut right: Vec<Vec<bool>> = Vec::new();
    for depth in 0..engine.num_loops() {
        let settings = settings(engine, depth, &requests);
        let generations = engine.replay(settings, &requests, None, Idle::Skip, &mut ())?;
        let grade = |(line, request): (&&PromptLine, &Request)| {
            Ok(line.grade(tokenizer, &generations[&request.id].tokens)?.unwrap_or(false))
        };
        right.push(lines.iter().zip(&requests).map(grade).collect::<Result<_>>()?);
        reporter.advance(1);
    }
    reporter.finish();
    let of_class = |class: Option<&str>| {
        let members: Vec<usize> = (0..lines.len())
            .filter(|&line| class.is_none_or(|class| lines[line].class.as_deref() == Some(class)))
            .collect();
        let at = |(passes, right): (u8, &Vec<bool>)| {
            let count = members.iter().filter(|&&line| right[line]).count();
            ExactMatch::new(class.unwrap_or(ALL_CLASSES), passes, members.len(), count)
        };
        (1..).zip(&right).map(at).collect::<Vec<_>>()
    };
    Ok(std::iter::once(None).chain(classes.iter().map(|class| Some(*class))).flat_map(of_class).collect())
}

/// The classes of prompts.
fn classes<'a>(lines: &[&'a PromptLine]) -> Vec<&'a str> {
    let mut classes: Vec<&str> = lines.iter().filter_map(|line| line.class.as_deref()).collect();
    order_classes(&mut classes);
    classes
}

/// Sorts classes, numbers in their order before texts in theirs, and keeps one of each.
pub(crate) fn order_classes(classes: &mut Vec<&str>) {
    let number = |class: &str| class.parse::<f64>().unwrap_or(f64::INFINITY);
    classes.sort_by(|a, b| number(a).total_cmp(&number(b)).then(a.cmp(b)));
    classes.dedup();
}

/// A request for enough tokens to hold the answer however it is cut into tokens: one for each byte, as far as the model
/// has positions.
fn request(engine: &Engine, id: u32, line: &PromptLine) -> Request {
    let prompt_tokens = line.tokens.len() as u32;
    let room = (engine.model.config().max_positions as u32 + 1).saturating_sub(prompt_tokens).max(1);
    let (bytes, tokens) = line.answer.as_ref().map_or((1, 1), |answer| (answer.text.len() as u32, answer.tokens));
    Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens: bytes.max(tokens).min(room) }
}

/// A full batch in which every token exits at `depth`, with a cache for the longest requests at once. Deeper entries
/// than those of `depth` are never attended to, so the KV fill does not matter.
fn settings(engine: &Engine, depth: u8, requests: &[Request]) -> Settings {
    let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
    let max_batch = (requests.len() as u32).min(MAX_BATCH);
    Settings {
        max_batch,
        token_budget: TOKEN_BUDGET,
        prefill_chunk: TOKEN_BUDGET / u32::from(engine.num_loops()),
        kv_fill: engine.model.config().kv_fill,
        num_blocks: max_batch * longest.div_ceil(Settings::BLOCK_TOKENS),
        ..Settings::new(Batching::Depth, ExitPolicy::Static(depth), engine.num_loops())
    }
}

/// Ends of Wilson's score interval of a share, at 95% confidence.
fn wilson(right: usize, of: usize) -> (f64, f64) {
    let (n, p) = (of as f64, right as f64 / of as f64);
    let middle = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_intervals_are_those_of_the_textbook() {
        // Agresti and Coull (1998): 9 of 10 gives 0.596 to 0.982.
        let (low, high) = wilson(9, 10);
        assert!((low - 0.5958).abs() < 1e-4 && (high - 0.9821).abs() < 1e-4, "{low} to {high}");
        let (low, high) = wilson(0, 10);
        assert!(low == 0.0 && (high - 0.2775).abs() < 1e-4, "{low} to {high}");
    }

    #[test]
    fn classes_that_are_numbers_come_in_their_order() {
        let line = |class: Option<&str>| PromptLine { class: class.map(str::to_owned), ..PromptLine::default() };
        let lines = [line(Some("text")), line(Some("10")), line(None), line(Some("9")), line(Some("10"))];
        assert_eq!(classes(&lines.iter().collect::<Vec<_>>()), ["9", "10", "text"]);
    }
}
