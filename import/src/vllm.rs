//! A measured run of vLLM, and what a simulation of it says beside it.

use std::fmt;
use std::path::Path;

use scheduler::{Batching, ExitPolicy, KvFill, Settings};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{ImportError, read_text};

/// A run as its folder records it: `meta.json` (settings) and `requests.jsonl` (a line for each request).
#[derive(Clone, Debug)]
pub struct MeasuredRun {
    /// How vLLM was set.
    pub settings: Settings,
    /// What was measured of each request.
    pub requests: Vec<RequestTimes>,
}

/// When a request arrived and got its first and last token, in seconds of one clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RequestTimes {
    /// Arrival.
    pub arrival_s: f64,
    /// When the engine took notice of it: between two steps.
    pub queued_s: f64,
    /// First token.
    pub first_token_s: f64,
    /// Last token.
    pub last_token_s: f64,
    /// Tokens generated.
    pub output_tokens: u32,
}

#[derive(Deserialize)]
struct Meta {
    engine_kwargs: EngineArguments,
    kv_cache: Option<KvCache>,
    resolved_config: Option<ResolvedConfig>,
}

#[derive(Deserialize)]
struct EngineArguments {
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    tensor_parallel_size: Option<u32>,
    data_parallel_size: Option<u32>,
}

#[derive(Deserialize)]
struct KvCache {
    num_gpu_blocks: Option<u32>,
    block_size: Option<u32>,
    enable_prefix_caching: Option<bool>,
}

#[derive(Deserialize)]
struct ResolvedConfig {
    scheduler_config: Option<SchedulerConfig>,
}

/// vLLM 0.19's defaults where a key is missing.
#[derive(Deserialize)]
#[serde(default)]
struct SchedulerConfig {
    async_scheduling: bool,
    enable_chunked_prefill: bool,
    long_prefill_token_threshold: u32,
    scheduler_reserve_full_isl: bool,
    policy: String,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            async_scheduling: true,
            enable_chunked_prefill: true,
            long_prefill_token_threshold: 0,
            scheduler_reserve_full_isl: true,
            policy: "fcfs".to_owned(),
        }
    }
}

#[derive(Deserialize)]
struct RequestLine {
    output_toks: u32,
    /// Of the wall clock, in seconds.
    arrival_time: f64,
    /// These of a monotonic clock, in seconds.
    queued_ts: f64,
    first_token_ts: f64,
    last_token_ts: f64,
}

