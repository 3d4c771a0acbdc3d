//! The thread that runs passes. It takes requests from a channel, and sends each request's tokens to its own.
//!
//! ```text
//! handlers ──Command──► Inbox (a Load) ──► Serving ──pass──► EngineExecutor
//!    ▲                                        │
//!    └──────────────── Event ◄────────────────┘ Observer
//! ```

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use engine::backend::PassLimits;
use engine::{Asked, Chosen, Decoding, Engine, EngineExecutor, Idle, ReplayError, WallClock, in_pool};
use scheduler::{Clock, Load, Observer, PassRecord, PrefixUse, Server, Serving, Settings, Terms, Token, Unordered};
use tokio::sync::mpsc::UnboundedSender;
use traces::{Nanos, PrefixHashes, Request};

use crate::metrics::Metrics;
use crate::record::Recorder;

/// From one look at a silent channel to the next.
const IDLE: Duration = Duration::from_millis(500);

/// A request for the worker.
#[derive(Debug)]
pub(crate) struct Job {
    /// Identifies it.
    pub id: u32,
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub output_tokens: u32,
    pub terms: Terms,
    pub decoding: Decoding,
    /// Whether a special token of the tokenizer ends it.
    pub ends_at_special: bool,
    /// Other tokens that end it.
    pub stop_tokens: Vec<u32>,
    /// Its session, if its client named one.
    pub session: Option<String>,
    /// Least time from one event to the next: tokens wait for each other meanwhile. All wait for the end at `None`.
    pub interval: Option<Nanos>,
    /// Where its tokens go. A request whose receiver is gone is cancelled.
    pub events: UnboundedSender<Event>,
}

/// What handlers tell the worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve a request.
    Start(Box<Job>),
    /// Nobody waits for a request any more.
    Cancel(u32),
    /// End now: what still runs is aborted.
    Stop,
}

/// What the worker tells the handler of a request.
#[derive(Debug, Default)]
pub(crate) struct Event {
    /// Tokens of the prompt that were found in the prefix cache, once.
    pub cached_tokens: u32,
    /// The next tokens.
    pub tokens: Vec<Generated>,
    /// Why none follows, at the end.
    pub finish: Option<Finish>,
}

/// A token of a request's output.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Generated {
    pub token: u32,
    /// The depth at which it exited, from 0.
    pub depth: u8,
    /// The exit signal at that depth; `None` where none was read.
    pub signal: Option<f32>,
    /// Its log-probability and those of others, if the request keeps them.
    pub chosen: Option<Chosen>,
    /// Whether it is part of the text, rather than what ends it.
    pub is_text: bool,
}

/// Why a request has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Finish {
    /// A token or a text at which it ends.
    Stop,
    /// It has its most tokens.
    Length,
    /// Its client has gone, or the server ends.
    Abort,
    /// The engine has failed.
    Error,
}

impl Finish {
    /// The name in answers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// Requests that have arrived and have not been taken, and cancellations.
#[derive(Debug, Default)]
struct Inbox {
    arrived: VecDeque<(Request, Terms)>,
    /// Of the request that was taken last.
    terms: Terms,
    cancelled: Vec<u32>,
}

impl Inbox {
    fn cancel(&mut self, request: u32) {
        self.arrived.retain(|(arrived, _)| arrived.id != request);
        self.cancelled.push(request);
    }
}

impl Load for Inbox {
    fn next_time(&self) -> Option<Nanos> {
        self.arrived.front().map(|(request, _)| request.arrival)
    }

    fn take_until(&mut self, now: Nanos) -> Result<Option<Request>, Unordered> {
        if self.next_time().is_none_or(|time| time > now) {
            return Ok(None);
        }
        let taken = self.arrived.pop_front();
        self.terms = taken.map_or_else(Terms::default, |(_, terms)| terms);
        Ok(taken.map(|(request, _)| request))
    }

    fn answered(&mut self, _: Nanos, _: u32) {}

    fn terms(&mut self, _: u32) -> Terms {
        self.terms
    }

