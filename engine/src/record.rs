//! Recordings: requests at full depth, with signals and predictions of every generated token at every depth.

use scheduler::{Batching, Executor, ExitPolicy, Observer, Pass, ServeError, Settings, Slot};
use traces::{ExitTrace, ExitTraceMeta, Nanos, Request, Signals, TraceError};

use crate::cache::TILE;
use crate::clock::{Idle, WallClock};
use crate::executor::{EngineError, EngineExecutor};
use crate::replay::{Engine, ReplayError, UNTIMED_ROWS, run_to_end};

impl Engine {
    /// Metadata of an exit trace of this model. `model` is the model's name; `source` describes how the trace is made.
    pub fn exit_trace_meta(&self, model: &str, source: &str) -> ExitTraceMeta {
        ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: model.to_owned(),
            fingerprint: self.model.fingerprint().to_owned(),
            num_loops: self.model.config().num_loops as u32,
            source: source.to_owned(),
        }
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
        let settings = self.recording_settings(requests);
        let executor = self.executor(&settings)?.recording();
        self.check(&settings, &executor, requests)?;
        let recorder = Recorder { executor, requests, generation };
        let mut recorder = run_to_end(settings, recorder, requests, &mut WallClock::start(Idle::Skip), observer)?;
        Ok(recorder.hand_over()?)
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
        trace.has_gates = self.model.config().gate;
        let push = |rows: &[_]| {
            trace.push_generation(rows);
            Ok(())
        };
        self.record_each(requests, push, observer)?;
        Ok(trace)
    }

    /// A full batch at full depth, with a cache for the longest requests at once.
    fn recording_settings(&self, requests: &[Request]) -> Settings {
        let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
        let max_batch = (requests.len() as u32).clamp(1, 32);
        Settings {
            max_batch,
            token_budget: UNTIMED_ROWS as u32,
            prefill_chunk: UNTIMED_ROWS as u32,
            block_tokens: TILE as u32,
            num_blocks: max_batch * longest.div_ceil(TILE as u32),
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
    Trace(#[from] TraceError),
}

impl From<ServeError<RecordError>> for ReplayError {
    fn from(error: ServeError<RecordError>) -> Self {
        match error {
            ServeError::Schedule(error) => error.into(),
            ServeError::Executor(RecordError::Engine(error)) => error.into(),
            ServeError::Executor(RecordError::Trace(error)) => error.into(),
        }
    }
}

impl<F: FnMut(&[(Signals, u32)]) -> Result<(), TraceError>> Recorder<'_, F> {
    fn hand_over(&mut self) -> Result<(), TraceError> {
        while let Some((request, others)) = self.requests.split_first() {
            let Some(generation) = self.executor.take_finished(request) else { break };
            (self.generation)(&generation.recorded)?;
            self.requests = others;
        }
        Ok(())
    }
}

impl<F: FnMut(&[(Signals, u32)]) -> Result<(), TraceError>> Executor for Recorder<'_, F> {
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
