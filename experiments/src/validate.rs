//! The validation protocol: predict, then measure, then compare.
//!
//! ```text
//! record ──► profile ──► predict ──► closed loop ──► predict at rates ──► arrivals ──► profile again ──► compare
//!                        predictions.csv             predictions_at_rates.csv
//! ```
//!
//! Predictions use the profile and the recording only. The closed loop gives the rates of arrival, and nothing else, to the
//! predictions at rates.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use latency::LatencyModel;
use scheduler::{Batching, ExitPolicy, Settings};
use simulator::{Objectives, Summary, write_csv};
use traces::{ExitTable, PassLog, RequestTrace};

use crate::compare::{
    BELOW_CAPACITY, Comparison, Kind, MeanError, Metric, Predictions, RATIOS, VALUES, mean_errors, median,
};
use crate::experiment::{EngineSpec, Experiment, ValidationSpec};
use crate::figures::{self, Caption};
use crate::measure::{Looped, alternating, median_runs, once};
use crate::named_engine::{NamedEngine, pass_log_meta};
use crate::passes::{compare_passes, write_graphs};
use crate::predict::{Models, PREDICTIONS, PREDICTIONS_AT_RATES, Predictor, predictions};
use crate::profile::{Profiled, lengths, limits};
use crate::recording::Recording;
use crate::reporter::Reporter;
use crate::results::{PASS_LOG, ResultsFolder};
use crate::runs::{Run, warn_of_extrapolations, warn_of_script, write_depth_rows, write_requests};
use crate::workload::{Workload, load_open_loop};

/// What a validation came to.
#[derive(Clone, Debug)]
pub struct Validation {
    /// Of the closed loop: every measured run, the median of its repeats, then every predicted one.
    pub runs: Vec<Summary>,
    /// The tables, in order of importance.
    pub tables: Vec<Table>,
}

/// Comparisons of one kind.
#[derive(Clone, Debug)]
pub struct Table {
    /// The kind.
    pub kind: Kind,
    /// By combination and metric.
    pub comparisons: Vec<Comparison>,
    /// By load and metric.
    pub means: Vec<MeanError>,
}

impl Table {
    /// The comparisons with their means.
    pub fn new(kind: Kind, comparisons: Vec<Comparison>) -> Self {
        Self { means: mean_errors(kind, &comparisons), kind, comparisons }
    }
}

/// Writes a file for each table, and what they have in common.
///
/// # Errors
/// If one cannot be written.
pub fn write_tables(folder: &Path, tables: &[Table]) -> Result<()> {
    for table in tables {
        write_csv(&folder.join(format!("{}.csv", table.kind.name())), &table.comparisons)?;
    }
    let lines = || tables.iter().flat_map(|table| table.comparisons.iter().map(|line| (table.kind, line)));
    write_csv(&folder.join("repeats.csv"), lines().flat_map(|(kind, line)| line.repeats(kind)))?;
    Ok(write_csv(&folder.join("errors.csv"), tables.iter().flat_map(|table| &table.means))?)
}

/// What a validation is of.
struct Subject {
    engine: NamedEngine,
    trace: RequestTrace,
    /// Every combination, and last the baseline: sequence-wise batching without exits.
    settings: Vec<Settings>,
    /// The requests in a closed loop.
    looped: Workload,
    repeats: u32,
    objectives: Option<Objectives>,
}

