//! The figures of a folder of results, drawn from its files alone.

use std::path::Path;

use anyhow::{Context, Result};
use plots::{Estimate, Figure, Origin, Policy, PolicyLine, Prediction, Quantity, TradeLine, TradeOff, TradePoint};
use scheduler::{Batching, KvFill};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use simulator::{Source, Summary};
use traces::ExitTrace;

use crate::compare::{E2E, E2E_P99, GOODPUT, THROUGHPUT, TPOT, TTFT};
use crate::exact_match::ALL_CLASSES;
use crate::frontier::QualityMeasure;
use crate::quality::{EXACT_MATCH, QualityLine, TOKEN_AGREEMENT};
use crate::speedup::{is_attainable, is_baseline};

/// Summaries over batch limits.
pub const SWEEP_MAX_BATCH: &str = "sweep_max_batch.csv";
/// Name of the line of all baselines.
const BASELINES: &str = "baselines";
/// Summaries over thresholds.
pub const SWEEP_THRESHOLD: &str = "sweep_threshold.csv";

/// What every figure of a run says of its origin.
#[derive(Clone, Debug)]
pub struct Caption {
    /// Model and requests.
    pub setting: String,
    /// What the times were measured on.
    pub device: String,
}

/// A run's columns in files that hold several runs.
#[derive(Clone, Debug, Deserialize)]
struct RequestLine {
    source: Source,
    batching: Batching,
    exit_policy: String,
    /// Absent in results of earlier versions.
    #[serde(default)]
    kv_fill: KvFill,
    ttft_ms: f64,
    tpot_ms: f64,
}

/// A line of `depth_rows.csv`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct DepthRowsLine {
    pub source: Source,
    pub batching: Batching,
    pub exit_policy: String,
    /// Absent in results of earlier versions.
    #[serde(default)]
    pub kv_fill: KvFill,
    pub start_s: f64,
    pub width_s: f64,
    pub depth: u32,
    pub decode_rows: f64,
    pub prefill_rows: f64,
    pub backfill_rows: f64,
}

/// What a figure needs of a line of `validation.csv`, `speedups.csv`, `absolute.csv` or `at_rates.csv`.
#[derive(Clone, Debug, Deserialize)]
struct ComparisonLine {
    batching: Batching,
    /// Absent in results of earlier versions, where `exit` names the kind of policy.
    #[serde(default)]
    exit_policy: String,
    #[serde(default)]
    exit: String,
    metric: String,
    measured: f64,
    /// Called `simulated` in results of earlier versions.
    #[serde(alias = "simulated")]
    predicted: f64,
}

/// Draws all figures that the files in `results` have the data for, into a folder `to`.
///
/// # Errors
/// If a file does not read or a figure cannot be written.
pub fn draw(results: &Path, to: &Path, caption: &Caption) -> Result<()> {
    let figures = Figures::new(results, to, caption)?;
    figures.frontier()?;
    figures.runs()?;
    figures.rows_by_depth()?;
    figures.validation()?;
    figures.sweeps()?;
    figures.exits()
}

struct Figures<'a> {
    results: &'a Path,
    to: &'a Path,
    caption: &'a Caption,
    summaries: Vec<Summary>,
    /// Measured runs where there are any.
    source: Source,
}

impl<'a> Figures<'a> {
    fn new(results: &'a Path, to: &'a Path, caption: &'a Caption) -> Result<Self> {
        let summaries: Vec<Summary> = read(&results.join("summary.csv"))?;
        let measured = summaries.iter().any(|summary| summary.source == Source::Measured);
        let source = if measured { Source::Measured } else { Source::Simulated };
        Ok(Self { results, to, caption, summaries, source })
    }

    fn figure(&self, name: &str, title: impl Into<String>, origin: Origin) -> Figure {
        Figure {
            folder: self.to.to_owned(),
            name: name.to_owned(),
            title: title.into(),
            setting: self.caption.setting.clone(),
            device: self.caption.device.clone(),
            origin,
        }
    }

