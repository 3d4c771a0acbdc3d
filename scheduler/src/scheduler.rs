//! The scheduler: decides which rows share the next pass, and what becomes of them after it.
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
use crate::blocks::{BlockId, BlockTables, Contents};
use crate::observe::{Observer, Token};
use crate::pass::{Pass, RowKind, Segment, Slot};
use crate::policy::{Batching, ExitPolicy, KvFill, SignalRead, SignalReads};
use crate::work::WorkMeter;

/// How a run is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Which rows may share a pass.
    pub batching: Batching,
    /// When rows leave early.
    pub exit: ExitPolicy,
    /// What later tokens find at depths that a token which left early never ran.
    #[serde(default)]
    pub kv_fill: KvFill,
    /// Loops of the model.
    pub num_loops: u8,
    /// Most sequences that run at once.
    pub max_batch: u32,
    /// Most rows of a pass; in lockstep batching, of an iteration.
    pub token_budget: u32,
    /// Most prompt tokens that start at depth 0 in one pass; in lockstep batching, in one iteration.
    /// A chunk occupies its rows at every depth, so under depth-wise batching `token_budget / num_loops`
    /// keeps a steady stream of prompts within the budget.
    pub prefill_chunk: u32,
    /// Positions per KV block.
    pub block_tokens: u32,
    /// KV blocks that the device holds.
    pub num_blocks: u32,
    /// Whether freed blocks keep their contents, to be found again by a prompt that begins alike or by a request
    /// that was preempted.
    #[serde(default)]
    pub prefix_caching: bool,
    /// Whether the next pass is composed when this one starts rather than when it ends, so that the device never
    /// waits for the scheduler: requests that arrive meanwhile, and what finished ones hold, come a pass later.
    #[serde(default)]
    pub async_scheduling: bool,
}

/// Settings or a request that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A setting that must be at least 1 is 0.
    #[error("{0} is 0: expected at least 1")]
    Zero(&'static str),
    /// A setting beyond what any machine holds, for which nobody should ask memory.
    #[error("{name} is {count}: expected at most {most}")]
    TooMany {
        /// The setting.
        name: &'static str,
        /// As given.
        count: u32,
        /// The limit.
        most: u32,
    },
    /// Decode rows alone could exceed the budget.
    #[error("token_budget is {token_budget}, less than max_batch {max_batch}: every sequence needs a row")]
    BudgetBelowBatch {
        /// As given.
        token_budget: u32,
        /// As given.
        max_batch: u32,
    },
    /// A static exit below the model's last loop.
    #[error("static exit depth {depth} is outside the model's depths 0 to {}", num_loops - 1)]
    StaticDepth {
        /// As given.
        depth: u8,
        /// Loops of the model.
        num_loops: u8,
    },
    /// Scheduling ahead of exits that are not known.
    #[error("async_scheduling with exit policy {exit}: what the next pass runs depends on the signals of this one")]
    AsyncExit {
        /// As given.
        exit: String,
    },
    /// Prefix hashes that say nothing about whole blocks.
    #[error("prefix hashes are of {hashed} tokens each, expected a multiple of block_tokens, {block_tokens}")]
    PrefixBlocks {
        /// Tokens of a hash.
        hashed: u32,
        /// As set.
        block_tokens: u32,
    },
    /// A request without a prompt or without output.
    #[error(
        "request {request} has {prompt_tokens} prompt and {output_tokens} output tokens: expected at least 1 of each"
    )]
    EmptyRequest {
        /// Its id.
        request: u32,
        /// As given.
        prompt_tokens: u32,
        /// As given.
        output_tokens: u32,
    },
    /// A request that could never run to its end.
    #[error(
        "request {request} needs the keys and values of {tokens} tokens, but the cache holds {capacity} \
         ({num_blocks} blocks of {block_tokens})"
    )]
    LongerThanCache {
        /// Its id.
        request: u32,
        /// Prompt and output, less the last token.
        tokens: u64,
        /// Of the whole cache, in tokens.
        capacity: u64,
        /// As set.
        num_blocks: u32,
        /// As set.
        block_tokens: u32,
    },
}

