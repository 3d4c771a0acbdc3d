//! Runs of request traces on the engine: measured replays, and the tokens of full depth after the same prefixes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use scheduler::blocks::BlockId;
use scheduler::{
    Clock, ClosedLoad, Executor, ExitPolicy, KvFill, Observer, ScheduleError, ServeError, Server, Serving, Settings,
    SignalRead, Unordered, serve,
};
use traces::{ClosedLoop, ExitSignal, ExitTrace, PrefixHashes, Request, TraceError};

use crate::backend::{Heads, PassLimits, ServedModel, Work};
use crate::cache::{TILE, check_block_tokens};
use crate::clock::{Idle, WallClock};
use crate::executor::{EngineError, EngineExecutor, ExitDepths, Generation, Sampling, in_pool};
use crate::kernels::attention::Row;
use crate::kernels::rows::Source;
use crate::model::Rows;
use crate::prompts::Prompts;
use crate::script::ExitScript;
use crate::tokenizer::TokenizerError;

/// Rows per pass in runs that are not timed.
pub(crate) const UNTIMED_ROWS: usize = 256;

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// Settings or a request that cannot be served.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Requests that are not in order of arrival.
    #[error(transparent)]
    Unordered(#[from] Unordered),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The tokenizer refused a text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A recording cannot be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Settings for another number of loops.
    #[error("the settings are for a model with {settings} loops, expected {model}")]
    NumLoops {
        /// Loops in the settings.
        settings: u8,
        /// Loops of the model.
        model: usize,
    },
    /// An exit script for another number of loops.
    #[error("the exit trace that tokens follow is of {script} loops, expected {model}")]
    ScriptLoops {
        /// Loops of the script.
        script: usize,
        /// Loops of the model.
        model: usize,
    },
    /// An exit policy that follows a recording where none is.
    #[error("exit policy {0} follows a recording at full depth: expected another policy here")]
    FollowsRecording(ExitPolicy),
    /// A recording under a policy whose text is that of full depth.
    #[error("exit policy {0}: what it serves is the text of full depth, expected a recording at full depth")]
    Speculates(ExitPolicy),
    /// An exit policy that reads gates of a model without gates.
    #[error("exit policy {0}: the model has no gates, expected another signal")]
    NoGates(ExitPolicy),
    /// An exit policy that speculates, under an exit script.
    #[error(
        "exit policy {0}: full depth decides of its drafts, not an exit trace of any model, expected another policy"
    )]
    DraftsInScript(ExitPolicy),
    /// An exit policy that reads a signal which the exit script lacks.
    #[error("exit policy {0}: the exit trace that tokens follow lacks the signal, expected another policy")]
    SignalInScript(ExitPolicy),
    /// A KV fill by depth, of a model whose loops share the keys and values of depth 0.
    #[error("KV fill {0}: the loops of this model share the keys and values of depth 0, expected first")]
    SharesKv(KvFill),
}

impl From<ServeError<EngineError>> for ReplayError {
    fn from(error: ServeError<EngineError>) -> Self {
        match error {
            ServeError::Schedule(error) => Self::Schedule(error),
            ServeError::Unordered(error) => Self::Unordered(error),
            ServeError::Executor(error) => Self::Engine(error),
        }
    }
}

impl From<candle_core::Error> for ReplayError {
    fn from(error: candle_core::Error) -> Self {
        Self::Engine(error.into())
    }
}

/// What full depth makes of a served text, after the same prefix at each token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FullDepth {
    /// For each generated token, the token of full depth, with the same random numbers.
    pub tokens: Vec<u32>,
    /// For each generated token, the natural logarithm of its probability at full depth and temperature 1.
    pub log_likelihoods: Vec<f64>,
}

impl FullDepth {
    /// Negative log-likelihood of the text in nats.
    pub fn nats(&self) -> f64 {
        -self.log_likelihoods.iter().sum::<f64>()
    }
}

/// A model with everything that it needs to serve requests.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The model.
    pub model: Arc<dyn ServedModel>,
    /// Prompts of the requests.
    pub prompts: Arc<Prompts>,
    /// How tokens are sampled.
    pub sampling: Sampling,
    /// The exits that replays follow, if not the model's own.
    pub script: Option<Arc<ExitScript>>,
}

impl Engine {
    /// A model that takes the most likely tokens, and has no prompts yet.
    pub fn new(model: Arc<dyn ServedModel>) -> Self {
        let prompts = Arc::new(Prompts::Given(HashMap::new()));
        Self { model, prompts, sampling: Sampling::default(), script: None }
    }

    /// Loops of the model.
    pub fn num_loops(&self) -> u8 {
        self.model.config().num_loops as u8
    }

