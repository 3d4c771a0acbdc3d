//! Measuring on this machine: the engine's runs, in alternation with the profile that the simulator gets.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use engine::backend::ServedModel;
use engine::checkpoint::Checkpoint;
use engine::clock::{Idle, WallClock};
use engine::device::DeviceName;
use engine::executor::{ExitDepths, Generation, Sampling};
use engine::kernels::linear::WeightType;
use engine::profile::{Grid, Limits, Probe, ProbedClock, Profiler};
use engine::prompts::Prompts;
use engine::replay::{Engine, oracle_depths};
use engine::tokenizer::Tokenizer;
use scheduler::{Clock, KvFill, Lengths, Look, Observer, Settings};
use simulator::{
    LatencyModel, Metrics, ModelMemory, Pace, PassLog, PassWork, ServiceFactors, Source, Summary, steady_passes,
};
use traces::{ExitTrace, ExitTraceMeta, LatencyProfile, Measure, MemoryFigures, Nanos, Request, RequestTrace, Signals};

use crate::passes::{PassClass, compare_passes};
use crate::reporter::Reporter;
use crate::runs::Run;

/// Slowdown by other work above which measurements are not to be trusted.
const BUSY: f64 = 1.1;
/// Difference between two halves of a profile above which it is not to be trusted.
const UNSTEADY: f64 = 0.05;
/// Replays that the capacity is the median of.
const CAPACITY_REPLAYS: usize = 3;

/// What was measured.
pub struct Measured {
    /// What the parts of a pass take on this machine.
    pub profile: LatencyProfile,
    /// Signals and predictions of the requests at full depth.
    pub exits: ExitTrace,
    /// By load.
    pub loads: Vec<MeasuredLoad>,
}

/// What was measured of requests that arrive at one rate.
pub struct MeasuredLoad {
    /// Share of the capacity at which they arrive; none if they arrive as the trace says.
    pub load: Option<f64>,
    /// What was served.
    pub requests: Vec<Request>,
    /// For each of the settings asked for: of its repeats, the run of median throughput.
    pub runs: Vec<Run>,
    /// By repeat, a summary for each of the settings.
    pub repeats: Vec<Vec<Summary>>,
    /// For each of the settings the exits that its replays took, of confidence policies: what is generated after an early
    /// exit is not what was recorded at full depth, and leaves elsewhere.
    pub exits: Vec<Option<ExitTrace>>,
    /// By repeat, for each of the settings how fast the machine was during the replay, beside the profile.
    pub paces: Vec<Vec<Pace>>,
    /// All passes of all replays, beside what the profile says of them.
    pub passes: Vec<PassClass>,
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
        device: DeviceName,
        prompts: &Path,
        sampling: Sampling,
    ) -> Result<Self> {
        let (mut named, tokenizer) = Self::with_tokenizer(model, loops, weights, device, sampling)?;
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
        device: DeviceName,
        sampling: Sampling,
    ) -> Result<(Self, Tokenizer)> {
        let checkpoint = Checkpoint::open(model, loops)?;
        let named = Self::new(model, &checkpoint, weights, device, sampling)?;
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
        device: DeviceName,
        sampling: Sampling,
    ) -> Result<Self> {
        Self::new(model, &Checkpoint::open(model, loops)?, weights, device, sampling)
    }

    fn new(
        path: &Path,
        checkpoint: &Checkpoint,
        weights: WeightType,
        device: DeviceName,
        sampling: Sampling,
    ) -> Result<Self> {
        let model = device.serve(&checkpoint.weights, weights)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let prompts = Arc::new(Prompts::Text(vec![0; model.config().max_positions]));
        Ok(Self { engine: Engine { model, prompts, sampling }, name })
    }

    /// What the model takes of memory, as far as it is known without a profile.
    pub fn memory(&self) -> ModelMemory {
        model_memory(&*self.engine.model)
    }
}

fn model_memory(model: &dyn ServedModel) -> ModelMemory {
    ModelMemory {
        num_loops: model.config().num_loops as u32,
        weight_bytes: model.weight_bytes(),
        kv_bytes_per_token: model.kv_bytes_per_token(KvFill::Reuse),
        figures: MemoryFigures::default(),
    }
}

