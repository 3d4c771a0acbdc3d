//! The scheduler's executor that runs the model and reads the clock.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use scheduler::{Executor, ExitPolicy, KvFill, Look, Pass, RowKind, Segment, Slot};
use traces::{Measure, Nanos, Request, Signals};

use crate::cache::{CacheError, KvCache};
use crate::kernels::attention::{Fill, Row, fill_deeper};
use crate::kernels::rows::{Source, cosines, gather, scatter};
use crate::kernels::signals::{Verdict, mix};
use crate::model::{Model, Rows};
use crate::prompts::{PromptError, Prompts};

/// Why the engine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A prompt is not to be had.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The cache cannot be made.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A sequence would be longer than the model's positions or the cache.
    #[error("request {request} needs {needed} positions, {holder} has {available}")]
    TooLong {
        /// The request.
        request: u32,
        /// Positions it takes: prompt and output, less the last token.
        needed: u64,
        /// What is too small: the model or the KV cache.
        holder: &'static str,
        /// Positions there.
        available: u64,
    },
    /// The oracle does not know a token's exit depth.
    #[error(
        "the oracle has no exit depth for token {token} of request {request}: record the requests that are replayed"
    )]
    NoExit {
        /// The request.
        request: u32,
        /// Which of its tokens.
        token: usize,
    },
    /// The model gave something that is not a number.
    #[error("the logits of request {request}, token {token} at depth {depth} are not finite")]
    NotFinite {
        /// The request.
        request: u32,
        /// Which of its tokens.
        token: usize,
        /// The depth.
        depth: u8,
    },
}

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Seed of the dice above 0. The dice of a token depend on seed, request and token alone.
    pub seed: u64,
}

impl Sampling {
    /// The key of one token's dice.
    pub fn key(&self, request: u32, token: usize) -> u64 {
        mix(self.seed ^ mix((u64::from(request) << 32) | token as u64))
    }
}

/// What a request was given and has generated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Ids of the prompt.
    pub prompt: Vec<u32>,
    /// Ids generated.
    pub tokens: Vec<u32>,
    /// The depth each of them left at.
    pub exit_depths: Vec<u8>,
    /// Of a recording executor: signals and the token predicted, entry `token * num_loops + depth`; zero at depths
    /// that a token never ran.
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

    /// The depth at which the row at a position left, if that is beyond the prompt and has.
    fn left(&self, position: usize) -> Option<u8> {
        let after_prompt = position.checked_sub(self.prompt.len())?;
        self.exit_depths.get(after_prompt + 1).copied()
    }
}

/// Exit depths of generated tokens by request: what the oracle knows.
pub type ExitDepths = HashMap<u32, Vec<u8>>;

/// A sequence that holds a slot.
#[derive(Debug, Default)]
struct Sequence {
    request: u32,
    generation: Generation,
    /// The arena row of each position that is between two depths, or under [`KvFill::Backfill`] has left early.
    in_flight: Vec<Option<u32>>,
    /// Under [`KvFill::Skip`], by depth the positions that left no keys and values there.
    skipped: Vec<Vec<u32>>,
}

impl Sequence {
    fn skipped(&self, depth: usize) -> &[u32] {
        self.skipped.get(depth).map_or(&[], Vec::as_slice)
    }
}

/// Hidden states of rows between two passes, `[capacity, hidden]`.
#[derive(Debug)]
struct Arena {
    hidden: Tensor,
    free: Vec<u32>,
}

impl Arena {
    fn new(width: usize, device: &Device) -> candle_core::Result<Self> {
        Ok(Self { hidden: Tensor::zeros((1, width), DType::F32, device)?, free: vec![0] })
    }

    /// Makes sure that `rows` more rows can be taken.
    fn reserve(&mut self, rows: usize) -> candle_core::Result<()> {
        if self.free.len() < rows {
            let (capacity, width) = self.hidden.dims2()?;
            let more = rows.max(capacity);
            let zeros = Tensor::zeros((more, width), DType::F32, self.hidden.device())?;
            self.hidden = Tensor::cat(&[&self.hidden, &zeros], 0)?;
            self.free.extend((capacity..capacity + more).map(|row| row as u32));
        }
        Ok(())
    }
}

