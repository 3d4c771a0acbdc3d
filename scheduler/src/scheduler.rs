//! The scheduler: composes the next pass and applies its outcome.
//!
//! ```text
//! waiting ──admit──► prefilling ──last chunk started──► (predicts) ──token──► ready ──start──► in flight
//!    ▲                                                                          ▲                  │
//!    └────────────────────────── preempt: newest first ◄────────────────────────┴──── token ◄──────┘
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use traces::{Nanos, PrefixHashes, Request, SignalBound};

use crate::backfill::Backlog;
use crate::blocks::{BlockId, BlockTables};
use crate::custom::MachineLoad;
use crate::decide::Decision;
use crate::exit_wait::ExitWait;
use crate::observe::{Observer, PrefixUse, Token};
use crate::pass::{Pass, RowKind, Segment, Slot, exited};
use crate::policy::{Batching, ExitPolicy, KvFill, SignalRead, SignalReads};
use crate::prefixes::Prefixes;
use crate::work::WorkMeter;

mod drafts;
mod handover;

use drafts::{Drafts, Exited};
use handover::Handovers;
pub use handover::{Handover, Reservation};

/// How a run is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Which rows may share a pass.
    pub batching: Batching,
    /// When rows exit early.
    pub exit: ExitPolicy,
    /// Keys and values that later tokens find at depths that an exited token skipped.
    #[serde(default)]
    pub kv_fill: KvFill,
    /// Number of loops of the model.
    pub num_loops: u8,
    /// Maximum number of sequences that run at once.
    pub max_batch: u32,
    /// Maximum rows of a pass; in lockstep batching, of an iteration.
    pub token_budget: u32,
    /// Maximum prompt tokens that start at depth 0 in one pass; in lockstep batching, in one iteration. A chunk
    /// occupies its rows at every depth. Under depth-wise batching, `token_budget / num_loops` therefore keeps a steady
    /// stream of prompts within the budget.
    pub prefill_chunk: u32,
    /// The last depth that tokens of a prompt run; the row that predicts the first token goes on until it exits. Deeper,
    /// later tokens find copies of its entries, as after an exit. By default the deepest depth at which a token of the
    /// request can exit, which changes no text. A shallower one needs [`KvFill::Reuse`].
    #[serde(default)]
    pub prefill_depth: Option<u8>,
    /// Positions per KV block.
    pub block_tokens: u32,
    /// KV blocks that the device holds.
    pub num_blocks: u32,
    /// Whether freed blocks keep their contents, to be reused by a prompt with an equal prefix or by a request that was
    /// preempted.
    #[serde(default)]
    pub prefix_caching: bool,
    /// Whether the next pass is composed when the current one starts rather than when it ends. The device then never
    /// waits for the scheduler, but arriving requests, and the slots of finished ones, are seen one pass later.
    #[serde(default)]
    pub async_scheduling: bool,
    /// Most passes that a decode row which exits waits for the exit head, so that one read of the head's weights serves
    /// the exits of several passes. 0: the head runs after every pass that a row exits from. A waiting row keeps its slot.
    /// Rows whose head runs within the pass, and last rows of prompts, never wait; the others then go with them. In
    /// lockstep batching nothing waits longer than its iteration.
    #[serde(default)]
    pub exit_wait: u32,
    /// Number of waiting rows for which the head runs, before the wait is over; 0 for no such number. Only with
    /// [`exit_wait`](Self::exit_wait).
    #[serde(default)]
    pub exit_batch: u32,
}

/// Settings or a request that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A setting that must be at least 1 is 0.
    #[error("{0} is 0: expected at least 1")]
    Zero(&'static str),
    /// A setting above its limit, rejected before memory is allocated for it.
    #[error("{name} is {count}: expected at most {most}")]
    TooMany {
        /// The setting.
        name: &'static str,
        /// The given value.
        count: u32,
        /// The limit.
        most: u32,
    },
    /// The decode rows of a full batch exceed the budget.
    #[error("token_budget is {token_budget}, less than max_batch {max_batch}: every sequence needs a row")]
    BudgetBelowBatch {
        /// The given budget.
        token_budget: u32,
        /// The given batch limit.
        max_batch: u32,
    },
    /// A static exit depth that the model does not have.
    #[error("static exit depth {depth} is outside the model's depths 0 to {}", num_loops - 1)]
    StaticDepth {
        /// The given depth.
        depth: u8,
        /// Number of loops of the model.
        num_loops: u8,
    },
    /// Prompts that would end at a depth that the model does not have.
    #[error("prefill_depth {depth} is outside the model's depths 0 to {}", num_loops - 1)]
    PrefillDepth {
        /// The given depth.
        depth: u8,
        /// Number of loops of the model.
        num_loops: u8,
    },
    /// Prompts that do not run every depth, with a KV fill or prefix caching that needs their entries.
    #[error("prefill_depth {depth} with {setting}: expected kv_fill reuse, without prefix_caching")]
    ShallowPrompts {
        /// The given depth.
        depth: u8,
        /// What contradicts it.
        setting: String,
    },
    /// More loops for every token than the model has.
    #[error("exit policy {exit} has tokens run at least {min_loops} loops: the model has {num_loops}")]
    MinLoops {
        /// The given policy.
        exit: String,
        /// Its least number of loops.
        min_loops: u8,
        /// Number of loops of the model.
        num_loops: u8,
    },
    /// Asynchronous scheduling with an exit policy whose exits depend on the signals of the same pass.
    #[error(
        "async_scheduling with exit policy {exit}: what the next pass runs depends on the signals of this one; \
         expected none, static:DEPTH or delayed:SIGNAL:THRESHOLD"
    )]
    AsyncExit {
        /// The given policy.
        exit: String,
    },
    /// Exits that wait for the head, with asynchronous scheduling.
    #[error("exit_wait is {exit_wait} with async_scheduling: expected one of the two")]
    AsyncWait {
        /// The given wait.
        exit_wait: u32,
    },
    /// Drafts under a KV fill that does not keep the entries of every depth.
    #[error("exit policy {exit} with kv_fill {kv_fill}: expected kv_fill backfill or first")]
    SpeculatedFill {
        /// The given policy.
        exit: String,
        /// The given fill.
        kv_fill: KvFill,
    },
    /// A batch of exits without a wait in which it could gather.
    #[error("exit_batch is {exit_batch} with an exit_wait of 0: expected 0, or an exit_wait of at least 1")]
    BatchWithoutWait {
        /// The given batch.
        exit_batch: u32,
    },
    /// Prefix caching with a KV fill that overwrites what was computed.
    #[error(
        "prefix_caching with kv_fill {kv_fill}: a cached prefix has the entries of its last loops, a prompt needs those of \
         each; expected one of the two"
    )]
    OverwrittenPrefix {
        /// The given fill.
        kv_fill: KvFill,
    },
    /// A prompt that would run in parts, under a KV fill that overwrites the parts before.
    #[error(
        "request {request} has {prompt_tokens} prompt tokens: under kv_fill {kv_fill} a prompt starts as a whole, and \
         prefill_chunk and token_budget less max_batch - 1 allow {most}"
    )]
    PromptInParts {
        /// Id of the request.
        request: u32,
        /// Its prompt.
        prompt_tokens: u32,
        /// The given fill.
        kv_fill: KvFill,
        /// Most tokens of a prompt that can always start in one pass.
        most: u32,
    },
    /// Prefix hashes that do not cover whole blocks.
    #[error("prefix hashes are of {hashed} tokens each, expected a multiple of block_tokens, {block_tokens}")]
    PrefixBlocks {
        /// Tokens that a hash covers.
        hashed: u32,
        /// The configured block size.
        block_tokens: u32,
    },
    /// An exit policy of one request that reads what the executor does not report.
    #[error(
        "request {request} asks for exit policy {exit}, the machine runs {served}: expected none, static:DEPTH or a \
         threshold on the signal that the machine's policy reads in the same pass"
    )]
    OwnExit {
        /// Id of the request.
        request: u32,
        /// The policy that it asks for.
        exit: String,
        /// The policy of the machine.
        served: String,
    },
    /// A request without a prompt or without output.
    #[error(
        "request {request} has {prompt_tokens} prompt and {output_tokens} output tokens: expected at least 1 of each"
    )]
    EmptyRequest {
        /// Id of the request.
        request: u32,
        /// The given prompt length.
        prompt_tokens: u32,
        /// The given output length.
        output_tokens: u32,
    },
    /// A request that does not fit in the KV cache.
    #[error(
        "request {request} needs the keys and values of {tokens} tokens, but the cache holds {capacity} \
         ({num_blocks} blocks of {block_tokens})"
    )]
    LongerThanCache {
        /// Id of the request.
        request: u32,
        /// Tokens whose keys and values it needs: prompt and output, without the last token.
        tokens: u64,
        /// Capacity of the whole cache, in tokens.
        capacity: u64,
        /// The configured number of blocks.
        num_blocks: u32,
        /// The configured block size.
        block_tokens: u32,
    },
}

