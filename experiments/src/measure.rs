//! Measuring on this machine: the engine's runs, in alternation with the profile that the simulator gets.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use bytesize::ByteSize;
use engine::{
    Checkpoint, CheckpointError, DeviceName, Engine, Generation, Grid, Idle, Limits, Probe, ProbedClock, Profiler,
    PromptLine, Prompts, Sampling, ServedModel, Tokenizer, WallClock, WeightType,
};
use latency::LatencyModel;
use scheduler::{Clock, KvFill, Lengths, Observer, PassRecorder, Settings, SignalRead};
use simulator::{Metrics, ModelMemory, Objectives, Pace, Source, Summary};
use traces::{
    ExitTrace, LatencyProfile, MemoryFigures, Nanos, PassLog, PassLogMeta, PassOrigin, PassRun, Request, RequestTrace,
    unix_micros,
};

use crate::experiment::EngineSpec;
use crate::oracle::Oracle;
use crate::passes::{PassClass, compare_passes};
use crate::quality::{FullDepthTexts, Quality};
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
    /// All passes of all replays and of the profiler's steady load.
    pub passes: PassLog,
}

/// What was measured of requests that arrive at one rate.
pub struct MeasuredLoad {
    /// Share of the capacity at which they arrive; none if they arrive as the trace says.
    pub load: Option<f64>,
    /// What was served.
    pub requests: Vec<Request>,
    /// For each of the settings asked for: of its repeats, the run of median throughput, or goodput with objectives.
    pub runs: Vec<Run>,
    /// By repeat, a summary for each of the settings.
    pub repeats: Vec<Vec<Summary>>,
    /// For each of the settings the depths at which its replays exited, by request, of policies that
    /// read signals of the live text: what is generated after an early exit is not what was recorded at full depth, and exits
    /// elsewhere. They are those of the first repeat: exits by load differ from repeat to repeat.
    pub exits: Vec<Option<Vec<Vec<u8>>>>,
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
    /// Of the model; `None` if it has none.
    pub tokenizer: Option<Tokenizer>,
    device: DeviceName,
}

impl NamedEngine {
    /// Opens a model and its prompts: JSON lines if the name of the file says so, and otherwise a text that prompts are
    /// cut from. `loops` is as for [`Checkpoint::open`].
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
        named.engine.prompts = Arc::new(match PromptLine::is_file(prompts) {
            true => Prompts::Lines(PromptLine::read(prompts, &tokenizer)?),
            false => {
                let text = traces::input::read_text(prompts)?;
                Prompts::TextAfter { begin: tokenizer.begin()?, text: tokenizer.encode(&text)? }
            }
        });
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

    /// Whether the model can be served under these settings on this machine.
    ///
    /// # Errors
    /// If a setting is not of this engine, or its KV blocks take more memory than the machine has.
    pub fn check_settings(&self, settings: &Settings) -> Result<()> {
        self.engine.check_settings(settings)?;
        self.check_memory(u64::from(settings.num_blocks) * u64::from(settings.block_tokens))
    }

