//! The scheduler's executor that runs the model and measures time.

mod drafts;
mod look_ahead;

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use scheduler::blocks::BlockId;
use scheduler::{Executor, ExitPolicy, KvFill, Pass, RowKind, Segment, Settings, SignalRead, Slot};
use traces::hash::mix;
use traces::{DevicePass, ExitSignal, Nanos, Request, Signals};

use crate::backend::{Answers, Backend, Diverging, Heads, PassLimits, ServedModel, Work};
use crate::cache::CacheError;
use crate::kernels::attention::{Fill, Row};
use crate::kernels::rows::{Change, Source};
use crate::kernels::signals::Verdict;
use crate::model::Rows;
use crate::prompts::{PromptError, Prompts};
use crate::sampling::{Chosen, Decoding};
use crate::script::ExitScript;

/// Why the engine cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A prompt is not available.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The cache cannot be created.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A sequence is longer than the model's positions or the cache.
    #[error(
        "request {request} needs {needed} positions, {holder} has {available}: max_prompt_tokens and \
         max_output_tokens cut requests"
    )]
    TooLong {
        /// Id of the request.
        request: u32,
        /// Positions that the sequence needs: prompt and output, without the last token.
        needed: u64,
        /// What limits it: the model or the KV cache.
        holder: &'static str,
        /// Positions that are available.
        available: u64,
    },
    /// The oracle has no exit depth for a token.
    #[error(
        "the oracle has no exit depth for token {token} of request {request}: record the requests that are replayed"
    )]
    NoExit {
        /// Id of the request.
        request: u32,
        /// Index of the token.
        token: usize,
    },
    /// The exit script has no such token.
    #[error("the exit script has no token {token} of request {request}")]
    NotInScript {
        /// Id of the request.
        request: u32,
        /// Index of the token.
        token: usize,
    },
    /// A result of the model is not a number.
    #[error("the logits of request {request}, token {token} at depth {depth} are not finite")]
    NotFinite {
        /// Id of the request.
        request: u32,
        /// Index of the token.
        token: usize,
        /// The depth.
        depth: u8,
    },
}

/// How tokens are sampled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Temperature; 0 selects the most likely token.
    pub temperature: f32,
    /// Seed of the random numbers above temperature 0. The random numbers of a token depend only on seed, request and
    /// token.
    pub seed: u64,
}

impl Sampling {
    /// Random key of one token.
    pub fn key(&self, request: u32, token: usize) -> u64 {
        mix(self.seed ^ mix((u64::from(request) << 32) | token as u64))
    }
}

/// Prompt and output of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Exit depth of each generated token.
    pub exit_depths: Vec<u8>,
    /// The signal that each token exited by; `None` where none was read at its exit depth.
    pub exit_signals: Vec<Option<f32>>,
    /// What a request with a [`Decoding`] keeps of the distributions of its tokens; empty if it keeps nothing.
    pub chosen: Vec<Chosen>,
    /// Exit signals and predictions of a recording executor: entry `token * num_loops + depth`, zero at depths that a
    /// token skipped, unless the executor [looks ahead](EngineExecutor::looking_ahead).
    pub recorded: Vec<(Signals, u32)>,
}

impl Generation {
    /// Id of the token at a position of the sequence.
    fn token_at(&self, position: usize) -> u32 {
        match position.checked_sub(self.prompt.len()) {
            None => self.prompt[position],
            Some(generated) => self.tokens[generated],
        }
    }

    /// Exit depth of the row at a position; `None` in the prompt and before the exit.
    fn left(&self, position: usize) -> Option<u8> {
        let after_prompt = position.checked_sub(self.prompt.len())?;
        self.exit_depths.get(after_prompt + 1).copied()
    }
}

/// Exit depths of generated tokens, by request: the knowledge of the oracle.
pub type ExitDepths = HashMap<u32, Vec<u8>>;

/// Where the oracle's answers come from.
#[derive(Debug)]
enum Oracle {
    /// Exit depths that are known before the run.
    Known(Arc<ExitDepths>),
    /// Looking ahead: a token exits at the earliest depth that predicts what the last one predicts.
    Ahead,
    /// Chance: at each depth before the last, a token exits with this probability.
    Chance {
        /// Of the draw.
        seed: u64,
        /// From 0 to 1.
        probability: f64,
    },
}

/// A sequence with a slot.
#[derive(Debug, Default)]
struct Sequence {
    request: u32,
    generation: Generation,
    /// By position: the arena row of a hidden state between two depths. Under [`KvFill::Backfill`], also of exited
    /// tokens.
    in_flight: Vec<Option<u32>>,
    /// Under [`KvFill::Skip`], by depth: positions without keys and values.
    skipped: Vec<Vec<u32>>,
    /// What was last predicted, where the exit policy compares predictions.
    predicted: Option<u32>,
    /// The last depth of its prompt.
    prompt_depth: usize,
    /// Whether the last token of the prompt and later ones run deeper again, as they did before a preemption.
    runs_again: bool,
    /// How its tokens are chosen, if not as those of all others.
    decoding: Option<Decoding>,
    /// The signal that was read of its row at the depth that the row ran last.
    signal: Option<f32>,
    /// Tokens of its output that are no drafts.
    certain: usize,
    /// Whether its output is dropped with its slot.
    is_forgotten: bool,
}

/// A request with a prompt of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// How its tokens are chosen.
    pub decoding: Decoding,
}

impl Sequence {
    fn skipped(&self, depth: usize) -> &[u32] {
        self.skipped.get(depth).map_or(&[], Vec::as_slice)
    }
}

