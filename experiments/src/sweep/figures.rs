//! The figures of a sweep and of a capacity search, drawn from their summaries alone.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use plots::{Estimate, Figure, Origin, Policy, PolicyCapacity, Quantity, TradeLine, TradeOff, TradePoint};
use simulator::Objectives;

use super::spec::SweepSpec;
use crate::figures::{exit_name, policy, read};
use crate::reporter::Reporter;

/// Means over seeds of a sweep.
pub const SWEEP_SUMMARY: &str = "sweep-summary.csv";
/// Means over seeds of a capacity search.
pub const CAPACITY_SUMMARY: &str = "capacity-summary.csv";
/// What a capacity search adds to a line.
pub const CAPACITY: &str = "capacity_req_s";

/// Columns of settings beside the policies: each combination has figures of its own.
const FACETS: [&str; 7] = ["system", "device_memory", "kv_fill", "max_batch", "token_budget", "exit_wait", RATE.1];
/// The same for the chunk, whose default differs by policy.
const CHUNK: &str = "prefill_chunk";
/// Combinations that are drawn at most.
const MOST_FACETS: usize = 12;
/// Policies whose lines can still be told apart.
const MOST_LINES: usize = 9;

/// A quantity and its column.
type Metric = (Quantity, &'static str);

const RATE: Metric = (Quantity::Rate, "rate_per_s");
const THROUGHPUT: Metric = (Quantity::Throughput, "throughput_tok_s");
const AGREEMENT: Metric = (Quantity::Agreement, "token_agreement");
const TTFT: Metric = (Quantity::Latency("p99 time to first token"), "ttft_p99_ms");
const TPOT: Metric = (Quantity::Latency("p99 time per output token"), "tpot_p99_ms");

/// Draws what throughput costs in agreement and in latency, and latency against the rate where that varies, from the
/// summary in `results` into a folder `to`.
///
/// # Errors
/// If the summary does not read or a figure cannot be written.
pub fn draw_sweep(results: &Path, to: &Path, title: &str, reporter: &mut dyn Reporter) -> Result<()> {
    let lines = read_lines(&results.join(SWEEP_SUMMARY))?;
    for facet in facets(&lines, &[], reporter) {
        let policies = facet.by_policy(Name::WithoutThreshold, "threshold")?;
        let draw = |name, heading, panels: &[(Metric, Metric)]| {
            facet.draw_trade_offs(&facet.figure(to, name, heading, title), &policies, panels)
        };
        draw("pareto-agreement", "Throughput against agreement of exits", &[(THROUGHPUT, AGREEMENT)])?;
        draw("pareto-latency", "Throughput against latency", &[(THROUGHPUT, TTFT), (THROUGHPUT, TPOT)])?;
    }
    if varies(&lines, RATE.1) {
        for facet in facets(&lines, &[RATE.1], reporter) {
            let mut policies = facet.by_policy(Name::Whole, RATE.1)?;
            policies.truncate(MOST_LINES);
            let figure = facet.figure(to, "latency-by-rate", "Latency against the request rate", title);
            facet.draw_trade_offs(&figure, &policies, &[(RATE, TTFT), (RATE, TPOT)])?;
        }
    }
    Ok(())
}

/// Draws the highest rate of every policy on every system, from the summary in `results` into a folder `to`.
///
/// # Errors
/// If the summary does not read or a figure cannot be written.
pub fn draw_capacity(results: &Path, to: &Path, spec: &SweepSpec, reporter: &mut dyn Reporter) -> Result<()> {
    let lines = read_lines(&results.join(CAPACITY_SUMMARY))?;
    let objectives = spec.objectives.map_or(String::new(), |objectives| describe_objectives(&objectives));
    let share = 100.0 * spec.capacity.share;
    let heading = format!("Highest request rate at which {share}% of requests meet {objectives}");
    for facet in facets(&lines, &["system"], reporter) {
        let mut systems: Vec<String> = facet.lines.iter().map(|line| line.text("system").to_owned()).collect();
        systems.dedup();
        let capacity = |(policy, members): (Policy, Vec<&Line>)| {
            let rate = |system: &String| {
                members.iter().find(|line| line.text("system") == system).and_then(|line| line.estimate(CAPACITY))
            };
            PolicyCapacity { policy, rates: systems.iter().map(rate).collect() }
        };
        let policies = facet.by_policy(Name::Whole, "system")?.into_iter().map(capacity);
        let figure = facet.figure(to, "capacity", &heading, &spec.title);
        plots::or_left_out(plots::capacities(&figure, &systems, &policies.collect::<Vec<_>>()))?;
    }
    Ok(())
}

/// The lines of a summary, at least one.
fn read_lines(path: &Path) -> Result<Vec<Line>> {
    let lines: Vec<Line> = read(path)?.into_iter().map(Line).collect();
    let first =
        lines.first().with_context(|| format!("{}: found no line, expected one for each point", path.display()))?;
    ensure!(
        first.0.contains_key(THROUGHPUT.1),
        "{}: found no column `{}`, expected those of a summary",
        path.display(),
        THROUGHPUT.1
    );
    Ok(lines)
}

fn describe_objectives(objectives: &Objectives) -> String {
    let &Objectives { ttft_ms, tpot_ms, e2e_ms } = objectives;
    let bounds = [("TTFT", ttft_ms), ("TPOT", tpot_ms), ("end-to-end latency", e2e_ms)];
    let bound = |(name, bound): (&str, Option<f64>)| bound.map(|bound| format!("{name} {bound} ms"));
    bounds.into_iter().filter_map(bound).collect::<Vec<_>>().join(", ")
}

/// A line of a summary, by column.
#[derive(Clone, Debug)]
struct Line(HashMap<String, String>);

impl Line {
    fn text(&self, column: &str) -> &str {
        self.0.get(column).map_or("", String::as_str)
    }

    fn number(&self, column: &str) -> Option<f64> {
        self.text(column).parse().ok().filter(|number: &f64| number.is_finite())
    }

    /// A metric with its confidence interval; none where no run had it.
    fn estimate(&self, metric: &str) -> Option<Estimate> {
        let half_width = self.number(&format!("{metric}_ci95")).unwrap_or(0.0);
        Some(Estimate { value: self.number(metric)?, half_width })
    }

    /// The policies, as figures call them.
    fn policy(&self, name: Name) -> Result<Policy> {
        let exit = self.text("exit_policy");
        let exit = match name {
            Name::Whole => exit,
            Name::WithoutThreshold => exit_name(exit, !self.text("threshold").is_empty()),
        };
        Ok(policy(self.text("batching").parse()?, exit))
    }

    fn describe(&self, column: &str) -> String {
        let text = self.text(column);
        match (column, self.number(column)) {
            ("device_memory", Some(bytes)) => ByteSize(bytes as u64).display().iec().to_string(),
            ("kv_fill", _) => format!("KV fill {text}"),
            ("max_batch", Some(batch)) => format!("batch {batch}"),
            ("token_budget", Some(rows)) => format!("token budget {rows}"),
            ("prefill_chunk", Some(tokens)) => format!("chunk {tokens}"),
            ("exit_wait", Some(passes)) => format!("exit wait {passes}"),
            ("rate_per_s", Some(rate)) => format!("{rate} requests/s"),
            _ => text.to_owned(),
        }
    }
}

/// Whether exit policies that differ in their threshold alone are one or several.
#[derive(Clone, Copy)]
enum Name {
    Whole,
    WithoutThreshold,
}

/// Lines of the same settings but for the policies and what a figure runs along.
struct Facet<'l> {
    /// What sets them apart from others, for people.
    description: Vec<String>,
    lines: Vec<&'l Line>,
}

