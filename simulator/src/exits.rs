//! Exit model: exit signals of a request's tokens, drawn from an exit trace by whole generations.
//!
//! Easy and hard tokens come in runs. A request therefore takes the tokens of a recorded generation in order, from the
//! first one; a longer request continues with another generation.
//!
//! A trace that was recorded under exit policies has the signals that tokens have after early exits. A request then
//! follows a generation while the numbers of depths that the two have skipped are close to each other.

use std::sync::Arc;

use scheduler::{KvFill, Pass, SignalRead};
use traces::hash::mix;
use traces::{ExitSignal, ExitTrace, ExitTraceMeta, Request, SignalSet, Signals};

/// Which generations of the trace a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// Drawn by a hash of this seed and the request's id, independent of order and preemption.
    Seeded(u64),
    /// Request `i` takes generation `i`: the trace was recorded from these requests.
    Recorded,
}

/// An exit trace that does not suit the requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExitError {
    /// A trace without generations.
    #[error("the exit trace of `{0}` has no generations")]
    Empty(String),
    /// A generation without tokens, which would never end a draw.
    #[error("generation {0} of the exit trace has no tokens")]
    EmptyGeneration(usize),
    /// More loops than a pass can count.
    #[error("the exit trace is of a model with {0} loops, expected 1 to 64")]
    Loops(u32),
    /// A request without a recorded generation.
    #[error("request {request} has no generation in the exit trace, which was recorded from {generations} requests")]
    NotRecorded {
        /// Id of the request.
        request: u32,
        /// Number of recorded generations.
        generations: usize,
    },
    /// A request longer than its recorded generation.
    #[error("request {request} asks for {asked} tokens, but {recorded} were recorded of it in the exit trace")]
    TooShort {
        /// Id of the request.
        request: u32,
        /// Tokens that the request asks for.
        asked: u32,
        /// Tokens of the recorded generation.
        recorded: u32,
    },
    /// A trace whose tokens follow each other by exits that are not known yet.
    #[error("the exit trace was recorded under exit policies: which tokens follow each other depends on their exits")]
    DependsOnExits,
    /// A KV fill that the trace was recorded under, and that is none.
    #[error(
        "the exit trace was recorded under KV fill `{0}`: expected reuse, first, skip, backfill, last, or cycle:SLOTS"
    )]
    KvFill(String),
}

/// Exit signals and agreement by token and depth, and the rule that assigns tokens to requests. Clones share the
/// signals.
#[derive(Clone, Debug)]
pub struct ExitModel {
    num_loops: u8,
    fingerprint: String,
    draw: Draw,
    recorded: SignalSet,
    /// Whether tokens exit where they agree with the last depth, whichever signal is read.
    is_scripted: bool,
    /// Whether generations are recorded ones, whose lengths mean something.
    is_recorded: bool,
    /// Generation `g` consists of tokens `starts[g]..starts[g + 1]`.
    starts: Arc<[u32]>,
    /// A bit for each token and depth: whether the prediction equals that of full depth.
    agreement: Arc<[u64]>,
    /// A bit for each token and depth: whether the prediction equals that of the depth before.
    repeats: Arc<[u64]>,
    /// The values of each signal by token and depth, in the order of [`ExitSignal::ALL`]; none of a signal that the
    /// trace lacks.
    signals: [Arc<[f32]>; ExitSignal::ALL.len()],
    /// How much of their history tokens had skipped; none of a trace at full depth.
    history: Option<Arc<History>>,
}

/// What a trace that was recorded under exit policies says of the history of its tokens.
///
/// What a token predicts at a depth, and how surely, depends on the depths that earlier tokens skipped: later tokens find
/// there what the KV fill leaves. The measure is the number of depths that the earlier generated tokens of the request
/// skipped, per token. When a request has skipped more or fewer than the generation that it takes, or the generation ends,
/// it goes on at the same position of another generation, one of those whose number of skipped depths is closest.
#[derive(Debug)]
struct History {
    kv_fill: KvFill,
    prefill_depth: Option<u8>,
    /// A bit for each token and depth: whether the prediction equals that of the last depth over the same history.
    finals: Vec<u64>,
    /// By token: depths that the earlier tokens of its generation skipped.
    skipped: Vec<u32>,
    /// By token: its index in its generation.
    positions: Vec<u32>,
    /// By index in a generation: the tokens with this index, in order of the depths skipped before.
    alike: Vec<Vec<u32>>,
}

impl History {
    /// Tokens among which one is drawn.
    const NEAREST: usize = 16;
    /// Difference in skipped depths per token up to which histories are alike, and one in all for short histories.
    const PER_TOKEN: f64 = 0.125;
    const IN_ALL: f64 = 1.0;

