//! A measured run of vLLM: its settings and requests, as recorded by the benchmark of LLMServingSim.
//!
//! `meta.json` contains the settings. The values that vLLM resolved (`resolved_config`, `kv_cache`) take precedence
//! over the requested ones (`engine_kwargs`); older runs have only the latter. `requests.jsonl` contains a line for
//! each request. Keys may be in any order, and other keys are ignored.
//!
//! | setting | key, the first that is there | otherwise |
//! | --- | --- | --- |
//! | `max_batch` | `max_num_seqs` | an error |
//! | `token_budget` | `max_num_batched_tokens`, at most `max_num_scheduled_tokens` | an error |
//! | `num_blocks` | `num_gpu_blocks`, or `num_kv_tokens` in blocks; one of them is a placeholder | given, or 0 |
//! | `block_tokens` | `block_size` | 16 |
//! | `prefix_caching` | `enable_prefix_caching` | on |
//! | `async_scheduling` | `async_scheduling` | on from vLLM 0.14 |
//!
//! Rules that `docs/explanation/scheduling.md` does not describe are rejected, with their key.

use std::path::{Path, PathBuf};

use scheduler::{Batching, ExitPolicy, Settings};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use traces::input::json_message;
use traces::{Nanos, PrefixHashes, Request, RequestTrace};

use crate::comparison::RequestTimes;
use crate::error::{ImportError, read_text};

/// A run as recorded in its folder.
#[derive(Clone, Debug)]
pub struct MeasuredRun {
    /// Settings of vLLM; `num_blocks` is 0 if the number of KV blocks is unknown.
    pub settings: Settings,
    /// Bytes of the device's memory, if recorded.
    pub device_bytes: Option<u64>,
    /// Share of the memory that vLLM used, if recorded.
    pub memory_utilization: Option<f64>,
    /// Measured times of each request, in the order in which they were sent.
    pub requests: Vec<RequestTimes>,
    /// Prompt tokens of each request, if recorded.
    prompt_tokens: Vec<Option<u32>>,
    /// Assumptions for values that were not recorded, as sentences.
    pub assumptions: Vec<String>,
    /// `requests.jsonl`.
    path: PathBuf,
}

#[derive(Deserialize)]
struct RequestLine {
    /// Identifier, which ends in the index of the request in the workload.
    request_id: Option<String>,
    input_toks: Option<u32>,
    output_toks: u32,
    /// On the wall clock, in seconds.
    arrival_time: f64,
    /// This and the following times are on a monotonic clock, in seconds.
    queued_ts: f64,
    first_token_ts: f64,
    last_token_ts: f64,
}

impl MeasuredRun {
    /// Reads a run's folder. `num_blocks` is the number of KV blocks if `meta.json` does not contain it.
    ///
    /// # Errors
    /// If a file cannot be read, a request was not served, or vLLM ran with rules that `docs/explanation/scheduling.md`
    /// does not describe.
    pub fn read(folder: impl AsRef<Path>, num_blocks: Option<u32>) -> Result<Self, ImportError> {
        let folder = folder.as_ref();
        let meta = Meta::read(folder.join("meta.json"))?;
        meta.check_rules()?;
        let mut assumptions = Vec::new();
        let settings = meta.settings(num_blocks, &mut assumptions)?;
        if let Some(devices) = meta.get::<u32>(&[PARALLEL, ASKED], "tensor_parallel_size")?.filter(|&size| size > 1) {
            assumptions.push(format!("a profile of {devices} devices that share each layer"));
        }
        let path = folder.join("requests.jsonl");
        let lines = read_requests(&path)?;
        let prompt_tokens = lines.iter().map(|line| line.input_toks).collect();
        let device_bytes = meta.get(&["hardware"], "device_total_memory_bytes")?;
        let memory_utilization = meta.get(&["kv_cache", CACHE, ASKED], "gpu_memory_utilization")?;
        let requests = on_one_clock(&lines);
        Ok(Self { settings, device_bytes, memory_utilization, requests, prompt_tokens, assumptions, path })
    }

