//! Arguments that several commands share.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use engine::{DeviceName, Sampling, WeightType};
use scheduler::{Batching, KvFill, Settings};
use simulator::{Objectives, Routing};
use traces::{
    ExitTrace, RequestFormat, RequestSource, RequestSpec, RequestTrace, SessionUse, ThinkTime, TimeUnit, TraceError,
    ZeroTokens,
};

use crate::progress::Terminal;
use experiments::ExitChoice;
use experiments::NamedEngine;
use experiments::experiment::{SCHEMA_VERSION, read_yaml};
use experiments::input::SimulationInput;
use experiments::machines::{MachinesFile, check_specs};
use experiments::runs::{Machines, load_models};
use experiments::serving::{MOST_BLOCKS, MOST_REPLICAS, MOST_ROWS, Serving, parse_bytes};
use experiments::sweep::spec::{CapacitySpec, Grid, SweepSpec, SweptSystem};
use experiments::workload::{Workload, load_requests};

/// A number that sizes something, at most `MOST`.
///
/// # Errors
/// What was expected.
pub fn at_most<const MOST: u32>(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if number <= MOST => Ok(number),
        Ok(_) => Err(format!("expected at most {MOST}")),
        Err(_) => Err(format!("expected a whole number, at most {MOST}")),
    }
}

/// How to read request traces, and which part of them.
#[derive(Debug, clap::Args)]
pub struct TraceArgs {
    /// Format of the trace, if it is not recognised: depthwise, azure, burst_gpt, vidur, blis, guidellm_trace, bailian,
    /// mooncake, llm_serving_sim, aiperf_results, vllm_results, guidellm_results, share_gpt
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<RequestFormat>,
    /// Unit of the times of the trace, if the file does not determine it: s, ms, us, ns
    #[arg(long, value_name = "UNIT")]
    pub time_unit: Option<TimeUnit>,
    /// Tokens in a block of the trace's hash_ids, if the file does not determine them
    #[arg(long, value_name = "TOKENS")]
    pub hash_block_tokens: Option<u32>,
    /// What to do with rows without prompt or output tokens: skip, refuse [default: skip]
    #[arg(long, value_name = "WHAT")]
    pub zero_tokens: Option<ZeroTokens>,
    /// Tokenizer that counts the tokens of a trace of texts (ShareGPT): a tokenizer.json
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Keep only the first N requests
    #[arg(long, value_name = "N")]
    pub first: Option<usize>,
    /// Keep only requests that arrive in this window, in seconds after the first arrival
    #[arg(long, value_names = ["FROM", "TO"], num_args = 2)]
    pub window_s: Option<Vec<f64>>,
    /// Divide arrival times by this factor
    #[arg(long, value_name = "FACTOR", conflicts_with = "rate_per_s")]
    pub rate_factor: Option<f64>,
    /// Scale arrivals to this mean rate, in requests per second
    #[arg(long, value_name = "RATE")]
    pub rate_per_s: Option<f64>,
    /// Cut longer prompts to this length
    #[arg(long, value_name = "TOKENS")]
    pub max_prompt_tokens: Option<u32>,
    /// Cut longer outputs to this length
    #[arg(long, value_name = "TOKENS")]
    pub max_output_tokens: Option<u32>,
}

impl TraceArgs {
    /// What a configuration says, where no option says otherwise.
    pub fn apply(&self, spec: RequestSpec) -> RequestSpec {
        RequestSpec {
            format: self.format.or(spec.format),
            time_unit: self.time_unit.or(spec.time_unit),
            hash_block_tokens: self.hash_block_tokens.or(spec.hash_block_tokens),
            zero_tokens: self.zero_tokens.or(spec.zero_tokens),
            tokenizer: self.tokenizer.clone().or(spec.tokenizer),
            first: self.first.or(spec.first),
            window_s: self.window_s.as_deref().map(|window| (window[0], window[1])).or(spec.window_s),
            rate_factor: self.rate_factor.or(spec.rate_factor),
            rate_per_s: self.rate_per_s.or(spec.rate_per_s),
            max_prompt_tokens: self.max_prompt_tokens.or(spec.max_prompt_tokens),
            max_output_tokens: self.max_output_tokens.or(spec.max_output_tokens),
            ..spec
        }
    }