/// Profiles up to `limits`, records, and replays the requests under every one of `settings`; where `loads` are given,
/// once for each of them, with the arrivals scaled to that share of the [`capacity`] under the first of `settings`.
///
/// Every repeat replays all settings in turn between two rounds of the profile, so that profile and replays see the
/// machine in the same moods. How fast it was at any moment of a replay is told by probes, for which the replay's clock
/// stands still.
///
/// # Errors
/// If the engine cannot serve the requests, or a load is none.
pub fn measure(
    named: &NamedEngine,
    settings: &[Settings],
    trace: &RequestTrace,
    loads: &[f64],
    repeats: u32,
    limits: Limits,
    reporter: &mut dyn Reporter,
) -> Result<Measured> {
    let NamedEngine { engine, name } = named;
    settings.iter().try_for_each(|settings| engine.check_settings(settings))?;
    let repeats = repeats as usize;
    reporter.start(1 + (repeats + 1) + repeats * settings.len() * loads.len().max(1), 0);
    reporter.message("recording exit signals at full depth");
    let exits = record(named, &trace.requests)?;
    let oracle = Arc::new(oracle_depths(&exits, &trace.requests));
    let mut loads = match loads {
        [] => vec![MeasuredLoad::new(None, trace.requests.clone())],
        loads => {
            let capacity = capacity(engine, settings[0], &trace.requests, &oracle)?;
            let first = settings[0].batching;
            reporter.note(&format!("capacity: {capacity:.3} requests/s under {first} batching"));
            let scaled = |&load: &f64| -> Result<MeasuredLoad> {
                Ok(MeasuredLoad::new(Some(load), trace.clone().scale_to_rate(load * capacity)?.requests))
            };
            loads.iter().map(scaled).collect::<Result<_>>()?
        }
    };

    let mut profiler = Profiler::new(engine, Grid::up_to(limits), lengths(&trace.requests))?;
    let mut repeated: Vec<Vec<Run>> = loads.iter().flat_map(|_| settings).map(|_| Vec::new()).collect();
    let mut probes: Vec<Vec<Vec<(Nanos, Probe)>>> = Vec::new();
    let mut logs: Vec<Vec<PassLog>> = Vec::new();
    let mut taken: Vec<Option<ExitTrace>> = Vec::new();
    for repeat in 1..=repeats {
        next(reporter, format!("profiling, round {repeat} of {}", repeats + 1));
        profiler.round(|_, _| ())?;
        let (mut of_repeat, mut logs_of_repeat) = (Vec::new(), Vec::new());
        let cases = loads.iter().flat_map(|load| settings.iter().map(move |settings| (load, settings)));
        for (runs, (load, &settings)) in repeated.iter_mut().zip(cases) {
            next(reporter, format!("replaying: {}, {}, {repeat} of {repeats}", settings.batching, settings.exit));
            let agreement = runs.first().map(|run: &Run| run.summary.token_agreement);
            let mut clock = ProbedClock::start(Idle::Skip, &mut profiler);
            let mut log = PassLog::new(&settings);
            let (run, generations) =
                replay_by(&mut clock, engine, settings, &load.requests, &oracle, agreement, &mut log)?;
            if repeat == 1 {
                taken.push(exits_taken(&settings, &load.requests, &generations, &exits.meta));
            }
            runs.push(run);
            logs_of_repeat.push(log);
            of_repeat.push(clock.into_probes()?);
        }
        probes.push(of_repeat);
        logs.push(logs_of_repeat);
    }
    next(reporter, format!("profiling, round {0} of {0}", repeats + 1));
    profiler.round(|_, _| ())?;
    reporter.finish();
    warn_of_noise(&profiler, reporter);
    let source = format!("{} rounds between replays of {repeats} repeats", repeats + 1);
    let of_replays = probes.iter().flatten().flatten().map(|(_, probe)| probe);
    let profile = ServiceProfile::new(&profiler, name, &source, of_replays)?;
    let pace = |probes: &Vec<(Nanos, Probe)>| {
        let points: Vec<_> = probes.iter().map(|(time, probe)| (*time, profile.pace(probe))).collect();
        Pace::measured_at(&points)
    };
    let paces: Vec<Vec<Pace>> = probes.iter().map(|of_repeat| of_repeat.iter().map(pace).collect()).collect();
    for (index, load) in loads.iter_mut().enumerate() {
        let of_load = index * settings.len()..(index + 1) * settings.len();
        load.paces = paces.iter().map(|of_repeat| of_repeat[of_load.clone()].to_vec()).collect();
        let passes = |(case, settings): (usize, &Settings)| {
            let replays = logs.iter().zip(&paces).map(|(logs, paces)| (&logs[case], &paces[case]));
            compare_passes(settings, replays, &profile.model)
        };
        load.passes = of_load.zip(settings).flat_map(passes).collect();
    }
    let measured = chunks(taken, settings.len()).zip(chunks(repeated, settings.len()));
    for (load, (taken, repeated)) in loads.iter_mut().zip(measured) {
        load.exits = taken;
        load.repeats =
            (0..repeats).map(|repeat| repeated.iter().map(|runs| runs[repeat].summary.clone()).collect()).collect();
        load.runs = repeated.into_iter().map(median_run).collect();
    }
    Ok(Measured { profile: profile.profile, exits, loads })
}