    fn origin(&self) -> Origin {
        match self.source {
            Source::Measured => Origin::Measured,
            Source::Simulated => Origin::Simulated,
        }
    }

    /// Throughput against the quality of what was served, where that was measured.
    fn frontier(&self) -> Result<()> {
        let path = self.results.join("quality.csv");
        let qualities: Vec<QualityLine> = if path.exists() { read(&path)? } else { Vec::new() };
        let panel = |measure| frontier_panel(measure, &self.summaries, &qualities);
        let panels: Vec<TradeOff> = QualityMeasure::ALL.into_iter().filter_map(panel).collect();
        if panels.is_empty() {
            return Ok(());
        }
        let title = "Throughput against the quality of the served text: baselines and exit policies";
        Ok(plots::or_left_out(plots::frontier(&self.figure("frontier", title, Origin::Measured), &panels))?)
    }

    fn runs(&self) -> Result<()> {
        let both = match self.source {
            Source::Measured => Origin::MeasuredAndSimulated,
            Source::Simulated => Origin::Simulated,
        };
        let policies = by_policy(&self.summaries, |run| (run.batching, &run.exit_policy, run.kv_fill));
        let is_full_depth = |runs: &[&Summary]| runs[0].batching == Batching::Sequence && runs[0].exit == "none";
        if let Some((full_depth, _)) = policies.iter().find(|(_, runs)| is_full_depth(runs)) {
            let figure = self.figure("throughput", "Throughput and speed-up by batching and exit policy", both);
            plots::or_left_out(plots::speedup(&figure, &throughputs(&self.summaries), full_depth))?;
        }
        let requests: Vec<RequestLine> = read(&self.results.join("requests.csv"))?;
        let requests: Vec<RequestLine> = requests.into_iter().filter(|line| line.source == self.source).collect();
        let title = "Distributions of time to first token and time per output token";
        plots::or_left_out(plots::latency_cdfs(&self.figure("latency", title, self.origin()), &latencies(&requests)))?;
        Ok(())
    }

    fn rows_by_depth(&self) -> Result<()> {
        let lines: Vec<DepthRowsLine> = read(&self.results.join("depth_rows.csv"))?;
        for batching in Batching::ALL {
            let is_shown = |line: &&DepthRowsLine| {
                line.source == self.source && line.batching == batching && line.exit_policy.starts_with("confidence")
            };
            let shown: Vec<&DepthRowsLine> = lines.iter().filter(is_shown).collect();
            let Some((first, fill)) = shown.first().map(|line| (&line.exit_policy, line.kv_fill)) else { continue };
            let is_of_run = |line: &&DepthRowsLine| line.exit_policy == *first && line.kv_fill == fill;
            let of_one_run: Vec<&DepthRowsLine> = shown.iter().copied().filter(is_of_run).collect();
            let title = format!("Rows of each depth in the running pass: {}, {first}", batching_label(batching));
            let figure = self.figure(&format!("rows-by-depth-{batching}"), title, self.origin());
            plots::or_left_out(plots::rows_by_depth(&figure, &pass_rows(&of_one_run)))?;
        }
        Ok(())
    }