    /// The requests as they were served: those of the workload, with the measured arrivals and output lengths. A
    /// workload without token ids gets prompts without common prefixes.
    ///
    /// # Errors
    /// If the workload and the run have different requests.
    pub fn as_served(&self, workload: &RequestTrace) -> Result<RequestTrace, ImportError> {
        let (sent, served) = (workload.requests.len(), self.requests.len());
        if sent != served {
            let expected = format!("the {sent} of the workload");
            return Err(ImportError::unusable(&self.path, format!("{served} requests"), expected));
        }
        let first = self.requests.iter().map(|times| times.arrival_s).fold(f64::INFINITY, f64::min);
        let mut requests = Vec::with_capacity(sent);
        for ((request, times), prompt_tokens) in workload.requests.iter().zip(&self.requests).zip(&self.prompt_tokens) {
            if let Some(found) = prompt_tokens.filter(|&tokens| tokens != request.prompt_tokens) {
                let found = format!("{found} prompt tokens in request {}", request.id);
                let expected = format!("the {} of the workload", request.prompt_tokens);
                return Err(ImportError::unusable(&self.path, found, expected));
            }
            let arrival = Nanos::from_secs_f64(times.arrival_s - first);
            requests.push(Request { arrival, output_tokens: times.output_tokens, ..*request });
        }
        requests.sort_by_key(|request| request.arrival);
        let block_tokens = self.settings.block_tokens;
        let mut hashes = PrefixHashes::new(block_tokens);
        let mut others = 0..;
        for request in &requests {
            match &workload.prefix_hashes {
                Some(known) => hashes.push(known.of(request.id).iter().copied()),
                None => hashes.push(others.by_ref().take((request.prompt_tokens / block_tokens) as usize)),
            }
        }
        for (id, request) in (0..).zip(&mut requests) {
            request.id = id;
        }
        Ok(RequestTrace { requests, prefix_hashes: Some(hashes), ..workload.clone() })
    }
}

/// `meta.json`.
struct Meta {
    path: PathBuf,
    root: Value,
}

/// The most sequences, rows of a pass and tokens of a block.
const MOST_ROWS: u32 = 1 << 20;
/// The most KV blocks.
const MOST_BLOCKS: u32 = 1 << 24;

const SCHEDULER: &str = "resolved_config.scheduler_config";
const CACHE: &str = "resolved_config.cache_config";
const PARALLEL: &str = "resolved_config.parallel_config";
const ASKED: &str = "engine_kwargs";

impl Meta {
    fn read(path: PathBuf) -> Result<Self, ImportError> {
        let root = serde_json::from_str(&read_text(&path)?).map_err(|error| ImportError::malformed(&path, error))?;
        Ok(Self { path, root })
    }

    /// The value of `key` in the first of these objects that has it; null counts as missing.
    fn get<T: DeserializeOwned>(&self, objects: &[&str], key: &str) -> Result<Option<T>, ImportError> {
        let within = |object: &&str| {
            let object = object.split('.').try_fold(&self.root, |value, key| value.get(key))?;
            object.get(key).filter(|value| !value.is_null())
        };
        let Some(value) = objects.iter().find_map(within) else { return Ok(None) };
        let wrong = |error| ImportError::malformed(&self.path, format!("{key}: {}", json_message(&error)));
        T::deserialize(value).map(Some).map_err(wrong)
    }

    fn need(&self, objects: &[&str], key: &str) -> Result<u32, ImportError> {
        match self.size(objects, key, MOST_ROWS)? {
            Some(0) => Err(ImportError::unusable(&self.path, format!("{key} 0"), "at least 1")),
            Some(number) => Ok(number),
            None => Err(ImportError::unusable(&self.path, format!("no {key} in {}", objects.join(" or ")), "it")),
        }
    }