/// Validates the simulator, and leaves the results in a folder; the second value says whether the figures were drawn.
///
/// # Errors
/// If something that it needs does not read, cannot be served or cannot be written.
pub(crate) fn validate_into(
    experiment: &Experiment,
    spec: &EngineSpec,
    validation: &ValidationSpec,
    base: &Path,
    folder: &mut ResultsFolder,
    reporter: &mut dyn Reporter,
) -> Result<(Validation, Result<()>)> {
    let subject = Subject::new(experiment, spec, validation, base, reporter)?;
    let Subject { engine, trace, settings, .. } = &subject;
    reporter.message("recording exits");
    let recording = Recording::new(engine, settings, &trace.requests)?;
    let limits = limits(settings.iter(), &trace.requests);
    let mut profiled = Profiled::measure(engine, limits, lengths(&trace.requests), spec.rounds as usize, reporter)?;
    let results = folder.path()?;
    let profile = profiled.profile(&format!("{} rounds before the replays", spec.rounds))?;
    profile.write(results.join("profile"))?;
    recording.trace.write(results.join("exits"), ExitTable::Parquet)?;
    let mut models =
        Predictions { first: LatencyModel::new(&profile)?, without_a_round: profiled.without_a_round()?, repeat: None };

    let predictor = Predictor { settings, recording: &recording, objectives: None };
    let (predicted, beyond) = predictor.runs(&models.first, &subject.looped)?;
    warn_of_extrapolations(&beyond, reporter);
    let baseline = &predicted[subject.combinations()].summary;
    let lines = predicted[..subject.combinations()].iter();
    let lines = lines.flat_map(|run| predictions(&run.summary, None, &VALUES, Some(baseline)));
    let seal = folder.seal(PREDICTIONS, lines)?;
    reporter.note(&format!("predictions before the first replay: {seal}"));

    let measured = subject.closed_loop(&recording, &predicted, reporter)?;
    let capacities = subject.capacities(&measured);
    let rated = Rated::new(&subject, &capacities, &validation.rates)?;
    if rated.is_empty() && !validation.rates.is_empty() {
        reporter.warning("the requests all arrive at once: nothing is compared at rates of arrival");
    }
    let predictor = Predictor { objectives: subject.objectives, ..predictor };
    if !rated.is_empty() {
        let lines = rated.iter().map(|(place, rate, workload)| {
            let run = predictor.one(&models.first, place, workload)?;
            Ok::<_, anyhow::Error>(predictions(&run, Some(rate), metrics_at(rate), None).collect::<Vec<_>>())
        });
        let lines: Vec<_> = lines.collect::<Result<_>>()?;
        let seal = folder.seal(PREDICTIONS_AT_RATES, lines.concat())?;
        reporter.note(&format!("predictions before the first replay at a rate: {seal}"));
    }
    let at_rates = rated.measure(&subject, &recording, reporter)?;
    models.repeat = Some(profiled.repeat(reporter)?);

    let mut tables = subject.compare_closed_loop(&predictor, &models, &measured)?;
    if !rated.is_empty() {
        tables.push(Table::new(Kind::AtRates, rated.compare(&predictor, &models, &at_rates)?));
    }
    write_tables(&results, &tables)?;
    let runs = subject.write_runs(&results, &models.first, &profiled, measured, &predicted)?;
    let caption = Caption { setting: experiment.title.clone(), device: profile.meta.device.clone() };
    let drawn = figures::draw(&results, &results.join("figures"), &caption);
    Ok((Validation { runs, tables }, drawn))
}

impl Subject {
    fn new(
        experiment: &Experiment,
        spec: &EngineSpec,
        validation: &ValidationSpec,
        base: &Path,
        reporter: &mut dyn Reporter,
    ) -> Result<Self> {
        let mut trace = load_open_loop(&experiment.requests, base, reporter)?;
        let mut engine = NamedEngine::of_spec(spec, base, experiment.seed)?;
        engine.fit(&mut trace.requests, trace.prefix_hashes.take().map(Arc::new));
        warn_of_script(&engine, &trace.requests, reporter);
        let (serving, memory) = (&experiment.serving, engine.memory());
        let prefixes = engine.prefixes(serving, &trace.requests)?;
        let mut settings = serving.all_settings(&memory, &trace.requests)?;
        let longest = crate::serving::longest(&trace.requests);
        let is_baseline = |of: &&Settings| of.batching == Batching::Sequence && of.exit == ExitPolicy::None;
        let baseline = match settings.iter().find(is_baseline) {
            Some(&baseline) => baseline,
            None => serving.settings(Batching::Sequence, ExitPolicy::None, settings[0].kv_fill, &memory, longest)?,
        };
        settings.push(baseline);
        settings.iter().try_for_each(|settings| engine.check_settings(settings))?;
        let in_flight = validation.in_flight.unwrap_or(serving.max_batch);
        let in_flight = NonZeroU32::new(in_flight).context("no requests in flight: expected at least 1")?;
        let looped = Workload { prefixes, ..Workload::in_flight(trace.requests.clone(), in_flight) };
        Ok(Self { engine, trace, settings, looped, repeats: spec.repeats, objectives: experiment.objectives })
    }