    /// Whether an option is given for a key.
    fn is_given(&self, key: &str) -> bool {
        match key {
            "format" => self.format.is_some(),
            "time_unit" => self.time_unit.is_some(),
            "hash_block_tokens" => self.hash_block_tokens.is_some(),
            "zero_tokens" => self.zero_tokens.is_some(),
            "tokenizer" => self.tokenizer.is_some(),
            "first" => self.first.is_some(),
            "window_s" => self.window_s.is_some(),
            "rate_factor" => self.rate_factor.is_some(),
            "rate_per_s" => self.rate_per_s.is_some(),
            "max_prompt_tokens" => self.max_prompt_tokens.is_some(),
            "max_output_tokens" => self.max_output_tokens.is_some(),
            _ => false,
        }
    }

    /// An error about a key that was given as an option names the option.
    pub fn name_option(&self, error: anyhow::Error) -> anyhow::Error {
        name_given(error, |key| self.is_given(key))
    }
}

/// An error about a key for which an option was given names the option.
fn name_given(error: anyhow::Error, is_given: impl Fn(&str) -> bool) -> anyhow::Error {
    match error.downcast_ref() {
        Some(TraceError::Spec { key, found, expected }) if is_given(key) => {
            anyhow!("--{}: found {found}, expected {expected}", key.replace('_', "-"))
        }
        _ => error,
    }
}

/// Which requests to serve.
#[derive(Debug, clap::Args)]
pub struct RequestArgs {
    /// Request trace (Azure, Bailian, BurstGPT, Mooncake, Dynamo, AIPerf, vLLM, GuideLLM, ShareGPT, Vidur, BLIS,
    /// LLMServingSim or own CSV; also .gz or .zst), or a YAML file that describes requests
    #[arg(long, value_name = "FILE")]
    pub requests: PathBuf,
    #[command(flatten)]
    pub trace: TraceArgs,
    /// What to do with the sessions of the trace: follow (a request is sent when the one before it has been answered),
    /// ignore (each at its own arrival) [default: follow]
    #[arg(long, value_name = "WHAT")]
    pub sessions: Option<SessionUse>,
    /// Closed loop: N users, who each send the next request or session when the last one has been answered
    #[arg(long, value_name = "N")]
    pub users: Option<NonZeroU32>,
    /// With --users, time from an answer to the next request, where the trace does not say it: SECONDS, or
    /// exponential:MEAN_SECONDS [default: 0]
    #[arg(long, value_name = "TIME")]
    pub think_time_s: Option<ThinkTime>,
}

impl RequestArgs {
    /// The same as an experiment has it, with the folder that its paths are relative to.
    ///
    /// # Errors
    /// If a YAML file does not read.
    pub fn spec(&self) -> Result<(RequestSpec, PathBuf)> {
        let extension = self.requests.extension().unwrap_or_default();
        let (spec, base) = if extension == "yaml" || extension == "yml" {
            let mut spec: RequestSpec = read_yaml(&self.requests)?;
            let base = self.requests.parent().unwrap_or(Path::new("")).to_owned();
            // An option is relative to the current folder, a key to that of its file.
            spec.tokenizer = spec.tokenizer.filter(|_| self.trace.tokenizer.is_none());
            (spec, base)
        } else {
            (RequestSpec { file: Some(self.requests.clone()), ..RequestSpec::default() }, PathBuf::new())
        };
        let spec = RequestSpec {
            sessions: self.sessions.or(spec.sessions),
            users: self.users.or(spec.users),
            think_time_s: self.think_time_s.or(spec.think_time_s),
            ..self.trace.apply(spec)
        };
        let tokenizer = match &self.trace.tokenizer {
            Some(option) => Some(std::path::absolute(option)?),
            None => spec.tokenizer,
        };
        Ok((RequestSpec { tokenizer, ..spec }, base))
    }

    /// Reads or makes requests, whenever they are sent.
    ///
    /// # Errors
    /// If the file does not read, or the options contradict it.
    pub fn load(&self) -> Result<RequestTrace> {
        let (spec, base) = self.spec()?;
        load_requests(&spec, &base, &mut Terminal::default()).map_err(|error| self.name_option(error))
    }

