//! The passes of replays beside what the simulator says of each: where an error of a whole run comes from.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use latency::LatencyModel;
use scheduler::{Batching, KvFill, Settings};
use serde::Serialize;
use simulator::write_csv;
use traces::{DevicePass, LoggedPass, Nanos, PassRun};

/// Passes of one combination that are alike, in all repeats: a line of `passes.csv`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PassClass {
    /// Batching policy.
    pub batching: Batching,
    /// Kind of exit policy: none, static, mix, oracle, confidence.
    pub exit: &'static str,
    /// The whole exit policy.
    pub exit_policy: String,
    /// The KV fill.
    pub kv_fill: KvFill,
    /// Whether there were rows of prompts.
    pub prompts: bool,
    /// Most decode rows: a power of two, and more than half of it; 0 of prompts alone.
    pub decode_rows_up_to: u32,
    /// How many.
    pub passes: usize,
    /// What the executor took on average, in microseconds.
    pub measured_us: f64,
    /// What the simulator says of the same passes.
    pub simulated_us: f64,
    /// Simulated less measured, in percent of measured.
    pub error_pct: f64,
}

/// Passes, and what they took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    passes: usize,
    measured: f64,
    simulated: f64,
}

/// Compares the passes of replays of one combination with what the latency model says of each.
pub fn compare_passes<'a>(
    settings: &Settings,
    replays: impl IntoIterator<Item = &'a PassRun>,
    model: &LatencyModel,
) -> Vec<PassClass> {
    let mut classes: BTreeMap<(bool, u32), Sums> = BTreeMap::new();
    for run in replays {
        for pass in &run.passes {
            let decode_rows = pass.work.decode_rows;
            let up_to = if decode_rows == 0 { 0 } else { decode_rows.next_power_of_two() };
            let sums = classes.entry((!pass.work.chunks.is_empty(), up_to)).or_default();
            sums.passes += 1;
            sums.measured += pass.elapsed.as_micros_f64();
            sums.simulated += model.pass_ns(&pass.work) * 1e-3;
        }
    }
    let class = |((prompts, decode_rows_up_to), Sums { passes, measured, simulated })| PassClass {
        batching: settings.batching,
        exit: settings.exit.kind(),
        exit_policy: settings.exit.to_string(),
        kv_fill: settings.kv_fill,
        prompts,
        decode_rows_up_to,
        passes,
        measured_us: measured / passes as f64,
        simulated_us: simulated / passes as f64,
        error_pct: 100.0 * (simulated / measured - 1.0),
    };
    classes.into_iter().map(class).collect()
}

/// How a GPU ran the passes of one replay: a line of `graphs.csv`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GraphLine {
    /// Batching policy.
    pub batching: String,
    /// The exit policy.
    pub exit_policy: String,
    /// The KV fill.
    pub kv_fill: String,
    /// Passes of the replay.
    pub passes: usize,
    /// Passes of which every section ran as a CUDA graph.
    pub graph_passes: usize,
    /// Sections that ran as a CUDA graph.
    pub graph_sections: u64,
    /// Sections whose kernels were launched one by one.
    pub eager_sections: u64,
    /// Graphs captured during the replay.
    pub captured: u64,
    /// Graphs dropped during the replay.
    pub dropped: u64,
    /// Mean time of a pass, in microseconds,
    pub pass_us: f64,
    /// until the host had submitted it,
    pub submitted_us: f64,
    /// and from its first kernel on the device to its last.
    pub device_us: f64,
}

/// Writes `graphs.csv` if a GPU ran passes of these replays.
///
/// # Errors
/// If the file cannot be written.
pub fn write_graphs<'a>(folder: &Path, replays: impl IntoIterator<Item = &'a PassRun>) -> Result<()> {
    let lines = graph_lines(replays);
    if lines.is_empty() { Ok(()) } else { Ok(write_csv(&folder.join("graphs.csv"), lines)?) }
}