/// State of the sequences of an executor.
#[derive(Debug)]
struct Sequences {
    by_slot: Vec<Sequence>,
    kv_fill: KvFill,
    /// Tells how deep prompts run: if none does, all depths that the fill keeps.
    settings: Option<Settings>,
    num_loops: usize,
}

impl Sequences {
    fn of(&self, segment: &Segment) -> &Sequence {
        &self.by_slot[segment.slot as usize]
    }

    fn of_mut(&mut self, segment: &Segment) -> &mut Sequence {
        &mut self.by_slot[segment.slot as usize]
    }

    /// The row at a position of a segment.
    fn row<'a>(&'a self, pass: &Pass<'a>, segment: &Segment, position: usize) -> Row<'a> {
        let (sequence, depth) = (self.of(segment), usize::from(segment.depth));
        Row {
            position,
            depth,
            fills: self.fills(sequence, position, depth),
            skipped: sequence.skipped(depth),
            blocks: pass.blocks(segment.slot),
        }
    }

    /// The depths at which a row writes its keys and values. A generated token that runs again after a preemption gets
    /// the KV fill that it had. Below its exit depth, the fill is exact only under [`KvFill::Backfill`].
    fn fills(&self, sequence: &Sequence, position: usize, depth: usize) -> Range<usize> {
        let (own, none) = (depth..depth + 1, depth..depth);
        match (self.kv_fill, self.left(sequence, position)) {
            (KvFill::First, _) if depth > 0 => none,
            (KvFill::First | KvFill::Backfill, _) | (_, None) => own,
            (_, Some(left)) if left < depth => none,
            (_, Some(left)) if left == depth => depth..self.copied_depths().max(depth + 1),
            (_, Some(_)) => own,
        }
    }

    /// The deepest depth at which a row writes entries of its own; `None` if that is the last one, or not known yet.
    fn left(&self, sequence: &Sequence, position: usize) -> Option<usize> {
        let &Sequence { ref generation, prompt_depth, .. } = sequence;
        match (position + 1).cmp(&generation.prompt.len()) {
            Ordering::Greater => generation.left(position).map(usize::from),
            _ if !self.fills_prompts() => None,
            Ordering::Less => Some(prompt_depth),
            Ordering::Equal => generation.exit_depths.first().map(|&exit| prompt_depth.max(exit.into())),
        }
    }

    /// Whether tokens of prompts leave copies of their entries at depths that they do not run.
    fn fills_prompts(&self) -> bool {
        self.settings.is_some_and(|settings| settings.fills_prompts())
    }

    /// The last depth of a request's prompt.
    fn prompt_depth(&self, request: u32) -> usize {
        match &self.settings {
            Some(settings) => settings.prompt_depth(request).into(),
            None if self.kv_fill == KvFill::First => 0,
            None => self.num_loops - 1,
        }
    }

    /// Whether a row runs the next depth, if its model has one.
    fn goes_on(&self, segment: &Segment, position: usize) -> bool {
        let &Sequence { ref generation, prompt_depth, runs_again, .. } = self.of(segment);
        segment.kind != RowKind::Prompt
            || usize::from(segment.depth) < prompt_depth
            || segment.predicts && position == last_position(segment)
            || runs_again && position + 1 >= generation.prompt.len()
    }

    /// Depths at which an exit leaves copies of its entries where it has none.
    fn copied_depths(&self) -> usize {
        self.kv_fill.copied_depths(self.num_loops as u8).into()
    }

    /// Whether rows overwrite entries of lower depths: see [`KvFill::overwrites`].
    fn overwrites(&self) -> bool {
        self.kv_fill.overwrites(self.num_loops as u8)
    }

    /// By depth: positions without keys and values.
    fn skipped_positions(&self, generation: &Generation) -> Vec<Vec<u32>> {
        if self.kv_fill != KvFill::Skip {
            return Vec::new();
        }
        let generated = generation.prompt.len()..generation.prompt.len() + generation.tokens.len();
        let of_depth = |depth| {
            let skips = |&position: &usize| generation.left(position).is_some_and(|left| usize::from(left) < depth);
            generated.clone().filter(skips).map(|position| position as u32).collect()
        };
        (0..self.num_loops).map(of_depth).collect()
    }

    /// The rows of segments, in order.
    fn rows<'a>(&'a self, pass: &Pass<'a>, segments: &[usize]) -> Rows<'a> {
        let mut rows = Rows::default();
        for segment in segments.iter().map(|&index| &pass.segments[index]) {
            positions(segment).for_each(|position| rows.push(self.row(pass, segment, position)));
        }
        rows
    }

    /// The last rows of segments, which are sorted by depth.
    fn last_rows<'a>(&'a self, pass: &Pass<'a>, segments: &[usize]) -> Rows<'a> {
        let mut rows = Rows::default();
        for segment in segments.iter().map(|&index| pass.exited(index)) {
            rows.push(self.row(pass, segment, last_position(segment)));
        }
        rows
    }
}

/// Free rows of the backend's memory for rows in flight.
#[derive(Debug, Default)]
struct Arena {
    capacity: usize,
    free: Vec<u32>,
}

impl Arena {
    /// Ensures that `rows` more rows can be taken.
    fn reserve(&mut self, backend: &mut dyn Backend, rows: usize) -> candle_core::Result<()> {
        if self.free.len() < rows {
            let more = rows.max(self.capacity);
            backend.reserve(self.capacity + more)?;
            self.free.extend((self.capacity..self.capacity + more).map(|row| row as u32));
            self.capacity += more;
        }
        Ok(())
    }
}

