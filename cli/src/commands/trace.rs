//! `depthwise trace`: what a request trace is like, any trace as our own CSV, exit depths for other engines, and exit
//! traces that fit any model, drawn or of a recording.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use experiments::results::write_file;
use experiments::serving::check_at_most;
use experiments::workload::load_requests;
use import::{DepthsByRequest, exit_depths};
use scheduler::ExitPolicy;
use traces::statistics::{LengthStatistics, TraceStatistics};
use traces::{
    ExitTable, ExitTrace, ExitTraceMeta, LatencyProfile, LoopShares, Nanos, RequestSpec, RequestTrace, TraceError,
};

use crate::arguments::TraceArgs;
use crate::output::say;
use crate::progress::Terminal;

/// Look at request traces, and write them as our own CSV; write exit depths for other engines; make exit traces for any
/// model
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, clap::Subcommand)]
enum Task {
    Info(InfoArgs),
    Convert(ConvertArgs),
    Depths(DepthsArgs),
    DrawExits(DrawExitsArgs),
    ScriptExits(ScriptExitsArgs),
}

/// Make an exit trace for any model of a recording
///
/// Every model with the number of loops can follow it: `replay`, `validate` and `run` then serve the text of the model that
/// runs, with the exits of the recording, and `simulate` runs the same passes. Without --exit, the signals and predictions
/// of a recording at full depth stay, so that the exit policy of the run decides. With --exit, tokens exit where this policy
/// lets them exit in the recording, under every policy that reads the oracle or a signal at a threshold of 0.5. Of a recording
/// under exit policies, tokens exit where they were served.
#[derive(Debug, clap::Args)]
struct ScriptExitsArgs {
    /// Folder of an exit trace
    #[arg(value_name = "EXITS")]
    exits: PathBuf,
    /// Exit policy that decides the depths; neither load-adaptive nor speculating [default: the policy of the run]
    #[arg(long, value_name = "POLICY")]
    exit: Option<ExitPolicy>,
    /// Folder of the exit trace to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Draw an exit trace at random, of a model of whose exits only the shares or the mean are known
///
/// Every exit signal is 0 before the depth of the exit and 1 from it on, or the reverse, so any exit policy at a threshold of 0.5
/// exits there, and so does the oracle. Tokens are independent. What such tokens say is not known: agreement and quality
/// of the trace mean nothing.
#[derive(Debug, clap::Args)]
struct DrawExitsArgs {
    /// Mean loops of a token; of the distributions with this mean, the one of greatest entropy
    #[arg(long, value_name = "LOOPS", required_unless_present = "shares", requires = "loops")]
    mean: Option<f64>,
    /// With --mean, loops of the model
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    loops: Option<u8>,
    /// With --mean, fewest loops of a token
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    fewest: u8,
    /// Shares of tokens that run 1, 2, ... loops, separated by commas
    #[arg(long, value_name = "SHARES", value_delimiter = ',', conflicts_with_all = ["mean", "loops", "fewest"])]
    shares: Vec<f64>,
    /// Generations of the trace
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    generations: u32,
    /// Tokens of each generation
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tokens: u32,
    /// Seed of the draw
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder of the exit trace
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Write the exit depths of a trace as depths_by_request, which vllm-rlt replays
///
/// For each request, the loops of each generated token. The first token of a request is that of its prompt, which vllm-rlt
/// runs at full depth.
#[derive(Debug, clap::Args)]
struct DepthsArgs {
    /// Folder of an exit trace
    #[arg(value_name = "EXITS")]
    exits: PathBuf,
    /// Exit policy that decides the depths; neither load-adaptive nor speculating
    #[arg(long, value_name = "POLICY")]
    exit: ExitPolicy,
    /// JSON file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Say what request traces are like: counts, lengths, rates, burstiness, shared prefixes, sessions
#[derive(Debug, clap::Args)]
struct InfoArgs {
    /// Request traces of any format
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trace: TraceArgs,
}

/// Write request traces as one file in our own CSV
///
/// Each file is cut and scaled by itself; several files are merged by the times since their own beginning. Prefix hashes
/// and sessions are kept.
#[derive(Debug, clap::Args)]
struct ConvertArgs {
    /// Request traces of any format
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    trace: TraceArgs,
    /// Leave out prefix hashes
    #[arg(long)]
    without_hashes: bool,
    /// CSV file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    match args.task {
        Task::Info(args) => {
            for (number, file) in args.files.iter().enumerate() {
                if number > 0 {
                    say!("");
                }
                print_statistics(file, &load(file, &args.trace)?);
            }
            Ok(())
        }
        Task::Convert(args) => convert(&args),
        Task::Depths(args) => write_depths(&args),
        Task::DrawExits(args) => draw_exits(&args),
        Task::ScriptExits(args) => script_exits(&args),
    }
}

fn write_depths(args: &DepthsArgs) -> Result<()> {
    let exits = ExitTrace::read(&args.exits)?;
    let depths = DepthsByRequest::new(&exits, args.exit).with_context(|| depends_on_more(args.exit))?;
    write_file(&args.out, DepthsByRequest::BEGINNING, |out| depths.write_to(out))?;
    say!("{} requests: {}", depths.depths_by_request.len(), args.out.display());
    Ok(())
}

/// Why there are no depths of a policy.
fn depends_on_more(policy: ExitPolicy) -> String {
    format!("exits of {policy} depend on the load, not on the trace alone")
}

fn script_exits(args: &ScriptExitsArgs) -> Result<()> {
    let recorded = ExitTrace::read(&args.exits)?;
    let ExitTraceMeta { model, fingerprint, source, .. } = &recorded.meta;
    let of_policy = |policy: ExitPolicy| exit_depths(&recorded, policy).with_context(|| depends_on_more(policy));
    let (depths, by) = match (args.exit, &recorded.served) {
        (Some(policy), _) => (Some(of_policy(policy)?), format!(", where {policy} exits")),
        (None, Some(served)) => {
            let depth = |token: usize| served.tokens[token].exit_depth as u8;
            let of_generation = |generation| recorded.generation(generation).map(depth).collect();
            (Some((0..recorded.num_generations()).map(of_generation).collect()), ", as served".to_owned())
        }
        (None, None) => (None, String::new()),
    };
    let meta = ExitTraceMeta {
        model: format!("exits of {model}{by}"),
        fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
        source: format!("for any model, of an exit trace with fingerprint {fingerprint}: {source}"),
        recording: None,
        ..recorded.meta
    };
    let trace = match depths {
        Some(depths) => ExitTrace::from_depths(meta, &depths),
        None => ExitTrace { meta, ..recorded },
    };
    trace.write(&args.out, ExitTable::Parquet)?;
    print_written(&trace, &args.out);
    Ok(())
}

/// Prints how large an exit trace is, and how deep its tokens run by oracle.
fn print_written(trace: &ExitTrace, folder: &Path) {
    say!(
        "{} tokens of {} generations, {:.3} of {} loops on average: {}",
        trace.num_tokens(),
        trace.num_generations(),
        trace.mean_oracle_passes(),
        trace.num_loops(),
        folder.display()
    );
}

/// The most tokens of a drawn exit trace.
const MOST_DRAWN: u64 = 20_000_000;

fn draw_exits(args: &DrawExitsArgs) -> Result<()> {
    let &DrawExitsArgs { generations, tokens, seed, .. } = args;
    check_at_most("--generations x --tokens", u64::from(generations) * u64::from(tokens), MOST_DRAWN)?;
    let (shares, known) = match (args.mean, args.loops) {
        (Some(mean), Some(loops)) => (LoopShares::of_mean(loops, args.fewest, mean), format!("a mean of {mean} loops")),
        _ => (LoopShares::new(&args.shares), format!("shares {:?}", args.shares)),
    };
    let shares = shares.map_err(|error| match error {
        TraceError::Spec { key, found, expected } => anyhow!("--{key}: found {found}, expected {expected}"),
        other => other.into(),
    })?;
    let meta = ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: format!("exits drawn with {known}"),
        fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
        num_loops: shares.num_loops(),
        source: format!("drawn, not recorded: {known}, seed {seed}"),
        recording: None,
    };
    let trace = ExitTrace::from_depths(meta, &shares.draw(generations as usize, tokens as usize, seed));
    trace.write(&args.out, ExitTable::Parquet)?;
    print_written(&trace, &args.out);
    Ok(())
}

fn convert(args: &ConvertArgs) -> Result<()> {
    let mut traces = args.files.iter().map(|file| load(file, &args.trace)).collect::<Result<Vec<RequestTrace>>>()?;
    if args.without_hashes {
        traces.iter_mut().for_each(|trace| trace.prefix_hashes = None);
    }
    let merged =
        RequestTrace::merge("merged", traces).context("--without-hashes merges files of which some have none")?;
    ensure!(u32::try_from(merged.requests.len()).is_ok(), "{} requests: expected fewer", merged.requests.len());
    write_file(&args.out, RequestTrace::BEGINNING, |out| merged.write_to(out))?;
    say!("{} requests: {}", merged.requests.len(), args.out.display());
    Ok(())
}

/// A trace, cut and scaled as the options say, whether or not its sessions have a beginning.
fn load(file: &Path, options: &TraceArgs) -> Result<RequestTrace> {
    let spec = options.apply(RequestSpec { file: Some(file.to_owned()), ..RequestSpec::default() });
    load_requests(&spec, Path::new(""), &mut Terminal::default()).map_err(|error| options.name_option(error))
}

/// Width of the longest bar.
const BAR: usize = 40;

fn print_statistics(file: &Path, trace: &RequestTrace) {
    let TraceStatistics { requests, span, rate_per_s, gap_cv, peaks, prompts, outputs, prefixes, sessions } =
        trace.statistics();
    say!("{}", file.display());
    let rate = rate_per_s.map_or("all at once".to_owned(), |rate| format!("{} requests/s", number(rate)));
    say!("  requests     {requests} in {} s: {rate}", number(span.as_secs_f64()));
    if let Some(cv) = gap_cv {
        let kind = if cv > 1.2 { "bursty" } else { "no more bursty than a Poisson process" };
        say!("  burstiness   coefficient of variation of the times between arrivals {} ({kind})", number(cv));
    }
    for peak in peaks {
        let times =
            rate_per_s.map_or(String::new(), |rate| format!(", {} times the mean", number(peak.rate_per_s / rate)));
        let seconds = peak.window.as_secs_f64();
        say!("  busiest      {} requests/s in {seconds} s{times}", number(peak.rate_per_s));
    }
    print_lengths("prompts", &prompts);
    print_lengths("outputs", &outputs);
    if let Some(found) = prefixes {
        let share = if found.blocks > 0 { 100.0 * found.repeated as f64 / found.blocks as f64 } else { 0.0 };
        say!(
            "  prefixes     {share:.1}% of {} blocks of {} tokens are those of an earlier prompt, {:.1}% of all prompt tokens",
            found.blocks,
            found.block_tokens,
            100.0 * found.token_share
        );
    }
    if let Some(found) = sessions {
        let mean = found.requests as f64 / found.sessions.max(1) as f64;
        say!(
            "  sessions     {} with {} requests, {} on average, at most {}",
            found.sessions,
            found.requests,
            number(mean),
            found.longest
        );
        if let Some((median, mean)) = found.think {
            say!(
                "  think times  of {} requests: median {} s, mean {} s",
                found.following,
                number(median.as_secs_f64()),
                number(mean.as_secs_f64())
            );
        }
        if found.without_arrival > 0 {
            say!("  arrivals     {} requests have none of their own and follow an answer", found.without_arrival);
        }
    }
    if span > Nanos::ZERO {
        const PARTS: usize = 20;
        say!("  arrivals over time, {} s a line", number(span.as_secs_f64() / PARTS as f64));
        print_bars(
            trace
                .arrivals_by_part(PARTS)
                .into_iter()
                .enumerate()
                .map(|(part, count)| (number(span.as_secs_f64() * part as f64 / PARTS as f64), count)),
        );
    }
    for (name, lengths) in [("prompt", &prompts), ("output", &outputs)] {
        say!("  requests by {name} tokens");
        let first = lengths.by_power.iter().position(|&count| count > 0).unwrap_or(0);
        let bars = lengths.by_power.iter().enumerate().skip(first);
        print_bars(bars.map(|(power, &count)| (format!("{}-{}", 1_u64 << power, (2_u64 << power) - 1), count)));
    }
}

fn print_lengths(name: &str, lengths: &LengthStatistics) {
    let [least, q25, median, q75, q90, q99, most] = lengths.quantiles;
    say!(
        "  {name}      {} tokens, mean {}; least {least}, p25 {q25}, p50 {median}, p75 {q75}, p90 {q90}, p99 {q99}, most {most}",
        lengths.total,
        number(lengths.mean)
    );
}

/// A line for each count, with a bar as long as its share of the largest.
fn print_bars(counts: impl Iterator<Item = (String, usize)>) {
    let counts: Vec<(String, usize)> = counts.collect();
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let width = counts.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let digits = counts.iter().map(|(_, count)| count.to_string().len()).max().unwrap_or(0);
    for (label, count) in counts {
        let bar = "#".repeat((count * BAR).div_ceil(most));
        let line = format!("    {label:>width$}  {count:>digits$}  {bar}");
        say!("{}", line.trim_end());
    }
}

/// Four significant digits of a number, at least those before its point.
fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let digits = (3.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (5.0, "5"),
            (1234.56, "1235"),
            (123_456.7, "123457"),
            (0.012_345, "0.01235"),
            (5.5, "5.5"),
            (1e-12, "0"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