/// The rows of the pass at hand, in the order in which they run: by depth.
#[derive(Debug, Default)]
struct Current {
    /// Hidden states after the pass.
    hidden: Option<Tensor>,
    /// What the head reads of them: the rows from `first_exit` on, which have run the coda.
    exits: Option<Tensor>,
    first_exit: usize,
    /// By segment, the place of its first row.
    first_rows: Vec<usize>,
    /// By segment, what the head says of its last row, where that was asked for.
    verdicts: Vec<Option<Verdict>>,
}

impl Current {
    fn last_row(&self, pass: &Pass<'_>, segment: usize) -> usize {
        self.first_rows[segment] + pass.segments[segment].tokens as usize - 1
    }
}

/// Runs passes on the model.
///
/// It keeps what every request generated, also after that has left its slot: [`EngineExecutor::generations`].
#[derive(Debug)]
pub struct EngineExecutor {
    model: Arc<Model>,
    kv_fill: KvFill,
    cache: KvCache,
    prompts: Arc<Prompts>,
    sampling: Sampling,
    oracle: Option<Arc<ExitDepths>>,
    recording: bool,
    /// Depths at which a row may leave or be looked at, so that its coda is needed there.
    exit_depths: Range<usize>,
    arena: Arena,
    sequences: Vec<Sequence>,
    current: Current,
    generations: HashMap<u32, Generation>,
    head_time: Duration,
}

impl EngineExecutor {
    /// An executor with an empty cache of `num_blocks` blocks of `block_tokens` positions, whose tokens that leave early
    /// leave `kv_fill` behind at the depths they skip.
    ///
    /// # Errors
    /// If the cache cannot be made.
    pub fn new(
        model: Arc<Model>,
        prompts: Arc<Prompts>,
        sampling: Sampling,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
    ) -> Result<Self, EngineError> {
        let cache = KvCache::new(model.config(), kv_fill, num_blocks, block_tokens, &Device::Cpu)?;
        let arena = Arena::new(model.config().hidden_size, &Device::Cpu)?;
        Ok(Self {
            exit_depths: 0..model.config().num_loops,
            model,
            kv_fill,
            cache,
            prompts,
            sampling,
            oracle: None,
            recording: false,
            arena,
            sequences: Vec::new(),
            current: Current::default(),
            generations: HashMap::new(),
            head_time: Duration::ZERO,
        })
    }

    /// Answers the oracle's looks: a token leaves at the depth given here.
    pub fn with_oracle(mut self, exits: Arc<ExitDepths>) -> Self {
        self.oracle = Some(exits);
        self
    }

    /// Knows that rows leave by this policy only, and runs no coda where none can and nobody reads its keys and values.
    pub fn leaving_by(mut self, exit: ExitPolicy) -> Self {
        let num_loops = self.num_loops();
        self.exit_depths = match exit {
            ExitPolicy::None => num_loops - 1..num_loops,
            ExitPolicy::Static(depth) => usize::from(depth)..usize::from(depth) + 1,
            ExitPolicy::Oracle { .. } | ExitPolicy::Confidence { .. } => 0..num_loops,
        };
        if self.kv_fill == KvFill::First {
            self.exit_depths.start = 0;
        }
        self
    }

    /// Keeps the signals and predictions of every generated token at every depth that it runs.
    pub fn recording(mut self) -> Self {
        self.recording = true;
        self.exit_depths = 0..self.num_loops();
        self
    }

    /// What each request, by id, was given and generated; of those that hold a slot, only what they had when they
    /// last lost one.
    pub fn generations(&self) -> &HashMap<u32, Generation> {
        &self.generations
    }

    /// What a request, by id, was given and has generated so far.
    pub fn generation(&self, request: u32) -> Option<&Generation> {
        let holds_slot = |sequence: &&Sequence| sequence.request == request && !sequence.generation.prompt.is_empty();
        let in_slot = || self.sequences.iter().find(holds_slot).map(|sequence| &sequence.generation);
        self.generations.get(&request).or_else(in_slot)
    }

    /// The same, when the run is over.
    pub fn into_generations(self) -> HashMap<u32, Generation> {
        self.generations
    }

    /// What the exit head has taken so far, of the time of all passes.
    pub fn head_time(&self) -> Duration {
        self.head_time
    }

    /// Hands over what a request was given and generated, once that is so many tokens.
    pub(crate) fn take_finished(&mut self, request: &Request) -> Option<Generation> {
        let generation = self.generations.get(&request.id)?;
        match generation.tokens.len() == request.output_tokens as usize {
            true => self.generations.remove(&request.id),
            false => None,
        }
    }

