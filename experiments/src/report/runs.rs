//! Runs of a folder: their names, how good and fast they are, and how their latencies are distributed.

use std::path::Path;

use anyhow::Result;
use itertools::Itertools;
use scheduler::{Batching, KvFill};
use serde::{Deserialize, Serialize};
use simulator::{Source, Summary};

use super::table::{Column, Rounded, Table};
use crate::compare::THROUGHPUT;
use crate::exact_match::ALL_CLASSES;
use crate::figures::{exit_name, policy, read};
use crate::frontier::{QualityMeasure, headline};
use crate::quality::{EXACT_MATCH, QualityLine, TOKEN_AGREEMENT};
use crate::speedup::{is_attainable_exit, is_baseline_exit};

/// Tables of comparisons whose repeats are replays of the runs in `summary.csv`.
const REPLAYS: [&str; 2] = ["validation", "absolute"];

/// Which run a line is of.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RunOf {
    pub source: Source,
    pub batching: Batching,
    pub exit_policy: String,
    pub kv_fill: KvFill,
}

/// What the page calls policies. The KV fill is named where runs differ in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    fills_differ: bool,
}

impl Names {
    /// The names of policies in a folder with these tables of runs.
    pub fn of<'t>(tables: impl IntoIterator<Item = &'t Table>) -> Self {
        let fills = |table: &Table| {
            let exits = table.texts("exit_policy").unwrap_or_default();
            let fills = table.texts("kv_fill").unwrap_or_default();
            // Without exits, nothing is filled.
            exits.into_iter().zip(fills).filter(|(exit, _)| exit != "none").map(|(_, fill)| fill).unique().collect_vec()
        };
        Self { fills_differ: !tables.into_iter().flat_map(fills).all_equal() }
    }

    /// The name of a policy.
    pub fn policy(self, batching: Batching, exit_policy: &str, kv_fill: KvFill) -> String {
        let policy = policy(batching, exit_policy);
        let exit = policy.exit.trim_start_matches("confidence ");
        format!("{}, {exit}{}", policy.batching, self.fill(exit_policy, kv_fill))
    }

    /// The name of a run.
    pub fn run(self, run: &RunOf) -> String {
        self.policy(run.batching, &run.exit_policy, run.kv_fill)
    }

    fn fill(self, exit_policy: &str, kv_fill: KvFill) -> String {
        if self.fills_differ && exit_policy != "none" { format!(", {kv_fill}") } else { String::new() }
    }
}

/// Latencies of the requests of a run, in milliseconds: sorted values, spread evenly over all of them.
#[derive(Debug, Serialize)]
pub(super) struct Latencies {
    policy: String,
    source: Source,
    requests: usize,
    ttft_ms: Vec<Rounded>,
    tpot_ms: Vec<Rounded>,
    e2e_ms: Vec<Rounded>,
}

#[derive(Debug, Deserialize)]
struct RequestLine {
    source: Source,
    batching: Batching,
    exit_policy: String,
    kv_fill: KvFill,
    ttft_ms: f64,
    tpot_ms: f64,
    e2e_ms: f64,
}

/// A line of `repeats.csv`.
#[derive(Debug, Deserialize)]
struct RepeatLine {
    table: String,
    batching: Batching,
    exit_policy: String,
    kv_fill: KvFill,
    load: Option<f64>,
    metric: String,
    repeat: usize,
    measured: f64,
}

/// The distributions of `requests.csv`, with at most `most` values of each.
///
/// # Errors
/// If the file does not read.
pub(super) fn latencies(path: &Path, names: Names, most: usize) -> Result<Vec<Latencies>> {
    let lines: Vec<RequestLine> = read(path)?;
    let run_of = |line: &RequestLine| RunOf {
        source: line.source,
        batching: line.batching,
        exit_policy: line.exit_policy.clone(),
        kv_fill: line.kv_fill,
    };
    let of_run = |(run, lines): (RunOf, Vec<&RequestLine>)| {
        let spread = |value: fn(&RequestLine) -> f64| spread(lines.iter().map(|line| value(line)), most);
        Latencies {
            policy: names.run(&run),
            source: run.source,
            requests: lines.len(),
            ttft_ms: spread(|line| line.ttft_ms),
            tpot_ms: spread(|line| line.tpot_ms),
            e2e_ms: spread(|line| line.e2e_ms),
        }
    };
    let by_run = lines.iter().chunk_by(|line| run_of(line));
    Ok(by_run.into_iter().map(|(run, lines)| of_run((run, lines.collect()))).collect())
}