impl Settings {
    /// The most sequences that may run at once.
    pub const MOST_SEQUENCES: u32 = 1 << 20;
    /// The most KV blocks.
    pub const MOST_BLOCKS: u32 = 1 << 26;

    /// Whether a scheduler can run under these settings.
    ///
    /// # Errors
    /// If they contradict each other, or a number is beyond what any machine holds.
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
        let limits =
            [("max_batch", self.max_batch, Self::MOST_SEQUENCES), ("num_blocks", self.num_blocks, Self::MOST_BLOCKS)];
        if let Some((name, count, most)) = limits.into_iter().find(|&(_, count, most)| count > most) {
            return Err(ScheduleError::TooMany { name, count, most });
        }
        if self.token_budget < self.max_batch {
            return Err(ScheduleError::BudgetBelowBatch { token_budget: self.token_budget, max_batch: self.max_batch });
        }
        match self.exit {
            ExitPolicy::Static(depth) if depth >= self.num_loops => {
                Err(ScheduleError::StaticDepth { depth, num_loops: self.num_loops })
            }
            exit if self.async_scheduling && exit.signal_read() != SignalRead::None => {
                Err(ScheduleError::AsyncExit { exit: exit.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// Whether a request can run to its end with the whole cache to itself.
    ///
    /// # Errors
    /// If it is empty, or longer than the cache.
    pub fn check_request(&self, request: &Request) -> Result<(), ScheduleError> {
        let &Request { id, prompt_tokens, output_tokens, .. } = request;
        if prompt_tokens == 0 || output_tokens == 0 {
            return Err(ScheduleError::EmptyRequest { request: id, prompt_tokens, output_tokens });
        }
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
}

/// A request on its way through the machine.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    request: Request,
    /// Tokens delivered.
    generated: u32,
    /// Tokens that run as prompt: the prompt, and what was generated before a preemption.
    context: u32,
    /// Of those, how many have started at depth 0, or were found.
    started: u32,
    /// Of those, how many have left their keys and values, or were found; kept up with prefix caching only.
    filled: u32,
    /// Orders the running sequences by age.
    admission: u64,
    first_token: Nanos,
    last_token: Nanos,
    /// Whether it holds its slot.
    running: bool,
}

impl Sequence {
    fn new(request: Request) -> Self {
        Self {
            request,
            generated: 0,
            context: request.prompt_tokens,
            started: 0,
            filled: 0,
            admission: 0,
            first_token: Nanos::ZERO,
            last_token: Nanos::ZERO,
            running: false,
        }
    }

    /// Positions that hold keys and values once the next decode row has run.
    fn decode_positions(&self) -> u32 {
        self.request.prompt_tokens + self.generated
    }

    /// Where a chunk of up to `allowance` tokens of its context would end.
    fn chunk_end(&self, allowance: u32) -> u32 {
        self.context.min(self.started + allowance)
    }

    /// Whether all its tokens are delivered, though it may still hold its slot.
    fn is_finished(&self) -> bool {
        self.generated == self.request.output_tokens
    }
}

/// A token that has left the loop but is delivered only when its iteration ends (lockstep batching).
#[derive(Clone, Copy, Debug)]
struct Held {
    slot: Slot,
    depth: u8,
}

/// How far prompts were found in the prefix cache when their requests were admitted, preempted ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixUse {
    /// Tokens of all contexts.
    pub looked_up: u64,
    /// Of those, how many need not be computed.
    pub found: u64,
}

/// When a block can be found by others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Publishing {
    /// Without prefix caching.
    Never,
    /// When its rows have started: in lockstep, whoever finds it runs in this iteration or later, when it is filled.
    Started,
    /// When its rows have left all their keys and values: depth-wise, rows in flight are lost when their sequence is
    /// preempted.
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

/// Decides which rows share the next pass, and what becomes of them after it.
#[derive(Clone, Debug)]
pub struct Scheduler {
    settings: Settings,
    reads: SignalReads,
    bound: SignalBound,
    publishing: Publishing,
    prefixes: Option<Arc<PrefixHashes>>,
    waiting: VecDeque<Sequence>,
    /// Requests that have come since the last plan, which asynchronous scheduling sees only after the next.
    unseen: VecDeque<Sequence>,
    /// Slots whose sequence has finished since the last plan, likewise.
    finished: Vec<Slot>,
    /// Whether the last plan had anything to run.
    busy: bool,
    /// Whether rows were started for the next pass by what was known at the start of this one.
    unseeing: bool,
    /// By slot.
    sequences: Vec<Sequence>,
    free_slots: Vec<Slot>,
    admissions: u64,
    /// Running sequences whose prompt has not wholly started, oldest first.
    prefilling: VecDeque<Slot>,
    /// Sequences whose next decode row may start, in the order in which they became so.
    ready: Vec<Slot>,
    tables: BlockTables,
    /// The rows of the pass that runs, or those that go on to the next.
    segments: Vec<Segment>,
    /// Rows in flight that are not in this pass: they wait for backfill, or in lockstep for rows that do.
    stalled: Vec<Segment>,
    /// What [`KvFill::Backfill`] has still to run; none under other fills.
    backlog: Option<Backlog>,
    /// Indices of the segments whose last row leaves after the pass.
    exiting: Vec<u32>,
    held: Vec<Held>,
    admitted: Vec<Slot>,
    released: Vec<Slot>,
    /// Blocks found for the request first in line.
    found: Vec<BlockId>,
    prefix_use: PrefixUse,
    /// What the time of the pass depends on.
    meter: WorkMeter,
}

impl Scheduler {
    /// A scheduler with nothing to do yet.
    ///
    /// # Errors
    /// If the settings contradict each other.
    pub fn new(settings: Settings) -> Result<Self, ScheduleError> {
        settings.check()?;
        let idle = Sequence::new(Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 1, output_tokens: 1 });
        Ok(Self {
            settings,
            reads: settings.exit.signal_reads(settings.num_loops),
            bound: settings.exit.bound(),
            publishing: Publishing::new(&settings),
            prefixes: None,
            waiting: VecDeque::new(),
            unseen: VecDeque::new(),
            finished: Vec::new(),
            busy: false,
            unseeing: false,
            sequences: vec![idle; settings.max_batch as usize],
            free_slots: (0..settings.max_batch).rev().collect(),
            admissions: 0,
            prefilling: VecDeque::new(),
            ready: Vec::new(),
            tables: match settings.prefix_caching {
                true => BlockTables::with_prefix_cache(settings.num_blocks, settings.block_tokens, settings.max_batch),
                false => BlockTables::new(settings.num_blocks, settings.block_tokens, settings.max_batch),
            },
            segments: Vec::new(),
            stalled: Vec::new(),
            backlog: (settings.kv_fill == KvFill::Backfill)
                .then(|| Backlog::new(settings.num_loops, settings.max_batch)),
            exiting: Vec::new(),
            held: Vec::new(),
            admitted: Vec::new(),
            released: Vec::new(),
            found: Vec::new(),
            prefix_use: PrefixUse::default(),
            meter: WorkMeter::new(settings.kv_fill, settings.num_loops, settings.max_batch),
        })
    }

    /// Says which prompts begin alike; without it, prefix caching finds only what a preempted request computed.
    ///
    /// # Errors
    /// If the hashes are not of whole blocks.
    pub fn share_prefixes(&mut self, prefixes: Arc<PrefixHashes>) -> Result<(), ScheduleError> {
        let (hashed, block_tokens) = (prefixes.block_tokens, self.settings.block_tokens);
        if hashed == 0 || !hashed.is_multiple_of(block_tokens) {
            return Err(ScheduleError::PrefixBlocks { hashed, block_tokens });
        }
        self.prefixes = Some(prefixes);
        Ok(())
    }

    /// How the run is scheduled.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Sequences that hold a slot.
    pub fn num_running(&self) -> u32 {
        self.settings.max_batch - self.free_slots.len() as u32
    }

    /// Requests that wait for a slot.
    pub fn num_waiting(&self) -> u32 {
        (self.waiting.len() + self.unseen.len()) as u32
    }

    /// What prefix caching found so far.
    pub fn prefix_use(&self) -> PrefixUse {
        self.prefix_use
    }

    /// The pass that [`plan`](Self::plan) made.
    pub fn pass(&self) -> Pass<'_> {
        Pass { segments: &self.segments, reads: self.reads, tables: &self.tables, work: self.meter.work() }
    }

    /// The segments whose last row leaves, as [`decide`](Self::decide) found.
    pub fn exiting(&self) -> &[u32] {
        &self.exiting
    }

    /// Slots given since the last plan: their requests, and how much of the output each has already.
    pub fn admitted(&self) -> impl Iterator<Item = (Slot, &Request, u32)> {
        self.admitted.iter().map(|&slot| {
            let sequence = &self.sequences[slot as usize];
            (slot, &sequence.request, sequence.generated)
        })
    }

    /// Slots given up in the last [`plan`](Self::plan) or [`complete`](Self::complete).
    pub fn released(&self) -> &[Slot] {
        &self.released
    }

    /// Hands over what [`released`](Self::released) has.
    pub(crate) fn take_released(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.released)
    }

