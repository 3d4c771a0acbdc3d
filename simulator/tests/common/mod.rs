//! Small profiles, exit traces and request streams with known answers.
#![allow(dead_code, reason = "each test file uses its own part")]

use latency::LatencyModel;
use scheduler::{Batching, ExitPolicy, Observer, Settings, Token};
use simulator::{Draw, ExitModel};
use traces::{
    Component, ExitTrace, ExitTraceMeta, LatencyProfile, Nanos, Point, ProfileMeta, Request, SignalSet, Signals,
};

/// Time of every pass of [`constant_latency`].
pub const PASS: Nanos = Nanos(1_000_000);

pub fn profile(num_loops: u32, points: &[(Component, u32, u32, u32, f64)]) -> LatencyProfile {
    LatencyProfile {
        meta: ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: "test".into(),
            fingerprint: LatencyProfile::ANY_MODEL.into(),
            num_loops,
            device: "none".into(),
            software: "none".into(),
            source: "made up".into(),
            overhead_us: 0.0,
            weight_bytes: 0,
            kv_bytes_per_token: 0,
            memory: None,
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        },
        points: points
            .iter()
            .map(|&(component, rows, kv_tokens, depths, time_us)| Point {
                component,
                rows,
                kv_tokens,
                depths,
                time_us,
                spread_us: 0.0,
                repeats: 1,
            })
            .collect(),
        mixed_attention: None,
    }
}

/// A model in which every pass takes [`PASS`], whatever its rows.
pub fn constant_latency(num_loops: u32) -> LatencyModel {
    let time_us = PASS.as_micros_f64();
    let points = [1, 1 << 20].map(|rows| (Component::Block, rows, 0, 1, time_us));
    LatencyModel::new(&profile(num_loops, &points)).unwrap()
}

/// A profile in which the time of every component depends on its shape.
pub fn varied_latency(num_loops: u32) -> LatencyModel {
    use Component::*;
    let mut points = vec![
        (Block, 1, 0, 1, 100.0),
        (Block, 16, 0, 1, 130.0),
        (Block, 512, 0, 1, 900.0),
        (Embed, 1, 0, 1, 2.0),
        (Embed, 512, 0, 1, 31.0),
        (Head, 1, 0, 1, 17.0),
        (Head, 64, 0, 1, 41.0),
        (DepthMix, 1, 0, 2, 3.0),
        (DepthMix, 512, 0, 2, 9.0),
    ];
    for rows in [1, 64] {
        for kv_tokens in [0, 4096] {
            let size = f64::from(rows) * (f64::from(kv_tokens) + 10.0);
            points.push((DecodeAttention, rows, kv_tokens, 1, size / 400.0));
            points.push((PrefillAttention, rows, kv_tokens, 1, size / 300.0));
        }
    }
    LatencyModel::new(&profile(num_loops, &points)).unwrap()
}

/// A token that exits at `exit` under the oracle and under confidence policies at 0.5 of any signal but entropy.
pub fn sure_from(exit: u8, num_loops: u8) -> Vec<(Signals, u32)> {
    (0..num_loops)
        .map(|depth| {
            let sure = depth >= exit;
            let value = if sure { 0.9 } else { 0.1 };
            let (difference, kl, entropy) = (1.0 - value, 1.0 - value, 0.0);
            let signals =
                Signals { top1: value, margin: value, entropy, similarity: value, difference, kl, gate: value };
            (signals, u32::from(!sure))
        })
        .collect()
}

/// A trace of generations given by the exit depth of each token.
pub fn exit_trace(num_loops: u8, generations: &[Vec<u8>]) -> ExitTrace {
    let mut trace = ExitTrace::new(ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: "test".into(),
        fingerprint: "test".into(),
        num_loops: num_loops.into(),
        source: "made up".into(),
        recording: None,
    });
    trace.recorded = SignalSet::ALL;
    for exits in generations {
        let rows: Vec<_> = exits.iter().flat_map(|&exit| sure_from(exit, num_loops)).collect();
        trace.push_generation(&rows);
    }
    trace
}

/// Generations of tokens whose exit depths are drawn independently with the given probabilities.
pub fn drawn_exits(probabilities: &[f64], generations: usize, tokens: usize, seed: u64) -> ExitModel {
    let mut random = Random(seed);
    let draw = |random: &mut Random| {
        let mut left = random.unit();
        probabilities.iter().position(|p| {
            left -= p;
            left < 0.0
        })
    };
    let last = probabilities.len() - 1;
    let generations: Vec<Vec<u8>> =
        (0..generations).map(|_| (0..tokens).map(|_| draw(&mut random).unwrap_or(last) as u8).collect()).collect();
    ExitModel::new(&exit_trace(probabilities.len() as u8, &generations), Draw::Seeded(seed)).unwrap()
}

/// Settings without limits on memory or budget.
pub fn settings(batching: Batching, exit: &str, num_loops: u8, max_batch: u32) -> Settings {
    Settings {
        max_batch,
        token_budget: 1 << 16,
        prefill_chunk: 1 << 12,
        num_blocks: 1 << 16,
        ..Settings::new(batching, exit.parse::<ExitPolicy>().unwrap(), num_loops)
    }
}

/// Requests that all arrive at the start.
pub fn queued(count: u32, prompt_tokens: u32, output_tokens: u32) -> impl Iterator<Item = Request> + Clone {
    (0..count).map(move |id| Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens })
}

/// Requests that arrive as a Poisson process, `rate` a second.
pub fn poisson(
    count: u32,
    rate: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    seed: u64,
) -> impl Iterator<Item = Request> {
    let mut random = Random(seed);
    let mut seconds = 0.0;
    (0..count).map(move |id| {
        seconds -= (1.0 - random.unit()).ln() / rate;
        Request { id, arrival: Nanos::from_secs_f64(seconds), prompt_tokens, output_tokens }
    })
}

/// A random generator for tests only (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// All events of requests, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Log(pub Vec<(Nanos, u32, Event)>);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    Admitted,
    Preempted,
    Token(Token),
    Finished,
}

impl Observer for Log {
    fn admitted(&mut self, now: Nanos, request: &Request) {
        self.0.push((now, request.id, Event::Admitted));
    }
    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.0.push((now, request.id, Event::Preempted));
    }
    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        self.0.push((now, request.id, Event::Token(token)));
    }
    fn finished(&mut self, now: Nanos, request: &Request, _first_token: Nanos) {
        self.0.push((now, request.id, Event::Finished));
    }
}