    /// An executor with a cache of the size that `settings` say.
    ///
    /// # Errors
    /// If the cache cannot be created.
    pub fn executor(&self, settings: &Settings) -> Result<EngineExecutor, EngineError> {
        let &Settings { kv_fill, num_blocks, block_tokens, .. } = settings;
        let (model, prompts) = (self.model.clone(), self.prompts.clone());
        let executor = EngineExecutor::new(model, prompts, self.sampling, kv_fill, num_blocks, block_tokens)?;
        let executor = executor.exiting_by(settings.exit).with_prompts_of(settings);
        if settings.exit_wait > 0 { executor.with_exits_that_wait() } else { Ok(executor) }
    }

    /// An executor with the exit depths that the oracle exit policy reads, or with the exit script.
    fn executor_with(
        &self,
        settings: &Settings,
        oracle: Option<Arc<ExitDepths>>,
    ) -> Result<EngineExecutor, EngineError> {
        let executor = self.executor(settings)?;
        Ok(match (&self.script, oracle) {
            (Some(script), _) => executor.with_script(script.clone()),
            (None, Some(exits)) => executor.with_oracle(exits),
            (None, None) => executor,
        })
    }

    /// Serves `requests`, in order of arrival, on the wall clock. The measured times go to `observer`. Returns prompt and
    /// output of each request, by id.
    ///
    /// `oracle` is read only by the oracle exit policy. Without it, the depths of the live text are
    /// [found](Self::oracle_exits) before the clock starts. With a [script](Self::script), every policy follows that.
    ///
    /// # Errors
    /// Before the run if a request does not fit the model or the cache, or has no prompt; during the run if the engine
    /// fails.
    pub fn replay(
        &self,
        settings: Settings,
        requests: &[Request],
        oracle: Option<Arc<ExitDepths>>,
        idle: Idle,
        observer: &mut (impl Observer + Send),
    ) -> Result<HashMap<u32, Generation>, ReplayError> {
        let looks_ahead = settings.exit.signal_read() == SignalRead::Oracle && !settings.exit.follows_recording();
        let oracle = match oracle {
            None if looks_ahead && self.script.is_none() => Some(Arc::new(self.oracle_exits(&settings, requests)?)),
            given => given,
        };
        self.replay_by(settings, requests, None, oracle, &mut WallClock::start(idle), observer)
    }

    /// Serves `requests` as [`replay`](Self::replay), on another clock, which begins when the engine is ready; with a closed
    /// loop, each is sent when that says. The oracle exit policy needs `oracle`.
    ///
    /// # Errors
    /// As [`replay`](Self::replay).
    pub fn replay_by(
        &self,
        settings: Settings,
        requests: &[Request],
        closed_loop: Option<&ClosedLoop>,
        oracle: Option<Arc<ExitDepths>>,
        clock: &mut (impl Clock + Send),
        observer: &mut (impl Observer + Send),
    ) -> Result<HashMap<u32, Generation>, ReplayError> {
        let server = self.server_with(settings, oracle, requests)?;
        clock.begin();
        let Some(closed_loop) = closed_loop else {
            return Ok(run_to_end(server, requests, clock, observer)?.into_generations());
        };
        let load = ClosedLoad::new(closed_loop.clone(), requests.iter().copied());
        let mut serving = Serving::new(server, clock, load);
        in_pool(|| {
            while serving.step(observer)? {}
            Ok(serving.into_server().into_executor().into_generations())
        })
    }

    /// A replay of `requests` in a closed loop, which runs in slices. The oracle exit policy needs `oracle`.
    ///
    /// # Errors
    /// If a request does not fit the model or the cache, or has no prompt.
    pub fn sliced_replay(
        &self,
        settings: Settings,
        requests: &[Request],
        closed_loop: &ClosedLoop,
        oracle: Option<Arc<ExitDepths>>,
    ) -> Result<SlicedReplay, ReplayError> {
        let server = self.server_with(settings, oracle, requests)?;
        let mut clock = WallClock::start(Idle::Skip);
        clock.stop();
        let load = ClosedLoad::new(closed_loop.clone(), Vec::from(requests));
        Ok(SlicedReplay { serving: Serving::new(server, clock, load), total: requests.len() })
    }