impl Settings {
    /// Positions per KV block by default: as in vLLM.
    pub const BLOCK_TOKENS: u32 = 16;

    /// Settings of a model with `num_loops` loops under these policies; [other values](Self#fields) than the defaults are
    /// given by struct update syntax: `Settings { max_batch: 8, ..Settings::new(batching, exit, num_loops) }`.
    ///
    /// | setting | default |
    /// | --- | --- |
    /// | `kv_fill` | [`KvFill::Reuse`] |
    /// | `max_batch` | 64 sequences |
    /// | `token_budget` | 2,048 rows |
    /// | `prefill_chunk` | `token_budget` |
    /// | `prefill_depth` | as deep as tokens can exit |
    /// | `block_tokens` | [`BLOCK_TOKENS`](Self::BLOCK_TOKENS), 16 positions |
    /// | `num_blocks` | 4,096: the KV entries of 65,536 tokens |
    /// | `prefix_caching`, `async_scheduling`, `exit_wait`, `exit_batch` | off |
    ///
    /// A new setting gets its default here, and no other caller changes.
    pub fn new(batching: Batching, exit: ExitPolicy, num_loops: u8) -> Self {
        let token_budget = 2048;
        Self {
            batching,
            exit,
            kv_fill: KvFill::Reuse,
            num_loops,
            max_batch: 64,
            token_budget,
            prefill_chunk: token_budget,
            prefill_depth: None,
            block_tokens: Self::BLOCK_TOKENS,
            num_blocks: 4096,
            prefix_caching: false,
            async_scheduling: false,
            exit_wait: 0,
            exit_batch: 0,
        }
    }

    /// What is read of rows that predict. Where exits wait for the head, it runs within the pass only for rows whose signal
    /// needs it.
    pub fn signal_reads(&self) -> SignalReads {
        let reads = self.exit.signal_reads(self.num_loops);
        match self.exit_wait > 0 && !self.exit.read_needs_head() {
            true => SignalReads { head_from: u8::MAX, ..reads },
            false => reads,
        }
    }

    /// Whether every token runs every depth and finds the entries of each, sooner or later: what is served is then the text
    /// of full depth.
    pub fn is_full_depth(&self) -> bool {
        (self.exit == ExitPolicy::None || self.exit.speculates()) && !self.overwrites() && !self.fills_prompts()
    }

    /// The last depth that the tokens of a request's prompt run, except the one that predicts.
    pub fn prompt_depth(&self, request: u32) -> u8 {
        match self.kv_fill {
            KvFill::First => 0,
            _ => self.prefill_depth.unwrap_or_else(|| self.deepest_exit(request)),
        }
    }

    /// The deepest depth whose keys and values a row of a request may read.
    fn deepest_exit(&self, request: u32) -> u8 {
        self.fixed_exit(request).filter(|_| !self.overwrites()).unwrap_or(self.num_loops - 1)
    }

    /// The one depth at which all tokens exit whose rows may read the blocks of a request.
    fn fixed_exit(&self, request: u32) -> Option<u8> {
        let is_shared = self.prefix_caching && matches!(self.exit, ExitPolicy::Mix(_));
        self.exit.known_depth(request, self.num_loops).filter(|_| !is_shared)
    }

    /// Whether tokens that exit leave keys and values at the depths that they skip, if the KV fill does. Not where all
    /// tokens of a request exit at one depth: no row reads deeper.
    pub fn fills_deeper(&self) -> bool {
        self.fixed_exit(0).is_none()
    }

    /// Depths, from 0, at which a token that exits at one of them leaves copies of its entries below.
    pub(crate) fn copied_depths(&self) -> u8 {
        if self.fills_deeper() { self.kv_fill.copied_depths(self.num_loops) } else { 0 }
    }

    /// Whether depths that exited tokens skip run later.
    fn runs_later(&self) -> bool {
        self.exit.speculates() || self.kv_fill == KvFill::Backfill && self.fills_deeper()
    }

    /// Whether the prompt of some request may run fewer depths than the model has.
    fn prompts_end_early(&self) -> bool {
        let shallowest = match self.exit {
            ExitPolicy::Mix(mix) if self.prefill_depth.is_none() => mix.shallowest(),
            _ => self.prompt_depth(0),
        };
        shallowest < self.num_loops - 1
    }

    /// Whether tokens of prompts leave copies of their entries at the depths that they do not run.
    pub fn fills_prompts(&self) -> bool {
        self.kv_fill != KvFill::First && self.prefill_depth.is_some_and(|depth| depth + 1 < self.num_loops)
    }

    /// Depths at which a token of a request's prompt leaves copies of its entries.
    fn prompt_copies(&self, request: u32) -> u32 {
        let depths = self.kv_fill.copied_depths(self.num_loops).min(self.deepest_exit(request) + 1);
        u32::from(depths.saturating_sub(self.prompt_depth(request) + 1))
    }

    /// Maximum number of loops of a model.
    pub const MOST_LOOPS: u32 = 64;
    /// Maximum number of sequences that may run at once.
    pub const MOST_SEQUENCES: u32 = 1 << 20;
    /// Maximum number of KV blocks.
    pub const MOST_BLOCKS: u32 = 1 << 26;

    /// Checks that a scheduler can run under these settings.
    ///
    /// # Errors
    /// If the settings contradict each other, or a number exceeds its limit.
    pub fn check(&self) -> Result<(), ScheduleError> {
        let counts = [
            ("num_loops", u32::from(self.num_loops)),
            ("max_batch", self.max_batch),
            ("token_budget", self.token_budget),
            ("prefill_chunk", self.prefill_chunk),
            ("block_tokens", self.block_tokens),
            ("num_blocks", self.num_blocks),
        ];
        if let Some((name, _)) = counts.into_iter().find(|&(_, count)| count == 0) {
            return Err(ScheduleError::Zero(name));
        }
        let limits = [
            ("num_loops", self.num_loops.into(), Self::MOST_LOOPS),
            ("max_batch", self.max_batch, Self::MOST_SEQUENCES),
            ("num_blocks", self.num_blocks, Self::MOST_BLOCKS),
        ];
        if let Some((name, count, most)) = limits.into_iter().find(|&(_, count, most)| count > most) {
            return Err(ScheduleError::TooMany { name, count, most });
        }
        if self.token_budget < self.max_batch {
            return Err(ScheduleError::BudgetBelowBatch { token_budget: self.token_budget, max_batch: self.max_batch });
        }
        if let Some(depth) = self.prefill_depth {
            self.check_prefill_depth(depth)?;
        }
        match self.exit {
            ExitPolicy::Static(depth) if depth >= self.num_loops => {
                Err(ScheduleError::StaticDepth { depth, num_loops: self.num_loops })
            }
            ExitPolicy::Mix(mix) if mix.deepest() >= self.num_loops => {
                Err(ScheduleError::StaticDepth { depth: mix.deepest(), num_loops: self.num_loops })
            }
            exit @ (ExitPolicy::Cumulative { min_loops, .. } | ExitPolicy::Stable { depths: min_loops })
                if min_loops > self.num_loops =>
            {
                Err(ScheduleError::MinLoops { exit: exit.to_string(), min_loops, num_loops: self.num_loops })
            }
            ExitPolicy::Speculate(speculation) if speculation.shallowest() >= self.num_loops => {
                Err(ScheduleError::StaticDepth { depth: speculation.shallowest(), num_loops: self.num_loops })
            }
            exit if exit.speculates() && !matches!(self.kv_fill, KvFill::Backfill | KvFill::First) => {
                Err(ScheduleError::SpeculatedFill { exit: exit.to_string(), kv_fill: self.kv_fill })
            }
            _ if self.prefix_caching && self.overwrites() => {
                Err(ScheduleError::OverwrittenPrefix { kv_fill: self.kv_fill })
            }
            _ if self.async_scheduling && self.exit_wait > 0 => {
                Err(ScheduleError::AsyncWait { exit_wait: self.exit_wait })
            }
            _ if self.exit_batch > 0 && self.exit_wait == 0 => {
                Err(ScheduleError::BatchWithoutWait { exit_batch: self.exit_batch })
            }
            exit if self.async_scheduling && !exit.is_known_ahead() => {
                Err(ScheduleError::AsyncExit { exit: exit.to_string() })
            }
            _ => Ok(()),
        }
    }

