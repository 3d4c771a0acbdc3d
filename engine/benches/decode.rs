//! Decode throughput of SmolLM2-135M by batch and weight type, beside what the machine can do at most.
//!
//! ```sh
//! cargo bench -p engine --bench decode -- [MODEL.gguf] [--weights f32,q8_0] [--batch 1,32] [--runs 3]
//! ```
//! Without a file the weights are random, of the same sizes, which takes the same time. Every sequence has a prompt of
//! 64 tokens and generates 72, so contexts are of 64 to 136 tokens; all run through the scheduler, without exits, and
//! what is timed goes from the first token of the last to the end. Weight types take turns, run by run; the table has
//! medians. `RAYON_NUM_THREADS` sets the threads.

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::{Arguments, machine, median};
use engine::checkpoint::Checkpoint;
use engine::clock::Idle;
use engine::config::{ModelConfig, Sharing};
use engine::executor::Sampling;
use engine::kernels::linear::WeightType;
use engine::model::Model;
use engine::prompts::Prompts;
use engine::replay::Engine;
use engine::weights::Weights;
use rayon::prelude::*;
use scheduler::{Batching, ExitPolicy, KvFill, Observer, Settings, Token};
use traces::{Nanos, Request};

const PROMPT: u32 = 64;
const OUTPUT: u32 = 72;

/// SmolLM2-135M's sizes.
fn sizes() -> ModelConfig {
    ModelConfig {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        block_layers: 30,
        num_loops: 1,
        sharing: Sharing::Nothing,
        tie_embeddings: true,
        max_positions: 512,
        ..ModelConfig::default()
    }
}

/// When the last sequence got its first token, and when it all ended.
#[derive(Default)]
struct Decoding {
    started: Nanos,
    ended: Nanos,
}

impl Observer for Decoding {
    fn token(&mut self, now: Nanos, _: &Request, token: Token) {
        if token.index == 0 {
            self.started = now;
        }
        self.ended = now;
    }
}

/// Generated tokens a second.
fn throughput(engine: &Engine, batch: u32) -> f64 {
    let settings = Settings {
        batching: Batching::Sequence,
        exit: ExitPolicy::None,
        kv_fill: KvFill::Reuse,
        num_loops: engine.model.config().num_loops as u8,
        max_batch: batch,
        token_budget: batch * PROMPT,
        prefill_chunk: batch * PROMPT,
        block_tokens: 16,
        num_blocks: batch * (PROMPT + OUTPUT).div_ceil(16),
        prefix_caching: false,
        async_scheduling: false,
    };
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: PROMPT, output_tokens: OUTPUT };
    let requests: Vec<Request> = (0..batch).map(request).collect();
    let mut decoding = Decoding::default();
    engine.replay(settings, &requests, None, Idle::Skip, &mut decoding).unwrap();
    let seconds = decoding.ended.since(decoding.started).as_micros_f64() / 1e6;
    f64::from(batch * (OUTPUT - 1)) / seconds
}

/// Bytes a second that all threads read from memory, once each.
fn read_bandwidth() -> f64 {
    let numbers = vec![1_u64; 1 << 26];
    let share = numbers.len().div_ceil(rayon::current_num_threads());
    let sweep = || {
        let start = Instant::now();
        let sum: u64 = numbers.par_chunks(share).map(|share| share.iter().fold(0, |sum, x| sum ^ x)).sum();
        assert!(std::hint::black_box(sum) < 1 << 32);
        (numbers.len() * size_of::<u64>()) as f64 / start.elapsed().as_secs_f64()
    };
    median((0..9).map(|_| sweep()).collect())
}

/// Multiplications and additions a second, of all threads together, out of registers alone.
#[cfg(target_arch = "x86_64")]
mod arithmetic {
    use std::arch::x86_64::*;
    use std::time::Instant;

    const CHAINS: usize = 16;
    const STEPS: usize = 20_000_000;