/// A profile whose times are those of a machine in service.
pub struct ServiceProfile {
    /// The profile.
    pub profile: LatencyProfile,
    model: LatencyModel,
    /// The passes of the loads that the profiler serves, by way.
    passes: Vec<Vec<PassWork>>,
}

impl ServiceProfile {
    /// What all rounds of a profiler measured, in service as its probes say, and further probes between them. `model` and
    /// `source` are as for [`Measured::profile`](engine::profile::Measured::profile).
    ///
    /// # Errors
    /// If the profile contradicts itself.
    pub fn new<'p>(
        profiler: &'p Profiler,
        model: &str,
        source: &str,
        further: impl Iterator<Item = &'p Probe>,
    ) -> Result<Self> {
        let measured = profiler.measured();
        let apart = measured.profile(model, source);
        let probes: Vec<&Probe> = measured.probes().chain(further).collect();
        let model_apart = LatencyModel::new(&apart)?;
        let passes = profiler.loads().into_iter().enumerate().map(|(way, load)| {
            let ends = probes.iter().filter(|probe| probe.way == way).map(|probe| probe.first + probe.times.len());
            steady_passes(load, &model_apart, ends.max().unwrap_or_default())
        });
        let passes = passes.collect::<Result<Vec<_>, _>>()?;
        let timed = probes.iter().flat_map(|probe| works_of(&passes, probe).iter().zip(probe.times.iter().copied()));
        let factors = ServiceFactors::new(&apart, &timed.collect::<Vec<_>>())?;
        let mut profile = factors.apply(&apart);
        let (least, most) = factors.range();
        let mixing = factors.mixing_range_us().map_or(String::new(), |(least, most)| {
            format!(", and {least:+.1} to {most:+.1} us where depths are mixed")
        });
        profile.meta.source = format!(
            "{}; times {least:.3} to {most:.3}, by rows: what passes in service take over the sum of such parts{mixing}",
            profile.meta.source
        );
        Ok(Self { model: LatencyModel::new(&profile)?, profile, passes })
    }

    /// How many times as long passes took at a probe as the profile says.
    fn pace(&self, probe: &Probe) -> f64 {
        let said: f64 = works_of(&self.passes, probe).iter().map(|work| self.model.pass_ns(work)).sum();
        probe.times.iter().copied().sum::<Nanos>().0 as f64 / said
    }
}

/// The passes that a probe served.
fn works_of<'p>(passes: &'p [Vec<PassWork>], probe: &Probe) -> &'p [PassWork] {
    &passes[probe.way][probe.first..][..probe.times.len()]
}

/// The step before is done, and another one starts.
fn next(reporter: &mut dyn Reporter, message: String) {
    reporter.advance(1);
    reporter.message(&message);
}

impl MeasuredLoad {
    fn new(load: Option<f64>, requests: Vec<Request>) -> Self {
        Self {
            load,
            requests,
            runs: Vec::new(),
            repeats: Vec::new(),
            exits: Vec::new(),
            paces: Vec::new(),
            passes: Vec::new(),
        }
    }
}

fn chunks<T>(items: Vec<T>, size: usize) -> impl Iterator<Item = Vec<T>> {
    let mut items = items.into_iter();
    std::iter::from_fn(move || Some(items.by_ref().take(size).collect::<Vec<_>>()).filter(|chunk| !chunk.is_empty()))
}