    fn check_prefill_depth(&self, depth: u8) -> Result<(), ScheduleError> {
        if depth >= self.num_loops {
            return Err(ScheduleError::PrefillDepth { depth, num_loops: self.num_loops });
        }
        let setting = match self.kv_fill {
            _ if depth == self.num_loops - 1 => return Ok(()),
            KvFill::Reuse if self.prefix_caching => "prefix_caching".to_owned(),
            KvFill::Reuse => return Ok(()),
            kv_fill => format!("kv_fill {kv_fill}"),
        };
        Err(ScheduleError::ShallowPrompts { depth, setting })
    }

    /// Whether rows overwrite entries of lower depths: see [`KvFill::overwrites`].
    fn overwrites(&self) -> bool {
        self.kv_fill.overwrites(self.num_loops)
    }

    /// Checks that a request can run to its end with the whole cache to itself.
    ///
    /// # Errors
    /// If the request is empty, or does not fit in the cache, or its prompt would run in parts where it must not.
    pub fn check_request(&self, request: &Request) -> Result<(), ScheduleError> {
        let &Request { id, prompt_tokens, output_tokens, .. } = request;
        if prompt_tokens == 0 || output_tokens == 0 {
            return Err(ScheduleError::EmptyRequest { request: id, prompt_tokens, output_tokens });
        }
        self.check_positions(request)?;
        // Beside the decode rows of all other sequences.
        let most = self.prefill_chunk.min(self.token_budget - (self.max_batch - 1));
        if self.overwrites() && prompt_tokens > most {
            return Err(ScheduleError::PromptInParts { request: id, prompt_tokens, kv_fill: self.kv_fill, most });
        }
        Ok(())
    }

    /// Checks that the keys and values of a request fit in the cache.
    ///
    /// # Errors
    /// If they do not.
    pub fn check_positions(&self, request: &Request) -> Result<(), ScheduleError> {
        let &Request { id, prompt_tokens, output_tokens, .. } = request;
        let tokens = u64::from(prompt_tokens) + u64::from(output_tokens) - 1;
        let capacity = u64::from(self.num_blocks) * u64::from(self.block_tokens);
        if tokens > capacity {
            return Err(ScheduleError::LongerThanCache {
                request: id,
                tokens,
                capacity,
                num_blocks: self.num_blocks,
                block_tokens: self.block_tokens,
            });
        }
        Ok(())
    }

    /// Checks that a request can have what it asks for beside its lengths.
    ///
    /// An exit policy of its own is possible where the machine's policy reads a signal in the pass that it decides. The
    /// request may then have none, a fixed depth, or another threshold on that signal.
    ///
    /// # Errors
    /// If the request asks for another exit policy.
    pub fn check_terms(&self, request: u32, terms: &Terms) -> Result<(), ScheduleError> {
        let Some(exit) = terms.exit.filter(|&exit| exit != self.exit) else { return Ok(()) };
        let read = self.exit.signal_read();
        let is_read = matches!(read, SignalRead::Signal(_) | SignalRead::Repeats) && !self.exit.is_known_ahead();
        let is_simple =
            exit.is_fixed_depth() || matches!(exit, ExitPolicy::Confidence { .. }) && exit.signal_read() == read;
        if !(is_read && is_simple) {
            let (exit, served) = (exit.to_string(), self.exit.to_string());
            return Err(ScheduleError::OwnExit { request, exit, served });
        }
        Self { exit, ..*self }.check()
    }
}

/// What a request asks for beside its lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Terms {
    /// Its own exit policy; `None` for that of the machine. See [`Settings::check_terms`].
    pub exit: Option<ExitPolicy>,
    /// Place in the queue: a request waits behind those of its priority or a higher one. Requests that run, or were
    /// preempted, keep their place.
    pub priority: i32,
}

/// A request and its progress.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    request: Request,
    terms: Terms,
    /// Tokens delivered.
    generated: u32,
    /// Tokens after those: drafts, and in lockstep batching drafts that were confirmed in this iteration.
    drafted: u32,
    /// Tokens that run as a prompt: the prompt, and the tokens generated before a preemption.
    context: u32,
    /// Tokens of the context that have started at depth 0 or were found in the prefix cache.
    started: u32,
    /// Tokens of the context whose keys and values are complete, or were found. Maintained with prefix caching only.
    filled: u32,
    /// The last depth of the prompt: [`Settings::prompt_depth`].
    prompt_depth: u8,
    /// Order of admission, from 1: larger is newer. 0 before the first.
    admission: u64,
    first_token: Nanos,
    last_token: Nanos,
    /// Whether the sequence holds its slot.
    running: bool,
    /// Whether its keys and values go to another machine or come from one: it cannot be preempted.
    pinned: bool,
    /// Depth at which its first token exited on the machine that its keys and values still have to come from.
    arriving: Option<u8>,
}

impl Sequence {
    fn new(request: Request, terms: Terms, prompt_depth: u8) -> Self {
        Self {
            request,
            terms,
            generated: 0,
            drafted: 0,
            context: request.prompt_tokens,
            started: 0,
            filled: 0,
            prompt_depth,
            admission: 0,
            first_token: Nanos::ZERO,
            last_token: Nanos::ZERO,
            running: false,
            pinned: false,
            arriving: None,
        }
    }

    /// Number of positions with keys and values once the next decode row has run.
    fn decode_positions(&self) -> u32 {
        self.request.prompt_tokens + self.generated + self.drafted
    }

    /// End of the next chunk of the context, of up to `allowance` tokens.
    fn chunk_end(&self, allowance: u32) -> u32 {
        self.context.min(self.started + allowance)
    }

    /// Whether it has held a slot before.
    fn was_preempted(&self) -> bool {
        self.admission > 0
    }

    /// Whether all its tokens are delivered. It may still hold its slot.
    fn is_finished(&self) -> bool {
        self.generated == self.request.output_tokens
    }
}

/// A token that has exited but is delivered only when its iteration ends (lockstep batching).
#[derive(Clone, Copy, Debug)]
struct Held {
    slot: Slot,
    depth: u8,
    exited: Exited,
}

/// When other requests can find a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Publishing {
    /// Without prefix caching.
    Never,
    /// When its rows have started: in lockstep batching, rows that read the block run in this iteration or later, when
    /// it is filled.
    Started,
    /// When its rows have written all their keys and values: under depth-wise batching, rows in flight are lost when
    /// their sequence is preempted.
    Filled,
}

impl Publishing {
    fn new(settings: &Settings) -> Self {
        match (settings.prefix_caching, settings.batching.is_lockstep()) {
            (false, _) => Self::Never,
            (true, true) => Self::Started,
            (true, false) => Self::Filled,
        }
    }
}

