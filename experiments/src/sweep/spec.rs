//! What a sweep runs through, as its YAML file says it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use itertools::iproduct;
use scheduler::{Batching, ExitPolicy, KvFill};
use serde::{Deserialize, Serialize};
use simulator::{Link, Objectives, Routing};
use traces::{ExitSignal, RequestSpec};

use super::axis::{Axis, Bytes, Passes, Value};
use crate::exit_choice::ExitChoice;
use crate::experiment::{SCHEMA_VERSION, read_yaml};
use crate::machines::{MachineSpec, check_specs, link_of, own_or_common};
use crate::serving::Serving;

/// Points that a sweep has at most: more are a mistake, or a day's work.
const MOST_POINTS: u128 = 100_000;

/// A sweep's file. Paths are relative to the folder it lies in.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SweepSpec {
    /// Version of the file format: 1.
    pub schema_version: u32,
    /// What figures are headed with.
    pub title: String,
    /// Seeds everything that is drawn at random but the requests, which have a seed of their own, unless `grid.seed`
    /// seeds both.
    #[serde(default)]
    pub seed: u64,
    /// The requests to serve.
    pub requests: RequestSpec,
    /// How they are scheduled, where the grid does not say otherwise.
    pub serving: Serving,
    /// What to simulate.
    pub systems: Vec<SweptSystem>,
    /// Machines of each, with a batch and a cache of their own.
    #[serde(default = "one")]
    pub replicas: usize,
    /// How requests are spread over them.
    #[serde(default = "in_turn")]
    pub routing: Routing,
    /// Whether times are drawn from their measured spread instead of being medians.
    #[serde(default)]
    pub spread: bool,
    /// What requests must meet to count for goodput, and what a capacity is searched for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objectives: Option<Objectives>,
    /// How the capacity is searched for, by `depthwise capacity`.
    #[serde(default)]
    pub capacity: CapacitySpec,
    /// What else varies.
    #[serde(default)]
    pub grid: Grid,
}

/// How the highest rate is searched for.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct CapacitySpec {
    /// Share of requests that must meet all objectives.
    pub share: f64,
    /// Width of the answer, relative to it.
    pub tolerance: f64,
}

impl Default for CapacitySpec {
    fn default() -> Self {
        Self { share: 0.9, tolerance: 0.01 }
    }
}

/// A model on a device.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SweptSystem {
    /// What tables and figures call it.
    pub name: String,
    /// Folder of a latency profile, or the [name](crate::profiles) of one that ships.
    pub profile: PathBuf,
    /// Folder of an exit trace; without one, every token runs every depth (exit policy `none`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<PathBuf>,
    /// Price of each machine for an hour, in any currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
    /// Instead of `serving.batching`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batching: Option<Vec<Batching>>,
    /// Instead of `serving.exit` and `grid.thresholds`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Vec<ExitChoice>>,
    /// Instead of `serving.machines`; empty for `replicas` machines of both roles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machines: Option<Vec<MachineSpec>>,
    /// Instead of `serving.transfer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Link>,
}

/// Lists of values, of which every combination runs.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grid {
    /// Thresholds by measure: each is one more exit policy beside `serving.exit`.
    pub thresholds: BTreeMap<ExitSignal, Axis<f32>>,
    /// Instead of `serving.kv_fill`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_fill: Option<Axis<KvFill>>,
    /// Instead of `serving.max_batch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch: Option<Axis<u32>>,
    /// Instead of `serving.token_budget`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_budget: Option<Axis<u32>>,
    /// Instead of `serving.prefill_chunk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_chunk: Option<Axis<u32>>,
    /// Instead of `serving.exit_wait`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_wait: Option<Axis<Passes>>,
    /// Instead of `serving.device_memory`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<Axis<Bytes>>,
    /// Mean requests per second, instead of those of the requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_s: Option<Axis<f64>>,
    /// Instead of `seed` and of the seed of generated requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<Axis<u64>>,
}

fn one() -> usize {
    1
}

fn in_turn() -> Routing {
    Routing::RoundRobin
}

/// One combination: what its simulation is of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Which of the systems.
    pub system: usize,
    /// Batching policy.
    pub batching: Batching,
    /// Exit policy.
    pub exit: ExitPolicy,
    /// What later tokens find at depths that early ones skipped.
    pub kv_fill: KvFill,
    /// Most sequences that run at once.
    pub max_batch: u32,
    /// Most rows of a pass or of an iteration.
    pub token_budget: u32,
    /// Most prompt tokens that start in a pass or an iteration; `None` for what follows from the budget.
    pub prefill_chunk: Option<u32>,
    /// Most passes that a token which exits waits for the exit head.
    pub exit_wait: u32,
    /// The device's memory in bytes, where it varies.
    pub device_memory: Option<u64>,
    /// Mean requests per second, where they vary.
    pub rate_per_s: Option<f64>,
    /// Seed of everything that is drawn at random; none for that of the requests themselves.
    pub seed: Option<u64>,
}

