//! The scheduler: decides which rows share the next pass, and what becomes of them after it.
//!
//! ```text
//! waiting ──admit──► prefilling ──last chunk started──► (predicts) ──token──► ready ──start──► in flight
//!    ▲                                                                          ▲                  │
//!    └────────────────────────── preempt: newest first ◄────────────────────────┴──── token ◄──────┘
//! ```

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use traces::{Nanos, Request};

use crate::blocks::BlockTables;
use crate::observe::{Observer, Token};
use crate::pass::{Pass, Segment, Slot};
use crate::policy::{Batching, ExitPolicy, Look};

/// How a run is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Which rows may share a pass.
    pub batching: Batching,
    /// When rows leave early.
    pub exit: ExitPolicy,
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
}

/// Settings or a request that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A setting that must be at least 1 is 0.
    #[error("{0} is 0: expected at least 1")]
    Zero(&'static str),
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
    fn check(&self) -> Result<(), ScheduleError> {
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
        if self.token_budget < self.max_batch {
            return Err(ScheduleError::BudgetBelowBatch { token_budget: self.token_budget, max_batch: self.max_batch });
        }
        match self.exit {
            ExitPolicy::Static(depth) if depth >= self.num_loops => {
                Err(ScheduleError::StaticDepth { depth, num_loops: self.num_loops })
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
    /// Of those, how many have started at depth 0.
    started: u32,
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
}

/// A token that has left the loop but is delivered only when its iteration ends (lockstep batching).
#[derive(Clone, Copy, Debug)]
struct Held {
    slot: Slot,
    depth: u8,
}

/// Decides which rows share the next pass, and what becomes of them after it.
#[derive(Clone, Debug)]
pub struct Scheduler {
    settings: Settings,
    look: Look,
    /// The deepest depth of rows that predict.
    last_depth: u8,
    waiting: VecDeque<Sequence>,
    /// By slot.
    sequences: Vec<Sequence>,
    free_slots: Vec<Slot>,
    admissions: u64,
    /// Running sequences whose prompt has not wholly started, oldest first.
    prefilling: VecDeque<Slot>,
    /// Sequences whose next decode row may start, in the order in which they became so.
    ready: VecDeque<Slot>,
    tables: BlockTables,
    /// The rows of the pass that runs, or those that go on to the next.
    segments: Vec<Segment>,
    /// Indices of the segments whose last row leaves after the pass.
    leaving: Vec<u32>,
    held: Vec<Held>,
    admitted: Vec<Slot>,
    released: Vec<Slot>,
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
            look: settings.exit.look(),
            last_depth: settings.exit.last_depth(settings.num_loops),
            waiting: VecDeque::new(),
            sequences: vec![idle; settings.max_batch as usize],
            free_slots: (0..settings.max_batch).rev().collect(),
            admissions: 0,
            prefilling: VecDeque::new(),
            ready: VecDeque::new(),
            tables: BlockTables::new(settings.num_blocks, settings.block_tokens, settings.max_batch),
            segments: Vec::new(),
            leaving: Vec::new(),
            held: Vec::new(),
            admitted: Vec::new(),
            released: Vec::new(),
        })
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
        self.waiting.len() as u32
    }

    /// The pass that [`plan`](Self::plan) made.
    pub fn pass(&self) -> Pass<'_> {
        Pass { segments: &self.segments, look: self.look, tables: &self.tables }
    }

    /// The segments whose last row leaves, as [`decide`](Self::decide) found.
    pub fn leaving(&self) -> &[u32] {
        &self.leaving
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

    /// A request joins the line.
    ///
    /// # Errors
    /// If it could never run to its end.
    pub fn submit(&mut self, request: Request) -> Result<(), ScheduleError> {
        self.settings.check_request(&request)?;
        self.waiting.push_back(Sequence::new(request));
        Ok(())
    }

    /// Composes the next pass; `false` if there is nothing to run.
    ///
    /// Rows in flight come first, then decode rows, then prompts: what is nearest its end goes on.
    pub fn plan(&mut self, now: Nanos, observer: &mut impl Observer) -> bool {
        self.admitted.clear();
        self.released.clear();
        let mid_iteration = self.settings.batching.is_lockstep() && !self.segments.is_empty();
        if !mid_iteration {
            self.start_rows(now, observer);
        }
        self.flag_predicting_rows();
        !self.segments.is_empty()
    }

    fn start_rows(&mut self, now: Nanos, observer: &mut impl Observer) {
        let form_batch = self.settings.batching != Batching::Vanilla || self.num_running() == 0;
        let preempted = self.start_decodes(now, observer);
        let mut allowance = self.free_budget().min(self.settings.prefill_chunk);
        while let Some(&slot) = self.prefilling.front().filter(|_| allowance > 0) {
            allowance -= self.start_chunk(slot, allowance);
        }
        let whole_batch = self.settings.batching == Batching::Vanilla;
        while form_batch && !preempted && (allowance > 0 || whole_batch) {
            let Some(slot) = self.admit_next(now, observer) else { break };
            if allowance > 0 {
                allowance -= self.start_chunk(slot, allowance);
            }
        }
    }

    fn free_budget(&self) -> u32 {
        self.settings.token_budget - self.pass().num_rows()
    }

    /// Starts the next token of every sequence that is ready, as far as the budget goes; says whether any
    /// sequence was preempted for it.
    fn start_decodes(&mut self, now: Nanos, observer: &mut impl Observer) -> bool {
        let mut preempted = false;
        let mut budget = self.free_budget();
        while budget > 0 {
            let Some(slot) = self.ready.pop_front() else { break };
            let positions = self.sequences[slot as usize].decode_positions();
            while self.sequences[slot as usize].running && !self.tables.grow(slot, positions) {
                self.preempt_newest(now, observer);
                preempted = true;
                budget = self.free_budget();
            }
            if self.sequences[slot as usize].running {
                self.segments.push(Segment {
                    slot,
                    start: positions - 1,
                    tokens: 1,
                    depth: 0,
                    decode: true,
                    predicts: true,
                    look: false,
                    head: false,
                });
                budget -= 1;
            }
        }
        preempted
    }

    /// Starts up to `allowance` tokens of a prompt and returns how many.
    fn start_chunk(&mut self, slot: Slot, allowance: u32) -> u32 {
        let sequence = &mut self.sequences[slot as usize];
        let tokens = (sequence.context - sequence.started).min(allowance);
        let start = sequence.started;
        sequence.started += tokens;
        let predicts = sequence.started == sequence.context;
        if predicts {
            self.prefilling.retain(|&other| other != slot);
        }
        self.segments.push(Segment {
            slot,
            start,
            tokens,
            depth: 0,
            decode: false,
            predicts,
            look: false,
            head: false,
        });
        tokens
    }

    /// Gives the first request in line a slot and the blocks of its whole prompt, if both are free.
    fn admit_next(&mut self, now: Nanos, observer: &mut impl Observer) -> Option<Slot> {
        let slot = *self.free_slots.last()?;
        let context = self.waiting.front()?.context;
        if !self.tables.grow(slot, context) {
            return None;
        }
        let mut sequence = self.waiting.pop_front()?;
        self.free_slots.pop();
        sequence.admission = self.admissions;
        sequence.running = true;
        self.admissions += 1;
        observer.admitted(now, &sequence.request);
        self.sequences[slot as usize] = sequence;
        self.prefilling.push_back(slot);
        self.admitted.push(slot);
        Some(slot)
    }

    /// Takes slot and blocks from the sequence admitted last. It is first in line again, and computes its keys
    /// and values anew.
    fn preempt_newest(&mut self, now: Nanos, observer: &mut impl Observer) {
        let running = self.sequences.iter().zip(0..).filter(|(sequence, _)| sequence.running);
        let (_, slot) =
            running.max_by_key(|(sequence, _)| sequence.admission).expect("a sequence that wants a block runs");
        let mut sequence = self.sequences[slot as usize];
        self.release(slot);
        self.segments.retain(|segment| segment.slot != slot);
        self.prefilling.retain(|&other| other != slot);
        self.ready.retain(|&other| other != slot);
        sequence.running = false;
        sequence.started = 0;
        sequence.context = sequence.request.prompt_tokens + sequence.generated;
        observer.preempted(now, &sequence.request);
        self.waiting.push_front(sequence);
    }

    fn release(&mut self, slot: Slot) {
        self.sequences[slot as usize].running = false;
        self.tables.release(slot);
        self.free_slots.push(slot);
        self.released.push(slot);
    }

    fn flag_predicting_rows(&mut self) {
        let look_needs_head = self.settings.exit.look_needs_head();
        for segment in &mut self.segments {
            let certain = segment.depth == self.last_depth;
            segment.look = segment.predicts && !certain && self.look != Look::Never;
            segment.head = segment.predicts && (certain || (segment.look && look_needs_head));
        }
    }

    /// Decides from the signals of the pass which rows leave.
    pub fn decide(&mut self, signals: &[f32]) {
        let exit = self.settings.exit;
        self.leaving.clear();
        for (index, segment) in self.segments.iter().enumerate() {
            let certain = segment.depth == self.last_depth;
            if segment.predicts && (certain || (segment.look && exit.leaves(signals[index]))) {
                self.leaving.push(index as u32);
            }
        }
    }

    /// Applies the outcome of the pass at its end: tokens are delivered, the other rows go one deeper.
    pub fn complete(&mut self, now: Nanos, observer: &mut impl Observer) {
        self.released.clear();
        let lockstep = self.settings.batching.is_lockstep();
        for index in 0..self.leaving.len() {
            let segment = &mut self.segments[self.leaving[index] as usize];
            segment.predicts = false;
            let held = Held { slot: segment.slot, depth: segment.depth };
            if lockstep {
                self.held.push(held);
            } else {
                self.deliver(held, now, observer);
            }
        }
        self.deepen_segments();
        if lockstep && self.segments.is_empty() {
            self.deliver_held(now, observer);
        }
    }

    /// Drops what has left or run its last depth; the rest is one deeper in the next pass.
    fn deepen_segments(&mut self) {
        let deepest = self.settings.num_loops - 1;
        let sequences = &self.sequences;
        self.segments.retain_mut(|segment| {
            let done = segment.depth == deepest || (segment.decode && !segment.predicts);
            segment.depth += 1;
            !done && sequences[segment.slot as usize].running
        });
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

    fn deliver(&mut self, Held { slot, depth }: Held, now: Nanos, observer: &mut impl Observer) {
        let sequence = &mut self.sequences[slot as usize];
        let index = sequence.generated;
        let previous = (index > 0).then_some(sequence.last_token);
        if index == 0 {
            sequence.first_token = now;
        }
        sequence.generated += 1;
        sequence.last_token = now;
        observer.token(now, &sequence.request, Token { index, depth, previous });
        if sequence.generated == sequence.request.output_tokens {
            observer.finished(now, &sequence.request, sequence.first_token);
            self.release(slot);
        } else {
            self.ready.push_back(slot);
        }
    }
}
