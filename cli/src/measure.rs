//! Measuring on this machine: the engine's runs, in alternation with the profile that the simulator gets.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use engine::cache::bytes_per_token;
use engine::checkpoint::Checkpoint;
use engine::clock::Idle;
use engine::executor::{ExitDepths, Sampling};
use engine::kernels::linear::WeightType;
use engine::model::Model;
use engine::profile::{Grid, Limits, Profiler};
use engine::prompts::Prompts;
use engine::replay::{Engine, oracle_depths};
use engine::tokenizer::Tokenizer;
use indicatif::{ProgressBar, ProgressStyle};
use scheduler::{KvFill, Look, Settings};
use simulator::{Metrics, ModelMemory, Source, Summary};
use traces::{ExitTrace, LatencyProfile, MemoryFigures, Request};

use crate::runs::Run;

/// Slowdown by other work above which measurements are not to be trusted.
const BUSY: f64 = 1.1;

/// What was measured.
pub struct Measured {
    /// What the parts of a pass take on this machine.
    pub profile: LatencyProfile,
    /// Signals and predictions of the requests at full depth.
    pub exits: ExitTrace,
    /// One run for each of the settings asked for: of its repeats, the one of median throughput.
    pub runs: Vec<Run>,
}

/// An engine and what its records call its model.
pub struct NamedEngine {
    /// The engine.
    pub engine: Engine,
    /// The name of the model's folder or file.
    pub name: String,
}

impl NamedEngine {
    /// Opens a model and the text that prompts are cut from; `loops` is as for [`Checkpoint::open`].
    ///
    /// # Errors
    /// If either does not read, or does not fit the other.
    pub fn load(
        model: &Path,
        loops: Option<usize>,
        weights: WeightType,
        prompts: &Path,
        sampling: Sampling,
    ) -> Result<Self> {
        let (mut named, tokenizer) = Self::with_tokenizer(model, loops, weights, sampling)?;
        let text = std::fs::read_to_string(prompts).with_context(|| format!("cannot read {}", prompts.display()))?;
        let prompts = Prompts::TextAfter { begin: tokenizer.begin()?, text: tokenizer.encode(&text)? };
        named.engine.prompts = Arc::new(prompts);
        Ok(named)
    }

    /// Opens a model that must have a tokenizer; prompts repeat one token until others are given.
    ///
    /// # Errors
    /// If it does not read, or has no tokenizer.
    pub fn with_tokenizer(
        model: &Path,
        loops: Option<usize>,
        weights: WeightType,
        sampling: Sampling,
    ) -> Result<(Self, Tokenizer)> {
        let checkpoint = Checkpoint::open(model, loops)?;
        let named = Self::new(model, &checkpoint, weights, sampling)?;
        Ok((named, checkpoint.tokenizer.with_context(|| format!("{}: the model has no tokenizer", model.display()))?))
    }

    /// Opens a model for runs whose prompts do not matter: all of them repeat one token.
    ///
    /// # Errors
    /// If it does not read.
    pub fn load_without_prompts(
        model: &Path,
        loops: Option<usize>,
        weights: WeightType,
        sampling: Sampling,
    ) -> Result<Self> {
        Self::new(model, &Checkpoint::open(model, loops)?, weights, sampling)
    }

    fn new(path: &Path, checkpoint: &Checkpoint, weights: WeightType, sampling: Sampling) -> Result<Self> {
        let model = Arc::new(Model::load(&checkpoint.weights, weights)?);
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let prompts = Arc::new(Prompts::Text(vec![0; model.config().max_positions]));
        Ok(Self { engine: Engine { model, prompts, sampling }, name })
    }

    /// What the model takes of memory, as far as it is known without a profile.
    pub fn memory(&self) -> ModelMemory {
        model_memory(&self.engine.model)
    }
}

fn model_memory(model: &Model) -> ModelMemory {
    ModelMemory {
        num_loops: model.config().num_loops as u32,
        weight_bytes: model.weight_bytes(),
        kv_bytes_per_token: bytes_per_token(model.config(), KvFill::Reuse),
        figures: MemoryFigures::default(),
    }
}

/// A progress bar of so many steps, on the terminal if there is one.
pub fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed_precise} [{bar:30}] {pos}/{len} {msg}");
    ProgressBar::new(steps as u64).with_style(style.expect("the template is well formed").progress_chars("=> "))
}