/// What is requested of the current pass, as segments sorted by depth.
#[derive(Debug, Default)]
struct Questions {
    heads: Vec<usize>,
    gates: Vec<usize>,
    /// Each with the row in flight that its last row was before the pass.
    compared: Vec<(usize, u32)>,
    /// Those whose distributions are compared with the ones before.
    diverging: Vec<usize>,
    /// Those whose rows have left drafts, of which the head of every row decides.
    verified: Vec<usize>,
}

/// State of the current pass.
#[derive(Debug, Default)]
struct Current {
    /// By segment: index of its first row among those of the pass.
    first_rows: Vec<usize>,
    /// By segment: results of its last row.
    findings: Vec<Finding>,
    /// Segments whose rows have left drafts, and the results of those rows.
    verified: Vec<(usize, Vec<Verdict>)>,
    /// Whether the pass looks ahead of what is served.
    is_ahead: bool,
}

/// Results of a row.
#[derive(Clone, Copy, Debug)]
struct Finding {
    /// Results of the head, if it ran.
    verdict: Option<Verdict>,
    /// Score of the gate; 1 at the last depth, which has no gate.
    gate: f32,
    /// How the row differs from its state one depth earlier.
    change: Change,
    /// Divergence of its distribution one depth earlier from its own.
    kl: f32,
}

impl Finding {
    const NOTHING: Self = Self { verdict: None, gate: 1.0, change: Change::FROM_ZERO, kl: f32::INFINITY };
}

impl Current {
    fn last_row(&self, pass: &Pass<'_>, segment: usize) -> usize {
        self.first_rows[segment] + pass.segments[segment].tokens as usize - 1
    }
}

/// Runs passes on the model.
///
/// The executor keeps the output of every request, also after the request has given up its slot:
/// [`EngineExecutor::generations`].
#[derive(Debug)]
pub struct EngineExecutor {
    model: Arc<dyn ServedModel>,
    backend: Box<dyn Backend>,
    /// Positions per KV block, and of the whole cache.
    block_tokens: usize,
    capacity_tokens: u64,
    prompts: Arc<Prompts>,
    sampling: Sampling,
    oracle: Option<Oracle>,
    /// What exit policies read in place of the model's signals.
    script: Option<Arc<ExitScript>>,
    recording: bool,
    /// Whether rows run every depth in advance when they start. Only with `recording`.
    looking_ahead: bool,
    /// Depths at which a row may exit or its signal is read, so that the row runs the coda there.
    exit_depths: Range<usize>,
    /// Decides which rows certainly exit, so that their head runs within the pass.
    exit: ExitPolicy,
    /// Whether exits may wait for the head: [`Settings::exit_wait`](scheduler::Settings::exit_wait).
    exits_wait: bool,
    arena: Arena,
    sequences: Sequences,
    current: Current,
    /// Requests with prompts of their own, until they are forgotten.
    asked: HashMap<u32, Asked>,
    generations: HashMap<u32, Generation>,
}

impl EngineExecutor {
    /// An executor with an empty cache of `num_blocks` blocks of `block_tokens` positions. Exited tokens fill the
    /// depths they skip by `kv_fill`.
    ///
    /// # Errors
    /// If the cache cannot be created.
    pub fn new(
        model: Arc<dyn ServedModel>,
        prompts: Arc<Prompts>,
        sampling: Sampling,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
    ) -> Result<Self, EngineError> {
        let num_loops = model.config().num_loops;
        Ok(Self {
            backend: model.clone().backend(kv_fill, num_blocks, block_tokens)?,
            model,
            block_tokens: block_tokens as usize,
            capacity_tokens: u64::from(num_blocks) * u64::from(block_tokens),
            prompts,
            sampling,
            oracle: None,
            script: None,
            recording: false,
            looking_ahead: false,
            exit_depths: 0..num_loops,
            exit: ExitPolicy::None,
            exits_wait: false,
            arena: Arena::default(),
            sequences: Sequences { by_slot: Vec::new(), kv_fill, settings: None, num_loops },
            current: Current::default(),
            asked: HashMap::new(),
            generations: HashMap::new(),
        })
    }

    /// Lets prompts run as deep as [`Settings::prompt_depth`] says.
    pub fn with_prompts_of(mut self, settings: &Settings) -> Self {
        self.sequences.settings = Some(*settings);
        self.with_codas_of_prompts()
    }

    /// The coda runs where prompts leave copies, since later tokens attend to its keys and values as well.
    fn with_codas_of_prompts(mut self) -> Self {
        let settings = self.sequences.settings.filter(Settings::fills_prompts);
        if let Some(depth) = settings.and_then(|settings| settings.prefill_depth) {
            self.exit_depths.start = self.exit_depths.start.min(depth.into());
        }
        self
    }

    /// Sets the exit depths of the oracle.
    pub fn with_oracle(mut self, exits: Arc<ExitDepths>) -> Self {
        self.oracle = Some(Oracle::Known(exits));
        self
    }

    /// Lets exit policies read the signals of a script, and the oracle its predictions, in place of the model's.
    pub fn with_script(mut self, script: Arc<ExitScript>) -> Self {
        self.script = Some(script);
        self
    }

    /// Makes the oracle answer by chance: at each depth before the last, a token exits with this probability.
    pub(crate) fn with_chance(mut self, seed: u64, probability: f64) -> Self {
        self.oracle = Some(Oracle::Chance { seed, probability });
        self
    }

