//! Compares simulations of closed loops with servers that others measured: the rows of `silicon_sample.csv`, in PyPI's
//! `aiconfigurator-core`, that are of dense models under vLLM.
//!
//! `cargo run --release -p import --example silicon_samples -- [--smooth] SYSTEMS OUT.csv MODEL=CONFIG.json...`
//!
//! `--smooth` leaves disturbed measurements of products out. `SYSTEMS` is the package's folder `systems`. Each model is named as in the file, with its `config.json`. The example
//! writes a line for each row to `OUT.csv` and prints the errors by model, GPU, number type and devices. Nothing is fitted
//! to the rows: a profile comes from the package's kernel tables, settings from what is known of the benchmarks.

use std::collections::BTreeMap;
use std::error::Error;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use import::{KernelTables, KvType, LinearType, ModelShape, Sample, read_samples};
use latency::LatencyModel;
use scheduler::{Batching, ExitPolicy, Settings};
use simulator::{ExitModel, MemoryBudget, Metrics, ModelMemory, Simulation, Source};
use traces::{Arrivals, ClosedLoop, Generate, LatencyProfile, Length, PrefixHashes};

/// Version of vLLM whose kernels the tables hold.
const VERSION: &str = "0.24.0";

/// How a benchmark asks.
struct Benchmark {
    /// The shortest lengths as a share of those that the row names, which are the longest.
    shortest: f64,
    /// Requests, as a multiple of those in flight.
    requests: u32,
    /// Tokens of a pass.
    token_budget: u32,
    kv: KvType,
    async_scheduling: bool,
    /// Different prompts, which requests take in turn; `None` if no two are alike. Prefixes are cached if there are.
    prompts: Option<u32>,
}

impl Benchmark {
    /// Of a row. The rows of October 2025 are of InferenceMAX, whose scripts are public: ten times as many requests as are in
    /// flight, lengths from 80%, passes of 8,192 tokens, asynchronous scheduling, no prefix caching, and 8-bit keys and values
    /// but on the H100. The others are of vLLM 0.12, and nothing else is known: they are taken for runs of AIPerf with its
    /// default of 100 prompts, under vLLM's defaults.
    fn of(sample: &Sample) -> Self {
        let inference_max = Self {
            shortest: 0.8,
            requests: 10,
            token_budget: 8192,
            kv: if sample.gpu == "h100_sxm" { KvType::Bf16 } else { KvType::Fp8 },
            async_scheduling: true,
            prompts: None,
        };
        match sample.source.contains("model=") {
            true => inference_max,
            false => {
                Self { shortest: 1.0, kv: KvType::Bf16, async_scheduling: false, prompts: Some(100), ..inference_max }
            }
        }
    }

    /// Hashes of the prompts of this number of requests; `None` if no two are alike.
    fn prefixes(&self, requests: u32, prompt_tokens: u32, block_tokens: u32) -> Option<Arc<PrefixHashes>> {
        let prompts = self.prompts?;
        let blocks = u64::from(prompt_tokens / block_tokens);
        let mut hashes = PrefixHashes::new(block_tokens);
        (0..requests).for_each(|request| {
            let first = u64::from(request % prompts) * blocks;
            hashes.push(first..first + blocks);
        });
        Some(Arc::new(hashes))
    }

    fn lengths(&self, longest: u32) -> Length {
        Length::Uniform { min: ((f64::from(longest) * self.shortest) as u32).max(1), max: longest }
    }
}

/// A row and what the simulation says of it, in milliseconds.
struct Compared {
    sample: Sample,
    ttft_ms: f64,
    tpot_ms: f64,
}