    /// Whether keys and values of so many positions fit into the memory of this machine, where the model runs in it.
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

/// Profiles up to `limits`, records, and replays the requests under every one of `settings`; where `loads` are given,
/// once for each of them, with the arrivals scaled to that share of the capacity under the first of `settings`. Requests
/// that meet `objectives` are counted.
///
/// Every repeat replays all settings in turn between two rounds of the profile, so that profile and replays meet the same
/// speed modes of the machine. Probes measure the speed during a replay, whose clock stands still for them.
///
/// # Errors
/// If the engine cannot serve the requests, or a load is none.
pub fn measure(
    named: &NamedEngine,
    settings: &[Settings],
    trace: &RequestTrace,
    EngineSpec { loads, repeats, .. }: &EngineSpec,
    objectives: Option<Objectives>,
    limits: Limits,
    reporter: &mut dyn Reporter,
) -> Result<Measured> {
    let NamedEngine { engine, name, .. } = named;
    settings.iter().try_for_each(|settings| named.check_settings(settings))?;
    let repeats = *repeats as usize;
    reporter.start(1 + (repeats + 1) + repeats * settings.len() * loads.len().max(1), 0);
    reporter.message("recording exit signals at full depth");
    let exits = record(named, &trace.requests)?;
    let oracle = Oracle::new(named, settings, &trace.requests, Some(&exits))?;
    let own = FullDepthTexts::of_recording(engine, &exits, &trace.requests)?;
    let mut loads = match &loads[..] {
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
    let mut logs: Vec<Vec<PassRun>> = Vec::new();
    let mut taken: Vec<Option<Vec<Vec<u8>>>> = Vec::new();
    for repeat in 1..=repeats {
        next(reporter, format!("profiling, round {repeat} of {}", repeats + 1));
        profiler.round(|_, _| ())?;
        let (mut of_repeat, mut logs_of_repeat) = (Vec::new(), Vec::new());
        let cases = loads.iter().flat_map(|load| settings.iter().map(move |settings| (load, settings)));
        for (runs, (load, &settings)) in repeated.iter_mut().zip(cases) {
            let Settings { batching, exit, kv_fill, .. } = settings;
            next(reporter, format!("replaying: {batching}, {exit}, {kv_fill}, {repeat} of {repeats}"));
            let mut clock = ProbedClock::start(Idle::Skip, &mut profiler);
            let mut recorder = PassRecorder::new(&settings, PassOrigin::Replay, unix_micros);
            let metrics = objectives.map_or(Metrics::new(&settings), |of| Metrics::new(&settings).with_objectives(of));
            let (run, generations) = replay_by(&mut clock, engine, metrics, &load.requests, &oracle, &mut recorder)?;
            if repeat == 1 {
                taken.push(exits_taken(&settings, &load.requests, &generations));
            }
            // Tokens and exits do not change from repeat to repeat, unless they depend on the load.
            let first = runs.first().filter(|_| !exit.depends_on_load());
            let quality = match first.and_then(|run: &Run| run.quality.clone()) {
                Some(quality) => quality,
                None => Quality::measure(named, &generations, &own)?,
            };
            runs.push(run.with_quality(quality));
            logs_of_repeat.push(PassRun { load: load.load, repeat: repeat as u32 - 1, ..recorder.into_run() });
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
    let of_replays = || probes.iter().flatten().flatten().map(|(_, probe)| probe);
    let profile = profiler.profile(name, &source, of_replays())?;
    let model = LatencyModel::new(&profile)?;
    let pace = |probes: &Vec<(Nanos, Probe)>| {
        let points: Vec<_> = probes.iter().map(|(time, probe)| (*time, probe.pace(&model))).collect();
        Pace::measured_at(&points)
    };
    let paces: Vec<Vec<Pace>> = probes.iter().map(|of_repeat| of_repeat.iter().map(pace).collect()).collect();
    for (index, load) in loads.iter_mut().enumerate() {
        let of_load = index * settings.len()..(index + 1) * settings.len();
        load.paces = paces.iter().map(|of_repeat| of_repeat[of_load.clone()].to_vec()).collect();
        let passes = |(case, settings): (usize, &Settings)| {
            let replays = logs.iter().zip(&paces).map(|(logs, paces)| (&logs[case], &paces[case]));
            compare_passes(settings, replays, &model)
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
    let runs = logs.into_iter().flatten().chain(profiler.steady_runs(of_replays())).collect();
    let passes = PassLog { meta: pass_log_meta(named), runs };
    Ok(Measured { profile, exits, loads, passes })
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
fn capacity(engine: &Engine, settings: Settings, requests: &[Request], oracle: &Oracle) -> Result<f64> {
    let at_once: Vec<Request> = requests.iter().map(|&request| Request { arrival: Nanos::ZERO, ..request }).collect();
    let run = || replay(engine, settings, &at_once, oracle, Idle::Skip, &mut ());
    let runs = (0..CAPACITY_REPLAYS).map(|_| Ok(run()?.0)).collect::<Result<Vec<Run>>>()?;
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
pub fn record(NamedEngine { engine, name, .. }: &NamedEngine, requests: &[Request]) -> Result<ExitTrace> {
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

/// Serves the requests once: the run, whose quality is not measured, and what was generated.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn replay(
    engine: &Engine,
    settings: Settings,
    requests: &[Request],
    oracle: &Oracle,
    idle: Idle,
    observer: &mut (impl Observer + Send),
) -> Result<(Run, HashMap<u32, Generation>)> {
    let (mut clock, metrics) = (WallClock::start(idle), Metrics::new(&settings));
    replay_by(&mut clock, engine, metrics, requests, oracle, observer)
}

/// Serves the requests once by a clock, into metrics of a run that has not started.
fn replay_by(
    clock: &mut (impl Clock + Send),
    engine: &Engine,
    metrics: Metrics,
    requests: &[Request],
    oracle: &Oracle,
    observer: &mut (impl Observer + Send),
) -> Result<(Run, HashMap<u32, Generation>)> {
    let settings = *metrics.settings();
    let mut observers = (metrics.with_requests(), observer);
    let generations = engine.replay_by(settings, requests, oracle.depths(&settings), clock, &mut observers)?;
    let metrics = observers.0;
    let summary = Summary {
        weight_bytes: Some(engine.model.weight_bytes()),
        kv_bytes_per_token: Some(engine.model.kv_bytes_per_token(settings.kv_fill)),
        ..metrics.summary(Source::Measured, None)
    };
    Ok((Run { summary, metrics, time: None, quality: None }, generations))
}

/// The depths at which a replay exited, by request. None of a policy whose exits are those recorded: one that reads no
/// signal, or follows the recording.
fn exits_taken(
    settings: &Settings,
    requests: &[Request],
    generations: &HashMap<u32, Generation>,
) -> Option<Vec<Vec<u8>>> {
    let reads_signal = settings.exit.signal_read() != SignalRead::None && !settings.exit.follows_recording();
    reads_signal.then(|| requests.iter().map(|request| generations[&request.id].exit_depths.clone()).collect())
}

/// What a pass log of this engine says that it was measured on.
pub fn pass_log_meta(NamedEngine { engine, name, .. }: &NamedEngine) -> PassLogMeta {
    let model = &engine.model;
    PassLogMeta::new(name, model.fingerprint(), model.config().num_loops as u32, &model.device_name())
}

/// The run of median goodput, or without objectives of median throughput; of an even number, the lower of the middle two.
fn median_run(mut runs: Vec<Run>) -> Run {
    let merit = |run: &Run| (run.summary.goodput_req_s.unwrap_or_default(), run.summary.throughput_tok_s);
    runs.sort_by(|a, b| {
        let ((goodput, throughput), (other_goodput, other_throughput)) = (merit(a), merit(b));
        goodput.total_cmp(&other_goodput).then(throughput.total_cmp(&other_throughput))
    });
    let middle = (runs.len() - 1) / 2;
    runs.swap_remove(middle)
}