/// Requests per second that the engine serves when all of them arrive at once: the median of some replays.
fn capacity(engine: &Engine, settings: Settings, requests: &[Request], oracle: &Arc<ExitDepths>) -> Result<f64> {
    let at_once: Vec<Request> = requests.iter().map(|&request| Request { arrival: Nanos::ZERO, ..request }).collect();
    let run = || replay(engine, settings, &at_once, oracle, Idle::Skip, Some(None));
    let runs = (0..CAPACITY_REPLAYS).map(|_| run()).collect::<Result<Vec<Run>>>()?;
    Ok(requests.len() as f64 / median_run(runs).summary.makespan_s)
}

/// Says so where other work on the machine has spoiled a profile.
pub fn warn_of_noise(profiler: &Profiler, reporter: &mut dyn Reporter) {
    let slowdown = profiler.measured().slowdown();
    if slowdown > BUSY {
        reporter.warning(&format!(
            "other work on this machine made passes {slowdown:.2} times as long: measure again at rest"
        ));
    }
    if let Some(share) = profiler.disagreement().filter(|&share| share > UNSTEADY) {
        reporter.warning(&format!(
            "two halves of the profile differ by {:.1}%, more than {:.0}%: measure again at rest, or with more rounds",
            100.0 * share,
            100.0 * UNSTEADY
        ));
    }
}

/// Records the exit trace of these requests.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn record(NamedEngine { engine, name }: &NamedEngine, requests: &[Request]) -> Result<ExitTrace> {
    Ok(engine.record(requests, name, &recording_source(engine, requests), &mut ())?)
}

/// What an exit trace of these requests says of how it was made.
pub fn recording_source(engine: &Engine, requests: &[Request]) -> String {
    format!("{} requests at full depth, temperature {}", requests.len(), engine.sampling.temperature)
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

/// How long requests are on average, and the longest of them.
fn lengths(requests: &[Request]) -> Lengths {
    let mean = |tokens: fn(&Request) -> u32| {
        let sum: u64 = requests.iter().map(|request| u64::from(tokens(request))).sum();
        (sum as f64 / requests.len().max(1) as f64).round() as u32
    };
    let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
    Lengths { prompt: mean(|request| request.prompt_tokens), output: mean(|request| request.output_tokens), longest }
}

/// Serves the requests once. Token agreement is computed unless `agreement` says what it is, or that nobody asks:
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
    agreement: Option<Option<f64>>,
) -> Result<Run> {
    Ok(replay_by(&mut WallClock::start(idle), engine, settings, requests, oracle, agreement, &mut ())?.0)
}

/// The same by a clock, with what was generated.
fn replay_by(
    clock: &mut (impl Clock + Send),
    engine: &Engine,
    settings: Settings,
    requests: &[Request],
    oracle: &Arc<ExitDepths>,
    agreement: Option<Option<f64>>,
    observer: &mut (impl Observer + Send),
) -> Result<(Run, HashMap<u32, Generation>)> {
    let mut observers = (Metrics::new(&settings).with_requests(), observer);
    let oracle = (settings.exit.look() == Look::Oracle).then(|| oracle.clone());
    let generations = engine.replay_by(settings, requests, oracle, clock, &mut observers)?;
    let metrics = observers.0;
    let agreement = match agreement {
        Some(known) => known,
        None => Some(engine.agreement(&generations)?),
    };
    let summary = Summary {
        weight_bytes: Some(engine.model.weight_bytes()),
        kv_bytes_per_token: Some(engine.model.kv_bytes_per_token(settings.kv_fill)),
        ..metrics.summary(Source::Measured, agreement)
    };
    Ok((Run { summary, metrics, time: None }, generations))
}

/// The exits of a replay as a trace, by which the same policy lets every token leave where it left; `recorded` says of which
/// model. None of a policy that looks at no measure: its exits are those recorded.
fn exits_taken(
    settings: &Settings,
    requests: &[Request],
    generations: &HashMap<u32, Generation>,
    recorded: &ExitTraceMeta,
) -> Option<ExitTrace> {
    let Look::Measure(measure) = settings.exit.look() else { return None };
    let mut trace = ExitTrace::new(recorded.clone());
    trace.has_gates = measure == Measure::Gate;
    let row = |exit: u8, depth: u8| {
        let sure = depth >= exit;
        let value = measure.sureness(if sure { f32::MAX } else { f32::MIN });
        let signals = Signals { top1: value, margin: value, entropy: value, similarity: value, gate: value };
        (signals, u32::from(sure))
    };
    for request in requests {
        let exits = &generations[&request.id].exit_depths;
        let rows = exits.iter().flat_map(|&exit| (0..settings.num_loops).map(move |depth| row(exit, depth)));
        trace.push_generation(&rows.collect::<Vec<_>>());
    }
    Some(trace)
}

