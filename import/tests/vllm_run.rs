//! A simulation from imported kernel tables, compared with a measured run of vLLM.
//!
//! The limits are relative errors. No constant behind the simulated numbers was fitted to the run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use import::comparison::RequestTimes;
use import::{Comparison, LayerTables, MeasuredRun, ModelShape};
use latency::LatencyModel;
use scheduler::Settings;
use simulator::{ExitModel, Metrics, Simulation};
use traces::{LatencyProfile, PrefixHashes, ReadOptions, RequestTrace};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/gpu/rtx4090-llama-3.1-8b")
}

/// Maximum relative errors of the simulation.
const BARS: [(&str, f64); 4] = [("makespan s", 0.015), ("TTFT mean", 0.03), ("TPOT mean", 0.02), ("latency p99", 0.03)];

#[derive(Clone)]
struct Run {
    measured: MeasuredRun,
    requests: RequestTrace,
    profile: LatencyProfile,
}

impl Run {
    fn read(folder: &Path) -> Self {
        let shape = ModelShape::read(folder.join("config.json"), 1, 0).unwrap();
        let profile = LayerTables::read(folder.join("profile")).unwrap().profile(&shape, "as measured");
        let measured = MeasuredRun::read(folder.join("vllm"), None).unwrap();
        let options = ReadOptions { prefix_block_tokens: measured.settings.block_tokens, ..ReadOptions::default() };
        let workload = RequestTrace::read_with(folder.join("vllm/workload.jsonl"), &options).unwrap();
        let requests = measured.as_served(&workload).unwrap();
        Self { measured, requests, profile }
    }

    /// The run without one rule.
    fn without(&self, rule: impl Fn(&mut Settings)) -> Self {
        let mut run = self.clone();
        rule(&mut run.measured.settings);
        run
    }

    fn simulate(&self) -> Vec<RequestTimes> {
        let latency = LatencyModel::new(&self.profile).unwrap();
        let exits = ExitModel::full_depth(1, "any").unwrap();
        let prefixes: Arc<PrefixHashes> = Arc::new(self.requests.prefix_hashes.clone().unwrap());
        let mut metrics = Metrics::new(&self.measured.settings).with_requests().with_passes();
        let simulation = Simulation::new(self.measured.settings, &latency, &exits).unwrap().with_prefixes(&prefixes);
        let outcome =
            simulation.run(self.requests.requests.iter().copied(), std::slice::from_mut(&mut metrics)).unwrap();
        println!("{}", outcome.extrapolations);
        println!("preemptions: {}", metrics.requests().map(|request| request.preemptions).sum::<u32>());
        let passes = metrics.passes();
        let queued = |arrival: f64| passes[passes.partition_point(|pass| pass.start_s < arrival)].start_s;
        let times = |request: &simulator::metrics::RequestRow| RequestTimes {
            arrival_s: request.arrival_s,
            queued_s: queued(request.arrival_s),
            first_token_s: request.first_token_s,
            last_token_s: request.finished_s,
            output_tokens: request.output_tokens,
        };
        metrics.requests().map(times).collect()
    }
}

#[test]
fn a_simulation_from_kernel_tables_matches_the_measured_run() {
    let folder = data();
    if !folder.exists() {
        println!("skipped: {} is not there", folder.display());
        return;
    }
    let run = Run::read(&folder);
    let comparison = Comparison::new(&run.measured.requests, &run.simulate());
    println!("{comparison}");
    if let Ok(other) = std::fs::read_to_string(folder.join("llmservingsim-summary.txt")) {
        println!("\nLLMServingSim's own prediction of the run, in milliseconds:\n{other}");
    }
    for (rule, without) in [
        ("prefix caching", run.without(|settings| settings.prefix_caching = false)),
        ("asynchronous scheduling", run.without(|settings| settings.async_scheduling = false)),
    ] {
        let without = Comparison::new(&run.measured.requests, &without.simulate());
        let errors = BARS.map(|(metric, _)| format!("{metric} {:+.2}%", 100.0 * without.error(metric).unwrap()));
        println!("without {rule}: {}", errors.join(", "));
    }
    for (metric, bar) in BARS {
        let error = comparison.error(metric).unwrap();
        assert!(error.abs() < bar, "{metric} is off by {:.2}%\n{comparison}", 100.0 * error);
    }
}