    /// The KV cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Puts a sequence of up to `context_tokens` positions into a slot, in place of what is there.
    pub(crate) fn occupy(&mut self, slot: Slot, request: u32, generation: Generation, context_tokens: u32) {
        let slot = slot as usize;
        if self.sequences.len() <= slot {
            self.sequences.resize_with(slot + 1, Sequence::default);
        }
        let in_flight = vec![None; context_tokens as usize];
        let skipped = self.skipped_positions(&generation);
        let before = std::mem::replace(&mut self.sequences[slot], Sequence { request, generation, in_flight, skipped });
        self.arena.free.extend(before.in_flight.into_iter().flatten());
    }

    /// By depth, the positions that left no keys and values there.
    fn skipped_positions(&self, generation: &Generation) -> Vec<Vec<u32>> {
        if self.kv_fill != KvFill::Skip {
            return Vec::new();
        }
        let generated = generation.prompt.len()..generation.prompt.len() + generation.tokens.len();
        let of_depth = |depth| {
            let skips = |&position: &usize| generation.left(position).is_some_and(|left| usize::from(left) < depth);
            generated.clone().filter(skips).map(|position| position as u32).collect()
        };
        (0..self.num_loops()).map(of_depth).collect()
    }

    fn num_loops(&self) -> usize {
        self.model.config().num_loops
    }

