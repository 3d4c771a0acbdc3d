//! An experiment: the YAML file that `depthwise run` does from beginning to end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use engine::{Checkpoint, DeviceName, WeightType};
use scheduler::{Batching, KvFill};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use simulator::{Link, Objectives};
use traces::{ExitSignal, RequestSpec};

use crate::exit_choice::ExitChoice;
use crate::machines::{MachineSpec, check_specs, link_of};
use crate::serving::{MOST_REPEATS, MOST_ROWS, Serving, check_at_most};

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
    /// What requests must meet to count for goodput.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objectives: Option<Objectives>,
    /// What to measure on this machine, with the real engine; then the simulator is checked against it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineSpec>,
    /// How to test the simulator against the engine, instead of measuring what `engine` says as the requests arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationSpec>,
    /// What to simulate from profiles and exit traces at hand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub systems: Vec<System>,
    /// What to vary in the simulator.
    #[serde(default)]
    pub sweeps: Sweeps,
}

/// What to measure on this machine.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSpec {
    /// A folder of ours or of Hugging Face's, a GGUF file, a name on the Hugging Face hub, or `random:` and a configuration
    /// file of ours, for random weights.
    pub model: PathBuf,
    /// Split the layers of an ordinary transformer into so many blocks, a depth each; or run a looped model so many times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loops: Option<usize>,
    /// How the numbers of its weights are stored.
    #[serde(default)]
    pub weights: WeightType,
    /// Where it runs: `cpu`, `cuda` or `cuda:N`.
    #[serde(default)]
    pub device: DeviceName,
    /// Prompts in JSON lines, one for each request (`.jsonl`), or a text that prompts are cut from. Without them, with
    /// `exits`, the tokens of prompts are drawn at random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PathBuf>,
    /// Folder of an exit trace that fits any model: tokens exit as it says, whatever the model computes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<PathBuf>,
    /// Times every combination is replayed, in alternation; the median run is reported.
    pub repeats: u32,
    /// Rounds of the latency profile, which is complete before the first replay.
    #[serde(default = "default_rounds")]
    pub rounds: u32,
    /// Softmax temperature of sampling; 0 takes the most likely token.
    #[serde(default)]
    pub temperature: f32,
    /// Shares of the capacity to which arrivals are scaled, each served on its own: the capacity is the rate at which
    /// the first batching policy with the first exit policy serves the requests when all arrive at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loads: Vec<f64>,
}

/// How to test the simulator against the engine.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationSpec {
    /// Requests in flight in the closed loop; the batch limit if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<u32>,
    /// Rates of arrival, each as a share of the capacity that a combination had in the closed loop.
    pub rates: Vec<f64>,
}

impl ValidationSpec {
    /// Rates of arrival if none are given.
    pub const RATES: [f64; 4] = [0.5, 0.7, 0.9, 1.05];
}

impl Default for ValidationSpec {
    fn default() -> Self {
        Self { in_flight: None, rates: Self::RATES.to_vec() }
    }
}

fn default_rounds() -> u32 {
    EngineSpec::ROUNDS
}

/// Something to simulate.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct System {
    /// What tables and figures call it.
    pub name: String,
    /// Folder of a latency profile, or the [name](crate::profiles) of one that ships.
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
    pub exit: Option<Vec<ExitChoice>>,
    /// Instead of `serving.kv_fill`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_fill: Option<KvFill>,
    /// Instead of `serving.exit_wait`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_wait: Option<u32>,
    /// Instead of `serving.machines`; empty for one machine of both roles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machines: Option<Vec<MachineSpec>>,
    /// Instead of `serving.transfer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Link>,
    /// Name of the system that its speed-up is over, if not the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compared_with: Option<String>,
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
    pub thresholds: BTreeMap<ExitSignal, Vec<f32>>,
    /// Batch limits, for every batching and exit policy.
    #[serde(default)]
    pub max_batch: Vec<u32>,
}

/// Reads a YAML file.
///
/// # Errors
/// If it does not read, or a key is missing or unknown; with its path.
pub fn read_yaml<T: DeserializeOwned>(path: &Path) -> Result<T> {
    Ok(traces::table::read_yaml(path)?)
}

impl Experiment {
    /// Reads an experiment file.
    ///
    /// # Errors
    /// If it does not read, or a key is missing or unknown.
    pub fn load(path: &Path) -> Result<Self> {
        read_yaml(path)
    }