    /// Checks that the engine can run under these settings.
    ///
    /// # Errors
    /// If the settings are for another number of loops, read gates that the model does not have, or do not go with the
    /// [script](Self::script).
    pub fn check_settings(&self, settings: &Settings) -> Result<(), ReplayError> {
        let model = self.model.config().num_loops;
        if usize::from(settings.num_loops) != model {
            return Err(ReplayError::NumLoops { settings: settings.num_loops, model });
        }
        if settings.exit.signal_read() == SignalRead::Signal(ExitSignal::Gate) && !self.model.config().gate {
            return Err(ReplayError::NoGates(settings.exit));
        }
        if let Some(script) = &self.script {
            let trace = script.trace();
            if trace.num_loops() != model {
                return Err(ReplayError::ScriptLoops { script: trace.num_loops(), model });
            }
            if settings.exit.speculates() {
                return Err(ReplayError::DraftsInScript(settings.exit));
            }
            let lacks = |signal| !trace.recorded.contains(signal);
            if matches!(settings.exit.signal_read(), SignalRead::Signal(signal) if lacks(signal)) {
                return Err(ReplayError::SignalInScript(settings.exit));
            }
        }
        if self.model.config().shares_kv() && settings.kv_fill != KvFill::First {
            return Err(ReplayError::SharesKv(settings.kv_fill));
        }
        Ok(())
    }

    /// An idle machine, prepared for a measured replay of `requests`.
    fn server_with(
        &self,
        settings: Settings,
        oracle: Option<Arc<ExitDepths>>,
        requests: &[Request],
    ) -> Result<Server<EngineExecutor>, ReplayError> {
        let mut server = self.server(settings, self.executor_with(&settings, oracle)?, requests)?;
        let longest = requests.iter().map(|request| request.prompt_tokens + request.output_tokens).max();
        server.executor_mut().prepare(PassLimits::of(&settings, longest.unwrap_or(0)))?;
        Ok(server)
    }

    /// An idle machine that can serve `requests`.
    pub(crate) fn server(
        &self,
        settings: Settings,
        executor: EngineExecutor,
        requests: &[Request],
    ) -> Result<Server<EngineExecutor>, ReplayError> {
        self.check(&settings, &executor, requests)?;
        let mut server = Server::new(settings, executor)?;
        if settings.prefix_caching {
            server.share_prefixes(Arc::new(self.prefix_hashes(requests, settings.block_tokens)?))?;
        }
        Ok(server)
    }

    /// Hashes of the prompts of `requests`, in blocks of `block_tokens`: what prefix caching finds prompts by.
    ///
    /// # Errors
    /// If a request has no prompt, or the engine has no such blocks.
    pub fn prefix_hashes(&self, requests: &[Request], block_tokens: u32) -> Result<PrefixHashes, EngineError> {
        check_block_tokens(block_tokens)?;
        let mut hashes = PrefixHashes::new(block_tokens);
        let mut by_id: Vec<&Request> = requests.iter().collect();
        by_id.sort_unstable_by_key(|request| request.id);
        for request in by_id {
            // Ids may have gaps.
            (hashes.num_requests()..request.id as usize).for_each(|_| hashes.push([]));
            hashes.push(PrefixHashes::of_tokens(&self.prompts.get(request)?, block_tokens));
        }
        Ok(hashes)
    }

    /// Checks that all requests can be served.
    pub(crate) fn check(
        &self,
        settings: &Settings,
        executor: &EngineExecutor,
        requests: &[Request],
    ) -> Result<(), ReplayError> {
        self.check_settings(settings)?;
        for request in requests {
            settings.check_request(request)?;
            executor.check_request(request)?;
            self.prompts.get(request).map_err(EngineError::Prompt)?;
        }
        Ok(())
    }

    /// Runs prompt and generated tokens at full depth, in one pass over the text (teacher forcing).
    ///
    /// # Errors
    /// If the engine fails, or the model's logits are not finite.
    pub fn full_depth(&self, request: u32, generation: &Generation) -> Result<FullDepth, ReplayError> {
        in_pool(|| self.teacher_forced(request, generation))
    }