/// How a GPU ran the passes of replays; nothing of those that ran without one.
fn graph_lines<'a>(replays: impl IntoIterator<Item = &'a PassRun>) -> Vec<GraphLine> {
    let line = |run: &PassRun| {
        let passes: Vec<(&LoggedPass, DevicePass)> =
            run.passes.iter().filter_map(|pass| Some((pass, pass.device?))).collect();
        if passes.is_empty() {
            return None;
        }
        let sum = |count: fn(&DevicePass) -> u32| passes.iter().map(|(_, on)| u64::from(count(on))).sum();
        let mean_us = |time: fn(&LoggedPass, &DevicePass) -> Nanos| {
            passes.iter().map(|(pass, on)| time(pass, on).as_micros_f64()).sum::<f64>() / passes.len() as f64
        };
        Some(GraphLine {
            batching: run.batching.clone(),
            exit_policy: run.exit.clone(),
            kv_fill: run.kv_fill.clone(),
            passes: passes.len(),
            graph_passes: passes.iter().filter(|(_, on)| on.eager == 0).count(),
            graph_sections: sum(|on| on.graphs),
            eager_sections: sum(|on| on.eager),
            captured: sum(|on| on.captured),
            dropped: sum(|on| on.dropped),
            pass_us: mean_us(|pass, _| pass.elapsed),
            submitted_us: mean_us(|_, on| on.submitted),
            device_us: mean_us(|_, on| on.device),
        })
    };
    replays.into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use scheduler::{Lengths, PassRecorder, SteadyLoad, SteadyServer};
    use simulator::{ExitModel, ProfileExecutor};
    use traces::{Component, LatencyProfile, PassOrigin, Point, ProfileMeta};

    use super::*;

    /// A profile by which a pass takes as many microseconds as it has rows.
    fn profile() -> LatencyProfile {
        let point = |rows: u32| Point {
            component: Component::Block,
            rows,
            kv_tokens: 0,
            depths: 1,
            time_us: f64::from(rows),
            spread_us: 0.0,
            repeats: 1,
        };
        let meta = ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: "test".to_owned(),
            fingerprint: "test".to_owned(),
            num_loops: 2,
            device: "none".to_owned(),
            software: "none".to_owned(),
            source: "made up".to_owned(),
            overhead_us: 0.0,
            weight_bytes: 0,
            kv_bytes_per_token: 0,
            memory: None,
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        };
        LatencyProfile { meta, points: vec![point(1), point(64)], mixed_attention: None }
    }

    #[test]
    fn passes_of_a_gpu_are_counted_and_those_of_none_are_not() {
        let pass = |device| LoggedPass { elapsed: Nanos(9_000), device, ..LoggedPass::default() };
        let on = |graphs, eager| {
            Some(DevicePass {
                submitted: Nanos(1_000 * u64::from(graphs)),
                device: Nanos(4_000),
                graphs,
                eager,
                captured: eager,
                dropped: 3,
            })
        };
        let runs = [
            PassRun { passes: vec![pass(on(2, 0)), pass(on(1, 1)), pass(on(3, 0))], ..PassRun::default() },
            PassRun { passes: vec![pass(None)], ..PassRun::default() },
        ];
        let [line] = &graph_lines(&runs)[..] else { panic!("one run is of a GPU") };
        assert_eq!((line.passes, line.graph_passes, line.graph_sections, line.eager_sections), (3, 2, 6, 1));
        assert_eq!((line.captured, line.dropped), (1, 9));
        assert_eq!((line.pass_us, line.submitted_us, line.device_us), (9.0, 2.0, 4.0));
    }

    #[test]
    fn passes_are_compared_by_what_they_are_of() {
        let model = LatencyModel::new(&profile()).unwrap();
        let load = SteadyLoad::new(2, 3, 16, 8, 16, Lengths { prompt: 8, output: 6, longest: 32 });
        let exits = ExitModel::full_depth(2, "test").unwrap();
        let mut server = SteadyServer::new(load, ProfileExecutor::new(&model, &exits, load.settings())).unwrap();
        let mut recorder = PassRecorder::new(load.settings(), PassOrigin::Steady, || 0);
        for _ in 0..500 {
            server.pass(&mut recorder).unwrap();
        }
        let mut slower = profile();
        slower.points.iter_mut().for_each(|point| point.time_us *= 1.5);
        let slower = LatencyModel::new(&slower).unwrap();
        let classes = compare_passes(load.settings(), [&recorder.into_run()], &slower);
        assert_eq!(classes.iter().map(|class| class.passes).sum::<usize>(), 500);
        let of = |prompts, rows| {
            let found = classes.iter().find(|class| (class.prompts, class.decode_rows_up_to) == (prompts, rows));
            found.unwrap_or_else(|| panic!("no passes of {rows} decode rows in {classes:?}"))
        };
        assert_eq!([of(false, 1).measured_us, of(false, 2).measured_us], [1.0, 2.0]);
        assert_eq!(of(false, 4).measured_us, 3.0, "three rows are more than two and at most four");
        assert!(of(true, 0).measured_us > 4.0, "a chunk has up to 8 rows");
        for class in &classes {
            assert!((class.simulated_us / class.measured_us - 1.5).abs() < 1e-9, "{class:?}");
            assert!((class.error_pct - 50.0).abs() < 1e-6, "{class:?}");
        }
    }
}
