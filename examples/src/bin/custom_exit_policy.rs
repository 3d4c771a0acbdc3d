//! An exit policy that is not built in: `cargo run --release -p depthwise-examples --bin custom_exit_policy`
//!
//! Tokens come in easy and hard passages. This policy averages the margin of a token with those of the tokens before it,
//! and exits where the average reaches a threshold: in an easy passage a smaller margin is enough. The simulator runs it
//! on an exit trace that is made here, the engine on the model that ships.

use std::error::Error;
use std::path::Path;
use std::slice;

use engine::{Checkpoint, DeviceName, Engine, WeightType};
use latency::LatencyModel;
use scheduler::{Batching, CustomExit, CustomPolicy, ExitPolicy, ExitRow, Memory, Settings, SignalRead};
use simulator::{Draw, ExitModel, Metrics, Simulation, Source};
use traces::{
    Component, ExitSignal, ExitTrace, ExitTraceMeta, LatencyProfile, Nanos, Point, ProfileMeta, Request, Signals,
};

/// Exits where half the token's margin and half the average before it are 0.25 or more together.
struct AverageMargin;

impl CustomExit for AverageMargin {
    fn name(&self) -> &str {
        "average-margin:0.25"
    }

    fn reads(&self) -> SignalRead {
        SignalRead::Signal(ExitSignal::Margin)
    }

    fn exits(&self, row: &ExitRow<'_>, memory: &mut Memory) -> bool {
        let [average, ..] = memory;
        let with_this = 0.5 * *average + 0.5 * row.signals[usize::from(row.depth)];
        let exits = with_this >= 0.25;
        // The policy is not asked at the last depth, where every token exits.
        if exits || row.depth + 2 == row.num_loops {
            *average = with_this;
        }
        exits
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let policy = CustomPolicy::new(&AverageMargin);
    // Now its name reads like any other.
    policy.register()?;
    let policies: [ExitPolicy; 3] = ["none".parse()?, "margin:0.3".parse()?, "average-margin:0.25".parse()?];
    simulate(&policies)?;
    serve(ExitPolicy::Custom(policy))
}

/// Queued requests on a made-up machine under each policy.
fn simulate(policies: &[ExitPolicy]) -> Result<(), Box<dyn Error>> {
    let (latency, exits) = (LatencyModel::new(&profile())?, ExitModel::new(&exit_trace(), Draw::Seeded(1))?);
    let requests = (0..64).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 8, output_tokens: 60 });
    println!("simulated               tokens/s   passes per token   agreement");
    for &exit in policies {
        let settings = Settings { max_batch: 16, ..Settings::new(Batching::Depth, exit, 4) };
        let mut metrics = Metrics::new(&settings);
        let outcome =
            Simulation::new(settings, &latency, &exits)?.run(requests.clone(), slice::from_mut(&mut metrics))?;
        let summary = metrics.summary(Source::Simulated, None);
        let (rate, depth) = (summary.throughput_tok_s, summary.mean_depth);
        println!("{:<21} {rate:>10.0} {depth:>18.2} {:>11.3}", exit.to_string(), outcome.token_agreement());
    }
    Ok(())
}

/// The engine under a policy.
fn serve(exit: ExitPolicy) -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
    let Checkpoint { weights, tokenizer } = Checkpoint::open(&folder, None)?;
    let tokenizer = tokenizer.ok_or("the model has no tokenizer")?;
    let engine = Engine::new(DeviceName::Cpu.serve(&weights, WeightType::F32)?);
    let settings = Settings { num_blocks: 16, ..Settings::new(Batching::Depth, exit, engine.num_loops()) };
    let texts = engine.complete(&tokenizer, &["In the beginning"], settings, 12)?;
    println!("\nmeasured, with the depth of each token under {exit}:");
    println!("{}", texts[0].iter().map(|token| format!("{}[{}]", token.text, token.depth)).collect::<String>());
    Ok(())
}

/// Generations of passages of ten tokens: in easy ones the prediction is right from depth 0 on and the margin 0.4, in
/// hard ones it is right at the last depth only and the margin up to 0.2. Every fourth token has a margin of half that.
fn exit_trace() -> ExitTrace {
    let mut trace = ExitTrace::new(ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: "made up".to_owned(),
        fingerprint: "made up".to_owned(),
        num_loops: 4,
        source: "examples/src/bin/custom_exit_policy.rs".to_owned(),
        recording: None,
    });
    for generation in 0..20 {
        let row = |token: u32, depth: u32| {
            let is_easy = (generation + token / 10).is_multiple_of(2);
            let margin = if is_easy { 0.4 + 0.05 * depth as f32 } else { 0.05 * depth as f32 };
            let margin = if token % 4 == 3 { margin / 2.0 } else { margin };
            (Signals { margin, ..Signals::default() }, u32::from(is_easy || depth == 3))
        };
        let rows: Vec<_> = (0..60).flat_map(|token| (0..4).map(move |depth| row(token, depth))).collect();
        trace.push_generation(&rows);
    }
    trace
}

/// A pass takes 200 us and 1 us more for each row.
fn profile() -> LatencyProfile {
    let point = |rows, time_us| Point {
        component: Component::Block,
        rows,
        kv_tokens: 0,
        depths: 1,
        time_us,
        spread_us: 0.0,
        repeats: 1,
    };
    LatencyProfile {
        meta: ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: "made up".to_owned(),
            fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
            num_loops: 4,
            device: "made up".to_owned(),
            software: "none".to_owned(),
            source: "examples/src/bin/custom_exit_policy.rs".to_owned(),
            overhead_us: 0.0,
            weight_bytes: 0,
            kv_bytes_per_token: 0,
            memory: None,
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        },
        points: vec![point(1, 201.0), point(2048, 2248.0)],
        mixed_attention: None,
    }
}