    fn new(trace: &ExitTrace) -> Result<Option<Self>, ExitError> {
        let (Some(served), Some(recording)) = (&trace.served, &trace.meta.recording) else { return Ok(None) };
        let kv_fill = recording.kv_fill.parse().map_err(|_| ExitError::KvFill(recording.kv_fill.clone()))?;
        let (last, mut skipped, mut positions) = (trace.num_loops() as u32 - 1, Vec::new(), Vec::new());
        let mut alike: Vec<Vec<u32>> = Vec::new();
        for generation in 0..trace.num_generations() {
            let mut before = 0;
            for (position, token) in trace.generation(generation).enumerate() {
                skipped.push(before);
                positions.push(position as u32);
                before += last - served.tokens[token].exit_depth;
                if alike.len() == position {
                    alike.push(Vec::new());
                }
                alike[position].push(token as u32);
            }
        }
        alike.iter_mut().for_each(|tokens| tokens.sort_by_key(|&token| skipped[token as usize]));
        let rows = (0..trace.num_tokens()).flat_map(|token| (0..trace.num_loops()).map(move |depth| (token, depth)));
        let finals = bits(rows.map(|(token, depth)| trace.agrees_with_last(token, depth)));
        Ok(Some(Self { kv_fill, prefill_depth: recording.prefill_depth, finals, skipped, positions, alike }))
    }

    /// Whether a request that has skipped `skipped` depths in `position` tokens has a history like that of a token.
    fn is_alike(&self, token: usize, position: u32, skipped: u32) -> bool {
        let per_token = |skipped: u32, tokens: u32| f64::from(skipped) / f64::from(tokens.max(1));
        let difference = per_token(self.skipped[token], self.positions[token]) - per_token(skipped, position);
        difference.abs() <= Self::PER_TOKEN + Self::IN_ALL / f64::from(position.max(1))
    }

    /// One of the tokens at a position whose histories are most like that of a request. Beyond the longest recording, the
    /// request goes on in the middle.
    fn draw(&self, hash: u64, position: u32, skipped: u32) -> usize {
        let recorded = if (position as usize) < self.alike.len() { position as usize } else { self.alike.len() / 2 };
        let tokens = &self.alike[recorded];
        let target = (u64::from(skipped) * recorded as u64 / u64::from(position.max(1))) as u32;
        let nearest = self.nearest(tokens, target);
        nearest[scaled(hash, nearest.len() as u64) as usize] as usize
    }

    /// The tokens that skipped most nearly `target` depths, at least [`NEAREST`](Self::NEAREST) of them and all that are
    /// equally near.
    fn nearest<'a>(&self, tokens: &'a [u32], target: u32) -> &'a [u32] {
        let distance = |index: usize| self.skipped[tokens[index] as usize].abs_diff(target);
        let first = |bound: u32| tokens.partition_point(|&token| self.skipped[token as usize] < bound);
        let (mut low, mut high) = (first(target), first(target));
        let mut farthest = 0;
        while high - low < Self::NEAREST.min(tokens.len()) {
            let takes_lower = high == tokens.len() || (low > 0 && distance(low - 1) <= distance(high));
            if takes_lower {
                low -= 1;
                farthest = farthest.max(distance(low));
            } else {
                farthest = farthest.max(distance(high));
                high += 1;
            }
        }
        &tokens[first(target.saturating_sub(farthest))..first(target.saturating_add(farthest).saturating_add(1))]
    }
}

impl ExitModel {
    /// Prepares a trace for drawing.
    ///
    /// # Errors
    /// If the trace or one of its generations is empty.
    pub fn new(trace: &ExitTrace, draw: Draw) -> Result<Self, ExitError> {
        if !(1..=64).contains(&trace.meta.num_loops) {
            return Err(ExitError::Loops(trace.meta.num_loops));
        }
        if trace.num_generations() == 0 {
            return Err(ExitError::Empty(trace.meta.model.clone()));
        }
        if let Some(empty) = (0..trace.num_generations()).find(|&index| trace.generation(index).is_empty()) {
            return Err(ExitError::EmptyGeneration(empty));
        }
        let rows = || (0..trace.num_tokens()).flat_map(|token| (0..trace.num_loops()).map(move |depth| (token, depth)));
        Ok(Self {
            num_loops: trace.meta.num_loops as u8,
            fingerprint: trace.meta.fingerprint.clone(),
            draw,
            recorded: trace.recorded,
            is_scripted: false,
            is_recorded: true,
            starts: trace.starts.as_slice().into(),
            agreement: bits(rows().map(|(token, depth)| trace.agrees(token, depth))).into(),
            repeats: bits(rows().map(|(token, depth)| trace.repeats(token, depth))).into(),
            signals: ExitSignal::ALL.map(|signal| match trace.recorded.contains(signal) {
                true => trace.signals.iter().map(|signals| signals.get(signal)).collect(),
                false => [].into(),
            }),
            history: History::new(trace)?.map(Arc::new),
        })
    }

