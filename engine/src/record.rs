//! Recordings: requests with signals and predictions of every generated token at every depth. Tokens run every depth.
//! Under an exit policy they exit as in service first; the deeper loops then only record, and store no keys and values.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use scheduler::{
    Batching, Executor, ExitPolicy, KvFill, Observer, Pass, ServeError, Server, Settings, SignalRead, Slot,
};
use traces::hash::mix;
use traces::{
    ExitSignal, ExitTrace, ExitTraceMeta, Nanos, Recording, Request, ServedToken, SignalSet, Signals, TraceError,
};

use crate::cache::TILE;
use crate::clock::{Idle, WallClock};
use crate::executor::{EngineError, EngineExecutor, ExitDepths, Generation};
use crate::replay::{Engine, ReplayError, UNTIMED_ROWS, run_to_end};

/// A rule by which the tokens of a recording exit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RecordedPolicy {
    /// An exit policy.
    Policy(ExitPolicy),
    /// `random:P`: at each depth before the last, a token exits with probability `P`, whatever its signals. The draw
    /// depends on seed, request, token and depth.
    Random(f64),
}

impl RecordedPolicy {
    /// Its threshold, if it compares this signal with one.
    pub fn threshold_of(&self, signal: ExitSignal) -> Option<f32> {
        match self {
            Self::Policy(ExitPolicy::Confidence { signal: of, threshold }) if *of == signal => Some(*threshold),
            Self::Policy(_) | Self::Random(_) => None,
        }
    }
}

impl fmt::Display for RecordedPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => policy.fmt(f),
            Self::Random(probability) => write!(f, "random:{probability}"),
        }
    }
}

impl FromStr for RecordedPolicy {
    type Err = String;

    /// Reads `random:P`, or the name of an exit policy.
    fn from_str(text: &str) -> Result<Self, String> {
        let Some(probability) = text.strip_prefix("random:") else {
            return text.parse::<ExitPolicy>().map(Self::Policy).map_err(|error| error.to_string());
        };
        match probability.parse() {
            Ok(probability) if (0.0..=1.0).contains(&probability) => Ok(Self::Random(probability)),
            _ => Err(format!("exit policy `{text}`: expected random:P with a probability P from 0 to 1")),
        }
    }
}

/// The exits of a recording.
#[derive(Clone, Debug, PartialEq)]
pub struct Exiting {
    /// Each request is served under one of these, all equally likely. The draw depends on seed and request.
    pub policies: Vec<RecordedPolicy>,
    /// What exited tokens leave to later ones.
    pub kv_fill: KvFill,
    /// The last depth that tokens of prompts run, if not all.
    pub prefill_depth: Option<u8>,
    /// Seed of policies and of random exits.
    pub seed: u64,
}

impl Exiting {
    /// Index of a request's policy.
    pub fn policy_of(&self, request: u32) -> usize {
        (mix(mix(self.seed) ^ u64::from(request)) % self.policies.len() as u64) as usize
    }

    /// As an exit trace says it.
    pub fn meta(&self) -> Recording {
        Recording {
            policies: self.policies.iter().map(ToString::to_string).collect(),
            kv_fill: self.kv_fill.to_string(),
            prefill_depth: self.prefill_depth,
            seed: self.seed,
        }
    }
}

/// A generation recorded under exit policies.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedGeneration {
    /// Signals and predictions: entry `t * num_loops + d` is token `t` at depth `d`.
    pub rows: Vec<(Signals, u32)>,
    /// Exit of each token, and what full depth gives after the same prefix.
    pub tokens: Vec<ServedToken>,
    /// Index of its policy.
    pub policy: u32,
}

