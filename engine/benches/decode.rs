//! Decode throughput of SmolLM2-135M by batch and weight type, compared with the machine's peak rates.
//!
//! ```sh
//! cargo bench -p engine --bench decode -- [MODEL.gguf] [--weights f32,q8_0] [--batch 1,32] [--runs 3]
//! ```
//! Without a file, the weights are random with the same sizes, and take the same time. Every sequence has a prompt of
//! 64 tokens and generates 72, so contexts have 64 to 136 tokens. All sequences run through the scheduler, without
//! exits. The time is measured from the first token of the last sequence to the end. Weight types take turns, run by
//! run; the table contains medians. `RAYON_NUM_THREADS` sets the number of threads.

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::{Arguments, machine, median};
use engine::config::{ModelConfig, Sharing};
use engine::{Checkpoint, Engine, Idle, Model, Prompts, Sampling, WeightType, Weights};
use rayon::prelude::*;
use scheduler::{Batching, ExitPolicy, Observer, Settings, Token};
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

/// When the last sequence got its first token, and when the run ended.
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

/// Generated tokens per second.
fn throughput(engine: &Engine, batch: u32) -> f64 {
    let settings = Settings {
        max_batch: batch,
        token_budget: batch * PROMPT,
        prefill_chunk: batch * PROMPT,
        num_blocks: batch * (PROMPT + OUTPUT).div_ceil(16),
        ..Settings::new(Batching::Sequence, ExitPolicy::None, engine.model.config().num_loops as u8)
    };
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: PROMPT, output_tokens: OUTPUT };
    let requests: Vec<Request> = (0..batch).map(request).collect();
    let mut decoding = Decoding::default();
    engine.replay(settings, &requests, None, Idle::Skip, &mut decoding).unwrap();
    let seconds = decoding.ended.since(decoding.started).as_micros_f64() / 1e6;
    f64::from(batch * (OUTPUT - 1)) / seconds
}

/// Bytes per second that all threads read from memory, each byte once.
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

/// Peak multiplications and additions per second.
#[derive(Clone, Copy)]
struct Peaks {
    floats: f64,
    /// For bytes with 8-bit weights.
    q8: f64,
    /// For bytes with 4-bit weights.
    q4: f64,
}

/// Multiplications and additions per second of all threads, with operands in registers.
#[cfg(target_arch = "x86_64")]
mod arithmetic {
    use std::arch::x86_64::*;
    use std::time::Instant;

    use super::Peaks;

    const CHAINS: usize = 16;
    /// Chains for AVX2, which has 16 registers.
    const CHAINS_AVX2: usize = 12;
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

    #[target_feature(enable = "avx2,fma")]
    fn floats_avx2() -> f32 {
        let (a, b) = (_mm256_set1_ps(std::hint::black_box(0.5)), _mm256_set1_ps(std::hint::black_box(0.25)));
        let mut sums = [b; CHAINS_AVX2];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, a, b));
        }
        let mut numbers = [0.0; 8];
        // SAFETY: a register holds 8 numbers.
        unsafe {
            _mm256_storeu_ps(numbers.as_mut_ptr(), sums.into_iter().fold(b, |sum, part| _mm256_add_ps(sum, part)))
        };
        numbers.iter().sum()
    }

    /// Nibbles times bytes, as in the kernels.
    #[target_feature(enable = "avx2")]
    fn nibbles_avx2() -> i64 {
        let mut sums = [_mm256_set1_epi8(std::hint::black_box(1)); CHAINS_AVX2];
        let a = _mm256_set1_epi8(std::hint::black_box(2));
        for _ in 0..STEPS {
            // The product depends on the sum, so that no product repeats the previous one.
            sums.iter_mut().for_each(|sum| *sum = _mm256_add_epi16(a, _mm256_maddubs_epi16(*sum, a)));
        }
        let sum = sums.into_iter().fold(a, |sum, part| _mm256_xor_si256(sum, part));
        _mm256_extract_epi64::<0>(sum)
    }

    /// Rate of `work` on every thread at once; a step has `per_step` operations.
    fn on_all_threads<T>(per_step: usize, work: impl Fn() -> T + Sync) -> f64 {
        let start = Instant::now();
        rayon::broadcast(|_| {
            std::hint::black_box(work());
        });
        (rayon::current_num_threads() * STEPS * per_step) as f64 / start.elapsed().as_secs_f64()
    }

    /// `None` on a CPU with neither AVX-512 VNNI nor AVX2.
    pub fn peaks() -> Option<Peaks> {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the CPU has the instructions.
            let floats = on_all_threads(CHAINS * 2 * 16, || unsafe { floats() });
            // SAFETY: as above.
            let bytes = on_all_threads(CHAINS * 2 * 64, || unsafe { bytes() });
            return Some(Peaks { floats, q8: bytes, q4: bytes });
        }
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then(|| {
            // SAFETY: the CPU has the instructions.
            let floats = on_all_threads(CHAINS_AVX2 * 2 * 8, || unsafe { floats_avx2() });
            // SAFETY: as above.
            let nibbles = on_all_threads(CHAINS_AVX2 * 2 * 32, || unsafe { nibbles_avx2() });
            // A byte is two nibbles.
            Peaks { floats, q8: nibbles / 2.0, q4: nibbles }
        })
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod arithmetic {
    pub fn peaks() -> Option<super::Peaks> {
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
        script: None,
    };
    let weight_types: Vec<WeightType> = arguments.list("weights", "f32,bf16,q8_0,q4k");
    let engines: Vec<(WeightType, Engine)> =
        weight_types.into_iter().map(|weight_type| (weight_type, engine(weight_type))).collect();
    // The embedding is read by row, the head's matrix completely; tied models have one matrix for both.
    let config = weights.config();
    let embedding = if config.tie_embeddings { 0 } else { config.vocab_size * config.hidden_size };
    let multiplied = weights.tensors().values().filter(|tensor| tensor.rank() == 2);
    let products = multiplied.map(|tensor| tensor.elem_count()).sum::<usize>() - embedding;

    let bandwidth = read_bandwidth();
    let peaks = arithmetic::peaks();
    println!("{}", machine());
    println!("reading memory: {:.1} GB/s", bandwidth / 1e9);
    if let Some(Peaks { floats, q8, q4 }) = peaks {
        println!(
            "arithmetic: {:.0} GFLOP/s in f32, {:.0} GOP/s of bytes with 8-bit weights, {:.0} with 4-bit ones",
            floats / 1e9,
            q8 / 1e9,
            q4 / 1e9
        );
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
            let peak = peaks.map(|peaks| match weight_type {
                WeightType::F32 | WeightType::F16 | WeightType::Bf16 => peaks.floats,
                WeightType::Q8 => peaks.q8,
                WeightType::Q4K => peaks.q4,
            });
            let of_peak =
                peak.map_or("".to_owned(), |peak| format!("{:.0}%", 100.0 * 2.0 * tokens * products as f64 / peak));
            println!("| {batch} | {weight_type} | {tokens:.1} | {:.0}% | {of_peak} |", 100.0 * bytes / bandwidth);
        }
    }
}