/// At most `most` of the finite values, sorted: the least, the greatest, and evenly spaced ones between.
fn spread(values: impl Iterator<Item = f64>, most: usize) -> Vec<Rounded> {
    let sorted: Vec<f64> = values.filter(|value| value.is_finite()).sorted_by(f64::total_cmp).collect();
    if sorted.len() <= most {
        return sorted.into_iter().map(Rounded).collect();
    }
    (0..most).map(|place| Rounded(sorted[place * (sorted.len() - 1) / (most - 1)])).collect()
}

/// Adds what the page sorts runs by to a table of summaries: `policy`, `series` (the policy without its threshold, or
/// baselines), and `role`, one of `baseline`, `adaptive` and `bound`.
///
/// # Errors
/// If a policy is none that we know.
pub(super) fn add_policies(table: &mut Table, names: Names) -> Result<()> {
    let texts = |name: &str| table.texts(name).unwrap_or_else(|| vec![String::new(); table.lines]);
    let (batchings, exits, kinds) = (texts("batching"), texts("exit_policy"), texts("exit"));
    let (fills, thresholds) = (texts("kv_fill"), texts("threshold"));
    let (mut policies, mut series, mut roles) = (Vec::new(), Vec::new(), Vec::new());
    for line in 0..table.lines {
        let (batching, fill): (Batching, KvFill) = (batchings[line].parse()?, fills[line].parse()?);
        let is_baseline = is_baseline_exit(&kinds[line]);
        let name = match is_baseline {
            true => "baselines",
            false => exit_name(&exits[line], !thresholds[line].is_empty()).trim_start_matches("confidence:"),
        };
        let fill_name = names.fill(&exits[line], fill);
        policies.push(names.policy(batching, &exits[line], fill));
        series.push(format!("{}, {}{fill_name}", policy(batching, "").batching, name.replace(':', " ")));
        roles.push(match (is_baseline, is_attainable_exit(&kinds[line])) {
            (true, _) => "baseline",
            (false, true) => "adaptive",
            (false, false) => "bound",
        });
    }
    table.columns.push(Column::new("policy", policies));
    table.columns.push(Column::new("series", series));
    table.columns.push(Column::new("role", roles.into_iter().map(str::to_owned)));
    Ok(())
}

/// Adds intervals to a table of the runs in `summary.csv`: of measured qualities, those in `quality.csv`; of measured
/// throughput, the least and the most of a repeat in `repeats.csv`.
///
/// # Errors
/// If a file does not read.
pub(super) fn add_intervals(table: &mut Table, summaries: &[Summary], folder: &Path) -> Result<()> {
    let qualities = folder.join("quality.csv");
    let qualities: Vec<QualityLine> = if qualities.exists() { read(&qualities)? } else { Vec::new() };
    for metric in [TOKEN_AGREEMENT, EXACT_MATCH] {
        let of = |summary: &Summary| {
            let is_of = |line: &&QualityLine| {
                (line.batching, &line.exit_policy, line.kv_fill) == key(summary)
                    && (line.metric.as_str(), line.class.as_str()) == (metric, ALL_CLASSES)
            };
            qualities.iter().find(is_of).filter(|_| summary.source == Source::Measured)
        };
        let ends = summaries.iter().map(|summary| of(summary).map(|line| (line.low, line.high)).unwrap_or_default());
        add_ends(table, metric, ends);
    }
    let repeats = repeats(summaries, folder)?;
    let measured = summaries.iter().filter(|summary| summary.source == Source::Measured);
    let places: Vec<_> = measured.map(key).collect();
    let ends = summaries.iter().map(|summary| {
        let place = places.iter().position(|place| *place == key(summary));
        let place = place.filter(|_| summary.source == Source::Measured && repeats.len() > 1);
        let throughputs = || repeats.iter().filter_map(|repeat| Some(repeat[place?].throughput_tok_s));
        (throughputs().reduce(f64::min), throughputs().reduce(f64::max))
    });
    add_ends(table, THROUGHPUT, ends);
    Ok(())
}