    /// Reads or makes requests, with the prefix hashes of their trace, and what they are sent by. Think times are drawn with
    /// `seed`.
    ///
    /// # Errors
    /// If the file does not read, the options contradict it, or the trace does not say when its sessions begin.
    pub fn workload(&self, seed: u64) -> Result<Workload> {
        let (spec, base) = self.spec()?;
        let load = || {
            let trace = load_requests(&spec, &base, &mut Terminal::default())?;
            let workload = Workload::of_trace(&trace, &spec, seed)?;
            Ok(Workload { prefixes: trace.prefix_hashes.map(Arc::new), ..workload })
        };
        load().map_err(|error| self.name_option(error))
    }

    /// An error about a key that was given as an option names the option.
    pub fn name_option(&self, error: anyhow::Error) -> anyhow::Error {
        name_given(error, |key| match key {
            "sessions" => self.sessions.is_some(),
            "users" => self.users.is_some(),
            "think_time_s" => self.think_time_s.is_some(),
            key => self.trace.is_given(key),
        })
    }
}

/// Which model to run.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// Model: a folder that `train` or `convert` wrote, a Hugging Face folder, a GGUF file, a name on the Hugging
    /// Face hub (OWNER/MODEL or OWNER/MODEL/FILE.gguf), or random:CONFIG.json, random weights of that configuration
    #[arg(long, value_name = "MODEL")]
    pub model: PathBuf,
    #[command(flatten)]
    pub load: LoadArgs,
}

/// How to load a model.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// Split the layers of an ordinary transformer into N blocks, one for each depth; or run a looped model N times
    #[arg(long, value_name = "N")]
    pub loops: Option<usize>,
    /// Number type of the weights: f32, bf16, q8_0 or q4k on a CPU; f32, f16 or bf16 on a GPU
    #[arg(long, default_value_t, value_name = "TYPE")]
    pub weights: WeightType,
    /// Device: cpu, cuda or cuda:N
    #[arg(long, default_value_t)]
    pub device: DeviceName,
}

/// Checks `--temperature`.
///
/// # Errors
/// If it is not a number of at least 0.
pub fn check_temperature(temperature: f32) -> Result<()> {
    ensure!(temperature.is_finite() && temperature >= 0.0, "--temperature {temperature}: expected 0 or more");
    Ok(())
}

/// Which model to run, and on what text.
#[derive(Debug, clap::Args)]
pub struct EngineArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text file that prompts are cut from, or prompts in JSON lines (.jsonl) with `prompt` and, if they are graded,
    /// `answer` and `class`. Request I has line I modulo the number of lines, and the line's length. Required, but with
    /// --exits that fit any model [default: tokens drawn at random]
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Softmax temperature of sampling; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    pub temperature: f32,
    /// Seed of sampling, and of the draw of exits that fit any model
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl EngineArgs {
    /// Loads the model.
    ///
    /// # Errors
    /// If the model or the text does not read, there is no text, or the temperature is none.
    pub fn load(&self) -> Result<NamedEngine> {
        check_temperature(self.temperature)?;
        let Some(prompts) = &self.prompts else {
            bail!("--prompts is missing: expected a text or JSON lines (only --exits that fit any model go without)")
        };
        let ModelArgs { model, load: LoadArgs { loops, weights, device } } = &self.model;
        NamedEngine::load(model, *loops, *weights, *device, prompts, self.sampling())
    }

    /// Loads the model, and lets requests follow an exit trace of any model.
    ///
    /// # Errors
    /// If the model or the text does not read, the temperature is none, or the exits do not fit.
    pub fn load_following(&self, exits: ExitTrace) -> Result<NamedEngine> {
        check_temperature(self.temperature)?;
        let ModelArgs { model, load: LoadArgs { loops, weights, device } } = &self.model;
        let mut named = match &self.prompts {
            Some(_) => self.load()?,
            None => NamedEngine::load_without_prompts(model, *loops, *weights, *device, self.sampling())?
                .with_random_prompts(),
        };
        named.follow(exits)?;
        Ok(named)
    }

    fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, seed: self.seed }
    }
}

