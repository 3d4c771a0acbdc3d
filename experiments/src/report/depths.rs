//! Depths over time, over passes and over positions: rows by depth, the timeline of passes, exits.

use std::path::Path;

use anyhow::Result;
use itertools::Itertools;
use scheduler::{Batching, ExitPolicy, KvFill};
use serde::Serialize;
use simulator::Source;
use traces::{ExitTrace, PassLog, PassOrigin, PassRun};

use super::runs::{Names, RunOf};
use super::table::Rounded;
use crate::figures::{DepthRowsLine, read};

/// Ranges of positions at most, of which exits are counted.
const MOST_POSITIONS: usize = 48;

/// Mean rows of a run by depth, in slices of time of the same width.
#[derive(Debug, Serialize)]
pub(super) struct RowsByDepth {
    policy: String,
    source: Source,
    /// Seconds.
    width_s: Rounded,
    /// By depth and slice: decode rows, rows of prompts and of backfill.
    rows: Vec<Vec<Rounded>>,
}

/// The first passes of a run.
#[derive(Debug, Serialize)]
pub(super) struct Passes {
    policy: String,
    /// Share of the capacity at which requests arrived, if they were scaled to one.
    load: Option<f64>,
    /// Passes of the whole run.
    passes: usize,
    /// Microseconds from the first pass.
    start_us: Vec<Rounded>,
    time_us: Vec<Rounded>,
    /// By depth and pass: all rows.
    rows: Vec<Vec<u32>>,
    /// By pass: rows of prompts.
    prompt_rows: Vec<u32>,
}

/// Exits of a recording.
#[derive(Debug, Serialize)]
pub(super) struct Exits {
    model: String,
    source: String,
    generations: usize,
    tokens: usize,
    /// By depth: share of tokens whose prediction is that of full depth.
    agreement: Vec<Rounded>,
    /// First position of each range, from 0, and the tokens in it.
    positions: Vec<usize>,
    position_tokens: Vec<usize>,
    policies: Vec<ExitsOf>,
}

/// At which depths tokens exit under a policy.
#[derive(Debug, Serialize)]
pub(super) struct ExitsOf {
    policy: String,
    mean_depth: Rounded,
    /// By depth and range of positions: share of its tokens.
    shares: Vec<Vec<Rounded>>,
}

/// The runs of `depth_rows.csv`, with at most `most` slices in all, and whether slices were joined for that.
///
/// # Errors
/// If the file does not read.
pub(super) fn rows_by_depth(path: &Path, names: Names, most: usize) -> Result<(Vec<RowsByDepth>, Option<String>)> {
    let lines: Vec<DepthRowsLine> = read(path)?;
    let run_of = |line: &DepthRowsLine| RunOf {
        source: line.source,
        batching: line.batching,
        exit_policy: line.exit_policy.clone(),
        kv_fill: line.kv_fill,
    };
    let by_run = lines.iter().chunk_by(|line| run_of(line));
    let runs: Vec<(RunOf, Vec<&DepthRowsLine>)> =
        by_run.into_iter().map(|(run, lines)| (run, lines.collect())).collect();
    let of_a_run = (most / runs.len().max(1)).max(1);
    let mut joined = 1;
    let mut rows = Vec::new();
    for (run, lines) in runs {
        let depths = lines.iter().map(|line| line.depth as usize + 1).max().unwrap_or_default();
        let mut slices: Vec<Vec<f64>> = vec![Vec::new(); depths];
        for line in &lines {
            slices[line.depth as usize].push(line.decode_rows + line.prefill_rows + line.backfill_rows);
        }
        let together = slices[0].len().div_ceil(of_a_run).max(1);
        joined = joined.max(together);
        let mean = |slices: &[f64]| Rounded(three_digits(slices.iter().sum::<f64>() / slices.len() as f64));
        rows.push(RowsByDepth {
            policy: names.run(&run),
            source: run.source,
            width_s: Rounded(lines[0].width_s * together as f64),
            rows: slices.iter().map(|slices| slices.chunks(together).map(mean).collect()).collect(),
        });
    }
    let note = format!("depth_rows.csv: means over up to {joined} slices are in the page");
    Ok((rows, (joined > 1).then_some(note)))
}