    /// The KV fill that the trace was recorded under; none if its tokens ran every depth, which no fill changes.
    pub fn kv_fill(&self) -> Option<KvFill> {
        self.history.as_ref().map(|history| history.kv_fill)
    }

    /// The last depth that tokens of prompts ran when the exits were recorded, if not all.
    pub fn prefill_depth(&self) -> Option<u8> {
        self.history.as_ref().and_then(|history| history.prefill_depth)
    }

    /// Whether a request is longer than the generation that it begins with, and therefore goes on with another one.
    pub fn is_longer_than_recorded(&self, request: &Request) -> bool {
        match self.draw {
            Draw::Recorded => false,
            Draw::Seeded(_) => self.is_recorded && request.output_tokens > self.tokens_left(&self.drawn(request.id, 0)),
        }
    }

    /// The model with another draw of its generations.
    pub fn with_draw(&self, draw: Draw) -> Self {
        Self { draw, ..self.clone() }
    }

    /// A model whose tokens exit at known depths: `depths` by generation, then by token. Under every policy that reads
    /// a signal, a token exits at its depth. From that depth on, its prediction equals that of the last depth.
    ///
    /// # Errors
    /// If there are no generations, one is empty, or `num_loops` is 0 or more than a pass can count.
    pub fn from_depths(depths: &[Vec<u8>], num_loops: u32, fingerprint: &str, draw: Draw) -> Result<Self, ExitError> {
        let mut trace = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "exit depths".to_owned(),
            fingerprint: fingerprint.to_owned(),
            num_loops: num_loops.clamp(1, 65),
            source: "no trace".to_owned(),
            recording: None,
        });
        let rows =
            |&exit: &u8| (0..num_loops).map(move |depth| (Signals::default(), u32::from(depth >= u32::from(exit))));
        for generation in depths {
            trace.push_generation(&generation.iter().flat_map(rows).collect::<Vec<_>>());
        }
        Ok(Self { is_scripted: true, is_recorded: false, ..Self::new(&trace, draw)? })
    }

    /// A model whose tokens all run every depth. No exit policy has a signal to read.
    ///
    /// # Errors
    /// If `num_loops` is 0 or more than a pass can count.
    pub fn full_depth(num_loops: u32, fingerprint: &str) -> Result<Self, ExitError> {
        let mut trace = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "full depth".to_owned(),
            fingerprint: fingerprint.to_owned(),
            num_loops: num_loops.clamp(1, 65),
            source: "no trace".to_owned(),
            recording: None,
        });
        let rows: Vec<_> = (0..trace.num_loops()).map(|depth| (Signals::default(), depth as u32)).collect();
        trace.push_generation(&rows);
        Ok(Self { is_recorded: false, ..Self::new(&trace, Draw::Seeded(0))? })
    }

    /// Number of loops of the recorded model.
    pub fn num_loops(&self) -> u8 {
        self.num_loops
    }

    /// Fingerprint of the recorded model.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Whether an exit policy can read a signal. Which predictions equal each other is known in any case.
    pub fn has(&self, signal: ExitSignal) -> bool {
        self.recorded.contains(signal) || self.is_scripted
    }

    /// Position of a request's token number `generated`.
    ///
    /// # Errors
    /// If the trace should be recorded from these requests and is not.
    pub fn cursor(&self, request: &Request, generated: u32) -> Result<Cursor, ExitError> {
        if self.draw == Draw::Recorded {
            self.check_recorded(request)?;
        }
        let mut cursor = self.drawn(request.id, 0);
        let mut left = generated;
        if let Some(history) = &self.history {
            return Ok(self.resumed(history, cursor, generated));
        }
        while left >= self.tokens_left(&cursor) {
            left -= self.tokens_left(&cursor);
            cursor = self.drawn(request.id, cursor.draws);
        }
        cursor.row += left as usize * usize::from(self.num_loops);
        Ok(cursor)
    }

    /// Advances the requests whose rows exit to their next tokens. Returns how many of the exiting tokens agree with
    /// full depth.
    pub fn exit(&self, pass: &Pass<'_>, exiting: &[u32], cursors: &mut [Cursor]) -> u64 {
        if let Some(history) = &self.history {
            return self.exit_after(history, pass, exiting, cursors);
        }
        let num_loops = usize::from(self.num_loops);
        let signals: &[f32] = match pass.reads.signal {
            SignalRead::Signal(signal) => &self.signals[signal as usize],
            SignalRead::None | SignalRead::Oracle | SignalRead::Repeats => &[],
        };
        let mut agreeing = 0;
        for &index in exiting {
            let segment = pass.exited(index as usize);
            let cursor = &mut cursors[segment.slot as usize];
            agreeing += u64::from(self.agrees(cursor.at(segment.depth)));
            cursor.row += num_loops;
            if cursor.row == cursor.end {
                *cursor = self.drawn(cursor.request, cursor.draws);
            }
            // The pass that reads the next token's signals then does not wait for memory.
            prefetch(signals, cursor.row);
            prefetch(signals, cursor.row + num_loops - 1);
        }
        agreeing
    }

    /// The tokens that a request takes, one for each token of its output, by their index in the trace.
    ///
    /// # Errors
    /// If the trace was recorded under exit policies, or should be recorded from these requests and is not.
    pub fn tokens_of(&self, request: &Request) -> Result<Vec<usize>, ExitError> {
        if self.history.is_some() {
            return Err(ExitError::DependsOnExits);
        }
        let first = self.cursor(request, 0)?;
        let cursors = std::iter::successors(Some(first), |cursor| Some(self.next(cursor)));
        let token = |cursor: Cursor| cursor.row / usize::from(self.num_loops);
        Ok(cursors.map(token).take(request.output_tokens as usize).collect())
    }

    /// The position of the token after that at a cursor, where no token exits early for good.
    pub(crate) fn next(&self, cursor: &Cursor) -> Cursor {
        let row = cursor.row + usize::from(self.num_loops);
        match row == cursor.end {
            true => self.drawn(cursor.request, cursor.draws),
            false => Cursor { row, ..*cursor },
        }
    }

    /// As [`exit`](Self::exit), where the next token depends on the history.
    fn exit_after(&self, history: &History, pass: &Pass<'_>, exiting: &[u32], cursors: &mut [Cursor]) -> u64 {
        let num_loops = usize::from(self.num_loops);
        let mut agreeing = 0;
        for &index in exiting {
            let segment = pass.exited(index as usize);
            let cursor = &mut cursors[segment.slot as usize];
            agreeing += u64::from(self.agrees(cursor.at(segment.depth)));
            cursor.row += num_loops;
            cursor.position += 1;
            cursor.skipped += u32::from(self.num_loops - 1 - segment.depth);
            let ends = cursor.row == cursor.end;
            if ends || !history.is_alike(cursor.row / num_loops, cursor.position, cursor.skipped) {
                self.splice(history, cursor);
            }
        }
        agreeing
    }

    /// The cursor of a request that has `generated` tokens already. Which depths they skipped is not known; it is taken to be
    /// as many as in its generation.
    fn resumed(&self, history: &History, mut cursor: Cursor, generated: u32) -> Cursor {
        let (first, tokens) = (cursor.row / usize::from(self.num_loops), self.tokens_left(&cursor));
        let known = first + generated.min(tokens - 1) as usize;
        let per_token = f64::from(history.skipped[known]) / f64::from(history.positions[known].max(1));
        cursor.position = generated;
        cursor.skipped = (per_token * f64::from(generated)).round() as u32;
        if generated < tokens {
            cursor.row += generated as usize * usize::from(self.num_loops);
        } else {
            self.splice(history, &mut cursor);
        }
        cursor
    }

    /// Goes on with another token of a like history.
    fn splice(&self, history: &History, cursor: &mut Cursor) {
        let seed = match self.draw {
            Draw::Seeded(seed) => seed,
            Draw::Recorded => 0,
        };
        let drawn = hash(seed, u64::from(cursor.request) << 32 | u64::from(cursor.draws));
        let token = history.draw(drawn, cursor.position, cursor.skipped);
        let end = self.starts[self.starts.partition_point(|&start| start as usize <= token)];
        cursor.draws += 1;
        [cursor.row, cursor.end] = [token, end as usize].map(|token| token * usize::from(self.num_loops));
    }

    /// Sets the signals of the rows of a pass, by segment; `cursors` are by slot. Rows whose signal is not read get one
    /// too, which spares the loop a branch that would be mispredicted.
    pub fn read_signals(&self, pass: &Pass<'_>, cursors: &[Cursor], signals: &mut [f32]) {
        let segments = pass.segments.iter().zip(signals);
        if let read @ (SignalRead::Signal(_) | SignalRead::Repeats) = pass.reads.signal
            && self.is_scripted
        {
            let certain = [false, true].map(|exits| read.certain(exits));
            for (segment, signal) in segments {
                let exit = (segment.depth + pass.reads.delay).min(self.num_loops - 1);
                *signal = certain[usize::from(self.agrees(cursors[segment.slot as usize].at(exit)))];
            }
            return;
        }
        let rows = segments.map(|(segment, signal)| (cursors[segment.slot as usize].at(segment.depth), signal));
        match pass.reads.signal {
            SignalRead::None => {}
            SignalRead::Oracle => {
                let finals = self.history.as_ref().map_or(&*self.agreement, |history| &*history.finals);
                rows.for_each(|(row, signal)| *signal = f32::from(u8::from(is_set(finals, row))));
            }
            SignalRead::Repeats => {
                rows.for_each(|(row, signal)| *signal = f32::from(u8::from(is_set(&self.repeats, row))));
            }
            SignalRead::Signal(read) => {
                let values = &self.signals[read as usize];
                rows.for_each(|(row, signal)| *signal = values[row]);
            }
        }
    }

    fn tokens_left(&self, cursor: &Cursor) -> u32 {
        ((cursor.end - cursor.row) / usize::from(self.num_loops)) as u32
    }

    /// Whether the prediction in a row equals that of full depth.
    #[inline]
    pub fn agrees(&self, row: usize) -> bool {
        is_set(&self.agreement, row)
    }

    fn check_recorded(&self, request: &Request) -> Result<(), ExitError> {
        let generations = self.starts.len() - 1;
        let index = request.id as usize;
        if index >= generations {
            return Err(ExitError::NotRecorded { request: request.id, generations });
        }
        let recorded = self.starts[index + 1] - self.starts[index];
        if request.output_tokens > recorded {
            return Err(ExitError::TooShort { request: request.id, asked: request.output_tokens, recorded });
        }
        Ok(())
    }

    /// Start of the generation that a request takes after `draws` others.
    fn drawn(&self, request: u32, draws: u32) -> Cursor {
        let generations = self.starts.len() as u64 - 1;
        let index = match self.draw {
            Draw::Seeded(seed) => scaled(hash(seed, u64::from(request) << 32 | u64::from(draws)), generations) as usize,
            Draw::Recorded => request as usize,
        };
        let [row, end] = [index, index + 1].map(|at| self.starts[at] as usize * usize::from(self.num_loops));
        Cursor { request, draws: draws + 1, row, end, position: 0, skipped: 0 }
    }
}