fn key(summary: &Summary) -> (Batching, &String, KvFill) {
    (summary.batching, &summary.exit_policy, summary.kv_fill)
}

fn add_ends(table: &mut Table, metric: &str, ends: impl Iterator<Item = (Option<f64>, Option<f64>)>) {
    let (low, high): (Vec<_>, Vec<_>) = ends.unzip();
    if low.iter().any(Option::is_some) {
        table.columns.push(Column::new(&format!("{metric}_low"), low));
        table.columns.push(Column::new(&format!("{metric}_high"), high));
    }
}

/// The fastest policies at the quality of full depth, in a sentence for each measure of quality.
///
/// # Errors
/// If `repeats.csv` does not read.
pub(super) fn headlines(summaries: &[Summary], folder: &Path) -> Result<Vec<String>> {
    let repeats = repeats(summaries, folder)?;
    let found = QualityMeasure::ALL.into_iter().filter_map(|measure| headline(&repeats, measure));
    Ok(found.map(|headline| headline.sentence(&repeats[0])).collect())
}

/// By repeat, a summary of each measured run with the throughput of that repeat. Without `repeats.csv` there is one repeat;
/// without measured runs there is none.
fn repeats(summaries: &[Summary], folder: &Path) -> Result<Vec<Vec<Summary>>> {
    let measured: Vec<Summary> =
        summaries.iter().filter(|summary| summary.source == Source::Measured).cloned().collect();
    let path = folder.join("repeats.csv");
    let lines: Vec<RepeatLine> = if path.exists() { read(&path)? } else { Vec::new() };
    let is_replay =
        |line: &&RepeatLine| line.metric == THROUGHPUT && line.load.is_none() && REPLAYS.contains(&line.table.as_str());
    let replays: Vec<&RepeatLine> = lines.iter().filter(is_replay).collect();
    let throughput = |summary: &Summary, repeat: usize| {
        let is_of = |line: &&&RepeatLine| {
            line.repeat == repeat && (line.batching, &line.exit_policy, line.kv_fill) == key(summary)
        };
        replays.iter().find(is_of).map(|line| line.measured)
    };
    let of_repeat = |repeat: usize| {
        let of_run =
            |summary: &Summary| Some(Summary { throughput_tok_s: throughput(summary, repeat)?, ..summary.clone() });
        measured.iter().map(of_run).collect::<Option<Vec<Summary>>>()
    };
    let count = replays.iter().map(|line| line.repeat).max().unwrap_or_default();
    let repeats: Option<Vec<_>> = (1..=count).map(of_repeat).collect();
    Ok(match repeats {
        Some(repeats) if !repeats.is_empty() => repeats,
        _ if measured.is_empty() => Vec::new(),
        _ => vec![measured],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_keeps_its_ends() {
        let values = |most| spread((0..1000).rev().map(f64::from), most).into_iter().map(|Rounded(value)| value);
        assert_eq!(values(3).collect::<Vec<_>>(), [0.0, 499.0, 999.0]);
        assert_eq!(values(2000).count(), 1000);
        assert_eq!(spread([1.0, f64::NAN].into_iter(), 9), [Rounded(1.0)]);
    }

    #[test]
    fn runs_have_the_names_of_their_figures() {
        let exits = || ["none", "static:1", "static:1"].map(str::to_owned);
        let named = |fills: [&str; 3]| {
            let columns = vec![Column::new("exit_policy", exits()), Column::new("kv_fill", fills.map(str::to_owned))];
            let names = Names::of([&Table { name: "summary".to_owned(), lines: 3, columns }]);
            ["none", "confidence:gate:0.95"].map(|exit| names.policy(Batching::Depth, exit, KvFill::First))
        };
        assert_eq!(named(["reuse", "first", "first"]), ["depth-wise, no exit", "depth-wise, gate 0.95"]);
        assert_eq!(named(["first", "reuse", "first"]), ["depth-wise, no exit", "depth-wise, gate 0.95, first"]);
    }
}