    fn validation(&self) -> Result<()> {
        for (table, title, metric) in [
            ("validation", "Predicted against measured", value_label as fn(&str) -> Option<&'static str>),
            ("speedups", "Predicted against measured ratios to sequence-wise batching without exits", ratio_label),
            ("absolute", "Predicted against measured values in a closed loop", value_label),
            ("at_rates", "Predicted against measured values at shares of the capacity", value_label),
        ] {
            let path = self.results.join(format!("{table}.csv"));
            if !path.exists() {
                continue;
            }
            let lines: Vec<ComparisonLine> = read(&path)?;
            let points: Vec<Prediction> = lines.iter().filter_map(|line| prediction(line, metric)).collect();
            let figure = self.figure(&table.replace('_', "-"), title, Origin::MeasuredAndSimulated);
            plots::or_left_out(plots::predictions(&figure, &points))?;
        }
        Ok(())
    }

    fn sweeps(&self) -> Result<()> {
        let by_batch = self.results.join(SWEEP_MAX_BATCH);
        if by_batch.exists() {
            let lines =
                policy_lines(&read(&by_batch)?, |summary| (f64::from(summary.max_batch), summary.throughput_tok_s));
            let figure = self.figure("throughput-by-batch", "Throughput against batch limit", Origin::Simulated);
            plots::or_left_out(plots::throughput_by_batch(&figure, &lines))?;
        }
        let by_threshold = self.results.join(SWEEP_THRESHOLD);
        if by_threshold.exists() {
            let summaries: Vec<Summary> = read(&by_threshold)?;
            let title = "Throughput and agreement of exits, over exact keys and values, against the threshold";
            plots::or_left_out(plots::thresholds(
                &self.figure("thresholds", title, Origin::Simulated),
                &threshold_lines(&summaries),
            ))?;
            let title = "Throughput against agreement of exits, over exact keys and values";
            plots::or_left_out(plots::pareto(
                &self.figure("pareto", title, Origin::Simulated),
                &[trade_off(&summaries)],
            ))?;
        }
        Ok(())
    }

    fn exits(&self) -> Result<()> {
        let folder = self.results.join("exits");
        if !folder.exists() {
            return Ok(());
        }
        let trace = ExitTrace::read(&folder)?;
        let figure = self.figure("exit-depths", "Where tokens could exit", Origin::Measured);
        Ok(plots::or_left_out(plots::exit_depths(&figure, &[exit_depths(&trace)]))?)
    }
}

/// The lines of a CSV file.
///
/// # Errors
/// If it does not read.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let lines = csv::Reader::from_path(path).and_then(|reader| reader.into_deserialize().collect());
    lines.with_context(|| path.display().to_string())
}

fn batching_label(batching: Batching) -> &'static str {
    match batching {
        Batching::Vanilla => "vanilla",
        Batching::Sequence => "sequence-wise",
        Batching::Depth => "depth-wise",
    }
}

/// `none` and `confidence:top1:0.5` as people read them.
fn exit_label(exit_policy: &str) -> String {
    if exit_policy == "none" { "no exit".to_owned() } else { exit_policy.replace(':', " ") }
}

/// Policies as figures call them.
pub fn policy(batching: Batching, exit_policy: &str) -> Policy {
    Policy::new(batching_label(batching), exit_label(exit_policy))
}

/// Policies whose runs belong together: batching, exit policy and KV fill.
type PolicyKey<'a> = (Batching, &'a str, KvFill);