    #[target_feature(enable = "avx512f")]
    fn floats() -> f32 {
        let (a, b) = (_mm512_set1_ps(std::hint::black_box(0.5)), _mm512_set1_ps(std::hint::black_box(0.25)));
        let mut sums = [b; CHAINS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, a, b));
        }
        sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn bytes() -> i32 {
        let (a, b) = (_mm512_set1_epi32(std::hint::black_box(1)), _mm512_set1_epi32(std::hint::black_box(2)));
        let mut sums = [b; CHAINS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, a, b));
        }
        sums.iter().fold(0, |sum, &part| sum ^ _mm512_reduce_add_epi32(part))
    }

    fn on_all_threads(per_step: usize, work: impl Fn() + Sync) -> f64 {
        let start = Instant::now();
        rayon::broadcast(|_| work());
        let operations = rayon::current_num_threads() * STEPS * CHAINS * per_step;
        operations as f64 / start.elapsed().as_secs_f64()
    }

    /// Of 32-bit floats and of bytes; none on a CPU without the instructions.
    pub fn peaks() -> Option<(f64, f64)> {
        let known = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        known.then(|| {
            // SAFETY: the CPU has the instructions.
            let floats = on_all_threads(2 * 16, || {
                std::hint::black_box(unsafe { floats() });
            });
            // SAFETY: as above.
            let bytes = on_all_threads(2 * 64, || {
                std::hint::black_box(unsafe { bytes() });
            });
            (floats, bytes)
        })
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod arithmetic {
    pub fn peaks() -> Option<(f64, f64)> {
        None
    }
}

fn main() {
    let arguments = Arguments::parse(&["weights", "batch", "runs"]);
    let weights = match arguments.words.first() {
        Some(path) => Checkpoint::read(path.as_ref(), 1).unwrap_or_else(|error| panic!("{error}")).weights,
        None => Weights::random(sizes(), 1).unwrap(),
    };
    let prompts = Arc::new(Prompts::Text((0..100_000_u64).map(|i| (i * i * 31 % 40_000) as u32).collect()));
    let engine = |weight_type| Engine {
        model: Arc::new(Model::load(&weights, weight_type).unwrap()),
        prompts: prompts.clone(),
        sampling: Sampling::default(),
    };
    let weight_types: Vec<WeightType> = arguments.list("weights", "f32,bf16,q8_0,q4k");
    let engines: Vec<(WeightType, Engine)> =
        weight_types.into_iter().map(|weight_type| (weight_type, engine(weight_type))).collect();
    // The embedding is read by the row, the head's matrix wholly, which is the same where they are tied.
    let config = weights.config();
    let embedding = if config.tie_embeddings { 0 } else { config.vocab_size * config.hidden_size };
    let multiplied = weights.tensors().values().filter(|tensor| tensor.rank() == 2);
    let products = multiplied.map(|tensor| tensor.elem_count()).sum::<usize>() - embedding;

    let bandwidth = read_bandwidth();
    let peaks = arithmetic::peaks();
    println!("{}", machine());
    println!("reading memory: {:.1} GB/s", bandwidth / 1e9);
    if let Some((floats, bytes)) = peaks {
        println!("arithmetic: {:.0} GFLOP/s in f32, {:.0} GOP/s in bytes", floats / 1e9, bytes / 1e9);
    }
    println!("\n| batch | weights | tok/s | of memory bandwidth | of arithmetic peak |");
    println!("| ---: | --- | ---: | ---: | ---: |");
    for batch in arguments.list("batch", "1,8,16,32") {
        let mut samples = vec![Vec::new(); engines.len()];
        for _ in 0..arguments.get("runs", 3) {
            for ((_, engine), samples) in engines.iter().zip(&mut samples) {
                samples.push(throughput(engine, batch));
            }
        }
        for ((weight_type, _), samples) in engines.iter().zip(samples) {
            let tokens = median(samples);
            let bytes = tokens / f64::from(batch) * products as f64 * weight_type.bits() / 8.0;
            let is_float = matches!(weight_type, WeightType::F32 | WeightType::Bf16);
            let peak = peaks.map(|(floats, bytes)| if is_float { floats } else { bytes });
            let of_peak =
                peak.map_or("".to_owned(), |peak| format!("{:.0}%", 100.0 * 2.0 * tokens * products as f64 / peak));
            println!("| {batch} | {weight_type} | {tokens:.1} | {:.0}% | {of_peak} |", 100.0 * bytes / bandwidth);
        }
    }
}