impl MeasuredRun {
    /// Reads a run's folder. `num_blocks` says how many KV blocks there were if `meta.json` does not.
    ///
    /// # Errors
    /// If a file does not read, the number of blocks is nowhere, or vLLM was set to rules that
    /// `docs/scheduling.md` does not have.
    pub fn read(folder: impl AsRef<Path>, num_blocks: Option<u32>) -> Result<Self, ImportError> {
        let folder = folder.as_ref();
        let path = folder.join("meta.json");
        let meta: Meta = parse(&path, &read_text(&path)?)?;
        let settings = settings(&path, meta, num_blocks)?;
        let path = folder.join("requests.jsonl");
        let text = read_text(&path)?;
        let lines: Vec<RequestLine> = (text.lines().zip(1..))
            .filter(|(line, _)| !line.trim().is_empty())
            .map(|(line, number): (&str, usize)| {
                let wrong = |error| ImportError::malformed(&path, format!("line {number}: {error}"));
                serde_json::from_str(line).map_err(wrong)
            })
            .collect::<Result<_, _>>()?;
        if lines.is_empty() {
            return Err(ImportError::unusable(&path, "no request", "a line for each"));
        }
        Ok(Self { settings, requests: on_one_clock(&lines) })
    }
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ImportError> {
    serde_json::from_str(text).map_err(|error| ImportError::malformed(path, error))
}

fn settings(path: &Path, meta: Meta, num_blocks: Option<u32>) -> Result<Settings, ImportError> {
    let engine = meta.engine_kwargs;
    if engine.tensor_parallel_size.unwrap_or(1) * engine.data_parallel_size.unwrap_or(1) > 1 {
        return Err(ImportError::unusable(path, "a run on several devices", "one device"));
    }
    let cache =
        meta.kv_cache.unwrap_or(KvCache { num_gpu_blocks: None, block_size: None, enable_prefix_caching: None });
    let config = meta.resolved_config.and_then(|config| config.scheduler_config).unwrap_or_default();
    let default = SchedulerConfig { async_scheduling: config.async_scheduling, ..SchedulerConfig::default() };
    let rules = [
        ("enable_chunked_prefill", config.enable_chunked_prefill == default.enable_chunked_prefill),
        ("scheduler_reserve_full_isl", config.scheduler_reserve_full_isl == default.scheduler_reserve_full_isl),
        ("long_prefill_token_threshold", config.long_prefill_token_threshold == 0),
        ("policy", config.policy == default.policy),
    ];
    if let Some((rule, _)) = rules.into_iter().find(|(_, same)| !same) {
        return Err(ImportError::unusable(path, format!("another {rule}"), "that of vLLM's default"));
    }
    let Some(num_blocks) = num_blocks.or(cache.num_gpu_blocks).filter(|&blocks| blocks > 1) else {
        return Err(ImportError::unusable(path, "no kv_cache.num_gpu_blocks", "the number of KV blocks, at least 2"));
    };
    Ok(Settings {
        batching: Batching::Sequence,
        exit: ExitPolicy::None,
        kv_fill: KvFill::Reuse,
        num_loops: 1,
        max_batch: engine.max_num_seqs,
        token_budget: engine.max_num_batched_tokens,
        prefill_chunk: engine.max_num_batched_tokens,
        block_tokens: cache.block_size.unwrap_or(16),
        // One block is a placeholder that nobody holds.
        num_blocks: num_blocks - 1,
        prefix_caching: cache.enable_prefix_caching.unwrap_or(true),
        async_scheduling: config.async_scheduling,
    })
}

/// Puts arrivals, which are of the wall clock, on the clock of the other times. The clocks' distance is the least
/// that lets no request be queued before it arrives: the engine was idle for at least one of them.
fn on_one_clock(lines: &[RequestLine]) -> Vec<RequestTimes> {
    let distance = lines.iter().map(|line| line.queued_ts - line.arrival_time).fold(f64::INFINITY, f64::min);
    let times = |line: &RequestLine| RequestTimes {
        arrival_s: line.arrival_time + distance,
        queued_s: line.queued_ts,
        first_token_s: line.first_token_ts,
        last_token_s: line.last_token_ts,
        output_tokens: line.output_toks,
    };
    lines.iter().map(times).collect()
}

/// What a comparison looks at, in milliseconds; the last is the makespan, in seconds. Latencies count from the arrival,
/// but for the TTFT that counts from queueing, as evaluations of vLLM's own records do.
const METRICS: [&str; 17] = [
    "TTFT mean",
    "TTFT p50",
    "TTFT p90",
    "TTFT p95",
    "TTFT p99",
    "TTFT queued",
    "TPOT mean",
    "TPOT p50",
    "TPOT p90",
    "TPOT p95",
    "TPOT p99",
    "latency mean",
    "latency p50",
    "latency p90",
    "latency p95",
    "latency p99",
    "makespan s",
];

/// Measured and simulated latencies side by side.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// By metric: name, measured, simulated.
    pub rows: Vec<(&'static str, f64, f64)>,
}

/// One line of a comparison as a file has it; times in milliseconds, the makespan in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ComparisonLine {
    metric: &'static str,
    measured: f64,
    simulated: f64,
}

impl Comparison {
    /// Compares two runs of the same requests.
    pub fn new(measured: &[RequestTimes], simulated: &[RequestTimes]) -> Self {
        let rows = METRICS.into_iter().zip(metrics(measured)).zip(metrics(simulated));
        Self { rows: rows.map(|((name, measured), simulated)| (name, measured, simulated)).collect() }
    }

    /// The lines of a CSV file.
    pub fn lines(&self) -> impl Iterator<Item = ComparisonLine> {
        self.rows.iter().map(|&(metric, measured, simulated)| ComparisonLine { metric, measured, simulated })
    }

    /// Simulated over measured less 1, of a metric by its name.
    pub fn error(&self, metric: &str) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.0 == metric)?;
        Some(row.2 / row.1 - 1.0)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<14}{:>14}{:>14}{:>10}", "metric", "measured", "simulated", "error")?;
        for &(name, measured, simulated) in &self.rows {
            let error = 100.0 * (simulated / measured - 1.0);
            write!(f, "\n{name:<14}{measured:>14.1}{simulated:>14.1}{error:>+9.2}%")?;
        }
        Ok(())
    }
}