/// Groups items by batching policy, exit policy and KV fill, in the order in which they first come. The fill is named
/// where the same policies run under several.
fn by_policy<T>(items: &[T], key: impl Fn(&T) -> PolicyKey<'_>) -> Vec<(Policy, Vec<&T>)> {
    let mut groups: Vec<(PolicyKey<'_>, Vec<&T>)> = Vec::new();
    for item in items {
        match groups.iter_mut().find(|(group, _)| *group == key(item)) {
            Some((_, members)) => members.push(item),
            None => groups.push((key(item), vec![item])),
        }
    }
    let keys: Vec<PolicyKey<'_>> = groups.iter().map(|(group, _)| *group).collect();
    let named = |(batching, exit, fill): PolicyKey<'_>| match keys
        .iter()
        .any(|other| (other.0, other.1) == (batching, exit) && other.2 != fill)
    {
        true => Policy::new(batching_label(batching), format!("{}, {fill}", exit_label(exit))),
        false => policy(batching, exit),
    };
    groups.into_iter().map(|(group, members)| (named(group), members)).collect()
}

fn throughputs(summaries: &[Summary]) -> Vec<plots::PolicyThroughput> {
    let throughput_of = |runs: &[&Summary], source| {
        runs.iter().find(|summary| summary.source == source).map(|summary| summary.throughput_tok_s)
    };
    by_policy(summaries, |summary| (summary.batching, &summary.exit_policy, summary.kv_fill))
        .into_iter()
        .map(|(policy, runs)| plots::PolicyThroughput {
            policy,
            measured: throughput_of(&runs, Source::Measured),
            simulated: throughput_of(&runs, Source::Simulated),
        })
        .collect()
}

fn latencies(requests: &[RequestLine]) -> Vec<plots::PolicyLatencies> {
    by_policy(requests, |line| (line.batching, &line.exit_policy, line.kv_fill))
        .into_iter()
        .map(|(policy, lines)| plots::PolicyLatencies {
            policy,
            ttft_ms: lines.iter().map(|line| line.ttft_ms).collect(),
            tpot_ms: lines.iter().map(|line| line.tpot_ms).filter(|tpot| tpot.is_finite()).collect(),
        })
        .collect()
}

fn pass_rows(lines: &[&DepthRowsLine]) -> Vec<plots::PassRows> {
    let mut slices: Vec<plots::PassRows> = Vec::new();
    for line in lines {
        if line.depth == 0 {
            let (start_s, end_s) = (line.start_s, line.start_s + line.width_s);
            slices.push(plots::PassRows { start_s, end_s, rows: Vec::new() });
        }
        if let Some(slice) = slices.last_mut() {
            slice.rows.push(line.decode_rows + line.prefill_rows + line.backfill_rows);
        }
    }
    slices
}

fn value_label(metric: &str) -> Option<&'static str> {
    match metric {
        THROUGHPUT => Some("throughput (tokens/s)"),
        TTFT => Some("mean TTFT (ms)"),
        TPOT => Some("mean TPOT (ms)"),
        E2E_P99 => Some("p99 end-to-end latency (ms)"),
        GOODPUT => Some("goodput (requests/s)"),
        _ => None,
    }
}

fn ratio_label(metric: &str) -> Option<&'static str> {
    match metric {
        THROUGHPUT => Some("ratio of throughput"),
        TPOT => Some("ratio of mean TPOT"),
        E2E => Some("ratio of mean end-to-end latency"),
        E2E_P99 => Some("ratio of p99 end-to-end latency"),
        _ => None,
    }
}

/// A point of a panel that `label` names; `None` if the metric has no panel, or the value no place on it.
fn prediction(line: &ComparisonLine, label: impl Fn(&str) -> Option<&'static str>) -> Option<Prediction> {
    let exit = if line.exit_policy.is_empty() { &line.exit } else { &line.exit_policy };
    Some(Prediction {
        metric: label(&line.metric)?.to_owned(),
        series: format!("{}, {}", batching_label(line.batching), exit_label(exit)),
        measured: line.measured,
        predicted: line.predicted,
    })
}

fn policy_lines(summaries: &[Summary], point: fn(&Summary) -> (f64, f64)) -> Vec<PolicyLine> {
    by_policy(summaries, |summary| (summary.batching, sweep_name(summary), summary.kv_fill))
        .into_iter()
        .map(|(policy, runs)| PolicyLine { policy, points: runs.into_iter().map(point).collect() })
        .collect()
}

/// Runs that differ only in their threshold are one line.
fn sweep_name(summary: &Summary) -> &str {
    exit_name(&summary.exit_policy, summary.threshold.is_some())
}

/// Name of an exit policy without its threshold.
pub fn exit_name(exit_policy: &str, has_threshold: bool) -> &str {
    match exit_policy.rsplit_once(':') {
        Some((name, _)) if has_threshold => name,
        _ => exit_policy,
    }
}