    /// Checks that a request fits the model's positions and the cache.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_request(&self, request: &Request) -> Result<(), EngineError> {
        let needed = u64::from(request.prompt_tokens) + u64::from(request.output_tokens) - 1;
        let holders =
            [("the model", self.model.config().max_positions as u64), ("the KV cache", self.cache.capacity_tokens())];
        match holders.into_iter().find(|(_, available)| needed > *available) {
            None => Ok(()),
            Some((holder, available)) => Err(EngineError::TooLong { request: request.id, needed, holder, available }),
        }
    }

    /// Collects the rows of a pass, runs them through the block and keeps what goes on.
    fn run_block(&mut self, pass: &Pass<'_>) -> Result<(), EngineError> {
        let mut order: Vec<usize> = (0..pass.segments.len()).collect();
        order.sort_by_key(|&index| pass.segments[index].depth);
        let (mut rows, mut sources) = (Rows::default(), Vec::new());
        let mut first_rows = vec![0; pass.segments.len()];
        for &index in &order {
            first_rows[index] = rows.len();
            self.push_rows(pass, &pass.segments[index], &mut rows, &mut sources);
        }
        let hidden = self.model.embed(&self.arena.hidden, &sources, &rows, &self.cache)?;
        self.model.forward_block(&hidden, &rows, &self.cache)?;
        (self.current.exits, self.current.first_exit) = self.run_coda(&hidden, &rows)?;
        self.current.first_rows = first_rows;
        self.current.hidden = Some(hidden);
        Ok(())
    }

    /// Runs the coda for the rows of a pass that may leave; gives them, if there are any, and the first one's place.
    fn run_coda(&self, hidden: &Tensor, rows: &Rows<'_>) -> Result<(Option<Tensor>, usize), EngineError> {
        if self.model.config().coda_layers == 0 {
            return Ok((Some(hidden.clone()), 0));
        }
        let range = rows.range(self.exit_depths.clone());
        if range.is_empty() {
            return Ok((None, 0));
        }
        let leaving = hidden.narrow(0, range.start, range.len())?;
        let exits = self.model.forward_coda(&leaving, &rows.part(range.clone()), &self.cache)?;
        Ok((Some(exits), range.start))
    }

    fn push_rows<'a>(&'a self, pass: &Pass<'a>, segment: &Segment, rows: &mut Rows<'a>, sources: &mut Vec<Source>) {
        let sequence = &self.sequences[segment.slot as usize];
        for position in positions(segment) {
            sources.push(match sequence.in_flight[position] {
                Some(row) => Source::Second(row),
                None => Source::First(sequence.generation.token_at(position)),
            });
            rows.push(self.row(pass, segment, position));
        }
    }

    /// The row at a position of a segment.
    fn row<'a>(&'a self, pass: &Pass<'a>, segment: &Segment, position: usize) -> Row<'a> {
        let (sequence, depth) = (&self.sequences[segment.slot as usize], usize::from(segment.depth));
        Row {
            position,
            depth,
            fills: self.fills(&sequence.generation, position, depth),
            skipped: sequence.skipped(depth),
            blocks: pass.blocks(segment.slot),
        }
    }

    /// The depths at which a row leaves its keys and values. A generated token that comes again after a preemption gets
    /// the KV fill it had, which is exact below the depth at which it left only under [`KvFill::Backfill`].
    fn fills(&self, generation: &Generation, position: usize, depth: usize) -> Range<usize> {
        let (own, none) = (depth..depth + 1, depth..depth);
        match (self.kv_fill, generation.left(position).map(usize::from)) {
            (KvFill::First, _) if depth > 0 => none,
            (KvFill::First | KvFill::Backfill, _) | (_, None) => own,
            (KvFill::Reuse | KvFill::Skip, Some(left)) if left < depth => none,
            (KvFill::Reuse, Some(left)) if left == depth => depth..self.num_loops(),
            (KvFill::Reuse | KvFill::Skip, Some(_)) => own,
        }
    }

    /// Keeps the hidden states of rows that may go on to the next depth.
    fn keep_hidden(&mut self, pass: &Pass<'_>, hidden: &Tensor) -> Result<(), EngineError> {
        self.arena.reserve(hidden.dim(0)?)?;
        let mut places = vec![None; hidden.dim(0)?];
        let last_depth = self.num_loops() - 1;
        for (segment, &first_row) in pass.segments.iter().zip(&self.current.first_rows) {
            let in_flight = &mut self.sequences[segment.slot as usize].in_flight;
            for (position, place) in positions(segment).zip(&mut places[first_row..]) {
                let kept = &mut in_flight[position];
                if usize::from(segment.depth) == last_depth {
                    self.arena.free.extend(kept.take());
                } else {
                    *kept = kept.or_else(|| self.arena.free.pop());
                    *place = *kept;
                }
            }
        }
        Ok(scatter(&self.arena.hidden, hidden, &places)?)
    }

    /// The last rows of `segments`, which come by depth.
    fn last_rows<'a>(&'a self, pass: &Pass<'a>, segments: &[usize]) -> Rows<'a> {
        let mut rows = Rows::default();
        for segment in segments.iter().map(|&index| &pass.segments[index]) {
            rows.push(self.row(pass, segment, positions(segment).end - 1));
        }
        rows
    }

    /// Reads the head for the last rows of `segments`.
    fn read_head(&mut self, pass: &Pass<'_>, segments: &[usize]) -> Result<(), EngineError> {
        if segments.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let segments = by_depth(pass, segments);
        let exits = self.current.exits.as_ref().expect("a row leaves only where the coda has run");
        let first = self.current.first_exit;
        let row = |&segment: &usize| Source::First((self.current.last_row(pass, segment) - first) as u32);
        let sources: Vec<Source> = segments.iter().map(row).collect();
        let key = |&segment: &usize| {
            let sequence = &self.sequences[pass.segments[segment].slot as usize];
            self.sampling.key(sequence.request, sequence.generation.tokens.len())
        };
        let keys: Vec<u64> = segments.iter().map(key).collect();
        let rows = self.last_rows(pass, &segments);
        let exits = gather(exits, exits, &sources)?;
        let verdicts = self.model.verdicts(&exits, &rows, &self.cache, self.sampling.temperature, &keys)?;
        for (segment, verdict) in segments.into_iter().zip(verdicts) {
            if !verdict.top1.is_finite() {
                let Segment { slot, depth, .. } = pass.segments[segment];
                let sequence = &self.sequences[slot as usize];
                let (request, token) = (sequence.request, sequence.generation.tokens.len());
                return Err(EngineError::NotFinite { request, token, depth });
            }
            self.current.verdicts[segment] = Some(verdict);
        }
        self.head_time += start.elapsed();
        Ok(())
    }

    /// The gate's score of the last row of each of `segments`; 1 at the last depth.
    fn gates(&self, pass: &Pass<'_>, hidden: &Tensor, segments: &[usize]) -> Result<Vec<f32>, EngineError> {
        let mut scores = vec![1.0; segments.len()];
        let last_depth = self.num_loops() - 1;
        let depth = |index: usize| usize::from(pass.segments[segments[index]].depth);
        let mut asked: Vec<usize> = (0..segments.len()).filter(|&index| depth(index) < last_depth).collect();
        if asked.is_empty() {
            return Ok(scores);
        }
        asked.sort_by_key(|&index| depth(index));
        let asked_segments: Vec<usize> = asked.iter().map(|&index| segments[index]).collect();
        let row = |&segment: &usize| Source::First(self.current.last_row(pass, segment) as u32);
        let sources: Vec<Source> = asked_segments.iter().map(row).collect();
        let rows = self.last_rows(pass, &asked_segments);
        let found = self.model.gate_scores(&gather(hidden, hidden, &sources)?, &rows)?.to_vec1::<f32>()?;
        asked.iter().zip(found).for_each(|(&index, score)| scores[index] = score);
        Ok(scores)
    }

    /// How similar the last row of each of `segments` is to what it was a depth ago; 0 at depth 0.
    fn similarities(&self, pass: &Pass<'_>, hidden: &Tensor, segments: &[usize]) -> Result<Vec<f32>, EngineError> {
        let kept = |&segment: &usize| {
            let Segment { slot, start, tokens, .. } = pass.segments[segment];
            self.sequences[slot as usize].in_flight[(start + tokens - 1) as usize]
        };
        let before: Vec<Option<u32>> = segments.iter().map(kept).collect();
        let row = |&segment: &usize| Source::First(self.current.last_row(pass, segment) as u32);
        let after: Vec<Source> =
            segments.iter().zip(&before).filter(|(_, b)| b.is_some()).map(|(s, _)| row(s)).collect();
        if after.is_empty() {
            return Ok(vec![0.0; segments.len()]);
        }
        let rows: Vec<Source> = before.iter().flatten().map(|&row| Source::Second(row)).collect();
        let after = gather(hidden, &self.arena.hidden, &after)?;
        let cosines = cosines(&gather(hidden, &self.arena.hidden, &rows)?, &after)?.to_vec1::<f32>()?;
        let mut cosines = cosines.into_iter();
        Ok(before.iter().map(|before| before.and_then(|_| cosines.next()).unwrap_or(0.0)).collect())
    }

    /// Answers the looks of a pass.
    fn look(&self, pass: &Pass<'_>, hidden: &Tensor, signals: &mut [f32]) -> Result<(), EngineError> {
        let looked: Vec<usize> =
            (0..pass.segments.len()).filter(|&index| pass.looks_at(&pass.segments[index])).collect();
        match pass.looks.signal {
            Look::Never => {}
            Look::Oracle => {
                for index in looked {
                    signals[index] = f32::from(u8::from(self.oracle_leaves(&pass.segments[index])?));
                }
            }
            Look::Measure(Measure::Similarity) => {
                for (&index, similarity) in looked.iter().zip(self.similarities(pass, hidden, &looked)?) {
                    signals[index] = similarity;
                }
            }
            Look::Measure(Measure::Gate) => {
                for (&index, score) in looked.iter().zip(self.gates(pass, hidden, &looked)?) {
                    signals[index] = score;
                }
            }
            Look::Measure(measure @ (Measure::Top1 | Measure::Margin | Measure::Entropy)) => {
                for index in looked {
                    let verdict = self.current.verdicts[index].expect("looks that need the head ask for it");
                    signals[index] = verdict.signals().get(measure);
                }
            }
        }
        Ok(())
    }

    fn oracle_leaves(&self, segment: &Segment) -> Result<bool, EngineError> {
        let Sequence { request, generation, .. } = &self.sequences[segment.slot as usize];
        let token = generation.tokens.len();
        let exits = self.oracle.as_ref().and_then(|oracle| oracle.get(request));
        match exits.and_then(|exits| exits.get(token)) {
            Some(&exit) => Ok(segment.depth >= exit),
            None => Err(EngineError::NoExit { request: *request, token }),
        }
    }

    /// Keeps signals and predictions of all rows that predict.
    fn record(&mut self, pass: &Pass<'_>, hidden: &Tensor, predicting: &[usize]) -> Result<(), EngineError> {
        let similarities = self.similarities(pass, hidden, predicting)?;
        let gates = match self.model.config().gate {
            true => self.gates(pass, hidden, predicting)?,
            false => vec![0.0; predicting.len()],
        };
        let num_loops = self.num_loops();
        for ((&index, similarity), gate) in predicting.iter().zip(similarities).zip(gates) {
            let verdict =
                self.current.verdicts[index].expect("a recording executor reads the head of all that predict");
            let segment = &pass.segments[index];
            let generation = &mut self.sequences[segment.slot as usize].generation;
            let entry = generation.tokens.len() * num_loops + usize::from(segment.depth);
            generation.recorded.resize(entry, (Signals::default(), 0));
            let signals = Signals { similarity, gate, ..verdict.signals() };
            generation.recorded.push((signals, verdict.token));
        }
        Ok(())
    }

    fn run_pass(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<(), EngineError> {
        self.current.verdicts.clear();
        self.current.verdicts.resize(pass.segments.len(), None);
        self.run_block(pass)?;
        let hidden = self.current.hidden.clone().expect("the block has run");
        let asked = |segment: &Segment| pass.runs_head(segment) || (self.recording && segment.predicts);
        let heads: Vec<usize> = (0..pass.segments.len()).filter(|&index| asked(&pass.segments[index])).collect();
        self.read_head(pass, &heads)?;
        self.look(pass, &hidden, signals)?;
        if self.recording {
            self.record(pass, &hidden, &heads)?;
        }
        self.keep_hidden(pass, &hidden)
    }

    fn emit_tokens(&mut self, pass: &Pass<'_>, leaving: &[u32]) -> Result<(), EngineError> {
        let unread = |&index: &usize| self.current.verdicts[index].is_none();
        let unread: Vec<usize> = leaving.iter().map(|&index| index as usize).filter(unread).collect();
        self.read_head(pass, &unread)?;
        let mut fills = Vec::new();
        for &index in leaving {
            let segment = &pass.segments[index as usize];
            let depth = usize::from(segment.depth);
            let verdict = self.current.verdicts[index as usize].expect("the head was read above");
            let sequence = &mut self.sequences[segment.slot as usize];
            sequence.generation.tokens.push(verdict.token);
            sequence.generation.exit_depths.push(segment.depth);
            let position = (segment.start + segment.tokens - 1) as usize;
            if segment.kind == RowKind::Decode && self.kv_fill != KvFill::Backfill {
                self.arena.free.extend(sequence.in_flight[position].take());
            }
            if position < sequence.generation.prompt.len() {
                continue;
            }
            match self.kv_fill {
                KvFill::Reuse => {
                    let block_tokens = self.cache.layout().block_tokens;
                    let block = pass.blocks(segment.slot)[position / block_tokens];
                    fills.push(Fill { block, offset: position % block_tokens, depth });
                }
                KvFill::Skip => {
                    sequence.skipped[depth + 1..].iter_mut().for_each(|of_depth| of_depth.push(position as u32))
                }
                KvFill::First | KvFill::Backfill => {}
            }
        }
        Ok(fill_deeper(&self.cache, &fills)?)
    }
}

