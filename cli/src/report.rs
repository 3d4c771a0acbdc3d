//! Tables on the terminal.

use std::collections::BTreeSet;

use bytesize::ByteSize;
use comfy_table::{CellAlignment, presets};
use experiments::compare::{Comparison, E2E, E2E_P99, GOODPUT, Kind, THROUGHPUT, TPOT, TTFT};
use experiments::frontier::{QualityMeasure, headline};
use experiments::record::ServedTally;
use experiments::runs::Run;
use experiments::speedup::{Ratio, Speedup, speedups};
use experiments::systems::OfSystem;
use experiments::validate::{Table, Validation};
use simulator::{GroupSummary, Summary};
use traces::DepthTally;
use training::evaluation::{Evaluation, LoopFigures};

use crate::output::say;

/// Prints one line per run, with goodput where there are objectives, and what memory holds.
pub fn print_summaries<'a>(summaries: impl IntoIterator<Item = &'a Summary>) {
    let summaries: Vec<&Summary> = summaries.into_iter().collect();
    let mut header = vec![
        "",
        "batching",
        "exit",
        "KV fill",
        "batch",
        "tok/s",
        "mean depth",
        "agreement",
        "TTFT p50 ms",
        "TPOT p50 ms",
        "e2e p99 ms",
    ];
    if summaries.iter().any(|summary| summary.prefix_hit_rate.is_some()) {
        header.push("prefix hits");
    }
    if summaries.iter().any(|summary| summary.goodput_req_s.is_some()) {
        header.push("goodput req/s");
    }
    let of_text =
        QUALITIES.into_iter().filter(|(_, of)| summaries.iter().copied().any(|summary| of(summary).is_some()));
    let of_text: Vec<Column> = of_text.collect();
    header.extend(of_text.iter().map(|(name, _)| *name));
    let line = |summary: &&Summary| {
        let number = |(_, of): &Column| of(summary).map_or("-".to_owned(), |value| format!("{value:.3}"));
        [cells(summary), of_text.iter().map(number).collect()].concat()
    };
    print_table(&header, summaries.iter().map(line).collect());
    print_memory(summaries.iter().copied());
    print_computed(&summaries);
}

/// Prints the latencies of a run with their percentiles, a line for each, and what it delivered.
pub fn print_latencies(summary: &Summary) {
    let s = summary;
    let latencies = [
        ("TTFT ms", [s.ttft_mean_ms, s.ttft_p50_ms, s.ttft_p90_ms, s.ttft_p99_ms]),
        ("TPOT ms", [s.tpot_mean_ms, s.tpot_p50_ms, s.tpot_p90_ms, s.tpot_p99_ms]),
        ("ITL ms", [s.itl_mean_ms, s.itl_p50_ms, s.itl_p90_ms, s.itl_p99_ms]),
        ("e2e ms", [s.e2e_mean_ms, s.e2e_p50_ms, s.e2e_p90_ms, s.e2e_p99_ms]),
    ];
    let number = |value: f64| if value.is_nan() { "-".to_owned() } else { format!("{value:.2}") };
    let line = |(name, values): (&str, [f64; 4])| [vec![name.to_owned()], values.map(number).to_vec()].concat();
    say!(
        "{} requests, {} output tokens in {:.3} s: {:.1} tok/s",
        s.requests,
        s.output_tokens,
        s.makespan_s,
        s.throughput_tok_s
    );
    if let (Some(share), Some(goodput)) = (s.objectives_met, s.goodput_req_s) {
        say!("goodput {goodput:.3} req/s: {:.1}% of the requests met the objectives", 100.0 * share);
    }
    print_table(&["", "mean", "p50", "p90", "p99"], latencies.map(line).to_vec());
}

