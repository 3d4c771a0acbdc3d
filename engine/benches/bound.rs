//! Early-exit speed-up of a served model as a share of its bound: all requests at once, on this machine.
//!
//! ```sh
//! cargo bench -p engine --bench bound -- [MODEL] [--requests 256] [--batch 64] [--prompt 2] [--output 128] [--runs 5]
//! ```
//! With a full batch and passes of equal duration, depth-wise batching with exits at `mean depth` would be `num_loops /
//! mean depth` times as fast as sequence-wise batching without exits. The benchmark prints the share of that bound
//! which the oracle's exits reach, the time that is lost to each component, the share that a learned gate reaches at
//! the same mean depth, and the time of scheduling: everything outside the executor. Prompts run every depth under any
//! policy, so they are short.
//!
//! The time of a component is measured by leaving it out, with the oracle's exits unchanged: the adapters, and
//! attention by windows of one token. Runs take turns; times are medians. The share of the bound compares a run with
//! the preceding run without exits, so that both meet the machine in one speed mode. Printed are its median, minimum
//! and maximum.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use common::{Arguments, machine, median};
use engine::config::{ModelConfig, SlidingWindow};
use engine::{
    Engine, ExitDepths, Idle, Model, Prompts, Sampling, Tokenizer, WallClock, WeightType, Weights, in_pool,
    oracle_depths,
};
use scheduler::{Batching, ExitPolicy, Observer, PassRecord, Server, Settings, serve};
use traces::{ExitSignal, Nanos, Request};

const ORACLE: ExitPolicy = ExitPolicy::Oracle { charged: false, recorded: true };

/// Time of a run per generated token.
#[derive(Clone, Copy, Debug)]
struct Costs {
    /// Total time in microseconds.
    total: f64,
    /// Time outside the executor.
    scheduling: f64,
    /// Time in the exit head.
    head: f64,
    /// Number of passes.
    depth: f64,
}

/// Sum of the executor's times.
#[derive(Default)]
struct Passes(Nanos);

impl Observer for Passes {
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.0 += record.elapsed;
    }
}

/// The requests, and how they are served.
struct Load {
    requests: Vec<Request>,
    oracle: Arc<ExitDepths>,
    settings: Settings,
}

impl Load {
    fn run(&self, engine: &Engine, batching: Batching, exit: ExitPolicy) -> Costs {
        let settings = Settings { batching, exit, ..self.settings };
        let executor = engine.executor(&settings).unwrap().with_oracle(self.oracle.clone());
        let mut server = Server::new(settings, executor).unwrap();
        let mut passes = Passes::default();
        let start = Instant::now();
        in_pool(|| {
            let requests = self.requests.iter().copied();
            serve(&mut server, requests, &mut WallClock::start(Idle::Skip), &mut passes).unwrap();
        });
        let total = start.elapsed().as_secs_f64() * 1e6;
        let executor = server.executor();
        let exits = executor.generations().values().flat_map(|generation| &generation.exit_depths);
        let (tokens, depths) =
            exits.fold((0.0, 0.0), |(tokens, depths), &exit| (tokens + 1.0, depths + f64::from(exit) + 1.0));
        Costs {
            total: total / tokens,
            scheduling: (total - passes.0.as_micros_f64()) / tokens,
            head: executor.head_time().as_secs_f64() * 1e6 / tokens,
            depth: depths / tokens,
        }
    }

    /// The gate threshold at which the mean exit depth equals that of the oracle.
    fn gate(&self, engine: &Engine, mean_depth: f64) -> ExitPolicy {
        let gate = |threshold| ExitPolicy::Confidence { signal: ExitSignal::Gate, threshold };
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..12 {
            let middle = (low + high) / 2.0;
            match self.run(engine, Batching::Depth, gate(middle)).depth < mean_depth {
                true => low = middle,
                false => high = middle,
            }
        }
        gate((low + high) / 2.0)
    }
}

/// The model without adapters in its loops.
fn without_adapters(weights: &Weights) -> Weights {
    let config = ModelConfig { lora: None, ..weights.config().clone() };
    with_config(weights, config)
}

/// The model with a window of one token: rows attend only to themselves.
fn without_attention(weights: &Weights) -> Weights {
    let mut config = weights.config().clone();
    let rope_theta = config.architecture.rope_theta;
    let layers = (0..config.num_layers()).collect();
    config.architecture.sliding_window = Some(SlidingWindow { tokens: 1, rope_theta, layers });
    with_config(weights, config)
}

fn with_config(weights: &Weights, config: ModelConfig) -> Weights {
    let kept = weights.tensors().iter().filter(|(name, _)| config.lora.is_some() || !name.starts_with("lora."));
    let tensors: HashMap<_, _> = kept.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    Weights::from_tensors(config, tensors, "a model with a part left out").unwrap()
}

/// Medians of the costs of several runs.
fn medians(runs: &[Costs]) -> Costs {
    let of = |part: fn(&Costs) -> f64| median(runs.iter().map(part).collect());
    Costs {
        total: of(|run| run.total),
        scheduling: of(|run| run.scheduling),
        head: of(|run| run.head),
        depth: of(|run| run.depth),
    }
}

