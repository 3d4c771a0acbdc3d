//! A model that is ready to serve, by the name that its records have.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use bytesize::ByteSize;
use engine::{
    Checkpoint, CheckpointError, DeviceName, Engine, ExitScript, PromptLine, Prompts, Sampling, ServedModel, Tokenizer,
    WeightType,
};
use scheduler::{KvFill, Settings};
use simulator::{Draw, ExitModel, ModelMemory};
use traces::hash::mix;
use traces::{ExitTrace, LatencyProfile, MemoryFigures, PassLogMeta, PrefixHashes, Request};

use crate::experiment::EngineSpec;
use crate::serving::Serving;

/// An engine and what its records call its model.
#[derive(Clone)]
pub struct NamedEngine {
    /// The engine.
    pub engine: Engine,
    /// The name of the model's folder or file.
    pub name: String,
    /// Of the model; `None` if it has none.
    pub tokenizer: Option<Tokenizer>,
    device: DeviceName,
    followed: Option<FollowedExits>,
}

/// Exits of an exit trace that fits any model, which requests follow.
#[derive(Clone)]
struct FollowedExits {
    trace: Arc<ExitTrace>,
    /// Assigns tokens of the trace to those of requests.
    model: ExitModel,
}

impl NamedEngine {
    /// Opens a model and its [prompts](read_prompts). `loops` is as for [`Checkpoint::open`].
    ///
    /// # Errors
    /// If either does not read, or does not fit the other.
    pub fn load(
        model: &Path,
        loops: Option<usize>,
        weights: WeightType,
        device: DeviceName,
        prompts: &Path,
        sampling: Sampling,
    ) -> Result<Self> {
        let (mut named, tokenizer) = Self::with_tokenizer(model, loops, weights, device, sampling)?;
        named.engine.prompts = Arc::new(read_prompts(prompts, &tokenizer)?);
        Ok(named)
    }