/// How to schedule them.
#[derive(Debug, clap::Args)]
pub struct ServingArgs {
    /// Batching policies, separated by commas: vanilla, sequence, depth
    #[arg(long, value_delimiter = ',', default_value = "vanilla,sequence,depth", value_name = "POLICIES")]
    pub batching: Vec<Batching>,
    /// Exit policies, separated by commas: none, static:DEPTH, mix:DEPTH:DEPTH:SHARE (a share of the requests at one
    /// depth, the others at another), baselines (none, every static depth, and even mixes of neighbours), oracle,
    /// oracle:charged, oracle:recorded, confidence:THRESHOLD, MEASURE:THRESHOLD (top1, margin, entropy, similarity, difference, kl, gate),
    /// delayed:MEASURE:THRESHOLD, cumulative:gate:SHARE[:LOOPS], entropy-change:THRESHOLD, stable:DEPTHS, load-adaptive:MEASURE:CALM..BUSY:LOW..HIGH[:BAND] (a
    /// threshold that follows the number of requests), speculate:MEASURE:THRESHOLD:DRAFTS and speculate:static:DEPTH:DRAFTS (exits
    /// are drafts, which full depth verifies)
    #[arg(long, value_delimiter = ',', default_value = "baselines,oracle,confidence:0.9", value_name = "POLICIES")]
    pub exit: Vec<ExitChoice>,
    /// What later tokens find at the depths that an exited token did not run: reuse (copies of the keys and values of
    /// its exit depth), first (those of depth 0), skip (nothing), backfill (its own, run later), last and
    /// cycle:SLOTS (those of the last depth that it ran, in slots that the depths share). Separated by commas: adaptive exits run
    /// under each [default: that which the model is made for]
    #[arg(long, value_delimiter = ',', value_name = "FILLS")]
    pub kv_fill: Vec<KvFill>,
    /// Maximum number of sequences that run at the same time
    #[arg(long, default_value_t = 64, value_name = "SEQUENCES", value_parser = at_most::<MOST_ROWS>)]
    pub max_batch: u32,
    /// Maximum number of rows of a pass (depth-wise) or of an iteration (vanilla, sequence-wise)
    #[arg(long, default_value_t = 512, value_name = "ROWS", value_parser = at_most::<MOST_ROWS>)]
    pub token_budget: u32,
    /// Maximum number of prompt tokens that start in a pass or an iteration [default: the token budget]
    #[arg(long, value_name = "TOKENS", value_parser = at_most::<MOST_ROWS>)]
    pub prefill_chunk: Option<u32>,
    /// Last depth, from 0, that tokens of prompts run; deeper, later tokens find copies of its keys and values. Other
    /// depths than that at which all tokens exit need the KV fill reuse [default: as deep as tokens can exit]
    #[arg(long, value_name = "DEPTH")]
    pub prefill_depth: Option<u8>,
    /// Positions per KV block
    #[arg(long, default_value_t = Settings::BLOCK_TOKENS, value_name = "TOKENS", value_parser = at_most::<MOST_ROWS>)]
    pub block_tokens: u32,
    /// KV blocks [default: what fits into the memory of the device; if its size is not known, enough for a full batch
    /// of the longest request]
    #[arg(long, value_name = "BLOCKS", value_parser = at_most::<MOST_BLOCKS>, conflicts_with_all = ["device_memory", "memory_utilization"])]
    pub num_blocks: Option<u32>,
    /// Memory of the device, such as 80GB or 16GiB [default: that of the latency profile]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub device_memory: Option<u64>,
    /// Share of the memory that the server uses [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    pub memory_utilization: Option<f64>,
    /// Keep the contents of freed KV blocks for prompts with the same prefix
    #[arg(long)]
    pub prefix_caching: bool,
    /// Compose the next pass when this one starts (exit policies none, static, mix and delayed only)
    #[arg(long)]
    pub async_scheduling: bool,
    /// Most passes that a token which exits waits for the exit head, so that one read of its weights serves several
    /// passes. Signals that need the head leave nothing to wait for
    #[arg(long, default_value_t = 0, value_name = "PASSES")]
    pub exit_wait: u32,
    /// Tokens that wait at which the exit head runs before the wait is over; 0 for no such number
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    pub exit_batch: u32,
}