impl SweepSpec {
    /// Reads a sweep's file.
    ///
    /// # Errors
    /// If it does not read, a key is missing or unknown, or a value makes no sense.
    pub fn load(path: &Path) -> Result<Self> {
        read_yaml(path)
    }

    /// # Errors
    /// If keys contradict each other, or the grid is too large.
    pub fn check(&self) -> Result<()> {
        let version = self.schema_version;
        ensure!(version == SCHEMA_VERSION, "schema_version is {version}, expected {SCHEMA_VERSION}");
        self.serving.check().context("serving")?;
        ensure!(!self.systems.is_empty(), "systems is empty: expected at least one");
        // Until the systems are read, their numbers of loops, on which `baselines` depends, are not known.
        self.check_size(|_| 1)?;
        check_distinct("serving.batching", &self.serving.batching)?;
        check_distinct("serving.exit and grid.thresholds", &self.exits())?;
        check_distinct("serving.kv_fill", &self.serving.kv_fill)?;
        ensure!(self.replicas > 0, "replicas is 0: expected at least 1");
        let names: Vec<&str> = self.systems.iter().map(|system| system.name.as_str()).collect();
        check_distinct("the names of systems", &names)?;
        for system in &self.systems {
            system.check().with_context(|| format!("systems: {:?}", system.name))?;
        }
        ensure!(
            self.serving.transfer.is_none() || self.systems.iter().any(|system| !self.machines_of(system).is_empty()),
            "serving.transfer without machines: expected the roles of the machines (serving.machines)"
        );
        let grid = &self.grid;
        let (most, least) = (self.serving.max_batch, self.serving.token_budget);
        let most = grid.max_batch.iter().flat_map(Axis::values).max().copied().unwrap_or(most);
        let least = grid.token_budget.iter().flat_map(Axis::values).min().copied().unwrap_or(least);
        if grid.max_batch.is_some() || grid.token_budget.is_some() {
            let budget = if grid.token_budget.is_some() { "grid.token_budget" } else { "serving.token_budget" };
            let batch = if grid.max_batch.is_some() { "grid.max_batch" } else { "serving.max_batch" };
            ensure!(most <= least, "{batch}: {most} is more than {budget}, {least}: every sequence needs a row");
        }
        if grid.device_memory.is_some() {
            let serving = &self.serving;
            ensure!(
                serving.num_blocks.is_none(),
                "grid.device_memory beside serving.num_blocks: expected one of the two"
            );
            ensure!(
                serving.device_memory.is_none(),
                "grid.device_memory beside serving.device_memory: expected one of the two"
            );
        }
        let requests = &self.requests;
        if grid.rate_per_s.is_some() && (requests.rate_per_s.is_some() || requests.rate_factor.is_some()) {
            bail!("grid.rate_per_s beside a rate in requests: expected one of the two");
        }
        Ok(())
    }

    /// Refuses a grid with too many points, given the number of loops of each system.
    ///
    /// # Errors
    /// If there are too many.
    pub(super) fn check_size(&self, num_loops: impl Fn(usize) -> u8) -> Result<()> {
        let grid = &self.grid;
        let policies = |system: usize| self.combinations(system, num_loops(system)).len() as u128;
        let sizes = [
            ("systems and policies", (0..self.systems.len()).map(policies).sum()),
            ("kv_fill", self.kv_fills().len() as u128),
            ("max_batch", size(&grid.max_batch)),
            ("token_budget", size(&grid.token_budget)),
            ("prefill_chunk", size(&grid.prefill_chunk)),
            ("exit_wait", size(&grid.exit_wait)),
            ("device_memory", size(&grid.device_memory)),
            ("rate_per_s", size(&grid.rate_per_s)),
            ("seed", size(&grid.seed)),
        ];
        let points: u128 = sizes.iter().map(|(_, size)| size).product();
        let factors: Vec<String> = sizes.iter().map(|(name, size)| format!("{size} of {name}")).collect();
        ensure!(
            points <= MOST_POINTS,
            "the grid has {points} points ({}): expected at most {MOST_POINTS}",
            factors.join(" x ")
        );
        Ok(())
    }