    /// The system that another one's speed-up is over.
    ///
    /// # Errors
    /// If it is not there.
    pub fn baseline_of(&self, system: &System) -> Result<&System> {
        let Some(name) = &system.compared_with else { return Ok(&self.systems[0]) };
        let found = self.systems.iter().find(|other| other.name == *name);
        found.with_context(|| format!("{}: compared_with is `{name}`, which is no system", system.name))
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
        self.serving.check().context("serving")?;
        if let Some(objectives) = &self.objectives {
            objectives.check().context("objectives")?;
        }
        if let Some(engine) = &self.engine {
            self.serving.check_for_engine().context("serving")?;
            ensure!(
                engine.prompts.is_some() || engine.exits.is_some(),
                "no engine.prompts: expected a text or JSON lines, since only an exit trace of any model (engine.exits) goes \
                 with prompts that are drawn at random"
            );
            ensure!(engine.repeats > 0, "engine.repeats is 0: expected at least 1");
            check_at_most("engine.repeats", engine.repeats.into(), MOST_REPEATS.into())?;
            let temperature = engine.temperature;
            ensure!(
                temperature.is_finite() && temperature >= 0.0,
                "engine.temperature is {temperature}: expected 0 or more"
            );
            ensure!(engine.rounds > 0, "engine.rounds is 0: expected at least 1");
            check_at_most("engine.rounds", engine.rounds.into(), MOST_REPEATS.into())?;
            check_shares("engine.loads", &engine.loads)?;
            let sweeps = !(self.sweeps.thresholds.is_empty() && self.sweeps.max_batch.is_empty());
            ensure!(!sweeps || engine.loads.is_empty(), "sweeps beside engine.loads: expected one of the two");
            if let Some(validation) = &self.validation {
                validation.check()?;
                ensure!(engine.loads.is_empty(), "engine.loads beside validation: expected validation.rates");
                ensure!(!sweeps, "sweeps beside validation: expected one of the two");
            }
        }
        ensure!(
            self.validation.is_none() || self.engine.is_some(),
            "validation without `engine`: expected what to measure on this machine"
        );
        for system in &self.systems {
            self.baseline_of(system)?;
            check_specs(system.machines.as_deref().unwrap_or_default(), system.transfer)
                .with_context(|| format!("system `{}`", system.name))?;
        }
        ensure!(
            self.serving.transfer.is_none()
                || self.systems.iter().any(|system| !system.machines_or(&self.serving).is_empty()),
            "serving.transfer without machines: expected the roles of the machines (serving.machines)"
        );
        ensure!(
            self.systems.is_empty() || self.sweeps.thresholds.is_empty(),
            "sweeps.thresholds beside systems: expected the thresholds in the systems' `exit`"
        );
        if let Some(strange) = self.sweeps.thresholds.values().flatten().find(|threshold| !threshold.is_finite()) {
            bail!("sweeps.thresholds: {strange} is not a finite number");
        }
        Ok(())
    }
}

/// Checks shares of a capacity.
fn check_shares(name: &str, shares: &[f64]) -> Result<()> {
    if let Some(strange) = shares.iter().find(|share| !(share.is_finite() && **share > 0.0)) {
        bail!("{name}: {strange} is no positive share of the capacity");
    }
    let distinct = shares.iter().enumerate().all(|(place, share)| !shares[..place].contains(share));
    ensure!(distinct, "{name}: a share is there twice");
    Ok(())
}

impl ValidationSpec {
    fn check(&self) -> Result<()> {
        check_shares("validation.rates", &self.rates)?;
        let Some(in_flight) = self.in_flight else { return Ok(()) };
        ensure!(in_flight > 0, "validation.in_flight is 0: expected at least 1");
        check_at_most("validation.in_flight", in_flight.into(), MOST_ROWS.into())
    }
}

impl EngineSpec {
    /// Rounds of the latency profile if their number is not given.
    pub const ROUNDS: u32 = 4;

    /// Where the model is: relative to `base`, or, if nothing is there, on the hub.
    pub fn model_from(&self, base: &Path) -> PathBuf {
        if let Some(config) = Checkpoint::random_config(&self.model) {
            return PathBuf::from(format!("random:{}", base.join(config).display()));
        }
        let path = base.join(&self.model);
        if path.exists() { path } else { self.model.clone() }
    }
}

impl System {
    /// How it is scheduled, where it differs from the experiment's other systems.
    pub fn serving(&self, common: &Serving) -> Serving {
        let machines = self.machines_or(common).to_vec();
        Serving {
            batching: self.batching.clone().unwrap_or_else(|| common.batching.clone()),
            exit: self.exit.clone().unwrap_or_else(|| common.exit.clone()),
            kv_fill: self.kv_fill.map_or_else(|| common.kv_fill.clone(), |kv_fill| vec![kv_fill]),
            max_batch: self.max_batch.unwrap_or(common.max_batch),
            token_budget: self.token_budget.unwrap_or(common.token_budget),
            exit_wait: self.exit_wait.unwrap_or(common.exit_wait),
            transfer: link_of(&machines, self.transfer, common.transfer),
            machines,
            ..common.clone()
        }
    }

    /// The groups of machines of this system.
    fn machines_or<'s>(&'s self, common: &'s Serving) -> &'s [MachineSpec] {
        self.machines.as_ref().unwrap_or(&common.machines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_experiments_of_this_repository_can_be_run() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        for name in [
            "quickstart",
            "kjv",
            "full",
            "paper/table",
            "validation/azure-kjv",
            "validation/azure-smollm2",
            "cuda/kjv",
            "cuda/smollm2",
            "cuda/validation",
            "policies/load-adaptive",
            "policies/delayed",
            "policies/delayed-async",
        ] {
            Experiment::load(&configs.join(format!("{name}.yaml"))).unwrap().check().unwrap();
        }
        for (name, requests) in
            [("generated-kjv", 96), ("kjv", 1000), ("chains", 1000), ("unseen-chains", 1000), ("unseen-kjv", 200)]
        {
            let generated = Experiment::load(&configs.join(format!("validation/{name}.yaml"))).unwrap();
            generated.check().unwrap();
            assert_eq!(generated.requests.load(&configs).unwrap().requests.len(), requests, "{name}");
        }
    }
}