/// Composes the next pass and applies its outcome.
#[derive(Clone, Debug)]
pub struct Scheduler {
    settings: Settings,
    /// What is read of rows under the exit policy,
    reads: SignalReads,
    /// and in the pass.
    pass_reads: SignalReads,
    bound: SignalBound,
    /// From this depth on, every row that predicts exits.
    certain_from: u8,
    /// Whether prompts may run fewer depths than the model has.
    prompts_end_early: bool,
    /// What decides which rows exit, beside the bound.
    decision: Decision,
    publishing: Publishing,
    prefixes: Prefixes,
    waiting: VecDeque<Sequence>,
    /// Requests that arrived since the last plan; asynchronous scheduling sees them only after the next.
    unseen: VecDeque<Sequence>,
    /// Slots whose sequence finished since the last plan; seen as late.
    finished: Vec<Slot>,
    /// Whether the last plan had anything to run.
    busy: bool,
    /// Whether rows of the next pass were started from what was known at the start of the current one.
    unseeing: bool,
    /// By slot.
    sequences: Vec<Sequence>,
    free_slots: Vec<Slot>,
    /// Number of running sequences with an exit policy of their own.
    own_exits: u32,
    /// Signals of a pass in which such sequences run; see [`Self::decide`].
    own_signals: Vec<f32>,
    /// Requests that end when the iteration does.
    ending: Vec<u32>,
    admissions: u64,
    /// Running sequences whose prompt has not started completely, oldest first.
    prefilling: VecDeque<Slot>,
    /// Sequences whose next decode row may start, in the order in which they became ready.
    ready: Vec<Slot>,
    tables: BlockTables,
    /// Rows of the current pass, or those that continue in the next.
    segments: Vec<Segment>,
    /// Rows in flight that are not in this pass: they wait for backfill or, in lockstep batching, for rows that do.
    stalled: Vec<Segment>,
    /// Outstanding work of [`KvFill::Backfill`] or of drafts; `None` without either.
    backlog: Option<Backlog>,
    /// State of a policy that speculates.
    drafts: Option<Drafts>,
    /// Indices of the segments whose last row exits after the pass; those of rows that waited follow.
    exiting: Vec<u32>,
    /// Rows that have exited and wait for the head.
    exit_wait: ExitWait,
    held: Vec<Held>,
    admitted: Vec<Slot>,
    released: Vec<Slot>,
    /// Blocks found for the first request in the queue.
    found: Vec<BlockId>,
    /// Sequences that change machines.
    handovers: Handovers,
    /// Derives the work of the pass.
    meter: WorkMeter,
}