    fn take_cancelled(&mut self) -> Option<u32> {
        self.cancelled.pop()
    }
}

/// A request that has not ended.
#[derive(Debug)]
struct Running {
    job: Job,
    /// Tokens of its prompt that were found in the prefix cache, if that is not sent yet.
    cached_tokens: u32,
    /// Tokens that are not sent yet.
    tokens: Vec<Generated>,
    /// When the last ones were sent.
    sent: Option<Nanos>,
}

impl Running {
    /// Sends the tokens if the time has come for them; whether it has.
    fn send_if_due(&mut self, now: Nanos) -> bool {
        let is_due = match (self.job.interval, self.sent) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(interval), Some(sent)) => now.since(sent) >= interval,
        };
        if is_due {
            self.sent = Some(now);
            self.send(None);
        }
        is_due
    }

    /// Sends the tokens. If nobody listens, a cancellation is on its way.
    fn send(&mut self, finish: Option<Finish>) {
        let cached_tokens = std::mem::take(&mut self.cached_tokens);
        let _ = self.job.events.send(Event { cached_tokens, tokens: std::mem::take(&mut self.tokens), finish });
    }
}

/// What a pass delivers.
struct Delivered<'a> {
    found: Vec<(u32, u32)>,
    tokens: Vec<(u32, Token)>,
    metrics: &'a Metrics,
    recorder: Option<&'a Recorder>,
}

impl Observer for Delivered<'_> {
    fn looked_up(&mut self, _: Nanos, request: &Request, found: PrefixUse) {
        if self.metrics.looked_up(request, found) {
            self.found.push((request.id, found.found));
        }
    }

    fn admitted(&mut self, now: Nanos, request: &Request) {
        self.metrics.admitted(now, request);
    }

    fn preempted(&mut self, _: Nanos, _: &Request) {
        self.metrics.preempted();
    }

    fn pass(&mut self, record: &PassRecord<'_>) {
        self.metrics.pass(record);
        self.recorder.iter().for_each(|recorder| recorder.pass(record));
    }

    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        self.metrics.token(now, request, token);
        self.tokens.push((request.id, token));
    }
}

/// The state of the thread.
pub(crate) struct Worker {
    serving: Serving<EngineExecutor, WallClock, Inbox>,
    /// Tokens that end a text, in order.
    special: Arc<[u32]>,
    commands: Receiver<Command>,
    running: HashMap<u32, Running>,
    /// Requests with tokens that are not sent yet.
    unsent: Vec<u32>,
    metrics: Arc<Metrics>,
    recorder: Option<Recorder>,
    num_loops: usize,
    stopping: bool,
}

impl Worker {
    /// # Errors
    /// If the engine cannot run under these settings.
    pub fn new(
        engine: &Engine,
        settings: Settings,
        special: Arc<[u32]>,
        commands: Receiver<Command>,
        metrics: Arc<Metrics>,
        recorder: Option<Recorder>,
    ) -> Result<Self, ReplayError> {
        engine.check_settings(&settings)?;
        let mut executor = engine.executor(&settings)?;
        executor.prepare(PassLimits::of(&settings, engine.model.config().max_positions as u32))?;
        let executor = match &recorder {
            None => executor,
            Some(recorder) if recorder.looks_ahead() => executor.looking_ahead(),
            Some(_) => executor.recording(),
        };
        let server = Server::new(settings, executor)?;
        Ok(Self {
            serving: Serving::new(server, WallClock::start(Idle::Sleep), Inbox::default()),
            special,
            commands,
            running: HashMap::new(),
            unsent: Vec::new(),
            metrics,
            recorder,
            num_loops: settings.num_loops.into(),
            stopping: false,
        })
    }

    /// Serves until it is told to stop.
    ///
    /// # Errors
    /// If the engine or the recording fails. Every request is then answered with that.
    pub fn run(mut self) -> Result<(), ReplayError> {
        let done = loop {
            match in_pool(|| self.run_passes()) {
                Ok(()) if self.stopping => break Ok(()),
                Ok(()) => {}
                Err(error) => break Err(error),
            }
            match self.commands.recv_timeout(IDLE) {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break Ok(()),
            }
        };
        let finish = if done.is_ok() { Finish::Abort } else { Finish::Error };
        for id in self.running.keys().copied().collect::<Vec<_>>() {
            self.end(id, finish);
        }
        done
    }

