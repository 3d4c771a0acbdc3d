//! Predicting: simulations from a profile and a recording that were complete before.

use anyhow::Result;
use latency::{Extrapolations, LatencyModel};
use scheduler::{Batching, KvFill, Settings};
use serde::Serialize;
use simulator::{Objectives, Summary};

use crate::compare::{Metric, Predictions};
use crate::measure::metrics_of;
use crate::recording::Recording;
use crate::runs::{Machines, Run};
use crate::workload::Workload;

/// Predictions that were written before the first replay.
pub const PREDICTIONS: &str = "predictions.csv";
/// Predictions at rates that follow from a measured capacity, written before the first replay at such a rate.
pub const PREDICTIONS_AT_RATES: &str = "predictions_at_rates.csv";

/// One predicted value: a line of `predictions.csv`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Batching policy.
    pub batching: Batching,
    /// Exit policy.
    pub exit_policy: String,
    /// KV fill.
    pub kv_fill: KvFill,
    /// Arrival rate as a share of the capacity; `None` where arrivals are not scaled to one.
    pub load: Option<f64>,
    /// Name of the metric, as the column of `summary.csv`.
    pub metric: &'static str,
    /// The value.
    pub predicted: f64,
    /// The value over that of the baseline; `None` where no ratio is predicted.
    pub ratio: Option<f64>,
}

/// The predictions of a run, and beside a baseline their ratios to it.
pub fn predictions(
    of: &Summary,
    load: Option<f64>,
    metrics: &[Metric],
    baseline: Option<&Summary>,
) -> impl Iterator<Item = Prediction> {
    metrics.iter().filter_map(move |&(metric, value)| {
        let predicted = value(of).filter(|value| value.is_finite())?;
        Some(Prediction {
            batching: of.batching,
            exit_policy: of.exit_policy.clone(),
            kv_fill: of.kv_fill,
            load,
            metric,
            predicted,
            ratio: baseline.and_then(value).map(|of_baseline| predicted / of_baseline),
        })
    })
}

/// Latency models that predictions are made from.
pub type Models = Predictions<LatencyModel>;

/// Simulates recorded requests under some settings.
#[derive(Clone, Copy)]
pub struct Predictor<'a> {
    /// The settings of every combination.
    pub settings: &'a [Settings],
    /// Exits under these settings.
    pub recording: &'a Recording,
    /// Objectives that requests must meet.
    pub objectives: Option<Objectives>,
}

impl Predictor<'_> {
    /// A run of every combination, and what was extrapolated.
    ///
    /// # Errors
    /// If a request cannot be served.
    pub fn runs(&self, model: &LatencyModel, workload: &Workload) -> Result<(Vec<Run>, Extrapolations)> {
        let (mut runs, mut beyond) = (Vec::new(), Extrapolations::default());
        for place in 0..self.settings.len() {
            let (run, of_run) = self.run(model, place, workload)?;
            runs.push(run);
            beyond.merge(&of_run);
        }
        Ok((runs, beyond))
    }

    /// A run of one combination.
    ///
    /// # Errors
    /// If a request cannot be served.
    pub fn one(&self, model: &LatencyModel, place: usize, workload: &Workload) -> Result<Summary> {
        Ok(self.run(model, place, workload)?.0.summary)
    }

    fn run(&self, model: &LatencyModel, place: usize, workload: &Workload) -> Result<(Run, Extrapolations)> {
        let settings = self.settings[place];
        let simulation = Machines::ONE.simulation(settings, model, self.recording.exits(place), workload)?;
        let mut metrics = [metrics_of(&settings, self.objectives)];
        let outcome = simulation.run(workload.requests.iter().copied(), &mut metrics)?;
        let [metrics] = metrics;
        let mut summary = simulation.summary(&metrics, &outcome);
        summary.token_agreement = summary.token_agreement.filter(|_| self.recording.has_predictions(place));
        Ok((
            Run { summary, metrics, time: Some(outcome.time), quality: None, groups: Vec::new() },
            outcome.extrapolations,
        ))
    }
}