/// Prefetches the cache line of a value, where the processor has an instruction for it.
#[inline]
fn prefetch(values: &[f32], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(value) = values.get(index) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, and the reference is valid.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
}

/// Whether a packed bit is 1.
#[inline]
fn is_set(bits: &[u64], index: usize) -> bool {
    bits[index / 64] >> (index % 64) & 1 == 1
}

/// Packs bits, the lowest first.
fn bits(values: impl Iterator<Item = bool>) -> Vec<u64> {
    let mut words = Vec::new();
    for (index, value) in values.enumerate() {
        if index % 64 == 0 {
            words.push(0);
        }
        words[index / 64] |= u64::from(value) << (index % 64);
    }
    words
}

/// A position in an exit trace: the token that a request generates next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    request: u32,
    /// Number of generations drawn so far.
    draws: u32,
    /// The token's row at depth 0; rows of deeper depths follow.
    row: usize,
    /// End of the current generation's rows.
    end: usize,
    /// Tokens before it, and the depths that they skipped. Only in traces that were recorded under exit policies.
    position: u32,
    skipped: u32,
}

impl Cursor {
    /// The request, and the number of tokens that it has generated, where the [history](History) matters.
    pub(crate) fn progress(&self) -> (u32, u32) {
        (self.request, self.position)
    }

