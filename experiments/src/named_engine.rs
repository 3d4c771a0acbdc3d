//! A model that is ready to serve, by the name that its records have.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use bytesize::ByteSize;
use engine::{
    Checkpoint, CheckpointError, DeviceName, Engine, PromptLine, Prompts, Sampling, ServedModel, Tokenizer, WeightType,
};
use scheduler::{KvFill, Settings};
use simulator::ModelMemory;
use traces::{ExitTrace, MemoryFigures, PassLogMeta, PrefixHashes, Request};

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
        let (model, prompts) = (spec.model_from(base), base.join(&spec.prompts));
        Self::load(&model, spec.loops, spec.weights, spec.device, &prompts, sampling)
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
        let name = model.file_name().unwrap_or(model.as_os_str()).to_string_lossy().into_owned();
        let model = device.serve(&checkpoint.weights, weights)?;
        let prompts = Arc::new(Prompts::Text(vec![0; model.config().max_positions]));
        Ok(Self { engine: Engine { model, prompts, sampling }, name, tokenizer: checkpoint.tokenizer, device })
    }

    /// Fits requests and prompts to each other: requests get the lengths of prompts that have their own, and prompts of a
    /// text begin alike where the trace of the requests says so.
    pub fn fit(&mut self, requests: &mut [Request], prefixes: Option<Arc<PrefixHashes>>) {
        let prompts = &mut self.engine.prompts;
        prompts.set_lengths(requests);
        if let Some(prefixes) = prefixes {
            *prompts = Arc::new(Arc::unwrap_or_clone(prompts.clone()).with_prefixes(prefixes));
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
