//! What the server counts, for Prometheus. Names are vLLM's where vLLM has the same, so that its dashboards work.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::prometheus_text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use scheduler::{PassRecord, PrefixUse, Scheduler, Token};
use traces::{Nanos, Request};

use crate::worker::Finish;

/// Label and value.
type Label = [(&'static str, String); 1];

/// When a request arrived, and what it got since.
#[derive(Debug)]
struct Times {
    arrival: Nanos,
    tokens: u32,
    admitted: bool,
}

/// The counters of a server.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    running: Gauge<i64, AtomicI64>,
    waiting: Gauge<i64, AtomicI64>,
    cache_usage: Gauge<f64, AtomicU64>,
    preemptions: Counter,
    prompt_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    generation_tokens: Counter,
    finished: Family<Label, Counter>,
    ttft: Histogram,
    inter_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prompt_lengths: Histogram,
    output_lengths: Histogram,
    pass_rows: Histogram,
    passes: Counter,
    pass_seconds: Counter<f64, AtomicU64>,
    /// By depth.
    rows: Vec<Counter>,
    exits: Vec<Counter>,
    /// By request that has arrived and not ended.
    times: Mutex<HashMap<u32, Times>>,
}

impl Metrics {
    /// Counters at zero, of a model with `num_loops` loops.
    pub fn new(model: &str, num_loops: u8) -> Self {
        let mut registry = Registry::with_labels([("model_name".into(), model.to_owned().into())].into_iter());
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let lengths = || Histogram::new(exponential_buckets(1.0, 2.0, 18));
        let by_depth: [Family<Label, Counter>; 2] = Default::default();
        let [rows, exits] = by_depth.each_ref().map(|family| {
            (0..num_loops).map(|depth| family.get_or_create_owned(&[("depth", depth.to_string())])).collect()
        });
        let mut metrics = Self {
            registry: Registry::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            cache_usage: Gauge::default(),
            preemptions: Counter::default(),
            prompt_tokens: Counter::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            generation_tokens: Counter::default(),
            finished: Family::default(),
            ttft: seconds(),
            inter_token: seconds(),
            e2e: seconds(),
            queue: seconds(),
            prompt_lengths: lengths(),
            output_lengths: lengths(),
            pass_rows: lengths(),
            passes: Counter::default(),
            pass_seconds: Counter::default(),
            rows,
            exits,
            times: Mutex::default(),
        };
        macro_rules! register {
            ($($name:literal, $help:literal, $metric:expr;)*) => { $(registry.register($name, $help, $metric.clone());)* };
        }
        let [rows, exits] = by_depth;
        register! {
            "vllm:num_requests_running", "Requests that hold a slot", metrics.running;
            "vllm:num_requests_waiting", "Requests that wait for a slot", metrics.waiting;
            "vllm:kv_cache_usage_perc", "Share of the KV blocks that are held, 0 to 1", metrics.cache_usage;
            "vllm:num_preemptions", "Requests that lost their slot to others", metrics.preemptions;
            "vllm:prompt_tokens", "Tokens of the prompts that arrived", metrics.prompt_tokens;
            "vllm:prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache", metrics.prefix_queries;
            "vllm:prefix_cache_hits", "Tokens of prompts that were found in the prefix cache", metrics.prefix_hits;
            "vllm:generation_tokens", "Tokens that were generated", metrics.generation_tokens;
            "vllm:request_success", "Requests that ended, by reason", metrics.finished;
            "vllm:time_to_first_token_seconds", "From arrival to the first token", metrics.ttft;
            "vllm:inter_token_latency_seconds", "From one token of a request to the next", metrics.inter_token;
            "vllm:e2e_request_latency_seconds", "From arrival to the end", metrics.e2e;
            "vllm:request_queue_time_seconds", "From arrival to the first slot", metrics.queue;
            "vllm:request_prompt_tokens", "Tokens of a prompt", metrics.prompt_lengths;
            "vllm:request_generation_tokens", "Tokens generated for a request", metrics.output_lengths;
            "vllm:iteration_tokens_total", "Rows of a pass", metrics.pass_rows;
            "depthwise:passes", "Passes of the block", metrics.passes;
            "depthwise:pass_seconds", "Time in passes", metrics.pass_seconds;
            "depthwise:rows", "Rows that passes ran, by depth", rows;
            "depthwise:exits", "Tokens that exited, by depth", exits;
        }
        metrics.registry = registry;
        metrics
    }

    /// All counters in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a string takes what is written");
        text
    }

    /// Tokens a second of the passes so far; 0 before the first.
    pub fn tokens_per_s(&self) -> f64 {
        self.generation_tokens.get() as f64 / self.pass_seconds.get().max(1e-9)
    }

    pub fn arrived(&self, request: &Request) {
        self.prompt_tokens.inc_by(request.prompt_tokens.into());
        self.prompt_lengths.observe(request.prompt_tokens.into());
        let times = Times { arrival: request.arrival, tokens: 0, admitted: false };
        self.with_times(|all| all.insert(request.id, times));
    }

    /// Counts what the prefix cache has of a prompt. Returns `false` if the request gets a slot for another time, after a
    /// preemption: what it finds of itself is not counted.
    pub fn looked_up(&self, request: &Request, PrefixUse { looked_up, found }: PrefixUse) -> bool {
        let is_first = self.with_times(|all| all.get(&request.id).is_some_and(|times| !times.admitted));
        if is_first {
            self.prefix_queries.inc_by(looked_up.into());
            self.prefix_hits.inc_by(found.into());
        }
        is_first
    }

    pub fn admitted(&self, now: Nanos, request: &Request) {
        let waited = |times: &mut Times| (!std::mem::replace(&mut times.admitted, true)).then_some(now - times.arrival);
        if let Some(waited) = self.with_times(|all| all.get_mut(&request.id).and_then(waited)) {
            self.queue.observe(waited.as_secs_f64());
        }
    }

    pub fn preempted(&self) {
        self.preemptions.inc();
    }

    pub fn pass(&self, record: &PassRecord<'_>) {
        self.passes.inc();
        self.pass_seconds.inc_by(record.elapsed.as_secs_f64());
        self.pass_rows.observe(record.pass.work.rows.into());
        for segment in record.pass.segments {
            self.rows[usize::from(segment.depth)].inc_by(segment.tokens.into());
        }
    }

    pub fn token(&self, now: Nanos, request: &Request, token: Token) {
        self.generation_tokens.inc();
        self.exits[usize::from(token.depth)].inc();
        match token.previous {
            None => self.ttft.observe((now - request.arrival).as_secs_f64()),
            Some(previous) => self.inter_token.observe((now - previous).as_secs_f64()),
        }
        self.with_times(|all| {
            if let Some(times) = all.get_mut(&request.id) {
                times.tokens += 1;
            }
        });
    }

    pub fn ended(&self, finish: Finish, now: Nanos, request: u32) {
        self.finished.get_or_create(&[("finished_reason", finish.name().to_owned())]).inc();
        if let Some(times) = self.with_times(|all| all.remove(&request)) {
            self.e2e.observe((now - times.arrival).as_secs_f64());
            self.output_lengths.observe(times.tokens.into());
        }
    }

    /// What runs and waits after a pass.
    pub fn occupancy(&self, scheduler: &Scheduler) {
        self.running.set(scheduler.num_running().into());
        self.waiting.set(scheduler.num_waiting().into());
        let tables = scheduler.pass().tables;
        self.cache_usage.set(1.0 - f64::from(tables.num_free()) / f64::from(tables.num_blocks()));
    }

    fn with_times<R>(&self, work: impl FnOnce(&mut HashMap<u32, Times>) -> R) -> R {
        work(&mut self.times.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