    fn teacher_forced(&self, request: u32, generation: &Generation) -> Result<FullDepth, ReplayError> {
        let inputs: Vec<u32> = generation.prompt.iter().chain(&generation.tokens).copied().collect();
        let inputs = &inputs[..inputs.len().saturating_sub(1)];
        let num_blocks = inputs.len().div_ceil(TILE) as u32;
        let fill = self.model.config().exact_fill();
        let mut backend = self.model.clone().backend(fill, num_blocks, TILE as u32)?;
        backend.reserve(UNTIMED_ROWS)?;
        let blocks: Vec<BlockId> = (0..num_blocks).collect();
        let last_depth = self.model.config().num_loops - 1;
        let mut found = FullDepth::default();
        for (index, chunk) in inputs.chunks(UNTIMED_ROWS).enumerate() {
            let start = index * UNTIMED_ROWS;
            for depth in 0..=last_depth {
                let mut rows = Rows::default();
                let keeps = depth < usize::from(fill.cached_depths(last_depth as u8 + 1));
                let fills = if keeps { depth..depth + 1 } else { depth..depth };
                let row = |position| Row { fills: fills.clone(), ..Row::new(position, depth, &blocks) };
                (start..start + chunk.len()).for_each(|position| rows.push(row(position)));
                let places = 0..chunk.len() as u32;
                let last = depth == last_depth;
                let yielding = (generation.prompt.len() - 1).max(start)..start + chunk.len();
                let token = |position| position + 1 - generation.prompt.len();
                let picks: Vec<usize> = yielding.clone().map(|position| position - start).collect();
                let heads = rows.pick(picks.iter().copied());
                let answers = backend.run(&Work {
                    rows,
                    sources: match depth {
                        0 => chunk.iter().map(|&token| Source::First(token)).collect(),
                        _ => places.clone().map(Source::Second).collect(),
                    },
                    coda: if last { 0..chunk.len() } else { 0..0 },
                    places: places.map(Some).collect(),
                    heads: match last {
                        true => Heads {
                            rows: picks.clone(),
                            keys: yielding
                                .clone()
                                .map(|position| self.sampling.key(request, token(position)))
                                .collect(),
                            temperature: self.sampling.temperature,
                        },
                        false => Heads::default(),
                    },
                    ..Work::default()
                })?;
                if last && !picks.is_empty() {
                    let served = &generation.tokens[token(yielding.start)..token(yielding.end)];
                    found.tokens.extend(answers.verdicts.iter().map(|verdict| verdict.token));
                    found.log_likelihoods.extend(backend.log_likelihoods(&heads, &picks, served)?);
                }
            }
        }
        match found.log_likelihoods.iter().position(|nats| !nats.is_finite()) {
            None => Ok(found),
            Some(token) => Err(EngineError::NotFinite { request, token, depth: last_depth as u8 }.into()),
        }
    }

    /// Token agreement: the share of generated tokens, 0 to 1, that equal those of full depth after the same prefix.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn agreement(&self, generations: &HashMap<u32, Generation>) -> Result<f64, ReplayError> {
        let (mut agreeing, mut total) = (0_usize, 0_usize);
        for (&request, generation) in generations {
            let expected = self.full_depth(request, generation)?.tokens;
            agreeing += generation.tokens.iter().zip(&expected).filter(|(found, expected)| found == expected).count();
            total += generation.tokens.len();
        }
        Ok(agreeing as f64 / total as f64)
    }
}

/// A replay in a closed loop that runs in slices. Between them its clock stands still, so that two replays can run in
/// alternation and meet the same moments of the machine.
pub struct SlicedReplay {
    serving: Serving<EngineExecutor, WallClock, ClosedLoad<std::vec::IntoIter<Request>>>,
    total: usize,
}

impl SlicedReplay {
    /// Runs passes for at least `slice`, and at least one. Returns whether anything is left to run.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn run_for(&mut self, slice: Duration, observer: &mut (impl Observer + Send)) -> Result<bool, ReplayError> {
        let serving = &mut self.serving;
        in_pool(|| {
            let start = Instant::now();
            serving.clock_mut().resume();
            let mut goes_on = serving.step(observer)?;
            while goes_on && start.elapsed() < slice {
                goes_on = serving.step(observer)?;
            }
            serving.clock_mut().stop();
            Ok(goes_on)
        })
    }

    /// Share of the requests that have ended, 0 to 1; 1 without requests.
    pub fn progress(&self) -> f64 {
        if self.total == 0 { 1.0 } else { self.serving.num_ended() as f64 / self.total as f64 }
    }

    /// Prompt and output of each request, by id, when the replay is over.
    pub fn into_generations(self) -> HashMap<u32, Generation> {
        self.serving.into_server().into_executor().into_generations()
    }
}

/// Serves `requests` and returns the executor.
pub(crate) fn run_to_end<E: Executor + Send>(
    mut server: Server<E>,
    requests: &[Request],
    clock: &mut (impl Clock + Send),
    observer: &mut (impl Observer + Send),
) -> Result<E, ReplayError>
where
    ReplayError: From<ServeError<E::Error>>,
{
    in_pool(|| {
        serve(&mut server, requests.iter().copied(), clock, observer)?;
        Ok(server.into_executor())
    })
}

/// The earliest depth of each token whose prediction equals that of the last depth, by request, for the oracle. `trace`
/// is the recording of `requests`.
pub fn oracle_depths(trace: &ExitTrace, requests: &[Request]) -> ExitDepths {
    let of_generation = |index| trace.generation(index).map(|token| trace.oracle_depth(token) as u8).collect();
    requests.iter().zip(0..trace.num_generations()).map(|(request, index)| (request.id, of_generation(index))).collect()
}
