//! A machine that never runs out of work: by it one tells how fast a device is in service.

use traces::{Nanos, Request};

use crate::executor::Executor;
use crate::policy::{Batching, ExitPolicy, KvFill};
use crate::scheduler::Settings;
use crate::serve::{ServeError, Server};

/// What is served: requests that are all much alike, a full batch of them at any time. The passes are the same on every
/// executor, so the n-th on one takes the place of the n-th on another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SteadyLoad {
    settings: Settings,
    longest: u32,
}

impl SteadyLoad {
    /// A load of sequences of up to `longest` tokens that run at full depth, batched by sequence, up to `max_batch` at once,
    /// with at most `token_budget` rows in a pass, of which `prefill_chunk` are of prompts.
    pub fn new(
        num_loops: u8,
        max_batch: u32,
        token_budget: u32,
        prefill_chunk: u32,
        block_tokens: u32,
        longest: u32,
    ) -> Self {
        let settings = Settings {
            batching: Batching::Sequence,
            exit: ExitPolicy::None,
            kv_fill: KvFill::Reuse,
            num_loops,
            max_batch,
            token_budget,
            prefill_chunk,
            block_tokens,
            num_blocks: max_batch * longest.div_ceil(block_tokens),
            prefix_caching: false,
            async_scheduling: false,
        };
        Self { settings, longest }
    }

    /// The settings to serve it under.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Its n-th request: half of the longest sequence is prompt, and an eighth to a third of it is generated, so that
    /// sequences end one by one. Ids come again, long after their requests have ended.
    fn request(&self, index: u32) -> Request {
        let prompt_tokens = (self.longest / 2).max(1);
        let output_tokens = (self.longest * (8 + 2 * (index % 8)) / 64).max(1);
        Request { id: index % (self.settings.max_batch * 64), arrival: Nanos::ZERO, prompt_tokens, output_tokens }
    }
}

/// A machine that serves a [`SteadyLoad`], a few passes at a time.
pub struct SteadyServer<E> {
    load: SteadyLoad,
    server: Server<E>,
    submitted: u32,
    passes: usize,
    now: Nanos,
}

impl<E: Executor> SteadyServer<E> {
    /// A machine that has run no pass yet.
    ///
    /// # Errors
    /// If the load's settings contradict each other.
    pub fn new(load: SteadyLoad, executor: E) -> Result<Self, ServeError<E::Error>> {
        let server = Server::new(load.settings, executor)?;
        Ok(Self { load, server, submitted: 0, passes: 0, now: Nanos::ZERO })
    }

    /// Runs the next pass: how long the executor says that it took.
    ///
    /// # Errors
    /// If a request of the load could never run to its end, or the executor fails.
    pub fn pass(&mut self) -> Result<Nanos, ServeError<E::Error>> {
        while self.server.scheduler().num_waiting() < self.load.settings.max_batch {
            self.server.submit(self.load.request(self.submitted))?;
            self.submitted = self.submitted.wrapping_add(1);
        }
        let elapsed = self.server.start_pass(self.now, &mut ()).map_err(ServeError::Executor)?;
        let elapsed = elapsed.expect("requests wait");
        self.now += elapsed;
        self.server.finish_pass(self.now, &mut ());
        self.passes += 1;
        Ok(elapsed)
    }

    /// What it serves.
    pub fn load(&self) -> SteadyLoad {
        self.load
    }

    /// Passes so far.
    pub fn passes(&self) -> usize {
        self.passes
    }
}