    /// A request joins the line.
    ///
    /// # Errors
    /// If it could never run to its end.
    pub fn submit(&mut self, request: Request) -> Result<(), ScheduleError> {
        self.settings.check_request(&request)?;
        let line = if self.settings.async_scheduling { &mut self.unseen } else { &mut self.waiting };
        line.push_back(Sequence::new(request));
        Ok(())
    }

    /// Composes the next pass; `false` if there is nothing to run.
    ///
    /// Rows in flight come first, then decode rows, then prompts: what is nearest its end goes on. Backfill that no
    /// row in flight waits for comes last.
    pub fn plan(&mut self, now: Nanos, observer: &mut impl Observer) -> bool {
        match self.settings.async_scheduling {
            true => self.compose(|scheduler| scheduler.start_rows_unseeing(now, observer)),
            false => self.compose(|scheduler| scheduler.start_rows(now, observer)),
        }
    }

    /// Under asynchronous scheduling, composes the next pass while this one runs, whose outcome [has been
    /// applied](Self::complete); `false` if there is nothing to run as far as can be known. When that pass starts,
    /// [`see_what_came`](Self::see_what_came) must follow; if there was nothing to run, [`plan`](Self::plan).
    /// Together they are what [`plan`](Self::plan) does when a pass starts.
    pub fn plan_ahead(&mut self, now: Nanos, observer: &mut impl Observer) -> bool {
        self.unseeing = false;
        self.compose(|scheduler| {
            scheduler.unseeing = true;
            scheduler.start_rows(now, observer);
        })
    }