    /// Makes histories that were never run behave like others: see [`Backend::fill_with_numbers`].
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn with_any_history(mut self) -> Result<Self, EngineError> {
        self.backend.fill_with_numbers()?;
        Ok(self)
    }

    /// Restricts exits to those of a policy: the coda does not run where no row can exit, no signal is read, and its keys
    /// and values are not needed.
    pub fn exiting_by(mut self, exit: ExitPolicy) -> Self {
        self.exit = exit;
        let depths = exit.exit_depths(self.num_loops() as u8);
        self.exit_depths = usize::from(*depths.start())..usize::from(*depths.end()) + 1;
        let reads_signal = matches!(exit.signal_read(), SignalRead::Signal(_) | SignalRead::Repeats);
        if reads_signal || self.sequences.kv_fill == KvFill::First {
            self.exit_depths.start = 0;
        }
        if self.sequences.overwrites() {
            // The coda's entries are then the same whatever the policy.
            self.exit_depths = 0..self.num_loops();
        }
        self.with_codas_of_prompts()
    }

    /// Keeps the states of rows that exit until the head has run for them, which may be after later passes.
    ///
    /// # Errors
    /// If memory cannot be allocated.
    pub fn with_exits_that_wait(mut self) -> Result<Self, EngineError> {
        self.backend.keep_exits()?;
        self.exits_wait = true;
        Ok(self)
    }

    /// Keeps the signals and predictions of every generated token at every depth that it runs.
    pub fn recording(mut self) -> Self {
        self.recording = true;
        self.exit_depths = 0..self.num_loops();
        self
    }

    /// Tells the executor of a request with a prompt of its own, before the request is submitted. Its tokens cannot
    /// be chosen from logits where exits [wait](Self::with_exits_that_wait).
    pub fn ask(&mut self, request: u32, asked: Asked) {
        self.asked.insert(request, asked);
    }

    /// Forgets a request that has ended, with its prompt and output; at the latest when it gives up its slot.
    pub fn forget(&mut self, request: u32) {
        self.asked.remove(&request);
        self.generations.remove(&request);
        let holds_slot =
            |sequence: &&mut Sequence| sequence.request == request && !sequence.generation.prompt.is_empty();
        if let Some(sequence) = self.sequences.by_slot.iter_mut().find(holds_slot) {
            sequence.is_forgotten = true;
        }
    }

    /// Prompt and output of each request, by id. A request with a slot has only what it had when it last lost one.
    pub fn generations(&self) -> &HashMap<u32, Generation> {
        &self.generations
    }

    /// Prompt and output so far of a request, by id.
    pub fn generation(&self, request: u32) -> Option<&Generation> {
        let holds_slot = |sequence: &&Sequence| sequence.request == request && !sequence.generation.prompt.is_empty();
        let in_slot = || self.sequences.by_slot.iter().find(holds_slot).map(|sequence| &sequence.generation);
        self.generations.get(&request).or_else(in_slot)
    }

    /// Prompt and output of each request, by id, when the run is over.
    pub fn into_generations(self) -> HashMap<u32, Generation> {
        self.generations
    }

    /// See [`Backend::prepare`].
    ///
    /// # Errors
    /// If there is not enough memory, or the device fails.
    pub fn prepare(&mut self, limits: PassLimits) -> Result<(), EngineError> {
        self.arena.reserve(&mut *self.backend, limits.rows)?;
        Ok(self.backend.prepare(limits)?)
    }

    /// Time of the exit head so far, as part of the time of all passes.
    pub fn head_time(&self) -> Duration {
        self.backend.head_time()
    }

    /// Takes the prompt and output of a request, once the output is complete.
    pub(crate) fn take_finished(&mut self, request: &Request) -> Option<Generation> {
        let generation = self.generations.get(&request.id)?;
        match generation.tokens.len() == request.output_tokens as usize {
            true => self.generations.remove(&request.id),
            false => None,
        }
    }

    /// Keys and values of the first `positions` entries of a sequence in its `blocks`, of every layer and depth.
    ///
    /// # Errors
    /// If the device fails.
    pub fn cached(&self, blocks: &[BlockId], positions: usize) -> Result<Vec<f32>, EngineError> {
        Ok(self.backend.cached(blocks, positions)?)
    }

    /// Puts a sequence of up to `context_tokens` positions into a slot, replacing its current one.
    pub(crate) fn occupy(&mut self, slot: Slot, request: u32, generation: Generation, context_tokens: u32) {
        let (slot, sequences) = (slot as usize, &mut self.sequences);
        if sequences.by_slot.len() <= slot {
            sequences.by_slot.resize_with(slot + 1, Sequence::default);
        }
        let in_flight = vec![None; context_tokens as usize];
        let skipped = sequences.skipped_positions(&generation);
        let certain = generation.tokens.len();
        let sequence = Sequence {
            request,
            prompt_depth: sequences.prompt_depth(request),
            runs_again: sequences.fills_prompts() && !generation.tokens.is_empty(),
            generation,
            in_flight,
            skipped,
            decoding: self.asked.get(&request).map(|asked| asked.decoding.clone()),
            certain,
            ..Sequence::default()
        };
        let before = std::mem::replace(&mut sequences.by_slot[slot], sequence);
        self.arena.free.extend(before.in_flight.into_iter().flatten());
    }

    fn num_loops(&self) -> usize {
        self.sequences.num_loops
    }

    fn prompt(&self, request: &Request) -> Result<Vec<u32>, PromptError> {
        match self.asked.get(&request.id) {
            Some(asked) => Ok(asked.prompt.clone()),
            None => self.prompts.get(request),
        }
    }