fn metrics(requests: &[RequestTimes]) -> Vec<f64> {
    let of = |value: &dyn Fn(&RequestTimes) -> Option<f64>| {
        let mut values: Vec<f64> = requests.iter().filter_map(value).map(|seconds| 1e3 * seconds).collect();
        values.sort_by(f64::total_cmp);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        [mean, percentile(&values, 0.5), percentile(&values, 0.9), percentile(&values, 0.95), percentile(&values, 0.99)]
    };
    let ttft = of(&|request| Some(request.first_token_s - request.arrival_s));
    let queued = of(&|request| Some(request.first_token_s - request.queued_s));
    let tpot = of(&|request| {
        let gaps = request.output_tokens.checked_sub(1).filter(|&gaps| gaps > 0)?;
        Some((request.last_token_s - request.first_token_s) / f64::from(gaps))
    });
    let latency = of(&|request| Some(request.last_token_s - request.arrival_s));
    let first = requests.iter().map(|request| request.arrival_s).fold(f64::INFINITY, f64::min);
    let last = requests.iter().map(|request| request.last_token_s).fold(f64::NEG_INFINITY, f64::max);
    [&ttft[..], &queued[..1], &tpot, &latency, &[last - first]].concat()
}

/// Linear between the two nearest ranks; NaN of nothing.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = r#"{"engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
        "kv_cache": {"num_gpu_blocks": 101, "block_size": 16, "enable_prefix_caching": true},
        "resolved_config": {"scheduler_config": {"async_scheduling": true, "policy": "fcfs"}}}"#;
    const REQUESTS: &str = r#"{"output_toks": 3, "arrival_time": 1000.5, "queued_ts": 7.6, "first_token_ts": 8.0, "last_token_ts": 8.4}
{"output_toks": 1, "arrival_time": 1001.0, "queued_ts": 8.0, "first_token_ts": 9.0, "last_token_ts": 9.0}
"#;

    fn read(meta: &str, requests: &str, num_blocks: Option<u32>) -> Result<MeasuredRun, ImportError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("meta.json"), meta).unwrap();
        std::fs::write(folder.path().join("requests.jsonl"), requests).unwrap();
        MeasuredRun::read(folder.path(), num_blocks)
    }

    #[test]
    fn a_run_reads_with_its_settings_and_on_one_clock() {
        let run = read(META, REQUESTS, None).unwrap();
        assert_eq!((run.settings.num_blocks, run.settings.token_budget), (100, 64));
        assert!(run.settings.prefix_caching && run.settings.async_scheduling);
        let arrivals: Vec<f64> = run.requests.iter().map(|request| request.arrival_s).collect();
        assert!((arrivals[0] - 7.5).abs() < 1e-9 && (arrivals[1] - 8.0).abs() < 1e-9);
    }

    #[test]
    fn a_run_under_other_rules_is_refused() {
        let error = |from: &str, to: &str| read(&META.replace(from, to), REQUESTS, None).unwrap_err().to_string();
        assert!(error("fcfs", "priority").contains("another policy"));
        assert!(error("\"num_gpu_blocks\": 101, ", "").contains("no kv_cache.num_gpu_blocks"));
        assert!(error("\"max_num_seqs\": 8, ", "").contains("missing field `max_num_seqs`"));
        let named = read(&META.replace("\"num_gpu_blocks\": 101, ", ""), REQUESTS, Some(51)).unwrap();
        assert_eq!(named.settings.num_blocks, 50);
        assert!(read(META, "{", None).unwrap_err().to_string().contains("line 1"));
        assert!(read(META, "", None).unwrap_err().to_string().contains("no request"));
    }

    #[test]
    fn errors_are_relative_to_what_was_measured() {
        let run = read(META, REQUESTS, None).unwrap();
        let same = Comparison::new(&run.requests, &run.requests);
        assert!(METRICS.iter().all(|metric| same.error(metric) == Some(0.0)));
        let (_, ttft, _) = same.rows[0];
        assert!((ttft - 750.0).abs() < 1e-6);
        let slower: Vec<RequestTimes> =
            run.requests.iter().map(|r| RequestTimes { last_token_s: r.last_token_s + 0.2, ..*r }).collect();
        let comparison = Comparison::new(&run.requests, &slower);
        assert!((comparison.error("TPOT mean").unwrap() - 0.5).abs() < 1e-9, "{comparison}");
        assert!((comparison.error("makespan s").unwrap() - 0.2 / 1.5).abs() < 1e-9);
        assert_eq!(comparison.error("TTFT mean"), Some(0.0));
    }

    #[test]
    fn percentiles_lie_between_ranks() {
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.75), 3.0);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