    /// Every combination, given the number of loops of each system and the KV fill that its model is made for; those that
    /// differ in their seed alone follow each other.
    pub fn points(&self, model: impl Fn(usize) -> (u8, KvFill)) -> Vec<Point> {
        let grid = &self.grid;
        let limits = iproduct!(
            values(&grid.device_memory),
            self.kv_fills(),
            values(&grid.max_batch),
            values(&grid.token_budget),
            values(&grid.prefill_chunk),
            values(&grid.exit_wait)
        );
        let loads = iproduct!(0..self.systems.len(), limits, values(&grid.rate_per_s));
        type Limits = (Option<Bytes>, Option<KvFill>, Option<u32>, Option<u32>, Option<u32>, Option<Passes>);
        let points_of = |(system, limits, rate_per_s): (usize, Limits, Option<f64>)| {
            let (device_memory, kv_fill, max_batch, token_budget, prefill_chunk, exit_wait) = limits;
            let (num_loops, made_for) = model(system);
            let runs = iproduct!(self.combinations(system, num_loops), values(&grid.seed));
            runs.map(move |((batching, exit), seed)| Point {
                system,
                batching,
                exit,
                kv_fill: kv_fill.unwrap_or(made_for),
                max_batch: max_batch.unwrap_or(self.serving.max_batch),
                token_budget: token_budget.unwrap_or(self.serving.token_budget),
                prefill_chunk: prefill_chunk.or(self.serving.prefill_chunk),
                exit_wait: exit_wait.map_or(self.serving.exit_wait, |Passes(passes)| passes),
                device_memory: device_memory.map(|Bytes(bytes)| bytes),
                rate_per_s,
                seed,
            })
        };
        loads.flat_map(points_of).collect()
    }

    /// KV fills of the grid, or of `serving`; `None` for that of each system's model.
    fn kv_fills(&self) -> Vec<Option<KvFill>> {
        let given = self.grid.kv_fill.as_ref().map_or(&self.serving.kv_fill[..], Axis::values);
        if given.is_empty() { vec![None] } else { given.iter().copied().map(Some).collect() }
    }

    /// Points that differ in their seed alone.
    pub fn num_seeds(&self) -> usize {
        values(&self.grid.seed).len()
    }

    /// `serving.exit`, and a policy for each threshold.
    fn exits(&self) -> Vec<ExitChoice> {
        let confidence = |(&measure, thresholds): (&ExitSignal, &Axis<f32>)| {
            let policy = |&threshold| ExitPolicy::Confidence { signal: measure, threshold }.into();
            thresholds.values().iter().map(policy).collect::<Vec<_>>()
        };
        let thresholds = self.grid.thresholds.iter().flat_map(confidence);
        self.serving.exit.iter().copied().chain(thresholds).collect()
    }

    fn combinations(&self, system: usize, num_loops: u8) -> Vec<(Batching, ExitPolicy)> {
        let system = &self.systems[system];
        let batching = system.batching.as_ref().unwrap_or(&self.serving.batching);
        let batching = own_or_common(self.machines_of(system), batching).iter().copied();
        iproduct!(batching, ExitChoice::expand(&self.exits_of(system), num_loops)).collect()
    }

    /// The groups of machines of a system; none if all machines are the same.
    pub fn machines_of<'s>(&'s self, system: &'s SweptSystem) -> &'s [MachineSpec] {
        system.machines.as_ref().unwrap_or(&self.serving.machines)
    }

    /// The link between the machines of a system.
    pub fn link_of(&self, system: &SweptSystem) -> Option<Link> {
        link_of(self.machines_of(system), system.transfer, self.serving.transfer)
    }

    /// The exit policies of a system.
    pub fn exits_of(&self, system: &SweptSystem) -> Vec<ExitChoice> {
        system.exit.clone().unwrap_or_else(|| self.exits())
    }
}

impl SweptSystem {
    fn check(&self) -> Result<()> {
        ensure!(
            !self.name.is_empty() && !self.name.contains(char::is_control),
            "a name is empty or has a line break, expected one line"
        );
        for (key, is_empty) in [
            ("batching", self.batching.as_ref().is_some_and(Vec::is_empty)),
            ("exit", self.exit.as_ref().is_some_and(Vec::is_empty)),
        ] {
            ensure!(!is_empty, "{key} is empty: expected at least one policy");
        }
        if let Some(price) = self.price_per_hour {
            ensure!(price.is_finite() && price > 0.0, "price_per_hour is {price}: expected a number above 0");
        }
        check_specs(self.machines.as_deref().unwrap_or_default(), self.transfer)?;
        check_distinct("batching", self.batching.as_deref().unwrap_or_default())?;
        check_distinct("exit", self.exit.as_deref().unwrap_or_default())
    }
}

fn check_distinct<T: PartialEq + Display>(what: &str, items: &[T]) -> Result<()> {
    match items.iter().enumerate().find(|(index, item)| items[..*index].contains(item)) {
        Some((_, item)) => bail!("{what}: {item} is there twice"),
        None => Ok(()),
    }
}

fn values<T: Value>(axis: &Option<Axis<T>>) -> Vec<Option<T>> {
    match axis {
        Some(axis) => axis.values().iter().copied().map(Some).collect(),
        None => vec![None],
    }
}

fn size<T: Value>(axis: &Option<Axis<T>>) -> u128 {
    values(axis).len() as u128
}