    /// Checks that a request fits the model's positions and the cache.
    ///
    /// # Errors
    /// If the request does not fit.
    pub fn check_request(&self, request: &Request) -> Result<(), EngineError> {
        let needed = u64::from(request.prompt_tokens) + u64::from(request.output_tokens) - 1;
        let holders = [("the model", self.model.config().max_positions as u64), ("the KV cache", self.capacity_tokens)];
        match holders.into_iter().find(|(_, available)| needed > *available) {
            None => Ok(()),
            Some((holder, available)) => Err(EngineError::TooLong { request: request.id, needed, holder, available }),
        }
    }

    /// Runs the rows of a pass, keeps the states of those that continue, and collects the results. The head runs in the
    /// pass for rows that are known to exit after it.
    fn run_rows(
        &mut self,
        pass: &Pass<'_>,
        exiting: Option<&[u32]>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), EngineError> {
        let order = by_depth(pass, (0..pass.segments.len()).collect());
        self.place_rows(pass, &order);
        let questions = self.questions(pass, exiting);
        let sources = self.sources(pass, &order);
        let places = self.places(pass)?;
        self.run_placed(pass, &order, &questions, sources, places, meanwhile)
    }

    /// Runs the rows of a pass, by segment in this `order`, from their sources, and collects the results.
    fn run_placed(
        &mut self,
        pass: &Pass<'_>,
        order: &[usize],
        questions: &Questions,
        sources: Vec<Source>,
        places: Vec<Option<u32>>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), EngineError> {
        let last_row = |&segment: &usize| self.current.last_row(pass, segment);
        let rows = self.sequences.rows(pass, order);
        let mut heads = self.heads(pass, &questions.heads);
        self.add_verified(pass, &questions.verified, &mut heads);
        let work = Work {
            sources,
            coda: rows.range(self.exit_depths.clone()),
            places,
            heads,
            gates: questions.gates.iter().map(last_row).collect(),
            compared: questions.compared.iter().map(|(segment, kept)| (last_row(segment), *kept)).collect(),
            diverging: self.diverging(pass, questions),
            rows,
        };
        let answers = self.backend.run_beside(&work, meanwhile)?;
        self.take_answers(pass, questions, answers)
    }

    /// The distributions to compare. A slot has two places: what is served of its sequence, and what is looked ahead.
    fn diverging(&self, pass: &Pass<'_>, questions: &Questions) -> Vec<Diverging> {
        let of_segment = |&index: &usize| {
            let segment = &pass.segments[index];
            let served = 2 * segment.slot;
            let ahead = served + u32::from(self.current.is_ahead);
            let head = questions.heads.iter().position(|&head| head == index);
            Diverging {
                head: head.expect("distributions that are compared need the head"),
                before: match segment.depth {
                    0 => None,
                    1 => Some(served),
                    _ => Some(ahead),
                },
                place: ahead,
            }
        };
        questions.diverging.iter().map(of_segment).collect()
    }

    /// Sets the index of each segment's rows among those of the pass.
    fn place_rows(&mut self, pass: &Pass<'_>, order: &[usize]) {
        self.current.first_rows.resize(pass.segments.len(), 0);
        self.current.findings.clear();
        self.current.findings.resize(pass.segments.len(), Finding::NOTHING);
        let mut rows = 0;
        for &segment in order {
            self.current.first_rows[segment] = rows;
            rows += pass.segments[segment].tokens as usize;
        }
    }

    fn sources(&self, pass: &Pass<'_>, order: &[usize]) -> Vec<Source> {
        let of_segment = |&index: &usize| {
            let segment = &pass.segments[index];
            let sequence = self.sequences.of(segment);
            positions(segment).map(|position| match sequence.in_flight[position] {
                Some(row) => Source::Second(row),
                None => Source::First(sequence.generation.token_at(position)),
            })
        };
        order.iter().flat_map(of_segment).collect()
    }

    /// What is requested of the segments' last rows: signals for the scheduler, and what is recorded.
    fn questions(&self, pass: &Pass<'_>, exiting: Option<&[u32]>) -> Questions {
        let indices = |asked: &dyn Fn(usize) -> bool| {
            by_depth(pass, (0..pass.segments.len()).filter(|&index| asked(index)).collect())
        };
        let segments = |asked: &dyn Fn(&Segment) -> bool| indices(&|index| asked(&pass.segments[index]));
        let recorded = |segment: &Segment| self.recording && segment.predicts;
        let reads_for = |measure| {
            move |segment: &Segment| pass.reads.signal == SignalRead::Signal(measure) && pass.reads_signal(segment)
        };
        let gate = |segment: &Segment| {
            let is_read = reads_for(ExitSignal::Gate)(segment) || (recorded(segment) && self.model.config().gate);
            is_read && usize::from(segment.depth) + 1 < self.num_loops()
        };
        let compares = |segment: &Segment| {
            [ExitSignal::Similarity, ExitSignal::Difference].into_iter().any(|signal| reads_for(signal)(segment))
        };
        let compared = segments(&|segment| compares(segment) || recorded(segment));
        let kept = |index: usize| {
            let segment = &pass.segments[index];
            Some((index, self.sequences.of(segment).in_flight[last_position(segment)]?))
        };
        let known = exiting.unwrap_or_default();
        let ahead_from = self.model.heads_ahead_from().filter(|_| exiting.is_none() && !self.exits_wait);
        let all_heads = ahead_from.is_some_and(|rows| pass.work.signal_rows as usize >= rows);
        Questions {
            heads: indices(&|index| {
                let segment = &pass.segments[index];
                let exits = || known.binary_search(&(index as u32)).is_ok() || self.surely_exits(pass, segment);
                pass.runs_head(segment) || recorded(segment) || exits() || (all_heads && segment.predicts)
            }),
            gates: segments(&gate),
            compared: compared.into_iter().filter_map(kept).collect(),
            diverging: segments(&|segment| reads_for(ExitSignal::Kl)(segment) || recorded(segment)),
            verified: self.verified(pass),
        }
    }