    fn combinations(&self) -> usize {
        self.settings.len() - 1
    }

    /// By repeat, every combination in a closed loop beside the baseline.
    fn closed_loop(
        &self,
        recording: &Recording,
        predicted: &[Run],
        reporter: &mut dyn Reporter,
    ) -> Result<Vec<Vec<[Looped; 2]>>> {
        let combinations = self.combinations();
        let makespan = |place: usize| predicted[place].summary.makespan_s;
        reporter.start(self.repeats as usize * combinations, 0);
        let mut measure = |repeat: u32, place: usize| {
            let Settings { batching, exit, kv_fill, .. } = self.settings[place];
            reporter.message(&format!(
                "closed loop: {batching}, {exit}, {kv_fill}, {} of {}",
                repeat + 1,
                self.repeats
            ));
            let pair = [self.settings[place], self.settings[combinations]];
            let shortest_s = makespan(place).min(makespan(combinations));
            let looped = alternating(&self.engine, pair, &self.looped, &recording.oracle, shortest_s)?;
            reporter.advance(1);
            Ok::<_, anyhow::Error>(looped)
        };
        let of_repeat = |repeat| (0..combinations).map(|place| measure(repeat, place)).collect::<Result<_>>();
        let measured = (0..self.repeats).map(of_repeat).collect();
        reporter.finish();
        measured
    }

    /// Requests per second of every combination in the closed loop: the median of its repeats.
    fn capacities(&self, measured: &[Vec<[Looped; 2]>]) -> Vec<f64> {
        let rate = |[looped, _]: &[Looped; 2]| {
            let Summary { requests, makespan_s, .. } = looped.run.summary;
            requests as f64 / makespan_s
        };
        (0..self.combinations()).map(|place| median(measured.iter().map(|repeat| rate(&repeat[place])))).collect()
    }

    /// Ratios to the baseline, and values.
    fn compare_closed_loop(
        &self,
        predictor: &Predictor<'_>,
        models: &Models,
        measured: &[Vec<[Looped; 2]>],
    ) -> Result<Vec<Table>> {
        let predicted = models.try_map(|model| {
            let (runs, _) = predictor.runs(model, &self.looped)?;
            Ok::<_, anyhow::Error>(runs.into_iter().map(|run| run.summary).collect::<Vec<Summary>>())
        })?;
        let baseline = self.combinations();
        let (mut speedups, mut absolute) = (Vec::new(), Vec::new());
        for place in 0..baseline {
            let of = &measured[0][place][0].run.summary;
            let is_baseline = self.settings[place] == self.settings[baseline];
            for (metric, value) in RATIOS {
                let ratio = |of: &Summary, to: &Summary| Some(value(of)? / value(to)?);
                let predicted = predicted.map(|runs| ratio(&runs[place], &runs[baseline]));
                let measured = measured.iter().map(|repeat| {
                    let [of, to] = &repeat[place];
                    ratio(&of.run.summary, &to.run.summary)
                });
                let line = Comparison::new(of, None, metric, &predicted, measured);
                speedups.extend(line.map(|line| if is_baseline { line.of_equals() } else { line }));
            }
            for (metric, value) in VALUES {
                let predicted = predicted.map(|runs| value(&runs[place]));
                let measured = measured.iter().map(|repeat| value(&repeat[place][0].run.summary));
                absolute.extend(Comparison::new(of, None, metric, &predicted, measured));
            }
        }
        Ok(vec![Table::new(Kind::Speedups, speedups), Table::new(Kind::Absolute, absolute)])
    }