impl Engine {
    /// Metadata of an exit trace of this model at full depth. `model` is the model's name; `source` describes how the trace is made.
    pub fn exit_trace_meta(&self, model: &str, source: &str) -> ExitTraceMeta {
        ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: model.to_owned(),
            fingerprint: self.model.fingerprint().to_owned(),
            num_loops: self.model.config().num_loops as u32,
            source: source.to_owned(),
            recording: None,
        }
    }

    /// The exit signals that recordings of this model have.
    pub fn recorded_signals(&self) -> SignalSet {
        SignalSet::of_model(self.model.config().gate)
    }

    /// Runs `requests` at full depth and calls `generation` with the signals and predictions of each, in order and as
    /// soon as they are complete: entry `t * num_loops + d` is token `t` at depth `d`. Arrival times are ignored.
    ///
    /// Generations that wait for an earlier request are kept in memory: at most a batch of the longest outputs.
    ///
    /// # Errors
    /// If a request does not fit the model or has no prompt, the engine fails, or `generation` fails.
    pub fn record_each(
        &self,
        requests: &[Request],
        generation: impl FnMut(&[(Signals, u32)]) -> Result<(), TraceError> + Send,
        observer: &mut (impl Observer + Send),
    ) -> Result<(), ReplayError> {
        let mut generation = generation;
        let settings = self.recording_settings(requests);
        let executor = self.executor(&settings)?.recording();
        self.record_by(settings, executor, requests, |_, recorded| Ok(generation(&recorded.recorded)?), observer)
    }

    /// Serves `requests` under exit policies and calls `generation` with each, in order. All depths of a token run, but
    /// those below its exit leave no keys and values. Signals and predictions are therefore those over the history that
    /// the service of the request has, under any batching: exits depend on the request's own tokens only. Arrival times
    /// are ignored.
    ///
    /// Generations that wait for an earlier request are kept in memory: with several policies, up to all of them.
    ///
    /// # Errors
    /// As [`record_each`](Self::record_each), or if a policy follows a recording itself.
    pub fn record_each_exiting(
        &self,
        requests: &[Request],
        exiting: &Exiting,
        mut generation: impl FnMut(&RecordedGeneration) -> Result<(), TraceError> + Send,
        observer: &mut (impl Observer + Send),
    ) -> Result<(), ReplayError> {
        let (mut waiting, mut next) = (BTreeMap::new(), 0);
        for (index, &policy) in exiting.policies.iter().enumerate() {
            let (settings, executor) = self.exiting_executor(requests, policy, exiting)?;
            let places: Vec<usize> =
                (0..requests.len()).filter(|&place| exiting.policy_of(requests[place].id) == index).collect();
            let of_policy: Vec<Request> = places.iter().map(|&place| requests[place]).collect();
            let mut places = places.into_iter();
            let hand_over = |request: u32, found: Generation| {
                let tokens = self.served_tokens(request, &found)?;
                let recorded = RecordedGeneration { rows: found.recorded, tokens, policy: index as u32 };
                waiting.insert(places.next().expect("a place for each request"), recorded);
                while let Some(recorded) = waiting.remove(&next) {
                    generation(&recorded)?;
                    next += 1;
                }
                Ok(())
            };
            self.record_by(settings, executor, &of_policy, hand_over, observer)?;
        }
        Ok(())
    }

    /// Settings and executor of a recording under a policy.
    fn exiting_executor(
        &self,
        requests: &[Request],
        policy: RecordedPolicy,
        exiting: &Exiting,
    ) -> Result<(Settings, EngineExecutor), ReplayError> {
        let exit = match policy {
            RecordedPolicy::Policy(exit) if exit.follows_recording() => {
                return Err(ReplayError::FollowsRecording(exit));
            }
            RecordedPolicy::Policy(exit) if exit.speculates() => return Err(ReplayError::Speculates(exit)),
            RecordedPolicy::Policy(exit) => exit,
            RecordedPolicy::Random(_) => ExitPolicy::Oracle { charged: false, recorded: false },
        };
        let &Exiting { kv_fill, prefill_depth, .. } = exiting;
        // Signals of every depth are recorded, so prompts run every depth, even where no served row reads their entries.
        let last = self.num_loops() - 1;
        let prefill_depth = if kv_fill == KvFill::First { prefill_depth } else { prefill_depth.or(Some(last)) };
        let mut settings = Settings { exit, kv_fill, prefill_depth, ..self.recording_settings(requests) };
        if settings.kv_fill.overwrites(settings.num_loops) {
            // Each prompt starts as a whole, beside the decode rows of the other sequences.
            let longest = requests.iter().map(|request| request.prompt_tokens).max().unwrap_or(1);
            settings.prefill_chunk = settings.prefill_chunk.max(longest);
            settings.token_budget = settings.prefill_chunk + settings.max_batch;
        }
        let executor = self.executor(&settings)?;
        let executor = match policy {
            RecordedPolicy::Policy(_) => executor.looking_ahead(),
            RecordedPolicy::Random(probability) => executor.exiting_by_chance(exiting.seed, probability),
        };
        Ok((settings, executor))
    }

    fn served_tokens(&self, request: u32, generation: &Generation) -> Result<Vec<ServedToken>, ReplayError> {
        let full_depth = self.full_depth(request, generation)?.tokens;
        let token = |(&exit_depth, full_depth)| ServedToken { exit_depth: u32::from(exit_depth), full_depth };
        Ok(generation.exit_depths.iter().zip(full_depth).map(token).collect())
    }

    /// The depths at which the oracle lets the tokens of `requests` exit when they are served under `settings`: the
    /// earliest depth of each token that predicts what the last depth predicts, over the history that service leaves.
    /// A run beforehand looks ahead. A replay with these depths has the same text, and no look-ahead in its times.
    ///
    /// # Errors
    /// As [`record_each`](Self::record_each), or if the exit policy follows a recording.
    pub fn oracle_exits(&self, settings: &Settings, requests: &[Request]) -> Result<ExitDepths, ReplayError> {
        if settings.exit.signal_read() != SignalRead::Oracle || settings.exit.follows_recording() {
            return Err(ReplayError::FollowsRecording(settings.exit));
        }
        let num_loops = self.model.config().num_loops;
        let policies = vec![RecordedPolicy::Policy(settings.exit)];
        let &Settings { kv_fill, prefill_depth, .. } = settings;
        let exiting = Exiting { policies, kv_fill, prefill_depth, seed: 0 };
        let mut exits = ExitDepths::new();
        let mut ids = requests.iter().map(|request| request.id);
        let depth = |rows: &[(Signals, u32)]| {
            let last = rows[num_loops - 1].1;
            rows.iter().position(|row| row.1 == last).unwrap_or(num_loops - 1) as u8
        };
        let keep = |recorded: &RecordedGeneration| {
            let id = ids.next().expect("a generation for each request");
            exits.insert(id, recorded.rows.chunks(num_loops).map(depth).collect());
            Ok(())
        };
        self.record_each_exiting(requests, &exiting, keep, &mut ())?;
        Ok(exits)
    }

    /// Runs requests on a recording executor, all at once, and hands their generations over in order.
    fn record_by(
        &self,
        settings: Settings,
        executor: EngineExecutor,
        requests: &[Request],
        generation: impl FnMut(u32, Generation) -> Result<(), ReplayError> + Send,
        observer: &mut (impl Observer + Send),
    ) -> Result<(), ReplayError> {
        self.check(&settings, &executor, requests)?;
        let at_once = Request::at_once(requests);
        let recorder = Recorder { executor, requests, generation };
        let server = Server::new(settings, recorder)?;
        let mut recorder = run_to_end(server, &at_once, &mut WallClock::start(Idle::Skip), observer)?;
        recorder.hand_over()
    }

    /// Runs `requests` at full depth and returns a whole exit trace; see [`Self::record_each`].
    ///
    /// # Errors
    /// As [`Self::record_each`].
    pub fn record(
        &self,
        requests: &[Request],
        model: &str,
        source: &str,
        observer: &mut (impl Observer + Send),
    ) -> Result<ExitTrace, ReplayError> {
        let mut trace = ExitTrace::new(self.exit_trace_meta(model, source));
        trace.recorded = self.recorded_signals();
        let push = |rows: &[_]| {
            trace.push_generation(rows);
            Ok(())
        };
        self.record_each(requests, push, observer)?;
        Ok(trace)
    }

    /// A full batch, at full depth, with a cache for the longest requests at once.
    fn recording_settings(&self, requests: &[Request]) -> Settings {
        let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
        let max_batch = (requests.len() as u32).clamp(1, 32);
        Settings {
            max_batch,
            token_budget: UNTIMED_ROWS as u32,
            prefill_chunk: UNTIMED_ROWS as u32,
            block_tokens: TILE as u32,
            num_blocks: max_batch * longest.div_ceil(TILE as u32),
            kv_fill: self.model.config().exact_fill(),
            ..Settings::new(Batching::Sequence, ExitPolicy::None, self.model.config().num_loops as u8)
        }
    }
}