    /// Whether a segment's last row certainly exits after this pass, so that its head can run within the pass.
    fn surely_exits(&self, pass: &Pass<'_>, segment: &Segment) -> bool {
        let exits = match pass.reads.signal {
            SignalRead::None => {
                let depth = self.exit.known_depth(self.sequences.of(segment).request, self.num_loops() as u8);
                depth.is_some_and(|depth| segment.depth >= depth)
                    || usize::from(segment.depth) + 1 == self.exit_depths.end
            }
            SignalRead::Oracle => self.oracle_exits(segment).unwrap_or(false),
            // Where exits are not known yet, the head runs for all of these rows together, afterwards.
            SignalRead::Signal(_) | SignalRead::Repeats => false,
        };
        segment.predicts && exits && !self.exits_wait
    }

    /// Takes arena rows for the hidden states of rows that may continue to the next depth, and frees those of the
    /// others.
    fn places(&mut self, pass: &Pass<'_>) -> Result<Vec<Option<u32>>, EngineError> {
        let rows = pass.num_rows() as usize;
        self.arena.reserve(&mut *self.backend, rows)?;
        let mut places = vec![None; rows];
        let last_depth = self.num_loops() - 1;
        for (segment, &first_row) in pass.segments.iter().zip(&self.current.first_rows) {
            for (position, place) in positions(segment).zip(&mut places[first_row..]) {
                let predicts = segment.predicts && position == last_position(segment);
                let goes_on = usize::from(segment.depth) < last_depth && self.sequences.goes_on(segment, position);
                let is_kept = goes_on || self.exits_wait && predicts;
                let kept = &mut self.sequences.of_mut(segment).in_flight[position];
                if !is_kept {
                    self.arena.free.extend(kept.take());
                } else {
                    *kept = kept.or_else(|| self.arena.free.pop());
                    *place = *kept;
                }
            }
        }
        Ok(places)
    }

    /// Rows of the head: the last rows of `segments`, which are sorted by depth.
    fn heads(&self, pass: &Pass<'_>, segments: &[usize]) -> Heads {
        self.heads_of(pass, segments, |segment| self.current.last_row(pass, segment))
    }

    /// As [`heads`](Self::heads), as rows in flight.
    fn kept_heads(&self, pass: &Pass<'_>, segments: &[usize]) -> Heads {
        self.heads_of(pass, segments, |segment| {
            let segment = pass.exited(segment);
            let kept = self.sequences.of(segment).in_flight[last_position(segment)];
            kept.expect("a row is kept until its head has run") as usize
        })
    }

    fn heads_of(&self, pass: &Pass<'_>, segments: &[usize], row: impl Fn(usize) -> usize) -> Heads {
        let key = |&segment: &usize| {
            let sequence = self.sequences.of(pass.exited(segment));
            self.sampling.key(sequence.request, sequence.generation.tokens.len())
        };
        Heads {
            rows: segments.iter().map(|&segment| row(segment)).collect(),
            keys: segments.iter().map(key).collect(),
            temperature: self.sampling.temperature,
        }
    }

    fn take_answers(&mut self, pass: &Pass<'_>, asked: &Questions, mut answers: Answers) -> Result<(), EngineError> {
        let mut of_drafts = answers.verdicts.split_off(asked.heads.len()).into_iter();
        let of_segment =
            |&index: &usize| (index, of_drafts.by_ref().take(pass.segments[index].tokens as usize).collect());
        self.current.verified = asked.verified.iter().map(of_segment).collect();
        self.take_verdicts(pass, &asked.heads, answers.verdicts)?;
        let findings = &mut self.current.findings;
        asked.gates.iter().zip(answers.gates).for_each(|(&segment, gate)| findings[segment].gate = gate);
        for (&(segment, _), change) in asked.compared.iter().zip(answers.changes) {
            findings[segment].change = change;
        }
        asked.diverging.iter().zip(answers.divergences).for_each(|(&segment, kl)| findings[segment].kl = kl);
        Ok(())
    }

    fn take_verdicts(
        &mut self,
        pass: &Pass<'_>,
        segments: &[usize],
        verdicts: Vec<Verdict>,
    ) -> Result<(), EngineError> {
        for (&index, verdict) in segments.iter().zip(verdicts) {
            let segment = pass.exited(index);
            if !verdict.top1.is_finite() {
                let Sequence { request, generation, .. } = self.sequences.of(segment);
                let (request, token, depth) = (*request, generation.tokens.len(), segment.depth);
                return Err(EngineError::NotFinite { request, token, depth });
            }
            self.current.findings[index].verdict = Some(verdict);
        }
        Ok(())
    }

