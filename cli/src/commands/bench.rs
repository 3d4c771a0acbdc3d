//! `depthwise bench`: a request trace through any server with OpenAI's API.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use client::{
    ApiOptions, Client, ClientAccount, Endpoint, Measurement, PromptSource, Prompts, ServerPolicy, WordTokens,
};
use experiments::Reporter;
use experiments::results::ResultsFolder;
use experiments::runs::{Run, write_results};
use experiments::workload::Workload;
use scheduler::{Batching, ClosedLoad, ExitPolicy, KvFill, Load, OpenLoad};
use serde_json::{Map, Value};
use simulator::write_csv;

use crate::arguments::{ObjectiveArgs, RequestArgs};
use crate::interrupt::{self, Interrupted};
use crate::output::say;
use crate::progress::Terminal;
use crate::report;

/// Environment variable with the key that a server asks for.
const API_KEY: &str = "OPENAI_API_KEY";
/// Words from which it is measured how many tokens the server makes of a word.
const COUNTED_WORDS: usize = 256;

/// Send a request trace to a server with OpenAI's API, and measure what its users would see
///
/// Requests are sent as `replay` and `simulate` serve them: at their arrivals, in sessions, or by users. The results have the
/// same columns. Prompts are token ids that are drawn with the seed; blocks of equal prefix hash have equal ids. Output lengths
/// are asked for by max_tokens, min_tokens and ignore_eos. A key in the environment variable OPENAI_API_KEY is sent along.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address of the server: http://HOST:PORT
    #[arg(long, value_name = "URL")]
    url: String,
    #[command(flatten)]
    requests: RequestArgs,
    /// Closed loop without arrivals and sessions: N requests in flight, the next one sent when another has been answered
    #[arg(long, visible_alias = "concurrency", value_name = "N", conflicts_with_all = ["users", "think_time_s", "sessions"])]
    in_flight: Option<NonZeroU32>,
    /// What requests are sent to: completions, or chat (which takes --text)
    #[arg(long, default_value = "completions", value_name = "ENDPOINT")]
    endpoint: Endpoint,
    /// Name of the model [default: the first that the server lists]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Size of the vocabulary, whose middle half token ids are drawn from [default: meta.n_vocab in /v1/models]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "text")]
    vocab: Option<u32>,
    /// Text file: prompts are words of it, for servers that take no token ids. Their number of tokens is right on average only
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// With --text, tokens of a word [default: as the server counts two prompts that are sent first]
    #[arg(long, value_name = "TOKENS", requires = "text")]
    tokens_per_word: Option<f64>,
    /// JSON object of fields that every request has beside the usual ones; null removes a field
    #[arg(long, value_name = "JSON", value_parser = parse_fields)]
    extra_body: Option<Map<String, Value>>,
    /// Longest time from sending a request to the end of its answer
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS")]
    timeout_s: f64,
    /// How often a request is sent again to a server that asks for it (status 429, or 503 with Retry-After). Latencies count
    /// from when the request was due
    #[arg(long, default_value_t = 0, value_name = "N")]
    retries: u32,
    /// Succeed even if requests fail
    #[arg(long)]
    allow_failures: bool,
    #[command(flatten)]
    objectives: ObjectiveArgs,
    #[command(flatten)]
    server: ServerArgs,
    /// Seed of prompts and think times
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder to write summary.csv, requests.csv, client.csv and failures.csv to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What the server runs, which a client cannot see: columns of the results.
#[derive(Debug, clap::Args)]
struct ServerArgs {
    /// Batching policy of the server, for the columns of the results [default: that which depthwise's own server says, or
    /// vanilla]
    #[arg(long, value_name = "POLICY")]
    batching: Option<Batching>,
    /// Exit policy of the server, for the columns of the results [default: that which depthwise's own server says, or none]
    #[arg(long, value_name = "POLICY")]
    exit: Option<ExitPolicy>,
    /// KV fill of the server, for the columns of the results [default: that which depthwise's own server says, or reuse]
    #[arg(long, value_name = "FILL")]
    kv_fill: Option<KvFill>,
    /// Maximum number of sequences that the server runs at once, for the columns of the results [default: that which
    /// depthwise's own server says, or 0]
    #[arg(long, value_name = "SEQUENCES")]
    max_batch: Option<u32>,
}

