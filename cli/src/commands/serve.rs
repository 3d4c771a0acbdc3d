//! `depthwise serve`: an OpenAI-compatible HTTP server.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use engine::Sampling;
use scheduler::{Batching, ExitPolicy, KvFill, Settings};
use server::{ChatTemplate, Limits, Model, Recording};

use crate::arguments::{LoadArgs, at_most, check_temperature};
use crate::interrupt;
use crate::output::note;
use experiments::NamedEngine;
use experiments::named_engine::pass_log_meta;
use experiments::serving::{MOST_BLOCKS, MOST_ROWS, Serving, parse_bytes};

/// Serve a model over HTTP to any OpenAI client, and record what was served for the simulator
///
/// The server answers /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics and /version, and shows a page at
/// /. Ctrl-C or SIGTERM ends it: what runs is finished first, a second Ctrl-C ends it at once.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model: a folder that `train` or `convert` wrote, a Hugging Face folder, a GGUF file, or a name on the Hugging
    /// Face hub (OWNER/MODEL or OWNER/MODEL/FILE.gguf)
    model: PathBuf,
    /// Name of the model in requests [default: that of its folder or file]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Address to listen at; 0.0.0.0 for all of this machine
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    host: IpAddr,
    /// Port to listen at; 0 for any that is free
    #[arg(long, default_value_t = 8000, value_name = "PORT")]
    port: u16,
    #[command(flatten)]
    load: LoadArgs,
    /// Batching policy: vanilla, sequence, depth
    #[arg(long, default_value_t = Batching::Depth, value_name = "POLICY")]
    batching: Batching,
    /// Exit policy, as for `generate`. Under one that reads a signal, a request may have none, a static depth or another
    /// threshold on that signal for itself
    #[arg(long, default_value_t = ExitPolicy::None, value_name = "POLICY")]
    exit: ExitPolicy,
    /// What later tokens find at the depths that an exited token did not run: reuse, first, skip, backfill, last,
    /// cycle:SLOTS [default: that which the model is made for]
    #[arg(long, value_name = "FILL")]
    kv_fill: Option<KvFill>,
    /// Most sequences that run at once
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = at_most::<MOST_ROWS>)]
    max_batch: u32,
    /// Most rows of a pass (depth-wise) or of an iteration (lockstep)
    #[arg(long, default_value_t = 256, value_name = "ROWS", value_parser = at_most::<MOST_ROWS>)]
    token_budget: u32,
    /// Most prompt tokens that start in a pass or an iteration [default: as for `replay`]
    #[arg(long, value_name = "TOKENS", value_parser = at_most::<MOST_ROWS>)]
    prefill_chunk: Option<u32>,
    /// Positions per KV block
    #[arg(long, default_value_t = Settings::BLOCK_TOKENS, value_name = "TOKENS", value_parser = at_most::<MOST_ROWS>)]
    block_tokens: u32,
    /// KV blocks [default: a full batch of the longest sequences of the model]
    #[arg(long, value_name = "N", value_parser = at_most::<MOST_BLOCKS>)]
    num_blocks: Option<u32>,
    /// Memory for weights, keys and values, instead of a number of KV blocks, such as 16GB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, conflicts_with = "num_blocks")]
    device_memory: Option<u64>,
    /// Keep the contents of freed KV blocks for prompts with the same prefix
    #[arg(long)]
    prefix_caching: bool,
    /// Compose the next pass while this one runs
    #[arg(long)]
    async_scheduling: bool,
    /// Most requests that run or wait; more are answered with status 429
    #[arg(long, default_value_t = Limits::default().most_requests, value_name = "N")]
    max_requests: u32,
    /// Most tokens of the prompts and outputs of requests that run or wait; more are answered with status 429
    #[arg(long, default_value_t = Limits::default().most_tokens, value_name = "TOKENS")]
    max_total_tokens: u64,
    /// Least milliseconds from one chunk of a stream to the next: tokens that come meanwhile share a chunk, which costs less
    /// than one for each
    #[arg(long, default_value_t = 0, value_name = "MS")]
    stream_interval_ms: u64,
    /// Seconds that requests may run on when the server ends
    #[arg(long, default_value_t = Limits::default().grace.as_secs(), value_name = "S")]
    grace_s: u64,
    /// Softmax temperature of requests that give none
    #[arg(long, default_value_t = 1.0, value_name = "T")]
    temperature: f32,
    /// Chat template in Jinja [default: that of the model]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Folder, new or empty, to which a request trace, an exit trace and a pass log of what is served are written
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// Record the signals of all depths, also of those that tokens skip. Passes take several times as long
    #[arg(long, requires = "record")]
    record_all_depths: bool,
}

/// Serves until it is asked to end.
pub fn run(args: Args) -> Result<()> {
    let temperature = args.temperature;
    check_temperature(temperature)?;
    let address = SocketAddr::new(args.host, args.port);
    let LoadArgs { loops, weights, device } = args.load;
    let (named, tokenizer) = NamedEngine::with_tokenizer(&args.model, loops, weights, device, Sampling::default())?;
    let settings = args.settings(&named)?;
    let chat_template = match &args.chat_template {
        Some(file) => Some(ChatTemplate::read(file, &args.model)?),
        None => ChatTemplate::of_model(&args.model)?,
    };
    let name = args.name.clone().unwrap_or_else(|| named.name.clone());
    let recording = args.record.clone().map(|folder| recording(folder, &named, &settings, args.record_all_depths));
    if recording.is_some() && settings.exit.speculates() {
        bail!("--record with --exit {}: the text is that of full depth, record under --exit none", settings.exit);
    }
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
    let stop = interrupt::flag();
    note!(
        "serving {name} at http://{}: {} batching, exit {}, {} sequences at once",
        listener.local_addr()?,
        settings.batching,
        settings.exit,
        settings.max_batch
    );
    let limits = Limits {
        most_requests: args.max_requests,
        most_tokens: args.max_total_tokens,
        grace: Duration::from_secs(args.grace_s),
        stream_interval: Duration::from_millis(args.stream_interval_ms),
    };
    let model = Model { name, engine: named.engine, tokenizer, chat_template, temperature };
    Ok(server::serve(listener, model, settings, limits, recording, stop)?)
}

fn recording(folder: PathBuf, named: &NamedEngine, settings: &Settings, all_depths: bool) -> Recording {
    let of = if all_depths { "all depths" } else { "the depths that tokens ran; deeper ones count as sure" };
    let source = format!("served under {} batching, exit {}: {of}", settings.batching, settings.exit);
    Recording {
        folder,
        exits: named.engine.exit_trace_meta(&named.name, &source),
        signals: named.engine.recorded_signals(),
        passes: pass_log_meta(named),
        all_depths,
    }
}

impl Args {
    fn settings(&self, named: &NamedEngine) -> Result<Settings> {
        let memory = named.memory();
        let kv_fill = self.kv_fill.unwrap_or(memory.kv_fill);
        let serving = Serving {
            prefill_chunk: self.prefill_chunk,
            block_tokens: self.block_tokens,
            num_blocks: self.num_blocks,
            device_memory: self.device_memory,
            prefix_caching: self.prefix_caching,
            async_scheduling: self.async_scheduling,
            ..Serving::new(vec![self.batching], vec![self.exit], self.max_batch, self.token_budget)
        };
        let longest = named.engine.model.config().max_positions as u32;
        let settings = serving.settings(self.batching, self.exit, kv_fill, &memory, longest)?;
        settings.check()?;
        named.check_settings(&settings)?;
        Ok(settings)
    }
}