    /// Writes the runs of the closed loop and their passes. The log has those of the first repeat.
    fn write_runs(
        &self,
        folder: &Path,
        model: &LatencyModel,
        profiled: &Profiled<'_>,
        measured: Vec<Vec<[Looped; 2]>>,
        predicted: &[Run],
    ) -> Result<Vec<Summary>> {
        let (mut repeats, mut logs) = (Vec::new(), Vec::new());
        for (repeat, looped) in measured.into_iter().enumerate() {
            let (mut runs, mut passes) = (Vec::new(), Vec::new());
            for [looped, _] in looped {
                runs.push(looped.run);
                passes.push(looped.passes);
            }
            repeats.push(runs);
            if repeat == 0 {
                logs = passes;
            }
        }
        let classes =
            self.settings.iter().zip(&logs).flat_map(|(settings, log)| compare_passes(settings, [log], model));
        write_csv(&folder.join("passes.csv"), classes)?;
        write_graphs(folder, &logs)?;
        let runs = logs.into_iter().chain(profiled.passes()).collect();
        PassLog { meta: pass_log_meta(&self.engine), runs }.write(folder.join(PASS_LOG))?;
        let measured = median_runs(repeats);
        let runs = || measured.iter().chain(&predicted[..self.combinations()]);
        write_csv(&folder.join("summary.csv"), runs().map(|run| &run.summary))?;
        write_requests(folder, runs())?;
        write_depth_rows(folder, runs())?;
        Ok(runs().map(|run| run.summary.clone()).collect())
    }
}

/// Requests at shares of every combination's own capacity.
struct Rated(Vec<(usize, f64, Workload)>);

/// What is compared at a rate: throughput only above the capacity, below which the arrivals decide it.
fn metrics_at(rate: f64) -> &'static [Metric] {
    const ABOVE_CAPACITY: [Metric; BELOW_CAPACITY.len() + 1] = {
        let [a, b, c, d, e, f] = BELOW_CAPACITY;
        [VALUES[0], a, b, c, d, e, f]
    };
    if rate > 1.0 { &ABOVE_CAPACITY } else { &BELOW_CAPACITY }
}

impl Rated {
    fn new(subject: &Subject, capacities: &[f64], rates: &[f64]) -> Result<Self> {
        let mut rated = Vec::new();
        if subject.trace.rate_per_s().is_some() {
            for &rate in rates {
                for (place, capacity) in capacities.iter().enumerate() {
                    let requests = subject.trace.clone().scale_to_rate(rate * capacity)?.requests;
                    rated.push((place, rate, Workload::open(requests, subject.looped.prefixes.clone())));
                }
            }
        }
        Ok(Self(rated))
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Combination, rate and requests of each case.
    fn iter(&self) -> impl Iterator<Item = (usize, f64, &Workload)> {
        self.0.iter().map(|(place, rate, workload)| (*place, *rate, workload))
    }

    /// By case, what was measured in each repeat.
    fn measure(
        &self,
        subject: &Subject,
        recording: &Recording,
        reporter: &mut dyn Reporter,
    ) -> Result<Vec<Vec<Summary>>> {
        let Subject { engine, settings, repeats, objectives, .. } = subject;
        reporter.start(*repeats as usize * self.0.len(), 0);
        let mut measured = vec![Vec::new(); self.0.len()];
        for repeat in 1..=*repeats {
            for ((place, rate, workload), measured) in self.iter().zip(&mut measured) {
                let Settings { batching, exit, kv_fill, .. } = settings[place];
                let share = 100.0 * rate;
                reporter.message(&format!("{share:.0}% load: {batching}, {exit}, {kv_fill}, {repeat} of {repeats}"));
                measured.push(once(engine, &settings[place], workload, &recording.oracle, *objectives)?);
                reporter.advance(1);
            }
        }
        reporter.finish();
        Ok(measured)
    }

    fn compare(
        &self,
        predictor: &Predictor<'_>,
        models: &Models,
        measured: &[Vec<Summary>],
    ) -> Result<Vec<Comparison>> {
        let mut comparisons = Vec::new();
        for ((place, rate, workload), measured) in self.iter().zip(measured) {
            let predicted = models.try_map(|model| predictor.one(model, place, workload))?;
            let compare = |&(metric, value): &Metric| {
                let measured_values = measured.iter().map(value);
                Comparison::new(&measured[0], Some(rate), metric, &predicted.map(value), measured_values)
            };
            comparisons.extend(metrics_at(rate).iter().filter_map(compare));
        }
        Ok(comparisons)
    }
}