impl ServerArgs {
    /// The policy as the options say it, and else the server, if it does.
    fn policy(&self, said: Option<ServerPolicy>) -> ServerPolicy {
        let unknown =
            ServerPolicy { batching: Batching::Vanilla, exit: ExitPolicy::None, kv_fill: KvFill::Reuse, max_batch: 0 };
        let said = said.unwrap_or(unknown);
        ServerPolicy {
            batching: self.batching.unwrap_or(said.batching),
            exit: self.exit.unwrap_or(said.exit),
            kv_fill: self.kv_fill.unwrap_or(said.kv_fill),
            max_batch: self.max_batch.unwrap_or(said.max_batch),
        }
    }
}

fn parse_fields(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let folder = args.out.as_deref().map(|out| ResultsFolder::create(out, "bench")).transpose()?;
    let objectives = args.objectives.objectives()?;
    let options = args.api_options()?;
    let workload = args.workload()?;
    let words = args.text.as_deref().map(read_words).transpose()?;
    let client = Client::connect(options)?;
    let prompts = Prompts::new(args.prompt_source(&client, words)?, workload.prefixes.clone(), args.seed);
    let mut measurement = Measurement::new(args.server.policy(client.policy()), objectives);
    let interrupted = send(&client, &workload, &prompts, &mut measurement)?;
    let account = measurement.account(interrupted.unwrap_or(0));
    if account.answered == 0 && interrupted.is_none() {
        let first = measurement.failures().first().map_or("", |row| &row.message);
        bail!("no request was answered: {}, the first: {first}", failures(&measurement));
    }
    let summary = measurement.summary();
    let run = Run { summary, metrics: measurement.metrics().clone(), time: None, quality: None, groups: Vec::new() };
    if let Some(mut folder) = folder.filter(|_| account.answered > 0) {
        let path = folder.path()?;
        write_csv(&path.join("client.csv"), [account])?;
        if !measurement.failures().is_empty() {
            write_csv(&path.join("failures.csv"), measurement.failures())?;
        }
        write_results(folder, "bench", &args, std::slice::from_ref(&run))?;
    }
    say!("{}, model {}", args.url, client.model());
    report::print_latencies(&run.summary);
    print_account(&account);
    match interrupted {
        Some(_) => Err(Interrupted.into()),
        None if account.failed > 0 && !args.allow_failures => {
            bail!("{} of {} requests failed: {}", account.failed, account.requests, failures(&measurement))
        }
        None => Ok(()),
    }
}

impl Args {
    fn api_options(&self) -> Result<ApiOptions> {
        let timeout_s = self.timeout_s;
        let timeout = Duration::try_from_secs_f64(timeout_s).ok().filter(|timeout| !timeout.is_zero());
        Ok(ApiOptions {
            url: self.url.clone(),
            endpoint: self.endpoint,
            model: self.model.clone(),
            api_key: std::env::var(API_KEY).ok().filter(|key| !key.is_empty()),
            timeout: timeout.with_context(|| format!("--timeout-s {timeout_s}: expected more than 0"))?,
            retries: self.retries,
            extra_body: self.extra_body.clone().unwrap_or_default(),
        })
    }