    /// As [`Self::get`], of a number that memory is taken for, at most `most`.
    fn size(&self, objects: &[&str], key: &str, most: u32) -> Result<Option<u32>, ImportError> {
        // A number that is negative or has a fraction stays one that is found.
        let Some(found) = self.get::<Value>(objects, key)? else { return Ok(None) };
        let Some(size) = found.as_u64() else { return self.get(objects, key) };
        match u32::try_from(size).ok().filter(|&size| size <= most) {
            Some(size) => Ok(Some(size)),
            None => Err(ImportError::unusable(&self.path, format!("{key} {size}"), format!("at most {most}"))),
        }
    }

    /// Checks that vLLM ran by rules that the scheduler implements.
    fn check_rules(&self) -> Result<(), ImportError> {
        for key in ["data_parallel_size", "pipeline_parallel_size"] {
            if let Some(size) = self.get::<u32>(&[PARALLEL, ASKED], key)?.filter(|&size| size > 1) {
                return Err(ImportError::unusable(&self.path, format!("{key} {size}"), "1: a run of one replica"));
            }
        }
        let rules = [
            (&[SCHEDULER, ASKED][..], "enable_chunked_prefill", json!(true)),
            (&[SCHEDULER], "policy", json!("fcfs")),
            (&[ASKED], "scheduling_policy", json!("fcfs")),
            (&[SCHEDULER, ASKED], "long_prefill_token_threshold", json!(0)),
            (&[SCHEDULER, ASKED], "max_num_partial_prefills", json!(1)),
            (&[SCHEDULER, ASKED], "scheduler_reserve_full_isl", json!(true)),
            (&[SCHEDULER, ASKED], "prefill_schedule_interval", json!(1)),
            (&[SCHEDULER, ASKED], "watermark", json!(0)),
            (&["resolved_config", ASKED], "speculative_config", json!(null)),
            (&["resolved_config", ASKED], "lora_config", json!(null)),
            (&["resolved_config", ASKED], "kv_transfer_config", json!(null)),
        ];
        for (objects, key, rule) in rules {
            let Some(found) = self.get::<Value>(objects, key)? else { continue };
            let same = found == rule || found.as_f64().is_some_and(|number| Some(number) == rule.as_f64());
            if !same {
                let found = format!("{key} {}", found.to_string().chars().take(40).collect::<String>());
                return Err(ImportError::unusable(
                    &self.path,
                    found,
                    format!("{rule}: the scheduler has no other rule"),
                ));
            }
        }
        Ok(())
    }

    fn settings(&self, num_blocks: Option<u32>, assumptions: &mut Vec<String>) -> Result<Settings, ImportError> {
        let cache = ["kv_cache", CACHE, ASKED];
        let block_tokens = self.size(&cache, "block_size", MOST_ROWS)?.filter(|&size| size > 0).unwrap_or_else(|| {
            assumptions.push("blocks of 16 tokens".to_owned());
            16
        });
        let budget = self.need(&[SCHEDULER, ASKED], "max_num_batched_tokens")?;
        let scheduled = self.size(&[SCHEDULER, ASKED], "max_num_scheduled_tokens", MOST_ROWS)?.filter(|&rows| rows > 0);
        let token_budget = scheduled.unwrap_or(budget).min(budget);
        Ok(Settings {
            max_batch: self.need(&[SCHEDULER, ASKED], "max_num_seqs")?,
            token_budget,
            prefill_chunk: token_budget,
            block_tokens,
            num_blocks: self.num_blocks(num_blocks, block_tokens)?,
            prefix_caching: self.get(&cache, "enable_prefix_caching")?.unwrap_or_else(|| {
                assumptions.push("prefix caching, vLLM's default".to_owned());
                true
            }),
            async_scheduling: match self.get(&[SCHEDULER, ASKED], "async_scheduling")? {
                Some(on) => on,
                None => self.async_by_default(assumptions)?,
            },
            ..Settings::new(Batching::Sequence, ExitPolicy::None, 1)
        })
    }