/// Rows in a picture need no more.
fn three_digits(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The first passes of the first replay of each run in a pass log, at most `most` in all, and whether there were more.
///
/// # Errors
/// If the log does not read.
pub(super) fn timeline(log: &PassLog, names: Names, most: usize) -> Result<(Vec<Passes>, Option<String>)> {
    let is_first = |run: &&PassRun| run.origin == PassOrigin::Replay && run.repeat == 0 && !run.passes.is_empty();
    let runs: Vec<&PassRun> = log.runs.iter().filter(is_first).collect();
    let of_a_run = (most / runs.len().max(1)).max(1);
    let mut timeline = Vec::new();
    for run in &runs {
        let shown = &run.passes[..run.passes.len().min(of_a_run)];
        let (batching, kv_fill): (Batching, KvFill) = (run.batching.parse()?, run.kv_fill.parse()?);
        let first = shown[0].start;
        let depths = shown.iter().map(|pass| pass.rows_by_depth.len()).max().unwrap_or_default();
        let rows = |depth: usize| {
            let of = |pass: &traces::LoggedPass| {
                pass.rows_by_depth.get(depth).map_or(0, |rows| rows.decode + rows.prompt + rows.backfill)
            };
            shown.iter().map(of).collect()
        };
        timeline.push(Passes {
            policy: names.policy(batching, &run.exit, kv_fill),
            load: run.load,
            passes: run.passes.len(),
            start_us: shown.iter().map(|pass| Rounded(pass.start.since(first).as_micros_f64().round())).collect(),
            time_us: shown.iter().map(|pass| Rounded(pass.elapsed.as_micros_f64().round())).collect(),
            rows: (0..depths).map(rows).collect(),
            prompt_rows: shown.iter().map(|pass| pass.rows_by_depth.iter().map(|rows| rows.prompt).sum()).collect(),
        });
    }
    let more = runs.iter().any(|run| run.passes.len() > of_a_run);
    let note = format!("passes.parquet: the first {of_a_run} passes of the first replay of each run are in the page");
    Ok((timeline, more.then_some(note)))
}

/// Exits by depth and position: of the oracle, of thresholds on signals that were recorded, and, of a recording under exit
/// policies, as they were served.
pub(super) fn exits(trace: &ExitTrace, policies: &[String]) -> Exits {
    let longest = (0..trace.num_generations()).map(|index| trace.generation(index).len()).max().unwrap_or_default();
    let width = longest.div_ceil(MOST_POSITIONS).max(1);
    let counter = Counter { trace, width, ranges: longest.div_ceil(width) };
    let mut found = vec![counter.count("oracle", |token| Some(trace.oracle_depth(token)))];
    for policy in policies.iter().unique() {
        let Ok(ExitPolicy::Confidence { signal, threshold }) = policy.parse() else { continue };
        if trace.recorded.contains(signal) {
            let name = policy.trim_start_matches("confidence:").replace(':', " ");
            found.push(counter.count(&name, |token| Some(trace.confident_depth(token, signal, threshold))));
        }
    }
    if let (Some(served), Some(recording)) = (&trace.served, &trace.meta.recording) {
        for (policy, name) in (0..).zip(&recording.policies) {
            let generation_of = |token: usize| trace.starts.partition_point(|&start| start as usize <= token) - 1;
            let served_depth = |token: usize| {
                let is_of = served.policies[generation_of(token)] == policy;
                is_of.then_some(served.tokens[token].exit_depth as usize)
            };
            found.push(counter.count(&format!("{} as served", name.replace(':', " ")), served_depth));
        }
    }
    let mut position_tokens = vec![0; counter.ranges];
    (0..trace.num_generations()).for_each(|index| {
        (0..trace.generation(index).len()).for_each(|position| position_tokens[position / width] += 1);
    });
    Exits {
        model: trace.meta.model.clone(),
        source: trace.meta.source.clone(),
        generations: trace.num_generations(),
        tokens: trace.num_tokens(),
        agreement: (0..trace.num_loops()).map(|depth| Rounded(trace.agreement_at(depth))).collect(),
        positions: (0..counter.ranges).map(|range| range * width).collect(),
        position_tokens,
        policies: found,
    }
}

/// Counts exits by depth and range of positions.
struct Counter<'t> {
    trace: &'t ExitTrace,
    /// Positions of a range.
    width: usize,
    ranges: usize,
}