    /// The requests, when they are sent, and which of their prompts begin alike.
    fn workload(&self) -> Result<Workload> {
        ensure!(
            self.endpoint == Endpoint::Completions || self.text.is_some(),
            "--endpoint chat without --text: expected a text file, since chats take no token ids"
        );
        if let Some(tokens) = self.tokens_per_word {
            ensure!(tokens.is_finite() && tokens > 0.0, "--tokens-per-word {tokens}: expected more than 0");
        }
        let Some(number) = self.in_flight else { return self.requests.workload(self.seed) };
        let trace = self.requests.load()?;
        Ok(Workload { prefixes: trace.prefix_hashes.map(Arc::new), ..Workload::in_flight(trace.requests, number) })
    }

    fn prompt_source(&self, client: &Client, words: Option<Vec<String>>) -> Result<PromptSource> {
        let Some(words) = words else {
            return Ok(PromptSource::vocabulary(self.vocab.map_or_else(|| client.vocabulary(), Ok)?));
        };
        let tokens = match self.tokens_per_word {
            Some(tokens_per_word) => WordTokens { tokens_per_word, fixed: 0.0 },
            None => client.count_tokens(&words[..words.len().min(COUNTED_WORDS)])?,
        };
        Ok(PromptSource::Words { words, tokens })
    }
}

fn read_words(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    ensure!(!words.is_empty(), "{}: found no word, expected a text", path.display());
    Ok(words)
}

/// Sends the workload. Returns how many requests were in flight when the user interrupted it; `None` if it ran to its end.
fn send(
    client: &Client,
    workload: &Workload,
    prompts: &Prompts,
    measurement: &mut Measurement,
) -> Result<Option<usize>> {
    let requests = workload.requests.iter().copied();
    match &workload.closed_loop {
        Some(closed_loop) => {
            send_load(client, ClosedLoad::new(closed_loop.clone(), requests), workload, prompts, measurement)
        }
        None => send_load(client, OpenLoad::new(requests), workload, prompts, measurement),
    }
}

fn send_load(
    client: &Client,
    mut load: impl Load,
    workload: &Workload,
    prompts: &Prompts,
    measurement: &mut Measurement,
) -> Result<Option<usize>> {
    let (mut terminal, stop) = (Terminal::default(), interrupt::flag());
    terminal.start(workload.requests.len(), 0);
    let left = client.send(&mut load, prompts, stop, |exchange| {
        measurement.add(&exchange);
        terminal.advance(1);
    });
    terminal.finish();
    Ok(Some(left?).filter(|_| stop.load(Ordering::Relaxed)))
}

/// How many requests failed, by kind.
fn failures(measurement: &Measurement) -> String {
    let kinds: Vec<String> = measurement.failures_by_kind().map(|(kind, count)| format!("{count} {kind}")).collect();
    kinds.join(", ")
}

/// Prints what differs from what was asked for, and whether the client kept up.
fn print_account(account: &ClientAccount) {
    let &ClientAccount { answered, without_usage, other_prompt_lengths, other_output_lengths, .. } = account;
    if account.interrupted > 0 {
        say!("interrupted: {} requests were in flight", account.interrupted);
    }
    if account.retries > 0 {
        say!("retries: {}, as the server asked", account.retries);
    }
    let differing = |name: &str, count: u64, served: u64, asked: u64| {
        if count > 0 {
            say!(
                "{name} of other lengths than asked for: {count} of {answered}; {served} tokens in all, asked for {asked}"
            );
        }
    };
    differing("prompts", other_prompt_lengths, account.prompt_tokens, account.prompt_tokens_asked);
    differing("outputs", other_output_lengths, account.output_tokens, account.output_tokens_asked);
    if without_usage > 0 {
        say!("answers without usage: {without_usage} of {answered}; pieces of text are counted as tokens");
    }
    let (p50, p99, max) = (account.lag_p50_ms, account.lag_p99_ms, account.lag_max_ms);
    say!("client lag: {p50:.3} ms p50, {p99:.3} ms p99, {max:.3} ms at most");
    if p99 > Measurement::MOST_LAG_MS {
        say!(
            "the client was late: expected at most {} ms at p99, so latencies are in part its own",
            Measurement::MOST_LAG_MS
        );
    }
}