    /// See [`plan_ahead`](Self::plan_ahead).
    pub fn see_what_came(&mut self) {
        if std::mem::take(&mut self.unseeing) {
            self.see();
        }
    }

    fn compose(&mut self, start_rows: impl FnOnce(&mut Self)) -> bool {
        self.admitted.clear();
        self.released.clear();
        let mid_iteration = self.settings.batching.is_lockstep() && self.any_in_flight();
        self.join_awaited_backfill();
        if !mid_iteration {
            start_rows(self);
        }
        self.fill_idle_places();
        self.busy = !self.segments.is_empty();
        if self.busy {
            self.meter.start(&self.segments, self.reads);
        }
        self.busy
    }

    /// Starts rows as if this were the start of the pass that has just ended. Only if that leaves nothing to run,
    /// the scheduler has waited for the end of the pass, and sees what came meanwhile.
    fn start_rows_unseeing(&mut self, now: Nanos, observer: &mut impl Observer) {
        if self.busy {
            self.start_rows(now, observer);
        }
        self.see();
        if self.segments.is_empty() {
            self.start_rows(now, observer);
        }
    }

    /// Takes in what has come since the last plan.
    fn see(&mut self) {
        self.waiting.append(&mut self.unseen);
        while let Some(slot) = self.finished.pop() {
            self.release(slot);
        }
    }