impl Compared {
    fn errors(&self) -> [f64; 2] {
        [self.tpot_ms / self.sample.tpot_ms - 1.0, self.ttft_ms / self.sample.ttft_ms - 1.0]
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let smooth = arguments.next_if(|argument| argument == "--smooth").is_some();
    let usage = "usage: silicon_samples [--smooth] SYSTEMS OUT.csv MODEL=CONFIG.json...";
    let (systems, out) = arguments.next().zip(arguments.next()).ok_or(usage)?;
    let models = arguments.map(|model| {
        let (name, config) = model.split_once('=').ok_or(usage)?;
        Ok((name.to_owned(), PathBuf::from(config)))
    });
    let models: BTreeMap<String, PathBuf> = models.collect::<Result<_, Box<dyn Error>>>()?;
    let systems = Path::new(&systems);
    let covered = |sample: &Sample| sample.is_aggregated && sample.stages == 1 && models.contains_key(&sample.model);
    let samples: Vec<Sample> =
        read_samples(&systems.join("silicon_sample.csv"), "vllm")?.into_iter().filter(covered).collect();
    let mut tables: BTreeMap<String, KernelTables> = BTreeMap::new();
    let mut compared = Vec::new();
    for sample in samples {
        if !tables.contains_key(&sample.gpu) {
            let read = KernelTables::read(systems, &sample.gpu, "vllm", VERSION)?;
            tables.insert(sample.gpu.clone(), if smooth { read.smoothed() } else { read });
        }
        let benchmark = Benchmark::of(&sample);
        let shape = ModelShape::read(&models[&sample.model], None, 0)?
            .with_types(Some(linear_type(&sample.gemm)?), Some(benchmark.kv))
            .shared_by(sample.devices)?;
        let profile = tables[&sample.gpu].profile(&shape, 0.0)?;
        match simulate(&profile, &benchmark, &sample) {
            Ok([ttft_ms, tpot_ms]) => compared.push(Compared { sample, ttft_ms, tpot_ms }),
            Err(error) => println!("{}: {error}", sample.id),
        }
    }
    write(Path::new(&out), &compared)?;
    print(&compared);
    Ok(())
}

/// By the package's names.
fn linear_type(name: &str) -> Result<LinearType, String> {
    match name {
        "bfloat16" | "float16" => "bf16".parse(),
        "fp8_block" => "fp8-block".parse(),
        name => name.parse(),
    }
}

/// Mean TTFT and TPOT of a closed loop, in milliseconds.
fn simulate(profile: &LatencyProfile, benchmark: &Benchmark, sample: &Sample) -> Result<[f64; 2], Box<dyn Error>> {
    let Benchmark { requests, token_budget, .. } = *benchmark;
    let settings = Settings {
        max_batch: sample.in_flight,
        token_budget,
        prefill_chunk: token_budget,
        async_scheduling: benchmark.async_scheduling,
        prefix_caching: benchmark.prompts.is_some(),
        ..Settings::new(Batching::Sequence, ExitPolicy::None, 1)
    };
    let memory = ModelMemory::from(&profile.meta);
    let device_bytes = memory.figures.device_bytes.ok_or("no size of the memory")?;
    let budget = MemoryBudget { device_bytes, utilization: MemoryBudget::DEFAULT_UTILIZATION };
    let settings = Settings { num_blocks: memory.plan(budget, &settings)?.num_blocks, ..settings };
    let generate = Generate {
        count: requests * sample.in_flight,
        seed: 1,
        arrivals: Arrivals::AllAtOnce,
        prompt_tokens: Some(benchmark.lengths(sample.prompt_tokens)),
        output_tokens: Some(benchmark.lengths(sample.output_tokens)),
        lengths_from: None,
    };
    let latency = LatencyModel::new(profile)?;
    let exits = ExitModel::full_depth(1, &profile.meta.fingerprint)?;
    let in_flight = ClosedLoop::in_flight(NonZeroU32::new(sample.in_flight).ok_or("no request in flight")?);
    let simulation = Simulation::new(settings, &latency, &exits)?.in_closed_loop(&in_flight);
    let prefixes = benchmark.prefixes(generate.count, sample.prompt_tokens, settings.block_tokens);
    let simulation = match &prefixes {
        Some(prefixes) => simulation.with_prefixes(prefixes),
        None => simulation,
    };
    let mut metrics = [Metrics::new(&settings)];
    simulation.run(generate.requests(Path::new(""))?, &mut metrics)?;
    let summary = metrics[0].summary(Source::Simulated, None);
    Ok([summary.ttft_mean_ms, summary.tpot_mean_ms])
}

fn write(out: &Path, compared: &[Compared]) -> std::io::Result<()> {
    let mut text = "id,model,gpu,gemm,devices,prompt_tokens,output_tokens,in_flight,measured_ttft_ms,ttft_ms,\
                    measured_tpot_ms,tpot_ms\n"
        .to_owned();
    for Compared { sample, ttft_ms, tpot_ms } in compared {
        let Sample { id, model, gpu, gemm, devices, prompt_tokens, output_tokens, in_flight, .. } = sample;
        text += &format!(
            "{id},{model},{gpu},{gemm},{devices},{prompt_tokens},{output_tokens},{in_flight},{:.3},{ttft_ms:.3},{:.3},{tpot_ms:.3}\n",
            sample.ttft_ms, sample.tpot_ms
        );
    }
    std::fs::write(out, text)
}

/// Median, and median of absolute values, of errors, in percent.
fn medians(errors: impl Iterator<Item = f64> + Clone) -> [f64; 2] {
    let median = |values: &mut dyn Iterator<Item = f64>| {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        100.0 * if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
    };
    [median(&mut errors.clone()), median(&mut errors.map(f64::abs))]
}

fn print(compared: &[Compared]) {
    let mut groups: BTreeMap<[String; 4], Vec<&Compared>> = BTreeMap::new();
    for one in compared {
        let Sample { model, gpu, gemm, devices, .. } = &one.sample;
        let name = [model.clone(), gpu.clone(), gemm.clone(), devices.to_string()];
        groups.entry(name).or_default().push(one);
        groups.entry([model.clone(), gpu.clone(), gemm.clone(), "all".to_owned()]).or_default().push(one);
        groups.entry(["all"; 4].map(str::to_owned)).or_default().push(one);
    }
    println!(
        "| model | GPU | layers | devices | rows | TPOT error, median | absolute | TTFT error, median | absolute |"
    );
    println!("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (name, rows) in groups {
        let errors = |which: usize| medians(rows.iter().map(move |row| row.errors()[which]));
        let ([tpot, tpot_size], [ttft, ttft_size]) = (errors(0), errors(1));
        println!(
            "| {} | {} | {tpot:+.1}% | {tpot_size:.1}% | {ttft:+.1}% | {ttft_size:.1}% |",
            name.join(" | "),
            rows.len()
        );
    }
}