/// A recording executor that passes on each generation when it and all earlier ones are complete.
struct Recorder<'a, F> {
    executor: EngineExecutor,
    /// Requests whose generations have not been passed on.
    requests: &'a [Request],
    generation: F,
}

/// Why a recording stopped.
#[derive(Debug, thiserror::Error)]
enum RecordError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    HandOver(#[from] ReplayError),
}

impl From<ServeError<RecordError>> for ReplayError {
    fn from(error: ServeError<RecordError>) -> Self {
        match error {
            ServeError::Schedule(error) => error.into(),
            ServeError::Unordered(error) => error.into(),
            ServeError::Executor(RecordError::Engine(error)) => error.into(),
            ServeError::Executor(RecordError::HandOver(error)) => error,
        }
    }
}

impl<F: FnMut(u32, Generation) -> Result<(), ReplayError>> Recorder<'_, F> {
    fn hand_over(&mut self) -> Result<(), ReplayError> {
        while let Some((request, others)) = self.requests.split_first() {
            let Some(generation) = self.executor.take_finished(request) else { break };
            (self.generation)(request.id, generation)?;
            self.requests = others;
        }
        Ok(())
    }
}

impl<F: FnMut(u32, Generation) -> Result<(), ReplayError>> Executor for Recorder<'_, F> {
    type Error = RecordError;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), RecordError> {
        Ok(self.executor.admit(slot, request, generated)?)
    }

    fn release(&mut self, slot: Slot) {
        self.executor.release(slot);
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, RecordError> {
        self.hand_over()?;
        Ok(self.executor.run(pass, signals)?)
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, RecordError> {
        Ok(self.executor.emit(pass, exiting)?)
    }
}