    /// Number of blocks that requests can hold: vLLM reserves one block as a placeholder.
    fn num_blocks(&self, given: Option<u32>, block_tokens: u32) -> Result<u32, ImportError> {
        let tokens: Option<u32> = self.get(&["kv_cache"], "num_kv_tokens")?;
        let known = self.get(&["kv_cache", CACHE], "num_gpu_blocks")?.or(tokens.map(|tokens| tokens / block_tokens));
        match given.or(known) {
            Some(blocks) if blocks > MOST_BLOCKS => {
                let expected = format!("at most {MOST_BLOCKS}; `--num-blocks` gives another");
                Err(ImportError::unusable(&self.path, format!("{blocks} KV blocks"), expected))
            }
            Some(blocks @ ..2) => {
                let expected = "at least 2: one is a placeholder; `--num-blocks` gives another";
                Err(ImportError::unusable(&self.path, format!("{blocks} KV blocks"), expected))
            }
            Some(blocks) => Ok(blocks - 1),
            None => Ok(0),
        }
    }

    /// Whether asynchronous scheduling is on by default, as from vLLM 0.14.
    fn async_by_default(&self, assumptions: &mut Vec<String>) -> Result<bool, ImportError> {
        let version = match self.root.get("vllm_version").and_then(Value::as_str) {
            Some(version) => version,
            None => return Err(ImportError::unusable(&self.path, "neither async_scheduling nor vllm_version", "one")),
        };
        let mut parts = version.trim_start_matches('v').split('.').map(|part| part.parse::<u32>().ok());
        let (Some(Some(major)), Some(Some(minor))) = (parts.next(), parts.next()) else {
            return Err(ImportError::unusable(&self.path, format!("vllm_version {version}"), "a version like 0.19.0"));
        };
        let on = (major, minor) >= (0, 14);
        assumptions
            .push(format!("asynchronous scheduling {}, the default of vLLM {version}", if on { "on" } else { "off" }));
        Ok(on)
    }
}

/// The lines in the order of the workload: by the number at the end of each identifier, or else in file order.
fn read_requests(path: &Path) -> Result<Vec<RequestLine>, ImportError> {
    let text = read_text(path)?;
    let mut lines = Vec::new();
    for (line, number) in text.lines().zip(1..).filter(|(line, _): &(&str, usize)| !line.trim().is_empty()) {
        let wrong = |error: String| ImportError::malformed(path, format!("line {number}: {error}"));
        let line: RequestLine = serde_json::from_str(line).map_err(|error| wrong(json_message(&error)))?;
        if !(line.queued_ts <= line.first_token_ts && line.first_token_ts <= line.last_token_ts) {
            let times = (line.queued_ts, line.first_token_ts, line.last_token_ts);
            return Err(wrong(format!(
                "queued_ts, first_token_ts and last_token_ts {times:?} do not follow each other"
            )));
        }
        if line.output_toks == 0 {
            return Err(wrong("found output_toks 0, expected at least 1".to_owned()));
        }
        lines.push(line);
    }
    if lines.is_empty() {
        return Err(ImportError::unusable(path, "no request", "a line for each"));
    }
    let place = |line: &RequestLine| -> Option<u64> {
        let id = line.request_id.as_deref()?;
        id[id.trim_end_matches(|digit: char| digit.is_ascii_digit()).len()..].parse().ok()
    };
    if lines.iter().all(|line| place(line).is_some()) {
        lines.sort_by_key(place);
    }
    Ok(lines)
}

