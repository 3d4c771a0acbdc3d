//! Steady load: a machine that never runs out of work. Its passes show how fast a device is while it serves.

use traces::{Nanos, Request};

use crate::executor::Executor;
use crate::observe::Observer;
use crate::policy::{Batching, ExitPolicy, KvFill};
use crate::scheduler::Settings;
use crate::serve::{ServeError, Server};

/// Requests that arrive in bursts of up to a full batch, one burst per duration of a sequence on average. The load
/// therefore has passes of few sequences and of full batches, at the start and at the end of a burst. A burst arrives
/// with a given pass, or at once when there is nothing to run. Passes are hence equal on every executor: the n-th pass
/// on one executor can be compared with the n-th on another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SteadyLoad {
    settings: Settings,
    lengths: Lengths,
}

/// Lengths of the sequences of a load, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Length of every prompt.
    pub prompt: u32,
    /// Mean length of outputs: lengths go from half of it to one and a half times it, as far as `longest` allows.
    pub output: u32,
    /// Length of the longest sequence, prompt and output.
    pub longest: u32,
}

/// Evenly spread numbers from 0 to 1, for any count of them: the fractional parts of the multiples of an irrational
/// number.
fn spread(index: usize, irrational: f64) -> f64 {
    (index as f64 * irrational).fract()
}

impl SteadyLoad {
    /// A load of sequences at full depth, batched sequence-wise: at most `max_batch` sequences at once and
    /// `token_budget` rows in a pass, `prefill_chunk` of them prompt tokens.
    pub fn new(
        num_loops: u8,
        max_batch: u32,
        token_budget: u32,
        prefill_chunk: u32,
        block_tokens: u32,
        lengths: Lengths,
    ) -> Self {
        let settings = Settings {
            max_batch,
            token_budget,
            prefill_chunk,
            block_tokens,
            num_blocks: max_batch * lengths.longest.max(2).div_ceil(block_tokens),
            ..Settings::new(Batching::Sequence, ExitPolicy::None, num_loops)
        };
        Self { settings, lengths }
    }

    /// The requests of this load at full depth, batched depth-wise.
    pub fn depth_wise(self) -> Self {
        Self { settings: Settings { batching: Batching::Depth, ..self.settings }, ..self }
    }

    /// The requests of this load, batched depth-wise, where every token exits at the middle depth. Prompts run every depth,
    /// as under policies that do not know where tokens will exit.
    pub fn with_exits(self) -> Self {
        let last = self.settings.num_loops.saturating_sub(1);
        let load = self.with_exits_by(ExitPolicy::Static(last / 2));
        Self { settings: Settings { prefill_depth: Some(last), ..load.settings }, ..load }
    }

    /// The requests of this load, batched depth-wise, where an exit policy decides after each pass which rows exit.
    pub fn with_exits_by(self, exit: ExitPolicy) -> Self {
        let load = self.depth_wise();
        Self { settings: Settings { exit, ..load.settings }, ..load }
    }

    /// The requests of this load, batched sequence-wise, where an exit policy decides after each pass which rows exit.
    pub fn with_exits_in_lockstep(self, exit: ExitPolicy) -> Self {
        let load = self.with_exits_by(exit);
        Self { settings: Settings { batching: Batching::Sequence, ..load.settings }, ..load }
    }

    /// The same load under a KV fill.
    pub fn under(self, kv_fill: KvFill) -> Self {
        Self { settings: Settings { kv_fill, ..self.settings }, ..self }
    }

    /// The settings of the load.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The n-th request. Ids repeat, long after their earlier requests have ended.
    fn request(&self, index: usize) -> Request {
        let Lengths { prompt, output, longest } = self.lengths;
        let prompt_tokens = prompt.clamp(1, longest.max(2) - 1);
        let longest_output = (output + output / 2).clamp(1, longest.max(2) - prompt_tokens);
        let shortest_output = (output / 2).clamp(1, longest_output);
        let outputs = f64::from(longest_output - shortest_output + 1);
        let output_tokens = shortest_output + (outputs * spread(index, 3f64.sqrt())) as u32;
        let id = index as u32 % (self.settings.max_batch * 64);
        Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens }
    }

    /// Number of requests of the n-th burst.
    fn burst(&self, index: usize) -> u32 {
        1 + (f64::from(self.settings.max_batch) * spread(index, (1.0 + 5f64.sqrt()) / 2.0)) as u32
    }

    /// Number of passes from the n-th burst to the next.
    fn gap(&self, index: usize) -> usize {
        let Lengths { prompt, output, .. } = self.lengths;
        let steps = prompt.div_ceil(self.settings.prefill_chunk) + output;
        (2.0 * f64::from(steps * u32::from(self.settings.num_loops)) * spread(index, 2f64.sqrt())) as usize
    }
}

/// A machine that serves a [`SteadyLoad`], one pass at a time.
pub struct SteadyServer<E> {
    load: SteadyLoad,
    server: Server<E>,
    submitted: usize,
    bursts: usize,
    /// Pass at which the next burst arrives.
    next_burst: usize,
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
        Ok(Self { load, server, submitted: 0, bursts: 0, next_burst: 0, passes: 0, now: Nanos::ZERO })
    }

    /// Runs the next pass; returns the duration that the executor reports.
    ///
    /// # Errors
    /// If a request of the load can never run to its end, or the executor fails.
    pub fn pass(&mut self, observer: &mut impl Observer) -> Result<Nanos, ServeError<E::Error>> {
        let scheduler = self.server.scheduler();
        let idle = scheduler.num_running() + scheduler.num_waiting() == 0;
        if idle || self.passes >= self.next_burst {
            for _ in 0..self.load.burst(self.bursts) {
                self.server.submit(self.load.request(self.submitted))?;
                self.submitted += 1;
            }
            self.next_burst = self.passes + self.load.gap(self.bursts);
            self.bursts += 1;
        }
        let elapsed = self.server.start_pass(self.now, observer).map_err(ServeError::Executor)?;
        let elapsed = elapsed.expect("requests wait or run");
        self.now += elapsed;
        self.server.finish_pass(self.now, observer);
        self.passes += 1;
        Ok(elapsed)
    }

    /// The load that the machine serves.
    pub fn load(&self) -> SteadyLoad {
        self.load
    }

    /// Number of passes so far.
    pub fn passes(&self) -> usize {
        self.passes
    }
}