    fn start_rows(&mut self, now: Nanos, observer: &mut impl Observer) {
        let form_batch = self.settings.batching != Batching::Vanilla || self.num_running() == 0;
        let mut budget = self.free_budget();
        let mut preempted = self.start_decodes(&mut budget, now, observer);
        let mut allowance = budget.min(self.settings.prefill_chunk);
        while let Some(&slot) = self.prefilling.front().filter(|_| allowance > 0) {
            preempted |= self.make_room(slot, self.sequences[slot as usize].chunk_end(allowance), now, observer);
            if self.sequences[slot as usize].running {
                allowance -= self.start_chunk(slot, allowance);
            }
        }
        let whole_batch = self.settings.batching == Batching::Vanilla;
        while form_batch && !preempted && (allowance > 0 || whole_batch) {
            let Some(slot) = self.admit_next(now, observer) else { break };
            if allowance > 0 {
                allowance -= self.start_chunk(slot, allowance);
            }
        }
    }

    fn any_in_flight(&self) -> bool {
        !(self.segments.is_empty() && self.stalled.is_empty())
    }

    /// Has backfill that rows in flight wait for join them, since a row may attend to what others of its depth leave in
    /// the same pass. Where the budget is too short for that, the row stalls and leaves its place to backfill as well:
    /// so it gets nearer in every pass, and rows in flight never exceed the budget.
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

    /// Gives places of the batch that no row has taken to backfill that nobody waits for yet: of the oldest sequence
    /// first, of its shallowest depth first, which is needed soonest.
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

    /// Starts the next token of every sequence that is ready, as far as the budget goes, and takes it off the budget;
    /// says whether any sequence was preempted for it.
    fn start_decodes(&mut self, budget: &mut u32, now: Nanos, observer: &mut impl Observer) -> bool {
        let mut preempted = false;
        let mut ready = std::mem::take(&mut self.ready);
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
        preempted
    }

    /// Starts the next token of sequences until one finds no block for it; returns how many have started.
    fn start_decodes_with_room(&mut self, ready: &[Slot]) -> usize {
        for (started, &slot) in ready.iter().enumerate() {
            let positions = self.sequences[slot as usize].decode_positions();
            if !self.tables.grow(slot, positions) {
                return started;
            }
            let kind = RowKind::Decode;
            let (start, predicts, generated) = (positions - 1, true, true);
            self.segments.push(Segment { slot, start, tokens: 1, depth: 0, kind, predicts, generated });
            if self.publishing == Publishing::Started {
                self.publish_decode(slot, positions);
            }
        }
        ready.len()
    }

    /// Takes blocks until the slot's reach `positions`, from the newest sequences if none are free, in the end from
    /// the slot's own; says whether any sequence was preempted.
    fn make_room(&mut self, slot: Slot, positions: u32, now: Nanos, observer: &mut impl Observer) -> bool {
        let mut preempted = false;
        while self.sequences[slot as usize].running && !self.tables.grow(slot, positions) {
            self.preempt_newest(now, observer);
            preempted = true;
        }
        preempted
    }

    /// Starts up to `allowance` tokens of a prompt, whose blocks it holds or can have, and returns how many.
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

    /// Gives the first request in line a slot, if one is free and the blocks of its whole prompt are.
    ///
    /// It takes them chunk by chunk, so that running sequences may still get there first; under vanilla batching,
    /// where all chunks come before any decode row, it takes them at once.
    fn admit_next(&mut self, now: Nanos, observer: &mut impl Observer) -> Option<Slot> {
        let slot = *self.free_slots.last()?;
        let &Sequence { request, context, .. } = self.waiting.front()?;
        self.find_prefix(request.id, context);
        if !self.tables.fits(context, &self.found) {
            return None;
        }
        let mut sequence = self.waiting.pop_front()?;
        self.free_slots.pop();
        self.tables.adopt(slot, &self.found);
        if self.settings.batching == Batching::Vanilla {
            let room = self.tables.grow(slot, context);
            debug_assert!(room, "what fits can be held");
        }
        sequence.started = self.found.len() as u32 * self.settings.block_tokens;
        sequence.filled = sequence.started;
        self.prefix_use.looked_up += u64::from(context);
        self.prefix_use.found += u64::from(sequence.started);
        sequence.admission = self.admissions;
        sequence.running = true;
        self.admissions += 1;
        observer.admitted(now, &sequence.request);
        if let Some(backlog) = &mut self.backlog {
            backlog.admit(slot, context);
        }
        if let Some(reach) = self.meter.reach_mut() {
            reach.admit(slot, request.id, request.prompt_tokens);
        }
        self.sequences[slot as usize] = sequence;
        self.prefilling.push_back(slot);
        self.admitted.push(slot);
        Some(slot)
    }