impl Executor for EngineExecutor {
    type Error = EngineError;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), EngineError> {
        self.check_request(request)?;
        let mut generation = match generated {
            0 => Generation { prompt: self.prompts.get(request)?, ..Generation::default() },
            _ => self.generations.remove(&request.id).unwrap_or_default(),
        };
        assert_eq!(generation.tokens.len(), generated as usize, "a preempted request goes on where it was");
        generation.recorded.truncate(generated as usize * self.num_loops());
        self.occupy(slot, request.id, generation, request.context_tokens());
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        let sequence = std::mem::take(&mut self.sequences[slot as usize]);
        self.arena.free.extend(sequence.in_flight.into_iter().flatten());
        self.generations.insert(sequence.request, sequence.generation);
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, EngineError> {
        let start = Instant::now();
        in_pool(|| self.run_pass(pass, signals))?;
        Ok(start.elapsed().into())
    }

    fn emit(&mut self, pass: &Pass<'_>, leaving: &[u32]) -> Result<Nanos, EngineError> {
        let start = Instant::now();
        in_pool(|| self.emit_tokens(pass, leaving))?;
        Ok(start.elapsed().into())
    }
}

/// Runs `work` on a thread of the pool, so that kernels share work out without waking anybody first. Free for a
/// caller that is on one already: whoever runs many passes does so inside this.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

/// The positions of a segment's rows.
fn positions(segment: &Segment) -> Range<usize> {
    let start = segment.start as usize;
    start..start + segment.tokens as usize
}

/// `segments`, indices into those of the pass, sorted by depth.
fn by_depth(pass: &Pass<'_>, segments: &[usize]) -> Vec<usize> {
    let mut sorted = segments.to_vec();
    sorted.sort_by_key(|&index| pass.segments[index].depth);
    sorted
}