    /// Runs passes until nothing is left to run.
    fn run_passes(&mut self) -> Result<(), ReplayError> {
        loop {
            loop {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.stopping = true;
                        break;
                    }
                }
            }
            if self.stopping {
                return Ok(());
            }
            let (metrics, recorder) = (&*self.metrics, self.recorder.as_ref());
            let mut delivered = Delivered { found: Vec::new(), tokens: Vec::new(), metrics, recorder };
            let goes_on = self.serving.step(&mut delivered)?;
            for (id, found) in delivered.found {
                if let Some(running) = self.running.get_mut(&id) {
                    running.cached_tokens = found;
                }
            }
            for (id, token) in delivered.tokens {
                self.deliver(id, token);
            }
            self.send_what_is_due();
            let scheduler = self.serving.server().scheduler();
            self.metrics.occupancy(scheduler);
            if !goes_on {
                return Ok(());
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(job) => self.start(*job),
            Command::Cancel(id) if self.running.contains_key(&id) => {
                self.serving.load_mut().cancel(id);
                self.end(id, Finish::Abort);
            }
            Command::Cancel(_) => {}
            Command::Stop => self.stopping = true,
        }
    }

    fn start(&mut self, mut job: Job) {
        let arrival = self.serving.clock_mut().now();
        let (id, prompt_tokens, output_tokens) = (job.id, job.prompt.len() as u32, job.output_tokens);
        let request = Request { id, arrival, prompt_tokens, output_tokens };
        self.metrics.arrived(&request);
        let server = self.serving.server_mut();
        let Settings { prefix_caching, block_tokens, .. } = *server.scheduler().settings();
        let hashes = PrefixHashes::of_tokens(&job.prompt, block_tokens);
        self.recorder.iter().for_each(|recorder| recorder.arrived(&request, hashes.clone(), job.session.take()));
        if prefix_caching {
            server.share_prefix(id, hashes);
        }
        let asked = Asked { prompt: std::mem::take(&mut job.prompt), decoding: job.decoding.clone() };
        server.executor_mut().ask(id, asked);
        self.serving.load_mut().arrived.push_back((request, job.terms));
        self.running.insert(id, Running { job, cached_tokens: 0, tokens: Vec::new(), sent: None });
    }

    /// Gives a token to its request, and ends the request if the token does.
    fn deliver(&mut self, id: u32, Token { index, .. }: Token) {
        // A request may end with the pass that yields its next token.
        let Some(running) = self.running.get_mut(&id) else { return };
        let job = &running.job;
        let executor = self.serving.server().executor();
        let generation = executor.generation(id).expect("it has generated a token");
        // The depth of a confirmed draft is that at which it exited.
        let (token, depth) = (generation.tokens[index as usize], generation.exit_depths[index as usize]);
        if let Some(recorder) = &self.recorder {
            let rows = generation.recorded.chunks(self.num_loops).nth(index as usize).unwrap_or_default();
            recorder.token(id, token, depth, rows.to_vec());
        }
        let is_special = self.special.binary_search(&token).is_ok();
        let is_stop = job.ends_at_special && is_special || job.stop_tokens.contains(&token);
        let is_text = !is_stop && !is_special;
        let signal = generation.exit_signals.get(index as usize).copied().flatten();
        let chosen = generation.chosen.get(index as usize).cloned();
        let is_last = index + 1 == job.output_tokens;
        if running.tokens.is_empty() && job.interval.is_some() {
            self.unsent.push(id);
        }
        running.tokens.push(Generated { token, depth, signal, chosen, is_text });
        if is_stop {
            if !is_last {
                self.serving.load_mut().cancel(id);
            }
            self.end(id, Finish::Stop);
        } else if is_last {
            self.end(id, Finish::Length);
        }
    }

    /// Sends tokens that have waited for others for long enough.
    fn send_what_is_due(&mut self) {
        if !self.unsent.is_empty() {
            let (now, running) = (self.serving.clock_mut().now(), &mut self.running);
            self.unsent.retain(|id| running.get_mut(id).is_some_and(|request| !request.send_if_due(now)));
        }
    }

    /// Tells a request's handler that no token follows, and forgets the request.
    fn end(&mut self, id: u32, finish: Finish) {
        let now = self.serving.clock_mut().now();
        self.serving.server_mut().executor_mut().forget(id);
        self.recorder.iter().for_each(|recorder| recorder.ended(id, now));
        if let Some(mut running) = self.running.remove(&id) {
            self.metrics.ended(finish, now, id);
            running.send(Some(finish));
        }
    }
}