    /// Finds blocks that hold the beginning of a context, whose last token must run in any case: it predicts.
    fn find_prefix(&mut self, request: u32, context: u32) {
        let block_tokens = self.settings.block_tokens;
        let prefixes = self.prefixes.as_deref();
        let whole = 0..(context - 1) / block_tokens;
        self.tables.find(whole.map(|block| contents(prefixes, request, block, block_tokens)), &mut self.found);
    }

    /// Lets others find the slot's blocks within its first `positions`.
    fn publish(&mut self, slot: Slot, positions: u32) {
        let (prefixes, block_tokens) = (self.prefixes.as_deref(), self.settings.block_tokens);
        let request = self.sequences[slot as usize].request.id;
        self.tables.publish(slot, positions, |block| contents(prefixes, request, block, block_tokens));
    }

    /// Lets others find the slot's blocks up to a decode row that starts.
    fn publish_decode(&mut self, slot: Slot, positions: u32) {
        // A token that is still in the making cannot be hashed.
        let hashed = positions - u32::from(self.settings.async_scheduling);
        let filled = self.backlog.as_ref().map_or(hashed, |backlog| backlog.complete(slot));
        self.publish(slot, hashed.min(filled));
    }

    /// Lets others find the blocks of prompt rows that have left all their keys and values.
    fn publish_filled(&mut self) {
        let deepest = self.settings.kv_fill.cached_depths(self.settings.num_loops) - 1;
        for index in 0..self.segments.len() {
            let Segment { slot, start, tokens, depth, kind, .. } = self.segments[index];
            if depth == deepest && kind == RowKind::Prompt {
                self.sequences[slot as usize].filled = start + tokens;
                self.publish(slot, self.filled_positions(slot));
            }
        }
    }

    /// Positions that have left all their keys and values.
    fn filled_positions(&self, slot: Slot) -> u32 {
        let sequence = &self.sequences[slot as usize];
        match &self.backlog {
            _ if sequence.filled < sequence.context => sequence.filled,
            Some(backlog) => backlog.complete(slot),
            None => sequence.decode_positions() - 1,
        }
    }

    /// Takes slot and blocks from the sequence admitted last. It is first in line again, and computes its keys
    /// and values anew; unless it is only waiting to be released.
    fn preempt_newest(&mut self, now: Nanos, observer: &mut impl Observer) {
        let running = self.sequences.iter().zip(0..).filter(|(sequence, _)| sequence.running);
        let (_, slot) =
            running.max_by_key(|(sequence, _)| sequence.admission).expect("a sequence that wants a block runs");
        let mut sequence = self.sequences[slot as usize];
        self.release(slot);
        if sequence.is_finished() {
            self.finished.retain(|&other| other != slot);
            return;
        }
        debug_assert!(self.stalled.is_empty(), "a row stalls where the budget is spent, and then nothing starts");
        self.segments.retain(|segment| segment.slot != slot);
        self.prefilling.retain(|&other| other != slot);
        self.ready.retain(|&other| other != slot);
        sequence.running = false;
        sequence.started = 0;
        sequence.context = sequence.decode_positions();
        if let Some(reach) = self.meter.reach_mut() {
            reach.preempt(slot, sequence.request.id);
        }
        observer.preempted(now, &sequence.request);
        self.waiting.push_front(sequence);
    }