impl Counter<'_> {
    /// The shares of the tokens that have an exit depth.
    fn count(&self, policy: &str, exit_depth: impl Fn(usize) -> Option<usize>) -> ExitsOf {
        let mut counts = vec![vec![0_usize; self.ranges]; self.trace.num_loops()];
        let (mut tokens, mut passes) = (vec![0_usize; self.ranges], 0);
        for index in 0..self.trace.num_generations() {
            for (position, token) in self.trace.generation(index).enumerate() {
                let Some(depth) = exit_depth(token) else { continue };
                counts[depth][position / self.width] += 1;
                tokens[position / self.width] += 1;
                passes += depth + 1;
            }
        }
        let shares = |counts: &Vec<usize>| {
            let share = |(&count, &of): (&usize, &usize)| Rounded(three_digits(count as f64 / of.max(1) as f64));
            counts.iter().zip(&tokens).map(share).collect()
        };
        ExitsOf {
            policy: policy.to_owned(),
            mean_depth: Rounded(passes as f64 / tokens.iter().sum::<usize>().max(1) as f64),
            shares: counts.iter().map(shares).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use traces::{DepthRows, ExitTraceMeta, LoggedPass, Nanos, PassLogMeta, Signals};

    use super::*;

    fn numbers(values: &[Rounded]) -> Vec<f64> {
        values.iter().map(|&Rounded(value)| value).collect()
    }

    #[test]
    fn exits_are_counted_by_depth_and_position() {
        let mut trace = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "m".into(),
            fingerprint: "f".into(),
            num_loops: 2,
            source: "s".into(),
            recording: None,
        });
        let row = |top1, token| (Signals { top1, ..Signals::default() }, token);
        // Of the first generation the first token agrees at depth 0; of the second, none does.
        trace.push_generation(&[row(0.9, 1), row(0.9, 1), row(0.9, 2), row(0.9, 3)]);
        trace.push_generation(&[row(0.1, 2), row(0.9, 3)]);
        let policies = ["confidence:top1:0.5", "confidence:gate:0.5", "none"].map(str::to_owned);
        let exits = exits(&trace, &policies);
        assert_eq!((exits.generations, exits.tokens, exits.position_tokens), (2, 3, vec![2, 1]));
        let names: Vec<&str> = exits.policies.iter().map(|exits| exits.policy.as_str()).collect();
        assert_eq!(names, ["oracle", "top1 0.5"], "the gate was not recorded, and `none` says nothing");
        let shares: Vec<_> =
            exits.policies.iter().map(|exits| [0, 1].map(|depth| numbers(&exits.shares[depth]))).collect();
        assert_eq!(shares, [[[0.5, 0.0], [0.5, 1.0]], [[0.5, 1.0], [0.5, 0.0]]]);
        assert_eq!(exits.policies[1].mean_depth, Rounded(4.0 / 3.0));
    }

    #[test]
    fn a_timeline_has_the_first_passes_of_the_first_replay() {
        let pass = |micros: u64, rows: &[u32]| LoggedPass {
            start: Nanos(micros * 1000),
            elapsed: Nanos(1500),
            rows_by_depth: rows.iter().map(|&decode| DepthRows { decode, prompt: 1, backfill: 0 }).collect(),
            ..LoggedPass::default()
        };
        let run = |origin, repeat| PassRun {
            origin,
            batching: "depth".into(),
            exit: "none".into(),
            kv_fill: "reuse".into(),
            load: None,
            repeat,
            passes: vec![pass(5, &[2]), pass(8, &[1, 3]), pass(20, &[1])],
        };
        let runs = vec![run(PassOrigin::Grid, 0), run(PassOrigin::Replay, 1), run(PassOrigin::Replay, 0)];
        let (timeline, note) =
            timeline(&PassLog { meta: PassLogMeta::new("m", "f", 2, "d"), runs }, Names::of([]), 2).unwrap();
        let [passes] = &timeline[..] else { panic!("{timeline:?}") };
        assert_eq!((passes.passes, &passes.prompt_rows), (3, &vec![1, 2]));
        assert_eq!((numbers(&passes.start_us), numbers(&passes.time_us)), (vec![0.0, 3.0], vec![2.0, 2.0]));
        assert_eq!(passes.rows, [[3, 2], [0, 4]]);
        assert!(note.unwrap().contains("the first 2 passes"));
    }
}
