//! Results of `vllm bench serve --save-detailed`: one JSON object with a list for each quantity.

use std::marker::PhantomData;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::json_lines::Whole;
use super::{LeftOut, Reading, TIME, TOKENS, document, name_of};
use crate::error::{Result, TraceError};
use crate::request::{Request, RequestTrace};
use crate::units::Nanos;

#[derive(Deserialize)]
struct Results {
    input_lens: Vec<Whole>,
    output_lens: Vec<Whole>,
    /// Seconds of the client's clock.
    start_times: Option<Vec<f64>>,
    /// Requests per second that were asked for: a number, or `inf`.
    request_rate: Option<Value>,
    max_concurrency: Option<Value>,
}

pub(super) fn read(path: &Path, Reading { options, is_timed }: Reading<'_>) -> Result<RequestTrace> {
    let found: Results = document::read(path, PhantomData)?;
    let Results { input_lens, output_lens, start_times, .. } = &found;
    let same = |key: &str, length: usize| match length == input_lens.len() {
        true => Ok(()),
        false => Err(TraceError::file(
            path,
            format!("{length} values of {key}"),
            format!("{} as in input_lens", input_lens.len()),
        )),
    };
    same("output_lens", output_lens.len())?;
    same("start_times", start_times.as_ref().map_or(input_lens.len(), Vec::len))?;
    let arrivals = arrivals(path, &found, is_timed)?;
    let (mut requests, mut left_out) = (Vec::new(), LeftOut::default());
    for (place, (input, output)) in input_lens.iter().zip(output_lens).enumerate() {
        let wrong = |list: usize, found: u64| TraceError::Value {
            path: path.to_owned(),
            line: 1,
            column: format!("{}[{place}]", ["input_lens", "output_lens"][list]),
            found: format!("`{found}`"),
            expected: TOKENS.to_owned(),
        };
        let tokens = |list: usize, tokens: &Whole| {
            let in_range = u32::try_from(tokens.0).ok().filter(|&tokens| tokens <= Request::MAX_TOKENS);
            in_range.ok_or_else(|| wrong(list, tokens.0))
        };
        let (prompt_tokens, output_tokens) = (tokens(0, input)?, tokens(1, output)?);
        match left_out.without_tokens(prompt_tokens, output_tokens, options.zero_tokens) {
            None => requests.push(Request { id: 0, arrival: arrivals[place], prompt_tokens, output_tokens }),
            Some(None) => {}
            Some(Some(list)) => return Err(wrong(list, 0)),
        }
    }
    let trace = RequestTrace::from_unsorted(name_of(path), requests, None).counted_from_first();
    Ok(RequestTrace { warnings: left_out.warnings().collect(), ..trace })
}

/// When each request was sent, after the first.
fn arrivals(path: &Path, found: &Results, is_timed: bool) -> Result<Vec<Nanos>> {
    let at_once = || vec![Nanos::ZERO; found.input_lens.len()];
    let Some(starts) = &found.start_times else {
        let is_unlimited = |limit: &Option<Value>| limit.as_ref().is_none_or(Value::is_null);
        let is_infinite = found.request_rate.as_ref().is_some_and(|rate| *rate == "inf" || *rate == f64::INFINITY);
        return match !is_timed || (is_infinite && is_unlimited(&found.max_concurrency)) {
            true => Ok(at_once()),
            false => Err(TraceError::file(
                path,
                "no start_times",
                "the time at which each request was sent, which vLLM writes from 0.11 on. Lengths without times are \
                 read by `generate.lengths_from`",
            )),
        };
    };
    let first = starts.iter().copied().fold(f64::INFINITY, f64::min);
    let since = |(place, &start): (usize, &f64)| {
        let since = Nanos::from_secs_f64(start - first);
        let is_sound = start.is_finite() && since <= Request::MAX_ARRIVAL;
        is_sound.then_some(since).ok_or_else(|| TraceError::Value {
            path: path.to_owned(),
            line: 1,
            column: format!("start_times[{place}]"),
            found: format!("`{start}`"),
            expected: TIME.to_owned(),
        })
    };
    starts.iter().enumerate().map(since).collect()
}