/// A panel of the frontier: a line of baselines and one for each exit signal, under each batching policy. `None` if the
/// quality was not measured.
fn frontier_panel(measure: QualityMeasure, summaries: &[Summary], qualities: &[QualityLine]) -> Option<TradeOff> {
    let measured: Vec<Summary> = summaries
        .iter()
        .filter(|summary| summary.source == Source::Measured && measure.of(summary).is_some())
        .cloned()
        .collect();
    let series = |summary: &Summary| match is_baseline(summary) {
        true => BASELINES.to_owned(),
        false => format!("{}{}", sweep_name(summary), fill_label(summary, &measured)),
    };
    let mut lines: Vec<TradeLine> = Vec::new();
    for summary in &measured {
        let policy = policy(summary.batching, &series(summary));
        let place = lines.iter().position(|line| line.policy == policy).unwrap_or(lines.len());
        if place == lines.len() {
            lines.push(TradeLine { policy, attainable: is_attainable(summary), points: Vec::new() });
        }
        lines[place].points.push(frontier_point(measure, summary, qualities));
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.x.value.total_cmp(&b.x.value));
    }
    let x = match measure {
        QualityMeasure::Agreement => Quantity::Agreement,
        QualityMeasure::Accuracy => Quantity::Accuracy,
    };
    (!lines.is_empty()).then_some(TradeOff { x, y: Quantity::Throughput, lines })
}

/// The name of a KV fill where runs differ in it.
fn fill_label(summary: &Summary, others: &[Summary]) -> String {
    let differ = others.iter().any(|other| other.kv_fill != summary.kv_fill);
    if differ { format!(" {}", summary.kv_fill) } else { String::new() }
}

fn frontier_point(measure: QualityMeasure, summary: &Summary, qualities: &[QualityLine]) -> TradePoint {
    let metric = match measure {
        QualityMeasure::Agreement => TOKEN_AGREEMENT,
        QualityMeasure::Accuracy => EXACT_MATCH,
    };
    let is_of = |line: &&QualityLine| {
        let run = (line.batching, line.exit_policy.as_str(), line.kv_fill);
        let estimate = (line.metric.as_str(), line.class.as_str());
        run == (summary.batching, summary.exit_policy.as_str(), summary.kv_fill) && estimate == (metric, ALL_CLASSES)
    };
    let half_width = qualities.iter().find(is_of).and_then(|line| Some((line.high? - line.low?) / 2.0));
    TradePoint {
        x: Estimate { value: measure.of(summary).unwrap_or_default(), half_width: half_width.unwrap_or_default() },
        y: Estimate { value: summary.throughput_tok_s, half_width: 0.0 },
        label: match summary.threshold {
            Some(threshold) => threshold.to_string(),
            None if is_baseline(summary) => exit_label(&summary.exit_policy),
            None => String::new(),
        },
    }
}

fn threshold_lines(summaries: &[Summary]) -> Vec<plots::ThresholdLine> {
    by_policy(summaries, |summary| (summary.batching, sweep_name(summary), summary.kv_fill))
        .into_iter()
        .map(|(policy, runs)| plots::ThresholdLine {
            policy,
            points: runs.into_iter().filter_map(threshold_point).collect(),
        })
        .collect()
}

fn threshold_point(summary: &Summary) -> Option<plots::ThresholdPoint> {
    Some(plots::ThresholdPoint {
        threshold: f64::from(summary.threshold?),
        throughput: summary.throughput_tok_s,
        agreement: summary.token_agreement?,
    })
}

fn trade_off(summaries: &[Summary]) -> TradeOff {
    let exactly = |value| Estimate { value, half_width: 0.0 };
    let line = |line: plots::ThresholdLine| TradeLine {
        policy: line.policy,
        attainable: true,
        points: line
            .points
            .iter()
            .map(|point| TradePoint {
                x: exactly(point.throughput),
                y: exactly(point.agreement),
                // As it was given: thresholds have single precision.
                label: (point.threshold as f32).to_string(),
            })
            .collect(),
    };
    let lines = threshold_lines(summaries).into_iter().map(line).collect();
    TradeOff { x: Quantity::Throughput, y: Quantity::Agreement, lines }
}

/// Where the tokens of a trace could exit.
pub fn exit_depths(trace: &ExitTrace) -> plots::ExitDepths {
    let depths = 0..trace.num_loops();
    plots::ExitDepths {
        name: trace.meta.model.clone(),
        exiting: trace.oracle_shares(),
        agreement: depths.map(|depth| trace.agreement_at(depth)).collect(),
    }
}