impl Scheduler {
    /// An idle scheduler.
    ///
    /// # Errors
    /// If the settings contradict each other.
    pub fn new(settings: Settings) -> Result<Self, ScheduleError> {
        settings.check()?;
        let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 1, output_tokens: 1 };
        let idle = Sequence::new(request, Terms::default(), 0);
        Ok(Self {
            settings,
            reads: settings.signal_reads(),
            pass_reads: settings.signal_reads(),
            bound: settings.exit.bound(),
            certain_from: *settings.exit.exit_depths(settings.num_loops).end(),
            prompts_end_early: settings.prompts_end_early(),
            decision: Decision::new(&settings),
            publishing: Publishing::new(&settings),
            prefixes: Prefixes::default(),
            waiting: VecDeque::new(),
            unseen: VecDeque::new(),
            finished: Vec::new(),
            busy: false,
            unseeing: false,
            sequences: vec![idle; settings.max_batch as usize],
            free_slots: (0..settings.max_batch).rev().collect(),
            own_exits: 0,
            own_signals: Vec::new(),
            ending: Vec::new(),
            admissions: 0,
            prefilling: VecDeque::new(),
            ready: Vec::new(),
            tables: match settings.prefix_caching {
                true => BlockTables::with_prefix_cache(settings.num_blocks, settings.block_tokens, settings.max_batch),
                false => BlockTables::new(settings.num_blocks, settings.block_tokens, settings.max_batch),
            },
            segments: Vec::new(),
            stalled: Vec::new(),
            backlog: settings.runs_later().then(|| Backlog::new(settings.num_loops, settings.max_batch)),
            drafts: Drafts::new(settings.exit),
            exiting: Vec::new(),
            exit_wait: ExitWait::new(&settings),
            held: Vec::new(),
            admitted: Vec::new(),
            released: Vec::new(),
            found: Vec::new(),
            handovers: Handovers::default(),
            meter: WorkMeter::new(&settings),
        })
    }

    /// Sets the prefix hashes, which tell which prompts have a common prefix. Without them, prefix caching finds only
    /// what a preempted request computed itself.
    ///
    /// # Errors
    /// If the hashes do not cover whole blocks.
    pub fn share_prefixes(&mut self, prefixes: Arc<PrefixHashes>) -> Result<(), ScheduleError> {
        let (hashed, block_tokens) = (prefixes.block_tokens, self.settings.block_tokens);
        if hashed == 0 || !hashed.is_multiple_of(block_tokens) {
            return Err(ScheduleError::PrefixBlocks { hashed, block_tokens });
        }
        self.prefixes.of_run = Some(prefixes);
        Ok(())
    }

    /// Sets the prefix hashes of one request before it is submitted: a hash for each whole block of its prompt. They are
    /// forgotten when the request [ends](crate::Server::end), also if it was not submitted.
    pub fn share_prefix(&mut self, request: u32, hashes: Vec<u64>) {
        self.prefixes.of_requests.insert(request, hashes);
    }

    /// The settings of the run.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Number of sequences that hold a slot.
    pub fn num_running(&self) -> u32 {
        self.settings.max_batch - self.free_slots.len() as u32
    }

    /// Number of requests that wait for a slot.
    pub fn num_waiting(&self) -> u32 {
        (self.waiting.len() + self.unseen.len()) as u32
    }

    /// Number of tokens at the beginning of a request's prompt whose keys and values the prefix cache has now.
    pub fn cached_tokens(&self, request: &Request) -> u32 {
        let mut found = Vec::new();
        self.find_prefix_of(request.id, request.prompt_tokens, &mut found);
        found.len() as u32 * self.settings.block_tokens
    }

    /// The pass that [`plan`](Self::plan) composed.
    pub fn pass(&self) -> Pass<'_> {
        let (segments, late) = (&self.segments, self.exit_wait.late());
        Pass { segments, late, reads: self.pass_reads, tables: &self.tables, work: self.meter.work() }
    }

    /// Indices of the segments whose last row exits, as decided by [`decide`](Self::decide), for [`Pass::exited`].
    pub fn exiting(&self) -> &[u32] {
        &self.exiting
    }

    /// Slots assigned since the last plan: slot, request, and the tokens that the request has generated already.
    pub fn admitted(&self) -> impl Iterator<Item = (Slot, &Request, u32)> {
        self.admitted.iter().map(|&slot| {
            let sequence = &self.sequences[slot as usize];
            (slot, &sequence.request, sequence.generated)
        })
    }

    /// Slots released in the last [`plan`](Self::plan) or [`complete`](Self::complete).
    pub fn released(&self) -> &[Slot] {
        &self.released
    }

    /// Takes the list that [`released`](Self::released) returns.
    pub(crate) fn take_released(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.released)
    }

    /// Appends a request to the queue.
    ///
    /// # Errors
    /// If the request can never run to its end.
    pub fn submit(&mut self, request: Request) -> Result<(), ScheduleError> {
        self.submit_under(request, Terms::default())
    }

    /// Adds a request to the queue, behind those of its priority.
    ///
    /// # Errors
    /// If the request can never run to its end, or cannot have what it asks for.
    pub fn submit_under(&mut self, request: Request, terms: Terms) -> Result<(), ScheduleError> {
        self.settings.check_request(&self.share_of(&request))?;
        self.settings.check_terms(request.id, &terms)?;
        self.enter(Sequence::new(request, terms, self.settings.prompt_depth(request.id)));
        Ok(())
    }

    /// A sequence comes, to be seen at once or one pass later.
    fn enter(&mut self, sequence: Sequence) {
        match self.settings.async_scheduling {
            true => self.unseen.push_back(sequence),
            false => self.enqueue(sequence),
        }
    }

    fn enqueue(&mut self, sequence: Sequence) {
        let is_ahead = |other: &Sequence| other.was_preempted() || other.terms.priority >= sequence.terms.priority;
        let place = self.waiting.iter().rposition(is_ahead).map_or(0, |last| last + 1);
        self.waiting.insert(place, sequence);
    }

    /// Ends a request before its last token, between two passes, wherever it is: in the queue, in its prompt, or in
    /// flight at any depth. Its rows leave the next pass, and its slot and blocks are free at once. Only in lockstep
    /// batching with prefix caching, where others may read blocks that it is filling, it runs to the end of the
    /// iteration. Returns `false` if no such request waits or runs, or it is on its way to another machine or from one.
    pub(crate) fn end(&mut self, request: u32) -> bool {
        let is_request = |sequence: &Sequence| sequence.request.id == request;
        let leave = |line: &mut VecDeque<Sequence>| {
            let place = line.iter().position(is_request);
            place.and_then(|place| line.remove(place)).is_some()
        };
        let waited = leave(&mut self.waiting) || leave(&mut self.unseen);
        if waited {
            self.forget(request);
            return true;
        }
        let runs = |sequence: &Sequence| {
            is_request(sequence) && sequence.running && !sequence.pinned && !sequence.is_finished()
        };
        let Some(slot) = self.sequences.iter().position(runs) else {
            self.prefixes.of_requests.remove(&request);
            return false;
        };
        match self.publishing == Publishing::Started && self.any_in_flight() {
            true => self.ending.push(request),
            false => self.end_running(slot as Slot),
        }
        true
    }

    fn end_running(&mut self, slot: Slot) {
        self.withdraw(slot);
        self.prefixes.of_requests.remove(&self.sequences[slot as usize].request.id);
        self.held.retain(|held| held.slot != slot);
        self.stalled.retain(|segment| segment.slot != slot);
        if self.settings.async_scheduling {
            // The pass is composed already. The executor has not heard of a slot that was assigned in it.
            self.read_in_pass();
            self.meter.restart(&self.segments, self.pass_reads);
            self.meter.fill_prompts(self.copies_of_prompts());
            if self.admitted.contains(&slot) {
                self.admitted.retain(|&other| other != slot);
                self.released.retain(|&other| other != slot);
            }
        }
    }

    /// Forgets what is kept of a request that waits.
    fn forget(&mut self, request: u32) {
        self.prefixes.of_requests.remove(&request);
        self.decision.forget(request);
        if let Some(reach) = self.meter.reach_mut() {
            reach.forget(request);
        }
    }

    /// Composes the next pass; returns `false` if there is nothing to run.
    ///
    /// Rows in flight come first, then decode rows, then prompts: work nearest its end goes on. Backfill that no row in
    /// flight waits for comes last.
    pub fn plan(&mut self, now: Nanos, observer: &mut impl Observer) -> bool {
        match self.settings.async_scheduling {
            true => self.compose(|scheduler| scheduler.start_rows_unseeing(now, observer)),
            false => self.compose(|scheduler| scheduler.start_rows(now, observer)),
        }
    }

    /// Under asynchronous scheduling, composes the next pass while the current one runs. The outcome of the current
    /// pass must [have been applied](Self::complete). Returns `false` if nothing is known to run. When the current pass
    /// ends, [`see_what_came`](Self::see_what_came) must follow, or [`plan`](Self::plan) if there was nothing to run.
    /// Both steps together are what [`plan`](Self::plan) does when a pass starts.
    pub fn plan_ahead(&mut self, now: Nanos, observer: &mut impl Observer) -> bool {
        self.unseeing = false;
        self.compose(|scheduler| {
            scheduler.unseeing = true;
            scheduler.start_rows(now, observer);
        })
    }

    /// Sees the requests and finished sequences that [`plan_ahead`](Self::plan_ahead) could not see.
    pub fn see_what_came(&mut self) {
        if std::mem::take(&mut self.unseeing) {
            self.see();
        }
    }

    fn compose(&mut self, start_rows: impl FnOnce(&mut Self)) -> bool {
        self.admitted.clear();
        self.released.clear();
        self.forget_reserved();
        self.exit_wait.forget_late();
        let mid_iteration = self.settings.batching.is_lockstep() && self.any_in_flight();
        self.join_awaited_backfill();
        if !mid_iteration {
            start_rows(self);
        }
        self.fill_idle_places();
        self.busy = !self.segments.is_empty();
        if self.busy {
            self.read_in_pass();
            self.meter.start(&self.segments, self.pass_reads);
            self.meter.fill_prompts(self.copies_of_prompts());
        }
        self.busy
    }

    /// Sets what is read in the composed pass. Exits that wait have the head to themselves.
    fn read_in_pass(&mut self) {
        self.pass_reads = if self.settings.exit_wait > 0 { self.reads } else { self.reads.of_pass(&self.segments) };
    }

    /// Copies that prompts leave at deeper depths when this pass is their last.
    fn copies_of_prompts(&self) -> u32 {
        if !self.settings.fills_prompts() {
            return 0;
        }
        let ends = |segment: &&Segment| {
            let sequence = &self.sequences[segment.slot as usize];
            segment.kind == RowKind::Prompt && segment.depth == sequence.prompt_depth
        };
        let copies = |segment: &Segment| {
            let request = self.sequences[segment.slot as usize].request.id;
            (segment.tokens - self.rows_that_go_on(segment)) * self.settings.prompt_copies(request)
        };
        self.segments.iter().filter(ends).map(copies).sum()
    }

    /// Rows at the end of a chunk at the last depth of prompts that go on to deeper ones.
    fn rows_that_go_on(&self, segment: &Segment) -> u32 {
        let Sequence { request, context, .. } = &self.sequences[segment.slot as usize];
        let is_run_again = *context > request.prompt_tokens;
        if is_run_again && self.settings.fills_prompts() {
            // The last token of the prompt and the generated ones ran up to where they exited.
            (segment.start + segment.tokens).saturating_sub(request.prompt_tokens - 1).min(segment.tokens)
        } else {
            u32::from(segment.predicts)
        }
    }

    /// Starts rows as if this were the start of the pass that has just ended. If there is nothing to run, the scheduler
    /// has waited for the end of the pass, and sees what arrived meanwhile.
    fn start_rows_unseeing(&mut self, now: Nanos, observer: &mut impl Observer) {
        if self.busy {
            self.start_rows(now, observer);
        }
        self.see();
        if self.segments.is_empty() {
            self.start_rows(now, observer);
        }
    }

    /// Sees what has arrived or finished since the last plan.
    fn see(&mut self) {
        while let Some(sequence) = self.unseen.pop_front() {
            self.enqueue(sequence);
        }
        self.see_received();
        while let Some(slot) = self.finished.pop() {
            self.release(slot);
        }
    }

    fn start_rows(&mut self, now: Nanos, observer: &mut impl Observer) {
        for request in std::mem::take(&mut self.ending) {
            self.end(request);
        }
        if !self.held.is_empty() {
            // The last rows in flight of the iteration were those of requests that ended.
            self.deliver_held(now, observer);
        }
        let form_batch = self.settings.batching != Batching::Vanilla || self.num_running() == 0;
        let mut budget = self.free_budget();
        let mut preempted = self.start_decodes(&mut budget, now, observer);
        let mut allowance = budget.min(self.settings.prefill_chunk);
        while let Some(&slot) = self.prefilling.front().filter(|&&slot| self.can_start_chunk(slot, allowance)) {
            preempted |= self.make_room(slot, self.sequences[slot as usize].chunk_end(allowance), now, observer);
            if self.sequences[slot as usize].running {
                allowance -= self.start_chunk(slot, allowance);
            }
        }
        if !self.prefilling.is_empty() {
            // Prompts start in the order of their admission.
            allowance = 0;
        }
        let whole_batch = self.settings.batching == Batching::Vanilla;
        while form_batch && !preempted && (allowance > 0 || whole_batch || self.next_arrives()) {
            let Some(slot) = self.admit_next(now, observer) else { break };
            match self.can_start_chunk(slot, allowance) {
                _ if self.sequences[slot as usize].arriving.is_some() => {}
                true => allowance -= self.start_chunk(slot, allowance),
                false => allowance = 0,
            }
        }
        if self.segments.is_empty() && self.exit_wait.any() {
            // Without a pass, waiting rows would never meet the head.
            while self.exit_wait.any() {
                self.preempt_newest(now, observer);
            }
            self.start_rows(now, observer);
        }
    }

    fn any_in_flight(&self) -> bool {
        !(self.segments.is_empty() && self.stalled.is_empty())
    }

    /// Adds the backfill that rows in flight wait for: a row may attend to entries that other rows of its depth write
    /// in the same pass. Where the budget is too short, the row stalls and gives its place to backfill as well. Every
    /// pass then makes progress, and rows in flight never exceed the budget.
    fn join_awaited_backfill(&mut self) {
        let Some(backlog) = &mut self.backlog else { return };
        let mut in_flight = std::mem::take(&mut self.stalled);
        in_flight.append(&mut self.segments);
        if self.settings.batching.is_lockstep() {
            let shallowest = in_flight.iter().map(|segment| segment.depth).min();
            self.stalled.extend(in_flight.extract_if(.., |segment| Some(segment.depth) > shallowest));
        }
        let rows: u32 = in_flight.iter().map(|segment| segment.tokens).sum();
        let mut room = self.settings.token_budget - rows;
        for segment in in_flight {
            let Segment { slot, start, depth, .. } = segment;
            let awaited = backlog.undone(slot, depth, start).len() as u32;
            let stalls = awaited > room;
            self.segments.extend(backlog.take(slot, depth, start, room + u32::from(stalls)));
            room -= awaited.min(room);
            if stalls { &mut self.stalled } else { &mut self.segments }.push(segment);
        }
    }

    /// Fills unused places of the batch with backfill that no row waits for yet: of the oldest sequence first, and of
    /// its shallowest depth first, which is needed soonest.
    fn fill_idle_places(&mut self) {
        let (Some(backlog), Some(first)) = (&mut self.backlog, self.segments.first()) else { return };
        let rows = |prompt: bool| -> u32 {
            let of_kind = self.segments.iter().filter(|row| (row.kind == RowKind::Prompt) == prompt);
            of_kind.map(|row| row.tokens).sum()
        };
        let (taken, prompt_rows) = (rows(false), rows(true));
        let budget = self.settings.token_budget - taken - prompt_rows;
        let mut places = self.settings.max_batch.saturating_sub(taken).min(budget);
        if places == 0 {
            return;
        }
        let depths = match self.settings.batching.is_lockstep() {
            true => first.depth.max(1)..first.depth + 1,
            false => 1..self.settings.num_loops,
        };
        let is_behind = |&(slot, sequence): &(Slot, &Sequence)| {
            sequence.running && !sequence.is_finished() && backlog.complete(slot) < sequence.decode_positions() - 1
        };
        let mut behind: Vec<(Slot, &Sequence)> = (0..).zip(&self.sequences).filter(is_behind).collect();
        behind.sort_unstable_by_key(|(_, sequence)| sequence.admission);
        for (slot, sequence) in behind {
            for depth in depths.clone() {
                let backfill = backlog.take(slot, depth, sequence.decode_positions() - 1, places);
                places -= backfill.map_or(0, |segment| segment.tokens);
                self.segments.extend(backfill);
            }
        }
    }

    fn free_budget(&self) -> u32 {
        self.settings.token_budget - self.pass().num_rows()
    }

    /// Starts the next token of every ready sequence, as far as the budget allows, and subtracts the rows from the
    /// budget. Returns whether any sequence was preempted for it.
    fn start_decodes(&mut self, budget: &mut u32, now: Nanos, observer: &mut impl Observer) -> bool {
        let mut preempted = false;
        let mut ready = std::mem::take(&mut self.ready);
        let behind_prompts = self.behind_prompts(&mut ready);
        self.plan_drafts(&ready);
        loop {
            let affordable = ready.len().min(*budget as usize);
            let started = self.start_decodes_with_room(&ready[..affordable]);
            ready.drain(..started);
            *budget -= started as u32;
            if started == affordable {
                break;
            }
            let positions = self.sequences[ready[0] as usize].decode_positions();
            self.make_room(ready[0], positions, now, observer);
            preempted = true;
            ready.retain(|&slot| self.sequences[slot as usize].running);
            *budget = self.free_budget();
        }
        self.ready = ready;
        self.ready.extend(behind_prompts);
        preempted
    }

    /// Takes out the sequences whose next token must wait until their prompts, which are in flight, have overwritten what
    /// they write.
    fn behind_prompts(&self, ready: &mut Vec<Slot>) -> Vec<Slot> {
        if !self.settings.overwrites() || ready.is_empty() {
            return Vec::new();
        }
        let prompts = self.segments.iter().filter(|segment| segment.kind == RowKind::Prompt);
        let prompts: Vec<Slot> = prompts.map(|segment| segment.slot).collect();
        ready.extract_if(.., |slot| prompts.contains(slot)).collect()
    }

    /// Starts the next token of sequences until one finds no free block; returns how many were started.
    fn start_decodes_with_room(&mut self, ready: &[Slot]) -> usize {
        let speculates = self.drafts.is_some();
        for (started, &slot) in ready.iter().enumerate() {
            let positions = self.sequences[slot as usize].decode_positions();
            if !self.tables.grow(slot, positions) {
                return started;
            }
            let kind = if speculates { self.kind_of_next_row(slot) } else { RowKind::Decode };
            let (start, predicts, generated) = (positions - 1, true, true);
            self.segments.push(Segment { slot, start, tokens: 1, depth: 0, kind, predicts, generated });
            if self.publishing == Publishing::Started {
                self.publish_decode(slot, positions);
            }
        }
        ready.len()
    }

    /// Extends the slot's blocks to `positions`. If no block is free, preempts the newest sequences, in the end the
    /// slot's own. Returns whether any sequence was preempted.
    fn make_room(&mut self, slot: Slot, positions: u32, now: Nanos, observer: &mut impl Observer) -> bool {
        let mut preempted = false;
        while self.sequences[slot as usize].running && !self.tables.grow(slot, positions) {
            self.preempt_newest(now, observer);
            preempted = true;
        }
        preempted
    }

    /// Whether some of a prompt may start within an `allowance` of rows; all of it, where entries are overwritten.
    fn can_start_chunk(&self, slot: Slot, allowance: u32) -> bool {
        let sequence = &self.sequences[slot as usize];
        allowance > 0 && (!self.settings.overwrites() || sequence.chunk_end(allowance) == sequence.context)
    }

    /// Starts up to `allowance` tokens of a prompt, as far as blocks are available, and returns how many.
    fn start_chunk(&mut self, slot: Slot, allowance: u32) -> u32 {
        let sequence = &mut self.sequences[slot as usize];
        let (start, end) = (sequence.started, sequence.chunk_end(allowance));
        sequence.started = end;
        let (predicts, generated) = (end == sequence.context, end > sequence.request.prompt_tokens);
        let room = self.tables.grow(slot, end);
        debug_assert!(room, "an admitted prompt fits");
        if predicts {
            self.prefilling.retain(|&other| other != slot);
        }
        let (tokens, kind) = (end - start, RowKind::Prompt);
        self.segments.push(Segment { slot, start, tokens, depth: 0, kind, predicts, generated });
        if self.publishing == Publishing::Started {
            self.publish(slot, end);
        }
        end - start
    }

    /// Assigns a slot to the first request in the queue, if a slot and the blocks of its whole prompt are free.
    ///
    /// The request takes the blocks chunk by chunk, so running sequences may still take them first. Under vanilla
    /// batching all chunks run before any decode row, so the request takes all blocks at once.
    fn admit_next(&mut self, now: Nanos, observer: &mut impl Observer) -> Option<Slot> {
        let slot = *self.free_slots.last()?;
        let &Sequence { request, context, arriving, .. } = self.waiting.front()?;
        self.find_prefix(request.id, context);
        // A sequence that lost its blocks could not compute again what its depths have overwritten.
        let reserved = if self.settings.overwrites() { self.share_of(&request).context_tokens() } else { context };
        if !self.tables.fits(reserved, &self.found) {
            return None;
        }
        let mut sequence = self.waiting.pop_front()?;
        self.free_slots.pop();
        self.tables.adopt(slot, &self.found);
        if self.settings.batching == Batching::Vanilla || self.settings.overwrites() || arriving.is_some() {
            let room = self.tables.grow(slot, reserved);
            debug_assert!(room, "what fits can be held");
        }
        sequence.started = self.found.len() as u32 * self.settings.block_tokens;
        sequence.filled = sequence.started;
        if arriving.is_none() && self.settings.prefix_caching {
            observer.looked_up(now, &request, PrefixUse { looked_up: context, found: sequence.started });
        }
        self.admissions += 1;
        sequence.admission = self.admissions;
        sequence.running = true;
        self.own_exits += u32::from(sequence.terms.exit.is_some());
        observer.admitted(now, &sequence.request);
        if let Some(backlog) = &mut self.backlog {
            backlog.admit(slot, context);
        }
        self.decision.admit(slot, request.id);
        if let Some(reach) = self.meter.reach_mut() {
            reach.admit(slot, request.id, request.prompt_tokens);
        }
        self.sequences[slot as usize] = sequence;
        match arriving {
            Some(_) => self.reserve(slot),
            None => self.prefilling.push_back(slot),
        }
        self.admitted.push(slot);
        Some(slot)
    }

    /// Finds blocks with the beginning of a context.
    fn find_prefix(&mut self, request: u32, context: u32) {
        let mut found = std::mem::take(&mut self.found);
        self.find_prefix_of(request, context, &mut found);
        self.found = found;
    }

    /// Finds blocks with the beginning of a context. The last token must run in any case, since it predicts.
    fn find_prefix_of(&self, request: u32, context: u32, found: &mut Vec<BlockId>) {
        let block_tokens = self.settings.block_tokens;
        let whole = 0..context.saturating_sub(1) / block_tokens;
        self.tables.find(whole.map(|block| self.prefixes.contents(request, block, block_tokens)), found);
    }

    /// Makes the slot's blocks within its first `positions` available to other requests.
    fn publish(&mut self, slot: Slot, positions: u32) {
        let (prefixes, block_tokens) = (&self.prefixes, self.settings.block_tokens);
        let request = self.sequences[slot as usize].request.id;
        self.tables.publish(slot, positions, |block| prefixes.contents(request, block, block_tokens));
    }

    /// Makes the slot's blocks before a starting decode row available to other requests.
    fn publish_decode(&mut self, slot: Slot, positions: u32) {
        // The contents of a token that is not sampled yet cannot be hashed.
        let hashed = positions - u32::from(self.settings.async_scheduling);
        let filled = self.backlog.as_ref().map_or(hashed, |backlog| backlog.complete(slot));
        self.publish(slot, hashed.min(filled));
    }

    /// Makes the blocks of prompt rows with complete keys and values available to other requests.
    fn publish_filled(&mut self) {
        for index in 0..self.segments.len() {
            let Segment { slot, start, tokens, depth, kind, .. } = self.segments[index];
            if depth == self.sequences[slot as usize].prompt_depth && kind == RowKind::Prompt {
                self.sequences[slot as usize].filled = start + tokens;
                self.publish(slot, self.filled_positions(slot));
            }
        }
    }

    /// Number of positions with complete keys and values.
    fn filled_positions(&self, slot: Slot) -> u32 {
        let sequence = &self.sequences[slot as usize];
        match &self.backlog {
            _ if sequence.filled < sequence.context => sequence.filled,
            Some(backlog) => backlog.complete(slot),
            None => sequence.decode_positions() - 1,
        }
    }

    /// Takes slot and blocks from the sequence admitted last. It becomes first in the queue and computes its keys and
    /// values again, unless it is finished and only waits for its release.
    fn preempt_newest(&mut self, now: Nanos, observer: &mut impl Observer) {
        let running = self.sequences.iter().zip(0..).filter(|(sequence, _)| sequence.running && !sequence.pinned);
        let (_, slot) =
            running.max_by_key(|(sequence, _)| sequence.admission).expect("a sequence that wants a block runs");
        let mut sequence = self.sequences[slot as usize];
        if sequence.is_finished() {
            self.release(slot);
            self.finished.retain(|&other| other != slot);
            return;
        }
        debug_assert!(self.stalled.is_empty(), "a row stalls where the budget is spent, and then nothing starts");
        self.withdraw(slot);
        sequence.running = false;
        sequence.started = 0;
        sequence.drafted = 0;
        sequence.context = sequence.decode_positions();
        self.decision.preempt(slot, sequence.request.id);
        if let Some(reach) = self.meter.reach_mut() {
            reach.preempt(slot, sequence.request.id);
        }
        observer.preempted(now, &sequence.request);
        self.waiting.push_front(sequence);
    }

    /// Takes slot and blocks from a sequence that has not finished, and its rows out of the next pass.
    fn withdraw(&mut self, slot: Slot) {
        self.release(slot);
        self.segments.retain(|segment| segment.slot != slot);
        self.exit_wait.withdraw(slot);
        self.prefilling.retain(|&other| other != slot);
        self.ready.retain(|&other| other != slot);
    }

    fn release(&mut self, slot: Slot) {
        let sequence = &mut self.sequences[slot as usize];
        sequence.running = false;
        self.own_exits -= u32::from(sequence.terms.exit.is_some());
        self.tables.release(slot);
        self.free_slots.push(slot);
        self.released.push(slot);
    }

    /// Decides from the signals of the pass which rows exit.
    ///
    /// Where a request has an exit policy of its own, that decides, and a signal without bound in place of the row's says
    /// so to the policy of the machine.
    pub fn decide(&mut self, signals: &[f32]) {
        if self.own_exits == 0 {
            return self.decide_by(signals);
        }
        let mut own_signals = std::mem::take(&mut self.own_signals);
        own_signals.clear();
        let decided = |(segment, &signal): (&Segment, &f32)| {
            let Sequence { request, terms, .. } = &self.sequences[segment.slot as usize];
            let exits = |exit: ExitPolicy| match exit.known_depth(request.id, self.settings.num_loops) {
                Some(depth) => segment.depth >= depth,
                None => exit.bound().is_reached(signal),
            };
            let own = terms.exit.filter(|_| segment.predicts);
            own.map_or(signal, |exit| self.reads.signal.certain(exits(exit)))
        };
        own_signals.extend(self.segments.iter().zip(signals).map(decided));
        self.decide_by(&own_signals);
        self.own_signals = own_signals;
    }

    fn decide_by(&mut self, signals: &[f32]) {
        let (running, waiting) = (self.num_running(), self.num_waiting());
        let Self { segments, exiting, sequences, certain_from, .. } = self;
        let values = signals.iter().copied();
        match &mut self.decision {
            Decision::Fixed => select(exiting, segments, values, self.bound, *certain_from),
            Decision::ByLoad(load) => {
                self.bound = load.bound(running + waiting);
                select(exiting, segments, values, self.bound, *certain_from);
            }
            Decision::Cumulative(gates) => {
                let exited = segments.iter().zip(values).map(|(segment, gate)| gates.exited(segment, gate));
                select(exiting, segments, exited, self.bound, *certain_from);
            }
            Decision::Delayed(delayed) => {
                let before = segments.iter().map(|segment| delayed.before(segment));
                select(exiting, segments, before, self.bound, *certain_from);
                delayed.keep(segments, signals);
            }
            Decision::EntropyChange(change) => {
                let changes = segments.iter().zip(values).map(|(segment, entropy)| change.of(segment, entropy));
                select(exiting, segments, changes, self.bound, *certain_from);
            }
            Decision::Stable(stable) => {
                let depths = segments.iter().zip(values).map(|(segment, repeats)| stable.depths(segment, repeats));
                select(exiting, segments, depths, self.bound, *certain_from);
            }
            Decision::Mixed(mixed) => {
                let exits = segments.iter().map(|segment| mixed.exits(segment));
                select(exiting, segments, exits, self.bound, *certain_from);
            }
            Decision::Drafted(speculation) => {
                let values = segments.iter().zip(values).map(|(row, signal)| speculation.draft_value(row, signal));
                select(exiting, segments, values, self.bound, *certain_from);
            }
            Decision::Custom(custom) => {
                let token = |slot: Slot| sequences[slot as usize].generated;
                custom.decide((segments, signals), *certain_from, token, MachineLoad { running, waiting }, exiting);
            }
        }
        if self.settings.exit_wait > 0 {
            let Self { segments, exiting, stalled, sequences, .. } = self;
            let ends = |segment: &Segment| segment.depth >= sequences[segment.slot as usize].prompt_depth;
            self.exit_wait.decide(segments, exiting, !stalled.is_empty(), self.reads, ends);
        }
        self.read_verdicts(signals);
        self.meter_exits();
    }

    fn meter_exits(&mut self) {
        let (segments, late) = (&self.segments, self.exit_wait.late());
        self.meter.exit(self.exiting.iter().map(|&index| exited(segments, late, index as usize)), self.pass_reads);
    }

    /// Decides which rows of the pass exit before it runs, under a policy whose
    /// [exits are known ahead](ExitPolicy::is_known_ahead). What the pass before has read must
    /// [have been kept](Self::keep_signals).
    pub(crate) fn decide_ahead(&mut self) {
        let Self { segments, exiting, bound, certain_from, .. } = self;
        match &self.decision {
            Decision::Delayed(delayed) => {
                let before = segments.iter().map(|segment| delayed.before(segment));
                select(exiting, segments, before, *bound, *certain_from);
            }
            Decision::Mixed(mixed) => {
                let exits = segments.iter().map(|segment| mixed.exits(segment));
                select(exiting, segments, exits, *bound, *certain_from);
            }
            _ => select(exiting, segments, std::iter::repeat(f32::NAN), *bound, *certain_from),
        }
        self.meter_exits();
    }

    /// Keeps what a pass of these segments has read, for the exits of the next pass.
    pub(crate) fn keep_signals(&mut self, segments: &[Segment], signals: &[f32]) {
        if let Decision::Delayed(delayed) = &mut self.decision {
            delayed.keep(segments, signals);
        }
    }

    /// Applies the outcome of the pass at its end: delivers tokens and moves the other rows one depth deeper.
    pub fn complete(&mut self, now: Nanos, observer: &mut impl Observer) {
        self.released.clear();
        if let Some(backlog) = &mut self.backlog {
            backlog.ran(&self.segments);
        }
        if self.publishing == Publishing::Filled {
            self.publish_filled();
        }
        self.settle_drafts(now, observer);
        for index in 0..self.exiting.len() {
            let segment = exited(&self.segments, self.exit_wait.late(), self.exiting[index] as usize);
            let is_draft = self.drafts.is_some() && segment.depth + 1 < self.settings.num_loops;
            let exited = if is_draft { Exited::Draft } else { Exited::Token };
            let held = Held { slot: segment.slot, depth: segment.depth, exited };
            if let Some(segment) = self.segments.get_mut(self.exiting[index] as usize) {
                segment.predicts = false;
            }
            self.exit(held, now, observer);
        }
        self.exit_wait.stop(&mut self.segments);
        self.drop_contradicted();
        self.deepen_segments();
        if self.settings.batching.is_lockstep() && !self.any_in_flight() {
            self.deliver_held(now, observer);
        }
        self.complete_handovers();
    }

    /// Drops rows that have exited or run their last depth, and moves the rest one depth deeper. It is free of
    /// branches, like [`decide`](Self::decide).
    fn deepen_segments(&mut self) {
        if self.prompts_end_early {
            self.end_prompts();
        }
        let deepest = self.settings.num_loops - 1;
        let mut kept = 0;
        for index in 0..self.segments.len() {
            let segment = &self.segments[index];
            let stays = (segment.depth < deepest) & (segment.predicts | (segment.kind == RowKind::Prompt));
            self.segments[kept] = self.segments[index];
            kept += usize::from(stays);
        }
        self.segments.truncate(kept);
        self.segments.iter_mut().for_each(|segment| segment.depth += 1);
        if !(self.released.is_empty() && self.finished.is_empty()) {
            let sequences = &self.sequences;
            self.segments.retain(|segment| {
                let sequence = &sequences[segment.slot as usize];
                sequence.running && !sequence.is_finished()
            });
        }
    }

    /// Drops the rows of prompts that have run their last depth.
    fn end_prompts(&mut self) {
        let mut segments = std::mem::take(&mut self.segments);
        segments.retain_mut(|segment| {
            let prompt_depth = self.sequences[segment.slot as usize].prompt_depth;
            if segment.kind != RowKind::Prompt || segment.depth < prompt_depth {
                return true;
            }
            let tokens = self.rows_that_go_on(segment);
            segment.start += segment.tokens - tokens;
            segment.tokens = tokens;
            tokens > 0
        });
        self.segments = segments;
    }

    /// Ends an iteration: delivers its tokens, oldest sequence first.
    fn deliver_held(&mut self, now: Nanos, observer: &mut impl Observer) {
        let mut held = std::mem::take(&mut self.held);
        held.sort_by_key(|held| self.sequences[held.slot as usize].admission);
        for token in held.drain(..) {
            self.deliver(token, now, observer);
        }
        self.held = held;
    }

    /// A token has exited: it is delivered, at once or at the end of the iteration.
    #[inline(always)]
    fn exit(&mut self, held: Held, now: Nanos, observer: &mut impl Observer) {
        match self.settings.batching.is_lockstep() {
            true => self.held.push(held),
            false => self.deliver(held, now, observer),
        }
    }

    #[inline(always)]
    fn deliver(&mut self, Held { slot, depth, exited }: Held, now: Nanos, observer: &mut impl Observer) {
        if exited == Exited::Draft {
            return self.keep_draft(slot);
        }
        let sequence = &self.sequences[slot as usize];
        if self.leaves(&sequence.request) {
            return self.hold_for_handover(slot, depth);
        }
        let sequence = &mut self.sequences[slot as usize];
        let index = sequence.generated;
        let previous = (index > 0).then_some(sequence.last_token);
        if index == 0 {
            sequence.first_token = now;
        }
        sequence.generated += 1;
        sequence.drafted -= u32::from(exited == Exited::Confirmed);
        sequence.last_token = now;
        let finished = sequence.is_finished();
        observer.token(now, &sequence.request, Token { index, depth, previous });
        if self.publishing == Publishing::Filled {
            self.publish(slot, self.filled_positions(slot));
        }
        match finished {
            true => self.finish(slot, now, observer),
            false if exited == Exited::Confirmed => {}
            false => self.ready.push(slot),
        }
    }

    #[inline(never)]
    fn finish(&mut self, slot: Slot, now: Nanos, observer: &mut impl Observer) {
        let sequence = &self.sequences[slot as usize];
        observer.finished(now, &sequence.request, sequence.first_token);
        self.prefixes.of_requests.remove(&sequence.request.id);
        match self.settings.async_scheduling {
            true => self.finished.push(slot),
            false => self.release(slot),
        }
    }
}

/// Selects the segments whose last row exits: those that predict, and whose value reaches the bound or whose depth is at
/// least `certain_from`.
///
/// Which do is as good as random, so the loop writes every index and keeps those that exit by counting on: a branch would
/// be mispredicted for most rows.
#[inline]
fn select(
    exiting: &mut Vec<u32>,
    segments: &[Segment],
    values: impl Iterator<Item = f32>,
    bound: SignalBound,
    certain_from: u8,
) {
    exiting.resize(segments.len(), 0);
    let mut selected = 0;
    for (index, (segment, value)) in segments.iter().zip(values).enumerate() {
        exiting[selected] = index as u32;
        selected += usize::from(segment.predicts & ((segment.depth >= certain_from) | bound.is_reached(value)));
    }
    exiting.truncate(selected);
}