/// Prints how each group of machines was used, of runs of machines with roles.
pub fn print_groups(runs: &[Run]) {
    let header = [
        "batching",
        "exit",
        "machines",
        "role",
        "batching",
        "busy",
        "rows",
        "running",
        "waiting",
        "KV blocks",
        "KV used",
        "KV peak",
        "preempted",
    ];
    let line = |summary: &Summary, group: &GroupSummary| {
        vec![
            summary.batching.to_string(),
            summary.exit_policy.clone(),
            group.replicas.to_string(),
            group.role.to_string(),
            group.group_batching.to_string(),
            format!("{:.3}", group.busy),
            format!("{:.1}", group.mean_rows),
            format!("{:.1}", group.mean_running),
            format!("{:.1}", group.mean_waiting),
            group.kv_blocks.to_string(),
            format!("{:.3}", group.kv_usage),
            format!("{:.3}", group.kv_usage_peak),
            group.preemptions.to_string(),
        ]
    };
    let lines = |run: &Run| run.groups.iter().map(|group| line(&run.summary, group)).collect::<Vec<_>>();
    let lines: Vec<_> = runs.iter().flat_map(lines).collect();
    if lines.is_empty() {
        return;
    }
    say!("\nmachines:");
    print_table(&header, lines);
    for run in runs {
        if let Some(line) = transfer_line(&run.summary) {
            say!("{line}");
        }
    }
}

fn transfer_line(summary: &Summary) -> Option<String> {
    Some(format!(
        "{}, {}: {} transfers of {} in all, {:.3} ms each, after {:.3} ms of waiting",
        summary.machines,
        summary.exit_policy,
        summary.transfers?,
        ByteSize(summary.transfer_bytes?).display().iec(),
        summary.transfer_mean_ms?,
        summary.transfer_wait_mean_ms?,
    ))
}