fn varies(lines: &[Line], column: &str) -> bool {
    lines.iter().any(|line| line.text(column) != lines[0].text(column))
}

/// Whether one policy of one system ran with several chunks.
fn chunk_varies(lines: &[Line]) -> bool {
    let policy =
        |line: &Line| ["system", "batching", "kv_fill", "token_budget"].map(|column| line.text(column).to_owned());
    let mut chunks: HashMap<[String; 4], &str> = HashMap::new();
    lines.iter().any(|line| *chunks.entry(policy(line)).or_insert(line.text(CHUNK)) != line.text(CHUNK))
}

/// Lines with the same cells in the columns of settings, except these, in the order in which they first come.
fn facets<'l>(lines: &'l [Line], except: &[&str], reporter: &mut dyn Reporter) -> Vec<Facet<'l>> {
    let columns = FACETS.into_iter().filter(|column| !except.contains(column) && varies(lines, column));
    let varying: Vec<&str> = columns.chain(chunk_varies(lines).then_some(CHUNK)).collect();
    let mut facets: Vec<Facet<'l>> = Vec::new();
    for line in lines {
        let description: Vec<String> = varying.iter().map(|column| line.describe(column)).collect();
        match facets.iter_mut().find(|facet| facet.description == description) {
            Some(facet) => facet.lines.push(line),
            None => facets.push(Facet { description, lines: vec![line] }),
        }
    }
    if facets.len() > MOST_FACETS {
        reporter.note(&format!("figures are drawn for the first {MOST_FACETS} of {} settings", facets.len()));
        facets.truncate(MOST_FACETS);
    }
    facets
}

