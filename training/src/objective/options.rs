//! Options of the objective.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use engine::ModelConfig;
use scheduler::KvFill;
use serde::{Deserialize, Serialize};
use traces::ExitSignal;

use super::fill::{ExitRule, FillOptions};
use crate::error::TrainingError;
use crate::trainer::options::{check, check_weight};

/// Options of the objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectiveOptions {
    /// Coefficients c_i of the loops' losses.
    pub exits: ExitCoefficients,
    /// Weight a of next-token cross-entropy.
    pub cross_entropy: f64,
    /// Knowledge distillation from a full-size teacher, if configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherOptions>,
    /// Weight d of the divergence of an earlier loop from the last.
    pub self_distillation: f64,
    /// Training of the gates, if configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<GateOptions>,
    /// Exits under a KV fill, if configured. By default, every token has exact keys and values at every depth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_fill: Option<FillOptions>,
}

impl Default for ObjectiveOptions {
    fn default() -> Self {
        Self {
            exits: ExitCoefficients::Last,
            cross_entropy: 1.0,
            teacher: None,
            self_distillation: 0.0,
            gate: None,
            kv_fill: None,
        }
    }
}

/// Coefficients of the loops' losses: `last`, `weighted` or `aggressive:INTERMEDIATE`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ExitCoefficients {
    /// 1 for the last loop, 0 for the others.
    Last,
    /// `i / (1 + 2 + ... + loops)` for the `i`-th loop.
    Weighted,
    /// 1 for the last loop, this coefficient for the others.
    Aggressive(f64),
}

/// A teacher and its weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherOptions {
    /// The teacher, in any form that [`Checkpoint::open`](engine::Checkpoint::open) accepts: a folder, a
    /// GGUF file or a name on the hub.
    pub model: PathBuf,
    /// Weight b of the divergence from the teacher.
    #[serde(default = "one")]
    pub weight: f64,
    /// Temperature T of both distributions.
    #[serde(default = "one")]
    pub temperature: f64,
}

/// Options of gate training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateOptions {
    /// Weight g of the gates' binary cross-entropy.
    #[serde(default = "one")]
    pub weight: f64,
    /// Whether the loss also trains what the gates read, rather than the gates only.
    #[serde(default)]
    pub through: bool,
    /// The loop whose token the gate judges.
    #[serde(default)]
    pub target: GateTarget,
    /// Temperature at which the tokens that are compared are drawn, both with the same random numbers, as when the
    /// model is served; 0: the most likely tokens.
    #[serde(default)]
    pub temperature: f64,
}

impl Default for GateOptions {
    fn default() -> Self {
        Self { weight: one(), through: false, target: GateTarget::Same, temperature: 0.0 }
    }
}

/// The loop whose token a gate judges: does it agree with that of the last loop?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GateTarget {
    /// The loop of the gate.
    #[default]
    Same,
    /// The loop after the gate's, for exits that are decided a pass ahead.
    Next,
}

impl FromStr for GateTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "same" => Ok(Self::Same),
            "next" => Ok(Self::Next),
            _ => Err(format!("unknown target `{text}` of gates: expected same or next")),
        }
    }
}

fn one() -> f64 {
    1.0
}

impl ExitCoefficients {
    /// The coefficient of each loop, first to last.
    pub fn of(self, num_loops: usize) -> Vec<f64> {
        let sum = (num_loops * (num_loops + 1) / 2) as f64;
        let coefficient = |number: usize| match self {
            Self::Weighted => number as f64 / sum,
            _ if number == num_loops => 1.0,
            Self::Aggressive(intermediate) => intermediate,
            Self::Last => 0.0,
        };
        (1..=num_loops).map(coefficient).collect()
    }
}

impl fmt::Display for ExitCoefficients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last => f.write_str("last"),
            Self::Weighted => f.write_str("weighted"),
            Self::Aggressive(intermediate) => write!(f, "aggressive:{intermediate}"),
        }
    }
}

impl FromStr for ExitCoefficients {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once(':')) {
            ("last", _) => Some(Self::Last),
            ("weighted", _) => Some(Self::Weighted),
            (_, Some(("aggressive", intermediate))) => intermediate.parse().ok().map(Self::Aggressive),
            _ => None,
        }
        .ok_or_else(|| format!("unknown exits `{text}`: expected last, weighted or aggressive:COEFFICIENT"))
    }
}

impl From<ExitCoefficients> for String {
    fn from(exits: ExitCoefficients) -> Self {
        exits.to_string()
    }
}

impl TryFrom<String> for ExitCoefficients {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl ObjectiveOptions {
    /// Checks the weights, by themselves and against the model.
    ///
    /// # Errors
    /// The first option that is out of range.
    pub fn check(&self, config: &ModelConfig) -> Result<(), TrainingError> {
        if let ExitCoefficients::Aggressive(intermediate) = self.exits {
            check_weight("objective.exits", intermediate)?;
        }
        check_weight("objective.cross_entropy", self.cross_entropy)?;
        check_weight("objective.self_distillation", self.self_distillation)?;
        let distills = self.self_distillation > 0.0;
        let expected = "0 where objective.exits is last: earlier loops then do not count";
        check(!distills || self.exits != ExitCoefficients::Last, "objective.self_distillation", &"above 0", &expected)?;
        if let Some(teacher) = &self.teacher {
            check_weight("objective.teacher.weight", teacher.weight)?;
            let temperature = teacher.temperature;
            let valid = temperature.is_finite() && temperature > 0.0;
            check(valid, "objective.teacher.temperature", &temperature, &"a finite number above 0")?;
        }
        if let Some(gate) = &self.gate {
            check_weight("objective.gate.weight", gate.weight)?;
            check_weight("objective.gate.temperature", gate.temperature)?;
            let gated = config.gate && config.num_loops > 1;
            check(gated, "objective.gate", &"given", &"none for a model without gates (`gate: true` adds them)")?;
        }
        if let Some(FillOptions { fill, exits, prompt }) = &self.kv_fill {
            let expected =
                "none for a model whose loops share the keys and values of depth 0: exits change nothing there";
            check(!config.shares_kv(), "objective.kv_fill", &"given", &expected)?;
            let is_known = matches!(fill, KvFill::Reuse | KvFill::First | KvFill::Skip);
            let expected = "reuse, first or skip: backfill changes nothing, and the others are not trained for";
            check(is_known, "objective.kv_fill.fill", fill, &expected)?;
            let gated = config.gate && config.num_loops > 1;
            let needs = matches!(exits, ExitRule::Signal(ExitSignal::Gate, ..));
            check(gated || !needs, "objective.kv_fill.exits", exits, &"another signal for a model without gates")?;
            check((0.0..=1.0).contains(prompt), "objective.kv_fill.prompt", prompt, &"a share from 0 to 1")?;
        }
        Ok(())
    }
}