    fn release(&mut self, slot: Slot) {
        self.sequences[slot as usize].running = false;
        self.tables.release(slot);
        self.free_slots.push(slot);
        self.released.push(slot);
    }

    /// Decides from the signals of the pass which rows leave.
    ///
    /// Which do is as good as random, so the loop writes every index and keeps those that leave by counting on:
    /// a branch would be mispredicted for most rows.
    pub fn decide(&mut self, signals: &[f32]) {
        let (bound, certain_from) = (self.bound, self.reads.below);
        self.exiting.resize(self.segments.len(), 0);
        let mut exiting = 0;
        for (index, (segment, &signal)) in self.segments.iter().zip(signals).enumerate() {
            self.exiting[exiting] = index as u32;
            exiting += usize::from(segment.predicts & ((segment.depth >= certain_from) | bound.is_reached(signal)));
        }
        self.exiting.truncate(exiting);
        self.meter.exit(&self.segments, &self.exiting, self.reads);
    }

    /// Applies the outcome of the pass at its end: tokens are delivered, the other rows go one deeper.
    pub fn complete(&mut self, now: Nanos, observer: &mut impl Observer) {
        self.released.clear();
        if let Some(backlog) = &mut self.backlog {
            backlog.ran(&self.segments);
        }
        let lockstep = self.settings.batching.is_lockstep();
        if self.publishing == Publishing::Filled {
            self.publish_filled();
        }
        for index in 0..self.exiting.len() {
            let segment = &mut self.segments[self.exiting[index] as usize];
            segment.predicts = false;
            let held = Held { slot: segment.slot, depth: segment.depth };
            if lockstep {
                self.held.push(held);
            } else {
                self.deliver(held, now, observer);
            }
        }
        self.deepen_segments();
        if lockstep && !self.any_in_flight() {
            self.deliver_held(now, observer);
        }
    }

    /// Drops what has left or run its last depth; the rest is one deeper in the next pass. Without branches, as
    /// [`decide`](Self::decide).
    fn deepen_segments(&mut self) {
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

    /// Ends an iteration: its tokens are delivered, oldest sequence first.
    fn deliver_held(&mut self, now: Nanos, observer: &mut impl Observer) {
        let mut held = std::mem::take(&mut self.held);
        held.sort_unstable_by_key(|held| self.sequences[held.slot as usize].admission);
        for token in held.drain(..) {
            self.deliver(token, now, observer);
        }
        self.held = held;
    }

    #[inline(always)]
    fn deliver(&mut self, Held { slot, depth }: Held, now: Nanos, observer: &mut impl Observer) {
        let sequence = &mut self.sequences[slot as usize];
        let index = sequence.generated;
        let previous = (index > 0).then_some(sequence.last_token);
        if index == 0 {
            sequence.first_token = now;
        }
        sequence.generated += 1;
        sequence.last_token = now;
        let finished = sequence.is_finished();
        observer.token(now, &sequence.request, Token { index, depth, previous });
        if self.publishing == Publishing::Filled {
            self.publish(slot, self.filled_positions(slot));
        }
        match finished {
            true => self.finish(slot, now, observer),
            false => self.ready.push(slot),
        }
    }

    #[inline(never)]
    fn finish(&mut self, slot: Slot, now: Nanos, observer: &mut impl Observer) {
        let sequence = &self.sequences[slot as usize];
        observer.finished(now, &sequence.request, sequence.first_token);
        match self.settings.async_scheduling {
            true => self.finished.push(slot),
            false => self.release(slot),
        }
    }
}

/// What a whole block of a request holds.
fn contents(prefixes: Option<&PrefixHashes>, request: u32, block: u32, block_tokens: u32) -> Contents {
    let shared = prefixes.and_then(|prefixes| {
        let parts = prefixes.block_tokens / block_tokens;
        let hash = *prefixes.of(request).get((block / parts) as usize)?;
        Some(Contents::Prompt { hash, part: block % parts })
    });
    shared.unwrap_or(Contents::Own { request, block })
}