    /// The token's row at a depth.
    #[inline]
    pub fn at(&self, depth: u8) -> usize {
        self.row + usize::from(depth)
    }
}

/// A well-mixed number from a seed and a key.
pub(crate) fn hash(seed: u64, key: u64) -> u64 {
    mix(mix(seed) ^ key)
}

/// Maps a hash to a number below `bound`.
pub(crate) fn scaled(hash: u64, bound: u64) -> u64 {
    ((u128::from(hash) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use scheduler::{BlockTables, ExitPolicy, RowKind, Segment, SignalReads};
    use traces::{Nanos, PassWork, Recording, ServedToken};

    /// Generation `g` has `g + 1` tokens, each predicted as `10 g + token` at the last depth.
    fn trace(generations: usize) -> ExitTrace {
        let mut trace = ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "test".into(),
            fingerprint: "test".into(),
            num_loops: 2,
            source: "made up".into(),
            recording: None,
        });
        for generation in 0..generations {
            let rows: Vec<_> = (0..2 * (generation + 1))
                .map(|row| (Signals { top1: row as f32, margin: 0.5, ..Signals::default() }, (row / 2) as u32))
                .collect();
            trace.push_generation(&rows);
        }
        trace
    }

    fn request(id: u32, output_tokens: u32) -> Request {
        Request { id, arrival: Nanos::ZERO, prompt_tokens: 1, output_tokens }
    }

    /// Makes the token at a cursor exit at the last depth, which agrees with itself.
    fn exit(model: &ExitModel, cursor: &mut Cursor) {
        assert_eq!(exit_full(model, cursor), 1);
    }

    /// Makes the token at a cursor exit at the last depth; returns whether it agrees with full depth.
    fn exit_full(model: &ExitModel, cursor: &mut Cursor) -> u64 {
        let kind = RowKind::Decode;
        let segments = [Segment { slot: 0, start: 1, tokens: 1, depth: 1, kind, predicts: true, generated: true }];
        let (tables, reads) = (BlockTables::new(1, 1, 1), ExitPolicy::None.signal_reads(2));
        let work = PassWork::default();
        let pass = Pass::new(&segments, reads, &tables, &work);
        model.exit(&pass, &[0], std::slice::from_mut(cursor))
    }

    fn tokens(model: &ExitModel, request: &Request, count: usize) -> Vec<u32> {
        let mut cursor = model.cursor(request, 0).unwrap();
        std::iter::repeat_with(|| {
            let token = cursor.row as u32 / u32::from(model.num_loops);
            exit(model, &mut cursor);
            token
        })
        .take(count)
        .collect()
    }

    #[test]
    fn requests_take_whole_generations_in_order() {
        let trace = trace(9);
        let model = ExitModel::new(&trace, Draw::Seeded(5)).unwrap();
        for id in 0..100 {
            let taken = tokens(&model, &request(id, 200), 200);
            let mut left = &taken[..];
            while let Some(first) = left.first() {
                let generation = trace.starts.iter().position(|start| start == first).expect("starts at a generation");
                let length = trace.generation(generation).len().min(left.len());
                assert!(left[..length].iter().copied().eq(*first..first + length as u32));
                left = &left[length..];
            }
        }
    }

    #[test]
    fn the_tokens_of_a_request_are_those_that_its_exits_walk_through() {
        let model = ExitModel::new(&trace(9), Draw::Seeded(5)).unwrap();
        for id in 0..20 {
            let walked = tokens(&model, &request(id, 50), 50);
            let listed = model.tokens_of(&request(id, 50)).unwrap();
            assert_eq!(listed, walked.iter().map(|&token| token as usize).collect::<Vec<_>>(), "request {id}");
        }
        let under_exits = ExitModel::new(&served(&[&[0; 3]]), Draw::Seeded(5)).unwrap();
        assert_eq!(under_exits.tokens_of(&request(0, 3)), Err(ExitError::DependsOnExits));
    }

    #[test]
    fn every_generation_is_drawn_about_equally_often() {
        let trace = trace(10);
        let model = ExitModel::new(&trace, Draw::Seeded(1)).unwrap();
        let mut counts = [0u32; 10];
        for id in 0..10_000 {
            let first = tokens(&model, &request(id, 1), 1)[0];
            counts[trace.starts.iter().position(|&start| start == first).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_preempted_request_goes_on_where_it_was() {
        let model = ExitModel::new(&trace(4), Draw::Seeded(5)).unwrap();
        let request = request(3, 60);
        for (generated, &token) in tokens(&model, &request, 60).iter().enumerate() {
            assert_eq!(model.cursor(&request, generated as u32).unwrap().row, 2 * token as usize);
        }
    }

    /// Two loops. `generations` is the exit depth of each token; all tokens of generation `g` have a top-1 probability of
    /// `g` at depth 0. Full depth gives what depth 0 predicts, the last depth something else.
    fn served(generations: &[&[u32]]) -> ExitTrace {
        let recording =
            Recording { policies: vec!["none".to_owned()], kv_fill: "skip".to_owned(), prefill_depth: None, seed: 1 };
        let mut trace = ExitTrace::new(ExitTraceMeta { recording: Some(recording), ..trace(0).meta });
        for (generation, depths) in generations.iter().enumerate() {
            let at = |top1| Signals { top1, ..Signals::default() };
            let rows = depths.iter().flat_map(|_| [(at(generation as f32), 1), (at(0.5), 2)]);
            let token = |&exit_depth: &u32| ServedToken { exit_depth, full_depth: 1 };
            trace.push_served(&rows.collect::<Vec<_>>(), &depths.iter().map(token).collect::<Vec<_>>(), 0);
        }
        trace
    }

    /// Has a request exit at these depths; returns the generation of each of its tokens, and how many agree.
    fn generations_taken(model: &ExitModel, trace: &ExitTrace, request: &Request, depths: &[u8]) -> (Vec<usize>, u64) {
        let mut cursor = model.cursor(request, 0).unwrap();
        let (tables, work, reads) = (BlockTables::new(1, 1, 1), PassWork::default(), ExitPolicy::None.signal_reads(2));
        let mut agreeing = 0;
        let mut token = |&depth: &u8| {
            let token = cursor.row as u32 / 2;
            let kind = RowKind::Decode;
            let segments = [Segment { slot: 0, start: 1, tokens: 1, depth, kind, predicts: true, generated: true }];
            let pass = Pass::new(&segments, reads, &tables, &work);
            agreeing += model.exit(&pass, &[0], std::slice::from_mut(&mut cursor));
            trace.starts.partition_point(|&start| start <= token) - 1
        };
        (depths.iter().map(&mut token).collect(), agreeing)
    }

    #[test]
    fn a_request_with_the_exits_of_its_recording_stays_with_it() {
        let trace = served(&[&[0; 40], &[1; 40], &[0; 40]]);
        let model = ExitModel::new(&trace, Draw::Recorded).unwrap();
        assert_eq!(model.kv_fill(), Some(KvFill::Skip));
        assert_eq!(generations_taken(&model, &trace, &request(2, 40), &[0; 40]), (vec![2; 40], 40));
        assert_eq!(generations_taken(&model, &trace, &request(1, 40), &[1; 40]), (vec![1; 40], 0));
    }

    #[test]
    fn a_request_goes_on_with_tokens_whose_history_skipped_as_much() {
        let mut generations = vec![&[0; 40][..]; 30];
        generations.extend([&[1; 40][..]; 30]);
        let trace = served(&generations);
        let model = ExitModel::new(&trace, Draw::Seeded(3)).unwrap();
        for id in 0..20 {
            let (taken, _) = generations_taken(&model, &trace, &request(id, 40), &[0; 40]);
            assert!(taken[10..].iter().all(|&generation| generation < 30), "all depths skipped: {taken:?}");
            let (taken, _) = generations_taken(&model, &trace, &request(id, 40), &[1; 40]);
            assert!(taken[10..].iter().all(|&generation| generation >= 30), "no depth skipped: {taken:?}");
        }
    }

    #[test]
    fn a_request_longer_than_its_recording_goes_on_at_the_same_position() {
        let trace = served(&[&[1; 3], &[1; 30], &[1; 30]]);
        let model = ExitModel::new(&trace, Draw::Seeded(1)).unwrap();
        let requests: Vec<Request> = (0..50).map(|id| request(id, 60)).collect();
        assert!(requests.iter().all(|request| model.is_longer_than_recorded(request)));
        let short: Vec<Request> = (0..50).map(|id| request(id, 3)).collect();
        assert!(!short.iter().any(|request| model.is_longer_than_recorded(request)));
        for request in &requests {
            let mut cursor = model.cursor(request, 0).unwrap();
            let mut positions = Vec::new();
            for _ in 0..60 {
                let token = cursor.row / 2;
                let generation = trace.starts.partition_point(|&start| start as usize <= token) - 1;
                positions.push(token - trace.starts[generation] as usize);
                exit_full(&model, &mut cursor);
            }
            assert!(positions[..30].iter().copied().eq(0..30), "{positions:?}");
            assert!(
                positions[30..].iter().copied().eq((15..30).chain(15..30)),
                "beyond, from the middle on: {positions:?}"
            );
        }
    }

    #[test]
    fn the_oracle_reads_the_last_depth_over_the_same_history_and_agreement_is_with_full_depth() {
        let trace = served(&[&[0, 0]]);
        let model = ExitModel::new(&trace, Draw::Recorded).unwrap();
        let cursor = model.cursor(&request(0, 2), 0).unwrap();
        let (tables, work) = (BlockTables::new(1, 1, 1), PassWork::default());
        let kind = RowKind::Decode;
        let read = |depth| {
            let segments = [Segment { slot: 0, start: 1, tokens: 1, depth, kind, predicts: true, generated: true }];
            let mut signals = [f32::NAN];
            let reads = SignalReads {
                signal: SignalRead::Oracle,
                below: 1,
                delay: 0,
                head_from: 0,
                verified_at: SignalReads::NO_DRAFTS,
            };
            let pass = Pass::new(&segments, reads, &tables, &work);
            model.read_signals(&pass, &[cursor], &mut signals);
            signals[0]
        };
        assert_eq!((read(0), read(1)), (0.0, 1.0));
        assert_eq!((model.agrees(cursor.at(0)), model.agrees(cursor.at(1))), (true, false));
    }

    #[test]
    fn a_kv_fill_that_is_none_is_refused() {
        let mut trace = served(&[&[0]]);
        trace.meta.recording.as_mut().unwrap().kv_fill = "copy".to_owned();
        assert_eq!(ExitModel::new(&trace, Draw::Recorded).unwrap_err(), ExitError::KvFill("copy".to_owned()));
    }

    #[test]
    fn signals_are_those_of_the_trace() {
        let trace = trace(3);
        let model = ExitModel::new(&trace, Draw::Recorded).unwrap();
        let mut cursor = model.cursor(&request(2, 3), 0).unwrap();
        exit(&model, &mut cursor);
        let token = trace.generation(2).start + 1;
        let tables = BlockTables::new(1, 1, 1);
        for depth in 0..2u8 {
            let (kind, work) = (RowKind::Decode, PassWork::default());
            let segments = [Segment { slot: 0, start: 1, tokens: 1, depth, kind, predicts: true, generated: true }];
            let read = |signal| {
                let mut signals = [f32::NAN];
                let reads =
                    SignalReads { signal, below: 1, delay: 0, head_from: 0, verified_at: SignalReads::NO_DRAFTS };
                let pass = Pass::new(&segments, reads, &tables, &work);
                model.read_signals(&pass, &[cursor], &mut signals);
                signals[0]
            };
            let signals = trace.signals_at(token, depth.into());
            for signal in trace.recorded.iter() {
                assert_eq!(read(SignalRead::Signal(signal)), signals.get(signal));
            }
            assert_eq!(
                read(SignalRead::Repeats) == 1.0,
                depth == 1 && trace.predictions[2 * token] == trace.predictions[2 * token + 1]
            );
            assert_eq!(model.agrees(cursor.at(depth)), trace.agrees(token, depth.into()));
            assert_eq!(read(SignalRead::Oracle) == 1.0, trace.agrees(token, depth.into()));
        }
    }

    #[test]
    fn scripted_tokens_exit_at_their_depths_whatever_signal_is_read() {
        let depths = [vec![2, 0, 1], vec![0, 2]];
        let model = ExitModel::from_depths(&depths, 3, "test", Draw::Recorded).unwrap();
        let (tables, work) = (BlockTables::new(1, 1, 1), PassWork::default());
        let policies = [
            "oracle",
            "confidence:0.9",
            "entropy:0.5",
            "entropy:0",
            "similarity:1",
            "gate:0.3",
            "margin:-1",
            "difference:0",
        ];
        for policy in policies {
            let policy: ExitPolicy = policy.parse().unwrap();
            assert!(ExitSignal::ALL.into_iter().all(|signal| model.has(signal)));
            let exits = |cursor: Cursor, depth| {
                let segments = [Segment {
                    slot: 0,
                    start: 1,
                    tokens: 1,
                    depth,
                    kind: RowKind::Decode,
                    predicts: true,
                    generated: true,
                }];
                let mut signals = [f32::NAN];
                let pass = Pass::new(&segments, policy.signal_reads(3), &tables, &work);
                model.read_signals(&pass, &[cursor], &mut signals);
                policy.bound().is_reached(signals[0])
            };
            for (id, depths) in (0..).zip(&depths) {
                let tokens = depths.len() as u32;
                let exit_depth = |generated| {
                    let cursor = model.cursor(&request(id, tokens), generated).unwrap();
                    (0..3).find(|&depth| exits(cursor, depth)).unwrap()
                };
                assert_eq!((0..tokens).map(exit_depth).collect::<Vec<_>>(), *depths, "{policy}");
            }
        }
        assert!(ExitModel::from_depths(&[], 3, "test", Draw::Recorded).is_err());
    }

    #[test]
    fn scripted_tokens_exit_at_their_depths_when_the_exit_is_decided_one_depth_earlier() {
        let model = ExitModel::from_depths(&[vec![2, 1, 1]], 4, "test", Draw::Recorded).unwrap();
        let (tables, work) = (BlockTables::new(1, 1, 1), PassWork::default());
        let policy: ExitPolicy = "delayed:gate:0.5".parse().unwrap();
        let sure_from = |generated| {
            let cursor = model.cursor(&request(0, 3), generated).unwrap();
            let kind = RowKind::Decode;
            let is_sure = |&depth: &u8| {
                let segments = [Segment { slot: 0, start: 1, tokens: 1, depth, kind, predicts: true, generated: true }];
                let pass = Pass::new(&segments, policy.signal_reads(4), &tables, &work);
                let mut signals = [f32::NAN];
                model.read_signals(&pass, &[cursor], &mut signals);
                policy.bound().is_reached(signals[0])
            };
            (0..4).find(is_sure).unwrap()
        };
        assert_eq!([0, 1, 2].map(sure_from), [1, 0, 0]);
    }

    #[test]
    fn traces_without_tokens_are_refused() {
        assert!(matches!(ExitModel::new(&trace(0), Draw::Recorded), Err(ExitError::Empty(_))));
        let mut empty = trace(2);
        empty.push_generation(&[]);
        assert_eq!(ExitModel::new(&empty, Draw::Seeded(0)).unwrap_err(), ExitError::EmptyGeneration(2));
    }
}