    /// Opens the model and the prompts of an experiment whose paths are relative to `base`.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn of_spec(spec: &EngineSpec, base: &Path, seed: u64) -> Result<Self> {
        let sampling = Sampling { temperature: spec.temperature, seed };
        let model = spec.model_from(base);
        let mut named = match &spec.prompts {
            Some(prompts) => Self::load(&model, spec.loops, spec.weights, spec.device, &base.join(prompts), sampling)?,
            None => Self::load_without_prompts(&model, spec.loops, spec.weights, spec.device, sampling)?
                .with_random_prompts(),
        };
        if let Some(exits) = &spec.exits {
            named.follow(ExitTrace::read(base.join(exits))?)?;
        }
        Ok(named)
    }

    /// The engine with prompts of tokens that are drawn at random: the same for the same seed of sampling.
    pub fn with_random_prompts(mut self) -> Self {
        let config = self.engine.model.config();
        let (vocabulary, seed) = (config.vocab_size as u64, self.engine.sampling.seed);
        let token = |place: usize| (mix(seed ^ mix(place as u64)) % vocabulary) as u32;
        self.engine.prompts = Arc::new(Prompts::Text((0..config.max_positions).map(token).collect()));
        self
    }

    /// Lets requests that the engine is [fitted](Self::fit) to exit as an exit trace says, whatever the model computes. The
    /// trace must fit any model. Requests take its generations as in a simulation with the seed of sampling: each draws
    /// one, by its id, and goes on with another where its output is longer.
    ///
    /// # Errors
    /// If the trace is of a model, has another number of loops, has no tokens, or was recorded under exit policies.
    pub fn follow(&mut self, trace: ExitTrace) -> Result<()> {
        let (any, loops) = (LatencyProfile::ANY_MODEL, self.engine.num_loops());
        ensure!(
            trace.meta.fingerprint == any,
            "exits of `{}` with fingerprint {}: expected fingerprint {any}, that of an exit trace that fits any model \
             (`depthwise trace script-exits` makes one of a recording)",
            trace.meta.model,
            trace.meta.fingerprint
        );
        ensure!(
            trace.num_loops() == usize::from(loops),
            "exits of a model with {} loops: expected {loops}, the loops of {}",
            trace.num_loops(),
            self.name
        );
        let model = ExitModel::new(&trace, Draw::Seeded(self.engine.sampling.seed))?;
        ensure!(
            trace.served.is_none(),
            "exits that were recorded under exit policies: expected those of full depth, or an exit trace that \
             `depthwise trace script-exits` makes of them"
        );
        self.followed = Some(FollowedExits { trace: Arc::new(trace), model });
        Ok(())
    }

    /// Whether exits are those of an exit trace of any model. Then nothing that is served has a quality.
    pub fn is_scripted(&self) -> bool {
        self.followed.is_some()
    }

    /// Number of these requests that are longer than the generation whose exits they begin with.
    pub(crate) fn longer_than_followed(&self, requests: &[Request]) -> usize {
        let Some(followed) = &self.followed else { return 0 };
        requests.iter().filter(|request| followed.model.is_longer_than_recorded(request)).count()
    }

    /// Opens a model that must have a tokenizer; prompts repeat one token until others are given.
    ///
    /// # Errors
    /// If it does not read, or has no tokenizer.
    pub fn with_tokenizer(
        model: &Path,
        loops: Option<usize>,
        weights: WeightType,
        device: DeviceName,
        sampling: Sampling,
    ) -> Result<(Self, Tokenizer)> {
        let named = Self::load_without_prompts(model, loops, weights, device, sampling)?;
        let tokenizer = named.tokenizer.clone();
        Ok((named, tokenizer.ok_or_else(|| CheckpointError::no_tokenizer(model))?))
    }

    /// Opens a model for runs whose prompts do not matter: all of them repeat one token.
    ///
    /// # Errors
    /// If it does not read.
    pub fn load_without_prompts(
        model: &Path,
        loops: Option<usize>,
        weights: WeightType,
        device: DeviceName,
        sampling: Sampling,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(model, loops)?;
        let name = match Checkpoint::random_config(model) {
            Some(config) => format!("{}, random weights", config.file_stem().unwrap_or_default().display()),
            None => model.file_name().unwrap_or(model.as_os_str()).to_string_lossy().into_owned(),
        };
        let model = device.serve(&checkpoint.weights, weights)?;
        let prompts = Arc::new(Prompts::Text(vec![0; model.config().max_positions]));
        let engine = Engine { prompts, sampling, ..Engine::new(model) };
        Ok(Self { engine, name, tokenizer: checkpoint.tokenizer, device, followed: None })
    }

    /// Fits requests and prompts to each other: requests get the lengths of prompts that have their own, and prompts of a
    /// text begin alike where the trace of the requests says so. Requests get the exits that they [follow](Self::follow).
    pub fn fit(&mut self, requests: &mut [Request], prefixes: Option<Arc<PrefixHashes>>) {
        let prompts = &mut self.engine.prompts;
        prompts.set_lengths(requests);
        if let Some(prefixes) = prefixes {
            *prompts = Arc::new(Arc::unwrap_or_clone(prompts.clone()).with_prefixes(prefixes));
        }
        if let Some(FollowedExits { trace, model }) = &self.followed {
            let of_request =
                |request: &Request| (request.id, model.tokens_of(request).expect("tokens of a trace at full depth"));
            let tokens = requests.iter().map(of_request).collect();
            self.engine.script = Some(Arc::new(ExitScript::new(trace.clone(), tokens)));
        }
    }

    /// What the prompts of `requests` have in common, for simulations of what this engine serves; none without prefix
    /// caching.
    ///
    /// # Errors
    /// If a request has no prompt, or the engine does not have the blocks of `serving`.
    pub fn prefixes(&self, serving: &Serving, requests: &[Request]) -> Result<Option<Arc<PrefixHashes>>> {
        let hashes = serving.prefix_caching.then(|| self.engine.prefix_hashes(requests, serving.block_tokens));
        Ok(hashes.transpose()?.map(Arc::new))
    }

    /// Whether the model can be served under these settings on this machine.
    ///
    /// # Errors
    /// If a setting is not of this engine, or its KV blocks take more memory than the machine has.
    pub fn check_settings(&self, settings: &Settings) -> Result<()> {
        self.engine.check_settings(settings)?;
        self.check_memory(u64::from(settings.num_blocks) * u64::from(settings.block_tokens))
    }

    /// Whether the keys and values of this number of positions fit into the memory of this machine. Only checked for a
    /// model that runs on the CPU.
    ///
    /// # Errors
    /// If they do not.
    pub fn check_memory(&self, positions: u64) -> Result<()> {
        let bytes = positions.saturating_mul(self.engine.model.kv_bytes_per_token(KvFill::Reuse));
        let Some(memory) = memory_bytes().filter(|_| self.device == DeviceName::Cpu) else { return Ok(()) };
        let shown = |bytes| ByteSize(bytes).display().iec();
        ensure!(
            bytes <= memory,
            "keys and values of {positions} positions take {}: expected at most this machine's memory of {}",
            shown(bytes),
            shown(memory)
        );
        Ok(())
    }

    /// What the model takes of memory, as far as it is known without a profile.
    pub fn memory(&self) -> ModelMemory {
        model_memory(&*self.engine.model)
    }
}

/// Opens prompts: JSON lines if the name of the file says so, and otherwise a text that prompts are cut from.
///
/// # Errors
/// If the file does not read.
pub fn read_prompts(path: &Path, tokenizer: &Tokenizer) -> Result<Prompts> {
    if PromptLine::is_file(path) {
        return Ok(Prompts::Lines(PromptLine::read(path, tokenizer)?));
    }
    let text = traces::input::read_text(path)?;
    Ok(Prompts::TextAfter { begin: tokenizer.begin()?, text: tokenizer.encode(&text)?, prefixes: None })
}

/// The memory of this machine; none where that is not known.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
}

fn model_memory(model: &dyn ServedModel) -> ModelMemory {
    ModelMemory {
        num_loops: model.config().num_loops as u32,
        weight_bytes: model.weight_bytes(),
        kv_bytes_per_token: model.kv_bytes_per_token(KvFill::Reuse),
        figures: MemoryFigures::default(),
        kv_fill: model.config().kv_fill,
    }
}

/// Records the exit trace of these requests.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn record(NamedEngine { engine, name, .. }: &NamedEngine, requests: &[Request]) -> Result<ExitTrace> {
    Ok(engine.record(requests, name, &recording_source(engine, requests), &mut ())?)
}

/// What an exit trace of these requests says of how it was made.
pub fn recording_source(engine: &Engine, requests: &[Request]) -> String {
    format!("{} requests at full depth, temperature {}", requests.len(), engine.sampling.temperature)
}

/// What a pass log of this engine says that it was measured on.
pub fn pass_log_meta(NamedEngine { engine, name, .. }: &NamedEngine) -> PassLogMeta {
    let model = &engine.model;
    PassLogMeta::new(name, model.fingerprint(), model.config().num_loops as u32, &model.device_name())
}