/// Profiles up to `limits`, records, and replays the requests under every one of `settings`.
///
/// Every repeat replays all settings in turn between two rounds of the profile, so that profile and replays see the
/// machine in the same moods.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn measure(
    named: &NamedEngine,
    settings: &[Settings],
    requests: &[Request],
    repeats: u32,
    limits: Limits,
) -> Result<Measured> {
    let NamedEngine { engine, name } = named;
    settings.iter().try_for_each(|settings| engine.check_settings(settings))?;
    let repeats = repeats as usize;
    let bar = progress(1 + (repeats + 1) + repeats * settings.len());
    let step = |message: String| {
        bar.inc(1);
        bar.set_message(message);
    };

    bar.set_message("recording exit signals at full depth");
    let exits = record(named, requests)?;
    let oracle = Arc::new(oracle_depths(&exits, requests));

    let mut profiler = Profiler::new(engine, Grid::up_to(limits))?;
    let mut repeated: Vec<Vec<Run>> = settings.iter().map(|_| Vec::new()).collect();
    for repeat in 1..=repeats {
        step(format!("profiling, round {repeat} of {}", repeats + 1));
        profiler.round(|_, _| ())?;
        for (runs, &settings) in repeated.iter_mut().zip(settings) {
            step(format!("replaying: {}, {}, {repeat} of {repeats}", settings.batching, settings.exit));
            let agreement = runs.first().and_then(|run: &Run| run.summary.token_agreement);
            runs.push(replay(engine, settings, requests, &oracle, Idle::Skip, agreement)?);
        }
    }
    step(format!("profiling, round {0} of {0}", repeats + 1));
    profiler.round(|_, _| ())?;
    bar.finish_and_clear();
    let slowdown = profiler.slowdown();
    if slowdown > BUSY {
        eprintln!("warning: other work on this machine made passes {slowdown:.2} times as long: measure again at rest");
    }
    let profile = profiler.finish(name, &format!("{} rounds between replays of {repeats} repeats", repeats + 1));
    Ok(Measured { profile, exits, runs: repeated.into_iter().map(median_run).collect() })
}

/// Records the exit trace of these requests.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn record(NamedEngine { engine, name }: &NamedEngine, requests: &[Request]) -> Result<ExitTrace> {
    let temperature = engine.sampling.temperature;
    let source = format!("{} requests at full depth, temperature {temperature}", requests.len());
    Ok(engine.record(requests, name, &source, &mut ())?)
}

/// What runs under these settings ask of a machine at most.
pub fn limits<'a>(settings: impl Iterator<Item = &'a Settings> + Clone, requests: &[Request]) -> Limits {
    let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
    let longest_prompt = requests.iter().map(|request| request.prompt_tokens).max().unwrap_or(1);
    let most = |count: fn(&Settings) -> u32| settings.clone().map(count).max().unwrap_or(1);
    let decodes = most(|settings| settings.max_batch);
    let chunk = most(|settings| settings.prefill_chunk).min(longest_prompt);
    Limits { rows: most(|settings| settings.token_budget), decodes, history: longest, chunk }
}

/// Serves the requests once. Token agreement is computed unless an earlier run under the same settings told it:
/// tokens and exits do not change from run to run.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn replay(
    engine: &Engine,
    settings: Settings,
    requests: &[Request],
    oracle: &Arc<ExitDepths>,
    idle: Idle,
    agreement: Option<f64>,
) -> Result<Run> {
    let mut metrics = Metrics::new(&settings).with_requests();
    let oracle = (settings.exit.look() == Look::Oracle).then(|| oracle.clone());
    let generations = engine.replay(settings, requests, oracle, idle, &mut metrics)?;
    let agreement = match agreement {
        Some(known) => known,
        None => engine.agreement(&generations)?,
    };
    let summary = Summary {
        weight_bytes: Some(engine.model.weight_bytes()),
        kv_bytes_per_token: Some(bytes_per_token(engine.model.config(), settings.kv_fill)),
        ..metrics.summary(Source::Measured, Some(agreement))
    };
    Ok(Run { summary, metrics, time: None })
}

/// The run of median throughput; of an even number, the slower of the middle two.
fn median_run(mut runs: Vec<Run>) -> Run {
    runs.sort_by(|a, b| a.summary.throughput_tok_s.total_cmp(&b.summary.throughput_tok_s));
    let middle = (runs.len() - 1) / 2;
    runs.swap_remove(middle)
}
