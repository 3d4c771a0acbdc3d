//! An experiment: the YAML file that `depthwise run` does from beginning to end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use scheduler::{Batching, ExitPolicy, Settings};
use serde::{Deserialize, Serialize};
use traces::{Measure, Request, RequestSpec};

/// The only `schema_version` this build reads.
pub const SCHEMA_VERSION: u32 = 1;

/// An experiment file. Paths are relative to the folder it lies in.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Version of the file format: 1.
    pub schema_version: u32,
    /// What figures are headed with.
    pub title: String,
    /// Seeds everything that is drawn at random but the requests, which have a seed of their own.
    #[serde(default)]
    pub seed: u64,
    /// The requests to serve.
    pub requests: RequestSpec,
    /// How they are scheduled.
    pub serving: Serving,
    /// What to measure on this machine, with the real engine; then the simulator is checked against it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineSpec>,
    /// What to simulate from profiles and exit traces at hand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub systems: Vec<System>,
    /// What to vary in the simulator.
    #[serde(default)]
    pub sweeps: Sweeps,
}

/// How requests are scheduled: every batching policy with every exit policy.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Serving {
    /// `vanilla`, `sequence`, `depth`.
    pub batching: Vec<Batching>,
    /// `none`, `static:DEPTH`, `oracle`, `oracle:charged`, `confidence:MEASURE:THRESHOLD`.
    pub exit: Vec<ExitPolicy>,
    /// Most sequences that run at once.
    pub max_batch: u32,
    /// Most rows of a pass (depth-wise) or of an iteration (lockstep).
    pub token_budget: u32,
    /// Most prompt tokens that start in a pass or an iteration. If not set, `token_budget`, divided by the
    /// number of loops under depth-wise batching.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_chunk: Option<u32>,
    /// Positions per KV block.
    #[serde(default = "default_block_tokens")]
    pub block_tokens: u32,
    /// Positions that the KV cache holds. If not set, room for a full batch of the longest request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u32>,
}

fn default_block_tokens() -> u32 {
    16
}

/// What to measure on this machine.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSpec {
    /// Model folder.
    pub model: PathBuf,
    /// Text that prompts are cut from.
    pub prompts: PathBuf,
    /// Times every combination is replayed, in alternation; the median run is reported.
    pub repeats: u32,
    /// Softmax temperature of sampling; 0 takes the most likely token.
    #[serde(default)]
    pub temperature: f32,
}

/// Something to simulate.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct System {
    /// What tables and figures call it.
    pub name: String,
    /// Folder of a latency profile.
    pub profile: PathBuf,
    /// Folder of an exit trace.
    pub exits: PathBuf,
    /// Instead of `serving.max_batch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_batch: Option<u32>,
    /// Instead of `serving.token_budget`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_budget: Option<u32>,
    /// Instead of `serving.batching`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batching: Option<Vec<Batching>>,
    /// Instead of `serving.exit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Vec<ExitPolicy>>,
    /// Throughput that somebody published of it, in tokens per second, to compare with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published_tok_s: Option<f64>,
}

/// What to vary in the simulator, one at a time.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Sweeps {
    /// Thresholds of confidence policies by measure, under depth-wise batching.
    #[serde(default)]
    pub thresholds: BTreeMap<Measure, Vec<f32>>,
    /// Batch limits, for every batching and exit policy.
    #[serde(default)]
    pub max_batch: Vec<u32>,
}

impl Experiment {
    /// Reads an experiment file.
    ///
    /// # Errors
    /// If it does not read, or a key is missing or unknown.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_yaml::from_str(&text).with_context(|| path.display().to_string())
    }

    /// # Errors
    /// If it asks for nothing or for what cannot be.
    pub fn check(&self) -> Result<()> {
        let version = self.schema_version;
        ensure!(version == SCHEMA_VERSION, "schema_version is {version}, expected {SCHEMA_VERSION}");
        ensure!(
            self.engine.is_some() == self.systems.is_empty(),
            "expected either `engine` (to measure on this machine) or `systems` (to simulate)"
        );
        ensure!(!self.serving.batching.is_empty(), "serving.batching is empty");
        ensure!(!self.serving.exit.is_empty(), "serving.exit is empty");
        if let Some(engine) = &self.engine {
            ensure!(engine.repeats > 0, "engine.repeats is 0: expected at least 1");
            let temperature = engine.temperature;
            ensure!(
                temperature.is_finite() && temperature >= 0.0,
                "engine.temperature is {temperature}: expected 0 or more"
            );
        }
        let strange = self.sweeps.thresholds.values().flatten().find(|threshold| !threshold.is_finite());
        ensure!(strange.is_none(), "sweeps.thresholds: {strange:?} is not a finite number");
        Ok(())
    }
}

impl System {
    /// How it is scheduled, where it differs from the experiment's other systems.
    pub fn serving(&self, common: &Serving) -> Serving {
        Serving {
            batching: self.batching.clone().unwrap_or_else(|| common.batching.clone()),
            exit: self.exit.clone().unwrap_or_else(|| common.exit.clone()),
            max_batch: self.max_batch.unwrap_or(common.max_batch),
            token_budget: self.token_budget.unwrap_or(common.token_budget),
            ..common.clone()
        }
    }
}

impl Serving {
    /// Every batching policy with every exit policy.
    pub fn combinations(&self) -> Vec<(Batching, ExitPolicy)> {
        let exits = |&batching| self.exit.iter().map(move |&exit| (batching, exit));
        self.batching.iter().flat_map(exits).collect()
    }

    /// The scheduler's settings for every combination; see [`Self::settings`].
    pub fn all_settings(&self, num_loops: u8, requests: &[Request]) -> Vec<Settings> {
        let settings = |(batching, exit)| self.settings(batching, exit, num_loops, requests);
        self.combinations().into_iter().map(settings).collect()
    }

    /// The scheduler's settings for one combination, on a model of so many loops, with room for these requests.
    pub fn settings(&self, batching: Batching, exit: ExitPolicy, num_loops: u8, requests: &[Request]) -> Settings {
        let share = if batching.is_lockstep() { 1 } else { u32::from(num_loops) };
        let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
        let blocks = match self.cache_tokens {
            Some(tokens) => tokens / self.block_tokens.max(1),
            None => longest.div_ceil(self.block_tokens.max(1)).saturating_mul(self.max_batch),
        };
        Settings {
            batching,
            exit,
            num_loops,
            max_batch: self.max_batch,
            token_budget: self.token_budget,
            prefill_chunk: self.prefill_chunk.unwrap_or((self.token_budget / share).max(1)),
            block_tokens: self.block_tokens,
            num_blocks: blocks,
            prefix_caching: false,
            async_scheduling: false,
        }
    }
}