impl Facet<'_> {
    fn figure(&self, to: &Path, name: &str, title: &str, experiment: &str) -> Figure {
        let mut devices: Vec<&str> = self.lines.iter().map(|line| line.text("device")).collect();
        devices.dedup();
        let seeds = self.lines[0].text("seeds");
        let sure = if seeds == "1" { Vec::new() } else { vec![format!("means of {seeds} seeds with 95% intervals")] };
        let slug: String = [vec![name.to_owned()], self.description.clone()].concat().join("-").to_lowercase();
        Figure {
            folder: to.to_owned(),
            name: slug.chars().map(|letter| if letter.is_alphanumeric() { letter } else { '-' }).collect(),
            title: title.to_owned(),
            setting: [vec![experiment.to_owned()], self.description.clone(), sure].concat().join(" · "),
            device: devices.join(", "),
            origin: Origin::Simulated,
        }
    }

    /// Lines by policy, in the order in which they first come; those of one policy rise along a column.
    fn by_policy(&self, name: Name, along: &str) -> Result<Vec<(Policy, Vec<&Line>)>> {
        let mut groups: Vec<(Policy, Vec<&Line>)> = Vec::new();
        for &line in &self.lines {
            let policy = line.policy(name)?;
            match groups.iter_mut().find(|(group, _)| *group == policy) {
                Some((_, members)) => members.push(line),
                None => groups.push((policy, vec![line])),
            }
        }
        for (_, members) in &mut groups {
            members.sort_by(|a, b| a.number(along).partial_cmp(&b.number(along)).expect("finite numbers"));
        }
        Ok(groups)
    }

    /// Draws the panels for which all runs have both metrics, if there are any.
    fn draw_trade_offs(
        &self,
        figure: &Figure,
        policies: &[(Policy, Vec<&Line>)],
        panels: &[(Metric, Metric)],
    ) -> Result<()> {
        let panels: Vec<TradeOff> = panels.iter().filter_map(|&(x, y)| trade_off(policies, x, y)).collect();
        match panels.is_empty() {
            true => Ok(()),
            false => Ok(plots::or_left_out(plots::pareto(figure, &panels))?),
        }
    }
}

fn trade_off(policies: &[(Policy, Vec<&Line>)], x: Metric, y: Metric) -> Option<TradeOff> {
    let point = |line: &&Line| {
        let label = if x == RATE { "" } else { line.text("threshold") };
        Some(TradePoint { x: line.estimate(x.1)?, y: line.estimate(y.1)?, label: label.to_owned() })
    };
    let line = |(policy, members): &(Policy, Vec<&Line>)| {
        let points = members.iter().map(point).collect::<Option<_>>()?;
        let attainable = members.iter().all(|line| line.text("exit") != "oracle");
        Some(TradeLine { policy: policy.clone(), attainable, points })
    };
    Some(TradeOff { x: x.0, y: y.0, lines: policies.iter().map(line).collect::<Option<_>>()? })
}