impl ServingArgs {
    /// The same as an experiment has it.
    pub fn serving(&self) -> Serving {
        Serving {
            batching: self.batching.clone(),
            exit: self.exit.clone(),
            kv_fill: self.kv_fill.clone(),
            max_batch: self.max_batch,
            token_budget: self.token_budget,
            prefill_chunk: self.prefill_chunk,
            prefill_depth: self.prefill_depth,
            block_tokens: self.block_tokens,
            num_blocks: self.num_blocks,
            device_memory: self.device_memory,
            memory_utilization: self.memory_utilization,
            prefix_caching: self.prefix_caching,
            async_scheduling: self.async_scheduling,
            exit_wait: self.exit_wait,
            exit_batch: self.exit_batch,
            machines: Vec::new(),
            transfer: None,
        }
    }
}

/// Keys of an experiment that these options set, as errors of the libraries name them.
const KEYS: [(&str, &str); 22] = [
    ("max_prompt_tokens", "--max-prompt-tokens"),
    ("max_output_tokens", "--max-output-tokens"),
    ("kv_fill", "--kv-fill"),
    ("max_batch", "--max-batch"),
    ("token_budget", "--token-budget"),
    ("prefill_chunk", "--prefill-chunk"),
    ("prefill_depth", "--prefill-depth"),
    ("block_tokens", "--block-tokens"),
    ("num_blocks", "--num-blocks"),
    ("device_memory", "--device-memory"),
    ("memory_utilization", "--memory-utilization"),
    ("prefix_caching", "--prefix-caching"),
    ("async_scheduling", "--async-scheduling"),
    ("exit_wait", "--exit-wait"),
    ("exit_batch", "--exit-batch"),
    ("engine.prompts", "--prompts"),
    ("engine.exits", "--exits"),
    ("engine.repeats", "--repeats"),
    ("engine.temperature", "--temperature"),
    ("engine.rounds", "--rounds"),
    ("validation.in_flight", "--in-flight"),
    ("validation.rates", "--rates"),
];

/// A message of a command that is described by options alone: what it says of keys, it says of their options.
pub fn name_options(message: &str) -> String {
    let name = |word: &str| {
        let inner = word.trim_matches(|letter: char| "`:,;()".contains(letter));
        match KEYS.iter().find(|(key, _)| *key == inner) {
            Some((key, option)) => word.replace(key, option),
            None => word.to_owned(),
        }
    };
    message.split(' ').map(name).collect::<Vec<_>>().join(" ")
}

/// A simulation: requests, what they run on, and how.
#[derive(Debug, clap::Args)]
pub struct SimulationArgs {
    #[command(flatten)]
    requests: RequestArgs,
    /// Folder of a latency profile, or the name of one that ships, as `depthwise profiles` lists them
    #[arg(long, value_name = "PROFILE")]
    profile: PathBuf,
    /// Folder of an exit trace; without one, every token runs every depth (--exit none)
    #[arg(long, value_name = "DIR")]
    exits: Option<PathBuf>,
    #[command(flatten)]
    serving: ServingArgs,
    /// Number of machines, each with its own batch and cache
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = at_most::<{ MOST_REPLICAS as u32 }>)]
    replicas: u32,
    /// YAML file of groups of machines with roles (prompt, decode, both) and the link between them, instead of --replicas
    #[arg(long, value_name = "FILE", conflicts_with = "replicas")]
    machines: Option<PathBuf>,
    /// How requests are routed to machines: round-robin, random, random:SEED, least-loaded, two-choices,
    /// two-choices:SEED, prefix, prefix:MORE (the machine that has most of the prompt in its prefix cache, unless it has
    /// over MORE requests more than the least loaded)
    #[arg(long, default_value = "round-robin", value_name = "RULE")]
    routing: Routing,
    /// Draw the time of each pass from its measured spread
    #[arg(long)]
    spread: bool,
    /// Seed of random draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl SimulationArgs {
    /// Whether options describe how to serve requests, not a YAML file of machines.
    pub fn is_of_options(&self) -> bool {
        self.machines.is_none()
    }

    /// Reads requests, profile and exit trace.
    ///
    /// # Errors
    /// If one does not read, profile and exit trace are of different models, or the device's memory is too small.
    pub fn load(&self) -> Result<SimulationInput<RequestSource>> {
        let (spec, base) = self.requests.spec()?;
        let serving = self.serving()?;
        let workload = Workload::stream(&spec, &base, &serving, self.seed, &mut Terminal::default())
            .map_err(|error| self.requests.name_option(error))?;
        let models = load_models(Path::new(""), &self.profile, self.exits.as_deref(), self.seed, &serving.exit)?;
        let spread = self.spread.then_some(self.seed);
        let machines = Machines { replicas: self.replicas as usize, routing: self.routing, spread };
        SimulationInput::new(workload, models, &serving, machines, Path::new(""))
    }

    /// How requests are scheduled, and on what machines; paths are relative to nothing else.
    fn serving(&self) -> Result<Serving> {
        let serving = self.serving.serving();
        let Some(file) = &self.machines else { return Ok(serving) };
        let MachinesFile { machines, transfer } = MachinesFile::load(file)?;
        check_specs(&machines, transfer).with_context(|| file.display().to_string())?;
        Ok(Serving { machines, transfer, ..serving })
    }
}