/// The run of median throughput; of an even number, the slower of the middle two.
fn median_run(mut runs: Vec<Run>) -> Run {
    runs.sort_by(|a, b| a.summary.throughput_tok_s.total_cmp(&b.summary.throughput_tok_s));
    let middle = (runs.len() - 1) / 2;
    runs.swap_remove(middle)
}

#[cfg(test)]
mod tests {
    use scheduler::SteadyLoad;

    use super::*;

    #[test]
    fn a_policy_on_the_exits_taken_lets_every_token_leave_where_it_left() {
        let exits: [&[u8]; 2] = [&[2, 0, 1], &[0, 2]];
        let generation = |exits: &[u8]| Generation { exit_depths: exits.to_vec(), ..Generation::default() };
        let generations = (0..).zip(exits).map(|(id, exits)| (id, generation(exits))).collect();
        let request = |id: u32| Request {
            id,
            arrival: Nanos::ZERO,
            prompt_tokens: 1,
            output_tokens: exits[id as usize].len() as u32,
        };
        let requests = [request(0), request(1)];
        let meta = ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "test".to_owned(),
            fingerprint: "test".to_owned(),
            num_loops: 3,
            source: "test".to_owned(),
        };
        let load = SteadyLoad::new(3, 2, 8, 8, 16, Lengths { prompt: 8, output: 8, longest: 32 });
        for exit in ["confidence:0.9", "confidence:entropy:0.5", "confidence:gate:0.3"] {
            let settings =
                Settings { batching: scheduler::Batching::Depth, exit: exit.parse().unwrap(), ..*load.settings() };
            let taken = exits_taken(&settings, &requests, &generations, &meta).unwrap();
            let Look::Measure(measure) = settings.exit.look() else { panic!("{exit} looks at a measure") };
            let model = simulator::ExitModel::new(&taken, simulator::Draw::Recorded).unwrap();
            assert!(model.answers(Look::Measure(measure)), "{exit}");
            let scheduler::ExitPolicy::Confidence { threshold, .. } = settings.exit else { panic!("{exit}") };
            let leaves = |token| {
                (0..3u8)
                    .find(|&depth| measure.is_confident(taken.signals_at(token, depth.into()).get(measure), threshold))
            };
            assert_eq!((0..5).map(|token| leaves(token).unwrap()).collect::<Vec<_>>(), exits.concat(), "{exit}");
        }
        let none = Settings { exit: scheduler::ExitPolicy::None, ..*load.settings() };
        assert_eq!(exits_taken(&none, &requests, &generations, &meta), None);
    }

    #[test]
    fn over_all_probes_a_service_profile_says_what_they_took() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
        let (weights, sampling) = (WeightType::F32, Sampling::default());
        let named = NamedEngine::load_without_prompts(&model, None, weights, DeviceName::Cpu, sampling).unwrap();
        let limits = Limits { rows: 8, decodes: 2, history: 16, chunk: 8 };
        let lengths = Lengths { prompt: 8, output: 6, longest: 16 };
        let mut profiler = Profiler::new(&named.engine, Grid::up_to(limits), lengths).unwrap();
        profiler.round(|_, _| ()).unwrap();
        let further = profiler.probe().unwrap();

        let service = ServiceProfile::new(&profiler, "model", "source", std::iter::once(&further)).unwrap();
        let measured = profiler.measured();
        let (mut took, mut said, mut paced) = (0.0, 0.0, 0.0);
        for probe in measured.probes().chain([&further]) {
            let works = works_of(&service.passes, probe);
            let by_profile: f64 = works.iter().map(|work| service.model.pass_ns(work) / 1e3).sum();
            took += probe.times.iter().map(|time| time.as_micros_f64()).sum::<f64>();
            said += by_profile;
            paced += by_profile * service.pace(probe);
        }
        assert!((said / took - 1.0).abs() < 1e-3, "{said} us for {took} us");
        assert!((paced / took - 1.0).abs() < 1e-3, "{paced} us for {took} us");
    }
}
