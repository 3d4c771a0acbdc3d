//! `depthwise vllm`: the simulator against a measured run of vLLM.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use import::comparison::RequestTimes;
use import::{Comparison, MeasuredRun};
use latency::LatencyModel;
use simulator::metrics::{PassRow, RequestRow};
use simulator::{ExitModel, MemoryBudget, Metrics, ModelMemory, Simulation};
use traces::{ReadOptions, RequestTrace};

use crate::arguments::at_most;
use experiments::read_profile;
use experiments::results::write_file;
use experiments::serving::{MOST_BLOCKS, longest};

use crate::output::say;

/// Simulate the requests of a measured vLLM run under its settings, and compare latencies
///
/// The folder of the run contains meta.json (settings), workload.jsonl (requests as sent) and requests.jsonl (times).
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Folder of a latency profile of the device and the model of the run, or the name of one that ships
    #[arg(long, value_name = "PROFILE")]
    profile: PathBuf,
    /// KV blocks, if meta.json does not give them [default: what fits into the memory of the device; if its size is not
    /// known, enough for a full batch of the longest request]
    #[arg(long, value_parser = at_most::<MOST_BLOCKS>)]
    num_blocks: Option<u32>,
    /// Requests as sent [default: workload.jsonl in the folder of the run]
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,
    /// File to write the comparison to, as CSV
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let mut measured = MeasuredRun::read(&args.run, args.num_blocks)?;
    let options = ReadOptions { prefix_block_tokens: measured.settings.block_tokens, ..ReadOptions::default() };
    let workload = args.workload.unwrap_or_else(|| args.run.join("workload.jsonl"));
    let requests = measured.as_served(&RequestTrace::read_with(workload, &options)?)?;
    let profile = read_profile(Path::new(""), &args.profile)?;

    let latency = LatencyModel::new(&profile)?;
    let exits = ExitModel::full_depth(profile.meta.num_loops, &profile.meta.fingerprint)?;
    if measured.settings.num_blocks == 0 {
        fill_memory(&mut measured, &latency.meta().into(), longest(&requests.requests))?;
    }
    let mut metrics = Metrics::new(&measured.settings).with_requests().with_passes();
    let prefixes = requests.prefix_hashes.map(Arc::new);
    let mut simulation = Simulation::new(measured.settings, &latency, &exits)?;
    if let Some(prefixes) = &prefixes {
        simulation = simulation.with_prefixes(prefixes);
    }
    let outcome = simulation.run(requests.requests.iter().copied(), std::slice::from_mut(&mut metrics))?;

    let simulated: Vec<RequestTimes> = metrics.requests().map(|request| times(request, metrics.passes())).collect();
    let comparison = Comparison::new(&measured.requests, &simulated);
    if let Some(out) = args.out {
        let mut lines = csv::Writer::from_writer(Vec::new());
        comparison.lines().try_for_each(|line| lines.serialize(line))?;
        let text = lines.into_inner()?;
        let header = text.split_inclusive(|&byte| byte == b'\n').next().unwrap_or_default();
        write_file(&out, header, |file| file.write_all(&text))?;
    }
    say!("{comparison}");
    if !measured.assumptions.is_empty() {
        say!("assumed, since meta.json does not say: {}", measured.assumptions.join("; "));
    }
    let summary = simulation.summary(&metrics, &outcome);
    say!("preemptions: {}", summary.preemptions);
    if let Some(share) = summary.prefix_hit_rate {
        say!("prefix hits: {share:.3} of prompt tokens");
    }
    if !outcome.extrapolations.is_empty() {
        say!("{}", outcome.extrapolations);
    }
    let computed: Vec<String> = profile.computed_components().map(|part| part.to_string()).collect();
    if !computed.is_empty() {
        say!("computed, not measured: {}", computed.join(", "));
    }
    Ok(())
}

/// Gives a run that does not say how many KV blocks it had those that its memory holds, or plenty.
fn fill_memory(run: &mut MeasuredRun, model: &ModelMemory, longest: u32) -> Result<()> {
    let settings = &mut run.settings;
    let (blocks, why) = match run.device_bytes.or(model.figures.device_bytes) {
        Some(device_bytes) => {
            let utilization = run.memory_utilization.unwrap_or(MemoryBudget::DEFAULT_UTILIZATION);
            let plan = model.plan(MemoryBudget { device_bytes, utilization }, settings)?;
            (plan.num_blocks, format!("which {utilization} of the device's {device_bytes} bytes hold by computation"))
        }
        None => {
            let blocks = longest.div_ceil(settings.block_tokens).saturating_mul(settings.max_batch);
            (blocks, "room for every batch, as the device's memory is not known".to_owned())
        }
    };
    settings.num_blocks = blocks;
    run.assumptions.push(format!("{blocks} KV blocks, {why} (--num-blocks gives vLLM's own number)"));
    Ok(())
}

fn times(request: &RequestRow, passes: &[PassRow]) -> RequestTimes {
    let next = passes.partition_point(|pass| pass.start_s < request.arrival_s);
    RequestTimes {
        arrival_s: request.arrival_s,
        queued_s: passes.get(next).map_or(request.arrival_s, |pass| pass.start_s),
        first_token_s: request.first_token_s,
        last_token_s: request.finished_s,
        output_tokens: request.output_tokens,
    }
}