/// Converts arrivals, which are on the wall clock, to the clock of the other times. The offset is the smallest for
/// which no request is queued before it arrives: the engine was idle for at least one of them.
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

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = r#"{"vllm_version": "0.19.0", "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
        "kv_cache": {"num_gpu_blocks": 101, "block_size": 16, "enable_prefix_caching": true},
        "resolved_config": {"scheduler_config": {"async_scheduling": true, "policy": "fcfs", "watermark": 0.0}}}"#;
    const REQUESTS: &str = r#"{"request_id": "r-1", "output_toks": 1, "arrival_time": 1001.0, "queued_ts": 8.0, "first_token_ts": 9.0, "last_token_ts": 9.0}
{"last_token_ts": 8.4, "queued_ts": 7.6, "first_token_ts": 8.0, "output_toks": 3, "arrival_time": 1000.5, "request_id": "r-0", "input_toks": 20, "client": {"name": "x"}}
"#;

    fn read(meta: &str, requests: &str, num_blocks: Option<u32>) -> Result<MeasuredRun, ImportError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("meta.json"), meta).unwrap();
        std::fs::write(folder.path().join("requests.jsonl"), requests).unwrap();
        MeasuredRun::read(folder.path(), num_blocks)
    }

    fn settings(meta: &str) -> Settings {
        read(meta, REQUESTS, None).unwrap().settings
    }

    #[test]
    fn a_run_reads_with_its_settings_and_on_one_clock_in_the_order_sent() {
        let run = read(META, REQUESTS, None).unwrap();
        assert_eq!((run.settings.num_blocks, run.settings.token_budget), (100, 64));
        assert!(run.settings.prefix_caching && run.settings.async_scheduling);
        assert!(run.assumptions.is_empty(), "{:?}", run.assumptions);
        let arrivals: Vec<f64> = run.requests.iter().map(|request| request.arrival_s).collect();
        assert!((arrivals[0] - 7.5).abs() < 1e-9 && (arrivals[1] - 8.0).abs() < 1e-9);
    }

    #[test]
    fn what_vllm_resolved_counts_before_what_was_asked_for() {
        let resolved = META.replace("\"policy\"", "\"max_num_seqs\": 4, \"max_num_scheduled_tokens\": 48, \"policy\"");
        assert_eq!((settings(&resolved).max_batch, settings(&resolved).token_budget), (4, 48));
        let off = settings(&META.replace("\"enable_prefix_caching\": true", "\"enable_prefix_caching\": false"));
        assert!(!off.prefix_caching);
        assert_eq!(settings(&META.replace("\"block_size\": 16", "\"block_size\": 32")).block_tokens, 32);
        let tokens = META.replace("\"num_gpu_blocks\": 101", "\"num_gpu_blocks\": null, \"num_kv_tokens\": 800");
        assert_eq!(settings(&tokens).num_blocks, 49);
    }

    #[test]
    fn a_run_that_says_little_takes_the_defaults_of_its_version_and_says_so() {
        let meta = |version: &str| {
            format!(
                r#"{{"vllm_version": "{version}", "engine_kwargs": {{"max_num_seqs": 8, "max_num_batched_tokens": 64}}}}"#
            )
        };
        let run = |version| read(&meta(version), REQUESTS, Some(51));
        let newer = run("0.28.0rc1").unwrap();
        assert!(newer.settings.async_scheduling && newer.settings.prefix_caching);
        assert_eq!((newer.settings.block_tokens, newer.settings.num_blocks, newer.assumptions.len()), (16, 50, 3));
        assert!(!run("0.11.2").unwrap().settings.async_scheduling);
        assert!(run("main").unwrap_err().to_string().contains("vllm_version main"));
        assert_eq!(read(&meta("0.19.0"), REQUESTS, None).unwrap().settings.num_blocks, 0);
        assert!(read(&meta("0.19.0"), REQUESTS, Some(1)).unwrap_err().to_string().contains("found 1 KV blocks"));
    }

    #[test]
    fn a_run_under_other_rules_is_refused_by_the_key() {
        let error = |from: &str, to: &str| read(&META.replace(from, to), REQUESTS, None).unwrap_err().to_string();
        assert!(error("fcfs", "priority").contains("found policy \"priority\", expected \"fcfs\""));
        assert!(error("0.0", "0.1").contains("watermark 0.1"));
        assert!(
            error("\"policy\"", "\"enable_chunked_prefill\": false, \"policy\"")
                .contains("enable_chunked_prefill false")
        );
        assert!(
            error("{\"max_num_seqs\"", "{\"data_parallel_size\": 2, \"max_num_seqs\"").contains("data_parallel_size 2")
        );
        assert!(
            error("\"resolved_config\": {", "\"resolved_config\": {\"speculative_config\": {\"n\": 3}, ")
                .contains("speculative_config")
        );
        assert!(error("\"max_num_seqs\": 8, ", "").contains("no max_num_seqs in"));
        for (from, to, expected) in [
            ("\"max_num_seqs\": 8", "\"max_num_seqs\": 0", "found max_num_seqs 0, expected at least 1"),
            (
                "\"max_num_seqs\": 8",
                "\"max_num_seqs\": 4294967296",
                "max_num_seqs 4294967296, expected at most 1048576",
            ),
            (
                "batched_tokens\": 64",
                "batched_tokens\": 4294967295",
                "max_num_batched_tokens 4294967295, expected at most",
            ),
            ("\"block_size\": 16", "\"block_size\": 2097152", "block_size 2097152, expected at most 1048576"),
            (
                "num_gpu_blocks\": 101",
                "num_gpu_blocks\": 4294967295",
                "found 4294967295 KV blocks, expected at most 16777216",
            ),
        ] {
            assert!(error(from, to).contains(expected), "{}", error(from, to));
        }
        assert!(error("\"max_num_seqs\": 8", "\"max_num_seqs\": \"8\"").contains("max_num_seqs: invalid type"));
    }

    #[test]
    fn requests_that_were_not_served_are_refused_by_their_line() {
        let error = |from: &str, to: &str| read(META, &REQUESTS.replace(from, to), None).unwrap_err().to_string();
        assert!(error("\"first_token_ts\": 9.0", "\"first_token_ts\": null").contains("line 1"));
        assert!(
            error("\"first_token_ts\": 8.0", "\"first_token_ts\": 0.0").contains("line 2: queued_ts, first_token_ts")
        );
        assert!(error("\"output_toks\": 3", "\"output_toks\": 0").contains("line 2: found output_toks 0"));
        assert!(read(META, "{", None).unwrap_err().to_string().contains("line 1"));
        assert!(read(META, "", None).unwrap_err().to_string().contains("no request"));
    }

    #[test]
    fn requests_are_simulated_as_they_were_served() {
        let run = read(META, REQUESTS, None).unwrap();
        let request = |id, prompt_tokens| Request { id, arrival: Nanos(5), prompt_tokens, output_tokens: 9 };
        let mut workload = RequestTrace::new("w", vec![request(0, 20), request(1, 40)]);
        let served = run.as_served(&workload).unwrap();
        let of = |request: &Request| (request.arrival, request.prompt_tokens, request.output_tokens);
        assert_eq!(
            served.requests.iter().map(of).collect::<Vec<_>>(),
            [(Nanos(0), 20, 3), (Nanos(500_000_000), 40, 1)]
        );
        let hashes = served.prefix_hashes.unwrap();
        assert_eq!((hashes.of(0).len(), hashes.of(1).len()), (1, 2));
        assert!(!hashes.of(1).contains(&hashes.of(0)[0]), "no two begin alike");
        workload.requests[0].prompt_tokens = 21;
        let error = run.as_served(&workload).unwrap_err().to_string();
        assert!(error.contains("20 prompt tokens in request 0, expected the 21"), "{error}");
        workload.requests.pop();
        assert!(run.as_served(&workload).unwrap_err().to_string().contains("2 requests, expected the 1"));
    }
}