impl SimulationArgs {
    /// The same as a sweep's file has it, with paths that are relative to nothing else.
    ///
    /// # Errors
    /// If a YAML file of requests does not read.
    pub fn spec(&self) -> Result<SweepSpec> {
        let (mut requests, base) = self.requests.spec()?;
        requests.file = requests.file.map(|file| base.join(file));
        requests.tokenizer = requests.tokenizer.map(|file| base.join(file));
        if let Some(generate) = &mut requests.generate {
            generate.lengths_from = generate.lengths_from.take().map(|file| base.join(file));
        }
        let (profile, exits) = (self.profile.clone(), self.exits.clone());
        let system = SweptSystem {
            name: profile.display().to_string(),
            profile,
            exits,
            price_per_hour: None,
            batching: None,
            exit: None,
            machines: None,
            transfer: None,
        };
        Ok(SweepSpec {
            schema_version: SCHEMA_VERSION,
            title: self.requests.requests.display().to_string(),
            seed: self.seed,
            requests,
            serving: self.serving()?,
            systems: vec![system],
            replicas: self.replicas as usize,
            routing: self.routing,
            spread: self.spread,
            objectives: None,
            capacity: CapacitySpec::default(),
            grid: Grid::default(),
        })
    }
}

/// What requests must meet to count for goodput.
#[derive(Debug, clap::Args)]
pub struct ObjectiveArgs {
    /// Objective: maximum time to first token
    #[arg(long, value_name = "MS")]
    ttft_ms: Option<f64>,
    /// Objective: maximum time per output token after the first
    #[arg(long, value_name = "MS")]
    tpot_ms: Option<f64>,
    /// Objective: maximum end-to-end latency
    #[arg(long, value_name = "MS")]
    e2e_ms: Option<f64>,
}

impl ObjectiveArgs {
    /// The objectives; none if there is not one.
    ///
    /// # Errors
    /// If one is negative or not a number.
    pub fn objectives(&self) -> Result<Option<Objectives>> {
        let &Self { ttft_ms, tpot_ms, e2e_ms } = self;
        for (name, bound) in [("--ttft-ms", ttft_ms), ("--tpot-ms", tpot_ms), ("--e2e-ms", e2e_ms)] {
            let bound = bound.unwrap_or_default();
            ensure!(bound.is_finite() && bound >= 0.0, "{name} {bound}: expected 0 or more");
        }
        let objectives = Objectives { ttft_ms, tpot_ms, e2e_ms };
        Ok((objectives != Objectives::default()).then_some(objectives))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_in_messages_become_options_and_other_words_stay() {
        for (message, expected) in [
            (
                "token_budget is 8, less than max_batch 16: every",
                "--token-budget is 8, less than --max-batch 16: every",
            ),
            (
                "serving: num_blocks beside device_memory: expected",
                "serving: --num-blocks beside --device-memory: expected",
            ),
            ("replicas x `num_blocks` is 9", "replicas x `--num-blocks` is 9"),
            ("max_batch.csv: 3 of my_max_batch", "max_batch.csv: 3 of my_max_batch"),
        ] {
            assert_eq!(name_options(message), expected);
        }
    }
}