type Column = (&'static str, fn(&Summary) -> Option<f64>);

/// What a run says of the quality of its text, beside the agreement.
const QUALITIES: [Column; 4] = [
    ("equal share", |summary| summary.equal_share),
    ("nats/token", |summary| summary.nats_per_token),
    ("full depth's", |summary| summary.nats_per_token_full_depth),
    ("exact match", |summary| summary.exact_match),
];

/// Prints which times of the latency profiles were computed, not measured, if some were.
fn print_computed(summaries: &[&Summary]) {
    let parts: BTreeSet<&str> = summaries.iter().flat_map(|summary| summary.computed_components.split(' ')).collect();
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    if !parts.is_empty() {
        say!("computed, not measured, in the latency profile: {}", parts.join(", "));
    }
}

/// Prints what memory holds at once, a line for each amount that runs had.
pub fn print_memory<'a>(summaries: impl IntoIterator<Item = &'a Summary>) {
    let mut lines: Vec<String> = Vec::new();
    for line in summaries.into_iter().filter_map(memory_line) {
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    say!("\n{}", lines.join("\n"));
}

fn memory_line(summary: &Summary) -> Option<String> {
    let (weights, kv_bytes) = (summary.weight_bytes?, summary.kv_bytes_per_token?);
    let bytes = |bytes: u64| ByteSize(bytes).display().iec();
    Some(format!(
        "memory: {} KV blocks of {} tokens hold {} tokens in {}, beside {} of weights: {} requests of mean length \
         at once, {} of the longest",
        summary.kv_blocks,
        summary.block_tokens,
        summary.kv_tokens,
        bytes(summary.kv_tokens.saturating_mul(kv_bytes)),
        bytes(weights),
        summary.batch_fits,
        summary.batch_fits_longest,
    ))
}

fn cells(summary: &Summary) -> Vec<String> {
    let mut cells = vec![
        summary.source.to_string(),
        summary.batching.to_string(),
        summary.exit_policy.clone(),
        summary.kv_fill.to_string(),
        summary.max_batch.to_string(),
        format!("{:.1}", summary.throughput_tok_s),
        format!("{:.3}", summary.mean_depth),
        summary.token_agreement.map_or("-".into(), |share| format!("{share:.3}")),
        format!("{:.1}", summary.ttft_p50_ms),
        format!("{:.2}", summary.tpot_p50_ms),
        format!("{:.1}", summary.e2e_p99_ms),
    ];
    cells.extend(summary.prefix_hit_rate.map(|share| format!("{share:.3}")));
    cells.extend(summary.goodput_req_s.map(|goodput| format!("{goodput:.3}")));
    cells
}

/// Prints systems side by side, a line for each run.
pub fn print_systems(lines: &[(OfSystem, Summary)]) {
    let header =
        ["system", "batching", "exit", "batch", "mean depth", "agreement", "tok/s", "speed-up", "published", "error %"];
    let number = |number: Option<f64>| number.map_or("-".to_owned(), |number| format!("{number:.1}"));
    let cells = lines.iter().map(|(of, summary)| {
        vec![
            of.system.clone(),
            summary.batching.to_string(),
            summary.exit_policy.clone(),
            summary.max_batch.to_string(),
            format!("{:.3}", summary.mean_depth),
            summary.token_agreement.map_or("-".to_owned(), |share| format!("{share:.3}")),
            number(Some(summary.throughput_tok_s)),
            format!("{:.2}", of.speedup),
            number(of.published_tok_s),
            number(of.error_pct),
        ]
    });
    print_table(&header, cells.collect());
}

/// Prints what an exit trace holds, a line per depth.
pub fn print_exits(tally: &DepthTally) {
    let line = |(depth, (agreement, exiting)): (usize, (f64, f64))| {
        vec![depth.to_string(), format!("{agreement:.3}"), format!("{exiting:.3}")]
    };
    print_table(
        &["depth", "agreement with the last", "exit here (oracle)"],
        tally.shares().enumerate().map(line).collect(),
    );
}

/// Prints what a recording served, a line per exit policy.
pub fn print_served(policies: &[ServedTally]) {
    let line = |tally: &ServedTally| {
        let (depth, agreement) = (format!("{:.3}", tally.mean_depth()), format!("{:.3}", tally.agreement()));
        vec![tally.policy.clone(), tally.generations.to_string(), tally.tokens.to_string(), depth, agreement]
    };
    let header = ["served under", "requests", "tokens", "mean depth", "realised agreement"];
    print_table(&header, policies.iter().map(line).collect());
}

/// Prints what a model knows of a text, a line per loop.
pub fn print_loops(evaluation: &Evaluation) {
    let line = |figures: &LoopFigures| {
        vec![
            figures.passes.to_string(),
            format!("{:.4}", figures.loss_nats_per_token),
            format!("{:.3}", figures.perplexity),
            format!("{:.4}", figures.bits_per_byte),
            format!("{:.1}%", 100.0 * figures.accuracy),
            format!("{:.1}%", 100.0 * figures.agreement_with_last),
            format!("{:.1}%", 100.0 * figures.oracle_share),
        ]
    };
    let header =
        ["passes", "nats/token", "perplexity", "bits/byte", "accuracy", "agrees with last", "exit here (oracle)"];
    print_table(&header, evaluation.loops.iter().map(line).collect());
    say!("mean oracle depth {:.3} passes", evaluation.mean_oracle_depth());
}

/// Prints rows under a header; columns of numbers are aligned to the right.
pub fn print_table(header: &[&str], rows: Vec<Vec<String>>) {
    let mut table = comfy_table::Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    let numeric: Vec<bool> = (0..header.len())
        .map(|column| {
            rows.iter().all(|row| row[column] == "-" || row[column].trim_end_matches('%').parse::<f64>().is_ok())
        })
        .collect();
    table.add_rows(rows);
    for (column, _) in table.column_iter_mut().zip(numeric).filter(|(_, numeric)| *numeric) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    say!("{table}");
}

/// Prints how fast the fastest adaptive exit policy ran, beside full depth and the best baseline of at least its quality.
pub fn print_speedup(repeats: &[Vec<Summary>]) {
    let throughput = |speedup: &Speedup| repeats[0][speedup.combination].throughput_tok_s;
    let fastest = speedups(repeats).into_iter().max_by(|a, b| throughput(a).total_cmp(&throughput(b)));
    let Some(Speedup { combination, over_full_depth, over_baseline }) = fastest else { return };
    let name = |place: usize| {
        let Summary { batching, exit_policy, token_agreement, .. } = &repeats[0][place];
        let agreement = token_agreement.map(|share| format!(" (token agreement {share:.3})"));
        format!("{batching}, {exit_policy}{}", agreement.unwrap_or_default())
    };
    say!("\nmeasured speed-up of {}:", name(combination));
    for (over, ratio) in
        [("full depth", over_full_depth), ("the best baseline of at least that agreement", over_baseline)]
    {
        if let Some(Ratio { to, median, least, most }) = ratio {
            say!("  {median:.2} times {over}, {} ({least:.2} to {most:.2} by repeat)", name(to));
        }
    }
}

/// Prints which policy is the fastest at the quality of full depth less a point, beside the best baseline of that quality.
pub fn print_headline(repeats: &[Vec<Summary>]) {
    for headline in QualityMeasure::ALL.into_iter().filter_map(|measure| headline(repeats, measure)) {
        say!("\n{}", headline.sentence(&repeats[0]));
    }
}

/// Prints what a validation came to: the runs of the closed loop, and how far predictions are off.
pub fn print_validation(Validation { runs, tables }: &Validation) {
    say!("\nin a closed loop:");
    print_summaries(runs);
    tables.iter().for_each(print_table_of_errors);
}

/// The metrics that the simulator is judged by, and what to call them.
const JUDGED: [(&str, &str); 6] = [
    (THROUGHPUT, "throughput"),
    (GOODPUT, "goodput"),
    (TTFT, "mean TTFT"),
    (TPOT, "mean TPOT"),
    (E2E, "mean e2e latency"),
    (E2E_P99, "p99 e2e latency"),
];

/// Prints how far predictions of one kind are off, by combination and on average.
pub fn print_table_of_errors(Table { kind, comparisons, means }: &Table) {
    let of = match kind {
        Kind::Validation => "",
        Kind::Speedups => "ratios to sequence-wise batching without exits in alternating slices, ",
        Kind::Absolute => "values in the closed loop, ",
        Kind::AtRates => "values at shares of each combination's own capacity, ",
    };
    say!("\n{of}predicted less measured, in percent of measured, with 95% confidence intervals:");
    let judged: Vec<(&str, &str)> =
        JUDGED.into_iter().filter(|(metric, _)| comparisons.iter().any(|line| line.metric == *metric)).collect();
    let error = |value: String, low: Option<f64>, high: Option<f64>| match (low, high) {
        (Some(low), Some(high)) => format!("{value} [{low:.1}, {high:.1}]"),
        _ => value,
    };
    let load = |load: Option<f64>| load.map_or(String::new(), |share| format!("{:.0}%", 100.0 * share));
    let several = comparisons.iter().any(|line| line.kv_fill != comparisons[0].kv_fill);
    let combination = |line: &Comparison| {
        let fill = if several { format!(", {}", line.kv_fill) } else { String::new() };
        [load(line.load), line.batching.to_string(), format!("{}{fill}", line.exit_policy)]
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    for group in comparisons.chunk_by(|a, b| combination(a) == combination(b)) {
        let cells = judged.iter().map(|(metric, _)| {
            let found = group.iter().find(|line| line.metric == *metric);
            let cell =
                |line: &Comparison| error(format!("{:+.1}", line.error_pct), line.error_low_pct, line.error_high_pct);
            found.map_or("-".to_owned(), cell)
        });
        rows.push(combination(&group[0]).into_iter().chain(cells).collect());
    }
    for group in means.chunk_by(|a, b| a.load == b.load) {
        let cells = judged.iter().map(|(metric, _)| {
            let found = group.iter().find(|line| line.metric == *metric);
            found.map_or("-".to_owned(), |line| {
                let value = format!("{:.1}", line.mean_abs_error_pct);
                error(value, line.mean_abs_error_low_pct, line.mean_abs_error_high_pct)
            })
        });
        let name = [load(group[0].load), "mean absolute".to_owned(), String::new()];
        rows.push(name.into_iter().chain(cells).collect());
    }
    print_table(
        &["load", "batching", "exit"].into_iter().chain(judged.iter().map(|judged| judged.1)).collect::<Vec<_>>(),
        rows,
    );
}