fn main() {
    let arguments = Arguments::parse(&["requests", "batch", "prompt", "output", "runs"]);
    let embedded = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv");
    let folder = Path::new(arguments.words.first().map_or(embedded, String::as_str));
    let weights = Weights::load(folder).unwrap_or_else(|error| panic!("{error}"));
    let text = std::fs::read_to_string(folder.join("prompts.txt")).expect("a model folder has prompts.txt");
    let tokens = Tokenizer::load(&folder.join("tokenizer.json")).unwrap().encode(&text).unwrap();
    let prompts = Arc::new(Prompts::Text(tokens));
    let engine = |weights: &Weights| Engine {
        model: Arc::new(Model::load(weights, WeightType::F32).unwrap()),
        prompts: prompts.clone(),
        sampling: Sampling::default(),
        script: None,
    };
    let whole = engine(&weights);
    let num_loops = whole.model.config().num_loops;
    let (batch, output): (u32, u32) = (arguments.get("batch", 64), arguments.get("output", 128));
    let prompt_tokens = arguments.get("prompt", 2);
    let request =
        |id: u32| Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens: output / 2 + id * 7 % output };
    let requests: Vec<Request> = (0..arguments.get("requests", 256)).map(request).collect();
    let trace = whole.record(&requests, "measured", "all requests at once", &mut ()).unwrap();
    let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
    let load = Load {
        oracle: Arc::new(oracle_depths(&trace, &requests)),
        settings: Settings {
            max_batch: batch,
            token_budget: 2 * batch,
            prefill_chunk: batch.div_ceil(2),
            num_blocks: batch * longest.div_ceil(16),
            ..Settings::new(Batching::Depth, ExitPolicy::None, num_loops as u8)
        },
        requests,
    };
    let mut parts = vec![("attention", engine(&without_attention(&weights)))];
    if weights.config().lora.is_some() {
        parts.push(("LoRA", engine(&without_adapters(&weights))));
    }
    let gate = weights.config().gate.then(|| load.gate(&whole, load.run(&whole, Batching::Depth, ORACLE).depth));

    let (mut plain, mut oracle, mut gated) = (Vec::new(), Vec::new(), Vec::new());
    let mut without = vec![(Vec::new(), Vec::new()); parts.len()];
    for _ in 0..arguments.get("runs", 5) {
        plain.push(load.run(&whole, Batching::Sequence, ExitPolicy::None));
        oracle.push(load.run(&whole, Batching::Depth, ORACLE));
        gated.extend(gate.map(|gate| load.run(&whole, Batching::Depth, gate)));
        for ((_, engine), (plain, oracle)) in parts.iter().zip(&mut without) {
            plain.push(load.run(engine, Batching::Sequence, ExitPolicy::None).total);
            oracle.push(load.run(engine, Batching::Depth, ORACLE).total);
        }
    }
    let share = |(plain, run): (&Costs, &Costs)| 100.0 * plain.total / run.total * run.depth / num_loops as f64;
    let shares = |runs: &[Costs]| plain.iter().zip(runs).map(share).collect::<Vec<f64>>();
    let mut rows = vec![
        ("sequence", "none".to_owned(), shares(&plain), medians(&plain)),
        ("depth", "oracle".to_owned(), shares(&oracle), medians(&oracle)),
    ];
    rows.extend(gate.map(|gate| ("depth", gate.to_string(), shares(&gated), medians(&gated))));
    let (plain, oracle) = (medians(&plain), medians(&oracle));
    let bound = num_loops as f64 / oracle.depth;
    println!("{}", machine());
    println!("{} requests at once, batch {batch}, {num_loops} loops", load.requests.len());
    println!("\n| batching | exit | tok/s | mean depth | over no exit | of the bound | scheduling |");
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: |");
    for (batching, exit, mut shares, run) in rows {
        shares.sort_unstable_by(f64::total_cmp);
        let (least, most) = (shares[0], shares[shares.len() - 1]);
        let of_bound = format!("{:.1}% ({least:.1} to {most:.1})", median(shares));
        let (speedup, scheduling) = (plain.total / run.total, 100.0 * run.scheduling / run.total);
        let (tokens, depth) = (1e6 / run.total, run.depth);
        println!("| {batching} | {exit} | {tokens:.0} | {depth:.3} | {speedup:.2} | {of_bound} | {scheduling:.2}% |");
    }
    println!("\n| part | no exit, us a token | oracle, us a token | of the bound without it |");
    println!("| --- | ---: | ---: | ---: |");
    let print = |part: &str, of_plain: f64, of_oracle: f64| {
        let of_bound = 100.0 * (plain.total - of_plain) / (oracle.total - of_oracle) / bound;
        println!("| {part} | {of_plain:.2} | {of_oracle:.2} | {of_bound:.1}% |");
    };
    print("scheduling", plain.scheduling, oracle.scheduling);
    print("head", plain.head, oracle.head);
    for ((part, _), (of_plain, of_oracle)) in parts.iter().zip(without) {
        print(part, plain.total - median(of_plain), oracle.total - median(of_oracle));
    }
}