    /// Sets the exit signals that the pass reads.
    fn read_signals(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<(), EngineError> {
        for (index, segment) in pass.segments.iter().enumerate().filter(|(_, segment)| segment.predicts) {
            self.sequences.of_mut(segment).signal = None;
            if !pass.reads_signal(segment) {
                continue;
            }
            if let Some(value) = self.scripted(pass.reads.signal, segment)? {
                signals[index] = value;
                self.sequences.of_mut(segment).signal = Some(value);
                continue;
            }
            let Finding { verdict, gate, change, kl } = self.current.findings[index];
            signals[index] = match pass.reads.signal {
                SignalRead::None => continue,
                SignalRead::Oracle => f32::from(u8::from(self.oracle_exits(segment)?)),
                SignalRead::Signal(ExitSignal::Similarity) => change.similarity,
                SignalRead::Signal(ExitSignal::Difference) => change.difference,
                SignalRead::Signal(ExitSignal::Gate) => gate,
                SignalRead::Signal(ExitSignal::Kl) => kl,
                SignalRead::Signal(signal @ (ExitSignal::Top1 | ExitSignal::Margin | ExitSignal::Entropy)) => {
                    verdict.expect("signals that need the head ask for it").signals().get(signal)
                }
                SignalRead::Repeats => {
                    let token = verdict.expect("predictions that are compared need the head").token;
                    let before = self.sequences.of_mut(segment).predicted.replace(token);
                    f32::from(u8::from(segment.depth > 0 && before == Some(token)))
                }
            };
            self.sequences.of_mut(segment).signal = Some(signals[index]);
        }
        Ok(())
    }

    /// What the script has in place of a signal; `None` without a script.
    fn scripted(&self, read: SignalRead, segment: &Segment) -> Result<Option<f32>, EngineError> {
        let Some(script) = &self.script else { return Ok(None) };
        let Sequence { request, generation, .. } = self.sequences.of(segment);
        let (request, token) = (*request, generation.tokens.len());
        match script.read(read, request, token, segment.depth.into()) {
            None => Err(EngineError::NotInScript { request, token }),
            value => Ok(value),
        }
    }

    fn oracle_exits(&self, segment: &Segment) -> Result<bool, EngineError> {
        if let Some(exits) = self.scripted(SignalRead::Oracle, segment)? {
            return Ok(exits > 0.0);
        }
        let Sequence { request, generation, .. } = self.sequences.of(segment);
        let token = generation.tokens.len();
        let exit = match &self.oracle {
            Some(Oracle::Known(exits)) => exits.get(request).and_then(|exits| exits.get(token)).copied(),
            Some(Oracle::Ahead) => Some(self.earliest_final_depth(generation)),
            &Some(Oracle::Chance { seed, probability }) => Some(self.drawn_depth(seed, probability, *request, token)),
            None => None,
        };
        match exit {
            Some(exit) => Ok(segment.depth >= exit),
            None => Err(EngineError::NoExit { request: *request, token }),
        }
    }

    /// Records signals and predictions of all rows that predict.
    fn record(&mut self, pass: &Pass<'_>) {
        let (num_loops, has_gates) = (self.num_loops(), self.model.config().gate);
        let segments = pass.segments.iter().zip(&self.current.findings);
        for (segment, &Finding { verdict, gate, change, kl }) in segments.filter(|(segment, _)| segment.predicts) {
            let verdict = verdict.expect("a recording executor reads the head of all that predict");
            let generation = &mut self.sequences.of_mut(segment).generation;
            let entry = generation.tokens.len() * num_loops + usize::from(segment.depth);
            generation.recorded.resize(entry, (Signals::default(), 0));
            let gate = if has_gates { gate } else { 0.0 };
            let Change { similarity, difference } = change;
            let signals = Signals { similarity, difference, kl, gate, ..verdict.signals() };
            generation.recorded.push((signals, verdict.token));
        }
    }

    fn run_pass(
        &mut self,
        pass: &Pass<'_>,
        exiting: Option<&[u32]>,
        signals: &mut [f32],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), EngineError> {
        self.run_rows(pass, exiting, meanwhile)?;
        if self.looking_ahead {
            self.look_ahead(pass)?;
        } else if self.recording {
            self.record(pass);
        }
        self.verify(pass, signals)?;
        self.read_signals(pass, signals)
    }

    /// Runs the head for exiting rows that have not run it.
    fn read_unread(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<(), EngineError> {
        self.current.findings.resize(pass.segments.len() + pass.late.len(), Finding::NOTHING);
        let exiting = exiting.iter().map(|&index| index as usize);
        let unread = exiting.filter(|&index| self.current.findings[index].verdict.is_none()).collect();
        let unread = by_depth(pass, unread);
        if unread.is_empty() {
            return Ok(());
        }
        let rows = self.sequences.last_rows(pass, &unread);
        let verdicts = match pass.late {
            [] => self.backend.read_head(&rows, &self.heads(pass, &unread))?,
            _ => self.backend.read_head_of_kept(&rows, &self.kept_heads(pass, &unread))?,
        };
        self.take_verdicts(pass, &unread, verdicts)
    }

    /// Chooses the tokens of exiting rows whose requests choose by rules of their own: from the logits of those rows.
    fn choose_tokens(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<(), EngineError> {
        let reads_logits = |&index: &usize| {
            let Sequence { generation, decoding, .. } = self.sequences.of(pass.exited(index));
            decoding.as_ref().is_some_and(|decoding| decoding.reads_logits(generation.tokens.len()))
        };
        let choosing = by_depth(pass, exiting.iter().map(|&index| index as usize).filter(reads_logits).collect());
        if choosing.is_empty() {
            return Ok(());
        }
        let rows = self.sequences.last_rows(pass, &choosing);
        let picks: Vec<usize> = choosing.iter().map(|&segment| self.current.last_row(pass, segment)).collect();
        let logits = self.backend.logits(&rows, &picks)?;
        for (&index, logits) in choosing.iter().zip(logits) {
            let Sequence { generation, decoding, .. } = self.sequences.of_mut(pass.exited(index));
            let Some(decoding) = decoding else { continue };
            let chosen = decoding.choose(&logits, generation.tokens.len());
            let verdict = self.current.findings[index].verdict.as_mut().expect("the head was read before");
            verdict.token = chosen.token;
            if decoding.alternatives.is_some() {
                generation.chosen.push(chosen);
            }
        }
        Ok(())
    }

    fn emit_tokens(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<(), EngineError> {
        self.read_unread(pass, exiting)?;
        self.choose_tokens(pass, exiting)?;
        let mut fills = Vec::new();
        let Sequences { kv_fill, num_loops, .. } = self.sequences;
        let in_service = self.sequences.settings.is_none_or(|settings| settings.fills_deeper());
        let fills_deeper = self.looking_ahead || in_service;
        let fills_prompts = self.sequences.fills_prompts();
        let copied_depths = self.sequences.copied_depths();
        for &index in exiting {
            let segment = pass.exited(index as usize);
            let depth = usize::from(segment.depth);
            let verdict = self.current.findings[index as usize].verdict.expect("the head was read above");
            let leaves_draft = self.leaves_draft(segment);
            let sequence = self.sequences.of_mut(segment);
            sequence.generation.tokens.push(verdict.token);
            sequence.generation.exit_depths.push(segment.depth);
            sequence.generation.exit_signals.push(sequence.signal.take());
            if !leaves_draft {
                sequence.certain = sequence.generation.tokens.len();
            }
            let position = last_position(segment);
            let is_done = match kv_fill {
                KvFill::First => !leaves_draft,
                KvFill::Backfill => !fills_deeper,
                KvFill::Reuse | KvFill::Skip | KvFill::Last | KvFill::Cycle(_) => {
                    segment.kind == RowKind::Decode || depth >= sequence.prompt_depth && !sequence.runs_again
                }
            };
            if is_done || depth + 1 == num_loops {
                self.arena.free.extend(sequence.in_flight[position].take());
            }
            let depth = match segment.generated {
                true => depth,
                false if fills_prompts && depth >= sequence.prompt_depth => depth,
                // The row still runs on to that depth. The look-ahead of the next token reads these entries before it does.
                false if fills_prompts && self.looking_ahead => sequence.prompt_depth,
                false => continue,
            };
            match kv_fill {
                KvFill::Reuse | KvFill::Cycle(_) if fills_deeper && depth + 1 < copied_depths => {
                    let block_tokens = self.block_tokens;
                    let block = pass.blocks(segment.slot)[position / block_tokens];
                    fills.push(Fill { block, offset: position % block_tokens, depth });
                }
                KvFill::Skip => {
                    sequence.skipped[depth + 1..].iter_mut().for_each(|of_depth| of_depth.push(position as u32))
                }
                _ => {}
            }
        }
        Ok(self.backend.fill_deeper(&fills)?)
    }
}

impl Executor for EngineExecutor {
    type Error = EngineError;
    const RUNS_BESIDE: bool = true;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), EngineError> {
        self.check_request(request)?;
        // Also what a request had that lost its slot before its first token.
        let before = self.generations.remove(&request.id);
        let mut generation = match generated {
            0 => Generation { prompt: self.prompt(request)?, ..Generation::default() },
            _ => before.unwrap_or_default(),
        };
        assert_eq!(generation.tokens.len(), generated as usize, "a preempted request goes on where it was");
        generation.recorded.truncate(generated as usize * self.num_loops());
        self.occupy(slot, request.id, generation, request.context_tokens());
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        let mut sequence = std::mem::take(&mut self.sequences.by_slot[slot as usize]);
        if self.exit.speculates() {
            sequence.generation.take_back(sequence.certain);
        }
        self.arena.free.extend(sequence.in_flight.into_iter().flatten());
        if !sequence.is_forgotten {
            self.generations.insert(sequence.request, sequence.generation);
        }
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, EngineError> {
        let start = Instant::now();
        in_pool(|| self.run_pass(pass, None, signals, &mut || ()))?;
        Ok(start.elapsed().into())
    }

    fn run_beside(
        &mut self,
        pass: &Pass<'_>,
        exiting: &[u32],
        signals: &mut [f32],
        meanwhile: &mut (dyn FnMut() + Send),
    ) -> Result<Nanos, EngineError> {
        let start = Instant::now();
        in_pool(|| {
            self.run_pass(pass, Some(exiting), signals, meanwhile)?;
            self.emit_tokens(pass, exiting)
        })?;
        Ok(start.elapsed().into())
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, EngineError> {
        let start = Instant::now();
        in_pool(|| self.emit_tokens(pass, exiting))?;
        Ok(start.elapsed().into())
    }

    fn device_pass(&self) -> Option<DevicePass> {
        self.backend.device_pass()
    }
}

/// Runs `work` on a thread of the pool, so that kernels start parallel work without waking a thread. It costs nothing
/// for a caller in the pool, so code that runs many passes calls it once around them.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

/// Positions of a segment's rows.
fn positions(segment: &Segment) -> Range<usize> {
    let start = segment.start as usize;
    start..start + segment.tokens as usize
}

/// Position of a segment's last row.
fn last_position(segment: &Segment) -> usize {
    positions(segment).end - 1
}

/// `segments`, indices into those of the pass, sorted by depth.
fn by_depth(pass: &Pass<'_>, mut segments: Vec<usize>) -> Vec<usize> {
    segments.sort_by_key(|&index| pass.exited(index).depth);
    segments
}
